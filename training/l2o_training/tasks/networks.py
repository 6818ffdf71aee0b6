"""Networks to be trained, and how many instances of one run side by side."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

Forward = Callable[[Tensor, Tensor], Tensor]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "batch": partial(nn.BatchNorm1d, track_running_stats=False),
}
CONV_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": partial(nn.GroupNorm, 1),
    "batch": partial(nn.BatchNorm2d, track_running_stats=False),
}


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


def flat_parameters(model: nn.Module) -> Tensor:
    """All parameters of a module as one vector (n,), in the order of `named_parameters`."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def side_by_side(model: nn.Module) -> Forward:
    """A module's outputs (B, N, …) from the flat parameters (B, n) of every instance and its inputs (B, N, …).

    Networks of linear layers, norms and activations run as batched products: the transformations of `torch.func` take
    longer than a small network's products. These serve where they can; the rest runs one instance after the other.
    """
    if is_mlp(model):
        return _stacked(list(model.children()))
    if any(isinstance(part, nn.RNNBase | nn.MultiheadAttention) for part in model.modules()):
        return lambda params, x: torch.stack([_outputs(model, *pair) for pair in zip(params, x, strict=True)])
    return vmap(partial(_outputs, model))


def is_mlp(model: nn.Module) -> bool:
    """Whether a module is a chain of linear layers, norms and activations, after repeating pixels and flattening."""
    kinds = (nn.Upsample, nn.Flatten, nn.Linear, nn.LayerNorm, nn.BatchNorm1d, *ACTIVATIONS.values())
    return isinstance(model, nn.Sequential) and all(isinstance(layer, kinds) for layer in model)


def _stacked(layers: list[nn.Module]) -> Forward:
    """Outputs (B, N, k) of a chain of layers from parameters (B, n) and inputs (B, N, …)."""
    shapes = [p.shape for layer in layers for p in layer.parameters()]

    def run(params: Tensor, x: Tensor) -> Tensor:
        pieces = params.split([shape.numel() for shape in shapes], dim=-1)
        tensors = (piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True))
        for layer in layers:
            if isinstance(layer, nn.Linear):
                weight, bias = next(tensors), next(tensors)
                x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            elif isinstance(layer, nn.LayerNorm | nn.BatchNorm1d):
                variance, mean = torch.var_mean(
                    x, -1 if isinstance(layer, nn.LayerNorm) else 1, correction=0, keepdim=True
                )
                weight, bias = next(tensors), next(tensors)
                x = torch.addcmul(bias.unsqueeze(1), (x - mean) * (variance + layer.eps).rsqrt(), weight.unsqueeze(1))
            elif isinstance(layer, nn.Upsample):
                x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            else:
                x = x.flatten(2) if isinstance(layer, nn.Flatten) else layer(x)
        return x

    return run


def _outputs(model: nn.Module, params: Tensor, x: Tensor) -> Tensor:
    """Outputs (N, …) of any module from its flat parameters (n,)."""
    named = dict(model.named_parameters())
    pieces = params.split([p.numel() for p in named.values()])
    tensors = {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}
    return cast(Tensor, functional_call(model, tensors, (x,)))
