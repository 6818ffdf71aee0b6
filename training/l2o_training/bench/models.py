"""Models by size: only the shapes of their parameters, for an optimizer's step needs no forward pass."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from l2o_runtime.config import nearest, require
from l2o_training.tasks.modules import cnn
from l2o_training.tasks.networks import mlp
from l2o_training.tasks.scripts.everyday.networks import lenet

Shapes = list[tuple[int, ...]]


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    model: nn.Module = resnet18(weights=None)
    return model


def _vit() -> nn.Module:
    from torchvision.models import vit_b_16

    model: nn.Module = vit_b_16(weights=None)
    return model


def _transformer(layers: int, width: int, heads: int, words: int) -> nn.Module:
    """Of language, with its embedding and head."""
    block = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
    body = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(words, width), body, nn.LayerNorm(width), nn.Linear(width, words))


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "tiny": ("MLP 64-24-10, 1.8 k", partial(mlp, 64, (24,), 10, "relu")),
    "mlp": ("MLP 784-20-10, 16 k", partial(mlp, 784, (20,), 10, "relu")),
    "lenet": ("LeNet-5, 62 k", lenet),
    "transformer": ("transformer 2 × 64, 0.1 M", partial(_transformer, 2, 64, 4, 65)),
    "cnn": ("CNN of two convolutions, 1.2 M", cnn),
    "resnet18": ("ResNet-18, 11.7 M", _resnet18),
    "gpt": ("transformer 12 × 384, 25 M", partial(_transformer, 12, 384, 6, 5000)),
    "vit": ("ViT-B/16, 86.6 M", _vit),
}
"""Name → description and constructor."""


def parse_sizes(text: str) -> list[str]:
    """Names of models from "mlp,cnn", each once.

    Raises:
        ConfigError: an unknown one, or none.
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    require(bool(names), f"--sizes: expected some of {', '.join(MODELS)}")
    for name in names:
        require(name in MODELS, f"--sizes: unknown size {name!r}: {nearest(name, list(MODELS))}")
    return names


def shapes_of(size: str) -> Shapes:
    """Shapes of a model's parameters, found without allocating them."""
    with torch.device("meta"):
        return [tuple(param.shape) for param in MODELS[size][1]().parameters()]


def count(shapes: Shapes) -> int:
    """Number of parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def random_tensors(shapes: Shapes, scale: float, seed: int, device: torch.device) -> list[Tensor]:
    """Normal numbers × scale, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, device=device) for shape in shapes]
