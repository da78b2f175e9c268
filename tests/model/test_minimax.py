"""MiniMax: what its two layouts ask of a config.json and of the weights, and what bounds it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.chunk import Chunk, Sampling
from model.config import ConfigError
from model.families.minimax import LightningMixer, MiniMax
from model.weights import WeightsError
from tests.model.checkpoints import LIGHTNING, ONE_EXPERT, minimax, write
from tests.model.harness import Sequence, load, logits_of, prompt

DENSE = {"layer_types": [LIGHTNING] * 4, **ONE_EXPERT}


def test_pure_and_windowed_models_have_no_maximum_length(tmp_path: Path) -> None:
    write(tmp_path, sliding_window=24, **ONE_EXPERT)
    capacity = load(tmp_path).capacity
    assert (capacity.blocks, capacity.max_model_len) == (0, None)
    assert load(tmp_path, max_model_len=77).capacity.max_model_len == 77


def test_hybrid_is_bounded_by_its_blocks(tmp_path: Path) -> None:
    write(tmp_path, max_position_embeddings=10**9)
    capacity = load(tmp_path).capacity
    assert capacity.max_model_len == capacity.blocks * capacity.block_size > 0
    with pytest.raises(ConfigError, match=r"max_model_len is 1000000000, at most \d+ fit"):
        load(tmp_path, max_model_len=10**9)


def test_missing_and_left_over_tensors_are_named(tmp_path: Path) -> None:
    write(tmp_path, **DENSE)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.self_attn.out_proj.weight"]
    tensors["model.layers.0.self_attn.surplus.weight"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.zeros(5)
    save_file(tensors, file)
    with pytest.raises(WeightsError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "missing: model.layers.2.self_attn.out_proj.weight" in message
    assert "left over: model.layers.0.self_attn.surplus.weight" in message
    assert "model.norm.weight: shape (5,), (64,) is due" in message


def test_decay_buffers_in_the_file_are_ignored(tmp_path: Path) -> None:
    oracle = write(tmp_path, **DENSE)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    buffers = [name for name in tensors if name.endswith(("slope_rate", "diagonal_decay"))]
    assert buffers, "transformers writes them"
    for name in buffers:
        tensors[name].fill_(float("nan"))
    save_file(tensors, file)
    runner = load(tmp_path)
    ids = prompt(50)
    got = logits_of(runner, [Sequence(runner, ids, 0).chunk(50)])[0]
    torch.testing.assert_close(got, oracle(ids)[-1], atol=1e-4, rtol=1e-4)


def change(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("num_attention_heads", "four"),
        ("layer_types", [LIGHTNING]),
        ("num_key_value_heads", 3),
        ("rotary_dim", 7),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
        ("postnorm", False),
    ],
)
def test_a_bad_config_names_the_field(tmp_path: Path, field: str, value: object) -> None:
    write(tmp_path)
    change(tmp_path, **{field: value})
    with pytest.raises(ConfigError, match=f"{field} is {re.escape(repr(value))}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_type_list", [0, 1]),
        ("attn_type_list", [0, 2, 0, 0]),
        ("attn_type_list", [False, True, False, False]),
        ("shared_intermediate_size", 64),
        ("sliding_window", 4096),
        ("rope_scaling", {"type": "yarn"}),
        ("rope_theta", 0),
        ("rms_norm_eps", -1e-5),
        ("layernorm_mlp_alpha", float("inf")),
        ("rotary_dim", 18),
    ],
)
def test_a_bad_config_of_the_authors_layout(tmp_path: Path, field: str, value: object) -> None:
    minimax.write(tmp_path)
    change(tmp_path, **{field: value})
    with pytest.raises(ConfigError, match=f"{field} is {re.escape(repr(value))}"):
        load(tmp_path)


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], ["MiniMaxM2ForCausalLM"]])
def test_architectures_alone_choose_the_family(tmp_path: Path, names: list[str]) -> None:
    minimax.write(tmp_path)
    change(tmp_path, architectures=names)
    with pytest.raises(ConfigError, match=f"architecture '{names[0]}' is not served"):
        load(tmp_path)
    change(tmp_path, architectures=["MiniMaxM1ForCausalLM"], model_type="llama")
    load(tmp_path)


def test_transformers_layout_turns_as_many_dimensions_as_rotary_dim_says(tmp_path: Path) -> None:
    """The released weights turn half of each head; transformers ignores the field."""
    oracle = write(tmp_path)
    whole = load(tmp_path)
    change(tmp_path, rotary_dim=8)
    half = load(tmp_path)
    ids = prompt(20)
    same, other = (logits_of(r, [Sequence(r, ids, 0).chunk(20)])[0] for r in (whole, half))
    torch.testing.assert_close(same, oracle(ids)[-1], atol=1e-4, rtol=1e-4)
    assert (other - same).abs().max() > 1e-2


def test_the_layouts_differ_in_the_decay_of_the_last_layer(tmp_path: Path) -> None:
    """Too little to show in the logits of a short text: 1.33 times at four layers."""
    write(tmp_path / "transformers", layer_types=[LIGHTNING] * 4)
    minimax.write(tmp_path / "authors", num_attention_heads=6, num_key_value_heads=3)
    slopes = {}
    for path in tmp_path.iterdir():
        model = load(path).model
        assert isinstance(model, MiniMax)
        mixer = model.mixers[3]
        assert isinstance(mixer, LightningMixer)
        slopes[path.name] = mixer.lightning.slopes.tolist()
    plain = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert slopes["authors"] == pytest.approx([s * 1e-5 for s in (*plain, 2**-1, 2**-3)], rel=1e-6)
    assert slopes["transformers"] == pytest.approx([s * 1.3333e-5 for s in plain], rel=1e-3)


def test_ids_that_pad_the_vocabulary_are_never_sampled(tmp_path: Path) -> None:
    """200,064 rows for 200,032 tokens: the rows beyond are the best by far, and do not count."""
    size, known = 200_064, 200_032
    minimax.write(
        tmp_path,
        **minimax.M1,
        vocab_size=size,
        hidden_size=8,
        num_hidden_layers=1,
        attn_type_list=[0],
        **ONE_EXPERT,
    )
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        if "lm_head.weight" in tensors:
            head = tensors["lm_head.weight"]
            head[known:] = 50.0 * head[:1].sign() * torch.arange(1, 33)[:, None]
            head[known + 1 :: 2] *= -1
            save_file(tensors, file)
    runner = load(tmp_path)
    kinds = [
        Sampling(temperature=0.0, logprobs=20),
        Sampling(temperature=2.0, logprobs=20, logit_bias={known + 3: 100.0}),
        Sampling(temperature=1.0, top_p=0.9, top_k=50, logprobs=20, repetition_penalty=1.5),
    ]
    for seed in range(5):
        chunks = [
            Chunk(tokens=[seed, 2], start=0, slot=i, sampling=kind, penalised=kind.penalised)
            for i, kind in enumerate(kinds)
        ]
        for drawn in runner.step(chunks):
            assert drawn is not None and 0 <= drawn.token < known
            assert drawn.logprob is not None and drawn.logprob > -40
            assert all(token < known for token, _ in drawn.top)
            assert drawn.top[0][1] > -14  # shares of what is left
        # one token of each and nothing but a temperature: a graph where there are graphs
        plain = [
            Chunk(tokens=[3], start=2, slot=i, sampling=Sampling(temperature=i, seed=seed))
            for i in range(3)
        ]
        assert all(drawn and 0 <= drawn.token < known for drawn in runner.step(plain))
    raw = logits_of(runner, [Sequence(runner, [0, 2], 0).chunk(2)])[0]
    assert int(raw.argmax()) >= known, "the rows beyond would have won"
