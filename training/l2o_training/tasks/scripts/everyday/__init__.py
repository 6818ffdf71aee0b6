"""Training scripts for choices: what people train every day, as they write it, most of it on real data."""

from l2o_training.tasks.scripts.base import Recipe
from l2o_training.tasks.scripts.everyday import fields, images, tables, texts

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("friedman-mlp", "MLP 10-100-100-1, Huber loss, Friedman #1", tables.friedman),
        Recipe("lenet", "LeNet-5 with tanh, MNIST", images.lenet, "mnist"),
        Recipe(
            "resnet-batchnorm",
            "3 residual blocks, biased convolutions before BatchNorm, CIFAR-10 16 × 16",
            images.resnet,
            "cifar10",
        ),
        Recipe("convnext", "3 ConvNeXt blocks, CIFAR-10 16 × 16", images.convnext, "cifar10"),
        Recipe("char-lstm", "LSTM of 128 units with dropout, Shakespeare", texts.lstm, "tinyshakespeare"),
        Recipe(
            "transformer-2x64", "causal transformer, 2 blocks of 64, Shakespeare", texts.transformer, "tinyshakespeare"
        ),
        Recipe(
            "transformer-4x128",
            "causal transformer, 4 blocks of 128 with dropout, Shakespeare",
            texts.larger_transformer,
            "tinyshakespeare",
        ),
        Recipe("diamond-prices", "MLP with BatchNorm and dropout, regression", tables.prices, "diamonds"),
        Recipe("raw-prices", "MLP, regression on features that are not standardised", tables.raw_prices, "diamonds"),
        Recipe("diamond-cuts", "MLP of 2 layers, 5 classes", tables.cuts, "diamonds"),
        Recipe("diabetes", "MLP with dropout, regression, scikit-learn's diabetes", tables.diabetes),
        Recipe("logistic", "logistic regression, features not centred, breast cancer", tables.logistic),
        Recipe("raw-cancer", "MLP, breast cancer, features that are not standardised", tables.raw_cancer),
        Recipe("units", "MLP, regression on six features, each in its unit", tables.units),
        Recipe("deep-relu", "18 plain ReLU layers, He's initialisation, scikit-learn's digits", tables.deep),
        Recipe("softmax", "softmax regression, scikit-learn's digits", tables.softmax),
        Recipe(
            "trigrams",
            "linear model of three characters, all zero at first, Shakespeare",
            texts.trigrams,
            "tinyshakespeare",
        ),
        Recipe("word-vectors", "GloVe: word co-occurrences factorised, Shakespeare", texts.glove, "tinyshakespeare"),
        Recipe("conv-autoencoder", "convolutions, code of 32, Fashion-MNIST", images.autoencoder, "fashion-mnist"),
        Recipe("mnist-vae", "variational autoencoder 784-200-20, MNIST", images.vae, "mnist"),
        Recipe("bandit", "REINFORCE on guessed classes, Fashion-MNIST 14 × 14", images.bandit, "fashion-mnist"),
        Recipe("siren", "sines fit to a photograph of 64 × 64", fields.siren),
        Recipe("oscillation", "four scalars of a damped oscillation, each in its unit", fields.oscillation),
        Recipe("heat-pinn", "physics-informed network, heat equation", fields.heat),
    )
}
"""Name → how the script is made."""
