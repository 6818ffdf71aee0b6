"""What tests of comparisons share: made-up data, runs as plain lists, small studies, an optimizer that runs away."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from l2o_training.compare.contenders import Contender, baselines
from l2o_training.compare.scripts import train
from l2o_training.compare.study import Study
from l2o_training.compare.suites import find_suite, workloads
from l2o_training.tasks.data import Dataset, Datasets
from l2o_training.tasks.records import TABLES, Table
from l2o_training.tasks.scripts import RECIPES, everyday, heldout, larger, texts
from l2o_training.tasks.scripts.base import Script

BASELINES = {contender.name: contender for contender in baselines("all")}
SMALL = ("least-squares", "tabular")
EVERY = RECIPES | everyday.RECIPES | larger.RECIPES | heldout.RECIPES
"""Scripts of all suites."""


def fake_data(name: str) -> Dataset:
    """Images of the right shape that can be learned: each class has a mean of its own."""
    shape = (3, 32, 32) if name == "cifar10" else (1, 28, 28)
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (2600,), generator=rng)
    means = torch.randint(256, (10, *shape), generator=rng)
    noise = torch.randint(256, (2600, *shape), generator=rng)
    return Dataset(((means[labels] + noise) // 2).to(torch.uint8), labels, 10)


def fake_table(name: str) -> Table:
    """Numbers and categories of 6,000 rows, all of which have to do with the first column."""
    rng, columns = torch.Generator().manual_seed(0), TABLES[name]
    first = torch.rand(6000, generator=rng)
    noise = {column: 0.1 * torch.rand(6000, generator=rng) for column in (*columns.numbers, *columns.categories)}
    numbers = {column: 1 + first + noise[column] for column in columns.numbers}
    return Table(numbers, {column: (4 * (first + noise[column])).long() for column in columns.categories})


class FakeDatasets(Datasets):
    """Made-up images, texts and tables in place of every data set."""

    def __call__(self, name: str) -> Dataset:
        return fake_data(name)

    def text(self, name: str) -> str:
        return texts.corpus()

    def table(self, name: str) -> Table:
        return fake_table(name)


FAKE = FakeDatasets("none")


def script_of(name: str) -> Script:
    return EVERY[name].build(FAKE)


class Run(NamedTuple):
    """One training as plain lists."""

    train: list[float]
    validation: list[float]
    batch_validation: list[float]
    state_bytes: float
    parameters: int


def run(script: Script, contender: Contender, lr: float, seed: int, steps: int) -> Run:
    found = train(script, contender.optimizer, lr, seed, steps)
    curves = (part[0].tolist() for part in (found.train, found.validation, found.batch_validation))
    return Run(*curves, found.state_bytes, found.parameters)


def scripts(names: tuple[str, ...], load: Datasets) -> list:
    return workloads(find_suite("unseen", names), load)


def study_in(folder: Path, **changes) -> Study:
    """Two scripts, three baselines over a thin grid, two lengths."""
    settings = {
        "suite": "unseen",
        "workloads": scripts(SMALL, Datasets(folder / "data")),
        "contenders": baselines("adam-0.001,adam,momentum", thin=7),
        "steps": 12,
        "horizons": (1, 2),
        "runs": 2,
        "cache": folder / "cache",
    }
    return Study(**settings | changes)


class Pushing(torch.optim.Adam):
    """Adam that carries the biases of convolutions away, which are parameters 1 and 5 of `convnet-batchnorm`."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for index in (1, 5):
                self.param_groups[0]["params"][index].add_(2.0)


def pushing() -> Contender:
    def optimizer(params, lr, steps):
        return Pushing(params, lr=lr), None

    return replace(BASELINES["adam-0.001"], name="pushing", identity="pushing", optimizer=optimizer)
