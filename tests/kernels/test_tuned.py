"""What the table of tunings says of a card computes what the recurrence says, on any machine."""

from collections.abc import Iterator

import pytest
import torch

from kernels import segments, tuning
from kernels.tuning import DECODE, PREFILL, RING, measured
from tests.kernels import test_lightning_decode as decoding
from tests.kernels import test_lightning_ring as ring
from tests.kernels.test_lightning_prefill import check

CARD = (9, 0)
LOOKUPS = (tuning.prefill_tuning, tuning.ring_tuning, tuning.decode_tuning)
pytestmark = pytest.mark.parametrize("device", ["triton"], indirect=True)


@pytest.fixture(autouse=True)
def _of_the_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table's rows for the card, whatever this machine has."""

    def forget() -> None:
        for lookup in LOOKUPS:
            lookup.cache_clear()

    monkeypatch.setattr(tuning, "card", lambda device: CARD)
    forget()
    yield
    monkeypatch.undo()
    forget()


def test_all_of_it_is_here(device):
    assert {name for name in measured(CARD)["prefill"] if not name.endswith(tuning.SHORT)} == {
        f"{itemsize}x{dk}" for itemsize, dk in PREFILL
    }
    assert set(measured(CARD)["ring"]) == {str(itemsize) for itemsize in RING}
    assert set(measured(CARD)["decode"]) == {str(itemsize) for itemsize in DECODE}


@pytest.mark.parametrize(("itemsize", "dk"), PREFILL)
@pytest.mark.parametrize("reread", [False, True], ids=["scanned", "reread"])
def test_prefill(device, itemsize, dk, reread, monkeypatch):
    monkeypatch.setattr(segments, "choose", lambda *_: (64, reread))
    dtype = {4: torch.float32, 2: torch.float16 if device.type == "cpu" else torch.bfloat16}
    check([330, 70], [3, 0], dk=dk, dv=128, dtype=dtype[itemsize], device=device)


def test_decode(device):
    decoding.test_a_batch_with_padding(device, 128, 128, torch.float16)
    decoding.test_bfloat16_state(device)


def test_decode_with_a_ring(device):
    ring.test_a_staggered_batch_with_padding(device, 128, 128, 5, torch.float16)
    ring.test_bfloat16_state(device)
