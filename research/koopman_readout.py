"""Is where a window of steps comes to rest a better read-out than the parameters, or their averages?

Verdict: on least squares and matrix factorisation, ill-conditioned and without noise, twelve and three times lower, and
better than both averages; on a SIREN by an eighth. Elsewhere within 4 % of the parameters, but for a PINN, whose loss
is a third higher there. With minibatches it is as good as the mean of the last tenth, and no better.

    python research/koopman_readout.py --seeds 1 2 3 4 5

Adam at one constant rate, and no jumps. After 300, 400, 500 and 600 steps the loss of all examples is taken at the
parameters, at their exponential average (0.99), at the mean of the last tenth of the steps so far, and within
`KoopmanAccelerated.averaged()`. Tasks are those of `koopman_acceleration.py`; two have minibatches of 32, too.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from koopman_acceleration import BEST, TASKS, cancer, digits
from torch import Tensor, nn
from torch.optim import Adam

from l2o_runtime.wrappers.koopman import KoopmanAccelerated

STEPS = 600
ENDS = (300, 400, 500, 600)
READOUTS = ("exponential average", "mean of the last tenth", "steady state")

Loss = Callable[[], Tensor]


def logistic(rng: torch.Generator) -> tuple[nn.Module, Loss, Loss]:
    """Breast cancer."""
    (inputs, labels), line = cancer(), nn.Linear(30, 1)

    def loss(index: Tensor) -> Tensor:
        decay = 1e-3 * line.weight.square().sum()
        return F.binary_cross_entropy_with_logits(line(inputs[index])[:, 0], labels[index]) + decay

    return line, *sampled(loss, len(labels), rng)


def autoencoder(rng: torch.Generator) -> tuple[nn.Module, Loss, Loss]:
    """All digits."""
    images, net = digits()
    return net, *sampled(lambda index: F.mse_loss(net(images[index]), images[index]), len(images), rng)


def sampled(loss: Callable[[Tensor], Tensor], count: int, rng: torch.Generator) -> tuple[Loss, Loss]:
    """The losses of a minibatch, and of all examples."""
    every = torch.arange(count)
    return lambda: loss(torch.randint(count, (32,), generator=rng)), lambda: loss(every)


NOISY = {"logistic regression, minibatches": (logistic, 0.03), "autoencoder, minibatches": (autoencoder, 0.01)}
"""Task and rate of Adam."""


@contextmanager
def placed(params: list[Tensor], at: list[Tensor]) -> Iterator[None]:
    """Within it parameters are elsewhere."""
    kept = [param.detach().clone() for param in params]
    with torch.no_grad():
        torch._foreach_copy_(params, at)
    yield
    with torch.no_grad():
        torch._foreach_copy_(params, kept)


def ratios(name: str, seed: int) -> dict[str, list[float]]:
    """Read-out → loss at every end, over that of the parameters."""
    torch.manual_seed(seed)
    if name in NOISY:
        make, lr = NOISY[name]
        net, loss, whole = make(torch.Generator().manual_seed(seed))
        params = list(net.parameters())
    else:
        params, whole = TASKS[name](seed)
        loss, lr = whole, BEST[name]
    optimizer = KoopmanAccelerated(Adam(params, lr), every=10**6)
    smooth, seen, found = [param.detach().clone() for param in params], [], {name: [] for name in READOUTS}
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step(loss=value)
        torch._foreach_lerp_(smooth, [param.detach() for param in params], 0.01)
        seen.append([param.detach().clone() for param in params])
        if step in ENDS:
            own, tail = whole().item(), seen[-step // 10 :]
            mean = [torch.stack(each).mean(0) for each in zip(*tail, strict=True)]
            contexts = (placed(params, smooth), placed(params, mean), optimizer.averaged())
            for readout, context in zip(READOUTS, contexts, strict=True):
                with context:
                    found[readout].append(whole().item() / own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| | " + " | ".join(READOUTS) + " |\n|---|" + "---:|" * len(READOUTS))
    for name in (*TASKS, *NOISY):
        runs = [ratios(name, seed) for seed in args.seeds]
        means = [statistics.geometric_mean(ratio for run in runs for ratio in run[who]) for who in READOUTS]
        print(f"| {name} | " + " | ".join(f"{mean:.3g}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main()
