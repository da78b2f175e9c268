"""The life of the engine process: settings from stdin, signals, load, loop, exit code."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from server.engine.line import Line
from server.engine.loop import LoadedRunner, Loop
from server.logs import configure
from server.settings import Settings

log = logging.getLogger(__name__)


def run_engine(directory: Path, load: Callable[[Settings], LoadedRunner]) -> int:
    """Serve the sockets in `directory` until SIGTERM or the parent's end; the exit code.

    SIGINT is the parent's to handle: a Ctrl-C reaches both, and it may want to drain first.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    settings = Settings.model_validate_json(sys.stdin.buffer.read())
    configure(settings.log_level)
    line = Line(directory, settings.api_workers)
    try:
        loop = Loop(
            load(settings),
            line,
            caching=settings.prefix_caching,
            host_bytes=settings.host_cache_bytes,
            directory=settings.context_directory,
            disk_bytes=settings.disk_cache_bytes,
            swap_bytes=settings.swap_bytes,
            target_seconds=settings.target_seconds,
        )
        gc.collect()
        gc.freeze()  # what was loaded stays: never walk it again
        loop.run(lambda: os.getppid() == parent)
        line.remove()  # the parent is gone, and with it whoever would tidy up
    except Exception as error:
        log.exception("the engine failed: %s", error)
        return 1
    finally:
        line.close()
    return 0
