"""What every bundled rule does: problems, and the ways to train on them. Recorded by `record`, compared by the tests.

All numbers that a problem is made of come from NumPy's `RandomState`, whose streams never change. Networks are smooth:
where a ReLU or a maximum has a kink, one rounding decides between two trajectories.
"""

import contextlib
import hashlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_runtime import HorizonWarning, LearnedOptimizer
from l2o_runtime.files.artifact import bundled_rules

HERE = Path(__file__).parent
RULES = [name for name in bundled_rules() if name != "directional"]
"""Those of the first recording."""
STEPS = 200
BATCH, POINTS = 16, 128


class Bowls(nn.Module):
    """Σ a (θ − c_t)² / 2 in float64, element by element: no matrix product, so that gradients are the same anywhere."""

    def __init__(self):
        super().__init__()
        shapes = {"matrix": (12, 20), "bias": (20,), "filters": (4, 3, 3, 3), "scale": (1,), "number": ()}
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
        draw = np.random.RandomState(7)
        for name, shape in shapes.items():
            self.register_buffer(f"curve_{name}", torch.as_tensor(10 ** draw.uniform(-2, 1, shape)))
            self.register_buffer(f"centre_{name}", torch.as_tensor(draw.standard_normal((STEPS, *shape)) / 10))

    def forward(self, step: int) -> Tensor:
        terms = [
            (getattr(self, f"curve_{name}") * (weight.double() - getattr(self, f"centre_{name}")[step]).square()).sum()
            for name, weight in self.weights.items()
        ]
        return torch.stack(terms).sum() / 2


class Fed(nn.Module):
    """Gradients and losses that are given, wherever the parameters are: rounding is not amplified by the problem.

    They are correlated in time, of magnitudes from 1e-9 to 1, and some are zero.
    """

    def __init__(self):
        super().__init__()
        shapes = {"matrix": (15, 16), "bias": (16,), "filters": (4, 2, 3, 3), "number": ()}
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
        draw = np.random.RandomState(8)
        for name, shape in shapes.items():
            drift = np.cumsum(draw.standard_normal((STEPS, *shape)), 0) / STEPS**0.5
            size = 10 ** draw.uniform(-9, 0, shape) * (draw.uniform(size=shape) > 0.1)
            self.register_buffer(f"grad_{name}", torch.as_tensor((drift + draw.standard_normal(drift.shape)) * size))
        self.register_buffer("losses", torch.as_tensor(np.exp(-np.arange(STEPS) / 50 + draw.uniform(size=STEPS) / 5)))

    def forward(self, step: int) -> Tensor:
        moves = [
            (getattr(self, f"grad_{name}")[step] * (weight.double() - weight.detach().double())).sum()
            for name, weight in self.weights.items()
        ]
        return self.losses[step] + torch.stack(moves).sum()


class Classifier(nn.Module):
    """A network on seeded points of a seeded teacher, in minibatches."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...], classes: int, seed: int):
        super().__init__()
        self.network = network
        draw = np.random.RandomState(seed)
        points = draw.standard_normal((POINTS, *shape))
        teacher = draw.standard_normal((points[0].size, classes))
        self.register_buffer("points", torch.as_tensor(points, dtype=torch.float32))
        self.register_buffer("labels", torch.as_tensor((points.reshape(POINTS, -1) @ teacher).argmax(-1)))
        self.register_buffer("batches", torch.as_tensor(draw.randint(POINTS, size=(STEPS, BATCH))))

    def forward(self, step: int) -> Tensor:
        batch = self.batches[step]
        return F.cross_entropy(self.network(self.points[batch]), self.labels[batch])


def mlp() -> nn.Module:
    network = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.SiLU(), nn.Linear(12, 4))
    return Classifier(network, (10,), 4, seed=1)


def convnet() -> nn.Module:
    # No bias before BatchNorm: its gradient would be nothing but rounding, which rules enlarge.
    block = [nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU(), nn.AvgPool2d(2)]
    block += [nn.Conv2d(6, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten()]
    return Classifier(nn.Sequential(*block, nn.Linear(32, 5)), (2, 8, 8), 5, seed=2)


MODELS: dict[str, Callable[[], nn.Module]] = {"fed": Fed, "bowls": Bowls, "mlp": mlp, "convnet": convnet}


def make_model(name: str) -> nn.Module:
    """A model with its seeded initial parameters: uniform, ± 1/√fan-in; those of norms are as PyTorch makes them."""
    model = MODELS[name]()
    draw = np.random.RandomState(3)
    for key, param in model.named_parameters():
        size = param[0].numel() if param.dim() > 1 else max(param.numel(), 1)
        values = torch.as_tensor(draw.uniform(-1, 1, tuple(param.shape)) / size**0.5)
        norm = isinstance(model.get_submodule(key.rpartition(".")[0]), nn.BatchNorm2d | nn.GroupNorm)
        if not norm:
            param.data.copy_(values)
    return model


def groups(model: nn.Module) -> list[dict]:
    """Two groups of parameters, of which one decays and takes half steps."""
    params = list(model.parameters())
    matrices, rest = ([p for p in params if (p.dim() > 1) == many] for many in (True, False))
    return [{"params": matrices, "weight_decay": 0.5, "lr": 0.5}, {"params": rest}]


class Trajectory(NamedTuple):
    """A training run.

    Attributes:
        losses: (steps,) before each step, float64.
        params: (steps, n) after each step.
    """

    losses: Tensor
    params: Tensor

    @property
    def digest(self) -> str:
        """Of every bit."""
        return hashlib.sha256(self.losses.numpy().tobytes() + self.params.numpy().tobytes()).hexdigest()

    @property
    def projection(self) -> Tensor:
        """(STEPS,) Σ ± θ_i with seeded signs: an error in θ changes it by about its norm. float64."""
        signs = np.random.RandomState(4).choice([-1.0, 1.0], self.params.shape[1])
        return self.params.double() @ torch.as_tensor(signs)

    @property
    def norms(self) -> Tensor:
        """(STEPS,) ‖θ‖, float64."""
        return self.params.double().norm(dim=1)


@contextlib.contextmanager
def kernels(on: bool) -> Iterator[None]:
    """Compiled code on or off."""
    with mock.patch.dict(os.environ, L2O_KERNELS="" if on else "plain"):
        yield


Nudge = Callable[[Tensor], Tensor]
"""Changes initial parameters."""


def last_bits(theta: Tensor) -> Tensor:
    """Parameters a little larger or smaller, in the last bit."""
    signs = np.random.RandomState(5).choice([-1.0, 1.0], tuple(theta.shape))
    return theta * (1 + torch.finfo(theta.dtype).eps * torch.as_tensor(signs, dtype=theta.dtype))


def upwards(theta: Tensor) -> Tensor:
    """The next larger floating-point numbers."""
    return torch.nextafter(theta, torch.tensor(torch.inf))


def make_optimizer(rule: str | Path, model: nn.Module) -> LearnedOptimizer:
    """Of the convolutional network some parameters decay."""
    several = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return LearnedOptimizer(groups(model) if several else model.parameters(), rule=rule)


def advance(model: nn.Module, optimizer: LearnedOptimizer, step: int) -> Tensor:
    """One step of an ordinary training script; gives the loss before it."""
    optimizer.zero_grad()
    loss = model(step)
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HorizonWarning)  # some rules were trained for 100 steps
        optimizer.step(loss=loss.detach().float())
    return loss.detach()


def train(rule: str | Path, name: str, compiled: bool, nudge: Nudge | None = None, steps: int = STEPS) -> Trajectory:
    """Train a model with a rule, for `STEPS` steps or fewer.

    Args:
        rule: a bundled name or a file.
        name: of the model.
        compiled: whether compiled code may be used; for files that are not `.safetensors` there is none.
        nudge: changes the initial parameters.
        steps: at most `STEPS`.
    """
    model = make_model(name)
    for param in model.parameters() if nudge is not None else ():
        param.data = nudge(param.data)
    losses, params = [], []
    with kernels(compiled):
        optimizer = make_optimizer(rule, model)
        for step in range(steps):
            losses.append(advance(model, optimizer, step).double())
            params.append(flat(model))
    return Trajectory(torch.stack(losses), torch.stack(params))


def flat(model: nn.Module) -> Tensor:
    """(n,) a copy of the parameters."""
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def distances(ours: Trajectory, theirs: Trajectory) -> Tensor:
    """(STEPS,) ‖θ − θ'‖ / ‖θ‖, the largest so far."""
    return ((ours.params - theirs.params).double().norm(dim=1) / ours.norms).cummax(0).values


def amplified(rule: str, name: str, reference: Trajectory) -> Tensor:
    """(STEPS,) how far from the reference rounding alone leads: the larger of two nudges in the last bits."""
    nudged = [train(rule, name, False, nudge) for nudge in (last_bits, upwards)]
    return torch.stack([distances(reference, other) for other in nudged]).amax(0)


def processor() -> str:
    """What the last bits depend on. PyTorch 2.9, 2.14 and 2.15 give the same ones."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = told.get("model name") or platform.processor()
    kind = f"family {told.get('cpu family', '?')}, model {told.get('model', '?')}"  # names of virtual ones say little
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.system()}, {platform.machine()}, {name}, {kind}, {capability}"
