"""The outer problem: what is trained, its optimizer, and the average of its weights."""

import copy
import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from l2o_runtime.config import require
from l2o_runtime.learned import Learned, as_solver
from l2o_runtime.rules import Rule
from l2o_runtime.solvers import Descent, Solver
from l2o_training.compare.baselines import cosine
from l2o_training.config import TrainConfig
from l2o_training.meta.curriculum import Stage
from l2o_training.meta.estimators.base import trained
from l2o_training.meta.imitation import Imitation, make_expert
from l2o_training.meta.partial import PartialUpdates


class Learner:
    """Makes the outer updates.

    Args:
        config: the run.
        rule: being trained, or a solver that is no rule's.
        stage: that the run begins with, or goes on with.

    Attributes:
        solver: what is unrolled.
        candidate: what is validated and kept: the rule, or the average of its weights.
    """

    def __init__(self, config: TrainConfig, rule: Learned, stage: Stage):
        self.config, self.rule, self.stage = config, rule, stage
        self.solver: Solver = as_solver(rule)
        if config.partial is not None and isinstance(rule, Rule):
            self.solver = PartialUpdates(rule, config.partial)
        if config.expert:
            assert isinstance(self.solver, Descent)  # as the configuration says
            self.solver = Imitation(self.solver, make_expert(config.expert), config.expert_lr)
        self.averaged = None
        if config.average is not None:
            self.averaged = AveragedModel(rule, multi_avg_fn=get_ema_multi_avg_fn(config.average))
        self.candidate = rule if self.averaged is None else cast(Learned, self.averaged.module)
        self.begin(stage)

    def begin(self, stage: Stage) -> None:
        """Train what a stage trains, with an optimizer that remembers nothing."""
        if stage.horizon > self.stage.horizon:
            self.solver.grow(stage.horizon)
        self.stage, config = stage, self.config
        for name, p in self.rule.named_parameters():
            p.requires_grad_(all(not ends or name.endswith(ends) for ends in (config.trained, stage.trained)))
        names = ", ".join(name for name, _ in self.rule.named_parameters())
        require(bool(trained(self.solver)), f"trained: no parameter ends with {', '.join(config.trained)}: {names}")
        made = torch.optim.SGD if config.estimator == "cem" else torch.optim.Adam
        # Not fused it takes as long as a solver's layers, whose weights are many.
        self.optimizer: torch.optim.Optimizer = made(trained(self.solver), lr=stage.lr * config.lr, fused=True)

    def go_on_from(self, weights: dict[str, Tensor]) -> None:
        """Take over weights, as `candidate_state` gave them; an average begins anew with them."""
        self.rule.load_state_dict(weights)
        if self.averaged is not None:
            self.averaged.module.load_state_dict(weights)
            self.averaged.n_averaged.zero_()

    def hand_over(self, share: float) -> None:
        """Let the rule carry this share of every step, where there is an expert."""
        if isinstance(self.solver, Imitation):
            self.solver.share = share

    def set_lr(self, epoch: int) -> None:
        """lr, or what the cosine from lr to final_lr says after so many epochs."""
        config = self.config
        if config.final_lr is not None:
            fallen = config.lr - config.final_lr
            lr = config.final_lr + cosine(epoch, config.epochs) * fallen
            self.optimizer.param_groups[0]["lr"] = self.stage.lr * lr

    def update(self, gradient: Tensor) -> bool:
        """One outer step along a meta-gradient (P,); none if it is not finite. Whether it was taken."""
        params = trained(self.solver)
        for p, part in zip(params, gradient.split([p.numel() for p in params]), strict=True):
            p.grad = part.to(p.dtype).view_as(p)
        # Zeros would change the order in which the norm is summed; a placebo is to train like no context, to the bit.
        moved = [p for p in params if p.grad is not None and bool(torch.linalg.vector_norm(p.grad) != 0)]
        # A plain step along what CEM gives ends at a mean of perturbations: shorter ones end nowhere.
        bound = math.inf if self.config.estimator == "cem" else self.config.clip
        norm = torch.nn.utils.clip_grad_norm_(moved, bound)
        if not norm.isfinite():
            return False
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.rule)
        return True

    def judged(self) -> Solver:
        """The candidate as it will be used: its clocks stop where its configuration says so."""
        rule = copy.deepcopy(self.candidate)
        rule.config = self.config.trained_rule
        return as_solver(rule)

    def candidate_state(self) -> dict[str, Tensor]:
        """A copy of the candidate's weights."""
        return {key: value.clone() for key, value in self.candidate.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, their average if there is one, and the state of the optimizer, as nested tensors."""
        state = {"rule": self.rule.state_dict(), "adam": self.optimizer.state_dict()["state"]}
        return state if self.averaged is None else state | {"averaged": dict(self.averaged.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, read from a file."""
        self.rule.load_state_dict(state["rule"])
        adam = {int(index): values for index, values in state.get("adam", {}).items()}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": adam})
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
