"""python -m server.engine --directory DIR: the engine process; its settings are JSON on stdin."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from server.engine.loop import LoadedRunner
from server.engine.process import run_engine
from server.settings import Settings


def load(settings: Settings, *, seed: int | None = None) -> LoadedRunner:
    """The model that the settings name, ready to run; with a seed its weights are drawn."""
    from model.runner import load_runner

    return load_runner(
        settings.model_path,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        max_running=settings.max_running,
        memory_fraction=settings.memory_fraction,
        state_memory_gb=settings.state_memory_gb,
        max_model_len=settings.max_model_len,
        max_step_tokens=settings.max_step_tokens,
        host_bytes=settings.host_cache_bytes if settings.prefix_caching else 0,
        quantization=settings.quantization,
        state_dtype=settings.state_dtype,
        ring=settings.ring,
        decay_layer_factor=settings.decay_layer_factor,
        seed=seed,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="server.engine", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where the sockets lie")
    return run_engine(parser.parse_args().directory, load)


if __name__ == "__main__":
    sys.exit(main())
