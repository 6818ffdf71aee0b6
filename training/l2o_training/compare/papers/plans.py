"""What is reproduced: which rules are meta-trained, how, and on which tasks they are compared. Nothing runs here."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from l2o_runtime.config import ConfigError, DMDConfig, nearest, require
from l2o_runtime.files.artifact import find_rule, load_rule
from l2o_training.compare.baselines import GRID
from l2o_training.compare.contenders import name_of
from l2o_training.compare.flat import task_name
from l2o_training.compare.suites import SUITES
from l2o_training.config import TrainConfig, load_preset
from l2o_training.tasks import (
    AutoencoderConfig,
    ConvConfig,
    MLPConfig,
    OpenL2OConfig,
    PythonConfig,
    QuadraticConfig,
    RegressionConfig,
    TaskConfig,
)
from l2o_training.tasks.scripts.base import Recipe


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A rule to be meta-trained, once per seed.

    Attributes:
        name: of its folders, `<name>-s<seed>`.
        label: what tables call it.
        preset, overrides: as `l2o train --preset … --set …` takes them.
        placebo: name of the variant that it is compared with, without context or with zeros for one; empty where it
            has none itself.
    """

    name: str
    label: str
    preset: str
    overrides: tuple[str, ...] = ()
    placebo: str = ""

    def config(self, seed: int, changes: Iterable[str] = ()) -> TrainConfig:
        """The configuration of one run; `changes` are overrides on top of the variant's own.

        Raises:
            ConfigError: a bad override.
        """
        return load_preset(self.preset, [*self.overrides, *changes, f"seed={seed}"])


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Rules and baselines that are compared on the same instances.

    Attributes:
        name: what pages call it.
        variants: rules to be meta-trained, placebos first.
        tasks: what all are compared on.
        steps: inner steps of a run.
        runs: instances per task.
        seeds: meta-training seeds 0, 1, …
        rules: bundled names or files, taken as they are.
        lrs: learning rates of Adam.
    """

    name: str
    variants: tuple[Variant, ...] = ()
    tasks: tuple[TaskConfig, ...]
    steps: int = 300
    runs: int = 30
    seeds: int = 3
    rules: tuple[str, ...] = ()
    lrs: tuple[float, ...] = GRID

    @property
    def flag(self) -> Variant | None:
        """The variant that only knows whether the window is full, where there is one."""
        return next((variant for variant in self.variants if variant.label == FLAG), None)

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one `l2o reproduce` does.

    Attributes:
        title: of its page.
        text: what is done, in a paragraph.
        experiments: the comparisons.
    """

    title: str
    text: str
    experiments: tuple[Experiment, ...]


def never_sees_context(config: TrainConfig) -> bool:
    """Whether the window is not full before a meta-training episode ends: m + 1 snapshots take more than T steps."""
    context = config.rule.context
    return isinstance(context, DMDConfig) and context.window >= config.horizon


LONG = "epochs=1000"

FLAG = "flag: the window is full"

L2O = Variant(name="l2o", label="L2O, no context", preset="mnist-l2o", overrides=(LONG,))


def _with(name: str, label: str, *overrides: str, preset: str = "mnist-dmd") -> Variant:
    """A variant with a context, in the setting of `L2O`."""
    return Variant(name=name, label=label, preset=preset, overrides=(LONG, *overrides), placebo=L2O.name)


SCALED = "rule.context.features=scaled"

DMD_1_20 = _with("dmd-1-20", "DMD (1, 20), raw")
DMD_1_100 = _with("dmd-1-100", "DMD (1, 100), raw", "rule.context.window=100")
OTHERS = (
    _with("flag-20", FLAG, 'rule.context={kind="flag", window=20}'),
    _with("scaled-1-20", "DMD (1, 20), scaled", SCALED),
    _with("delta-1-20", "DMD (1, 20) of Δθ, scaled", SCALED, "rule.context.snapshots=delta"),
    _with("gradient-1-20", "DMD (1, 20) of gradients, scaled", SCALED, "rule.context.snapshots=gradient"),
    _with("loss-1-20", "DMD (1, 20) of losses, scaled", SCALED, "rule.context.snapshots=loss"),
    _with("kae-20", "KAE, latent 8, window 20", preset="mnist-kae"),
)

TABLE1 = tuple(task for task in SUITES["table1"].tasks if not isinstance(task, Recipe))

PAPER = {
    "MNIST-1L": (0.55, 0.22, 0.29),
    "MNIST-2L": (1.16, 0.26, 0.26),
    "MNIST-Batch": (1.39, 0.61, 0.28),
    "MNIST-RELU": (1.17, 0.44, 0.25),
    "FashionMNIST-1L": (1.69, 0.44, 0.47),
    "CIFAR10-1L": (2.20, 2.01, 2.02),
}
"""Losses of L2O, L2O-DMD (1, 100) and Adam 0.01. Source: arXiv 2211.16268, Table 1."""

RANKS, WINDOWS = (1, 2, 4), (10, 20, 50)
"""R and m of the sweep of Figure 4."""

SWEEP_EPOCHS = 200
"""Meta-training of the sweep; its nine rules are for comparison with each other."""


def sweep_name(rank: int, window: int) -> str:
    """Name of the sweep's variant."""
    return f"sweep-dmd-{rank}-{window}"


SWEEP = tuple(
    Variant(
        name=sweep_name(rank, window),
        label=f"DMD ({rank}, {window}), raw",
        preset="mnist-dmd",
        overrides=(f"epochs={SWEEP_EPOCHS}", f"rule.context.rank={rank}", f"rule.context.window={window}"),
    )
    for rank in RANKS
    for window in WINDOWS
)

_SHORT = ("epochs=20", "horizon=400", "unroll=20", "validate_every=20")


def _two_tiers(name: str, label: str, context: str, placebo: str = "") -> Variant:
    """A variant of the two-tier rule, meta-trained for a short while."""
    return Variant(
        name=name, label=label, preset="scale", overrides=(*_SHORT, f"rule.context={{{context}}}"), placebo=placebo
    )


TWO_TIERS = (
    _two_tiers("scale-placebo", "placebo", 'kind="placebo", width=4'),
    _two_tiers("scale-dmd-model", "DMD of all parameters", 'kind="dmd", sketch=256, every=5', "scale-placebo"),
    _two_tiers("scale-dmd-tensor", "DMD of each tensor", 'kind="tensor_dmd", sketch=256, every=5', "scale-placebo"),
)
"""A context for the whole model, and one for each tensor."""

_CALM = (
    "epochs=24",
    "horizon=600",
    "shortest=200",
    "lanes=4",
    "batch=4",
    "validation_runs=2",
    'tasks=[{kind="quadratic", size=40}, {kind="regression", size=40, condition=1000.0, hidden=[], batch_size=256}, '
    '{kind="regression", size=10, condition=1.0, hidden=[24, 24], activation="tanh", batch_size=256}, '
    '{kind="autoencoder", data="digits", hidden=[16, 4], activation="relu", batch_size=256}]',
    'validation_tasks=[{kind="quadratic", size=30}, '
    '{kind="regression", size=12, condition=30.0, hidden=[20], activation="relu", batch_size=256}, '
    '{kind="autoencoder", data="digits", hidden=[12, 6], activation="gelu", batch_size=256}]',
)
"""Little noise: whole gradients, or those of 256 examples; an update compares whole optimizations."""


def _steps(name: str, label: str, context: str, placebo: str = "directional-placebo") -> Variant:
    """A variant of the default rule whose networks per tensor see a context."""
    overrides = (*_CALM, f"rule.context={{{context}}}")
    return Variant(name=name, label=label, preset="directional", overrides=overrides, placebo=placebo)


STEPS = (
    _steps("directional-placebo", "placebo", 'kind="placebo", width=6', ""),
    _steps("directional-flag", FLAG, 'kind="flag", window=20'),
    _steps(
        "directional-dmd",
        "DMD of each tensor's steps",
        'kind="tensor_dmd", snapshots="delta", rank=2, sketch=64, every=10',
    ),
)
"""Near a minimum the eigenvalues of steps are 1 − η λ(H): they tell whether steps are too long."""

STEPS_TASKS = (
    QuadraticConfig(size=100),
    RegressionConfig(name="linear-20", size=20, condition=300.0, hidden=(), batch_size=256),
    RegressionConfig(name="waves-6", size=6, condition=1.0, wave=2.0, hidden=(32,), activation="tanh", batch_size=256),
    AutoencoderConfig(name="autoencoder-20", data="digits", hidden=(20, 8), activation="gelu", batch_size=256),
    MLPConfig(name="digits-24", data="digits", hidden=(24,), activation="tanh", batch_size=512),
)
"""What they are compared on; none is among the tasks of their meta-training."""

VALIDATION = tuple(
    replace(task, name=f"{task.kind}-{i}")
    for i, task in enumerate(load_preset("scale").validation_tasks, 1)
    if not isinstance(task, QuadraticConfig | PythonConfig)
)
"""The tasks that decide which rule of the preset `scale` is kept."""

_CONV = ConvConfig(name="CIFAR10-conv-4-8", data="cifar10", channels=(4, 8), batch_size=32)
_CONV_TASK = 'tasks=[{kind="conv", data="cifar10", channels=[4, 8], batch_size=32}]'

KOOPMAN_TASKS: dict[str, tuple[TaskConfig, str, tuple[str, ...], int]] = {
    "quadratics": (
        QuadraticConfig(size=10),
        "quadratics",
        ("batch=1", "epochs=2000", "validate_every=100", "validation_runs=100", "rule.output_scale=1.0"),
        100,
    ),
    "mnist-mlp": (
        MLPConfig(name="MNIST-8", data="mnist", hidden=(8,)),
        "mnist-l2o",
        ("epochs=200", "rule.output_scale=1.0"),
        20,
    ),
    "cifar-conv": (_CONV, "cifar-dmd", ("epochs=60", _CONV_TASK, "rule.output_scale=1.0"), 20),
    # At an output scale of 1 the first steps leave no ReLU alive, and no rule learns anything.
    "cifar-conv-0.01": (
        replace(_CONV, name="CIFAR10-conv-4-8-scale-0.01"),
        "cifar-dmd",
        ("epochs=60", _CONV_TASK, "rule.output_scale=0.01"),
        20,
    ),
}
"""Name → task, preset, overrides and runs; the public code's 20 episodes an epoch are 20 of our epochs."""

KOOPMAN_CONTEXTS = {
    "l2o": ("no context", '{kind="none"}'),
    "flag": (FLAG, '{kind="flag", window=64}'),
    "kae": ("KAE, latent 8, window 64", '{kind="kae", window=64}'),
    "dmd-raw": ("DMD (4, 64), raw", '{kind="dmd", rank=4, window=64, features="raw"}'),
    "dmd-scaled": ("DMD (4, 64), scaled", '{kind="dmd", rank=4, window=64, features="scaled"}'),
}


def _koopman(name: str) -> Experiment:
    task, preset, overrides, runs = KOOPMAN_TASKS[name]
    variants = tuple(
        Variant(
            name=f"{name}-{key}",
            label=label,
            preset=preset,
            overrides=(*overrides, f"rule.context={context}"),
            placebo="" if key == "l2o" else f"{name}-l2o",
        )
        for key, (label, context) in KOOPMAN_CONTEXTS.items()
    )
    return Experiment(name=name, variants=variants, tasks=(task,), steps=100, runs=runs)


_DIGITS = 'tasks=[{kind="mlp",data="digits",hidden=[20],batch_size=64}]'
_PLAIN = (_DIGITS, "epochs=270", "validate_every=15", "validation_runs=4")
_GROWING = (
    _DIGITS,
    "epochs=100",
    "horizon=1000",
    "validate_every=5",
    "validation_runs=2",
    "curriculum.kind=growing",
    "expert=adam",
    "expert_lr=0.01",
)
_RNNPROP = ("rule.output_scale=0.01", "weights=uniform")  # as Open-L2O has it
ENHANCED = (
    Variant(name="dm", label="L2O-DM", preset="l2o-dm", overrides=_PLAIN),
    Variant(
        name="dm-enhanced",
        label="L2O-DM, growing horizons and imitation",
        preset="l2o-dm",
        overrides=(*_GROWING, "imitated=[0.0,0.1,0.3]"),
    ),
    Variant(name="rnnprop", label="RNNprop", preset="rnnprop", overrides=(*_PLAIN, *_RNNPROP)),
    Variant(
        name="rnnprop-enhanced",
        label="RNNprop, growing horizons and imitation",
        preset="rnnprop",
        overrides=(*_GROWING, "imitated=[0.3]", *_RNNPROP),
    ),
)
"""Rules of the papers, each beside itself after L2O-enhanced (Chen et al. 2020), for about as many inner steps."""

PLAIN = {"dm-enhanced": "dm", "rnnprop-enhanced": "rnnprop"}
"""What each of them is without it."""

_RATES = (0.001, 0.003, 0.01)

NETWORKS = tuple(
    OpenL2OConfig(name=network, network=network)  # type: ignore[arg-type]
    for network in ("mnist", "mnist_relu", "mnist_deeper", "mnist_conv", "cifar_conv")
)
"""Open-L2O's five, as they were meant."""

OPEN_L2O = {
    "mnist": (0.05, -10.9, -6.0, -10.4),
    "mnist_relu": (1.5, -6.9, -3.9, -5.8),
    "mnist_deeper": (0.1, -6.9, -4.0, -7.4),
    "mnist_conv": (1.7, -4.9, 0.35, -7.0),
    "cifar_conv": (0.834, 0.33, 0.834, 0.0),
}
"""ln of the training loss after 10,000 steps in the order of `ENHANCED`, read off Figure 7 of arXiv 2103.12828."""

CHECKPOINTS = (300, 1000)
"""Steps after which the plan `bundled` looks at the loss."""

SETTING = (
    "Meta-training on MNIST, one hidden layer of 8 sigmoid units, runs of T = 100 steps through u = 20 at a time, one "
    "instance per epoch, 1000 epochs; a 2 × 20 LSTM over `log_sign` features. DMD (R, m): of rank R over m steps."
)

PLANS = {
    "table1": Plan(
        title="Table 1 of L2O-DMD",
        text=f"{SETTING} Compared over 300 steps on the six tasks of Table 1 of arXiv 2211.16268.",
        experiments=(Experiment(name="table1", variants=(L2O, DMD_1_100, DMD_1_20), tasks=TABLE1, rules=("moments",)),),
    ),
    "controls": Plan(
        title="Does a context help? Against its placebo",
        text=f"{SETTING} Every context against zeros of the same width with the same initial weights, on the same "
        "instances of the tasks of Table 1, 300 steps.",
        experiments=(Experiment(name="controls", variants=(L2O, DMD_1_20, *OTHERS), tasks=TABLE1, lrs=()),),
    ),
    "two-tiers": Plan(
        title="Does a context help the two-tier rule?",
        text="The preset `scale`, 20 epochs, horizons of 200 to 400 steps through 20 at a time; compared over 400 "
        "steps on the eight tasks of its validation. DMD (1, 20) of sketches of every fifth step, scaled; of all "
        "parameters, or of each tensor.",
        experiments=(Experiment(name="two-tiers", variants=TWO_TIERS, tasks=VALIDATION, steps=400, runs=5, lrs=()),),
    ),
    "steps": Plan(
        title="Do the dynamics of each tensor's steps help?",
        text="The default rule `directional`, whose networks see eigenvalues of DMD (2, 20) of sketches of their "
        "tensor's steps, every tenth step; its size corrections are meta-trained by evolution strategies on whole "
        "optimizations of 200 to 600 steps with little noise, 24 updates. Compared over 2,000 steps on five other "
        "tasks with as little noise.",
        experiments=(
            Experiment(
                name="steps",
                variants=STEPS,
                tasks=STEPS_TASKS,
                steps=2000,
                runs=10,
                lrs=(),
                rules=("directional",),
            ),
        ),
    ),
    "fig3": Plan(
        title="Learning curves (Figure 3 of L2O-DMD)",
        text=f"{SETTING} Training loss against the step on the six tasks of Table 1.",
        experiments=(Experiment(name="fig3", variants=(L2O, DMD_1_20), tasks=TABLE1, rules=("moments",), lrs=(0.01,)),),
    ),
    "fig4": Plan(
        title="Rank and window (Figure 4 of L2O-DMD)",
        text=f"DMD of rank R over windows of m steps, raw eigenvalues, {SWEEP_EPOCHS} epochs of meta-training, "
        "otherwise as in Table 1.",
        experiments=(Experiment(name="fig4", variants=SWEEP, tasks=TABLE1, runs=10, seeds=1, lrs=(0.01,)),),
    ),
    "koopman": Plan(
        title="The protocol of L2O-Koopman's public code",
        text="Every rule is meta-trained and compared on one task, in runs of T = 100 steps through u = 20 at a time, "
        "output scale 1 unless another is named, outer Adam 0.003, a 2 × 20 LSTM, window 64. Unlike "
        "there: `log_sign` features instead of plain gradients, a clipped meta-gradient, and a KAE that is "
        "trained with a Koopman loss.",
        experiments=tuple(_koopman(name) for name in KOOPMAN_TASKS),
    ),
    "networks": Plan(
        title="Open-L2O's networks: L2O-DM and RNNprop, enhanced",
        text="L2O-DM and RNNprop with and without L2O-enhanced (Chen et al. 2020): horizons that grow from 100 to "
        "1,000 steps, validated at the next one, and Adam at 0.01, which carries the optimizations of 0, 10 and then "
        "30 % of the epochs and is imitated (RNNprop: 30 % throughout). All are meta-trained on an MLP of 20 sigmoid "
        "units on scikit-learn's digits, in place of the paper's on MNIST, through 20 steps at a time: 27,000 inner "
        "steps without, about as many with. Compared on the five networks of Open-L2O as they were meant: examples "
        "of the training split, no ReLU on the outputs.",
        experiments=(
            Experiment(name="networks", variants=ENHANCED, tasks=NETWORKS, steps=1000, runs=2, seeds=1, lrs=_RATES),
            Experiment(
                name="networks-long", variants=ENHANCED, tasks=NETWORKS[:3], steps=10_000, runs=2, seeds=1, lrs=_RATES
            ),
        ),
    ),
    "bundled": Plan(
        title="The bundled rules against Adam",
        text="The bundled `moments` and the two-tier `mnist`, meta-trained on small MLPs on MNIST alone, and the "
        "two-tier `scale`, on more kinds of networks and of data; none on Fashion-MNIST or CIFAR-10. The preset of "
        "`mnist` was changed until its rule did well here. `directional`, the default, is hand-made so far, and was "
        "not told how long the run is. On the six tasks of Table 1 of arXiv 2211.16268, after "
        f"{' and '.join(map(str, CHECKPOINTS))} steps.",
        experiments=(
            Experiment(
                name="bundled",
                tasks=TABLE1,
                steps=CHECKPOINTS[-1],
                runs=10,
                rules=("directional", "moments", "mnist", "scale"),
            ),
        ),
    ),
    "horizon": Plan(
        title="Beyond the horizon",
        text="Rules run up to 25 times as long as they were meta-trained for.",
        experiments=(
            Experiment(
                name="horizon",
                tasks=tuple(task for task in TABLE1 if task_name(task) in ("MNIST-1L", "MNIST-RELU")),
                runs=5,
                rules=("moments", "scale"),
            ),
        ),
    ),
}
"""Name → plan, in the order in which pages stand."""

OTHER_TITLES = {"synthetic": "Games, and many local minima", "sparse": "Sparse recovery and the Lasso"}
SYNTHETIC, SPARSE = OTHER_TITLES
"""Plans of their own kinds, see `compare.papers.synthetic` and `sparse`, and the titles of their pages."""

MULTIPLES = (1, 5, 25)
"""Horizons after which the plan `horizon` looks at the loss."""


def find_plan(name: str, *, seeds: int | None = None, runs: int | None = None, rules: Iterable[str] = ()) -> Plan:
    """The plan of that name, with other numbers of seeds and runs where given, and further rules in every experiment.

    Raises:
        ConfigError: there is none, or a rule's name is taken.
        ArtifactError: a rule cannot be read.
    """
    if name not in PLANS:
        raise ConfigError(f"unknown plan {name!r}: {nearest(name, list(PLANS))}")
    plan = PLANS[name]
    experiments = [
        replace(each, seeds=seeds or each.seeds, runs=runs or each.runs, rules=(*each.rules, *rules))
        for each in plan.experiments
    ]
    for experiment in experiments:
        taken = {f"{variant.name}-s{seed}" for variant in experiment.variants for seed in range(experiment.seeds)}
        for rule in experiment.rules:
            named = name_of(find_rule(rule))
            require(named not in taken, f"--rule {rule}: the name {named!r} is taken: rename the file, or its folder")
            taken.add(named)
    horizons = [load_rule(rule).config.horizon for experiment in experiments for rule in experiment.rules]
    if name == "horizon":
        experiments = [replace(experiment, steps=MULTIPLES[-1] * max(horizons)) for experiment in experiments]
    return replace(plan, experiments=tuple(experiments))
