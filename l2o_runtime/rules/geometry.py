"""What sizes and shapes of tensors say of the steps of the directional rule, and how large parameters are beside them.

For torch's tensors and for the vectors of compiled code: see `l2o_runtime.rules.steering`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

SHARE = 0.25
"""Of the size of all parameters in that of a matrix, so that those that are zero move too."""

DRAWN = 1 / 12
"""Mean square of weights that are drawn, times the side of their matrix: a quarter of PyTorch's, whose root is half."""

FOREIGN = 10.0
"""Parameters that are so many times larger, or smaller, are in another unit."""

ROW = 5.0
"""Matrices in a row, without a norm in between, that steps are meant for: what each changes, the next multiplies."""

LEAST = 0.25
"""Steps are no shorter for that: adapters of a frozen network are many matrices without norms, and yet in no row."""

GAIN = 0.25
"""Mean square of a vector that is the gain of a norm: ones at first. Biases are drawn smaller, or zero."""

AGREEING = 0.05
"""Cosine above which gradients agree: below it steps are long enough."""

CHANCE = 0.5
"""Of n coordinates that cosine is at least this over √n: so much may be noise."""


class Geometry(NamedTuple):
    """What sizes and shapes alone say of tensors; as long as all have gradients it stays what it is.

    Attributes:
        count: (..., S) coordinates of each, at least 1.
        share: (..., S) float32, of all coordinates; 0 without a gradient on any rank.
        one, matrix: (..., S) and (S,) whether it is a scalar, or has two dimensions or more.
        part: (S,) float64, of the mean square of all parameters in its own.
        dimensions: (S,) float32, what the network sees of them.
        matrices: (..., 1) how many there are.
        drawn: (..., 1) a quarter of the mean square that parameters would have, had PyTorch drawn them.
        noise: (..., 1) float32, what the cosine of all may be by chance.
        chance: (..., S) float32, what that of a tensor may be.
        weight, mean: (..., S) what Σ θ² of each is multiplied by in the mean square of all, without scalars, and in the
            mean of all.
    """

    count: Any
    share: Any
    one: Any
    matrix: Any
    part: Any
    dimensions: Any
    matrices: Any
    drawn: Any
    noise: Any
    chance: Any
    weight: Any
    mean: Any


def geometry(size: Tensor, dimensions: Tensor) -> Geometry:
    """Of tensors of so many coordinates (..., S) float64, 0 without a gradient, and dimensions (S,) float32."""
    counted = (size > 1) | ~(size > 1).any(-1, keepdim=True)
    everything = size.where(counted, 0.0).sum(-1, keepdim=True).clamp_min(1)
    total = size.sum(-1, keepdim=True).clamp_min(1)
    matrix = dimensions > 1
    count = size.clamp_min(1)
    return Geometry(
        count=count,
        share=(size / total).float(),
        one=size == 1,
        matrix=matrix,
        part=1 + matrix.double() * (SHARE**2 - 1),
        dimensions=dimensions / 4,
        matrices=((size > 1) & matrix).sum(-1, keepdim=True).double(),
        drawn=DRAWN * size.sqrt().where(counted, 0.0).sum(-1, keepdim=True) / everything,
        noise=(CHANCE / total.sqrt()).float().clamp_min(AGREEING),
        chance=(CHANCE / count.sqrt()).float().clamp_min(AGREEING),
        weight=counted / everything,
        mean=(1 / total).expand_as(size),
    )


PLACES = ("first matrix", "between", "last matrix", "all else")
"""Of tensors among those of a model, in the order of the numbers that belong to them."""


class Ends(NamedTuple):
    """Which matrix is the first of a model, and which the last, (..., S) each; a single one is the last."""

    first: Any
    last: Any


def ends(size: Tensor, dimensions: Tensor) -> Ends:
    """Of tensors as in `geometry`, in the order in which the optimizer has them.

    >>> import torch
    >>> ends(torch.tensor([9.0, 3.0, 9.0, 9.0]), torch.tensor([2.0, 1.0, 2.0, 2.0])).last
    tensor([False, False, False,  True])
    """
    matrix = (size > 1) & (dimensions > 1)
    order = matrix.long().cumsum(-1)
    last = matrix & (order == matrix.sum(-1, keepdim=True))
    return Ends(matrix & (order == 1) & ~last, last)


def by_place(values: Sequence[Any], matrix: Any, ends: Ends) -> Any:
    """Of the values of all places that of each tensor's, (..., S).

    Args:
        values: in the order of `PLACES`.
        matrix: whether a tensor has two dimensions or more.
        ends: of the tensors.
    """
    first, inner, last, other = values
    return last.where(ends.last, first.where(ends.first, inner.where(matrix, other)))


def mean_squares(theta: Any, everything: Any, shapes: Geometry) -> tuple[Any, Any]:
    """The two of which ρ² is the sum: a tensor's mean square, and what counts of that of all; (..., S) each.

    Of a matrix the second is a sixteenth. Of a vector, such as the gains of norms, the first counts for no more than
    that of all. Scalars may have units of their own: that of all leaves them out where there is anything else.

    Had PyTorch drawn the parameters, as square matrices, a quarter of their mean square would be q = Σ √n_s / 12n. What
    that of all lacks of it is added to it and to a tensor's own: where all begin with zero, nothing else says how large
    they will be. That of all counts for no more than 100 q or a tensor's own if that is more, and of a scalar that is
    not zero for no more than a hundredfold its own: what is larger has another unit.

    Args:
        theta: (..., S) Σ θ² of each tensor.
        everything: (..., 1) mean square of all, without scalars.
        shapes: of the tensors.

    >>> import torch
    >>> theta, shapes = torch.tensor([0.0, 0.0, 100.0]), geometry(torch.tensor([36.0, 12.0, 1.0]), torch.ones(3))
    >>> sum(mean_squares(theta, (theta * shapes.weight).sum(), shapes)).sqrt().float()
    tensor([ 0.1813,  0.1813, 10.0008])
    """
    lacking = (shapes.drawn - everything).clamp_min(0.0)
    everything, own = everything + lacking, theta / shapes.count
    alone = shapes.one & (own > 0.0)
    own = own.where(alone, own + lacking)
    bound = (own * FOREIGN**2).where(alone, own.maximum(shapes.drawn * FOREIGN**2))
    first = own.where(shapes.matrix | alone, own.minimum(everything))
    return first, bound.minimum(everything) * shapes.part


def is_gain(theta: Any, shapes: Geometry, steps: Any, before: Any) -> Any:
    """1 for a vector that was the gain of a norm when it took its first step, else 0; (..., S) float32.

    Args:
        theta: (..., S) Σ θ² of each tensor.
        shapes: of the tensors.
        steps: (..., S) with this one in.
        before: (..., S) what it was before this step.
    """
    now = (theta / shapes.count).float()
    none = now * 0.0
    vector = none.where(shapes.matrix | shapes.one, (none + 1.0).where(now > GAIN, 0.0))
    return before.where(steps > 1.0, vector)


def shortened(gains: Any, shapes: Geometry) -> Any:
    """What steps are multiplied by where many matrices follow one another, (..., 1): 5 (g + 1) / L, within ¼ … 1.

    L matrices have L / (g + 1) in a row if g norms are spread among them. Shortcuts cannot be seen, but networks that
    have them mostly have norms as well.

    Args:
        gains: (..., 1) g.
        shapes: of the tensors.
    """
    return ((gains + 1.0) * ROW / shapes.matrices.clamp_min(1.0)).clamp_max(1.0).clamp_min(LEAST).float()
