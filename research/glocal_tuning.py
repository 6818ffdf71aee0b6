"""What is a foretold hypergradient worth: its error, and rates that are tuned with it while a network trains?

Verdict: with minibatches no better than the mean of local hypergradients, as there is hardly ever a steady mode. Tuning
by either mends a rate that is far too small, to within 5 % of the best of 14; from one that is far too large a random
search of equal cost is better. Without noise, on logistic regression, the foretold one is ahead at a small tolerance.
On meta-gradients of a fixed learner it gains 0.02 in cosine, for ten times fewer updates.

    python research/glocal_tuning.py errors --data-root data --seeds 20
    python research/glocal_tuning.py settings --data-root data
    python research/glocal_tuning.py rates --data-root data --seeds 1 2 3
    python research/glocal_tuning.py cost
    python research/glocal_tuning.py meta --seeds 5 --steps 100

Networks are of 196-32-10 units, on images of 14 × 14 pixels (CIFAR-10: 768-32-10, 16 × 16 in three colours); batches
have 64. Rates are those of SGD with momentum 0.9.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.optim import SGD

from l2o_training.config import load_preset
from l2o_training.meta.estimators.glocal import foretell
from l2o_training.meta.trainer import Trainer
from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts.images import examples
from l2o_training.tune import GlocalTuner

RATES = [10 ** (k / 3 - 4) for k in range(14)]
"""1e-4 … 2.15."""

ESTIMATES = ("local", "mean", "glocal")


class Problem:
    """Images for training, for tuning and for the verdict, and a network."""

    def __init__(self, load: Datasets, data: str, seed: int, sizes: tuple[int, int, int] = (2000, 500, 1000)):
        self.train, (images, labels) = examples(load, data, 2, sizes[0], sizes[1] + sizes[2])
        self.tune, self.test = zip(images.split(sizes[1:]), labels.split(sizes[1:]), strict=True)
        torch.manual_seed(seed)
        inputs = self.train[0][0].numel()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 10))
        self.rng = torch.Generator().manual_seed(seed)

    def loss(self) -> Tensor:
        """Of the next minibatch."""
        index = torch.randint(len(self.train[0]), (64,), generator=self.rng)
        return F.cross_entropy(self.net(self.train[0][index]), self.train[1][index])

    def validation(self) -> Tensor:
        return F.cross_entropy(self.net(self.tune[0]), self.tune[1])

    @torch.no_grad()
    def verdict(self) -> tuple[float, float]:
        """Losses on what it is tuned on, and on what nobody has seen; infinite where a run has diverged."""
        losses = self.validation().item(), F.cross_entropy(self.net(self.test[0]), self.test[1]).item()
        return tuple(loss if math.isfinite(loss) else math.inf for loss in losses)


def fixed(problem: Problem, lr: float, steps: int) -> tuple[float, float]:
    optimizer = SGD(problem.net.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()
    return problem.verdict()


def tuned(problem: Problem, lr: float, steps: int, **settings) -> tuple[tuple[float, float], dict]:
    optimizer = SGD(problem.net.parameters(), lr=lr, momentum=0.9)
    tuner = GlocalTuner(optimizer, ("lr",), validation=problem.validation, **settings)
    for _ in range(steps):
        tuner.step(problem.loss())
    return problem.verdict(), tuner.health()


def table(*rows: tuple) -> None:
    for number, row in enumerate(rows):
        print("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) + " |", flush=True)
        if not number:
            print("|" + "---|" * len(row))


def mean_and_sd(values: list[float]) -> str:
    lost = sum(math.isinf(value) for value in values)
    if lost:
        return f"{lost} of {len(values)} diverged"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def rates(args, load: Datasets) -> None:
    """Final losses on unseen images: tuned from two starts, the best of a grid, and random search of equal cost."""
    settings = {name: vars(args)[name] for name in ("tau", "every", "meta_lr", "tolerance", "delay")}
    rows = [("data", "start", *ESTIMATES, "fixed at the start", "fallbacks", "last rate, glocal")]
    searches = [("data", "best of 14", "its rate", f"best of {args.draws} drawn")]
    for data in args.data:
        grids = [[fixed(Problem(load, data, seed), lr, args.steps) for lr in RATES] for seed in args.seeds]
        best = [min(zip(grid, RATES, strict=True)) for grid in grids]
        drawn = [statistics.fmean(min(pick)[1] for pick in itertools.combinations(grid, args.draws)) for grid in grids]
        chosen = ", ".join(f"{lr:.2g}" for _, lr in best)
        searches.append((data, mean_and_sd([loss[1] for loss, _ in best]), chosen, mean_and_sd(drawn)))
        for start in (RATES[3], RATES[11]):
            runs = {
                estimate: [
                    tuned(Problem(load, data, seed), start, args.steps, estimate=estimate, **settings)
                    for seed in args.seeds
                ]
                for estimate in ESTIMATES
            }
            alone = mean_and_sd([grid[RATES.index(start)][1] for grid in grids])
            health = [run[1] for run in runs["glocal"]]
            fallbacks = f"{sum(h['fallbacks'] for h in health)} of {sum(h['updates'] for h in health)}"
            last = ", ".join(f"{h['values']['lr'][0]:.2g}" for h in health)
            losses = [mean_and_sd([verdict[1] for verdict, _ in runs[estimate]]) for estimate in ESTIMATES]
            rows.append((data, f"{start:.2g}", *losses, alone, fallbacks, last))
    table(*rows)
    table(*searches)


def settings(args, load: Datasets) -> None:
    """τ, steps between hypergradients, tolerance and meta_lr, each by itself; seed 0, loss on what is tuned on."""
    base = {"tau": 10, "every": 1, "meta_lr": 0.3, "tolerance": 0.01}
    tries = {"tau": (5, 10, 20), "every": (2, 4), "tolerance": (0.003, 0.1), "meta_lr": (0.1, 1.0)}
    rows = [
        ("setting", *(f"{estimate} from {lr:.2g}" for lr in (RATES[3], RATES[11]) for estimate in ESTIMATES), "lost")
    ]
    for name, values in tries.items():
        for value in values:
            found, fallbacks = [], []
            for start, estimate in itertools.product((RATES[3], RATES[11]), ESTIMATES):
                chosen = base | {name: value, "estimate": estimate}
                loss, health = tuned(Problem(load, args.data[0], 0), start, args.steps, **chosen)
                found.append(loss[0])
                fallbacks.append(f"{health['fallbacks']}/{health['updates']}")
            rows.append((f"{name} {value}", *found, f"{fallbacks[2]}, {fallbacks[5]}"))
    table(*rows)


def curve(loss: Callable[[], Tensor], validation: Callable[[], Tensor], params, steps: int, **sgd) -> Tensor:
    """Hypergradients after 1 … `steps` steps, (steps, 2), by log lr and log weight decay, in full forward mode."""
    tuner = GlocalTuner(SGD(params, **sgd), ("lr", "weight_decay"), steps + 1, validation=validation)
    seen = []
    for _ in range(steps):
        tuner.step(loss())
        seen.append(tuner.hypergradient())
    return torch.stack(seen)


def logistic(seed: int, steps: int) -> Tensor:
    """Breast cancer, standardised, half of it for tuning; full batches."""
    inputs, labels = (torch.tensor(a, dtype=torch.float64) for a in load_breast_cancer(return_X_y=True))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)).chunk(2)
    torch.manual_seed(seed)
    line = nn.Linear(30, 1).double()
    loss, validation = (
        lambda k=k: F.binary_cross_entropy_with_logits(line(inputs[order[k]])[:, 0], labels[order[k]]) for k in (0, 1)
    )
    return curve(loss, validation, line.parameters(), steps, lr=0.1, weight_decay=0.01)


def network(load: Datasets, seed: int, steps: int, noisy: bool) -> Tensor:
    """MNIST; the full batch is one of 256."""
    problem = Problem(load, "mnist", seed, (2000 if noisy else 256, 500, 1))
    images, labels = problem.train
    loss = problem.loss if noisy else (lambda: F.cross_entropy(problem.net(images), labels))
    return curve(loss, problem.validation, problem.net.parameters(), steps, lr=0.1, weight_decay=0.01)


def errors(args, load: Datasets) -> None:
    """|estimate − truth| / |truth| by hyper-parameter, medians over seeds; the truth is that after all steps."""
    problems = {
        "logistic regression": lambda seed: logistic(seed, args.steps),
        "MLP, full batches": lambda seed: network(load, seed, args.steps, False),
        "MLP, minibatches": lambda seed: network(load, seed, args.steps, True),
    }
    rows = [("problem", "τ", "tolerance", *(f"{n}: {e}" for n in ("lr", "decay") for e in ESTIMATES), "fell back")]
    for name, make in problems.items():
        runs = [make(seed) for seed in range(args.seeds[0])]
        for tau, tolerance in itertools.product((30, 60), (0.003, 0.01, 0.03)):
            found = [foretell(run[:tau], tolerance) for run in runs]
            estimates = [
                torch.stack([run[tau - 1], run[:tau].mean(0), f.value]) for run, f in zip(runs, found, strict=True)
            ]
            error = torch.stack(
                [(e - run[-1]).abs() / run[-1].abs() for e, run in zip(estimates, runs, strict=True)]
            ).median(0)[0]
            lost = f"{sum(f.fell_back for f in found)} of {len(runs)}"
            rows.append((name, tau, str(tolerance), *error.T.flatten().tolist(), lost))
    table(*rows)


def entropy(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(inputs), labels)


def cost(args, load: Datasets | None = None) -> None:
    """CPU milliseconds of a step, medians over rounds that take turns."""
    del load
    rows = [("widths", "validation, every", "plain", *ESTIMATES, "glocal / local", "glocal / mean", "glocal / plain")]
    for widths, every, batch in (((196, 32), 1, 64), ((196, 32), 2, 500), ((784, 128), 1, 64), ((784, 128), 2, 500)):
        inputs, labels = torch.randn(564, widths[0]), torch.randint(10, (564,))
        contenders = {}
        for estimate in ("plain", *ESTIMATES):
            net = nn.Sequential(nn.Linear(*widths), nn.ReLU(), nn.Linear(widths[1], 10))
            loss = partial(entropy, net, inputs[:64], labels[:64])
            held = partial(entropy, net, inputs[-batch:], labels[-batch:])
            optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9)
            if estimate == "plain":

                def step(optimizer=optimizer, loss=loss) -> None:
                    optimizer.zero_grad()
                    loss().backward()
                    optimizer.step()

            else:
                tuner = GlocalTuner(optimizer, tau=args.tau, every=every, validation=held, estimate=estimate)
                step = lambda tuner=tuner, loss=loss: tuner.step(loss())  # noqa: E731
            contenders[estimate] = step, []
        for turn in range(args.rounds + 1):
            for step, times in contenders.values():
                start = time.process_time()
                for _ in range(args.tau * every):
                    step()
                if turn:
                    times.append((time.process_time() - start) / args.tau / every * 1e3)
        ms = [statistics.median(times) for _, times in contenders.values()]
        rows.append((f"{widths[0]}-{widths[1]}-10", f"{batch}, {every}", *ms, *(ms[3] / ms[k] for k in (1, 2, 0))))
    table(*rows)


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double(), b.double(), dim=0).item()


def episode(args, seed: int, unroll: int) -> Tensor:
    """Meta-gradients of the truncations of one episode, (truncations, P), by the same learner all the time."""
    config = load_preset("demo", [f"unroll={unroll}", f"horizon={args.steps}", f"seed={seed}", "batch=1"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder) / "run", data_root=args.data_root)
    return torch.stack([trainer.meta_gradient()[0] for _ in range(args.steps // unroll)])


def meta(args, load: Datasets) -> None:
    """Would it help `l2o train`? Cosines with the gradient through a whole episode, the learner fixed; means."""
    del load
    rows = [("steps of a truncation", "of all", "mean of τ", "glocal of τ", "fell back", "residual")]
    for unroll in (5, 10):
        found = []
        for seed in range(args.seeds[0]):
            local, (whole,) = episode(args, seed, unroll), episode(args, seed, args.steps)
            guess = foretell(local[: args.tau], args.tolerance)
            estimates = local.mean(0), local[: args.tau].mean(0), guess.value
            found.append([*(cosine(e, whole) for e in estimates), float(guess.fell_back), guess.residual])
        rows.append((unroll, *(statistics.fmean(values) for values in zip(*found, strict=True))))
    table(*rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = {"errors": errors, "settings": settings, "rates": rates, "cost": cost, "meta": meta}
    parser.add_argument("question", choices=questions)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion-mnist"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of errors: how many")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tau", type=int, default=10)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--meta-lr", type=float, default=1.0)
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--delay", type=int, help="steps of the embedding; half of tau otherwise")
    parser.add_argument("--draws", type=int, default=6, help="runs of random search, as many as a tuned one costs")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*no steady mode")  # it is counted
    questions[args.question](args, Datasets(args.data_root))


if __name__ == "__main__":
    main()
