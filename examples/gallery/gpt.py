"""A small GPT: a causal transformer on a piece of text of its own; the text of `chars.py`."""

import torch
import torch.nn.functional as F
from chars import CODES, KNOWN, PIECE
from torch import nn

LENGTH, WIDTH, HEADS, DEPTH = 32, 32, 2, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.within = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.mix(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(seen)
        return x + self.within(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(len(KNOWN), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(KNOWN), bias=False)
        self.head.weight = self.embed.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.embed(text) + self.places(torch.arange(text.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def make(seed: int) -> tuple[nn.Module, object]:
    start = int(torch.randint(max(1, len(CODES) - PIECE), ()))
    piece = CODES[start : start + PIECE]

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        places = torch.randint(len(piece) - LENGTH, (8, 1)) + torch.arange(LENGTH + 1)
        return F.cross_entropy(model(piece[places[:, :-1]]).flatten(0, 1), piece[places[:, 1:]].flatten())

    return GPT(), loss
