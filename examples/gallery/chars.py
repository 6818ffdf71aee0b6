"""A character model: a GRU on a piece of text of its own, of Shakespeare where L2O_DATA has him, else of a program."""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

file = Path(os.environ.get("L2O_DATA", "."), "tinyshakespeare.txt")
TEXT = (file if file.is_file() else Path(argparse.__file__)).read_text()
KNOWN = sorted(set(TEXT))
CODES = torch.tensor([KNOWN.index(c) for c in TEXT])
LENGTH, PIECE = 24, 10_000


class CharGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(KNOWN), 24)
        self.gru = nn.GRU(24, 48, batch_first=True)
        self.head = nn.Linear(48, len(KNOWN))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embed(text))[0])


def make(seed: int) -> tuple[nn.Module, object]:
    start = int(torch.randint(max(1, len(CODES) - PIECE), ()))
    piece = CODES[start : start + PIECE]

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        places = torch.randint(len(piece) - LENGTH, (16, 1)) + torch.arange(LENGTH + 1)
        return F.cross_entropy(model(piece[places[:, :-1]]).flatten(0, 1), piece[places[:, 1:]].flatten())

    return CharGRU(), loss
