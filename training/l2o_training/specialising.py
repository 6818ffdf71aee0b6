"""Specialise: a rule goes on from one that exists, on one's own tasks, for the length of one's runs."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from l2o_runtime.config import require
from l2o_runtime.files.artifact import read_learned
from l2o_runtime.learned import as_solver
from l2o_runtime.rules import Rule, RuleConfig, make_rule
from l2o_runtime.solvers import Descent
from l2o_training.config import TrainConfig, load_preset, pick_device, read_config
from l2o_training.errors import RunError
from l2o_training.fused.lstm import fuse
from l2o_training.meta import checkpoints
from l2o_training.meta.epoch import Epoch
from l2o_training.meta.folder import CONFIG
from l2o_training.meta.plan import FEWEST, Speed, best_factor, extended, fit, measure_speed, with_fewer_checked
from l2o_training.meta.provenance import comparable, differences, inherit, spell
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.validation import Validation
from l2o_training.progress import training_bar
from l2o_training.ranks.group import ALONE, Ranks
from l2o_training.tasks import PythonConfig, Task, make_task
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.own import OwnTask, examine, own_randomness
from l2o_training.tasks.places import Make, TaskError, distinct

PRESET = "specialise"

SIZED = 0.15
"""Share of the time in which the length of steps is sought, before the first epoch."""

SIZES = 8
"""Lengths that are tried at most; under `FEWEST_SIZES` it is left as it is."""

FEWEST_SIZES = 3

LARGEST_SCALE = 100.0
"""Of a rule's output_scale."""

FITTED = ("epochs", "lanes", "batch", "particles", "validate_every", "validation_runs")
"""Keys that are fitted to the time; so is the rule's output_scale."""

Say = Callable[[str], None]


def specialise(
    make: str | Make | Sequence[str | Make],
    *,
    steps: int = 1000,
    minutes: float = 15,
    start: str = "default",
    out: str | Path = "runs/mine",
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    callback: Callable[[Epoch], None] = lambda epoch: None,
    progress: bool = True,
) -> Path:
    """Meta-train a rule for tasks of one's own: what `l2o train --task` does.

    Args:
        make: "file.py:function", a function at the top of a module or notebook, or several of either. It takes a seed
            and returns a model and `loss(model, step)`.
        steps: length of the runs that the rule is for.
        minutes: that it may take.
        start: rule to begin with, a bundled name or a file.
        out: folder of the run.
        seed: of everything.
        device: "auto", "cpu" or "cuda".
        resume: go on with the folder's run, for so many more minutes.
        callback: called after every epoch.
        progress: show a bar.

    Returns:
        The rule's file.

    Raises:
        TaskError: a task cannot be used.
        ConfigError, ArtifactError, RunError: as `l2o train` tells them.
    """
    makes = [make] if isinstance(make, str) or callable(make) else list(make)
    require(bool(makes), "make: expected a function or several, got none")
    places = [one if isinstance(one, str) else place_of(one) for one in makes]
    config = load_preset(PRESET, [*settings(places, start, steps), f"seed={seed}"])
    folder, place = Path(out), pick_device(device)
    config, over = prepare(
        config, folder, minutes=minutes, resume=resume, device=place, say=print if progress else None
    )
    trainer = Trainer(config, folder, device=place, resume=resume)
    with training_bar(config.epochs, trainer.epoch, shown=progress) as report:

        def both(epoch: Epoch) -> None:
            report(epoch)
            callback(epoch)

        path = trainer.run(both, over)
    if progress:
        print(*verdict(trainer), sep="\n")
    return path


def place_of(make: Make) -> str:
    """The place of a function that is at hand.

    Raises:
        ConfigError: nobody else could find it there.
    """
    module, name = getattr(make, "__module__", None), getattr(make, "__qualname__", "")
    require(
        module is not None and name.isidentifier(),
        f"make: {name or make} is not at the top of a module, where it can be found again: define it there with def",
    )
    return f"{module}:{name}"


def settings(places: Sequence[str] = (), start: str = "", steps: int | None = None) -> list[str]:
    """Overrides of a preset: tasks of one's own, the rule to begin with, the length of runs.

    Raises:
        ConfigError: two tasks are called alike.

    >>> settings(["mine.py:make"], steps=500)
    ['tasks=[{kind = "python", make = "mine.py:make"}]', 'validation_tasks=[]', 'objective=loss', 'horizon=500']
    """
    distinct(places)
    listed = ", ".join(f'{{kind = "python", make = {json.dumps(place)}}}' for place in places)
    found = [f"tasks=[{listed}]", "validation_tasks=[]"] if places else []
    found += ["objective=loss"] * (len(places) == 1)  # logarithms weigh several tasks alike, and need positive losses
    found += [f"start={json.dumps(start)}"] if start else []
    return found + ([f"horizon={steps}"] if steps is not None else [])


def begun(folder: Path) -> TrainConfig:
    """The configuration of a folder's run, as it was fitted to its time.

    Raises:
        RunError: there is none.
    """
    try:
        return read_config(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunError(f"{folder} holds no run to resume: leave --resume out to start one") from None
    except (ValueError, OSError) as error:
        raise RunError(f"{folder / CONFIG} is damaged ({error}): choose another --out") from None


def prepare(
    config: TrainConfig,
    folder: Path,
    *,
    minutes: float | None = None,
    resume: bool = False,
    device: str = "cpu",
    load: Datasets | None = None,
    ranks: Ranks = ALONE,
    say: Say | None = None,
) -> tuple[TrainConfig, Callable[[], bool]]:
    """Look at tasks of one's own, and fit the run to its time.

    Args:
        config: the run.
        folder: of the run.
        minutes: that it may take, or go on for; None leaves epochs and lanes as they are.
        resume: whether it goes on.
        device, load, ranks: as the trainer has them.
        say: is told what was found, a line each.

    Returns:
        The run, and what says whether its time is over.

    Raises:
        TaskError: a task cannot be used.
        ConfigError: too little time.
    """
    require(minutes is None or 0 < minutes < math.inf, f"--minutes: must be a number greater than 0, got {minutes}")
    began, tell = time.monotonic(), say or (lambda line: None)
    seconds = 0.0 if minutes is None else 60 * minutes

    def over() -> bool:
        return minutes is not None and time.monotonic() - began > seconds

    own = [task for task in config.tasks if isinstance(task, PythonConfig)]
    for task in own:
        tell(f"running {task.make.rpartition(':')[0]}: a task is code, and is run as it is")
    if config.trained and isinstance(config.rule, RuleConfig):
        config = replace(config, rule=config.as_rule.freed)
    if resume and (minutes is not None or own):
        kept = _resumed(config, folder, seconds)
        if minutes is None or checkpoints.find(folder):
            return kept, over
    if minutes is None and not own:
        return config, over
    place = torch.device(device)
    tasks = [make_task(task, load or Datasets(Path("data")), place) for task in config.tasks]
    for line in (line for task in tasks if isinstance(task, OwnTask) for line in _described(task, config.objective)):
        tell(line)
    if minutes is None or checkpoints.find(folder):
        return config, over
    measured = Speed(**_of_first(ranks, asdict(measure_speed(config, _rule(config, place), tasks))))
    config, speed = with_fewer_checked(config, seconds, measured, ranks.size)
    sized, tried = _sized(config, tasks, speed, seconds, ranks, place, tell)
    spent = _of_first(ranks, time.monotonic() - began)
    fitted = fit(sized, seconds, speed, ranks.size, fewest=0 if tried else FEWEST, spent=spent)
    trials = 1 if fitted.estimator == "tbptt" else fitted.particles
    each = 1e3 * speed.of(fitted.batch, config.batch) / (1 if fitted.estimator == "tbptt" else config.particles)
    held = fitted.batch * max(task.instances(1, 2**40).params.shape[1] for task in tasks)
    bytes_each = sum(dtype.itemsize for _, dtype in _rule(fitted, place).spec.coordinate.values()) + 4
    tell(
        f"a step of {fitted.batch} instances takes {each:.1f} ms: {fitted.epochs} updates fit into "
        f"{seconds / 60:.3g} minutes, each from {trials} perturbations on {fitted.lanes * fitted.batch} instances, "
        f"whose parameters and state take {fitted.lanes * held * bytes_each / 1e6:.2g} MB"
    )
    return fitted, over


def _of_first(ranks: Ranks, value: Any) -> Any:
    """Plain data as rank 0 has it."""
    return json.loads(ranks.exchange(json.dumps(value))[0])


def _resumed(config: TrainConfig, folder: Path, seconds: float) -> TrainConfig:
    """The folder's run, which was fitted to its time; with more epochs where there is more time.

    Raises:
        RunError: it is of another configuration, fitted keys aside.
    """
    kept = begun(folder)
    asked = replace(config, **{key: getattr(kept, key) for key in FITTED})
    asked = replace(asked, rule=replace(asked.as_rule, output_scale=kept.as_rule.output_scale))
    changed = differences(comparable(kept), comparable(asked))
    if changed:
        text = "; ".join(f"{key}: {spell(old)} there, {spell(new)} here" for key, old, new in changed)
        raise RunError(f"{folder} was started with another configuration: {text}: choose another --out")
    found = checkpoints.find(folder)
    if not (found and seconds):
        return kept
    info = checkpoints.read(found[max(found)], lambda key: False)[1]
    return extended(kept, info["epoch"], seconds, info["seconds"])


def _described(task: OwnTask, objective: str) -> list[str]:
    """What a first look at a task shows.

    Raises:
        ConfigError: its loss has no logarithm, where several tasks are weighed by it.
    """
    seen = examine(task)
    positive = objective == "loss" or seen.loss > 0
    require(
        positive,
        f"{seen.name}: its first loss is {seen.loss:.4g}: several tasks are weighed by the logarithms of their losses, "
        "which have to be above 0; train on this task alone, or add a constant to its loss",
    )
    found = [
        f"{seen.name}: {seen.model}, {seen.parameters:,} parameters in {seen.tensors} tensors, first loss "
        f"{seen.loss:.4g}, {1e3 * seen.seconds:.2f} ms for loss and gradient; several instances run "
        f"{'at once' if seen.together else 'one after the other'}"
    ]
    if not seen.deterministic:
        found.append(
            f"warning: {seen.name} is not deterministic: the same seed gave another loss. Random numbers of torch, "
            "numpy and Python are seeded before every call; generators of your own, and counters, are not"
        )
    return found


def _rule(config: TrainConfig, device: torch.device, factor: float = 1.0) -> Rule:
    """The rule that a run begins with, with steps so many times as long."""
    rule_config = config.as_rule
    wanted = replace(
        rule_config.meta_trained(config.horizon, told=config.hide_loss == 0),
        output_scale=factor * rule_config.output_scale,
    )
    with own_randomness(device) as reseed:
        reseed(config.seed)
        rule = make_rule(wanted).float()  # tasks may change the default
    if config.start:
        inherit(rule, config.start)
    return fuse(rule.to(device))


def _sized(
    config: TrainConfig, tasks: list[Task], speed: Speed, seconds: float, ranks: Ranks, device: torch.device, tell: Say
) -> tuple[TrainConfig, bool]:
    """The run with the length of steps that its start does best with, and whether there was time to try."""
    began, validation = time.monotonic(), Validation(config, config.horizon, tasks, ranks, device)
    tries = min(SIZES, int(SIZED * seconds / (config.horizon * speed.checked * len(tasks) / ranks.size)))
    if not config.start or tries < FEWEST_SIZES:
        return config, False

    found = []

    def score(factor: float) -> float:
        late = _of_first(ranks, time.monotonic() - began > 2 * SIZED * seconds)  # a machine that has become slow
        if late or factor * config.as_rule.output_scale > LARGEST_SCALE:
            return math.inf
        found.append(validation.score(validation.losses(Descent(_rule(config, device, factor)))))
        return found[-1]

    factor = best_factor(score, tries)
    if found and not any(map(math.isfinite, found)):
        raise TaskError(
            f"{', '.join(task.name for task in tasks)}: no run of {config.horizon:,} steps had finite losses, at "
            f"{len(found)} lengths of steps: train it in an ordinary loop first, and see from which step on"
        )
    tell(f"steps {factor:.2g} times as long as those of {config.start} do best, of {tries} lengths at most")
    return replace(config, rule=replace(config.as_rule, output_scale=factor * config.as_rule.output_scale)), True


def verdict(trainer: Trainer) -> list[str]:
    """How the rule stands beside Adam and the rule that it began with, on the validation's instances, in words."""
    config, adam = trainer.config, trainer.adam or {"lr": None, "loss": None}
    steps = f"{'after' if config.end_counts else 'over'} {config.horizon:,} steps"
    found = [f"loss {steps} on {config.validation_runs} fresh instances of each task: {trainer.best:.4g}"]
    if "name" in adam:
        found.append(f"{adam['name']}, as many steps: {adam['loss']:.4g}{_of(trainer.best, adam['loss'])}")
    elif adam["loss"] is None:
        found.append("Adam: not finite at any rate")
    else:
        found.append(f"Adam at its best rate, {adam['lr']}: {adam['loss']:.4g}{_of(trainer.best, adam['loss'])}")
    if config.start:
        ancestor, _ = read_learned(config.start)
        before = as_solver(
            fuse(ancestor.to(trainer.device)) if isinstance(ancestor, Rule) else ancestor.to(trainer.device)
        )
        start = trainer.validation.score(trainer.validation.losses(before))
        found.append(f"{config.start}, as it was: {start:.4g}{_of(trainer.best, start)}")
    return found


def _of(own: float, other: float) -> str:
    """A ratio of losses in words; none of what may be negative."""
    if not (own > 0 and other > 0):
        return ""
    ratio = own / other
    return f"; the rule's is {ratio:.2f} of it" if ratio >= 0.1 else f"; the rule's is {ratio:.1g} of it"
