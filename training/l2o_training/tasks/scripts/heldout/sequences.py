"""Held-out scripts on sequences: two numbers of many, digits to sort, waves that go on."""

from functools import partial

import torch
from torch import Tensor, nn

from l2o_training.tasks.data import Load
from l2o_training.tasks.scripts.base import Script
from l2o_training.tasks.scripts.images import cross_entropy
from l2o_training.tasks.scripts.tables import split, squared_error

TRAIN, VALIDATION = 8192, 512


class LastOutput(nn.Module):
    """A linear function of a plain RNN's last state."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.rnn, self.out = nn.RNN(inputs, units, batch_first=True), nn.Linear(units, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) → (B, 1)."""
        return self.out(self.rnn(x)[0][:, -1])  # type: ignore[no-any-return]


def adding(_: Load) -> Script:
    """The product of two marked numbers among 20, one in each half (after Hochreiter & Schmidhuber 1997)."""
    rng = torch.Generator().manual_seed(0)
    count = TRAIN + VALIDATION
    number, marks = torch.rand(count, 20, generator=rng), torch.zeros(count, 20)
    for half in (0, 10):
        marks[torch.arange(count), half + torch.randint(10, (count,), generator=rng)] = 1
    target = torch.where(marks > 0, number, 1).prod(-1)
    parts = split((torch.stack([number, marks], -1), target), VALIDATION)
    return Script(partial(LastOutput, 2, 64), squared_error, *parts, 64)


class Encoder(nn.Module):
    """torch's own transformer encoder with learned places."""

    def __init__(self, symbols: int, length: int, width: int):
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) symbols → (B, symbols, T) logits."""
        return self.out(self.layers(self.symbol(x) + self.place)).mT  # type: ignore[no-any-return]


def sorting(_: Load) -> Script:
    """Eight digits in any order → the same in ascending order."""
    x = torch.randint(10, (TRAIN + VALIDATION, 8), generator=torch.Generator().manual_seed(0))
    return Script(partial(Encoder, 10, 8, 64), cross_entropy, *split((x, x.sort(-1).values), VALIDATION), 32)


class NextValue(nn.Module):
    """A linear function of a GRU's states."""

    def __init__(self, units: int):
        super().__init__()
        self.gru, self.out = nn.GRU(1, units, batch_first=True), nn.Linear(units, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) → (B, T), what comes next."""
        return self.out(self.gru(x[..., None])[0]).squeeze(-1)  # type: ignore[no-any-return]


def forecast(_: Load) -> Script:
    """Sums of two waves with noise, 40 places, the next one from those before."""
    rng = torch.Generator().manual_seed(0)
    count = 2048 + VALIDATION
    phase, pace = 6.3 * torch.rand(count, 1, generator=rng), 0.2 + 0.5 * torch.rand(count, 1, generator=rng)
    time = torch.arange(41)
    series = torch.sin(pace * time + phase) + 0.5 * torch.sin(2.7 * pace * time)
    series = series + 0.05 * torch.randn(count, 41, generator=rng)
    return Script(partial(NextValue, 32), squared_error, *split((series[:, :-1], series[:, 1:]), VALIDATION), 32)
