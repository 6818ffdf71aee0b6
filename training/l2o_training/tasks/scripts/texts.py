"""Training scripts on text that a small grammar makes from a seed."""

import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.data import Load
from l2o_training.tasks.networks import CharGRU, CharTransformer
from l2o_training.tasks.scripts.base import Batch, Script

LENGTH = 32
"""Characters that a network sees."""

SENTENCES = 6000
VALIDATION = 128
ALPHABET = " ().,=+abcdefghijklmnopqrstuvwxyz0123456789"


def lexicon(rng: random.Random, count: int) -> list[str]:
    """`count` words of one to three syllables."""
    syllables = [first + second for first in "bdfgklmnprstv" for second in "aeiou"]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 3))) + rng.choice(["", "n", "s"]) for _ in range(count)]


def sentence(rng: random.Random, nouns: list[str], verbs: list[str]) -> str:
    """A sum that is right, or a sentence in which some nouns carry another sentence in brackets."""
    if rng.random() < 0.2:
        first, second = rng.randrange(50), rng.randrange(50)
        return f"{first}+{second}={first + second}. "
    return clause(rng, nouns, verbs, 2) + ". "


def clause(rng: random.Random, nouns: list[str], verbs: list[str], depth: int) -> str:
    """Noun, verb, noun; frequent words are frequent as in Zipf's law."""
    subject, verb, target = (
        rng.choices(words, [1 / (i + 1) for i in range(len(words))])[0] for words in (nouns, verbs, nouns)
    )
    if depth and rng.random() < 0.2:
        subject += f" ({clause(rng, nouns, verbs, depth - 1)})"
    return f"{subject} {verb}, {target}" if rng.random() < 0.1 else f"{subject} {verb} {target}"


def corpus() -> str:
    """The text, the same every time."""
    rng = random.Random(0)
    nouns, verbs = lexicon(rng, 60), lexicon(rng, 30)
    return "".join(sentence(rng, nouns, verbs) for _ in range(SENTENCES))


def next_character(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the next character at every position, in nats."""
    return F.cross_entropy(model(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())


def pieces() -> tuple[Batch, Batch]:
    """Pieces (N, LENGTH + 1) of the text; the validation's are its end."""
    codes = torch.tensor([ALPHABET.index(character) for character in corpus()])
    rows = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return (rows[:-VALIDATION],), (rows[-VALIDATION:],)


def transformer(_: Load) -> Script:
    """Two causal blocks."""
    make = partial(CharTransformer, len(ALPHABET), LENGTH, 32, 4, 2)
    return Script(make, next_character, *pieces(), 8)


def gru(_: Load) -> Script:
    """One recurrent layer."""
    return Script(partial(CharGRU, len(ALPHABET), 16, 48), next_character, *pieces(), 8)
