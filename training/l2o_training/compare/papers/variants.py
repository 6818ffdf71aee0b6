"""Rules that are meta-trained to be compared, and the tasks that they are compared on. Nothing runs here."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    "epochs=12",
    "validate_every=4",
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


def _steps(name: str, label: str, context: str, placebo: str = "") -> Variant:
    """A variant of the default rule whose networks per tensor see a context."""
    overrides = (*_CALM, f"rule.context={{{context}}}")
    return Variant(name=name, label=label, preset="directional", overrides=overrides, placebo=placebo)


STEPS = (
    _steps("directional-placebo", "placebo", 'kind="placebo", width=6'),
    _steps("directional-flag", FLAG, 'kind="flag", window=20'),
    _steps(
        "directional-dmd",
        "DMD of each tensor's steps",
        'kind="tensor_dmd", snapshots="delta", rank=2, sketch=64, every=10',
        "directional-placebo",
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


_DIGITS = 'tasks=[{kind="mlp",data="digits",hidden=[20],batch_size=64}]'
_RNNPROP = ("rule.output_scale=0.01", "weights=uniform")  # as Open-L2O has it


def _enhanced(suffix: str, plain: tuple[str, ...], growing: tuple[str, ...]) -> tuple[Variant, ...]:
    """L2O-DM and RNNprop, each beside itself after L2O-enhanced (Chen et al. 2020)."""
    plain = (_DIGITS, *plain, "validation_runs=4")
    growing = (
        *(_DIGITS, *growing, "validate_every=5", "validation_runs=2"),
        *("curriculum.kind=growing", "expert=adam", "expert_lr=0.01"),
    )
    label = "growing horizons and imitation"
    return (
        Variant(name=f"dm{suffix}", label="L2O-DM", preset="l2o-dm", overrides=plain),
        Variant(
            name=f"dm-enhanced{suffix}",
            label=f"L2O-DM, {label}",
            preset="l2o-dm",
            overrides=(*growing, "imitated=[0.0,0.1,0.3]"),
        ),
        Variant(name=f"rnnprop{suffix}", label="RNNprop", preset="rnnprop", overrides=(*plain, *_RNNPROP)),
        Variant(
            name=f"rnnprop-enhanced{suffix}",
            label=f"RNNprop, {label}",
            preset="rnnprop",
            overrides=(*growing, "imitated=[0.3]", *_RNNPROP),
        ),
    )


ENHANCED = _enhanced("", ("epochs=270", "validate_every=15"), ("epochs=100", "horizon=1000"))
"""27,000 inner steps without, about as many with."""

ENHANCED_LONG = _enhanced("-long", ("epochs=2500", "validate_every=100"), ("epochs=150", "horizon=3000"))
"""The same with all of the paper's horizons, for 250,000 inner steps, about as many with."""

PLAIN = {f"{rule}-enhanced{suffix}": f"{rule}{suffix}" for rule in ("dm", "rnnprop") for suffix in ("", "-long")}
"""What each of them is without it."""

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
