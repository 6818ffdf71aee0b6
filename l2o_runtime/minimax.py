"""LearnedMinimax: a learned pair for min over u, max over v of f(u, v), in ordinary scripts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim.optimizer import ParamsT

from l2o_runtime.files.artifact import ArtifactError, find_rule, read_learned
from l2o_runtime.optimizer import LearnedOptimizer
from l2o_runtime.solvers import MAX, MIN, TwinSolver
from l2o_runtime.stepping.whole import listed


class LearnedMinimax:
    """Two players with frozen learned rules, who move by turns: u goes down f, then v up, from where u is now.

    It is two `LearnedOptimizer`s, `minimizer` and `maximizer`; schedulers and whatever else knows an optimizer take
    each of them.

    Args:
        min_params: u, as for any torch optimizer.
        max_params: v.
        rule: a file of kind twin, from `l2o train --preset twin`.
        lr: factor on the steps of both; 1 is what they were meta-trained with.

    Raises:
        ArtifactError: the file cannot be read, or is of another kind.
        ValueError: a parameter belongs to both.

    Source: Shen et al. 2021, "Learning A Minimax Optimizer: A Pilot Study".
    """

    def __init__(self, min_params: ParamsT, max_params: ParamsT, rule: str | Path, lr: float = 1.0):
        twin, _ = read_learned(rule)
        if not isinstance(twin, TwinSolver):
            raise ArtifactError(
                f"{find_rule(rule)}: of kind {twin.config.kind}, which has no rules for two players; expected one of "
                "kind twin, from l2o train --preset twin"
            )
        self.minimizer = LearnedOptimizer(min_params, twin.rule(MIN), lr)
        self.maximizer = LearnedOptimizer(max_params, twin.rule(MAX), lr, maximize=True)
        both = {*listed(self.minimizer.param_groups)} & {*listed(self.maximizer.param_groups)}
        if both:
            raise ValueError(f"max_params: {len(both)} of its parameters are among min_params too; players share none")

    def step(self, closure: Callable[[], Any]) -> Any:
        """An iteration: a move of u, and a move of v.

        Args:
            closure: sets gradients to zero, computes f, calls `backward` and returns f. It is called twice.

        Returns:
            f before the iteration.
        """
        before = self.minimizer.step(closure)
        self.maximizer.step(closure)
        return before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of both players."""
        self.minimizer.zero_grad(set_to_none)
        self.maximizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Of both players."""
        return {"minimizer": self.minimizer.state_dict(), "maximizer": self.maximizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.minimizer.load_state_dict(state_dict["minimizer"])
        self.maximizer.load_state_dict(state_dict["maximizer"])
