"""Meta-training: truncated back-propagation through unrolled optimizations, with validation and checkpoints."""

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import l2o_runtime
from l2o_runtime.artifact import atomic_write, read_rule, remove_leftovers, save_rule
from l2o_runtime.config import ConfigError, require, to_dict
from l2o_runtime.contexts import KAE
from l2o_runtime.rule import Rule
from l2o_runtime.scale import make_rule
from l2o_training.config import TrainConfig
from l2o_training.curriculum import VALIDATION_SEED, Lane
from l2o_training.data import load_dataset
from l2o_training.fused import fuse
from l2o_training.tasks import Task, make_task
from l2o_training.tasks.base import generator
from l2o_training.unroll import TINY, Sample, Segment, rollout, unroll

CONFIG, CHECKPOINT, METRICS = "config.json", "checkpoint.pt", "metrics.jsonl"
RULE, CURVE, LOCK = "rule.safetensors", "learning-curve.png", ".lock"


class RunError(ValueError):
    """A run's folder cannot be used as asked."""


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
    """

    epoch: int
    meta_loss: float
    koopman_loss: float | None
    validation: float | None
    best: float
    steps: int
    seconds: float


class Trainer:
    """Meta-trains one rule into one folder.

    The folder gets `config.json`, `checkpoint.pt`, `metrics.jsonl`, TensorBoard events, and at the end
    `rule.safetensors` (the rule with the lowest validation loss) and `learning-curve.png`. All randomness of an
    epoch comes from the run's seed and the epoch's number, so a resumed run continues as if never stopped, wherever
    it was killed: before its first checkpoint it starts again.

    Args:
        config: the run.
        out: its folder; made if needed.
        data_root, download: where data sets are, and whether torchvision may fetch them.
        device: "cpu" or "cuda".
        resume: continue from the folder's checkpoint.

    Raises:
        RunError: the folder has a run already, has another one than asked, or cannot be written.
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
    ):
        self.config = config
        self.out = out
        self.device = torch.device(device)
        checkpoint = _read_checkpoint(out / CHECKPOINT, self.device)
        if checkpoint is not None and not resume:
            raise RunError(f"{out} already holds a run: add --resume to continue it, or choose another --out")
        if checkpoint is None and resume and not any((out / name).is_file() for name in (LOCK, CONFIG)):
            raise RunError(f"{out} holds no run to resume: leave --resume out to start one")
        if checkpoint is not None and checkpoint["config"] != comparable(config):
            raise RunError(f"{out} was started with another configuration: see {out / CONFIG}")

        def load(name: str) -> Any:
            return load_dataset(name, data_root, download=download)

        self.tasks: list[Task] = [make_task(task, load, self.device) for task in config.tasks]
        torch.manual_seed(config.seed)
        rule = make_rule(config.trained_rule)
        self.ancestor: dict[str, Any] | None = None
        if config.start and checkpoint is None:
            self.ancestor = _inherit(rule, config.start)
        self.rule = fuse(rule.to(self.device))
        self.averaged = None
        if config.average is not None:
            self.averaged = AveragedModel(self.rule, multi_avg_fn=get_ema_multi_avg_fn(config.average))
        self.lanes = [Lane(config, self.tasks, index) for index in range(config.lanes)]
        self.optimizer = torch.optim.Adam(self.rule.parameters(), lr=config.lr)
        self.epoch, self.best, self.seconds = 0, float("inf"), 0.0
        self.best_state = self._candidate_state()
        self.history: list[dict[str, Any]] = []
        if checkpoint is not None:
            self._restore(checkpoint)

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> Path:
        """Train to the last epoch; gives the path of the rule.

        Args:
            report: called after every epoch.
        """
        from torch.utils.tensorboard import SummaryWriter

        with _own(self.out):
            with atomic_write(self.out / CONFIG) as file:
                file.write(json.dumps(to_dict(self.config), indent=2).encode())
            # Epochs past the checkpoint, which a killed run may have logged, are done and logged again.
            board = SummaryWriter(self.out / "tensorboard", purge_step=self.epoch + 1)
            with _deterministic(), board:
                if self.epoch == 0:
                    self.validate()
                    self._save()
                while self.epoch < self.config.epochs:
                    progress = self.train_epoch()
                    for key in ("meta_loss", "koopman_loss", "validation"):
                        value = getattr(progress, key)
                        if value is not None:
                            board.add_scalar(key, value, progress.epoch)
                    if progress.validation is not None:
                        board.flush()
                        self._save()
                    report(progress)
            return self._finish()

    def train_epoch(self) -> Progress:
        """One outer epoch: T steps of every lane, an outer update after every u of them."""
        config, started = self.config, time.perf_counter()
        self.rule.train()
        self._set_lr()
        losses, koopman = [], []
        for _ in range(config.horizon // config.unroll):
            self.optimizer.zero_grad()
            for lane in self.lanes:
                segment = self._truncation(lane)
                objective = segment.objective
                if isinstance(self.rule.context, KAE) and segment.features is not None:
                    koopman_loss = self.rule.context.koopman_loss(segment.features)
                    koopman.append(koopman_loss.detach())
                    objective = objective + config.koopman * koopman_loss
                (objective / config.lanes).backward()  # type: ignore[no-untyped-call]
                losses.append(segment.losses)
            self._outer_update()
        self.epoch += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        due = self.epoch % config.validate_every == 0 or self.epoch == config.epochs
        progress = Progress(
            epoch=self.epoch,
            meta_loss=float(torch.cat(losses).mean()),
            koopman_loss=float(torch.stack(koopman).mean()) if koopman else None,
            validation=self.validate() if due else None,
            best=self.best,
            steps=config.horizon * config.batch * config.lanes,
            seconds=seconds,
        )
        self._record(progress)
        return progress

    def _truncation(self, lane: Lane) -> Segment:
        """The next u steps of a lane."""
        config, inner = self.config, lane.advance(self.rule)
        sample = None
        if config.sample is not None:
            sample = Sample.draw(inner.grad, config.sample, generator(lane.seed, self.device))
        return unroll(
            self.rule,
            inner,
            config.unroll,
            config.weights,
            objective=config.objective,
            sample=sample,
            recompute=config.recompute,
        )

    def _set_lr(self) -> None:
        """lr, or what the cosine from lr to final_lr says for this epoch."""
        config = self.config
        if config.final_lr is not None:
            share = (1 + math.cos(math.pi * self.epoch / config.epochs)) / 2
            self.optimizer.param_groups[0]["lr"] = config.final_lr + share * (config.lr - config.final_lr)

    def _outer_update(self) -> None:
        """One step of the outer Adam; a meta-gradient that is not finite is dropped."""
        # Zeros would change the order in which the norm is summed; a placebo is to train like no context, to the bit.
        moved = [p for p in self.rule.parameters() if p.grad is not None and bool(p.grad.any())]
        norm = torch.nn.utils.clip_grad_norm_(moved, self.config.clip)
        if norm.isfinite():
            self.optimizer.step()
            if self.averaged is not None:
                self.averaged.update_parameters(self.rule)

    @property
    def candidate(self) -> Rule:
        """What is validated and kept: the rule, or its average."""
        return self.rule if self.averaged is None else cast(Rule, self.averaged.module)

    def _candidate_state(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.candidate.state_dict().items()}

    def validate(self) -> float:
        """Mean loss over T steps on the validation instances; the best rule so far is kept.

        The mean is geometric where logarithms of losses are meta-trained on: a hard task counts like an easy one.
        """
        rule = self.candidate.eval()
        geometric, means = self.config.objective == "log_loss", []
        for index, task in enumerate(self.tasks):
            instances = task.instances(self.config.validation_runs, VALIDATION_SEED + self.config.seed + index)
            losses = rollout(rule, instances, self.config.horizon + 1)[1:]
            means.append((losses.clamp_min(TINY).log() if geometric else losses).mean())
        mean = torch.stack(means).mean()
        score = float(mean.exp() if geometric else mean)
        if score < self.best:
            self.best = score
            self.best_state = self._candidate_state()
        return score

    def _record(self, progress: Progress) -> None:
        row = {k: v for k, v in vars(progress).items() if v is not None and k != "best"}
        self.history.append(row)

    def _save(self) -> None:
        """Metrics and checkpoint, each whole or not at all.

        The checkpoint comes last: what it says is done is on disk, and what is ahead of it is written again.
        """
        state = {
            "config": comparable(self.config),
            "epoch": self.epoch,
            "best": self.best,
            "seconds": self.seconds,
            "history": self.history,
            "rule": self.rule.state_dict(),
            "best_rule": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "lanes": [lane.state_dict() for lane in self.lanes],
            "ancestor": self.ancestor,
        }
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        with atomic_write(self.out / METRICS) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in self.history)
        with atomic_write(self.out / CHECKPOINT) as file:
            torch.save(state, file)

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.best, self.seconds = state["epoch"], state["best"], state["seconds"]
        self.history, self.best_state = state["history"], state["best_rule"]
        self.rule.load_state_dict(state["rule"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.ancestor = state.get("ancestor")
        for lane, saved in zip(self.lanes, state["lanes"], strict=True):
            lane.load_state_dict(saved, self.rule)

    def _finish(self) -> Path:
        """Write the best rule and the learning curve."""
        from l2o_training.evaluation.plots import learning_curve

        if self.best == float("inf"):
            raise RunError("no validation gave a finite loss: the rule diverges; try a smaller lr or output_scale")
        rule = make_rule(self.config.trained_rule)
        rule.load_state_dict(self.best_state)
        path = self.out / RULE
        save_rule(path, rule, self.provenance())
        with atomic_write(self.out / CURVE) as file:
            learning_curve(self.history, file)
        return path

    def provenance(self) -> dict[str, Any]:
        """What made this rule: configuration, score and versions; nothing that differs between equal runs."""
        ancestor = {"start": self.ancestor} if self.ancestor is not None else {}
        return ancestor | {
            "config": comparable(self.config),
            "tasks": [task.name for task in self.tasks],
            "inner_steps": self.epoch * self.config.horizon * self.config.batch,
            "validation": self.best,
            "git": _git_revision(),
            "versions": {
                "l2o-runtime": l2o_runtime.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }


def _inherit(rule: Rule, start: str) -> dict[str, Any]:
    """Give a rule the weights of another one.

    Returns:
        The other one's provenance.

    Raises:
        ConfigError: the other one is of another architecture.
        ArtifactError: it cannot be read.
    """
    other, provenance = read_rule(start)
    if _architecture(other) != _architecture(rule):
        raise ConfigError(
            f"start: {start} is {_architecture(other)}; this run's rule is {_architecture(rule)}: "
            "set the keys under [rule] to what `l2o inspect` shows, or leave start out"
        )
    rule.load_state_dict(other.state_dict())
    return provenance


def _architecture(rule: Rule) -> str:
    """What has to be equal for weights to fit."""
    config = rule.config
    context = json.dumps(to_dict(config.context))
    return f"{config.layers} × {config.hidden}, {config.features}, {config.output}, context {context}"


def comparable(config: TrainConfig) -> dict[str, Any]:
    """A configuration as plain data (its description aside), to be compared and kept."""
    return {key: value for key, value in to_dict(config).items() if key != "description"}


def pick_device(name: str) -> str:
    """Resolve "auto" to "cuda" where there is one.

    Raises:
        ConfigError: "cuda" was asked for and there is none.
    """
    available = torch.cuda.is_available()
    require(name != "cuda" or available, "--device cuda: no CUDA device is available here; use auto or cpu")
    return "cuda" if name != "cpu" and available else "cpu"


def _read_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load has no common base class for damage
        raise RunError(f"{path} is damaged ({type(error).__name__}): remove the folder and start again") from None
    return state


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Make the folder, hold its lock, so that two runs never write into it, and tidy up after a killed run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0):
            for name in (CONFIG, CHECKPOINT, METRICS, RULE, CURVE):
                remove_leftovers(folder / name)
            yield
    except Timeout:
        raise RunError(f"{folder} is being written by another run: wait for it, or choose another --out") from None


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _git_revision() -> str:
    """Revision of the working copy this package runs from; empty for an installed one."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
