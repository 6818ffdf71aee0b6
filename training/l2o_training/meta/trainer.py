"""Meta-training: outer updates from slots of unrolled optimizations, with validation and checkpoints."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from l2o_runtime.config import require, to_dict
from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.learned import AnyConfig, Learned, make_learned
from l2o_runtime.rules import Rule
from l2o_runtime.solvers import Solver
from l2o_training.config import TrainConfig
from l2o_training.errors import RunError
from l2o_training.fused.lstm import fuse
from l2o_training.meta import checkpoints
from l2o_training.meta.checkpoints import Checkpoints
from l2o_training.meta.curriculum import Stage, make_curriculum
from l2o_training.meta.epoch import Epoch
from l2o_training.meta.estimators import make_estimator
from l2o_training.meta.folder import CONFIG, CURVE, METRICS, RULE, keep_rule, newest_checkpoint, owned
from l2o_training.meta.learner import Learner
from l2o_training.meta.provenance import comparable, describe_run, inherit
from l2o_training.meta.slots import TaskSlot
from l2o_training.meta.validation import Validation, speedup
from l2o_training.ranks.group import ALONE, Ranks
from l2o_training.tasks import make_task
from l2o_training.tasks.data import Datasets


class Trainer:
    """Meta-trains one rule, or one solver, into one folder.

    The folder gets `config.json`, `checkpoints/`, `metrics.jsonl`, TensorBoard events, and at the end
    `rule.safetensors` (the rule with the lowest validation loss) and `learning-curve.png`. All randomness of an
    epoch comes from the run's seed and the epoch's number, so a resumed run continues as if never stopped, wherever
    it was killed: before its first checkpoint it starts again.

    Of several ranks, each advances every size-th task slot. All make the same outer updates; rank 0 writes the folder.

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
        self.judges = judges or self.tasks
        torch.manual_seed(config.seed)
        learned = make_learned(cast(AnyConfig, config.trained_rule.unrolled)).to(self.device).float()
        if isinstance(learned, Solver):
            learned.fit(self.tasks[0].instances(learned.queries, config.seed))
        self.ancestor: dict[str, Any] | None = None
        if config.start and checkpoint is None:
            self.ancestor = inherit(learned, config.start)
        self.estimator, self.curriculum = make_estimator(config), make_curriculum(config)
        self.learner = Learner(config, fuse(learned) if isinstance(learned, Rule) else learned, self.curriculum.stage)
        self.validation = self._validation()
        self.slots = [
            TaskSlot(config, self.curriculum, self.tasks, index, self.estimator.copies) for index in range(config.lanes)
        ]
        self.mine = self.slots[ranks.rank :: ranks.size]
        self.epoch, self.best, self.best_epoch, self.seconds = 0, float("inf"), 0, 0.0
        self.best_state = self.learner.candidate_state()
        self.adam: dict[str, Any] | None = None
        self.speedup: float | None = None
        self.history: list[dict[str, Any]] = []
        self.checkpoints = Checkpoints(out, ranks)
        self.restored = checkpoint is not None
        if checkpoint is not None:
            self._restore(checkpoint)

    @property
    def rule(self) -> Learned:
        """What is trained."""
        return self.learner.rule

    def run(
        self, report: Callable[[Epoch], None] = lambda epoch: None, over: Callable[[], bool] = lambda: False
    ) -> Path:
        """Train to the last epoch; gives the path of the rule.

        Args:
            report: called after every epoch.
            over: asked on rank 0 before every epoch: whether to stop where it is.
        """
        with ExitStack() as stack:
            self.ranks.agree(lambda: self._take(stack) if self.ranks.main else None)
            board = self._open() if self.ranks.main else None
            stack.enter_context(_deterministic())
            if board is not None:
                stack.enter_context(board)
            if self.adam is None:
                self.adam = self.validation.beside()
            if not self.restored:
                self._require_finite(self.validate(), self.adam["loss"])
                self._save()
            while not self.over and not self._told(over):
                epoch = self.train_epoch()
                if board is not None:
                    for key, value in epoch.scalars().items():
                        board.add_scalar(key, value, epoch.epoch)
                self.checkpoints.settle()
                if epoch.validation is not None:
                    if board is not None:
                        board.flush()
                    self._save()
                report(epoch)
            if not self.over and self.epoch % self.config.validate_every:
                self.validate()
                self._save()
            self.checkpoints.settle(wait=True)
            return self.ranks.agree(self._finish)

    @property
    def over(self) -> bool:
        """Whether all epochs are done, or the curriculum's last stage is."""
        return self.epoch >= self.config.epochs or self.curriculum.over

    def _told(self, over: Callable[[], bool]) -> bool:
        """What rank 0 says."""
        return over() if self.ranks.size == 1 else bool(self.ranks.exchange("over" if over() else "")[0])

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

    def train_epoch(self) -> Epoch:
        """One outer epoch: T steps in every slot, an outer update after every u of them."""
        config, started, idle = self.config, time.perf_counter(), self.ranks.idle
        share, horizon = config.share(self.epoch, self.curriculum.stage.number), self.curriculum.stage.horizon
        self.learner.set_lr(self.epoch)
        self.learner.hand_over(share)
        self.estimator.hand_over(share)
        updates, taken = horizon // config.unroll if config.unroll else self.curriculum.stage.updates, 0
        record = torch.zeros(1 + len(self.names), dtype=torch.float64, device=self.device)
        for _ in range(updates):
            gradient, seen = self.meta_gradient()
            taken += self.learner.update(gradient)
            record += seen
        self.epoch += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        waited = self.ranks.idle - idle
        due = self.epoch % config.validate_every == 0 or self.epoch == config.epochs
        loss, *terms = (value / (updates * config.lanes) for value in record.tolist())
        validation = self.validate() if due else None
        stage = None if validation is None else self.curriculum.advance(validation)
        epoch = Epoch(
            epoch=self.epoch,
            meta_loss=loss,
            objectives=dict(zip(self.names, terms, strict=True)),
            validation=validation,
            best=self.best,
            speedup=None if validation is None else self.speedup,
            steps=updates * (config.unroll or horizon) * config.batch * config.lanes,
            seconds=seconds,
            idle=self.ranks.gather(waited, self.device) if self.ranks.size > 1 else None,
            dropped=updates - taken or None,
            stage=None if stage is None else stage.name,
        )
        self.history.append(epoch.row())
        if stage is not None:
            self._begin(stage)
        return epoch

    def _begin(self, stage: Stage) -> None:
        """Go on in a stage of the curriculum, from the best rule so far; what was best is measured anew."""
        self.learner.go_on_from(self.best_state)
        self.learner.begin(stage)
        for slot in self.slots:
            slot.abandon()
        before, self.validation, self.best = self.validation, self._validation(), float("inf")
        if self.validation.horizon != before.horizon:
            self.adam = self.validation.beside()
        self.validate()

    def _validation(self) -> Validation:
        """As long as the present stage has it."""
        return Validation(self.config, self.curriculum.stage.validated, self.judges, self.ranks, self.device)

    @property
    def names(self) -> list[str]:
        """Of the objectives that are recorded."""
        return [objective.name for objective in self.estimator.objectives if objective.name]

    def meta_gradient(self) -> tuple[Tensor, Tensor]:
        """Advance all slots by a truncation; the episode of one whose losses are not finite ends with it.

        Returns:
            The meta-gradient (P,), the same on every rank. For the record, sums over slots: of mean losses, and of what
            objectives say, in the order of `names`.
        """
        for slot in self.slots:
            slot.tick()
        solver, names = self.learner.solver, self.names
        self.estimator.count(solver, self.slots)
        numbers = torch.zeros(1 + len(names) + len(self.slots), dtype=torch.float64, device=self.device)
        record, failed = numbers.split([1 + len(names), len(self.slots)])
        message: Tensor | None = None
        for slot in self.mine:
            share = self.estimator.share(solver, slot)
            message = share.message if message is None else message + share.message
            record += torch.stack([share.loss, *(share.terms[name] for name in names)])
            failed[slot.index] = ~share.loss.isfinite()
        if message is None:
            message = numbers.new_zeros(self.estimator.width(solver))
        if self.ranks.size > 1:
            total = self.ranks.sum(torch.cat([message.double(), numbers]))
            message, record, failed = total.split([len(message), len(record), len(failed)])
        gradient = self.estimator.gradient(solver, self.slots, message)
        for index in failed.nonzero().flatten().tolist():
            self.slots[index].abandon()
        return gradient, record

    def validate(self) -> float:
        """Score of the candidate on the validation's instances; the best rule so far is kept."""
        losses = self.validation.losses(self.learner.judged())
        score, adam = self.validation.score(losses), self.adam or {}
        followed = "ends" in adam and losses.shape[-1] > 1
        self.speedup = speedup(losses[:, 0], torch.tensor(adam["ends"])) if followed else None
        if score < self.best:
            self.best, self.best_epoch = score, self.epoch
            self.best_state = self.learner.candidate_state()
        return score

    def _save(self) -> None:
        """Metrics and checkpoint, each whole or not at all.

        The checkpoint comes last: what it says is done is on disk, and what is ahead of it is written again.
        """
        state: dict[str, Any] = {"lane": {slot.index: slot.state_dict() for slot in self.mine}}
        if self.ranks.main:
            state |= self.learner.state_dict() | {"best": self.best_state}
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
            "lanes": [slot.position() for slot in self.slots],
            "ancestor": self.ancestor,
        }
        self.checkpoints.save(self.epoch, self.best_epoch, state, info)

    def _restore(self, path: Path) -> None:
        indices = {f"{slot.index}" for slot in self.mine}

        def wanted(key: str) -> bool:
            kind, index, *_ = key.split("/")
            return kind != "lane" or index in indices

        state, info = checkpoints.read(path, wanted)
        try:
            self.epoch, self.best, self.seconds = info["epoch"], info["best"], info["seconds"]
            self.best_epoch, self.history = info["best_epoch"], info["history"]
            for row in self.history:
                if "validation" in row:
                    self.curriculum.advance(row["validation"])
            if self.curriculum.stage != self.learner.stage:
                self.learner.begin(self.curriculum.stage)
                self.validation = self._validation()
            self.learner.load_state_dict(state)
            self.best_state = {key: value.to(self.device) for key, value in state["best"].items()}
            self.ancestor, self.adam = info["ancestor"], info.get("adam")
            for slot, position in zip(self.slots, info["lanes"], strict=True):
                slot.go_to(position)
            for slot in self.mine:
                slot.load_state_dict(state.get("lane", {}).get(f"{slot.index}", {}), self.learner.solver)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"{path} is damaged ({type(error).__name__}: {error}): remove it and resume") from None
        self.estimator.restore(self.learner.solver, self.slots)

    def _finish(self) -> Path:
        """Write the best rule and the learning curve."""
        from l2o_training.plots import learning_curve

        self._require_finite(self.best)
        path = self.out / RULE
        if not self.ranks.main:
            return path
        rule = make_learned(self.config.trained_rule)
        rule.load_state_dict(self.best_state)
        tasks, inner = [task.name for task in self.tasks], sum(row["steps"] for row in self.history)
        adam = None if self.adam is None else {key: value for key, value in self.adam.items() if key != "ends"}
        keep_rule(path, rule, describe_run(self.config, tasks, inner, self.best, adam, self.ancestor))
        with atomic_write(self.out / CURVE) as file:
            learning_curve(self.history, file, self.adam)
        return path

    @staticmethod
    def _require_finite(*losses: float | None) -> None:
        """Is one of them? A rule may begin with none, where Adam shows that there is one.

        Raises:
            RunError: none is.
        """
        if not any(loss is not None and isfinite(loss) for loss in losses):
            raise RunError(
                "no validation gave a finite loss: the rule diverges, or the task does whatever the rule; "
                "try a smaller lr or output_scale"
            )


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
