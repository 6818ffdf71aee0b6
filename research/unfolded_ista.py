"""ISTA with a learned step size per layer, here (`step-lista`) and in deepinv, which makes such layers of its parts.

Both start from 1/L for every layer, see the same problems, and are trained by Adam on the squared error of x. Printed
are how far apart what they recover is before and after that, and the time of a forward pass and of an update, in turns.
deepinv has to be installed beside this package: pip install deepinv

    python research/unfolded_ista.py --threads 1
"""

import argparse
import time
from statistics import median

import deepinv
import torch
from torch import Tensor, nn

from l2o_runtime.solvers.analytic import lipschitz
from l2o_runtime.solvers.unrolled import UnrolledConfig, UnrolledSolver

ROWS, COLUMNS, LAYERS, WEIGHT, CHANCE = 256, 512, 16, 0.1, 0.1


class Theirs(nn.Module):
    """deepinv's proximal gradient descent on ½‖A x − b‖² + λ‖x‖₁, unfolded, with a step size per iteration."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.physics = deepinv.physics.LinearPhysics(A=lambda x, **_: x @ matrix.T, A_adjoint=lambda b, **_: b @ matrix)
        self.model = deepinv.optim.PGD(
            data_fidelity=deepinv.optim.data_fidelity.L2(),
            prior=deepinv.optim.prior.L1Prior(),
            stepsize=[float(1 / lipschitz(matrix))] * LAYERS,
            lambda_reg=WEIGHT,
            max_iter=LAYERS,
            unfold=True,
            trainable_params=["stepsize"],
            custom_init=lambda b, physics: b.new_zeros(*b.shape[:-1], COLUMNS),
        )

    def forward(self, b: Tensor) -> Tensor:
        """x for b."""
        found: Tensor = self.model(b, physics=self.physics)
        return found


def problems(matrix: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sparse x, and b = A x."""
    there = torch.rand(count, COLUMNS, generator=rng) < CHANCE
    x = torch.randn(count, COLUMNS, generator=rng) * there
    return x, x @ matrix.T


def main() -> None:
    """Print all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = torch.Generator().manual_seed(0)
    matrix = nn.functional.normalize(torch.randn(ROWS, COLUMNS, generator=rng), dim=0)
    ours = UnrolledSolver(
        UnrolledConfig(cell="step-lista", rows=ROWS, columns=COLUMNS, layers=LAYERS, shrinkage=WEIGHT)
    )
    ours.fit_to(matrix)
    models = {"l2o": ours, "deepinv": Theirs(matrix)}
    x, b = problems(matrix, 1000, rng)

    @torch.no_grad()
    def told(when: str) -> None:
        found = [model(b) for model in models.values()]
        apart = float((found[0] - found[1]).norm() / found[0].norm())
        errors = [f"{10 * float((one - x).square().sum().div(x.square().sum()).log10()):.2f} dB" for one in found]
        print(f"{when}: NMSE {', '.join(errors)}; apart by {apart:.1e}")

    print(f"deepinv {deepinv.__version__}, torch {torch.__version__}, {args.threads} threads; of l2o and of deepinv:")
    told("before training")
    seeds = [torch.Generator().manual_seed(1) for _ in models]
    for model, seed in zip(models.values(), seeds, strict=True):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.003)
        for _ in range(args.updates):
            goal, measured = problems(matrix, 64, seed)
            loss = (model(measured) - goal).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    told(f"after {args.updates} updates")
    for count in (1, 64, 1024):
        goal, measured = problems(matrix, count, rng)
        spent: dict[tuple[str, str], list[float]] = {}
        for _ in range(args.rounds):
            for name, model in models.items():
                started = time.perf_counter()
                with torch.no_grad():
                    model(measured)
                middle = time.perf_counter()
                (model(measured) - goal).square().sum(-1).mean().backward()
                spent.setdefault((name, "forward"), []).append(middle - started)
                spent.setdefault((name, "forward and backward"), []).append(time.perf_counter() - middle)
        times = {key: 1e3 * median(found) for key, found in spent.items()}
        for what in ("forward", "forward and backward"):
            mine, other = times["l2o", what], times["deepinv", what]
            print(f"{count} at once, {what}: {mine:.2f} and {other:.2f} ms, {other / mine:.2f} times as long")


if __name__ == "__main__":
    main()
