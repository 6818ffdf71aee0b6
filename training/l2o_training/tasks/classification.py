"""Networks that classify images: any torch module over any data set."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from l2o_training.data import Dataset
from l2o_training.tasks.base import Instances, Loss, Task, generator

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


def classification_loss(model: nn.Module) -> Loss:
    """Cross-entropy of a module as a function of its flat parameters."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def loss(params: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        images, labels = batch
        pieces = params.split(sizes)
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return F.cross_entropy(functional_call(model, named, (images,)), labels)

    return loss


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
        return Instances(params, classification_loss(models[0].to(device)), batches, rng, shapes)
