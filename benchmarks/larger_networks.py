"""Is a rule of use for networks of other kinds that are larger than those of its meta-training?

python benchmarks/larger_networks.py --data data --rules scale --networks vit transformer

Networks of 100,000 to 430,000 parameters on CIFAR-10, Fashion-MNIST and characters of the help texts that Python
comes with. A row per network: the training loss (mean of the last 20 of `--steps`, and over `--runs` seeds) of every
rule, untuned, and of Adam at each of `--adam`. All start from the same weights and see the same minibatches.
"""

import argparse
import pydoc_data.topics
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torchvision.models import VisionTransformer

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_training.data import load_dataset

LENGTH = 32
"""Characters that a network of text sees at once."""


def vit() -> nn.Module:
    return VisionTransformer(32, 8, num_layers=4, num_heads=4, hidden_dim=96, mlp_dim=192, num_classes=10)


def vgg(norm: Callable[[int], nn.Module] = lambda channels: nn.Identity()) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10))


class Block(nn.Module):
    """x + f(x), f of two convolutions with GroupNorm in front."""

    def __init__(self, channels: int):
        super().__init__()
        half = [[nn.GroupNorm(4, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)] for _ in range(2)]
        self.f = nn.Sequential(*half[0], *half[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def resnet() -> nn.Module:
    body = [nn.Conv2d(3, 48, 4, stride=4), Block(48), Block(48), nn.MaxPool2d(2), nn.Conv2d(48, 96, 1), Block(96)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class Transformer(nn.Module):
    """Three causal blocks with LayerNorm in front."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(len(characters), width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 3, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, len(characters))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.head(self.blocks(self.embedding(x) + self.position, mask, is_causal=True))


class GRU(nn.Module):
    def __init__(self, width: int = 192):
        super().__init__()
        self.embedding = nn.Embedding(len(characters), 64)
        self.gru = nn.GRU(64, width, batch_first=True)
        self.head = nn.Linear(width, len(characters))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(x))[0])


def autoencoder() -> nn.Module:
    sizes = (784, 256, 32, 256, 784)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def classify(model: nn.Module) -> Tensor:
    index = torch.randint(len(photos), (64,))
    return F.cross_entropy(model(photos[index]), labels[index])


def predict(model: nn.Module) -> Tensor:
    """Loss of the next characters."""
    start = torch.randint(len(text) - LENGTH - 1, (32, 1))
    lines = text[start + torch.arange(LENGTH + 1)]
    return F.cross_entropy(model(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten())


def reconstruct(model: nn.Module) -> Tensor:
    batch = clothes[torch.randint(len(clothes), (128,))]
    return F.mse_loss(model(batch), batch)


NETWORKS = {
    "vit": (vit, classify),
    "vgg": (vgg, classify),
    "vgg-bn": (partial(vgg, nn.BatchNorm2d), classify),
    "resnet-gn": (resnet, classify),
    "transformer": (Transformer, predict),
    "gru": (GRU, predict),
    "autoencoder": (autoencoder, reconstruct),
}


def mean_loss(make_optimizer: Callable[[Iterable[Tensor]], Optimizer], name: str) -> float:
    """Mean of the last 20 losses of ordinary training loops, over seeds."""
    make_model, loss_of = NETWORKS[name]
    finals = []
    for seed in range(args.runs):
        torch.manual_seed(seed)
        model = make_model()
        optimizer = make_optimizer(model.parameters())
        losses = []
        for _ in range(args.steps):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        finals.append(mean(losses[-20:]))
    return mean(finals)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 and Fashion-MNIST")
parser.add_argument("--rules", nargs="+", default=["scale"])
parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
parser.add_argument("--adam", type=float, nargs="*", default=[0.003, 0.001, 0.0003])
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--runs", type=int, default=2)
args = parser.parse_args()

warnings.simplefilter("ignore", HorizonWarning)
torch.set_num_threads(1)
cifar, fashion = load_dataset("cifar10", args.data), load_dataset("fashion-mnist", args.data)
photos, labels = (cifar.images.float() / 255 - 0.47) / 0.25, cifar.labels
clothes = ((fashion.images.float() / 255 - 0.286) / 0.353).flatten(1)
raw = "".join(pydoc_data.topics.topics.values())
characters = sorted(set(raw))
text = torch.tensor([characters.index(character) for character in raw])

table = Table("network", "parameters", *args.rules, *(f"Adam {lr:g}" for lr in args.adam))
optimizers = [partial(LearnedOptimizer, rule=rule) for rule in args.rules] + [partial(Adam, lr=lr) for lr in args.adam]
for name in args.networks:
    size = sum(parameter.numel() for parameter in NETWORKS[name][0]().parameters())
    table.add_row(name, f"{size:,}", *(f"{mean_loss(make, name):.3f}" for make in optimizers))
    Console(stderr=True).print(f"{name}: done", highlight=False)
Console().print(table)
