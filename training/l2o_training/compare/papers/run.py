"""Do what is missing of a plan: meta-train, resume, evaluate; several processes share the work."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from l2o_runtime.config import ConfigError, build, nearest, require
from l2o_runtime.files.artifact import read_learned, read_rule, save_rule
from l2o_runtime.learned import make_learned
from l2o_training.compare.papers.lab import Lab
from l2o_training.compare.papers.plans import Experiment, Plan, never_sees_context
from l2o_training.compare.papers.variants import Variant
from l2o_training.compare.run import measure
from l2o_training.compare.sharing import POLL, Busy, Job, Report, share
from l2o_training.config import TrainConfig
from l2o_training.errors import RunError
from l2o_training.meta import checkpoints
from l2o_training.meta.epoch import Epoch
from l2o_training.meta.folder import CONFIG, LOCK, RULE
from l2o_training.meta.provenance import comparable
from l2o_training.meta.trainer import Trainer

CONTEXT_WEIGHTS = "cell.weight_context"


def reproduce(
    plan: Plan,
    lab: Lab,
    *,
    only: Iterable[str] = (),
    train_only: bool = False,
    report: Report = lambda what, detail, done, total: None,
    poll: float = POLL,
) -> None:
    """Train what is missing of a plan and measure it.

    Args:
        plan: what to do.
        lab: where.
        only: names of variants; the others are left as they are.
        train_only: measure nothing.
        report: called as the work goes on.
        poll: seconds between looks at what other processes do.

    Raises:
        ConfigError: an unknown variant, or a configuration that is not valid.
        DataError: data is missing.
        RunError: a run's folder cannot be used.
    """
    experiments = select(plan, list(only))
    for job in (job for experiment in plan.experiments for job in training_jobs(lab, experiment)):
        job.done()  # a page must not mix configurations: refuse those of another before anything is done
    trainings = [job for experiment in experiments for job in training_jobs(lab, experiment)]
    if not train_only:
        for task in {task for experiment in experiments for task in experiment.tasks}:
            lab.workload(task).prepare()  # missing data is told before hours of training, not after
    share(trainings, report, poll)
    if not train_only:
        for experiment in experiments:
            measure(lab.study(experiment), report, poll=poll)


def select(plan: Plan, only: list[str]) -> list[Experiment]:
    """The plan's experiments with the variants named in `only`, and their placebos; all if it is empty.

    Raises:
        ConfigError: an unknown variant.
    """
    names = [variant.name for experiment in plan.experiments for variant in experiment.variants]
    for name in only:
        require(name in names, f"--only {name}: {nearest(name, names) if names else 'this plan trains nothing'}")
    if not only:
        return list(plan.experiments)
    wanted = {*only, *(v.placebo for experiment in plan.experiments for v in experiment.variants if v.name in only)}
    chosen = [(each, tuple(v for v in each.variants if v.name in wanted)) for each in plan.experiments]
    return [replace(each, variants=variants) for each, variants in chosen if variants]


def training_jobs(lab: Lab, experiment: Experiment) -> list[Job]:
    """One job per variant and seed, all seeds of a variant's first, placebos before what is compared with them."""
    return [_training(lab, experiment, v, seed) for seed in range(experiment.seeds) for v in experiment.variants]


def _training(lab: Lab, experiment: Experiment, variant: Variant, seed: int) -> Job:
    config, folder = variant.config(seed, lab.changes), lab.folder(variant, seed)
    if variant.placebo and never_sees_context(config):
        placebo = lab.folder(experiment.variant(variant.placebo), seed) / RULE

        def derive(report: Report) -> None:
            if not placebo.is_file():
                raise Busy
            save_derived(placebo, config, folder / RULE)

        return Job(folder.name, folder, lambda: is_trained(folder, config) and is_derived(folder, placebo), derive)
    return Job(
        folder.name, folder, lambda: is_trained(folder, config), lambda report: train(lab, config, folder, report)
    )


def train(lab: Lab, config: TrainConfig, folder: Path, report: Report) -> None:
    """Start or resume a run, as `l2o train` does.

    Raises:
        Busy: an `l2o train` is at it.
        RunError: the folder cannot be used.
    """
    resume = any((folder / name).is_file() for name in (LOCK, CONFIG)) or bool(checkpoints.find(folder))

    def tell(epoch: Epoch) -> None:
        detail = f"meta-loss {epoch.meta_loss:.4f}  best {epoch.best:.4f}  {epoch.steps / epoch.seconds:.0f} steps/s"
        report(f"meta-training {folder.name}", detail, epoch.epoch, config.epochs)

    try:
        Trainer(config, folder, data_root=lab.data_root, download=lab.download, resume=resume).run(tell)
    except RunError:
        if is_held(folder):
            raise Busy from None
        raise


def is_held(folder: Path) -> bool:
    """Whether an `l2o train` is writing into the folder."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def is_trained(folder: Path, config: TrainConfig) -> bool:
    """Whether the folder holds the finished rule of this configuration.

    Raises:
        RunError: it holds one of another configuration.
    """
    path = folder / RULE
    if not path.is_file():
        return False
    provenance = read_learned(path)[1]
    try:  # keys that have been added since have their defaults in it
        same = comparable(build(TrainConfig, provenance.get("config", {}))) == comparable(config)
    except ConfigError:
        same = False
    if not same:
        raise RunError(f"{path} was trained with another configuration: remove {folder}, or choose another --runs-dir")
    return True


def save_derived(placebo: Path, config: TrainConfig, path: Path) -> None:
    """Write the rule that meta-training would give whose context is zero throughout.

    Its context weights get no gradient and stay as they were drawn; all others are those of the run without context,
    since what a seed draws first is the same for both.

    Args:
        placebo: the rule that was trained without context, with the same seed and settings.
        config: of the rule to write.
        path: where to.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        rule = make_learned(config.trained_rule)
    source, provenance = read_rule(placebo)
    weights, drawn = source.state_dict(), rule.state_dict()[CONTEXT_WEIGHTS]
    trained = drawn.shape[1] - config.rule.context.width  # columns that see progress
    weights[CONTEXT_WEIGHTS] = torch.cat([weights[CONTEXT_WEIGHTS][:, :trained], drawn[:, trained:]], dim=1)
    rule.load_state_dict(weights)
    save_rule(path, rule, {**provenance, "config": comparable(config), "placebo": _digest(placebo)})


def is_derived(folder: Path, placebo: Path) -> bool:
    """Whether the rule in the folder comes from this very rule."""
    return placebo.is_file() and bool(read_rule(folder / RULE)[1].get("placebo") == _digest(placebo))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
