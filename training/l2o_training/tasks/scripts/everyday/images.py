"""Everyday scripts on images: classifiers, autoencoders, and a policy that learns from the cost of its guesses."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.distributions import Categorical

from l2o_training.tasks.data import Load
from l2o_training.tasks.modules import VAE
from l2o_training.tasks.scripts.base import Batch, Script
from l2o_training.tasks.scripts.everyday import networks
from l2o_training.tasks.scripts.images import cross_entropy, examples, negative_elbo, pixels, reconstruction

TRAIN, VALIDATION = 20_480, 1024

ENTROPY = 0.01
"""Weight of the policy's entropy, in nats."""


def classify(load: Load, make_model: Callable[[], nn.Module], name: str, shrink: int, batch_size: int) -> Script:
    """Classification with cross-entropy."""
    return Script(make_model, cross_entropy, *examples(load, name, shrink, TRAIN, VALIDATION), batch_size)


def lenet(load: Load) -> Script:
    """The oldest of them."""
    return classify(load, networks.lenet, "mnist", 1, 64)


def resnet(load: Load) -> Script:
    """BatchNorm takes the convolutions' biases off again; running statistics serve on validation."""
    return classify(load, partial(networks.resnet, 16, 10), "cifar10", 2, 32)


def convnext(load: Load) -> Script:
    """Blocks of the kind that came after ResNets."""
    return classify(load, partial(networks.convnext, 40, 3, 10), "cifar10", 2, 32)


def autoencoder(load: Load) -> Script:
    """Pixels of mean 0 and deviation 1."""
    parts = examples(load, "fashion-mnist", 1, TRAIN, VALIDATION)
    return Script(partial(networks.conv_autoencoder, 32), reconstruction, *parts, 64)


def image_elbo(model: nn.Module, batch: Batch) -> Tensor:
    """Negative evidence bound in nats per image."""
    return batch[0][0].numel() * negative_elbo(model, batch)


def vae(load: Load) -> Script:
    """PyTorch's example, with half of its units."""
    parts = pixels(*examples(load, "mnist", 1, TRAIN, VALIDATION))
    return Script(partial(VAE, 784, 200, 20), image_elbo, *parts, 64)


def policy_gradient(model: nn.Module, batch: Batch) -> Tensor:
    """Share of guesses, drawn from the policy, that are wrong; in evaluation mode what is expected of it.

    Nobody tells the right class, so that the gradient is REINFORCE's with the mean cost as baseline and the entropy
    as bonus; the value is the mean cost alone.

    Source: Williams 1992.
    """
    images, labels = batch
    policy = Categorical(logits=model(images))
    if not model.training:
        return 1 - policy.probs.gather(1, labels[:, None]).mean()
    guesses = policy.sample()  # type: ignore[no-untyped-call]
    costs = (guesses != labels).float()
    likelihood = policy.log_prob(guesses)  # type: ignore[no-untyped-call]
    entropy = policy.entropy()  # type: ignore[no-untyped-call]
    surrogate = ((costs - costs.mean()) * likelihood - ENTROPY * entropy).mean()
    return costs.mean() + surrogate - surrogate.detach()  # type: ignore[no-any-return]


def bandit(load: Load) -> Script:
    """A contextual bandit: ten arms, one of which is right."""
    parts = examples(load, "fashion-mnist", 2, TRAIN, VALIDATION)
    return Script(partial(networks.mlp, (196, 64, 10), nn.ReLU), policy_gradient, *parts, 64)
