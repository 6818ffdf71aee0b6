"""Tasks as configuration: what a preset's `[[tasks]]` may hold."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import nn

from l2o_runtime.config import LATER, require
from l2o_training.tasks.base import Task
from l2o_training.tasks.data import Load
from l2o_training.tasks.games import GameName, GameTask
from l2o_training.tasks.networks import CharGRU, CharTransformer, convnet, mlp
from l2o_training.tasks.open_l2o import NETWORKS, drawn
from l2o_training.tasks.own import OwnTask
from l2o_training.tasks.places import is_place, name_of
from l2o_training.tasks.quadratic import ClippedTask, QuadraticTask
from l2o_training.tasks.rastrigin import RastriginTask
from l2o_training.tasks.sparse import SparseTask, dictionary, own_matrix
from l2o_training.tasks.supervised import (
    Draw,
    Labelled,
    Loss,
    Numbers,
    SupervisedTask,
    Text,
    Unlabelled,
    cross_entropy,
    squared_error,
)

Activation = Literal["sigmoid", "tanh", "relu", "elu", "gelu", "silu"]
Norm = Literal["none", "layer", "batch"]


@dataclass(frozen=True, kw_only=True)
class QuadraticConfig:
    """‖Wθ − y‖² with `size` parameters."""

    kind: ClassVar[str] = "quadratic"
    size: int = 10

    def __post_init__(self) -> None:
        require(1 <= self.size <= 10_000, f"size: must be in 1..10000, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """b = A x* + ε with a sparse x* and one A, Gaussian or your own.

    Attributes:
        matrix: a .npy file with A; empty draws one.
        rows, columns: m and n of A.
        sparsity: chance that an entry of x* is not zero.
        snr: in dB; absent without noise.
        weight: λ of the Lasso that is the loss.
        seed: of A.
        condition: κ, the ratio of the largest to the smallest singular value of A; absent leaves them as drawn.
        correlation: ρ of neighbouring columns of A, whose inner product is about that; 0 for independent ones.
        perturbed: standard deviation of what is added to A where b is made, times √m; solvers read A as it was.
        score: what comparisons look at, the loss, or ‖x − x*‖²/E‖x*‖².
    """

    kind: ClassVar[str] = "sparse"
    name: str = ""
    rows: int = 256
    columns: int = 512
    sparsity: float = 0.1
    snr: float | None = None
    weight: float = 0.005
    seed: int = 0
    matrix: str = dataclasses.field(default="", metadata=LATER)
    condition: float | None = dataclasses.field(default=None, metadata=LATER)
    correlation: float = dataclasses.field(default=0.0, metadata=LATER)
    perturbed: float = dataclasses.field(default=0.0, metadata=LATER)
    score: Literal["loss", "nmse"] = dataclasses.field(default="loss", metadata=LATER)

    def __post_init__(self) -> None:
        for key in ("rows", "columns"):
            require(1 <= getattr(self, key) <= 4096, f"{key}: must be in 1..4096, got {getattr(self, key)}")
        require(0 < self.sparsity <= 1, f"sparsity: must be in (0, 1], got {self.sparsity}")
        require(self.weight >= 0, f"weight: must be 0 or more, got {self.weight}")
        require(self.perturbed >= 0, f"perturbed: must be 0 or more, got {self.perturbed}")
        for key in ("condition", "correlation"):
            alone = not self.matrix or not getattr(self, key)
            require(alone, f"{key}: not with matrix, whose numbers are taken as they are: leave it out")
        require(0 <= self.correlation < 1, f"correlation: must be in [0, 1), got {self.correlation}")
        usable = self.condition is None or self.condition >= 1
        require(usable, f"condition: must be 1 or more, or absent, got {self.condition}")
        require(0 <= self.seed < 2**31, f"seed: must be in 0..2147483647, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ClippedConfig:
    """mean min((θ − a)², 10) with `size` parameters: what RNNprop is meta-trained on beside a network."""

    kind: ClassVar[str] = "clipped"
    name: str = ""
    size: int = 20

    def __post_init__(self) -> None:
        require(1 <= self.size <= 10_000, f"size: must be in 1..10000, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class OpenL2OConfig:
    """A network of Open-L2O: see `l2o_training.tasks.open_l2o`.

    Attributes:
        original: as the benchmark's code has it: examples of the test split, and ReLU on outputs of `_conv` networks.
    """

    kind: ClassVar[str] = "open-l2o"
    name: str = ""
    network: Literal[
        "mnist", "mnist_relu", "mnist_deeper", "mnist_conv", "cifar_conv", "lenet_mnist", "lenet", "nas"
    ] = "mnist"
    original: bool = False
    batch_size: int = 128

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, f"batch_size: must be 2 or more, got {self.batch_size}")

    @property
    def data(self) -> str:
        """The data set that it needs."""
        return NETWORKS[self.network][0] + "-test" * self.original


@dataclass(frozen=True, kw_only=True)
class RastriginConfig:
    """A function of Rastrigin's family, with many local minima: see `l2o_training.tasks.rastrigin`.

    Attributes:
        size: n.
        particles: points at which every problem is evaluated in a step; instances are rows, so many for each problem.
        spread: σ of the family near Rastrigin's own function; absent for the one of numbers from N(0, 1).
    """

    kind: ClassVar[str] = "rastrigin"
    name: str = ""
    size: int = 10
    particles: int = 1
    spread: float | None = None

    def __post_init__(self) -> None:
        require(1 <= self.size <= 1000, f"size: must be in 1..1000, got {self.size}")
        require(1 <= self.particles <= 64, f"particles: must be in 1..64, got {self.particles}")
        require(self.spread is None or 0 <= self.spread <= 1, f"spread: must be in [0, 1] or absent, got {self.spread}")


@dataclass(frozen=True, kw_only=True)
class GameConfig:
    """A game of two players: see `l2o_training.tasks.games`.

    Attributes:
        game: which.
        size: n, of either player.
        reach: coordinates begin in [−reach, reach].
    """

    kind: ClassVar[str] = "game"
    name: str = ""
    game: GameName = "rotated-saddle"
    size: int = 1
    reach: float = 0.5

    def __post_init__(self) -> None:
        require(1 <= self.size <= 1000, f"size: must be in 1..1000, got {self.size}")
        require(0 < self.reach <= 100, f"reach: must be in (0, 100], got {self.reach}")


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """A multi-layer perceptron on images; no entry in `hidden` is logistic regression.

    Attributes:
        gain, shift: images x become gain · x + shift.
        zoom: every pixel is repeated zoom × zoom times: more inputs, that agree with each other.
        norm: what stands before each activation.
        label_noise: share of labels that are replaced by any class.
    """

    kind: ClassVar[str] = "mlp"
    data: str = "digits"
    hidden: tuple[int, ...] = (20,)
    activation: Activation = "sigmoid"
    batch_size: int = 128
    gain: float = 1.0
    shift: float = 0.0
    zoom: int = dataclasses.field(default=1, metadata=LATER)
    norm: Norm = dataclasses.field(default="none", metadata=LATER)
    label_noise: float = dataclasses.field(default=0.0, metadata=LATER)
    name: str = ""

    def __post_init__(self) -> None:
        _check_network("hidden", self.hidden, self.batch_size, self.norm, self.label_noise)
        require(1 <= self.zoom <= 8, f"zoom: must be in 1..8, got {self.zoom}")


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """A small convolutional network on images: one 3×3 layer of stride 2 per entry of `channels`.

    Attributes:
        norm, label_noise: as in `MLPConfig`; "layer" is over channels and places.
    """

    kind: ClassVar[str] = "conv"
    data: str = "cifar10"
    channels: tuple[int, ...] = (8, 16)
    activation: Activation = "relu"
    batch_size: int = 128
    norm: Norm = dataclasses.field(default="none", metadata=LATER)
    label_noise: float = dataclasses.field(default=0.0, metadata=LATER)
    name: str = ""

    def __post_init__(self) -> None:
        require(len(self.channels) > 0, f"channels: needs one width or more, got {self.channels}")
        _check_network("channels", self.channels, self.batch_size, self.norm, self.label_noise)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """An autoencoder of images: `hidden` widths down to the last one, the code, and back again; squared error."""

    kind: ClassVar[str] = "autoencoder"
    data: str = "digits"
    hidden: tuple[int, ...] = (32, 4)
    activation: Activation = "tanh"
    batch_size: int = 64
    norm: Norm = "none"
    name: str = ""

    def __post_init__(self) -> None:
        require(len(self.hidden) > 0, f"hidden: needs one width or more, got {self.hidden}")
        _check_network("hidden", self.hidden, self.batch_size, self.norm)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A network that predicts every next character of a text in which two characters decide about the third.

    Attributes:
        cell: a GRU, or one causal transformer block.
        characters: how many there are.
        length: of a passage.
        width: of the embeddings, and of the state.
    """

    kind: ClassVar[str] = "text"
    cell: Literal["gru", "transformer"] = "gru"
    characters: int = 12
    length: int = 12
    width: int = 16
    batch_size: int = 16
    name: str = ""

    def __post_init__(self) -> None:
        _check_network("width", (self.width,), self.batch_size)
        require(self.width % 2 == 0, f"width: must be even, for two heads, got {self.width}")
        require(2 <= self.characters <= 64, f"characters: must be in 2..64, got {self.characters}")
        require(1 <= self.length <= 256, f"length: must be in 1..256, got {self.length}")


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """A multi-layer perceptron on vectors of numbers; no entry in `hidden` is linear regression.

    Attributes:
        size: numbers of a vector.
        condition: of their covariance.
        wave: what a sine of the vector adds to the number, at most; linear regression cannot know it.
    """

    kind: ClassVar[str] = "regression"
    size: int = 20
    condition: float = 100.0
    wave: float = dataclasses.field(default=0.5, metadata=LATER)
    hidden: tuple[int, ...] = ()
    activation: Activation = "silu"
    batch_size: int = 32
    norm: Norm = "none"
    name: str = ""

    def __post_init__(self) -> None:
        _check_network("hidden", self.hidden, self.batch_size, self.norm)
        require(1 <= self.size <= 1000, f"size: must be in 1..1000, got {self.size}")
        require(1 <= self.condition <= 1e6, f"condition: must be in 1..1e6, got {self.condition}")
        require(0 <= self.wave <= 100, f"wave: must be in [0, 100], got {self.wave}")


@dataclass(frozen=True, kw_only=True)
class PythonConfig:
    """A Python function that makes a model and its loss: see `l2o_training.tasks.own`.

    Attributes:
        make: "file.py:function" or "package.module:function". The file or module is run.
    """

    kind: ClassVar[str] = "python"
    make: str

    def __post_init__(self) -> None:
        require(is_place(self.make), f"make: expected file.py:function or package.module:function, got {self.make!r}")

    @property
    def name(self) -> str:
        """What tables call it."""
        return name_of(self.make)


TaskConfig = (
    QuadraticConfig
    | SparseConfig
    | ClippedConfig
    | OpenL2OConfig
    | RastriginConfig
    | GameConfig
    | MLPConfig
    | ConvConfig
    | AutoencoderConfig
    | TextConfig
    | RegressionConfig
    | PythonConfig
)


def _check_network(
    key: str, widths: tuple[int, ...], batch_size: int, norm: Norm = "none", label_noise: float = 0.0
) -> None:
    require(all(width >= 1 for width in widths), f"{key}: widths must be 1 or more, got {widths}")
    require(batch_size >= 1, f"batch_size: must be 1 or more, got {batch_size}")
    require(norm != "batch" or batch_size >= 2, f"batch_size: must be 2 or more with norm = batch, got {batch_size}")
    require(0 <= label_noise < 1, f"label_noise: must be in [0, 1), got {label_noise}")


def make_task(config: TaskConfig, load: Load, device: torch.device) -> Task:
    """Build a task.

    Args:
        config: what to build.
        load: gives the data set of a name.
        device: where instances live.
    """
    if isinstance(config, QuadraticConfig):
        return QuadraticTask(config.size, device)
    if isinstance(config, SparseConfig):
        if config.matrix:
            matrix = own_matrix(config.matrix, config.rows, config.columns)
        else:
            matrix = dictionary(config.rows, config.columns, config.seed, config.condition, config.correlation)
        return SparseTask(
            matrix,
            weight=config.weight,
            sparsity=config.sparsity,
            snr=config.snr,
            perturbed=config.perturbed,
            relative=config.score == "nmse",
            device=device,
        )
    if isinstance(config, ClippedConfig):
        return ClippedTask(config.size, device)
    if isinstance(config, RastriginConfig):
        return RastriginTask(config.size, config.particles, config.spread, device)
    if isinstance(config, GameConfig):
        return GameTask(config.game, config.size, config.reach, device)
    if isinstance(config, PythonConfig):
        return OwnTask(config.make, device)
    default, model, loss, draw = _parts(config, load, device)
    return SupervisedTask(config.name or default, model, loss, draw, config.batch_size, device)


def _parts(
    config: MLPConfig | ConvConfig | AutoencoderConfig | TextConfig | RegressionConfig | OpenL2OConfig,
    load: Load,
    device: torch.device,
) -> tuple[str, Callable[[], nn.Module], Loss, Draw]:
    """Name, network, loss and minibatches."""
    if isinstance(config, TextConfig):
        draw = Text(config.characters, config.length, device)
        if config.cell == "gru":
            model: Callable[[], nn.Module] = partial(CharGRU, config.characters, config.width, config.width)
        else:
            model = partial(CharTransformer, config.characters, config.length, config.width, 2, 1)
        return f"text-{config.cell}-{config.width}", model, cross_entropy, draw
    if isinstance(config, RegressionConfig):
        model = partial(mlp, config.size, config.hidden, 1, config.activation, norm=config.norm)
        numbers = Numbers(config.size, config.condition, config.wave, device)
        return f"regression-{_joined(config.size, *config.hidden)}", model, squared_error, numbers
    data = load(config.data).to(device)
    if isinstance(config, OpenL2OConfig):
        _, make = NETWORKS[config.network]
        name = config.network + "-original" * config.original
        return name, lambda: drawn(make(config.original)), cross_entropy, Labelled(data)
    inputs = data.images[0].numel()
    if isinstance(config, AutoencoderConfig):
        widths = (*config.hidden, *config.hidden[-2::-1])
        model = partial(mlp, inputs, widths, inputs, config.activation, norm=config.norm)
        return f"{config.data}-auto-{_joined(*config.hidden)}", model, squared_error, Unlabelled(data)
    if isinstance(config, ConvConfig):
        model = partial(convnet, data.shape, config.channels, data.classes, config.activation, config.norm)
        default = f"{config.data}-conv-{_joined(*config.channels)}"
    else:
        data = dataclasses.replace(data, gain=config.gain, shift=config.shift)
        model = partial(mlp, inputs, config.hidden, data.classes, config.activation, config.zoom, config.norm)
        default = f"{config.data}-{_joined(*config.hidden)}-{config.activation}"
    return default, model, cross_entropy, Labelled(data, config.label_noise)


def _joined(*widths: int) -> str:
    return "-".join(map(str, widths))
