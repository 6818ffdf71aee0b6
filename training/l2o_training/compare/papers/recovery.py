"""Measurements of sparse recovery: errors over layers, iterations and seconds to an error, gaps of Lasso problems."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2o_runtime.learned_solver import LearnedSolver
from l2o_runtime.solvers import AMP, FISTA, ISTA, Point, Solver
from l2o_runtime.solvers.base import structure_of
from l2o_runtime.solvers.classical import lasso
from l2o_runtime.state import State
from l2o_training.tasks import Instances, SparseConfig, make_task
from l2o_training.tasks.data import load_dataset

TEST_SEED = 1_000_000
"""Of instances that neither meta-training nor its validation draws."""

FLOOR = 1e-10
"""Relative errors of a signal count as no less in a mean of decibels, −100 dB."""

USUAL = 0.003
"""λ at which ISTA and FISTA take about as many iterations as published."""

SINGLY = 32
"""Signals that are timed where they go one after the other."""


class Errors(NamedTuple):
    """NMSE in dB by two definitions.

    Attributes:
        ratio: 10 log₁₀(Σ‖x − x*‖² / Σ‖x*‖²), as in the papers.
        mean: the mean over signals of 10 log₁₀(‖x − x*‖²/‖x*‖²), as in Open-L2O's code.
    """

    ratio: float
    mean: float


def errors(x: Tensor, solution: Tensor) -> Errors:
    """Of x (B, n), where x* is known; a signal that is zero is left out of the mean.

    >>> found = errors(torch.tensor([[1.0, 0.1]]), torch.tensor([[1.0, 0.0]]))
    >>> round(found.ratio, 3), round(found.mean, 3)
    (-20.0, -20.0)
    """
    off, size = (value.double().square().sum(-1) for value in (x - solution, solution))
    there = size > 0
    single = (off[there] / size[there]).clamp_min(FLOOR)
    return Errors(float(10 * (off.sum() / size.sum()).log10()), float(10 * single.log10().mean()))


def draw(config: SparseConfig, count: int, seed: int = TEST_SEED) -> Instances:
    """Instances of a sparse task."""
    return make_task(config, load_dataset, torch.device("cpu")).instances(count, seed)


@torch.no_grad()
def steps_of(
    solver: Solver,
    instances: Instances,
    steps: int,
    see: Callable[[int, Tensor], bool],
    begun: State | None = None,
) -> None:
    """Show x after 1, 2, … steps, until `see` says that it has seen enough, from a state that was `begun` if given."""
    state, x = solver.init(instances) if begun is None else begun, instances.params
    nothing = torch.zeros_like(x[:, 0])
    for step in range(1, steps + 1):
        x, state = solver.step(Point(x, nothing, x), state)
        if see(step, x):
            return


def over_layers(solver: Solver, instances: Instances, layers: int) -> list[Errors]:
    """NMSE after each step."""
    found: list[Errors] = []
    structure = structure_of(instances)
    assert structure.solution is not None
    solution = structure.solution

    def see(step: int, x: Tensor) -> bool:
        found.append(errors(x, solution))
        return False

    steps_of(solver, instances, layers, see)
    return found


def steps_to(solver: Solver, instances: Instances, target: float, most: int) -> int | None:
    """Steps until the NMSE, as in the papers, is at a target in dB; None if it is not within so many."""
    found: list[int] = []
    structure = structure_of(instances)
    assert structure.solution is not None
    solution = structure.solution

    def see(step: int, x: Tensor) -> bool:
        if errors(x, solution).ratio <= target:
            found.append(step)
        return bool(found)

    steps_of(solver, instances, most, see)
    return found[0] if found else None


def fewest(
    make: Callable[[float], Solver], grid: Sequence[float], instances: Instances, target: float, most: int
) -> tuple[float, int | None]:
    """The number of a grid with which a solver takes the fewest steps to a target, and how many."""
    best: tuple[float, int | None] = (grid[0], None)
    for number in grid:
        count = steps_to(make(number), instances, target, most if best[1] is None else best[1])
        if count is not None and (best[1] is None or count < best[1]):
            best = number, count
    return best


class Iterations(NamedTuple):
    """How many to an error: the fewest, at what λ or α, and at `USUAL`."""

    fewest: int | None
    number: float
    usual: int | None


def classical_iterations(count: int = 16, target: float = -35.0) -> dict[str, Iterations]:
    """Iterations of AMP, FISTA and ISTA to −35 dB with A of 250 × 500, p = 0.1 and SNR 40."""
    instances = draw(SparseConfig(rows=250, columns=500, snr=40.0), count)
    ways: dict[str, tuple[Callable[[float], Solver], Sequence[float], int]] = {
        "AMP": (AMP, (1.0, 1.1, 1.2, 1.3, 1.4, 1.5), 200),
        "FISTA": (FISTA, (0.005, 0.002, USUAL, 0.007, 0.01, 0.02), 1000),
        "ISTA": (ISTA, (0.005, USUAL, 0.007, 0.01), 6000),
    }
    found = {}
    for name, (make, grid, most) in ways.items():
        number, steps = fewest(make, grid, instances, target, most)
        usual = steps_to(make(USUAL), instances, target, most) if USUAL in grid else None
        found[name] = Iterations(steps, number, usual)
    return found


def oracle(instances: Instances) -> Tensor:
    """f* (B,) of Lasso problems by coordinate descent."""
    structure = structure_of(instances)
    matrix, target = structure.matrix.double(), structure.target.double()
    x = _coordinate_descent(matrix, target, structure.weight, 1e-12, 1_000_000)
    return lasso(x, target, matrix, structure.weight)


def gaps(solver: Solver, instances: Instances, best: Tensor, steps: Sequence[int]) -> dict[int, float]:
    """E[f − f*] / E[f*] after so many steps each."""
    found: dict[int, float] = {}
    structure = structure_of(instances)
    matrix, target, weight = structure.matrix.double(), structure.target.double(), structure.weight

    def see(step: int, x: Tensor) -> bool:
        if step in steps:
            found[step] = float((lasso(x.double(), target, matrix, weight) - best).mean() / best.mean())
        return False

    steps_of(solver, instances, max(steps), see)
    return found


class Duration(NamedTuple):
    """Milliseconds per signal to an error, with how many steps, at what number λ."""

    milliseconds: float
    steps: int | None
    number: float | None


def durations(learned: LearnedSolver, batch: int, target: float = -30.0, repeats: int = 5) -> dict[str, Duration]:
    """Time per signal to −30 dB without noise: a learned solver, FISTA, and coordinate descent, in turns.

    λ of both classical ones is tuned for the fewest steps, and FISTA is there at `USUAL`, too. Coordinate descent takes
    one signal after the other, so that some of them are enough, and stops at the tolerance, of a grid, that just
    reaches the error.
    """
    config = SparseConfig(rows=learned.solver.config.rows, columns=learned.solver.config.columns)
    instances, tuned = draw(config, batch), draw(config, 64, TEST_SEED + 1)
    layers = steps_to(learned.solver, tuned, target, learned.layers)
    alpha, tolerance = _coordinate_descent_settings(tuned, target)
    structure, few = structure_of(instances), structure_of(instances).part(0, SINGLY)

    def descend() -> None:
        _coordinate_descent(few.matrix, few.target, alpha, tolerance)

    ways: dict[str, tuple[Callable[[], object], int | None, float | None]] = {}
    if layers is not None:
        ways["learned"] = (lambda: learned(structure.target, layers=layers), layers, None)
    for name, grid in {"FISTA": (0.005, 0.01, 0.02, 0.03, 0.05), f"FISTA, λ = {USUAL:g}": (USUAL,)}.items():
        weight, steps = fewest(FISTA, grid, tuned, target, 1000)
        if steps is not None:
            fista = FISTA(weight)
            begun = fista.init(instances)  # what belongs to A, its norm, is not timed: nor is it for what is learned
            ways[name] = (partial(steps_of, fista, instances, steps, lambda step, x: False, begun), steps, weight)
    ways["coordinate descent"] = (descend, None, alpha)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, (run, _, _) in ways.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    sizes = {"coordinate descent": min(batch, SINGLY)}
    return {
        name: Duration(1000 * best[name] / sizes.get(name, batch), count, number)
        for name, (_, count, number) in ways.items()
    }


def _coordinate_descent(matrix: Tensor, target: Tensor, weight: float, tolerance: float, most: int = 10_000) -> Tensor:
    """x (B, n) by scikit-learn's Lasso, whose α is λ/m, one signal after the other."""
    from sklearn.linear_model import Lasso

    columns = np.asfortranarray(matrix.numpy())
    model = Lasso(alpha=weight / len(columns), fit_intercept=False, tol=tolerance, max_iter=most, copy_X=False)
    return torch.from_numpy(np.stack([model.fit(columns, b).coef_.copy() for b in target.numpy()]))


def _coordinate_descent_settings(instances: Instances, target: float) -> tuple[float, float]:
    """The largest λ and tolerance of a grid that reach an error; the smallest where none does."""
    structure = structure_of(instances)
    assert structure.solution is not None
    few = structure.part(0, 16)
    for weight in (0.05, 0.03, 0.02, 0.01, 0.005):
        for tolerance in (1e-2, 1e-3, 1e-4):
            found = _coordinate_descent(few.matrix, few.target, weight, tolerance)
            if errors(found, structure.solution[:16]).ratio <= target:
                return weight, tolerance
    return 0.005, 1e-4
