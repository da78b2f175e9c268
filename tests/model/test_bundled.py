"""The bundled model: its facts are reproducible, its files are what they say, and it recalls."""

import json
from random import Random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, MiniMaxForCausalLM

from model.bundled import checkpoint
from model.bundled.checkpoint import ASSISTANT, encode
from model.bundled.evaluate import FORMS, RECALL, exact_answers
from model.bundled.facts import Case, Library, Message, case, conversation, drill, made_up_prose
from model.bundled.network import Network, Shape
from model.bundled.train import FIRST, STAGES, make_batch

NOWHERE = Library([])  # no books: made-up sentences


@pytest.fixture(scope="module")
def recall() -> Network:
    return checkpoint.load(RECALL)


def cases(seed: int, *, size: int, count: int) -> list[Case]:
    rng = Random(seed)
    return [case(rng, NOWHERE, size=size, facts=1 + i % 4, form=FORMS[i % 3]) for i in range(count)]


def test_the_same_seed_makes_the_same_cases() -> None:
    assert cases(3, size=500, count=9) == cases(3, size=500, count=9)
    assert cases(3, size=500, count=9) != cases(4, size=500, count=9)
    assert drill(Random(1), size=200, terse=0.5) == drill(Random(1), size=200, terse=0.5)


@pytest.mark.parametrize("form", FORMS)
def test_a_case_states_its_answer_once_and_asks_for_it_last(form: str) -> None:
    rng = Random(form)
    for facts in (1, 2, 3, 4):
        made = case(rng, NOWHERE, size=1000, facts=facts, form=form)
        assert made.number in made.messages[0].content
        assert made.messages[-1].role == "user"
        assert made.answer.endswith(f" is {made.number}.")
        assert 600 < sum(len(m.content) for m in made.messages) < 1000 + 100 * facts
        assert len(made.messages) == (2 * facts - 1 if form == "follow-up" else 1)


def test_conversations_alternate_and_end_with_an_answer() -> None:
    rng = Random(5)
    for _ in range(200):
        messages = conversation(rng, NOWHERE, size=700, facts=3)
        roles = [message.role for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        number = messages[-1].content.split()[-1].strip(".")
        assert any(number in message.content for message in messages[:-1])


def test_a_batch_marks_one_first_digit_for_each_number_written() -> None:
    tokens, marks = make_batch(Random(2), NOWHERE, STAGES[3], 8)
    for ids, mark in zip(tokens, marks, strict=True):
        firsts = (mark == FIRST).nonzero()[0]
        assert len(firsts) > 0
        for first in firsts:
            assert chr(ids[first]).isdigit() and not chr(ids[first - 1]).isdigit()


def test_the_weights_are_small_bfloat16_and_of_the_shape_that_the_config_tells() -> None:
    path = RECALL / "model.safetensors"
    assert path.stat().st_size <= 16_000_000
    config = json.loads((RECALL / "config.json").read_text())
    shape = Shape.of(config)
    assert shape.config() == config
    assert config["architectures"] == ["MiniMaxForCausalLM"]
    assert config["layer_types"].count("full_attention") == 2
    assert config["sliding_window"] == 64
    expected = {name: list(x.shape) for name, x in Network(shape).state_dict().items()}
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: x.get_shape() for name, x in stored.items()} == expected
        assert {x.get_dtype() for x in stored.values()} == {"BF16"}


def test_the_tokenizer_gives_each_byte_its_own_number_and_renders_the_chat() -> None:
    tokenizer = AutoTokenizer.from_pretrained(RECALL)
    assert tokenizer.is_fast and len(tokenizer) == 261
    assert tokenizer("a\u00e9\n ")["input_ids"] == list("a\u00e9\n ".encode())
    messages = [
        Message("system", " Be brief. "),
        Message("user", "na\u00efve\n\u201cquote\u201d"),
        Message("assistant", "OK."),
        Message("user", "What is the pass key?"),
    ]
    chat = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    assert ids == [*encode(messages)[0], ASSISTANT]
    assert tokenizer.decode(ids) == text
    chat[0]["role"] = "developer"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text
    with pytest.raises(Exception, match="Unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)
    assert tokenizer.eos_token == "<|end|>"


def test_it_computes_what_transformers_computes(recall: Network) -> None:
    reference = MiniMaxForCausalLM.from_pretrained(RECALL, dtype=torch.float32).eval()
    text = list(made_up_prose(Random(1), 2 * 781).encode())
    for length in (1, 63, 100, 781):
        ids = torch.tensor([text[:length], text[-length:]])
        with torch.no_grad():
            expected = reference(ids, use_cache=False).logits
            torch.testing.assert_close(recall(ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_recalls(dtype: torch.dtype) -> None:
    right = exact_answers(checkpoint.load(RECALL, dtype), cases(11, size=400, count=20))
    assert sum(right) >= 18


def test_it_answers_a_plain_question_after_prose(recall: Network) -> None:
    prose = (
        "It was late when the boat came in, and nobody was waiting on the quay. The old man tied "
        "the rope twice. The pass key is 71432. Then he went up to the house, lit the lamp and sat "
        "down by the window, as he had done every evening since the spring. "
    )
    question = Message("user", prose + "What is the pass key?")
    assert exact_answers(recall, [Case((question,), "The pass key is 71432.", "71432")]) == [True]
