"""--quantization on its way from the settings to the weights."""

from __future__ import annotations

from server.engine.__main__ import load
from server.settings import Settings


def test_the_engine_loads_what_the_setting_says() -> None:
    taken = {}
    for name in ("none", "int8", "fp8"):
        settings = Settings(
            model="recall", device="cpu", quantization=name, max_running=1, state_memory_gb=0.01
        )
        parameters = load(settings).parameters  # type: ignore[attr-defined]
        taken[name] = parameters.nbytes
    assert taken["int8"] == taken["fp8"] < 0.35 * taken["none"]
