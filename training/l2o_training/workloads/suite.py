"""The suite `unseen`: what no preset is meta-trained on."""

from collections.abc import Callable, Iterable
from types import ModuleType

from l2o_runtime.config import nearest, require
from l2o_training.tasks import data as reading
from l2o_training.workloads import base, images, networks, tables, texts
from l2o_training.workloads.base import Load, Problem, Workload

FASHION, CIFAR = "fashion-mnist", "cifar10"


def _workload(
    name: str, description: str, module: ModuleType, build: Callable[[Load], Problem], data: str | None = None
) -> Workload:
    modules = (base, networks, module, *([reading] if data else []))
    return Workload(name=name, description=description, build=build, data=data, modules=modules)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _workload("deep-mlp", "8 ReLU layers of 32, Fashion-MNIST 14 × 14", images, images.deep_mlp, FASHION),
        _workload("convnet", "3 convolutions, CIFAR-10 16 × 16", images, images.convnet, CIFAR),
        _workload(
            "convnet-batchnorm",
            "2 convolutions with biases and BatchNorm, Fashion-MNIST 28 × 28",
            images,
            images.convnet_batchnorm,
            FASHION,
        ),
        _workload(
            "resnet-groupnorm",
            "3 residual blocks with GroupNorm, CIFAR-10 16 × 16",
            images,
            images.resnet_groupnorm,
            CIFAR,
        ),
        _workload("vit", "vision transformer, 2 blocks, Fashion-MNIST 28 × 28", images, images.vit, FASHION),
        _workload("mlp-mixer", "MLP-Mixer, 2 blocks, CIFAR-10 16 × 16", images, images.mixer, CIFAR),
        _workload("char-transformer", "causal transformer, 2 blocks, text of a grammar", texts, texts.transformer),
        _workload("char-gru", "GRU of 48 units, text of a grammar", texts, texts.gru),
        _workload(
            "autoencoder",
            "196-64-8-64-196, squared error, Fashion-MNIST 14 × 14",
            images,
            images.autoencoder,
            FASHION,
        ),
        _workload("vae", "variational autoencoder, latent 8, Fashion-MNIST 14 × 14", images, images.vae, FASHION),
        _workload(
            "matrix-factorisation",
            "embeddings of 300 users and 200 items, 19,000 ratings",
            tables,
            tables.factorisation,
        ),
        _workload("tabular", "numbers and categories, 2 SiLU layers, regression", tables, tables.tabular),
        _workload("least-squares", "linear regression, condition 10⁴", tables, tables.least_squares),
    )
}
"""Name → workload."""


def find_workloads(names: Iterable[str]) -> list[Workload]:
    """The workloads of those names, each once and in the suite's order; all of them for none.

    Raises:
        ConfigError: an unknown one.
    """
    wanted = set(names)
    for name in wanted:
        require(name in WORKLOADS, f"--task {name}: {nearest(name, list(WORKLOADS))}")
    return [workload for name, workload in WORKLOADS.items() if not wanted or name in wanted]
