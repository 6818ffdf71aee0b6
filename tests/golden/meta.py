"""What meta-training computes for every bundled rule: the only module here that knows the trainer's own functions."""

import copy
import hashlib
from typing import NamedTuple

import numpy as np
import torch
from golden.trajectories import Nudge, kernels
from torch import Tensor

from l2o_runtime import load_rule
from l2o_runtime.solvers import Descent
from l2o_training.config import TrainConfig
from l2o_training.fused.lstm import fuse
from l2o_training.meta.curriculum import make_curriculum
from l2o_training.meta.estimators import make_estimator
from l2o_training.meta.slots import TaskSlot
from l2o_training.tasks import ConvConfig, MLPConfig, make_task
from l2o_training.tasks.data import load_dataset

TASKS = {
    "mlp": MLPConfig(data="digits", hidden=(6,), batch_size=16),
    "convnet": ConvConfig(data="digits", channels=(4, 6), activation="gelu", norm="layer", batch_size=16),
}
UNROLL, SEGMENTS = 24, 2
"""Windows of the rules fill up in the first truncation, and are full in the second."""


class Segment(NamedTuple):
    """One truncation.

    Attributes:
        losses: (2,) mean loss over its steps, and the Koopman loss, 0 for rules without.
        grads: the meta-gradient by each weight, float64.
    """

    losses: Tensor
    grads: dict[str, Tensor]

    @property
    def digest(self) -> str:
        """Of every bit."""
        whole = torch.cat([self.losses, *self.grads.values()])
        return hashlib.sha256(whole.numpy().tobytes()).hexdigest()

    @property
    def summary(self) -> Tensor:
        """(weights, 4) the norm of the gradient by each weight, and three projections with seeded signs, float64."""
        draw, rows = np.random.RandomState(6), []
        for grad in self.grads.values():
            signs = torch.as_tensor(draw.choice([-1.0, 1.0], (3, grad.numel())))
            rows.append(torch.cat([grad.norm().reshape(1), signs @ grad]))
        return torch.stack(rows)


def segments(name: str, task: str, compiled: bool, nudge: Nudge | None = None) -> list[Segment]:
    """`SEGMENTS` truncations of truncated back-propagation, one after the other, with a rule's weights held.

    Args:
        name: of a bundled rule.
        task: key of `TASKS`.
        compiled: whether meta-training's compiled code may be used.
        nudge: changes the initial parameters.
    """
    frozen = load_rule(name)
    config = TrainConfig(
        rule=frozen.config,
        tasks=(TASKS[task],),
        horizon=UNROLL * SEGMENTS,
        unroll=UNROLL,
        batch=2,
        objective="log_loss",
        hide_loss=0.3,
    )
    with kernels(compiled):
        rule = copy.deepcopy(frozen).requires_grad_(True)
        rule.config = rule.config.unrolled
        solver = Descent(fuse(rule))
        tasks = [make_task(TASKS[task], load_dataset, torch.device("cpu"))]
        slot = TaskSlot(config, make_curriculum(config), tasks, 0)
        estimator = make_estimator(config)
        return [_segment(solver, slot, estimator, nudge if number == 0 else None) for number in range(SEGMENTS)]


def _segment(solver, slot, estimator, nudge) -> Segment:
    slot.tick()
    (inner,) = slot.begun(solver)
    if nudge is not None:
        inner.params = nudge(inner.params)
    share = estimator.share(solver, slot)
    koopman = share.terms.get("koopman_loss", torch.zeros(()))
    gradient = estimator.gradient(solver, [slot], share.message).double()
    names, params = zip(*solver.rule.named_parameters(), strict=True)
    grads = dict(zip(names, gradient.split([p.numel() for p in params]), strict=True))
    return Segment(torch.stack([share.loss.double(), koopman.double()]), grads)


def errors(found: Segment, losses: Tensor, summary: Tensor) -> Tensor:
    """Relative errors (2 + weights): of the losses; and by each weight, the largest of its summary.

    A weight's are measured by its gradient's norm, and a thousandth of the whole gradient's.

    Args:
        found: what is compared.
        losses, summary: of the segment that it is to equal.
    """
    norms = summary[:, 0]
    weights = (found.summary - summary).abs().amax(1) / (norms + 1e-3 * norms.norm())
    return torch.cat([(found.losses - losses).abs() / losses.abs().clamp_min(1e-12), weights])
