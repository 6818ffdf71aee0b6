"""Meta-training: outer updates from lanes of unrolled optimizations, with validation and checkpoints."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from l2o_runtime.config import require, to_dict
from l2o_runtime.files.artifact import ArtifactError, read_rule, save_rule
from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.rules import Rule, make_rule
from l2o_training.config import TrainConfig
from l2o_training.errors import RunError
from l2o_training.fused.lstm import fuse
from l2o_training.meta import checkpoints
from l2o_training.meta.checkpoints import Checkpoints
from l2o_training.meta.curriculum import Lane
from l2o_training.meta.estimators import make_estimator
from l2o_training.meta.folder import CONFIG, CURVE, METRICS, RULE, newest_checkpoint, owned
from l2o_training.meta.provenance import comparable, git_revision, inherit, kept_config, versions
from l2o_training.meta.validation import Validation
from l2o_training.ranks.group import ALONE, Ranks
from l2o_training.tasks import make_task
from l2o_training.tasks.data import Datasets


@dataclass(frozen=True)
class Progress:
    """What an epoch reports.

    Attributes:
        epoch: number of epochs done.
        meta_loss: mean loss over steps and instances of this epoch.
        koopman_loss: mean Koopman loss of this epoch, None without a KAE.
        validation: mean loss over fresh instances, None when this epoch had no validation.
        best: lowest validation so far.
        steps: inner steps (of one instance) in this epoch.
        seconds: time this epoch took, validation aside.
        idle: seconds of it that each rank waited for the others, sums included; None for a process that is alone.
        dropped: outer updates that were left out, for their meta-gradient was not finite; None where none was.
    """

    epoch: int
    meta_loss: float
    koopman_loss: float | None
    validation: float | None
    best: float
    steps: int
    seconds: float
    idle: list[float] | None = None
    dropped: int | None = None


class Trainer:
    """Meta-trains one rule into one folder.

    The folder gets `config.json`, `checkpoints/`, `metrics.jsonl`, TensorBoard events, and at the end
    `rule.safetensors` (the rule with the lowest validation loss) and `learning-curve.png`. All randomness of an
    epoch comes from the run's seed and the epoch's number, so a resumed run continues as if never stopped, wherever
    it was killed: before its first checkpoint it starts again.

    Of several ranks, each advances every size-th lane, and all make the same outer updates; rank 0 writes the folder.

    Args:
        config: the run.
        out: its folder; made if needed.
        data_root, download: where data sets are, and whether torchvision may fetch them.
        device: "cpu" or "cuda".
        resume: continue from the folder's checkpoint.
        ranks: who trains together.
        restarted: continue if there is something to continue from, else begin.

    Raises:
        RunError: the folder has a run already, has another one than asked, or cannot be written.
        ConfigError: there are more ranks than lanes.
        DataError: a task's data is missing.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        *,
        data_root: Path = Path("data"),
        download: bool = False,
        device: str = "cpu",
        resume: bool = False,
        ranks: Ranks = ALONE,
        restarted: bool = False,
    ):
        self.config = config
        self.out = out
        self.ranks = ranks
        self.device = torch.device(device)
        enough = config.lanes >= ranks.size
        require(enough, f"lanes: {config.lanes} are too few for {ranks.size} ranks, which advance one or more each")
        self.found = checkpoints.find(out)
        checkpoint = newest_checkpoint(out, config, resume, restarted)

        load = Datasets(data_root, download=download)
        self.tasks, judges = (
            [make_task(task, load, self.device) for task in tasks] for tasks in (config.tasks, config.validation_tasks)
        )
        self.validation = Validation(config, judges or self.tasks, ranks, self.device)
        torch.manual_seed(config.seed)
        rule = make_rule(config.trained_rule.unrolled)
        self.ancestor: dict[str, Any] | None = None
        if config.start and checkpoint is None:
            self.ancestor = inherit(rule, config.start)
        self.rule = fuse(rule.to(self.device))
        self.averaged = None
        if config.average is not None:
            self.averaged = AveragedModel(self.rule, multi_avg_fn=get_ema_multi_avg_fn(config.average))
        self.estimator = make_estimator(config)
        self.lanes = [Lane(config, self.tasks, index, self.estimator.copies) for index in range(config.lanes)]
        self.mine = self.lanes[ranks.rank :: ranks.size]
        self.optimizer = torch.optim.Adam(self.rule.parameters(), lr=config.lr)
        self.epoch, self.best, self.best_epoch, self.seconds = 0, float("inf"), 0, 0.0
        self.best_state = self._candidate_state()
        self.adam: dict[str, float | None] | None = None
        self.history: list[dict[str, Any]] = []
        self.checkpoints = Checkpoints(out, ranks)
        self.restored = checkpoint is not None
        if checkpoint is not None:
            self._restore(checkpoint)

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> Path:
        """Train to the last epoch; gives the path of the rule.

        Args:
            report: called after every epoch.
        """
        with ExitStack() as stack:
            self.ranks.agree(lambda: self._take(stack) if self.ranks.main else None)
            board = self._open() if self.ranks.main else None
            stack.enter_context(_deterministic())
            if board is not None:
                stack.enter_context(board)
            if self.adam is None:
                self.adam = self.validation.adam()
            if not self.restored:
                self.validate()
                self._save()
            while self.epoch < self.config.epochs:
                progress = self.train_epoch()
                if board is not None:
                    for key in ("meta_loss", "koopman_loss", "validation"):
                        value = getattr(progress, key)
                        if value is not None:
                            board.add_scalar(key, value, progress.epoch)
                self.checkpoints.settle()
                if progress.validation is not None:
                    if board is not None:
                        board.flush()
                    self._save()
                report(progress)
            self.checkpoints.settle(wait=True)
            return self.ranks.agree(self._finish)

    def _take(self, stack: ExitStack) -> None:
        """Lock the folder, in which nothing may have happened since it was looked at."""
        stack.enter_context(owned(self.out))
        if checkpoints.find(self.out) != self.found:
            raise RunError(f"{self.out} was written by another run just now: start again, with --resume")

    def _open(self) -> Any:
        """Write the configuration and begin to log."""
        from torch.utils.tensorboard import SummaryWriter

        self.checkpoints.tidy(self.epoch, self.best_epoch)
        with atomic_write(self.out / CONFIG) as file:
            file.write(json.dumps(to_dict(self.config), indent=2).encode())
        # Epochs past the checkpoint, which a killed run may have logged, are done and logged again.
        return SummaryWriter(self.out / "tensorboard", purge_step=self.epoch + 1)  # type: ignore[no-untyped-call]

    def train_epoch(self) -> Progress:
        """One outer epoch: T steps of every lane, an outer update after every u of them."""
        config, started, idle = self.config, time.perf_counter(), self.ranks.idle
        self._set_lr()
        updates = config.horizon // config.unroll
        record = torch.zeros(3, dtype=torch.float64, device=self.device)
        taken = 0
        for _ in range(updates):
            gradient, seen = self.meta_gradient()
            taken += self._outer_update(gradient)
            record += seen
        self.epoch += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        waited = self.ranks.idle - idle
        due = self.epoch % config.validate_every == 0 or self.epoch == config.epochs
        loss, koopman, count = record.tolist()
        progress = Progress(
            epoch=self.epoch,
            meta_loss=loss / (updates * config.lanes),
            koopman_loss=koopman / count if count else None,
            validation=self.validate() if due else None,
            best=self.best,
            steps=config.horizon * config.batch * config.lanes,
            seconds=seconds,
            idle=self.ranks.gather(waited, self.device) if self.ranks.size > 1 else None,
            dropped=updates - taken or None,
        )
        self._record(progress)
        return progress

    def meta_gradient(self) -> tuple[Tensor, Tensor]:
        """Advance all lanes by a truncation; the episode of a lane whose losses are not finite ends with it.

        Returns:
            The meta-gradient (P,) in float64, the same on every rank, and three numbers for the record: sums over lanes
            of mean losses and Koopman losses, and how many of the latter there were.
        """
        for lane in self.lanes:
            lane.tick()
        self.estimator.count(self.rule, self.lanes)
        width = self.estimator.width(self.rule)
        total = torch.zeros(width + 3 + len(self.lanes), dtype=torch.float64, device=self.device)
        for lane in self.mine:
            share = self.estimator.share(self.rule, lane)
            total[:width] += share.message
            total[width] += share.loss
            if share.koopman is not None:
                total[width + 1] += share.koopman
                total[width + 2] += 1
            total[width + 3 + lane.index] = ~share.loss.isfinite()
        message, record, failed = self.ranks.sum(total).split([width, 3, len(self.lanes)])
        gradient = self.estimator.gradient(self.rule, self.lanes, message)
        for index in failed.nonzero().flatten().tolist():
            self.lanes[index].abandon()
        return gradient, record

    def _set_lr(self) -> None:
        """lr, or what the cosine from lr to final_lr says for this epoch."""
        config = self.config
        if config.final_lr is not None:
            share = (1 + math.cos(math.pi * self.epoch / config.epochs)) / 2
            self.optimizer.param_groups[0]["lr"] = config.final_lr + share * (config.lr - config.final_lr)

    def _outer_update(self, gradient: Tensor) -> bool:
        """One step of the outer Adam, or none if the meta-gradient is not finite; whether it was taken."""
        params = list(self.rule.parameters())
        for p, part in zip(params, gradient.split([p.numel() for p in params]), strict=True):
            p.grad = part.to(p.dtype).view_as(p)
        # Zeros would change the order in which the norm is summed; a placebo is to train like no context, to the bit.
        moved = [p for p in params if p.grad is not None and bool(p.grad.any())]
        norm = torch.nn.utils.clip_grad_norm_(moved, self.config.clip)
        if not norm.isfinite():
            return False
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.rule)
        return True

    @property
    def candidate(self) -> Rule:
        """What is validated and kept: the rule, or its average."""
        return self.rule if self.averaged is None else cast(Rule, self.averaged.module)

    def _candidate_state(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.candidate.state_dict().items()}

    def validate(self) -> float:
        """Score of the candidate on the validation's instances; the best rule so far is kept."""
        rule = copy.deepcopy(self.candidate)
        rule.config = self.config.trained_rule
        score = self.validation.score(rule)
        if score < self.best:
            self.best, self.best_epoch = score, self.epoch
            self.best_state = self._candidate_state()
        return score

    def _record(self, progress: Progress) -> None:
        row = {k: v for k, v in vars(progress).items() if v is not None and k != "best"}
        self.history.append(row)

    def _save(self) -> None:
        """Metrics and checkpoint, each whole or not at all.

        The checkpoint comes last: what it says is done is on disk, and what is ahead of it is written again.
        """
        state: dict[str, Any] = {"lane": {lane.index: lane.state_dict() for lane in self.mine}}
        if self.ranks.main:
            adam = self.optimizer.state_dict()["state"]
            state |= {"rule": self.rule.state_dict(), "best": self.best_state, "adam": adam}
            if self.averaged is not None:
                state["averaged"] = dict(self.averaged.state_dict())
            with atomic_write(self.out / METRICS) as file:
                file.writelines(json.dumps(row).encode() + b"\n" for row in self.history)
        info = {
            "config": comparable(self.config),
            "epoch": self.epoch,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "adam": self.adam,
            "seconds": self.seconds,
            "history": self.history,
            "lanes": [lane.position() for lane in self.lanes],
            "ancestor": self.ancestor,
        }
        self.checkpoints.save(self.epoch, self.best_epoch, state, info)

    def _restore(self, path: Path) -> None:
        indices = {f"{lane.index}" for lane in self.mine}

        def wanted(key: str) -> bool:
            kind, index, *_ = key.split("/")
            return kind != "lane" or index in indices

        state, info = checkpoints.read(path, wanted)
        try:
            self.epoch, self.best, self.seconds = info["epoch"], info["best"], info["seconds"]
            self.best_epoch, self.history = info["best_epoch"], info["history"]
            self.rule.load_state_dict(state["rule"])
            self.best_state = {key: value.to(self.device) for key, value in state["best"].items()}
            adam = {int(index): values for index, values in state.get("adam", {}).items()}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": adam})
            if self.averaged is not None:
                self.averaged.load_state_dict(state["averaged"])
            self.ancestor, self.adam = info["ancestor"], info.get("adam")
            for lane, position in zip(self.lanes, info["lanes"], strict=True):
                lane.go_to(position)
            for lane in self.mine:
                lane.load_state_dict(state.get("lane", {}).get(f"{lane.index}", {}), self.rule)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"{path} is damaged ({type(error).__name__}: {error}): remove it and resume") from None
        self.estimator.restore(self.rule, self.lanes)

    def _finish(self) -> Path:
        """Write the best rule and the learning curve."""
        from l2o_training.evaluation.plots import learning_curve

        if self.best == float("inf"):
            raise RunError("no validation gave a finite loss: the rule diverges; try a smaller lr or output_scale")
        path = self.out / RULE
        if not self.ranks.main:
            return path
        rule = make_rule(self.config.trained_rule)
        rule.load_state_dict(self.best_state)
        if not self._holds(path, rule):  # a rule that is there keeps the versions that it was made with
            save_rule(path, rule, self.provenance())
        with atomic_write(self.out / CURVE) as file:
            learning_curve(self.history, file, self.adam)
        return path

    def _holds(self, path: Path, rule: Rule) -> bool:
        """Whether a file has this very rule, from this very configuration: not from a run of fewer epochs."""
        try:
            found, provenance = read_rule(path)
        except ArtifactError:
            return False
        weights, other = rule.state_dict(), found.state_dict()
        same = found.config == rule.config and all(torch.equal(weights[key], value) for key, value in other.items())
        return same and kept_config(provenance.get("config")) == kept_config(comparable(self.config))

    def provenance(self) -> dict[str, Any]:
        """What made this rule: configuration, score and versions; nothing that differs between equal runs."""
        ancestor = {"start": self.ancestor} if self.ancestor is not None else {}
        return ancestor | {
            "config": comparable(self.config),
            "tasks": [task.name for task in self.tasks],
            "inner_steps": self.epoch * self.config.horizon * self.config.batch * self.config.lanes,
            "validation": self.best,
            "adam": self.adam,
            "git": git_revision(),
            "versions": versions(),
        }


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
