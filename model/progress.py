"""Progress of long transfers: a bar where stderr is a terminal, else log lines. No torch here."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between log lines
LINE = "{n_fmt}{unit} of {total_fmt}{unit} in {elapsed_s:.1f} s, {rate_fmt}"


class Progress(tqdm):
    """A tqdm bar. Without a terminal it logs instead: at most a line in LINE_SECONDS, and the
    last."""

    monitor_interval = 0  # no thread that watches the bars

    def __init__(self, *args: Any, **options: Any) -> None:
        self.bar = sys.stderr.isatty()
        self._logged: object = 0
        if not self.bar:
            options |= {"file": io.StringIO(), "mininterval": LINE_SECONDS, "miniters": 1}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """Draw the bar, or log how far it has come since the last line."""
        if self.bar:
            return super().display(msg, pos)
        if self.n != self._logged:
            self._logged = self.n
            log.info(
                "%s: %s",
                self.desc.removesuffix(": "),
                tqdm.format_meter(**(self.format_dict | {"bar_format": LINE})),
            )
        return None
