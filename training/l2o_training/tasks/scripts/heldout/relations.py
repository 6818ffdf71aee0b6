"""Held-out scripts on sets, a graph, users with items, and words with their neighbours."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.data import Load
from l2o_training.tasks.scripts.base import Script
from l2o_training.tasks.scripts.everyday.networks import mlp
from l2o_training.tasks.scripts.everyday.tables import binary
from l2o_training.tasks.scripts.images import cross_entropy
from l2o_training.tasks.scripts.tables import split, squared_error

TRAIN, VALIDATION = 8192, 1024
NODES, LABELLED, CLASSES = 300, 60, 4
USERS, ITEMS = 300, 200
WORDS, TOPICS = 400, 20


class DeepSets(nn.Module):
    """A network of the sum of what another makes of every point (Zaheer et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.all = mlp((3, 64, 64), nn.ReLU), mlp((64, 64, 1), nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, 3) → (B, 1)."""
        return self.all(self.each(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum(1))  # type: ignore[no-any-return]


def deep_sets(_: Load) -> Script:
    """Ten normal points → the largest of their norms."""
    x = torch.randn(TRAIN + VALIDATION, 10, 3, generator=torch.Generator().manual_seed(0))
    return Script(DeepSets, squared_error, *split((x, x.norm(dim=-1).amax(-1)), VALIDATION), 64)


class GraphNet(nn.Module):
    """Two graph convolutions (Kipf & Welling 2017); it knows the graph, and gives the logits of some nodes."""

    adjacency: Tensor
    features: Tensor

    def __init__(self, adjacency: Tensor, features: Tensor):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.register_buffer("features", features)
        self.first, self.second = nn.Linear(features.shape[1], 16), nn.Linear(16, CLASSES)

    def forward(self, nodes: Tensor) -> Tensor:
        """(B,) numbers of nodes → (B, classes)."""
        hidden = F.relu(self.adjacency @ self.first(self.features))
        return (self.adjacency @ self.second(F.dropout(hidden, 0.5, self.training)))[nodes]  # type: ignore[no-any-return]


def graph(_: Load) -> Script:
    """Nodes of four classes, which are joined four times as often within one; their features are mostly noise."""
    rng = torch.Generator().manual_seed(0)
    label = torch.randint(CLASSES, (NODES,), generator=rng)
    likely = torch.where(label[:, None] == label, 0.08, 0.02)
    edges = (torch.rand(NODES, NODES, generator=rng) < likely).float().triu(1)
    edges = edges + edges.T + torch.eye(NODES)
    scale = edges.sum(1).rsqrt()
    hints = F.one_hot(label, CLASSES) + 1.5 * torch.randn(NODES, CLASSES, generator=rng)
    features = torch.cat([hints, torch.randn(NODES, 28, generator=rng)], 1)
    nodes = torch.randperm(NODES, generator=rng)
    parts = split((nodes, label[nodes]), NODES - LABELLED)
    return Script(partial(GraphNet, scale[:, None] * edges * scale, features), cross_entropy, *parts, LABELLED)


class Recommender(nn.Module):
    """An MLP on the embeddings of a user and an item (He et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, 16), nn.Embedding(ITEMS, 16)
        self.mlp = mlp((32, 32, 16, 1), nn.ReLU)

    def forward(self, pair: Tensor) -> Tensor:
        """(B, 2) numbers of user and item → (B, 1) logit."""
        return self.mlp(torch.cat([self.user(pair[:, 0]), self.item(pair[:, 1])], -1))  # type: ignore[no-any-return]


def recommender(_: Load) -> Script:
    """Whether a user likes an item: the sign of a product of five hidden tastes."""
    rng = torch.Generator().manual_seed(0)
    users, items = torch.randn(USERS, 5, generator=rng), torch.randn(ITEMS, 5, generator=rng)
    count = 3 * TRAIN + VALIDATION
    pair = torch.stack([torch.randint(most, (count,), generator=rng) for most in (USERS, ITEMS)], -1)
    liked = (users[pair[:, 0]] * items[pair[:, 1]]).sum(-1) > 0
    return Script(Recommender, binary, *split((pair, liked.float()), VALIDATION), 256)


class SkipGram(nn.Module):
    """Products of vectors of a word and of a neighbour; word2vec's initialisation (Mikolov et al. 2013)."""

    def __init__(self, width: int):
        super().__init__()
        self.word, self.neighbour = nn.Embedding(WORDS, width), nn.Embedding(WORDS, width)
        nn.init.uniform_(self.word.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.neighbour.weight)

    def forward(self, pair: Tensor) -> Tensor:
        """(B, 2) words → (B, 1) logit."""
        return (self.word(pair[:, 0]) * self.neighbour(pair[:, 1])).sum(-1, keepdim=True)  # type: ignore[no-any-return]


def skip_gram(_: Load) -> Script:
    """Pairs of words of one topic, told from pairs of any words."""
    rng = torch.Generator().manual_seed(0)
    count = 4 * TRAIN + VALIDATION
    true = (torch.rand(count, generator=rng) < 0.5).float()
    word, other = torch.randint(WORDS, (2, count), generator=rng)
    neighbour = torch.where(true > 0, other // TOPICS * TOPICS + word % TOPICS, other)  # words of a topic are 20 apart
    return Script(partial(SkipGram, 32), binary, *split((torch.stack([word, neighbour], -1), true), VALIDATION), 256)
