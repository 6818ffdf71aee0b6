"""Everyday scripts on tables: diamonds, scikit-learn's bundled sets, and Friedman's function."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks.data import Datasets, Load
from l2o_training.tasks.records import Table
from l2o_training.tasks.scripts.base import Batch, Script
from l2o_training.tasks.scripts.everyday import networks
from l2o_training.tasks.scripts.images import cross_entropy
from l2o_training.tasks.scripts.tables import split, squared_error

Pair = tuple[Tensor, Tensor]


def shuffled(features: Tensor, target: Tensor) -> Pair:
    """Rows in an order of their own, the same every time."""
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    return features[order], target[order]


def standardised(values: Tensor) -> Tensor:
    """Columns of mean 0 and deviation 1."""
    return (values - values.mean(0)) / values.std(0)


def arrays(features: object, target: object) -> Pair:
    """scikit-learn's arrays as tensors."""
    return torch.tensor(features, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)


def huber(model: nn.Module, batch: Batch) -> Tensor:
    """Huber loss of one output."""
    features, target = batch
    return F.huber_loss(model(features).squeeze(-1), target)


def binary(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of one logit."""
    features, target = batch
    return F.binary_cross_entropy_with_logits(model(features).squeeze(-1), target)


def friedman(_: Load) -> Script:
    """Ten features, five of which count; the target as it comes, from 0 to 30, with a little noise."""
    from sklearn.datasets import make_friedman1

    data = arrays(*make_friedman1(n_samples=5000, noise=0.1, random_state=0))
    return Script(partial(networks.mlp, (10, 100, 100, 1), nn.ReLU), huber, *split(data, 500), 64)


def one_hot(table: Table, *names: str) -> Tensor:
    """A column for each value of some categories."""
    return torch.cat([F.one_hot(table.categories[name]) for name in names], 1).float()


def numbers(table: Table, *names: str) -> Tensor:
    """Columns of numbers, as they stand in the table."""
    return torch.stack([table.numbers[name] for name in names], 1)


def columns(table: Table, *names: str) -> Tensor:
    """Columns of numbers, standardised."""
    return standardised(numbers(table, *names))


def prices(load: Datasets) -> Script:
    """The logarithm of the price, standardised, from all else."""
    table = load.table("diamonds")
    features = torch.cat(
        [columns(table, "carat", "depth", "table", "x", "y", "z"), one_hot(table, "cut", "color", "clarity")], 1
    )
    data = shuffled(features, standardised(table.numbers["price"].log()))
    make = partial(networks.mlp, (features.shape[1], 64, 64, 1), nn.ReLU, norm=True, dropout=0.1)
    return Script(make, squared_error, *split(data, 4096), 128)


def raw_prices(load: Datasets) -> Script:
    """The same without dropout and norms, from numbers as they stand in the table: carats beside percents."""
    table = load.table("diamonds")
    features = torch.cat(
        [numbers(table, "carat", "depth", "table", "x", "y", "z"), one_hot(table, "cut", "color", "clarity")], 1
    )
    data = shuffled(features, standardised(table.numbers["price"].log()))
    make = partial(networks.mlp, (features.shape[1], 64, 64, 1), nn.ReLU)
    return Script(make, squared_error, *split(data, 4096), 128)


def cuts(load: Datasets) -> Script:
    """The quality of the cut, from all else."""
    table = load.table("diamonds")
    features = torch.cat(
        [columns(table, "carat", "depth", "table", "price", "x", "y", "z"), one_hot(table, "color", "clarity")], 1
    )
    data = shuffled(features, table.categories["cut"])
    classes = int(data[1].max()) + 1
    return Script(
        partial(networks.mlp, (features.shape[1], 64, 64, classes), nn.ReLU), cross_entropy, *split(data, 4096), 128
    )


def diabetes(_: Load) -> Script:
    """442 patients: dropout keeps the network from learning them by heart."""
    from sklearn.datasets import load_diabetes

    features, target = shuffled(*arrays(*load_diabetes(return_X_y=True)))
    data = standardised(features), standardised(target)
    make = partial(networks.mlp, (10, 64, 32, 1), nn.ReLU, dropout=0.2)
    return Script(make, squared_error, *split(data, 90), 32)


def logistic(_: Load) -> Script:
    """Breast cancer; features between 0 and 1, not centred and alike, so that the Hessian is ill-conditioned."""
    from sklearn.datasets import load_breast_cancer

    features, target = shuffled(*arrays(*load_breast_cancer(return_X_y=True)))
    data = features / features.amax(0), target
    return Script(partial(nn.Linear, 30, 1), binary, *split(data, 113), 32)


def raw_cancer(_: Load) -> Script:
    """Breast cancer; features as they are measured, deviations from 0.003 to 570."""
    from sklearn.datasets import load_breast_cancer

    data = shuffled(*arrays(*load_breast_cancer(return_X_y=True)))
    return Script(partial(networks.mlp, (30, 32, 32, 1), nn.ReLU), binary, *split(data, 114), 32)


UNITS = (0.05, 0.3, 1.0, 0.02, 5.0, 20.0)
"""What six features are multiplied by."""


def units(_: Load) -> Script:
    """Six features in units of their own; what is small counts for as much as what is large."""
    rng = torch.Generator().manual_seed(5)
    x = torch.rand(4000, len(UNITS), generator=rng) - 0.5
    target = torch.sin(24 * x[:, 0] * x[:, 1]) + 4 * x[:, 2].square() + x[:, 3] + 0.3 * torch.randn(4000, generator=rng)
    data = x * torch.tensor(UNITS), standardised(target)
    return Script(partial(networks.mlp, (len(UNITS), 64, 64, 1), nn.SiLU), squared_error, *split(data, 400), 64)


def digits(make: Callable[[], nn.Module]) -> Script:
    """Digits of 8 × 8 pixels."""
    from sklearn.datasets import load_digits

    pixels, target = arrays(*load_digits(return_X_y=True))
    return Script(make, cross_entropy, *split(shuffled(pixels / 16, target.long()), 297), 64)


def softmax(_: Load) -> Script:
    """A linear model can nearly tell digits apart, with weights that have far to go."""
    return digits(partial(nn.Linear, 64, 10))


def deep(_: Load) -> Script:
    """Eighteen layers without norms or shortcuts: what weights gain in each multiplies."""
    return digits(partial(networks.plain, (64, *[48] * 17, 10)))
