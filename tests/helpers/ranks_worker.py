"""What one rank does in test_ranks.py; started by torchrun, or called with Ranks() by the test itself."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from l2o_runtime.config import KAEConfig
from l2o_runtime.rules import NormalizedConfig
from l2o_training.config import TrainConfig
from l2o_training.meta.trainer import Trainer
from l2o_training.ranks.group import ALONE, Ranks
from l2o_training.ranks.rendezvous import join
from l2o_training.tasks import MLPConfig, QuadraticConfig

UPDATES = 3
"""A horizon has two truncations: the third update begins another optimization."""

STOP = 2
CONFIG = TrainConfig(
    rule=NormalizedConfig(hidden=3, layers=1, context=KAEConfig(window=4)),
    tasks=(QuadraticConfig(size=5), MLPConfig(hidden=(2,), norm="batch", batch_size=4)),
    **{"epochs": 4, "horizon": 10, "shortest": 5, "unroll": 5, "batch": 2, "lanes": 4},
    **{"validate_every": 1, "validation_runs": 3, "particles": 4},
)
ESTIMATORS = ("tbptt", "es", "pes", "mixed", "cem")


class Stop(Exception):
    pass


def config(estimator: str) -> TrainConfig:
    whole = {"unroll": 0, "shortest": None} if estimator == "cem" else {}
    return dataclasses.replace(CONFIG, estimator=estimator, **whole)


def gradients(folder: Path, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Meta-gradients of some updates (UPDATES, P), and a validation, by estimator; the same on all ranks."""
    found = {}
    for estimator in ESTIMATORS:
        trainer = Trainer(config(estimator), folder / "unused", ranks=ranks)
        steps = []
        for _ in range(UPDATES):
            gradient, _ = trainer.meta_gradient()
            steps.append(gradient.clone())
            trainer.learner.update(gradient)
        found[estimator] = torch.stack(steps)
        found[f"{estimator}, validation"] = torch.tensor(trainer.validate())
        if ranks.size > 1:  # on one rank all of the sum, on the others nothing: equal where the others are equal
            for tensor in (found[estimator], found[f"{estimator}, validation"]):
                own = tensor.double().flatten()
                everyones = ranks.sum(own.clone())
                torch.testing.assert_close(everyones, own * ranks.size, rtol=1e-15, atol=0)
    return found


def train(folder: Path, ranks: Ranks, stop: bool) -> None:
    """Train every estimator's rule; stop, where asked, after some epochs, or go on from there."""
    for estimator in ESTIMATORS:

        def report(progress) -> None:
            if stop and progress.epoch == STOP:
                raise Stop

        trainer = Trainer(config(estimator), folder / estimator, ranks=ranks, restarted=True)
        try:
            trainer.run(report)
        except Stop:
            trainer.checkpoints.settle(wait=True)


def main() -> None:
    torch.set_num_threads(1)
    jobs, folder = sys.argv[1].split(","), Path(sys.argv[2])
    with join(60) as ranks:
        ranks.connect(torch.device("cpu"))
        for job in jobs:
            if job == "gradients":
                found = gradients(folder, ranks)
                if ranks.main:
                    torch.save(found, folder / f"gradients-{ranks.size}.pt")
            else:
                train(folder / job.split("-")[1], ranks, stop=job.startswith("start"))
        if ranks.main:
            (folder / f"sums-{ranks.size}.json").write_text(json.dumps([ranks.sums, ranks.bytes, ranks.idle]))


if __name__ == "__main__":
    main()
    assert os.environ.get("WORLD_SIZE")
else:
    assert ALONE.size == 1
