"""Where Triton is not installed, every module imports, kernels compute and the model answers."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, pkgutil, sys
sys.modules["triton"] = None

import torch
import kernels, model, server
for package in (kernels, model, server):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

from kernels.language import HAVE_TRITON
from kernels.lightning_decode import lightning_decode
from kernels.lightning_prefill import lightning_prefill
from kernels.lightning_reference import lightning_reference
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.rmsnorm import rmsnorm
from kernels.window_attention import window_attention, window_attention_reference
from tests.kernels.cases import error, pack

assert not HAVE_TRITON
q, k, v = torch.randn(71, 2, 3, 16).unbind(2)
slopes, states, packing = torch.tensor([0.1, 0.0]), torch.zeros(1, 2, 16, 16), pack([70], [0], [0])
o = lightning_prefill(q[:70], k[:70], v[:70], slopes, 1.0, states, packing)
last = packing.slots, torch.tensor([70])
o = torch.cat((o, lightning_decode(q[70:], k[70:], v[70:], slopes, 1.0, states, *last)))
expected, state = lightning_reference(q, k, v, slopes, 1.0)
assert error(o, expected) < 1e-5 and error(states[0], state) < 1e-5

packing = pack([71], [0], [0])
rings = torch.zeros(1, 8, 2, 16), torch.zeros(1, 8, 2, 16)
o = window_attention(q, k, v, *rings, packing, 8, 0.25)
assert error(o, window_attention_reference(q, k, v, 8, 0.25)) < 1e-5

pages, table = torch.zeros(2, 5, 16, 2, 16), torch.arange(5, dtype=torch.int32)[None]
o = paged_attention(q, k, v, pages[0], pages[1], table, packing, 0.25)
assert error(o, paged_attention_reference(q, k, v, 0.25)) < 1e-5
assert rmsnorm(q, None, 1e-6).isfinite().all()

from pathlib import Path
recall = Path("model/bundled/recall")
from model.chunk import Chunk, Sampling
from model.runner import load_runner

runner = load_runner(recall, device="cpu", threads=1, max_running=2)
tokens, said = list(b"The pass key is 71432. What is the pass key?"), []
tokens, start = [258, *tokens, 260, 259], 0
while not said or (said[-1] != 260 and len(said) < 40):
    new = tokens[start:]
    chunk = Chunk(tokens=new, start=start, slot=1, blocks=[], sampling=Sampling(temperature=0.0))
    (drawn,) = runner.step([chunk])
    start += len(new)
    said.append(drawn.token)
    tokens.append(drawn.token)
print(bytes(said[:-1]).decode())
"""


def test_everything_imports_and_computes():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "The pass key is 71432.\n", done.stderr
