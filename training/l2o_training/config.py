"""Configuration of meta-training: TOML presets and `key=value` overrides."""

import dataclasses
import random
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import torch

from l2o_runtime.config import LATER, ConfigError, FlagConfig, KAEConfig, WindowConfig, build, nearest, require, to_dict
from l2o_runtime.files.artifact import read_learned
from l2o_runtime.files.upgrade import upgraded
from l2o_runtime.learned import AnyConfig
from l2o_runtime.rules import AnyRuleConfig, LSTMConfig, RuleConfig
from l2o_runtime.solvers import SwarmConfig, TwinConfig, UnrolledConfig
from l2o_training.curricula import CurriculumConfig, GrowingConfig, LayerwiseConfig, RandomConfig
from l2o_training.tasks import MLPConfig, PythonConfig, TaskConfig

PRESETS = Path(str(files("l2o_training"))) / "presets"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that fixes a meta-training run.

    Attributes:
        description: one line on what the preset is for.
        minutes: about how long it takes on two cores, validations included; 0 is not known.
        start: a bundled name or a file: begin with this rule's weights; empty begins with random ones.
        rule: the architecture of what is trained, a rule or a solver; that of `start` has to be the same.
        tasks: what the rule is meta-trained on; every epoch draws one of them.
        validation_tasks: what decides which rule is the best; where none are given, fresh instances of `tasks`.
        epochs: outer epochs; each starts fresh instances.
        horizon: T, inner steps per epoch, and of the longest optimization.
        shortest: where given, horizons are drawn log-uniformly from this to T.
        unroll: u, inner steps per truncation, that is per outer update; 0: whole optimizations, whatever their length.
        batch: instances of one task advanced together.
        lanes: tasks advanced side by side, each with a horizon of its own; an outer update averages over them.
        sample: fraction of the coordinates that the meta-gradient is taken through; None is all of them.
        rescale: a; parameters are scaled by e^U(−a, a), instance by instance.
        rescale_tensors: the same for every tensor of an instance by itself.
        rescale_coordinates: the same for every coordinate by itself (random scaling, Lv et al. 2017).
        estimator: of the meta-gradient: truncated back-propagation, or evolution strategies, truncated (es) or
            persistent (pes), or the first two, each as far as it varies little among the lanes (mixed); or the
            cross-entropy method (cem), for few parameters and whole optimizations. es, pes and cem differentiate
            nothing, so that `sample` and `recompute` do not matter to them.
        trained: where given, only parameters whose names end so are trained.
        sigma: standard deviation of the perturbations of es, pes and cem.
        particles: of es, pes and cem, per lane; an even number, as they come in antithetic pairs.
        recompute: keep only the states of the steps of a truncation, and compute the rest again for the gradient:
            slower, but long truncations of large tasks need a fraction of the memory.
        lr: learning rate of the outer Adam; with cem that of plain steps, 1.
        final_lr: where given, the learning rate falls to this along a cosine.
        clip: bound on the norm of the meta-gradient.
        clip_lanes: bound the norm of every lane's meta-gradient too, before the mean over lanes (tbptt and mixed).
        average: where given, what is validated and kept is an average of the weights over the outer updates so far, the
            older ones forgotten by this factor per update.
        weights: which losses of a truncation count: all of them, the last, or the mean of its last tenth (end).
        objective: sum losses as in the papers, or their logarithms, so that late steps and hard tasks count alike; or
            squared errors, where solutions are known: validations look at the last one then; or what players gain by
            their moves, or their distance from a solution, for games.
        entropy: weight of a swarm's indecision about where the minimum is: see `meta.objectives.Entropy`.
        tail: a; where given, losses count for a half at the mean of the parameters over about the latest a τ of the τ
            steps so far, and for the other half at the latest ones: see `unroll`.
        jacobian: λ; λ ‖∇L‖² is added to every loss. With tbptt only, all coordinates, and no tasks of one's own.
        partial: where given, probability that a tensor of an optimization is moved in a step of meta-training. With
            tbptt only, all coordinates, and no expert.
        hide_loss: probability that an instance does not show its loss to the rule.
        koopman: weight of the Koopman loss (KAE only).
        expert: where given, what carries the optimizations at first, and is imitated: a hand-made optimizer of
            `l2o eval`, a bundled rule or a file.
        expert_lr: the expert's learning rate, if it is hand-made.
        handed_over: epochs after which the rule carries all of every step; its share grows evenly until then.
        imitated: probability that the expert carries the optimizations of an epoch, stage by stage of the curriculum,
            the last one from then on; the rule carries those of all other epochs.
        curriculum: how the optimizations are drawn, and when that changes.
        validate_every: epochs between validations.
        validation_runs: fresh instances per task in a validation; the same ones each time.
        seed: of everything.
    """

    description: str = ""
    minutes: int = 0
    start: str = dataclasses.field(default="", metadata=LATER)
    rule: AnyConfig = dataclasses.field(default_factory=LSTMConfig)
    tasks: tuple[TaskConfig, ...] = (MLPConfig(),)
    validation_tasks: tuple[TaskConfig, ...] = dataclasses.field(default=(), metadata=LATER)
    epochs: int = 100
    horizon: int = 100
    shortest: int | None = None
    unroll: int = 20
    batch: int = 1
    lanes: int = 1
    sample: float | None = None
    rescale: float = 0.0
    rescale_tensors: float = dataclasses.field(default=0.0, metadata=LATER)
    rescale_coordinates: float = dataclasses.field(default=0.0, metadata=LATER)
    recompute: bool = False
    estimator: Literal["tbptt", "es", "pes", "mixed", "cem"] = "tbptt"
    trained: tuple[str, ...] = dataclasses.field(default=(), metadata=LATER)
    sigma: float = 0.01
    particles: int = 2
    lr: float = 0.003
    final_lr: float | None = None
    clip: float = 1.0
    clip_lanes: bool = dataclasses.field(default=False, metadata=LATER)
    average: float | None = dataclasses.field(default=None, metadata=LATER)
    weights: Literal["uniform", "last", "end"] = "uniform"
    objective: Literal["loss", "log_loss", "squared_error", "reward", "distance"] = "loss"
    entropy: float = dataclasses.field(default=0.0, metadata=LATER)
    tail: float | None = dataclasses.field(default=None, metadata=LATER)
    jacobian: float = dataclasses.field(default=0.0, metadata=LATER)
    partial: float | None = dataclasses.field(default=None, metadata=LATER)
    hide_loss: float = 0.0
    koopman: float = 1.0
    expert: str = dataclasses.field(default="", metadata=LATER)
    expert_lr: float = dataclasses.field(default=0.001, metadata=LATER)
    handed_over: int = dataclasses.field(default=0, metadata=LATER)
    imitated: tuple[float, ...] = dataclasses.field(default=(), metadata=LATER)
    curriculum: CurriculumConfig = dataclasses.field(default=RandomConfig(), metadata=LATER)
    validate_every: int = 20
    validation_runs: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("epochs", "horizon", "batch", "lanes", "validate_every", "validation_runs"):
            require(getattr(self, key) >= 1, f"{key}: must be 1 or more, got {getattr(self, key)}")
        require(self.lr > 0, f"lr: must be greater than 0, got {self.lr}")
        require(self.final_lr is None or self.final_lr > 0, f"final_lr: must be greater than 0, got {self.final_lr}")
        require(self.sample is None or 0 < self.sample <= 1, f"sample: must be in (0, 1] or absent, got {self.sample}")
        require(self.sigma > 0, f"sigma: must be greater than 0, got {self.sigma}")
        even = self.particles >= 2 and self.particles % 2 == 0
        require(even, f"particles: must be an even number, 2 or more, got {self.particles}")
        compared = self.estimator != "mixed" or self.lanes >= 2
        require(compared, f"lanes: must be 2 or more with estimator = mixed, which compares them, got {self.lanes}")
        whole = self.estimator != "cem" or self.unroll == 0
        require(whole, f"unroll: must be 0 with estimator = cem, which ranks whole optimizations; got {self.unroll}")
        for key in ("rescale", "rescale_tensors", "rescale_coordinates"):
            require(0 <= getattr(self, key) <= 10, f"{key}: must be in [0, 10], got {getattr(self, key)}")
        require(self.clip > 0, f"clip: must be greater than 0, got {self.clip}")
        require(
            self.average is None or 0 < self.average < 1, f"average: must be in (0, 1) or absent, got {self.average}"
        )
        require(self.tail is None or 0 < self.tail <= 1, f"tail: must be in (0, 1] or absent, got {self.tail}")
        require(0 <= self.hide_loss <= 1, f"hide_loss: must be in [0, 1], got {self.hide_loss}")
        require(self.entropy >= 0, f"entropy: must be 0 or more, got {self.entropy}")
        require(self.koopman >= 0, f"koopman: must be 0 or more, got {self.koopman}")
        require(0 <= self.seed < 2**31, f"seed: must be in 0..2147483647, got {self.seed}")
        require(len(self.tasks) > 0, "tasks: needs at least one task")
        require(self.unroll >= 0, f"unroll: must be 1 or more, or 0 for whole optimizations; got {self.unroll}")
        divides = self.unroll == 0 or (self.unroll <= self.horizon and self.horizon % self.unroll == 0)
        require(divides, f"unroll: {self.unroll} must divide the horizon {self.horizon}")
        least = max(1, self.unroll)
        shortest = self.shortest is None or least <= self.shortest <= self.horizon
        require(shortest, f"shortest: must be in {least}..{self.horizon} (unroll to horizon), got {self.shortest}")
        require(self.expert_lr > 0, f"expert_lr: must be greater than 0, got {self.expert_lr}")
        require(self.handed_over >= 0, f"handed_over: must be 0 or more, got {self.handed_over}")
        chances = all(0 <= chance <= 1 for chance in self.imitated)
        require(chances, f"imitated: must be in [0, 1] each, got {self.imitated}")
        either = not self.imitated or (bool(self.expert) and not self.handed_over)
        require(either, "imitated: needs an expert, such as expert=adam, and no handed_over")
        if isinstance(self.curriculum, GrowingConfig):
            self._check_growing(self.curriculum)
        if isinstance(self.rule, UnrolledConfig):
            layers = self.rule.layers
            require(self.horizon <= layers, f"horizon: must be at most rule.layers, {layers}, got {self.horizon}")
        if isinstance(self.curriculum, LayerwiseConfig):
            self._check_layerwise()
        told = self.tail is None or self.objective != "squared_error"
        require(told, "tail: not with objective = squared_error, which looks at the last step")
        rule = isinstance(self.rule, RuleConfig)
        require(rule or not self.expert, f"expert: only rules imitate one, not a solver of kind {self.rule.kind}")
        require(rule or self.sample is None, f"sample: only with rules, not with a solver of kind {self.rule.kind}")
        twin, swarm = (isinstance(self.rule, made) for made in (TwinConfig, SwarmConfig))
        plays = twin or self.objective != "reward"
        require(plays, f"objective: reward is what players gain: only with a rule of kind twin, not {self.rule.kind}")
        require(swarm or not self.entropy, f"entropy: only with a rule of kind swarm, not {self.rule.kind}")
        alone = not self.expert or (self.sample is None and not isinstance(self.rule.context, KAEConfig))
        require(alone, "expert: not with sample, nor with a Koopman autoencoder, which look at the rule's steps alone")
        self._check_halo()
        context = self.rule.context
        if isinstance(context, WindowConfig | FlagConfig):
            fits = context.window <= self.horizon
            require(fits, f"rule.context.window: {context.window} is larger than the horizon {self.horizon}")

    def _check_growing(self, growing: GrowingConfig) -> None:
        first = growing.horizons[0]
        longer = self.horizon > first and self.shortest is None
        got = f"{self.horizon}{'' if self.shortest is None else ' with shortest'}"
        require(longer, f"horizon: must be longer than the curriculum's first, {first}, without shortest; got {got}")
        unit = self.unroll or 1
        whole = all(length % unit == 0 for length in growing.lengths(self.horizon))
        require(whole, f"curriculum.horizons: unroll {unit} must divide {growing.lengths(self.horizon)}")

    def _check_halo(self) -> None:
        """Does what differentiates twice, or moves a part, go with the rest?"""
        require(self.jacobian >= 0, f"jacobian: must be 0 or more, got {self.jacobian}")
        chance = self.partial is None or 0 < self.partial <= 1
        require(chance, f"partial: must be in (0, 1] or absent, got {self.partial}")
        whole = self.estimator == "tbptt" and self.sample is None
        for key, asked in {"jacobian": self.jacobian > 0, "partial": self.partial is not None}.items():
            got = f"got estimator = {self.estimator}" + ("" if self.sample is None else f" and sample = {self.sample}")
            require(whole or not asked, f"{key}: only with estimator = tbptt and without sample, {got}")
        own = [task.name for task in self.tasks if isinstance(task, PythonConfig)] if self.jacobian else []
        require(not own, f"jacobian: not with tasks of one's own, whose losses it cannot take twice: {', '.join(own)}")
        require(self.partial is None or not self.expert, "partial: not with an expert, which moves all tensors")

    def _check_layerwise(self) -> None:
        unrolled = isinstance(self.rule, UnrolledConfig)
        require(unrolled, f"curriculum.kind: layerwise is for rule.kind=unrolled, not {self.rule.kind}")
        layers = cast(UnrolledConfig, self.rule).layers
        require(layers == self.horizon, f"horizon: must be rule.layers, {layers}, with layerwise, got {self.horizon}")
        whole = self.unroll == 0 and self.shortest is None
        require(whole, "unroll: must be 0, and shortest left out, with layerwise: optimizations are whole")
        require(self.final_lr is None, "final_lr: not with layerwise, whose stages have lower rates: leave it out")

    @property
    def last_counts(self) -> bool:
        """Whether validations look at the last step alone."""
        return self.objective == "squared_error" or isinstance(self.curriculum, LayerwiseConfig)

    @property
    def end_counts(self) -> bool:
        """Whether validations look at the end of optimizations alone."""
        return self.weights == "end" or self.last_counts

    def share(self, epoch: int, stage: int = 0) -> float:
        """The rule's part in every step after so many epochs, in a stage of the curriculum; 1 without an expert."""
        if self.imitated:
            chance = self.imitated[min(stage, len(self.imitated) - 1)]
            return float(random.Random(f"{self.seed}/imitated/{epoch}").random() >= chance)
        return min(1.0, epoch / self.handed_over) if self.expert and self.handed_over else 1.0

    @property
    def as_rule(self) -> AnyRuleConfig:
        """The configuration of the rule.

        Raises:
            ConfigError: it is a solver's.
        """
        require(isinstance(self.rule, RuleConfig), f"rule.kind: {self.rule.kind} is a solver; only rules can do this")
        return cast(AnyRuleConfig, self.rule)

    @property
    def trained_rule(self) -> AnyConfig:
        """The configuration of what is trained with what meta-training adds to it: horizon, and need of the loss."""
        return self.rule.meta_trained(self.horizon, told=self.hide_loss == 0)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """A preset by name, or a TOML file of one's own, with `key=value` overrides applied.

    Args:
        name: a preset, or a path that ends in `.toml`. With a key `include` it has all keys of another one, but for
            those that it has itself.
        overrides: such as "epochs=5" or "rule.context.rank=4"; values are TOML, bare words are strings. Another `kind`
            leaves nothing of the former one's keys, wherever it stands among them.

    Raises:
        ConfigError: no such preset, invalid TOML, unknown key or bad value.
    """
    data = _read_preset(name)
    for override in sorted(overrides, key=lambda text: not text.partition("=")[0].strip().endswith(".kind")):
        _override(data, override)
    return read_config(data)


def _read_preset(name: str, inside: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a preset, and those that it does not have itself of the one that it includes."""
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not path.is_file():
        known = nearest(name, preset_names())
        raise ConfigError(f"no preset {name!r}: {known} (or a path to a .toml file)")
    require(name not in inside, f"include: {' includes '.join((*inside, name))}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    included = data.pop("include", None)
    require(included is None or isinstance(included, str), f"{path}: include: expected a preset, got {included!r}")
    return data if included is None else _read_preset(included, (*inside, name)) | data


def read_config(data: dict[str, Any]) -> TrainConfig:
    """A configuration from parsed TOML or JSON; its rule may be written as the first format of rules had it.

    Without a rule it has that of `start`; with keys of one, but no kind, that of `start` with these changed.

    Raises:
        ConfigError: unknown key or bad value.
        ArtifactError: `start` cannot be read.
    """
    require(isinstance(data, dict), f"expected a table of keys, got {type(data).__name__}")
    start, keys = data.get("start"), data.get("rule", {})
    if isinstance(start, str) and start and isinstance(keys, dict) and "kind" not in keys:
        data = data | {"rule": to_dict(read_learned(start)[0].config) | keys}
    try:
        rule = {"rule": upgraded(data["rule"])} if "rule" in data else {}
    except ConfigError as error:
        raise ConfigError(f"rule.{error}") from None
    return build(TrainConfig, data | rule)


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    require(bool(equals and key.strip()), f"--set {override!r}: expected key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    table = data
    for parent in parents:
        table = table.setdefault(parent, {})
        require(isinstance(table, dict), f"--set {override!r}: {parent} is not a table of keys")
    if last == "kind" and table.get("kind") != value:
        table.clear()
    table[last] = value


def pick_device(name: str) -> str:
    """Resolve "auto" to "cuda" where there is one.

    Raises:
        ConfigError: "cuda" was asked for and there is none.
    """
    available = torch.cuda.is_available()
    require(name != "cuda" or available, "--device cuda: no CUDA device is available here; use auto or cpu")
    return "cuda" if name != "cpu" and available else "cpu"
