"""The tasks of Open-L2O: sizes, initial weights, traps and their absence, and RNNprop's convex functions."""

import math

import numpy as np
import pytest
import torch

from l2o_training.tasks import ClippedConfig, OpenL2OConfig, make_task
from l2o_training.tasks.data import Dataset, load_dataset
from l2o_training.tasks.open_l2o import NETWORKS, SCALE

SIZES = {
    "mnist": 15_910,
    "mnist_relu": 15_910,
    "mnist_deeper": 16_330,
    "mnist_conv": 18_218,
    "cifar_conv": 13_706,
    "lenet_mnist": 44_470,
    "lenet": 62_050,
    "nas": 7_578,
}


def noise(name):
    """Images of a data set's size, all noise."""
    shape = (3, 32, 32) if "cifar10" in name else (1, 28, 28)
    rng = torch.Generator().manual_seed(len(name))
    return Dataset(torch.rand(64, *shape, generator=rng), torch.randint(10, (64,), generator=rng), 10)


def instances_of(config, count=2):
    return make_task(config, noise, torch.device("cpu")).instances(count, 3)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("original", [False, True])
def test_networks_are_as_large_as_published_and_begin_at_the_loss_of_a_guess(network, original):
    instances = instances_of(OpenL2OConfig(network=network, original=original, batch_size=8))
    assert instances.params.shape == (2, SIZES[network])
    weights = instances.params[instances.params != 0]
    if "conv" not in network and "lenet" not in network:  # BatchNorm's begin at 1
        assert 0.9 * SCALE < weights.std() < 1.1 * SCALE
    loss, grad = instances.value_and_grad(instances.params)
    assert (loss - math.log(10)).abs().max() < 0.3
    assert grad.isfinite().all()


def test_the_trap_is_in_the_original_alone():
    """Biases of the last layer far below zero: behind a ReLU nothing is left to learn from."""
    for original in (False, True):
        instances = instances_of(OpenL2OConfig(network="cifar_conv", original=original, batch_size=8))
        dead = instances.params.clone()
        dead[:, -10:] = -100.0
        loss, grad = instances.value_and_grad(dead)
        assert bool((grad == 0).all()) == original
        if original:
            torch.testing.assert_close(loss, torch.full((2,), math.log(10.0)))


def test_the_original_sees_the_test_split(tmp_path):
    images = {f"x_{split}": np.full((20, 32, 32, 3), value, np.uint8) for split, value in (("train", 1), ("test", 2))}
    labels = {f"y_{split}": np.arange(20) % 10 for split in ("train", "test")}
    np.savez(tmp_path / "cifar10.npz", **images, **labels)
    for original, value in ((False, 1), (True, 2)):
        name = OpenL2OConfig(network="cifar_conv", original=original).data
        assert load_dataset(name, tmp_path).images.unique().tolist() == [value]


def test_convex_functions_are_clipped_where_they_are_steep():
    instances = instances_of(ClippedConfig(size=4), count=3)
    (center,) = instances._batches()
    far = center + torch.tensor([0.0, 1.0, 3.0, 4.0])
    loss, grad = instances.value_and_grad(far)
    torch.testing.assert_close(loss, torch.full((3,), (0 + 1 + 9 + 10) / 4))
    torch.testing.assert_close(grad, torch.tensor([0.0, 2.0, 6.0, 0.0]).expand(3, 4) / 4)
    assert instances.params.abs().max() <= 1
    assert center.abs().max() <= 1
