"""Facts hidden in prose and the conversations that ask for them: seeded, pure Python.

A fact is a noun, perhaps the name of a person, and a number: "The locker number of Fepe is 808018."
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

NOUNS = (
    "pass key",
    "secret code",
    "locker number",
    "account number",
    "badge number",
    "room code",
    "ticket number",
    "case number",
)
STATEMENTS = (
    "The {noun} of {name} is {number}.",
    "{name}'s {noun} is {number}.",
    "Remember that the {noun} of {name} is {number}.",
    "The {noun} of {name} is {number}. Remember it.",
    "Note: the {noun} of {name} is {number}.",
    "{name} has the {noun} {number}.",
)
QUESTIONS = (
    "What is the {noun} of {name}?",
    "What is {name}'s {noun}?",
    "Tell me the {noun} of {name}.",
    "What was the {noun} of {name}?",
    "Which {noun} does {name} have?",
    "Do you remember the {noun} of {name}?",
    "And the {noun} of {name}?",
)
NAMELESS_STATEMENTS = (
    "The {noun} is {number}.",
    "The {noun} is {number}. Remember it.",
    "The {noun} is {number}. Remember it. {number} is the {noun}.",
    "Remember that the {noun} is {number}.",
    "Remember the {noun}: {number}.",
    "Note: the {noun} is {number}.",
)
NAMELESS_QUESTIONS = (
    "What is the {noun}?",
    "Tell me the {noun}.",
    "What was the {noun}?",
    "Do you remember the {noun}?",
    "What is the {noun} in the text?",
    "And the {noun}?",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer with the number.",
    "Answer the question from the text.",
    "Answer briefly.",
)
PEOPLE = [
    "Alice",
    "Anna",
    "Ben",
    "Bob",
    "Carol",
    "Clara",
    "Daniel",
    "David",
    "Emma",
    "Eva",
    "Frank",
    "Fred",
    "George",
    "Grace",
    "Hanna",
    "Henry",
    "Ida",
    "Irene",
    "Jack",
    "James",
    "Jane",
    "John",
    "Julia",
    "Karen",
    "Kate",
    "Laura",
    "Leo",
    "Lucy",
    "Maria",
    "Mark",
    "Martin",
    "Mary",
    "Max",
    "Nina",
    "Nora",
    "Oliver",
    "Oscar",
    "Paul",
    "Peter",
    "Rachel",
    "Robert",
    "Rosa",
    "Ruth",
    "Sam",
    "Sarah",
    "Simon",
    "Sofia",
    "Susan",
    "Thomas",
    "Tom",
    "Victor",
    "Walter",
    "William",
]
ONSETS = ["b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z"]
CLUSTERS = ["br", "ch", "cl", "dr", "fl", "gr", "kr", "pl", "qu", "sh", "sl", "st", "th", "tr", "y"]
VOWELS = ["a", "e", "i", "o", "u"]
CODAS = ["n", "r", "l", "s", "m", "k", "t"]
ACKNOWLEDGEMENT = "OK."
REFRAIN = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
SENTENCE_END = re.compile(r"[.!?][\"')]?\s")


@dataclass(frozen=True, slots=True)
class Fact:
    """A number under a noun; `name` is empty where the fact belongs to nobody."""

    noun: str
    name: str
    number: str

    def state(self, rng: Random) -> str:
        """A sentence that gives the number."""
        wordings = STATEMENTS if self.name else NAMELESS_STATEMENTS
        return self._fill(wordings[0] if rng.random() < 0.3 else rng.choice(wordings))

    def ask(self, rng: Random) -> str:
        """A question that the number answers."""
        return self._fill(rng.choice(QUESTIONS if self.name else NAMELESS_QUESTIONS))

    def answer(self) -> str:
        """The sentence that answers the question."""
        return self._fill(STATEMENTS[0] if self.name else NAMELESS_STATEMENTS[0])

    def _fill(self, wording: str) -> str:
        text = wording.format(noun=self.noun, name=self.name, number=self.number)
        return text[0].upper() + text[1:]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; the role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation that ends with a question, the sentence that answers it, its number."""

    messages: tuple[Message, ...]
    answer: str
    number: str


class Library:
    """Prose to hide facts in: stretches of texts, or made-up sentences where there are none."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text for text in texts if text]
        self.sizes = [len(text) for text in self.texts]

    @classmethod
    def read(cls, folder: Path, *, hold_out: str, held_out: bool) -> Library:
        """The books (*.txt) of a folder: all but the one named `hold_out`, or that one alone."""
        paths = sorted(p for p in folder.glob("*.txt") if (p.name == hold_out) == held_out)
        if not paths:
            raise ValueError(f"{folder}: no book to read (hold_out={hold_out})")
        return cls([path.read_text(encoding="utf-8") for path in paths])

    def take(self, rng: Random, size: int, *, variety: bool = True) -> str:
        """About `size` characters that begin with a word; `variety` changes how some look."""
        if size <= 0:
            return ""
        kind = rng.random() if variety else 1.0
        if not self.texts or kind < 0.04:
            return made_up_prose(rng, size)
        if kind < 0.07:
            start = rng.randrange(len(REFRAIN))
            return (REFRAIN * (size // len(REFRAIN) + 2))[start : start + size]
        (text,) = rng.choices(self.texts, self.sizes)
        start = text.find(" ", rng.randrange(max(1, len(text) - size - 80))) + 1
        piece = text[start : start + size]
        if kind < 0.5:
            piece = piece.replace("\n\n", "\r").replace("\n", " ").replace("\r", "\n\n")
        if kind < 0.12:
            piece = piece.replace('"', "\u201d").replace("'", "\u2019").replace("--", "\u2014")
            piece = piece.encode()[:size].decode(errors="ignore")
        return piece


def made_up_prose(rng: Random, size: int) -> str:
    """Sentences of invented words, `size` characters of them."""
    words = [made_up_name(rng).lower() for _ in range(12)] + ["the", "a", "of", "and", "is", "to"]
    parts: list[str] = []
    length = 0
    while length < size:
        sentence = " ".join(rng.choices(words, k=rng.randint(3, 12))).capitalize() + ". "
        parts.append(sentence)
        length += len(sentence)
    return "".join(parts)[:size]


def made_up_name(rng: Random) -> str:
    """A name of two or three syllables."""
    syllables = [
        rng.choice(CLUSTERS if rng.random() < 0.15 else ONSETS) + rng.choice(VOWELS)
        for _ in range(rng.randint(2, 3))
    ]
    coda = rng.choice(CODAS) if rng.random() < 0.3 else ""
    return "".join(syllables).capitalize() + coda


def make_facts(rng: Random, count: int, *, nameless: float = 0.25) -> list[Fact]:
    """`count` facts that no question confuses; some share their noun or their name."""
    facts: list[Fact] = []
    while len(facts) < count:
        noun = rng.choice(NOUNS)
        name = rng.choice(PEOPLE) if rng.random() < 0.15 else made_up_name(rng)
        if rng.random() < nameless:
            name = ""
        elif facts and rng.random() < 0.35:
            if rng.random() < 0.5:
                noun = rng.choice(facts).noun
            else:
                name = rng.choice(facts).name
        same_noun = [fact for fact in facts if fact.noun == noun]
        if any(name in (fact.name, "") or not fact.name for fact in same_noun):
            continue
        digits = rng.randint(4, 6)
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        facts.append(Fact(noun, name, number))
    return facts


def hide(rng: Random, statements: Sequence[str], prose: str) -> str:
    """The prose with each statement somewhere in it, between words or between sentences."""
    between_sentences = rng.random() < 0.7
    cuts = []
    for _ in statements:
        start = rng.randint(0, len(prose))
        found = SENTENCE_END.search(prose, start, start + 200) if between_sentences else None
        cut = found.end() if found else prose.find(" ", start, start + 40) + 1
        cuts.append(cut if cut > 0 else (len(prose) if start > len(prose) // 2 else 0))
    cuts.sort()
    gap = rng.choice((" ", " ", "\n", "\n\n"))
    parts: list[str] = []
    last = 0
    for cut, statement in zip(cuts, statements, strict=True):
        before = prose[last:cut].rstrip()
        parts += [before, statement] if before else [statement]
        last = cut
    rest = prose[last:].strip()
    return gap.join([*parts, rest] if rest else parts)


def conversation(rng: Random, library: Library, *, size: int, facts: int) -> list[Message]:
    """A whole conversation of about `size` bytes and markers at most, answers included.

    `facts` is how many are hidden; some are asked for, again and again for all one can tell from
    what was asked already.
    """
    known = make_facts(rng, facts)
    asked = rng.choices(known, k=max(rng.randint(1, facts), rng.randint(1, facts)))
    questions = [fact.ask(rng) for fact in asked]
    shape = rng.random()
    system = rng.choice(SYSTEMS) if rng.random() < 0.2 else ""
    statements = [fact.state(rng) for fact in known]
    room = size - 12 - len(system)
    room -= sum(len(question) + 4 for question in questions)
    room -= sum(len(fact.answer()) for fact in asked)
    room -= sum(len(statement) + 4 for statement in statements)
    prose = library.take(rng, room)
    messages: list[Message] = []
    if shape < 0.06:  # the text is the system message
        messages.append(Message("system", hide(rng, statements, prose)))
    elif system:
        messages.append(Message("system", system))
    if 0.06 <= shape < 0.2:  # the text comes in a turn of its own
        messages += [
            Message("user", hide(rng, statements, prose)),
            Message("assistant", ACKNOWLEDGEMENT),
        ]
    elif 0.2 <= shape < 0.26 and facts > 1:  # half the text comes in a later turn
        messages += [
            Message("user", hide(rng, statements[1:], prose[len(prose) // 2 :])),
            Message("assistant", ACKNOWLEDGEMENT),
        ]
        text = hide(rng, statements[:1], prose[: len(prose) // 2])
        questions[0] = text + rng.choice((" ", "\n", "\n\n")) + questions[0]
    elif shape >= 0.2:
        text = hide(rng, statements, prose)
        questions[0] = text + rng.choice((" ", " ", "\n", "\n\n")) + questions[0]
    for question, fact in zip(questions, asked, strict=True):
        messages += [Message("user", question), Message("assistant", fact.answer())]
    return messages


def drill(rng: Random, *, size: int, terse: float) -> tuple[str, str]:
    """Facts without prose, and some of them again in another order: what memory is learnt from.

    Both together take at most `size` bytes; `terse` is the share that says "Fepe 808018." only.
    """
    brief = rng.random() < terse
    count = rng.randint(1, max(1, size // (26 if brief else 70)))
    pairs: dict[str, str] = {}
    nouns = rng.sample(NOUNS, rng.randint(1, 3))
    while len(pairs) < count:
        name = made_up_name(rng)
        number = str(rng.randrange(10 ** rng.randint(3, 5), 10**6))
        start = name if brief else f"The {rng.choice(nouns)} of {name} is"
        pairs[start] = number
    said = [f"{start} {number}." for start, number in pairs.items()]
    again = rng.choices(said, k=count)
    return " ".join(said), " ".join(again)


def case(rng: Random, library: Library, *, size: int, facts: int, form: str = "single") -> Case:
    """A test case of about `size` bytes. Forms: single, follow-up (other facts asked before the
    one that counts), nameless (that fact belongs to nobody)."""
    known = make_facts(rng, facts, nameless=0.0)
    if form == "nameless":
        taken = {fact.noun for fact in known}
        noun = rng.choice([noun for noun in NOUNS if noun not in taken])
        known[0] = Fact(noun, "", known[0].number)
    elif form not in ("single", "follow-up"):
        raise ValueError(f"form: {form!r} is none of single, follow-up, nameless")
    asked = rng.sample(known, len(known)) if form == "follow-up" else known[:1]
    statements = [fact.state(rng) for fact in rng.sample(known, len(known))]
    room = size - sum(len(statement) + 2 for statement in statements) - 48
    text = hide(rng, statements, library.take(rng, room, variety=False))
    messages: list[Message] = []
    for fact in asked:
        question = fact.ask(rng)
        content = question if messages else text + rng.choice((" ", "\n")) + question
        messages += [Message("user", content), Message("assistant", fact.answer())]
    return Case(tuple(messages[:-1]), messages[-1].content, asked[-1].number)
