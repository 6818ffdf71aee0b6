"""Everyday scripts on a real text, Shakespeare's plays: language models of characters, and vectors of words."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.data import Datasets
from l2o_training.tasks.modules import Factorisation
from l2o_training.tasks.scripts.base import Batch, Script
from l2o_training.tasks.scripts.everyday import networks
from l2o_training.tasks.scripts.tables import split
from l2o_training.tasks.scripts.texts import next_character

SOURCE = "tinyshakespeare"
LENGTH = 64
"""Characters that a network sees."""

HELD = 0.1
"""Share of the text, its end, that is not trained on."""

VALIDATION = 256
"""Pieces of that end."""

WORDS, WINDOW, RANK = 400, 5, 16
COMMON, POWER = 10.0, 0.75
"""Co-occurrences from `COMMON` on count alike, rarer ones less, by this power."""


def encoded(text: str) -> tuple[Tensor, int]:
    """Places (N,) of the characters in the text's alphabet, and the size of that."""
    alphabet = {character: place for place, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def pieces(codes: Tensor, length: int = LENGTH) -> tuple[Batch, Batch]:
    """Pieces (N, length + 1) of a text; those to validate on are from its last tenth."""
    rows = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    held = int(HELD * len(rows))
    return (rows[:-held],), (rows[-held:][:VALIDATION],)


def language_model(load: Datasets, make_model: Callable[[int], nn.Module], batch_size: int) -> Script:
    """The next character.

    Args:
        load: gives the text.
        make_model: from the number of characters.
        batch_size: pieces of the text.
    """
    codes, characters = encoded(load.text(SOURCE))
    return Script(partial(make_model, characters), next_character, *pieces(codes), batch_size)


def lstm(load: Datasets) -> Script:
    """One layer."""
    return language_model(load, lambda characters: networks.CharLSTM(characters, 32, 128, 0.1), 16)


def transformer(load: Datasets) -> Script:
    """110,000 parameters."""
    return language_model(load, lambda characters: networks.Decoder(characters, LENGTH, 64, 4, 2, 0.0), 8)


def larger_transformer(load: Datasets) -> Script:
    """810,000 parameters."""
    return language_model(load, lambda characters: networks.Decoder(characters, LENGTH, 128, 4, 4, 0.1), 4)


def last_character(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the last character, given those before it."""
    (piece,) = batch
    return F.cross_entropy(model(piece[:, :-1]), piece[:, -1])


def trigrams(load: Datasets) -> Script:
    """A linear model of the next character after three, whose weights begin with zero."""
    codes, characters = encoded(load.text(SOURCE))
    return Script(partial(networks.NGrams, characters, 3), last_character, *pieces(codes, 3), 64)


def co_occurrences(text: str) -> Tensor:
    """(WORDS, WORDS): how often two of the most frequent words are near each other, less where they are farther."""
    words = re.findall(r"[a-z']+", text.lower())
    place = {word: index for index, (word, _) in enumerate(Counter(words).most_common(WORDS))}
    codes = torch.tensor([place.get(word, -1) for word in words])
    counts = torch.zeros(WORDS * WORDS, dtype=torch.float64)
    for distance in range(1, WINDOW + 1):
        first, second = codes[:-distance], codes[distance:]
        known = (first >= 0) & (second >= 0)
        near = first[known] * WORDS + second[known]
        counts += torch.bincount(near, minlength=WORDS * WORDS) / distance
    table = counts.view(WORDS, WORDS)
    return (table + table.T).float()


def weighted_error(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of a logarithm of counts, min(1, x / 10)^0.75 of it.

    Source: Pennington et al. 2014, equations 8 and 9.
    """
    pairs, counts = batch
    weights = (counts / COMMON).clamp_max(1) ** POWER
    return (weights * (model(pairs) - counts.log()).square()).mean()  # type: ignore[no-any-return]


def glove(load: Datasets) -> Script:
    """Two vectors and two biases for every word."""
    table = co_occurrences(load.text(SOURCE))
    pairs = table.nonzero()
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    parts = split((pairs, table[pairs[:, 0], pairs[:, 1]]), len(pairs) // 20)
    return Script(partial(Factorisation, WORDS, WORDS, RANK), weighted_error, *parts, 256)
