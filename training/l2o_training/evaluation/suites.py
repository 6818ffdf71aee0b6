"""Suites: named lists of tasks on which rules are compared."""

from l2o_runtime.config import ConfigError, nearest
from l2o_training.tasks import ConvConfig, MLPConfig, QuadraticConfig, TaskConfig

SUITES: dict[str, tuple[str, tuple[TaskConfig, ...]]] = {
    "digits": (
        "small MLPs on scikit-learn's digits; needs no download",
        (
            MLPConfig(name="digits-1L", hidden=(20,), batch_size=64),
            MLPConfig(name="digits-2L", hidden=(20, 20), batch_size=64),
            MLPConfig(name="digits-relu", hidden=(20,), activation="relu", batch_size=64),
        ),
    ),
    "quadratics": (
        "random quadratics of 10 and 20 parameters",
        (QuadraticConfig(size=10), QuadraticConfig(size=20)),
    ),
    "table1": (
        "the six image tasks of L2O-DMD's Table 1 (arXiv 2211.16268)",
        (
            MLPConfig(name="MNIST-1L", data="mnist", hidden=(20,)),
            MLPConfig(name="MNIST-2L", data="mnist", hidden=(20, 20)),
            MLPConfig(name="MNIST-Batch", data="mnist", hidden=(20,), batch_size=16),
            MLPConfig(name="MNIST-RELU", data="mnist", hidden=(20,), activation="relu"),
            MLPConfig(name="FashionMNIST-1L", data="fashion-mnist", hidden=(20,)),
            MLPConfig(name="CIFAR10-1L", data="cifar10", hidden=(20,)),
        ),
    ),
    "architectures": (
        "MLPs and ConvNets that no preset is meta-trained on",
        (
            MLPConfig(name="MNIST-4L-tanh", data="mnist", hidden=(32, 32, 32, 32), activation="tanh"),
            MLPConfig(name="MNIST-wide-gelu", data="mnist", hidden=(128,), activation="gelu"),
            ConvConfig(name="MNIST-conv", data="mnist", channels=(8, 16)),
            ConvConfig(name="FashionMNIST-conv-3", data="fashion-mnist", channels=(8, 16, 16), activation="elu"),
            ConvConfig(name="CIFAR10-conv", data="cifar10", channels=(8, 16)),
            ConvConfig(
                name="FashionMNIST-conv-batch", data="fashion-mnist", channels=(12, 24), norm="batch", batch_size=64
            ),
        ),
    ),
}
"""Name → description and tasks."""

UNSEEN = "unseen"
"""The suite of `l2o_training.workloads`: ordinary networks in ordinary training loops."""

DESCRIPTIONS = {name: description for name, (description, _) in SUITES.items()} | {
    UNSEEN: "13 ordinary training scripts, from ConvNets to a VAE, that no preset is meta-trained on"
}
"""Name → description, of all suites."""


def find_suite(name: str) -> tuple[TaskConfig, ...]:
    """The tasks of a suite.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}: {nearest(name, list(DESCRIPTIONS))}")
    return SUITES[name][1]
