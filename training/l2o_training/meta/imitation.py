"""Imitation of an expert, with hand-over: what a rule that knows nothing yet may learn from first.

At first the expert carries the optimizations and the rule is asked to say what it says; then the rule takes over. So
it comes to states that a poor rule would never reach, and long optimizations do not diverge while it learns.
"""

from typing import Any

import torch
from torch import Tensor

from l2o_runtime.files.artifact import load_rule
from l2o_runtime.solvers import Descent, Point, Problems, Solver
from l2o_runtime.state import State
from l2o_training.compare.baselines import BASELINES, Baseline

LEARNER, EXPERT, TOTAL, DISTANCE = "learner/", "expert/", "expert_total", "distance"
"""What the state is made of: that of either, the number of steps that the expert was told, and how far apart they are.
"""

TURN, STRETCH = 0.7, 0.3
"""Weights of both parts of the distance."""

TINY = 1e-12


def distance(mine: Tensor, theirs: Tensor) -> Tensor:
    """0.7 (1 − cos) + 0.3 |‖mine‖ − ‖theirs‖| / ‖theirs‖ of steps (..., n): direction and length apart.

    Source: ELO (arXiv 2607.06772), where the mean square of the difference did worse.

    >>> distance(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    tensor([1., 0.])
    """
    lengths = torch.linalg.vector_norm(mine, dim=-1), torch.linalg.vector_norm(theirs, dim=-1)
    cosine = (mine * theirs).sum(-1) / (lengths[0] * lengths[1]).clamp_min(TINY)
    stretched = (lengths[0] - lengths[1]).abs() / lengths[1].clamp_min(TINY)
    result: Tensor = TURN * (1 - cosine) + STRETCH * stretched
    return result


class Imitation(Solver):
    """θ ← θ + a Δ + (1 − a) Δ', where Δ is the learner's step and Δ' the expert's, both from the same point.

    Args:
        learner: whose parameters are trained.
        expert: a hand-made optimizer, told how long an optimization is; or a rule.
        lr: the expert's learning rate, if it is hand-made.

    Attributes:
        share: a, from 0 to 1.
    """

    def __init__(self, learner: Descent, expert: Baseline | Descent, lr: float):
        super().__init__()
        self.learner, self.lr, self.share = learner, lr, 0.0
        self._expert = (expert,)  # in a tuple, for its parameters are not to be trained

    def init(self, problems: Problems) -> State:
        """Both states, the steps there will be, and no distance yet."""
        params, total = problems.params, float(problems.steps or 0)
        state = _prefixed(LEARNER, self.learner.init(problems))
        state |= _prefixed(EXPERT, self._at(int(total)).init(problems))
        return state | {DISTANCE: params.new_zeros(len(params)), TOTAL: params.new_tensor(total)}

    def step(self, point: Point, state: State) -> tuple[Tensor, State]:
        """Both steps, and what lies between them."""
        mine, learned = self.learner.step(point, _part(LEARNER, state))
        with torch.no_grad():
            theirs, expert = self._at(int(state[TOTAL])).step(point, _part(EXPERT, state))
        before = point.params.detach()
        apart = distance(mine - point.params, theirs - before)
        # What is differentiated through came in the parameters, so the expert's step is added to it as a constant.
        after = point.params + self.share * (mine - point.params) + (1 - self.share) * (theirs - before)
        both = _prefixed(LEARNER, learned) | _prefixed(EXPERT, expert)
        return after, both | {DISTANCE: apart, TOTAL: state[TOTAL]}

    def _at(self, steps: int) -> Solver:
        (expert,) = self._expert
        return expert.solver(self.lr, max(1, steps)) if isinstance(expert, Baseline) else expert


def make_expert(name: str) -> Baseline | Descent:
    """A hand-made optimizer by its name, or a bundled rule or a file."""
    if name in BASELINES:
        BASELINES[name].require_stacks()
        return BASELINES[name]
    return Descent(load_rule(name).requires_grad_(False))


def _prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def _part(prefix: str, state: dict[str, Any]) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
