"""What holds a step back: a gradient that is gone, or that is nothing but rounding.

A learned step is as long as the rule makes it, whatever the size of the gradient. Two kinds of coordinates must not
get such steps. Where there is no gradient any more (a frozen layer, a masked weight, the row of a word that is not
seen again), the step fades with the average of the gradients, as Adam's does. Where the gradient is rounding beside
that of the rest of the network (a bias in front of BatchNorm, the key biases of attention), the step is that of Adam
at its default learning rate, which goes no further than a random walk takes it.

The formula is written once, for tensors and for the vectors of `l2o_runtime.kernels.emit`.
"""

from typing import Any

FAINT = 0.01
"""A gradient this small beside the root of its mean square no longer carries a step by itself."""

SPENT = 0.1
"""Nor does an average of gradients this small; under noise it is about 0.23."""

LOWEST = 0.01
"""Below this share of the noise floor Adam's step fades, too: there float32 itself is the noise."""

ADAM_LR, ADAM_EPSILON = 1e-3, 1e-8
"""Of the step that coordinates get whose gradients are rounding (Kingma & Ba 2015); in weight decay, lr = 1 stands for
that learning rate."""


def restrain(delta: Any, gradient: Any, mean: Any, root: Any, noise: Any) -> Any:
    """a s Δ − (1 − s) f 0.001 m̂ / (√v̂ + 10⁻⁸): how alive a gradient is, a, and how far from rounding, s.

    a = min(1, (100 g/r)² + (10 m̂/r)²), s = min(1, max(0, r/noise − 1)), f = min(1, 100 r/noise), r = √v̂. Where the
    gradient is alive and more than twice the noise this is Δ, exactly.

    Args:
        delta: Δ (..., n), the learned step.
        gradient, mean: g/r and m̂/r (..., n).
        root: r (..., n), greater than 0.
        noise: (..., n) or what broadcasts to it: below this r a gradient is taken for rounding; 0 is never.

    >>> import torch
    >>> step, g, r = torch.ones(3), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1e-7])
    >>> restrain(step, g, torch.tensor([0.1, 0.01, 0.5]), r, torch.tensor(1e-6))
    tensor([ 1.0000e+00,  1.0000e-02, -4.5455e-04])
    """
    factor, other = share(gradient, mean, root, noise)
    return delta * factor + other


def share(gradient: Any, mean: Any, root: Any, noise: Any) -> tuple[Any, Any]:
    """What Δ is multiplied by in `restrain`, and what is added to it."""
    fresh, kept = gradient * (1 / FAINT), mean * (1 / SPENT)
    alive = (fresh * fresh + kept * kept).clamp(0.0, 1.0)
    times = root / noise
    sure, faded = (times - 1.0).clamp(0.0, 1.0), (times * (1 / LOWEST)).clamp(0.0, 1.0)
    adam = mean * (root / (root + ADAM_EPSILON)) * faded * -ADAM_LR
    return alive * sure, adam * (sure * -1.0 + 1.0)
