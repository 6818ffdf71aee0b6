"""Suites: named lists of tasks that contenders are compared on, flat tasks or training scripts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from l2o_runtime.config import nearest, require
from l2o_training.compare.flat import CPU, FlatWorkload, task_name
from l2o_training.compare.scripts import ScriptWorkload
from l2o_training.compare.workloads import Workload
from l2o_training.tasks import ConvConfig, MLPConfig, QuadraticConfig, SparseConfig, TaskConfig
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts import RECIPES, everyday, heldout, larger
from l2o_training.tasks.scripts.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks, and how long and how often they are run where nothing else is asked for.

    Attributes:
        description: what they are, in one line.
        tasks: flat ones by their configuration, training scripts by their recipe.
        steps, horizons, runs: as a `Study` has them.
        caveat: what a reader of the figures has to know of these tasks.
    """

    description: str
    tasks: tuple[TaskConfig | Recipe, ...]
    steps: int = 300
    horizons: tuple[int, ...] = (1,)
    runs: int = 10
    caveat: str = ""

    @property
    def scripts(self) -> bool:
        """Whether it has training scripts."""
        return any(isinstance(task, Recipe) for task in self.tasks)

    @property
    def structured(self) -> bool:
        """Whether all of its tasks have A and b, for solvers that read them."""
        return bool(self.tasks) and all(isinstance(task, SparseConfig) for task in self.tasks)


def _of_scripts(recipes: Mapping[str, Recipe], description: str, caveat: str) -> Suite:
    """Training scripts, three runs of each at three lengths."""
    return Suite(
        description=description,
        tasks=tuple(recipes.values()),
        steps=100,
        horizons=(1, 5, 25),
        runs=3,
        caveat=caveat,
    )


SUITES = {
    "digits": Suite(
        description="small MLPs on scikit-learn's digits; needs no download",
        tasks=(
            MLPConfig(name="digits-1L", hidden=(20,), batch_size=64),
            MLPConfig(name="digits-2L", hidden=(20, 20), batch_size=64),
            MLPConfig(name="digits-relu", hidden=(20,), activation="relu", batch_size=64),
        ),
    ),
    "quadratics": Suite(
        description="random quadratics of 10 and 20 parameters",
        tasks=(QuadraticConfig(size=10), QuadraticConfig(size=20)),
    ),
    "table1": Suite(
        description="the six image tasks of L2O-DMD's Table 1 (arXiv 2211.16268)",
        tasks=(
            MLPConfig(name="MNIST-1L", data="mnist", hidden=(20,)),
            MLPConfig(name="MNIST-2L", data="mnist", hidden=(20, 20)),
            MLPConfig(name="MNIST-Batch", data="mnist", hidden=(20,), batch_size=16),
            MLPConfig(name="MNIST-RELU", data="mnist", hidden=(20,), activation="relu"),
            MLPConfig(name="FashionMNIST-1L", data="fashion-mnist", hidden=(20,)),
            MLPConfig(name="CIFAR10-1L", data="cifar10", hidden=(20,)),
        ),
        caveat="The preset of the bundled rule mnist was changed until the rule did well on these tasks.",
    ),
    "architectures": Suite(
        description="MLPs and ConvNets that no preset is meta-trained on",
        tasks=(
            MLPConfig(name="MNIST-4L-tanh", data="mnist", hidden=(32, 32, 32, 32), activation="tanh"),
            MLPConfig(name="MNIST-wide-gelu", data="mnist", hidden=(128,), activation="gelu"),
            ConvConfig(name="MNIST-conv", data="mnist", channels=(8, 16)),
            ConvConfig(name="FashionMNIST-conv-3", data="fashion-mnist", channels=(8, 16, 16), activation="elu"),
            ConvConfig(name="CIFAR10-conv", data="cifar10", channels=(8, 16)),
            ConvConfig(
                name="FashionMNIST-conv-batch", data="fashion-mnist", channels=(12, 24), norm="batch", batch_size=64
            ),
        ),
    ),
    "unseen": _of_scripts(
        RECIPES,
        "13 ordinary training scripts, from ConvNets to a VAE, that no preset is meta-trained on",
        "Which rule was bundled as the default was decided with these tasks in view.",
    ),
    "everyday": _of_scripts(
        everyday.RECIPES,
        "24 training scripts as people write them, most on real data; for choices",
        "These tasks are for choices: what was chosen by them does better on them than elsewhere.",
    ),
    "heldout": _of_scripts(
        heldout.RECIPES,
        "24 training scripts that nothing was chosen by; for verdicts; needs no download",
        "Drafts of these scripts, without an end of data, were run once; the rule was not changed after that.",
    ),
    "larger": _of_scripts(
        larger.RECIPES,
        "12 training scripts of 175,000 to 11 million parameters; for verdicts",
        "Eight of these networks had a part in what the rule scale does in networks larger than it knew.",
    ),
    "sparse-recovery": Suite(
        description="x from b = A x, A of 256 × 512, as in meta-training and beside it; for unrolled solvers",
        tasks=(
            SparseConfig(name="sparse-256-512", score="nmse"),
            SparseConfig(name="sparse-snr-20", score="nmse", snr=20.0),
            SparseConfig(name="sparse-denser", score="nmse", sparsity=0.15),
            SparseConfig(name="sparse-perturbed", score="nmse", perturbed=0.05),
        ),
        steps=26,
        runs=100,
        caveat="Losses are ‖x − x*‖²/E‖x*‖² (NMSE). A solver stays after its 16 layers, others go on to 25.",
    ),
    "lasso": Suite(
        description="Lasso problems with λ = 0.005 and A of 5 × 10 and 25 × 50 (Open-L2O's); for unrolled solvers",
        tasks=(
            SparseConfig(name="lasso-5-10", rows=5, columns=10),
            SparseConfig(name="lasso-25-50", rows=25, columns=50),
        ),
        steps=26,
        runs=100,
        caveat="Losses are f(x), not f(x) − f*. An unrolled solver has one A: choose its task by --task. It stays "
        "after its 16 layers, others go on to 25.",
    ),
}
"""Name → suite."""


OWN = Suite(
    description="tasks of one's own, on instances that no meta-training sees",
    tasks=(),
    steps=1000,
    runs=10,
    caveat="Rules were told how long a run is. What was specialised on a task says nothing of others.",
)
"""What tasks of one's own are compared like."""

OWN_BASELINES = "adam,adam-0.001,adamw-cosine,muon-linear"
"""What stands beside rules there where nothing else is asked for."""


def find_suite(name: str, tasks: Iterable[str] = ()) -> Suite:
    """A suite, or some of its tasks, each once and in the suite's order.

    Raises:
        ConfigError: there is none of that name, or no such task.
    """
    require(name in SUITES, f"unknown suite {name!r}: {nearest(name, list(SUITES))}")
    suite, wanted = SUITES[name], set(tasks)
    names = [named(task) for task in suite.tasks]
    for task in wanted:
        require(task in names, f"--task {task}: {nearest(task, names)}")
    chosen = tuple(task for task, own in zip(suite.tasks, names, strict=True) if not wanted or own in wanted)
    return replace(suite, tasks=chosen)


def named(task: TaskConfig | Recipe) -> str:
    """The name of a task."""
    return task.name if isinstance(task, Recipe) else task_name(task)


def workloads(suite: Suite, load: Datasets, device: torch.device = CPU) -> list[Workload]:
    """A suite's tasks, ready to be measured.

    Args:
        suite: which.
        load: gives the data set of a name.
        device: of flat tasks; training scripts run on the CPU.
    """
    return [
        ScriptWorkload(task, load) if isinstance(task, Recipe) else FlatWorkload(task, load, device)
        for task in suite.tasks
    ]
