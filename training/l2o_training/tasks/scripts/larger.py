"""Training scripts for verdicts on larger networks, of 175,000 to 11 million parameters."""

import pydoc_data.topics
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import nn

from l2o_training.tasks.data import Datasets, Load
from l2o_training.tasks.modules import Residual
from l2o_training.tasks.networks import CharGRU, CharTransformer
from l2o_training.tasks.scripts.base import Recipe, Script
from l2o_training.tasks.scripts.everyday.images import TRAIN, VALIDATION
from l2o_training.tasks.scripts.everyday.networks import Decoder
from l2o_training.tasks.scripts.everyday.texts import encoded, language_model, pieces
from l2o_training.tasks.scripts.images import cross_entropy, examples, reconstruction
from l2o_training.tasks.scripts.texts import next_character

LENGTH = 32
"""Characters of the help texts that a network sees at once."""


def vgg(norm: Callable[[int], nn.Module] = lambda channels: nn.Identity()) -> nn.Sequential:
    """Three convolutions with pooling, two linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10))


def block(channels: int) -> Residual:
    """Two convolutions with GroupNorm in front."""
    layers = [(nn.GroupNorm(4, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)]
    return Residual(*layers[0], *layers[1])


def resnet() -> nn.Sequential:
    """Patches of 4×4 pixels, three blocks of 48, 48 and 96 channels."""
    body = [nn.Conv2d(3, 48, 4, stride=4), block(48), block(48), nn.MaxPool2d(2), nn.Conv2d(48, 96, 1), block(96)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def deep_autoencoder() -> nn.Sequential:
    """784-256-32-256-784 with ReLU."""
    sizes = (784, 256, 32, 256, 784)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def photographs(load: Load, make_model: Callable[[], nn.Module], batch_size: int = 64) -> Script:
    """CIFAR-10 at its full size."""
    return Script(make_model, cross_entropy, *examples(load, "cifar10", 1, TRAIN, VALIDATION), batch_size)


def help_texts(make_model: Callable[[int], nn.Module]) -> Script:
    """The next character of the help texts that Python comes with, which differ a little from version to version."""
    codes, characters = encoded("".join(pydoc_data.topics.topics.values()))
    return Script(partial(make_model, characters), next_character, *pieces(codes, LENGTH), 32)


def vit(load: Load) -> Script:
    """Sixteen tokens, four blocks."""
    from torchvision.models import VisionTransformer

    sizes = {"num_layers": 4, "num_heads": 4, "hidden_dim": 96, "mlp_dim": 192}
    return photographs(load, partial(VisionTransformer, 32, 8, **sizes, num_classes=10))


def vgg_plain(load: Load) -> Script:
    """Without normalisation."""
    return photographs(load, vgg)


def vgg_batchnorm(load: Load) -> Script:
    """Biased convolutions before BatchNorm."""
    return photographs(load, partial(vgg, nn.BatchNorm2d))


def resnet_groupnorm(load: Load) -> Script:
    """Norms in front."""
    return photographs(load, resnet)


def transformer(_: Load) -> Script:
    """Three blocks of 128."""
    return help_texts(lambda characters: CharTransformer(characters, LENGTH, 128, 4, 3))


def gru(_: Load) -> Script:
    """One layer."""
    return help_texts(lambda characters: CharGRU(characters, 64, 192))


def autoencoder(load: Load) -> Script:
    """Squared error of pixels with mean 0 and deviation 1."""
    parts = examples(load, "fashion-mnist", 1, TRAIN, VALIDATION)
    return Script(deep_autoencoder, reconstruction, *parts, 128)


def shufflenet(load: Load) -> Script:
    """torchvision's, with BatchNorm."""
    from torchvision.models import shufflenet_v2_x0_5

    return photographs(load, partial(shufflenet_v2_x0_5, num_classes=10))


def squeezenet(load: Load) -> Script:
    """torchvision's, with dropout and without normalisation."""
    from torchvision.models import squeezenet1_1

    return photographs(load, partial(squeezenet1_1, num_classes=10))


def mobilenet(load: Load) -> Script:
    """torchvision's, with BatchNorm and dropout."""
    from torchvision.models import mobilenet_v2

    return photographs(load, partial(mobilenet_v2, num_classes=10), 32)


def resnet18(load: Load) -> Script:
    """torchvision's, with BatchNorm."""
    from torchvision import models

    return photographs(load, partial(models.resnet18, num_classes=10), 32)


def large_transformer(load: Datasets) -> Script:
    """Four blocks of 256 with dropout."""
    return language_model(load, lambda characters: Decoder(characters, 64, 256, 4, 4, 0.1), 4)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("vit-4x96", "vision transformer, 4 blocks of 96, CIFAR-10", vit, "cifar10"),
        Recipe("vgg", "3 convolutions and 2 linear layers, CIFAR-10", vgg_plain, "cifar10"),
        Recipe("vgg-batchnorm", "the same with BatchNorm, CIFAR-10", vgg_batchnorm, "cifar10"),
        Recipe("resnet-48", "3 residual blocks with GroupNorm, CIFAR-10", resnet_groupnorm, "cifar10"),
        Recipe("transformer-3x128", "causal transformer, 3 blocks of 128, Python's help texts", transformer),
        Recipe("gru-192", "GRU of 192 units, Python's help texts", gru),
        Recipe("deep-autoencoder", "784-256-32-256-784, squared error, Fashion-MNIST", autoencoder, "fashion-mnist"),
        Recipe("shufflenet", "ShuffleNet v2 × 0.5, CIFAR-10", shufflenet, "cifar10"),
        Recipe("squeezenet", "SqueezeNet 1.1, CIFAR-10", squeezenet, "cifar10"),
        Recipe("mobilenet", "MobileNet v2, CIFAR-10", mobilenet, "cifar10"),
        Recipe("resnet-18", "ResNet-18, 11 million parameters, CIFAR-10", resnet18, "cifar10"),
        Recipe(
            "transformer-4x256",
            "causal transformer, 4 blocks of 256, 3.2 million parameters, Shakespeare",
            large_transformer,
            "tinyshakespeare",
        ),
    )
}
"""Name → how the script is made."""
