"""Weights quantised as they load: which, to what, at what cost in bytes, and what logits say."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from kernels.quantize import Quantized, quantized
from model import runner as runner_module
from model import weights
from model.config import ConfigError, Fields
from model.families import added, build
from model.runner import ModelRunner, load_runner
from model.weights import QUANTIZATIONS, Parameters, fingerprint, weight_files
from tests.model.checkpoints import KINDS, LIGHTNING, SOFTMAX, bailing, write
from tests.model.harness import DEVICE, STEP_TOKENS, Sequence, load, logits_of, prompt
from tests.model.test_weights import NOTHING, STATUS, resident, write_shards

CODES = {name: codes for name, codes in QUANTIZATIONS.items() if codes is not None}
WRITERS = {
    **{
        name: KINDS[name]
        for name in (
            "native-dense-lightning",
            "native-hybrid",
            "native-windowed",
            "minimax-text-01",
            "transnormer",
        )
    },
    # every expert counts: none is exchanged for another that is almost as good
    "ring-linear": partial(bailing.write, num_experts_per_tok=16, topk_group=4),
}
KEPT = re.compile(
    r".*(norm|embed_tokens|word_embeddings|lm_head|lrpe|(block_sparse_moe|mlp)\.gate)\.\w+"
)
# of logits: the relative error that a model of 64 channels with normal weights stays within
BOUND = {"int8": 0.02, "fp8": 0.12}
SPREAD = {"transnormer": 2.5, "ring-linear": 6}  # so much further errors spread in these


@pytest.fixture(scope="module", params=WRITERS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](directory)
    return directory


def parameters_of(runner: ModelRunner) -> Parameters:
    assert runner.parameters is not None
    return runner.parameters


def logits_everywhere(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """Logits [T, V], token by token."""
    sequence = Sequence(runner, ids, 2)
    return torch.cat([logits_of(runner, [sequence.chunk(1)]) for _ in ids])


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def bound(path: Path, quantization: str) -> float:
    """Of the relative error of logits."""
    return BOUND[quantization] * next((n for k, n in SPREAD.items() if k in path.name), 1)


def test_linear_layers_and_experts_are_quantised_and_nothing_else(path: Path) -> None:
    places = parameters_of(load(path, quantization="int8")).places
    for name, place in places.items():
        assert isinstance(place, torch.Tensor) == bool(KEPT.fullmatch(name)), name
    assert any(isinstance(place, Quantized) for place in places.values())


def dequantised(runner: ModelRunner, path: Path, target: Path) -> ModelRunner:
    """The same checkpoint with the numbers that the runner's codes stand for, in full precision."""
    tensors = {
        name: place.double().float().cpu().contiguous()
        for name, place in parameters_of(runner).places.items()
    }
    shutil.copy(path / "config.json", target)
    save_file(tensors, target / "model.safetensors")
    return load(target)


def test_int8_is_the_model_of_what_its_codes_stand_for(path: Path, tmp_path: Path) -> None:
    """To the last digits: a wrong scale, part or order of a matrix would show."""
    small, ids = load(path, quantization="int8"), prompt(40)
    want = logits_everywhere(dequantised(small, path, tmp_path), ids)
    assert off(logits_everywhere(small, ids), want) < 1e-4


def test_fp8_is_the_model_of_what_its_codes_stand_for(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows rounded before each linear layer. They may round to another code where they differ
    in the last digit."""
    small, ids = load(path, quantization="fp8"), prompt(40)
    got = logits_everywhere(small, ids)
    whole = dequantised(small, path, tmp_path)
    matrices = [w for w in parameters_of(whole).linear if isinstance(w, torch.Tensor)]
    rounded, multiply = {w.untyped_storage().data_ptr() for w in matrices}, F.linear

    def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if w.untyped_storage().data_ptr() in rounded:
            x = quantized(x, CODES["fp8"]).double().to(x.dtype)
        return multiply(x, w)

    monkeypatch.setattr(F, "linear", linear)
    assert off(got, logits_everywhere(whole, ids)) < 0.03


@pytest.mark.parametrize("quantization", CODES)
def test_logits_stay_close(path: Path, quantization: str) -> None:
    ids = prompt(40)
    want = logits_everywhere(load(path), ids)
    got = logits_everywhere(load(path, quantization=quantization), ids)
    assert bound(path, quantization) / 20 < off(got, want) < bound(path, quantization)


@pytest.mark.parametrize("quantization", CODES)
def test_chunks_company_and_used_slots_change_nothing(path: Path, quantization: str) -> None:
    """fp8 rounds activations: what differs in the last digit may round to another code. A card's
    products of fp8 keep 14 bits, so that more digits differ there."""
    runner = load(path, quantization=quantization)
    limit = 1e-4 if quantization == "int8" else bound(path, quantization) / 4
    texts = [prompt(n, seed=n) for n in (31, 1, 90)]
    alone = [logits_of(runner, [Sequence(runner, text, 5).chunk(len(text))])[0] for text in texts]
    runner.store.slots.poison()
    sequences = [Sequence(runner, text, slot) for slot, text in zip((5, 0, 3), texts, strict=True)]
    for i, head in ((0, 30), (2, 41)):
        logits_of(runner, [sequences[i].chunk(head)])
    together = logits_of(runner, [s.chunk(len(s.ids) - s.done) for s in sequences])
    assert off(together, torch.stack(alone)) < limit


@pytest.mark.parametrize("quantization", CODES)
@pytest.mark.parametrize("piece", [1, 700, 1 << 30])
def test_pieces_of_any_size_make_the_same_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, quantization: str
) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", piece)
    a, b = torch.randn(7, 50), torch.randn(3, 50).bfloat16()
    experts = [torch.randn(8, 30, dtype=torch.float64) for _ in range(3)]
    files = {f"e{i}": expert for i, expert in enumerate(experts)} | {"a": a, "b": b}
    write_shards(tmp_path, [{name: tensor} for name, tensor in files.items()])
    parameters = Parameters(torch.device(DEVICE), torch.bfloat16, quantization)
    joined, stacked = parameters.rows([("a", 7), ("b", 3)], 50), parameters.matrices(3, 8, 30)
    for i in range(3):
        parameters.places[f"e{i}"] = stacked[i]
    parameters.fill(tmp_path, ignore=NOTHING)
    assert isinstance(joined, Quantized) and isinstance(stacked, Quantized)
    for got, want in [(joined, torch.cat((a, b))), *zip(stacked, experts, strict=True)]:  # type: ignore[call-overload]
        whole = quantized(want.to(DEVICE), CODES[quantization])
        assert torch.equal(got.codes.view(torch.uint8), whole.codes.view(torch.uint8))
        assert torch.equal(got.scales, whole.scales)


@pytest.mark.skipif(not STATUS.exists(), reason="measures by Linux's /proc")
def test_the_model_is_never_whole_in_full_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What loading takes beside the codes is one shard and some pieces."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 1 << 20)
    rows, columns, count = 10_000, 1000, 5  # 40 MB each
    tensors = {f"t{i}": torch.full((rows, columns), 1.0) for i in range(count)}
    write_shards(tmp_path, [{name: tensor} for name, tensor in tensors.items()])
    parameters = Parameters(torch.device("cpu"), torch.float32, "int8")
    for name in tensors:
        matrix = parameters.matrix(name, rows, columns)
        assert isinstance(matrix, Quantized)
        matrix.codes.zero_(), matrix.scales.zero_()  # resident from here on
    del tensors
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = resident()
    parameters.fill(tmp_path, ignore=NOTHING)
    assert resident("VmHWM") - before < 40e6 * 1.25 + 16e6


def test_drawn_weights_are_the_same_however_they_are_kept(tmp_path: Path) -> None:
    write(tmp_path, layer_types=[LIGHTNING, SOFTMAX, LIGHTNING, LIGHTNING])
    (tmp_path / "model.safetensors").unlink()
    runners = {name: load(tmp_path, seed=3, quantization=name) for name in QUANTIZATIONS}
    whole, others = parameters_of(runners["none"]).places, [*CODES]
    for other in others:
        for name, place in parameters_of(runners[other]).places.items():
            limit = 0.02 if other == "int8" else 0.05
            assert off(place.double(), whole[name].double()) < limit, name
    assert len({runner.capacity.fingerprint for runner in runners.values()}) == 3


def test_a_checkpoint_has_a_name_for_each_quantization(path: Path) -> None:
    """So that the states of one are never restored into another."""
    assert len({fingerprint(path, name) for name in QUANTIZATIONS}) == 3
    names = {load(path, quantization=name).capacity.fingerprint for name in QUANTIZATIONS}
    assert len(names) == 3


def test_weights_that_are_not_finite_are_not_hidden(path: Path, tmp_path: Path) -> None:
    tensors = {name: t for file in weight_files(path) for name, t in load_file(file).items()}
    name = next(name for name, tensor in tensors.items() if not KEPT.fullmatch(name))
    tensors[name][3, 5] = torch.nan
    shutil.copy(path / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    runner = load(tmp_path, quantization="int8")
    assert logits_of(runner, [Sequence(runner, [1, 2], 0).chunk(2)]).isnan().any()


def test_a_card_without_fp8_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A40")
    monkeypatch.setattr(runner_module, "_device", lambda _: torch.device("cuda:0"))
    message = r"quantization is 'fp8', and NVIDIA A40 \(sm_86\) has no products of fp8"
    with pytest.raises(ConfigError, match=message):
        load_runner(path, device="cuda", quantization="fp8")


@pytest.mark.parametrize("method", [{"quant_method": "fp8"}, {"bits": 4}, "awq"])
def test_a_checkpoint_that_is_quantised_already_is_refused(path: Path, method: Any) -> None:
    values = json.loads((path / "config.json").read_text()) | {"quantization_config": method}
    with pytest.raises(ConfigError, match=r"config\.json: quantization_config is .* already"):
        build(Fields(values), Parameters(torch.device("meta"), torch.float32))


@pytest.mark.skipif(DEVICE == "cpu", reason="bfloat16 and graphs are a GPU's")
@pytest.mark.parametrize("quantization", CODES)
def test_in_bfloat16_with_graphs(path: Path, quantization: str) -> None:
    options: dict[str, Any] = {"device": "cuda", "state_memory_gb": 0.02, "max_running": 8}
    options["max_step_tokens"] = STEP_TOKENS
    whole, small = (
        load_runner(path, quantization=name, **options) for name in ("none", quantization)
    )
    ids = prompt(40)
    error = off(logits_everywhere(small, ids), logits_everywhere(whole, ids))
    assert error < 2 * bound(path, quantization)  # bfloat16 itself is 0.01 to 0.03 off
    again = Sequence(small, ids, 4)
    for _ in ids[1:]:
        small.step([again.chunk(1)])
    last = again.chunk(1)
    assert small.graphs is not None and small.graphs.serve([last])
    small.sequences.keep([last])
    replayed = added(small.graphs.replay([last]).terms).cpu()
    assert off(replayed[0], logits_everywhere(small, ids)[-1]) < 0.02
