"""Tasks as configuration: what a preset's `[[tasks]]` may hold."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from l2o_runtime.config import LATER, require
from l2o_training.data import Dataset
from l2o_training.tasks.base import Task
from l2o_training.tasks.classification import ClassificationTask, convnet, mlp
from l2o_training.tasks.quadratic import QuadraticTask

Activation = Literal["sigmoid", "tanh", "relu", "elu", "gelu", "silu"]
Load = Callable[[str], Dataset]


@dataclass(frozen=True, kw_only=True)
class QuadraticConfig:
    """‖Wθ − y‖² with `size` parameters."""

    kind: ClassVar[str] = "quadratic"
    size: int = 10

    def __post_init__(self) -> None:
        require(1 <= self.size <= 10_000, f"size: must be in 1..10000, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A multi-layer perceptron on images; no entry in `hidden` is logistic regression.

    Attributes:
        gain, shift: images x become gain · x + shift.
        zoom: every pixel is repeated zoom × zoom times: more inputs, that agree with each other.
    """

    kind: ClassVar[str] = "mlp"
    data: str = "digits"
    hidden: tuple[int, ...] = (20,)
    activation: Activation = "sigmoid"
    batch_size: int = 128
    gain: float = 1.0
    shift: float = 0.0
    zoom: int = dataclasses.field(default=1, metadata=LATER)
    name: str = ""

    def __post_init__(self) -> None:
        require(all(width >= 1 for width in self.hidden), f"hidden: widths must be 1 or more, got {self.hidden}")
        require(self.batch_size >= 1, f"batch_size: must be 1 or more, got {self.batch_size}")
        require(1 <= self.zoom <= 8, f"zoom: must be in 1..8, got {self.zoom}")


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """A small convolutional network on images: one 3×3 layer of stride 2 per entry of `channels`."""

    kind: ClassVar[str] = "conv"
    data: str = "cifar10"
    channels: tuple[int, ...] = (8, 16)
    activation: Activation = "relu"
    batch_size: int = 128
    name: str = ""

    def __post_init__(self) -> None:
        valid = len(self.channels) > 0 and all(c >= 1 for c in self.channels)
        require(valid, f"channels: needs one width or more, each 1 or more, got {self.channels}")
        require(self.batch_size >= 1, f"batch_size: must be 1 or more, got {self.batch_size}")


TaskConfig = QuadraticConfig | MLPConfig | ConvConfig


def make_task(config: TaskConfig, load: Load, device: torch.device) -> Task:
    """Build a task.

    Args:
        config: what to build.
        load: gives the data set of a name.
        device: where instances live.
    """
    if isinstance(config, QuadraticConfig):
        return QuadraticTask(config.size, device)
    data = load(config.data).to(device)
    if isinstance(config, MLPConfig):
        if (config.gain, config.shift) != (1.0, 0.0):
            data = dataclasses.replace(data, images=config.gain * data.images + config.shift)
        model = partial(mlp, data.images[0].numel(), config.hidden, data.classes, config.activation, config.zoom)
        default = f"{config.data}-{'-'.join(map(str, config.hidden))}-{config.activation}"
    else:
        model = partial(convnet, data.shape, config.channels, data.classes, config.activation)
        default = f"{config.data}-conv-{'-'.join(map(str, config.channels))}"
    return ClassificationTask(config.name or default, model, data, config.batch_size)
