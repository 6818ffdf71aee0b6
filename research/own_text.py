"""A task of one's own on which it was decided what `specialise` searches: an LSTM on pieces of Python's typing.py.

Verdict: sizes of steps by a tensor's place, beside five biases: docs/decisions/0128-specialised-steps-go-by-place.md.
The second command is without.

    l2o train --task research/own_text.py:make --steps 1000 --minutes 5 --threads 1
    l2o train --task research/own_text.py:make --steps 1000 --minutes 5 --threads 1 --set 'trained=["head.bias"]'
"""

import typing
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TEXT = Path(typing.__file__).read_text()
KNOWN = sorted(set(TEXT))
CODES = torch.tensor([KNOWN.index(c) for c in TEXT])
LENGTH, PIECE = 20, 9_000


class CharLSTM(nn.Module):
    """An embedding, an LSTM and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(KNOWN), 20)
        self.rnn = nn.LSTM(20, 40, batch_first=True)
        self.head = nn.Linear(40, len(KNOWN))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits of the next characters."""
        logits: torch.Tensor = self.head(self.rnn(self.embed(text))[0])
        return logits


def make(seed: int) -> tuple[nn.Module, object]:
    """A network, and a piece of the text."""
    start = int(torch.randint(len(CODES) - PIECE, ()))
    piece = CODES[start : start + PIECE]

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        places = torch.randint(len(piece) - LENGTH, (16, 1)) + torch.arange(LENGTH + 1)
        return F.cross_entropy(model(piece[places[:, :-1]]).flatten(0, 1), piece[places[:, 1:]].flatten())

    return CharLSTM(), loss
