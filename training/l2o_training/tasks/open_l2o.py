"""The networks of Open-L2O, as its code has them, traps and all, and as they were meant.

As in the code: examples of the test split; outputs of the convolutional networks go through a ReLU before the softmax,
so that a step which makes all of them negative leaves a loss of ln 10 for good. As meant: examples of the training
split, and outputs as they are. Source: the benchmark's code, and arXiv 2103.12828, section 5.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from l2o_training.tasks.networks import mlp

SCALE = 0.01
"""Standard deviation of initial weights; biases begin at zero."""


class NAS(nn.Module):
    """A cell with skips and one pooling, of 16 channels throughout."""

    def __init__(self, depth: int, classes: int):
        super().__init__()
        self.stem = nn.Conv2d(depth, 16, 3, padding=1)
        self.first, self.second, self.third = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.pool, self.head = nn.AvgPool2d(3, stride=1, padding=1), nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, depth, h, w) → (N, classes)."""
        n0 = torch.relu(self.stem(x))
        n1 = torch.relu(self.first(n0))
        n2 = self.pool(n1) + torch.relu(self.second(n0))
        n3 = n2 + torch.relu(self.third(n1)) + n0
        outputs: Tensor = self.head(n3.mean((-2, -1)))
        return outputs


def drawn(model: nn.Module) -> nn.Module:
    """The same module with weights of convolutions and linear layers from N(0, 0.01²), and biases of zero."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=SCALE)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return model


def conv(depth: int, stride: int, flat: int, original: bool) -> nn.Sequential:
    """3 × 3 × 16 and 5 × 5 × 32 convolutions without padding, each with BatchNorm, ReLU and pooling, and a layer."""
    layers: list[nn.Module] = []
    for before, after, size in ((depth, 16, 3), (16, 32, 5)):
        layers += [nn.Conv2d(before, after, size, stride), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 10), *[nn.ReLU()] * original)


def lenet(depth: int, flat: int) -> nn.Sequential:
    """LeNet-5 with BatchNorm, sigmoids and pooling of maxima."""
    layers: list[nn.Module] = []
    for before, after in ((depth, 6), (6, 16)):
        layers += [nn.Conv2d(before, after, 5), nn.BatchNorm2d(after), nn.Sigmoid(), nn.MaxPool2d(2)]
    for inputs, outputs in ((flat, 120), (120, 84)):
        layers += [nn.Flatten(), nn.Linear(inputs, outputs), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(84, 10))


NETWORKS: dict[str, tuple[str, Callable[[bool], nn.Module]]] = {
    "mnist": ("mnist", lambda original: mlp(784, (20,), 10, "sigmoid")),
    "mnist_relu": ("mnist", lambda original: mlp(784, (20,), 10, "relu")),
    "mnist_deeper": ("mnist", lambda original: mlp(784, (20, 20), 10, "sigmoid")),
    "mnist_conv": ("mnist", partial(conv, 1, 1, 512)),
    "cifar_conv": ("cifar10", partial(conv, 3, 2, 32)),
    "lenet_mnist": ("mnist", lambda original: lenet(1, 256)),
    "lenet": ("cifar10", lambda original: lenet(3, 400)),
    "nas": ("cifar10", lambda original: NAS(3, 10)),
}
"""Name → data set, and what makes the network; it is told whether it is to be as the code has it."""
