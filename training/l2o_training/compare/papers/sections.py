"""What every plan's page says: a summary, which the index repeats, and details."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l2o_runtime.files.artifact import load_rule
from l2o_training.compare.papers.figures import dots, forest, heat_map, panels
from l2o_training.compare.papers.lab import bundled
from l2o_training.compare.papers.numbers import NOT_RUN, Numbers, markdown, number, ratio, with_spread
from l2o_training.compare.papers.plans import CHECKPOINTS, MULTIPLES
from l2o_training.compare.papers.variants import (
    DMD_1_20,
    DMD_1_100,
    L2O,
    OPEN_L2O,
    PAPER,
    PLAIN,
    RANKS,
    WINDOWS,
    Variant,
    sweep_name,
)
from l2o_training.compare.report.words import plural
from l2o_training.compare.statistics import Interval, final, smoothed, verdict

ADAM = "adam-0.01"


@dataclass(frozen=True)
class Section:
    """Markdown of a plan: what the index shows too, and the rest."""

    summary: str
    details: str = ""


def table1(experiments: list[Numbers], out: Path) -> Section:
    """Table 1: the paper's numbers beside ours."""
    (numbers,) = experiments
    rules = {bundled(rule): bundled(rule) for rule in numbers.experiment.rules}
    columns = {L2O.name: "L2O", DMD_1_100.name: "L2O-DMD (1, 100)", DMD_1_20.name: "L2O-DMD (1, 20)", **rules}
    published = {L2O.name: 0, DMD_1_100.name: 1, ADAM: 2}
    rows = []
    marks: dict[str, dict[str, float]] = {}
    for task in numbers.tasks:
        cells = [_against_paper(numbers, name, task, published) for name in (*columns, ADAM)]
        rows.append([task, *cells, _tuned(numbers, task)])
        for name, label in columns.items():
            if (value := _to_adam(numbers, name, task)) is not None:
                marks.setdefault(label, {})[task] = value
            if name in published:
                marks.setdefault(f"paper: {label}", {})[task] = PAPER[task][published[name]] / PAPER[task][2]
    dots(marks, "loss / loss of Adam 0.01", out / "table1.png")
    header = ["task", *columns.values(), "Adam 0.01", "Adam tuned"]
    text = (
        f"Training loss, mean of the last 10 of {numbers.experiment.steps} steps over {numbers.experiment.runs} runs "
        "± standard deviation over runs ± standard deviation over meta-training seeds; in brackets the ratio to Adam "
        "0.01 in the same runs (the paper's: in its table). First line: arXiv 2211.16268, Table 1; second line: ours. "
        "Adam tuned takes the best of its learning rates on the very runs it is scored on."
    )
    effects = [f"- {v.label}: {_effect(numbers.effect(v))}." for v in numbers.experiment.variants if v.placebo]
    return Section(
        "\n\n".join(
            [
                text,
                markdown(header, rows),
                "![ratios to Adam](table1.png)",
                _against_placebo(numbers),
                "\n".join(effects),
            ]
        ),
        _AS_PRINTED,
    )


_EFFECT = (
    "Against the placebo, a rule with zeros instead of the context, of the same width and with the same initial "
    "weights. {}Ratios are geometric means over tasks and runs, with 95 % confidence intervals over meta-training "
    "seeds:"
)
_ANY_WIDTH = "Zeros get no gradient, so the placebo of any width is the run of L2O without context, to the bit. "
_AS_PRINTED = (
    "DMD (1, 100) as printed: a window of 100 steps needs 101 snapshots, and meta-training ends after 100 steps. The "
    "context is zero throughout meta-training, so training gives the weights of L2O, to the bit, and initial context "
    "weights that no gradient has touched. This rule is therefore not trained but put together from the two; from step "
    "101 of the comparison on it sees eigenvalues through those random weights."
)


def _against_paper(numbers: Numbers, name: str, task: str, published: dict[str, int]) -> str:
    """The paper's loss above ours, each with its ratio to Adam 0.01."""
    column = published.get(name)
    paper = "" if column is None else f"{PAPER[task][column]:.2f} ({PAPER[task][column] / PAPER[task][2]:.2f})<br>"
    curves, share = numbers.of(name, task), _to_adam(numbers, name, task)
    ours = NOT_RUN if curves is None else with_spread(final(curves))
    return paper + ours + (f" ({share:.2f})" if share is not None and np.isfinite(share) else "")


def _to_adam(numbers: Numbers, name: str, task: str) -> float | None:
    """Ratio of mean final losses to Adam 0.01 in the same runs; None where one is missing."""
    ours, reference = numbers.of(name, task), numbers.of(ADAM, task)
    return None if ours is None or reference is None else float(final(ours).mean() / final(reference).mean())


def _tuned(numbers: Numbers, task: str) -> str:
    best = numbers.tuned(task)
    return NOT_RUN if best is None else f"{number(best[0])} (lr {best[1]:g})"


def _against_placebo(numbers: Numbers) -> str:
    """What a placebo is, and how it is compared with; that of L2O stands for those of every width."""
    return _EFFECT.format(_ANY_WIDTH if L2O in numbers.experiment.variants else "")


def _effect(effect: dict[str, Interval]) -> str:
    if not effect:
        return f"{NOT_RUN} on all tasks and seeds"
    return f"loss {_ratio_of(effect)} of its placebo's: {_verdict(effect)}"


def _ratio_of(effect: dict[str, Interval], task: str = "all") -> str:
    return ratio(effect[task]) if effect else NOT_RUN


def _verdict(effect: dict[str, Interval]) -> str:
    return verdict(effect["all"]) if effect else NOT_RUN


def controls(experiments: list[Numbers], out: Path) -> Section:
    """Every context against its placebo."""
    (numbers,) = experiments
    effects = {v.label: numbers.effect(v) for v in numbers.experiment.variants if v.placebo}
    to_flag = _to_flag(numbers)
    shown = {label: effect["all"] for label, effect in effects.items() if effect}
    forest(shown, "loss / loss of the placebo, 95 % interval over seeds", out / f"{numbers.experiment.name}.png")
    summary = markdown(
        ["context", "loss / placebo's", "seeds", "verdict", *(["loss / flag's"] if to_flag else [])],
        [
            [k, _ratio_of(e), str(e["all"].count) if e else "0", _verdict(e), *to_flag.get(k, [])]
            for k, e in effects.items()
        ],
    )
    rows = [[label, *(_ratio_of(effect, task) for task in numbers.tasks)] for label, effect in effects.items()]
    details = f"Per task, the same ratios with intervals over seeds:\n\n{markdown(['context', *numbers.tasks], rows)}"
    if numbers.experiment.rules:
        labels = {v.name: v.label for v in numbers.experiment.variants}
        labels |= {bundled(rule): bundled(rule) for rule in numbers.experiment.rules}
        details = f"{details}\n\n{_finals(numbers, labels)}"
    return Section(f"{_against_placebo(numbers)}\n\n{summary}\n\n![effects]({numbers.experiment.name}.png)", details)


def _to_flag(numbers: Numbers, statistic: Callable[[np.ndarray], np.ndarray] = final) -> dict[str, list[str]]:
    """Label → a cell with the ratio to the flag's loss, "1" for its own; nothing in an experiment without flag."""
    flag = numbers.experiment.flag
    if flag is None:
        return {}
    others = {v.label: numbers.effect(v, statistic, flag.name) for v in numbers.experiment.variants if v is not flag}
    return {flag.label: ["1"]} | {label: [_ratio_of(effect)] for label, effect in others.items()}


def fig3(experiments: list[Numbers], out: Path) -> Section:
    """Learning curves on the tasks of Table 1."""
    (numbers,) = experiments
    labels = {v.name: v.label for v in numbers.experiment.variants}
    labels |= {bundled(rule): bundled(rule) for rule in numbers.experiment.rules} | {ADAM: "Adam 0.01"}
    panels(_pooled(numbers, labels), out / "fig3.png")
    return Section(
        "![learning curves](fig3.png)\n\nMean over runs and seeds, band ± 1 standard deviation. "
        f"{_finals(numbers, labels)}"
    )


def _finals(numbers: Numbers, labels: dict[str, str]) -> str:
    """A table of final losses of what is known by these names."""
    rows = [[label, *(_final(numbers, name, task) for task in numbers.tasks)] for name, label in labels.items()]
    table = markdown(["optimizer", *numbers.tasks], rows)
    return f"Mean of the last 10 steps ± over runs ± over seeds:\n\n{table}"


def _pooled(numbers: Numbers, labels: dict[str, str]) -> dict[str, dict[str, np.ndarray]]:
    """Task → label → losses (seeds · runs, steps), of what there is."""
    found = {task: {label: numbers.of(name, task) for name, label in labels.items()} for task in numbers.tasks}
    return {
        task: {label: c.reshape(-1, c.shape[-1]) for label, c in named.items() if c is not None}
        for task, named in found.items()
    }


def _smooth(numbers: Numbers, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """`_pooled` of rules and Adam at 0.01, as running means."""
    pooled = _pooled(numbers, {name: name for name in names} | {ADAM: "Adam 0.01"})
    return {task: {name: smoothed(losses) for name, losses in named.items()} for task, named in pooled.items()}


def _final(numbers: Numbers, name: str, task: str, statistic: Callable[[np.ndarray], np.ndarray] = final) -> str:
    curves = numbers.of(name, task)
    return NOT_RUN if curves is None else with_spread(statistic(curves))


def fig4(experiments: list[Numbers], out: Path) -> Section:
    """The sweep over rank and window, as ratios to Adam 0.01."""
    (numbers,) = experiments

    def to_adam(rank: int, window: int, task: str) -> float:
        value = _to_adam(numbers, sweep_name(rank, window), task)
        return np.nan if value is None else value

    shares = np.array(
        [[[to_adam(rank, window, task) for task in numbers.tasks] for window in WINDOWS] for rank in RANKS]
    )
    means = np.exp(np.log(shares).mean(-1))
    rows, columns = [f"R = {rank}" for rank in RANKS], [f"m = {window}" for window in WINDOWS]
    heat_map(means, rows, columns, "loss / loss of Adam 0.01", out / "fig4.png")

    def table(values: np.ndarray) -> str:
        cells = [[f"{v:.2f}" if np.isfinite(v) else NOT_RUN for v in row] for row in values]
        return markdown(["rank", *columns], [[name, *row] for name, row in zip(rows, cells, strict=True)])

    details = [f"{task}:\n\n{table(shares[..., index])}" for index, task in enumerate(numbers.tasks)]
    return Section(
        f"Ratio of the final loss to that of Adam 0.01 in the same runs, geometric mean over tasks; seeds: "
        f"{numbers.experiment.seeds}, so differences may come from the seed.\n\n{table(means)}\n\n![sweep](fig4.png)",
        "\n\n".join(details),
    )


def koopman(experiments: list[Numbers], out: Path) -> Section:
    """Three tasks, each with its own rules."""
    blocks = []
    pictures: dict[str, dict[str, np.ndarray]] = {}
    header = ["rule", "mean loss over T", "final loss", "mean loss / placebo's", "verdict", "mean loss / flag's"]
    for numbers in experiments:
        (task,) = numbers.tasks
        effects = {v.name: numbers.effect(v, _over_horizon) if v.placebo else {} for v in numbers.experiment.variants}
        to_flag = _to_flag(numbers, _over_horizon)
        rows = [
            [
                v.label,
                _final(numbers, v.name, task, _over_horizon),
                _final(numbers, v.name, task),
                *((_ratio_of(effects[v.name]), _verdict(effects[v.name])) if v.placebo else ("1", "is the placebo")),
                *to_flag[v.label],
            ]
            for v in numbers.experiment.variants
        ]
        rows.append(["Adam tuned", "", _tuned(numbers, task), "", "", ""])
        blocks.append(f"{task}, {numbers.experiment.runs} runs:\n\n{markdown(header, rows)}")
        labels = {v.name: v.label for v in numbers.experiment.variants} | {ADAM: "Adam 0.01"}
        pictures |= _pooled(numbers, labels)
    panels(pictures, out / "koopman.png")
    text = (
        "Mean over runs ± over runs ± over seeds; the sum of losses that the public code reports is T times the first "
        "column. Ratios are geometric means with 95 % confidence intervals over meta-training seeds."
    )
    return Section("\n\n".join([text, *blocks, "![curves](koopman.png)"]))


def _over_horizon(curves: np.ndarray) -> np.ndarray:
    return np.asarray(curves.mean(-1))


def bundle(experiments: list[Numbers], out: Path) -> Section:
    """Rules as they are bundled, against Adam at 0.01 and tuned for every task and number of steps."""
    (numbers,) = experiments
    names = [bundled(rule) for rule in numbers.experiment.rules]
    rows = [_at(numbers, name, task, at) for name in names for at in CHECKPOINTS for task in numbers.tasks]
    panels(_smooth(numbers, names), out / "bundled.png", CHECKPOINTS)
    header = ["rule", "task", "steps", "loss", "Adam 0.01", "Adam tuned", "loss / Adam 0.01's", "loss / tuned Adam's"]
    score = [f"- {name}, {at} steps: {_score(numbers, name, at)}." for name in names for at in CHECKPOINTS]
    return Section(
        f"Mean of the 10 steps up to there, ± over {numbers.experiment.runs} runs. Adam is tuned for each line on the "
        f"very runs it is scored on, over {', '.join(f'{lr:g}' for lr in numbers.experiment.lrs)}.\n\n"
        + "\n\n".join(["\n".join(score), markdown(header, rows), "![curves](bundled.png)"])
        + "\n\nRunning means over 10 steps, mean over runs, band ± 1 standard deviation; of Adam at 0.01 alone. "
        "Dotted: the steps of the table."
    )


def _score(numbers: Numbers, name: str, at: int) -> str:
    """On how many tasks a rule is at or under Adam."""
    shares = [_shares(numbers, name, task, at) for task in numbers.tasks]
    counts = [sum(share[i] <= 1 for share in shares) for i in range(2)]
    total = len(shares)
    return f"at or under Adam 0.01 on {counts[0]} of {total} tasks, under tuned Adam on {counts[1]} of {total}"


def _shares(numbers: Numbers, name: str, task: str, at: int) -> tuple[float, float]:
    """Loss after so many steps as a share of that of Adam 0.01 and of tuned Adam; NaN where one was not measured."""
    ours, reference, best = numbers.of(name, task), numbers.of(ADAM, task), numbers.tuned(task, at)
    loss = np.nan if ours is None else final(ours[..., :at]).mean()
    plain = np.nan if reference is None else final(reference[..., :at]).mean()
    return float(loss / plain), float(loss / best[0]) if best else np.nan


def horizon(experiments: list[Numbers], out: Path) -> Section:
    """Losses far beyond what rules were meta-trained for."""
    (numbers,) = experiments
    rows, marks, names = [], set(), []
    for rule in numbers.experiment.rules:
        own, length = bundled(rule), load_rule(rule).config.horizon
        names.append(own)
        marks |= {multiple * length for multiple in MULTIPLES}
        for task in numbers.tasks:
            for multiple in MULTIPLES:
                name, *cells = _at(numbers, own, task, multiple * length)
                rows.append([f"{name}, {multiple} × {length}", *cells])
    panels(_smooth(numbers, names), out / "horizon.png", tuple(sorted(marks)))
    header = ["rule, horizon", "task", "steps", "loss", "Adam 0.01", "Adam tuned", "/ Adam 0.01's", "/ tuned Adam's"]
    return Section(
        f"Mean of the 10 steps up to there, ± over {numbers.experiment.runs} runs. Adam is tuned for each line on the "
        f"very runs it is scored on.\n\n{markdown(header, rows)}\n\n![curves](horizon.png)\n\n"
        "Running means over 10 steps; dotted: the horizons of the table."
    )


def _at(numbers: Numbers, name: str, task: str, steps: int) -> list[str]:
    """One line of a table: a rule and Adam after so many steps."""
    ours, reference, best = numbers.of(name, task), numbers.of(ADAM, task), numbers.tuned(task, steps)
    cells = [NOT_RUN if c is None else with_spread(final(c[..., :steps])) for c in (ours, reference)]
    tuned = NOT_RUN if best is None else f"{number(best[0])} (lr {best[1]:g})"
    shares = [NOT_RUN if np.isnan(share) else number(share) for share in _shares(numbers, name, task, steps)]
    return [name, task, str(steps), *cells, tuned, *shares]


def networks(experiments: list[Numbers], out: Path) -> Section:
    """L2O-DM and RNNprop with and without L2O-enhanced: logarithms of losses beside the published ones."""
    blocks = []
    for numbers in experiments:
        steps, rows, trained = numbers.experiment.steps, [], numbers.experiment.variants
        labels = {variant.name: variant.label for variant in trained}
        if not numbers.curves:
            blocks.append(f"After {steps:,} steps: {NOT_RUN}.")
            continue
        for task in numbers.tasks:
            ours = [_logarithm(numbers, name, task) for name in labels]
            best = numbers.tuned(task)
            adam = NOT_RUN if best is None else f"{np.log(best[0]):.2f} (lr {best[1]:g})"
            rows.append([task, *ours, adam])
            if task in OPEN_L2O:
                rows.append(["published, 10,000", *(f"{value:g}" for value in OPEN_L2O[task]), ""])
        lower = [
            f"{labels[variant.name]}: below {labels[PLAIN[variant.name]]} on {_lower(numbers, variant)} of "
            f"{_both(numbers, variant)} networks that both were run on"
            for variant in trained
            if variant.name in PLAIN and _both(numbers, variant)
        ]
        table = markdown(["network", *labels.values(), "Adam tuned"], rows)
        head = f"After {steps:,} steps, {plural(numbers.experiment.seeds, 'seed')} of meta-training:"
        blocks.append("\n\n".join([head, table, "\n".join(f"- {line}." for line in lower)]))
    first = experiments[0]
    panels(_smooth(first, [variant.name for variant in first.experiment.variants]), out / "networks.png")
    text = (
        "ln of the training loss, mean of the last 10 steps over runs, and over seeds where there are several. "
        "Published: over 10 runs, read off Figure 7 of arXiv 2103.12828, on networks whose last ReLU leaves "
        "ln ln 10 = 0.83 where all outputs are dead. Adam is tuned on the very runs it is scored on."
    )
    return Section("\n\n".join([text, *blocks, "![curves](networks.png)"]))


def _logarithm(numbers: Numbers, name: str, task: str) -> str:
    """ln of the mean final loss."""
    curves = numbers.of(name, task)
    if curves is None:
        return NOT_RUN
    loss = float(final(curves).mean())
    return f"{np.log(loss):.2f}" if np.isfinite(loss) else "diverged"


def _lower(numbers: Numbers, variant: Variant) -> int:
    """On how many tasks a variant's loss is below that of the same without it."""
    return sum(bool(final(ours).mean() < final(plain).mean()) for ours, plain in _pairs(numbers, variant))


def _both(numbers: Numbers, variant: Variant) -> int:
    """On how many tasks both were run."""
    return len(_pairs(numbers, variant))


def _pairs(numbers: Numbers, variant: Variant) -> list[tuple[np.ndarray, np.ndarray]]:
    """Losses of a variant and of the same without it, task by task."""
    pairs = [(numbers.of(variant.name, task), numbers.of(PLAIN[variant.name], task)) for task in numbers.tasks]
    return [(ours, plain) for ours, plain in pairs if ours is not None and plain is not None]


SECTIONS: dict[str, Callable[[list[Numbers], Path], Section]] = {
    "table1": table1,
    "controls": controls,
    "two-tiers": controls,
    "steps": controls,
    "fig3": fig3,
    "fig4": fig4,
    "koopman": koopman,
    "networks": networks,
    "bundled": bundle,
    "horizon": horizon,
}
"""Plan → what its page says; draws the pictures into a folder."""
