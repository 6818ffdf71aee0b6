"""What is reproduced: which rules are compared, on which tasks and for how long. Nothing runs here."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from l2o_runtime.config import ConfigError, DMDConfig, nearest, require
from l2o_runtime.files.artifact import find_rule, load_rule
from l2o_training.compare.baselines import GRID
from l2o_training.compare.contenders import name_of
from l2o_training.compare.flat import task_name
from l2o_training.compare.papers.variants import (
    DMD_1_20,
    DMD_1_100,
    ENHANCED,
    ENHANCED_LONG,
    FLAG,
    KOOPMAN_CONTEXTS,
    KOOPMAN_TASKS,
    L2O,
    NETWORKS,
    OTHERS,
    STEPS,
    STEPS_TASKS,
    SWEEP,
    SWEEP_EPOCHS,
    TABLE1,
    TWO_TIERS,
    VALIDATION,
    Variant,
)
from l2o_training.config import TrainConfig
from l2o_training.tasks import TaskConfig


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


RATES = (0.001, 0.003, 0.01)
"""Of Adam on Open-L2O's networks."""

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
        "optimizations of 200 to 600 steps with little noise, 12 updates. Compared over 2,000 steps on five other "
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
        text="L2O-DM and RNNprop with and without L2O-enhanced (Chen et al. 2020): horizons that grow from 100 steps, "
        "validated at the next one, and Adam at 0.01, which carries the optimizations of 0, 10 and then 30 % of the "
        "epochs and is imitated (RNNprop: 30 % throughout). All are meta-trained on an MLP of 20 sigmoid units on "
        "scikit-learn's digits, in place of the paper's on MNIST, through 20 steps at a time. For 1,000 steps, "
        "horizons grow to 1,000, and there are 27,000 inner steps without, about as many with; for 10,000 they grow "
        "to the paper's 3,000, and there are 250,000. Compared on the five networks of Open-L2O as they were meant: "
        "examples of the training split, no ReLU on the outputs.",
        experiments=(
            Experiment(name="networks", variants=ENHANCED, tasks=NETWORKS, steps=1000, runs=2, seeds=3, lrs=RATES),
            Experiment(
                name="networks-long", variants=ENHANCED_LONG, tasks=NETWORKS, steps=10_000, runs=2, seeds=1, lrs=RATES
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
