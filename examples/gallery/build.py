"""Make the gallery: specialise a rule for every family, compare it on fresh instances, write tables.

    python examples/gallery/build.py --out runs/gallery

What is there is kept, so that a stopped build goes on. Some hours on two cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from l2o_runtime.files.artifact import find_rule
from l2o_training.compare.contenders import of_rule
from l2o_training.compare.own import train as train_own
from l2o_training.compare.statistics import final
from l2o_training.tasks.places import find_make

FAMILIES = {
    "siren": 1000,
    "pinn": 1000,
    "regression": 1000,
    "logistic": 1000,
    "vae": 1000,
    "finetune": 300,
    "chars": 1000,
    "lenet": 2000,
}
"""Family → steps of a run."""

HERE = Path(__file__).parent
BASELINES = "adam,adamw-cosine,muon-linear"
SHORTER = (2, 3, 4, 6, 8, 12, 16)
"""Parts of the steps that are tried."""


def l2o(*words: object) -> str:
    """Run a command, show what it says on standard error, give its standard output."""
    command = [sys.executable, "-m", "l2o_cli", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train(name: str, out: Path, minutes: float, nproc: int) -> Path:
    """The rule of a family."""
    rule = out / name / "rule.safetensors"
    if not rule.is_file():
        more = ["--resume"] if (out / name / "config.json").is_file() else []
        place, steps = f"{HERE}/{name}.py:make", FAMILIES[name]
        l2o(
            "train",
            "--task",
            place,
            "--steps",
            steps,
            "--minutes",
            minutes,
            "--nproc",
            nproc,
            "--out",
            rule.parent,
            *more,
        )
    return rule


def compare(name: str, rule: Path, runs: int, thin: int) -> tuple[dict, str]:
    """Figures of all optimizers, and the verdict in words."""
    out = rule.parent / "eval"
    out.mkdir(exist_ok=True)
    words = ["--steps", FAMILIES[name], "--runs", runs, "--thin", thin, "--baselines", BASELINES, "--threads", 1]
    said = l2o(
        "eval",
        rule,
        "default",
        "--task",
        f"{HERE}/{name}.py:make",
        *words,
        "--out",
        out,
        "--report",
        out / "report.html",
    )
    text = " ".join(said.split())
    verdict = text.partition(f"{name}-total: {name}, ")[2].partition(" directional-total:")[0]
    return json.loads((out / "results.json").read_text()), verdict


def shorter(name: str, rule: Path, adam: float, runs: int) -> int:
    """k, where runs of 1/k of the steps, told so, are the shortest that end as low as tuned Adam after all of them."""
    contender, make = of_rule(name, rule, "total"), find_make(f"{HERE}/{name}.py:make")
    best = 1
    for k in SHORTER:
        ends = [
            final(train_own(make, contender.optimizer, 1.0, seed, FAMILIES[name] // k).train[0]) for seed in range(runs)
        ]
        if not sum(ends) / runs <= adam:
            break
        best = k
    return best


def elsewhere(families: list[str], out: Path, runs: int) -> list[str]:
    """Rows of a table: every rule on every family, geometric mean of its final loss over that of the default."""
    paths = [find_rule("default"), *(out / name / "rule.safetensors" for name in families)]
    columns = []
    for family in families:
        make = find_make(f"{HERE}/{family}.py:make")
        optimizers = [of_rule(path.parent.name, path, "total").optimizer for path in paths]
        start, *others = (
            np.log([final(train_own(make, made, 1.0, seed, FAMILIES[family]).train[0]) for seed in range(runs)])
            for made in optimizers
        )
        columns.append([np.exp(np.nan_to_num(logs - start, nan=np.inf).mean()) for logs in others])
    return [
        f"| {name} | {' | '.join(f'{column[index]:.2f}' for column in columns)} |"
        for index, name in enumerate(families)
    ]


def line(name: str, found: dict, k: int) -> str:
    """A row of the page's table."""
    rows = {row["optimizer"]: row for row in found["results"]}
    own = rows[f"{name}-total"]
    beside = {
        pair["against"]: pair["train"]["mean"][0] for pair in found["versus"] if pair["optimizer"] == own["optimizer"]
    }
    cells = [f"[{name}](../examples/gallery/{name}.py)", f"{own['steps']:,}", f"{own['parameters']:,}"]
    cells += [f"{own['train']:.3g}", f"{beside['directional-total']:.2g}"]
    cells += [f"{beside[other]:.2g} ({rows[other]['lr']:g})" for other in BASELINES.split(",")]
    cells += [f"1/{k}", f"{own['diverged']} of {own['runs']}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Build all, or some families."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help="which; all if none is given")
    parser.add_argument("--out", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--thin", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lines, verdicts = [], []
    for name in chosen.families:
        kept = chosen.out / name / "found.json"
        if not kept.is_file():
            rule = train(name, chosen.out, chosen.minutes, chosen.nproc)
            found, verdict = compare(name, rule, chosen.runs, chosen.thin)
            adam = next(row["train"] for row in found["results"] if row["optimizer"] == "adam")
            kept.write_text(json.dumps([found, verdict, shorter(name, rule, adam, chosen.runs)]), encoding="utf-8")
        found, verdict, k = json.loads(kept.read_text())
        lines.append(line(name, found, k))
        verdicts.append(f"- **{name}**, {verdict}")
        print(lines[-1], verdicts[-1], sep="\n", flush=True)
    lines += ["", *verdicts, "", *elsewhere(chosen.families, chosen.out, chosen.runs // 2), ""]
    (chosen.out / "tables.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
