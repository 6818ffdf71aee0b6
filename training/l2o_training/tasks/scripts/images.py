"""Training scripts on images: Fashion-MNIST and CIFAR-10, scaled down so that a step takes milliseconds."""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_training.tasks import modules
from l2o_training.tasks.data import DataError, Load
from l2o_training.tasks.scripts.base import Batch, Script

TRAIN, VALIDATION = 8192, 512
"""Examples, drawn from the training split of the data set."""

FEWEST = 2 * 1024
"""Examples that a data set has to have; where there are fewer than wanted, fewer are trained on."""


@lru_cache(4)  # scripts on the same images share them
def examples(
    load: Load, name: str, shrink: int, train: int = TRAIN, validation: int = VALIDATION
) -> tuple[Batch, Batch]:
    """Images (N, c, h, w) with mean 0 and deviation 1 over all pixels, and labels: those to train and to validate on.

    Args:
        load: gives the data set.
        name: of the data set.
        shrink: side of the squares of pixels that are averaged.
        train, validation: how many of each.

    Raises:
        DataError: the data set is missing, or has other images than expected.
    """
    data = load(name)
    channels, side = (3, 32) if name == "cifar10" else (1, 28)
    if data.shape != (channels, side, side) or len(data.labels) < FEWEST:
        raise DataError(
            f"{name}: expected {FEWEST} or more images of shape {(channels, side, side)}, "
            f"got {len(data.labels)} of shape {data.shape}"
        )
    count = min(train + validation, len(data.labels))
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:count]
    images, labels = data.batch(order)
    images = F.avg_pool2d(images, shrink)
    images = (images - images.mean()) / images.std()
    return (images[validation:], labels[validation:]), (images[:validation], labels[:validation])


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Of logits and labels."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def classify(load: Load, make_model: Callable[[], nn.Module], name: str, shrink: int, batch_size: int) -> Script:
    """Classification with cross-entropy."""
    train, validation = examples(load, name, shrink)
    return Script(make_model, cross_entropy, train, validation, batch_size)


def pixels(train: Batch, validation: Batch) -> tuple[Batch, Batch]:
    """Images with pixels in 0 … 1, without labels."""
    low, high = train[0].min(), train[0].max()
    scaled = [((images - low) / (high - low)).clamp(0, 1) for images, *_ in (train, validation)]
    return (scaled[0],), (scaled[1],)


def reconstruction(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error per pixel."""
    return F.mse_loss(model(batch[0]), batch[0].flatten(1))


def negative_elbo(model: nn.Module, batch: Batch) -> Tensor:
    """Bernoulli reconstruction and KL divergence to N(0, 1), in nats per pixel.

    Source: Kingma & Welling 2014, equation 10.
    """
    target = batch[0].flatten(1)
    logits, mean, log_variance = model(batch[0])
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
    return F.binary_cross_entropy_with_logits(logits, target) + divergence / target.shape[1]  # type: ignore[no-any-return]


def deep_mlp(load: Load) -> Script:
    """Eight hidden layers, as deep as plain ReLU networks train at all."""
    return classify(load, partial(modules.deep_mlp, 196, 32, 8, 10), "fashion-mnist", 2, 64)


def convnet(load: Load) -> Script:
    """Three convolutions without normalisation."""
    return classify(load, partial(modules.convnet, (16, 32, 32), 10), "cifar10", 2, 32)


def convnet_batchnorm(load: Load) -> Script:
    """Two convolutions with BatchNorm, as most people write them."""
    return classify(load, partial(modules.convnet_batchnorm, (12, 24), 28, 10), "fashion-mnist", 1, 64)


def resnet_groupnorm(load: Load) -> Script:
    """Three residual blocks."""
    return classify(load, partial(modules.resnet, 8, 10), "cifar10", 2, 16)


def vit(load: Load) -> Script:
    """Sixteen tokens of 7 × 7 pixels."""
    return classify(load, partial(modules.ViT, 1, 28, 7, 32, 4, 2, 10), "fashion-mnist", 1, 16)


def mixer(load: Load) -> Script:
    """Sixteen tokens of 4 × 4 pixels."""
    return classify(load, partial(modules.Mixer, 3, 16, 4, 32, 2, 10), "cifar10", 2, 16)


def autoencoder(load: Load) -> Script:
    """196 pixels through a code of eight numbers."""
    return Script(
        partial(modules.autoencoder, 196, 64, 8), reconstruction, *pixels(*examples(load, "fashion-mnist", 2)), 64
    )


def vae(load: Load) -> Script:
    """196 pixels through a noisy code of eight numbers."""
    return Script(partial(modules.VAE, 196, 64, 8), negative_elbo, *pixels(*examples(load, "fashion-mnist", 2)), 64)
