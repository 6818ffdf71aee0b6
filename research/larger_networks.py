"""Is a rule of use for networks of other kinds that are larger than those of its meta-training?

Verdict: mostly. `scale` is ahead of Adam at the better of two rates on six of ten, and behind on four, on the
transformer by far: 2.197 beside 1.771 (`docs/evaluation.md`).

python research/larger_networks.py --data data --rules scale --networks vit transformer

Networks of 175,000 to 2,200,000 parameters on CIFAR-10, Fashion-MNIST and characters of the help texts that Python
comes with. A row per network: the training loss (mean of the last 20 of `--steps`, and over `--runs` seeds) of every
rule, at each of `--lr`, and of Adam at each of `--adam`. All start from the same weights and see the same minibatches.
"""

import argparse
import pydoc_data.topics
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from ordinary_loop import MakeOptimizer, fashion_mnist, mean_loss
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Adam
from torchvision.models import VisionTransformer, mobilenet_v2, shufflenet_v2_x0_5, squeezenet1_1

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_training.tasks.data import load_dataset
from l2o_training.tasks.modules import Residual
from l2o_training.tasks.networks import CharGRU
from l2o_training.tasks.scripts.images import cross_entropy
from l2o_training.tasks.scripts.texts import next_character

LENGTH = 32
"""Characters that a network of text sees at once."""


def vit() -> nn.Module:
    return VisionTransformer(32, 8, num_layers=4, num_heads=4, hidden_dim=96, mlp_dim=192, num_classes=10)


def vgg(norm: Callable[[int], nn.Module] = lambda channels: nn.Identity()) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10))


def block(channels: int) -> Residual:
    """Two convolutions with GroupNorm in front."""
    layers = [(nn.GroupNorm(4, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)]
    return Residual(*layers[0], *layers[1])


def resnet() -> nn.Module:
    body = [nn.Conv2d(3, 48, 4, stride=4), block(48), block(48), nn.MaxPool2d(2), nn.Conv2d(48, 96, 1), block(96)]
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


def gru() -> nn.Module:
    return CharGRU(len(characters), 64, 192)


def autoencoder() -> nn.Module:
    sizes = (784, 256, 32, 256, 784)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def classify(model: nn.Module) -> Tensor:
    index = torch.randint(len(photos), (64,))
    return cross_entropy(model, (photos[index], labels[index]))


def predict(model: nn.Module) -> Tensor:
    """Loss of the next characters."""
    start = torch.randint(len(text) - LENGTH - 1, (32, 1))
    return next_character(model, (text[start + torch.arange(LENGTH + 1)],))


def reconstruct(model: nn.Module) -> Tensor:
    batch = clothes[torch.randint(len(clothes), (128,))]
    return F.mse_loss(model(batch), batch)


NETWORKS = {
    "vit": (vit, classify),
    "vgg": (vgg, classify),
    "vgg-bn": (partial(vgg, nn.BatchNorm2d), classify),
    "resnet-gn": (resnet, classify),
    "transformer": (Transformer, predict),
    "gru": (gru, predict),
    "autoencoder": (autoencoder, reconstruct),
    "shufflenet": (partial(shufflenet_v2_x0_5, num_classes=10), classify),
    "squeezenet": (partial(squeezenet1_1, num_classes=10), classify),
    "mobilenet": (partial(mobilenet_v2, num_classes=10), classify),
}


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 and Fashion-MNIST")
parser.add_argument("--rules", nargs="+", default=["scale"])
parser.add_argument("--lr", type=float, nargs="+", default=[1.0], help="factors on the rules' steps")
parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
parser.add_argument("--adam", type=float, nargs="*", default=[0.003, 0.001, 0.0003])
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--runs", type=int, default=2)
args = parser.parse_args()

warnings.simplefilter("ignore", HorizonWarning)
torch.set_num_threads(1)
cifar = load_dataset("cifar10", args.data)
photos, labels = (cifar.images.float() / 255 - 0.47) / 0.25, cifar.labels
clothes, _ = fashion_mnist(args.data)
characters, codes = np.unique(list("".join(pydoc_data.topics.topics.values())), return_inverse=True)
text = torch.from_numpy(codes)

optimizers: dict[str, MakeOptimizer] = {
    f"{rule} × {lr:g}": partial(LearnedOptimizer, rule=rule, lr=lr) for rule, lr in product(args.rules, args.lr)
} | {f"Adam {lr:g}": partial(Adam, lr=lr) for lr in args.adam}
table = Table("network", "parameters", *optimizers)
for name in args.networks:
    make_model, loss_of = NETWORKS[name]
    size = sum(parameter.numel() for parameter in make_model().parameters())
    losses = (mean_loss(make, make_model, loss_of, args.steps, args.runs) for make in optimizers.values())
    table.add_row(name, f"{size:,}", *(f"{loss:.3f}" for loss in losses))
    Console(stderr=True).print(f"{name}: done", highlight=False)
Console().print(table)
