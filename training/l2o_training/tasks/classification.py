"""Networks that classify images: any torch module over any data set."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from l2o_training.data import Dataset
from l2o_training.tasks.base import Instances, Losses, Task, generator

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def mlp(inputs: int, hidden: tuple[int, ...], classes: int, activation: str, zoom: int = 1) -> nn.Sequential:
    """Repeat every pixel zoom × zoom times, flatten, then `hidden` layers with an activation, then a linear layer."""
    layers: list[nn.Module] = [nn.Upsample(scale_factor=zoom)] if zoom > 1 else []
    layers.append(nn.Flatten())
    inputs *= zoom**2
    for before, after in pairwise((inputs, *hidden)):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], classes))


def convnet(shape: tuple[int, int, int], channels: tuple[int, ...], classes: int, activation: str) -> nn.Sequential:
    """3×3 convolutions of stride 2, one per entry of `channels`, then a linear layer."""
    depth, height, width = shape
    layers: list[nn.Module] = []
    for before, after in pairwise((depth, *channels)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), ACTIVATIONS[activation]()]
        height, width = (height + 1) // 2, (width + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * height * width, classes))


def flat_parameters(model: nn.Module) -> Tensor:
    """All parameters of a module as one vector (n,), in the order of `named_parameters`."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def classification_losses(model: nn.Module) -> Losses:
    """Mean cross-entropy of a module, for every instance, as a function of flat parameters.

    Networks of linear layers and activations run as batched products, anything else through `torch.func`: its
    transformations take longer than a small network's products.
    """
    run = _stacked(list(model.children())) if is_mlp(model) else vmap(partial(_outputs, model))

    def losses(params: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        images, labels = batch
        logits = run(params, images)
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return each.view(labels.shape).mean(-1)

    return losses


def is_mlp(model: nn.Module) -> bool:
    """Whether a module is a chain of linear layers and activations, after repeating pixels and flattening."""
    kinds = (nn.Upsample, nn.Flatten, nn.Linear, *ACTIVATIONS.values())
    return isinstance(model, nn.Sequential) and all(isinstance(layer, kinds) for layer in model)


def _stacked(layers: list[nn.Module]) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits (B, N, classes) of a chain of layers from parameters (B, n) and inputs (B, N, …)."""
    shapes = [p.shape for layer in layers for p in layer.parameters()]

    def run(params: Tensor, x: Tensor) -> Tensor:
        pieces = params.split([shape.numel() for shape in shapes], dim=-1)
        tensors = (piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True))
        for layer in layers:
            if isinstance(layer, nn.Linear):
                weight, bias = next(tensors), next(tensors)
                x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            elif isinstance(layer, nn.Upsample):
                x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            else:
                x = x.flatten(2) if isinstance(layer, nn.Flatten) else layer(x)
        return x

    return run


def _outputs(model: nn.Module, params: Tensor, images: Tensor) -> Tensor:
    """Logits (N, classes) of any module from its flat parameters (n,)."""
    named = dict(model.named_parameters())
    pieces = params.split([p.numel() for p in named.values()])
    tensors = {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}
    return cast(Tensor, functional_call(model, tensors, (images,)))


class ClassificationTask(Task):
    """Train a network from PyTorch's default initialisation on random minibatches of the training split.

    Args:
        name: how tables call it.
        make_model: builds the network; called once per instance, for its initial parameters.
        dataset: the data.
        batch_size: images per minibatch, drawn with replacement.
    """

    def __init__(self, name: str, make_model: Callable[[], nn.Module], dataset: Dataset, batch_size: int):
        self.name = name
        self.make_model = make_model
        self.dataset = dataset
        self.batch_size = batch_size

    def instances(self, count: int, seed: int) -> Instances:
        """Draw `count` initialisations and streams of minibatches."""
        device = self.dataset.images.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models = [self.make_model() for _ in range(count)]
        params = torch.stack([flat_parameters(model) for model in models]).to(device)
        rng = generator(seed, device)
        size, labels = (count, self.batch_size), self.dataset.labels

        def batches() -> tuple[Tensor, ...]:
            return self.dataset.batch(torch.randint(len(labels), size, generator=rng, device=device))

        shapes = [param.shape for param in models[0].parameters()]
        return Instances(params, classification_losses(models[0].to(device)), batches, rng, shapes)
