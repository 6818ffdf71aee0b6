"""Networks that rules are meta-trained on, and how many instances of one run side by side."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

Forward = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
CONV_NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": partial(nn.GroupNorm, 1), "batch": nn.BatchNorm2d}


def mlp(
    inputs: int, hidden: tuple[int, ...], outputs: int, activation: str, zoom: int = 1, norm: str = "none"
) -> nn.Sequential:
    """Repeat every pixel zoom × zoom times, flatten, `hidden` layers with norm and activation, a linear layer."""
    layers: list[nn.Module] = [nn.Upsample(scale_factor=zoom)] if zoom > 1 else []
    layers.append(nn.Flatten())
    inputs *= zoom**2
    for before, after in pairwise((inputs, *hidden)):
        layers.append(nn.Linear(before, after))
        if norm != "none":
            layers.append(NORMS[norm](after))
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], outputs))


def convnet(
    shape: tuple[int, int, int], channels: tuple[int, ...], classes: int, activation: str, norm: str = "none"
) -> nn.Sequential:
    """3×3 convolutions of stride 2, one per entry of `channels`, with norm and activation, then a linear layer."""
    depth, height, width = shape
    layers: list[nn.Module] = []
    for before, after in pairwise((depth, *channels)):
        layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
        if norm != "none":
            layers.append(CONV_NORMS[norm](after))
        layers.append(ACTIVATIONS[activation]())
        height, width = (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * height * width, classes))


def encoder(width: int, heads: int, depth: int) -> nn.TransformerEncoder:
    """Pre-norm transformer blocks without dropout."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


class CharTransformer(nn.Module):
    """A decoder over characters: every position predicts the next one."""

    def __init__(self, characters: int, length: int, width: int, heads: int, depth: int):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.encoder = encoder(width, heads, depth)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))
        self.register_buffer("mask", torch.triu(torch.ones(length, length, dtype=torch.bool), 1), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """(B, length) → (B, length, characters)."""
        hidden = self.embed(text) + self.positions
        return self.head(self.encoder(hidden, mask=self.mask, is_causal=True))  # type: ignore[no-any-return]


class CharGRU(nn.Module):
    """A GRU over characters: every position predicts the next one."""

    def __init__(self, characters: int, width: int, hidden: int):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, text: Tensor) -> Tensor:
        """(B, length) → (B, length, characters)."""
        return self.head(self.gru(self.embed(text))[0])  # type: ignore[no-any-return]


def flat_parameters(model: nn.Module) -> Tensor:
    """All parameters of a module as one vector (n,), in the order of `named_parameters`."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of BatchNorm, by their names, in the order of `named_buffers`."""
    kinds = ("running_mean", "running_var")
    return {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[-1] in kinds}


def flat_statistics(model: nn.Module) -> Tensor:
    """All running statistics of a module as one vector (m,); m = 0 without BatchNorm."""
    return torch.cat([torch.zeros(0), *running_statistics(model).values()])


def side_by_side(model: nn.Module) -> Forward:
    """A module's outputs (B, N, …), and the running statistics (B, m) of BatchNorm from then on.

    From the flat parameters (B, n) of every instance, its inputs (B, N, …), its statistics so far, and whether in
    training mode: then outputs come from the inputs' own statistics and these move the running ones, else from the
    running ones, which stay.

    Networks of linear layers, norms and activations run as batched products: the transformations of `torch.func` take
    longer than a small network's products. These serve where they can; the rest runs one instance after the other.
    """
    if is_mlp(model):
        return chained(list(model.children()))
    modes = {True: model, False: deepcopy(model).eval()}
    if any(isinstance(part, nn.RNNBase | nn.MultiheadAttention) for part in model.modules()):
        return lambda params, x, statistics, training: _each(modes[training], params, x, statistics)
    return lambda params, x, statistics, training: vmap(partial(_outputs, modes[training]))(params, x, statistics)


def is_mlp(model: nn.Module) -> bool:
    """Whether a module is a chain of linear layers, norms and activations, after repeating pixels and flattening."""
    kinds = (nn.Upsample, nn.Flatten, nn.Linear, nn.LayerNorm, nn.BatchNorm1d, *ACTIVATIONS.values())
    return isinstance(model, nn.Sequential) and all(isinstance(layer, kinds) for layer in model)


def chained(layers: list[nn.Module]) -> Forward:
    """Outputs (B, N, k) of a chain of layers from parameters (B, n) and inputs (B, N, …).

    Layers without parameters have to act on every number, or on the last axis.
    """
    shapes = [p.shape for layer in layers for p in layer.parameters()]
    sizes = [buffer.numel() for buffer in running_statistics(nn.Sequential(*layers)).values()]

    def run(params: Tensor, x: Tensor, statistics: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        pieces = params.split([shape.numel() for shape in shapes], dim=-1)
        tensors = (piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True))
        running, after = iter(statistics.split(sizes, dim=-1)), [statistics[:, :0]]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                weight, bias = next(tensors), next(tensors)
                x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            elif isinstance(layer, nn.LayerNorm | nn.BatchNorm1d):
                if isinstance(layer, nn.LayerNorm):
                    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
                else:
                    mean, variance, *moved = _batch_moments(layer, x, running, training)
                    after += moved
                weight, bias = next(tensors), next(tensors)
                x = torch.addcmul(bias.unsqueeze(1), (x - mean) * (variance + layer.eps).rsqrt(), weight.unsqueeze(1))
            elif isinstance(layer, nn.Upsample):
                x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            else:
                x = x.flatten(2) if isinstance(layer, nn.Flatten) else layer(x)
        return x, torch.cat(after, -1)

    return run


def _batch_moments(
    layer: nn.BatchNorm1d, x: Tensor, running: Iterator[Tensor], training: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance (B, 1, k) that inputs (B, N, k) are normalised with, and the running ones (B, k) after them.

    Running variances are of those that divide by N − 1, as torch has it.
    """
    mean, variance = next(running), next(running)
    if not training:
        return mean.unsqueeze(1), variance.unsqueeze(1), mean, variance
    own_variance, own_mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    count, momentum = x.shape[1], cast(float, layer.momentum)
    with torch.no_grad():
        mean = mean.lerp(own_mean.squeeze(1), momentum)
        variance = variance.lerp(own_variance.squeeze(1) * (count / (count - 1)), momentum)
    return own_mean, own_variance, mean, variance


def _each(model: nn.Module, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """`_outputs` of one instance after the other."""
    outputs, statistics = zip(*(_outputs(model, *own) for own in zip(*arguments, strict=True)), strict=True)
    return torch.stack(outputs), torch.stack(statistics)


def _outputs(model: nn.Module, params: Tensor, x: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (N, …) of any module from its flat parameters (n,), and its statistics (m,) from then on."""
    named, running = dict(model.named_parameters()), running_statistics(model)
    pieces = params.split([p.numel() for p in named.values()])
    tensors = {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}
    # BatchNorm moves them in place; under vmap it needs tensors of their own for that, not views.
    parts = [part.clone() for part in statistics.split([buffer.numel() for buffer in running.values()])]
    outputs = functional_call(model, tensors | dict(zip(running, parts, strict=True)), (x,))
    return cast(Tensor, outputs), torch.cat([statistics[:0], *parts])
