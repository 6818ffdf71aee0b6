"""Training scripts: ordinary networks in ordinary loops, which no meta-training has seen.

Those of the suite `unseen` are named here; `everyday`, `heldout` and `larger` have their own lists.
"""

from l2o_training.tasks.scripts import images, tables, texts
from l2o_training.tasks.scripts.base import Recipe

FASHION, CIFAR = "fashion-mnist", "cifar10"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("deep-mlp", "8 ReLU layers of 32, Fashion-MNIST 14 × 14", images.deep_mlp, FASHION),
        Recipe("convnet", "3 convolutions, CIFAR-10 16 × 16", images.convnet, CIFAR),
        Recipe(
            "convnet-batchnorm",
            "2 convolutions with biases and BatchNorm, Fashion-MNIST 28 × 28",
            images.convnet_batchnorm,
            FASHION,
        ),
        Recipe(
            "resnet-groupnorm", "3 residual blocks with GroupNorm, CIFAR-10 16 × 16", images.resnet_groupnorm, CIFAR
        ),
        Recipe("vit", "vision transformer, 2 blocks, Fashion-MNIST 28 × 28", images.vit, FASHION),
        Recipe("mlp-mixer", "MLP-Mixer, 2 blocks, CIFAR-10 16 × 16", images.mixer, CIFAR),
        Recipe("char-transformer", "causal transformer, 2 blocks, text of a grammar", texts.transformer),
        Recipe("char-gru", "GRU of 48 units, text of a grammar", texts.gru),
        Recipe("autoencoder", "196-64-8-64-196, squared error, Fashion-MNIST 14 × 14", images.autoencoder, FASHION),
        Recipe("vae", "variational autoencoder, latent 8, Fashion-MNIST 14 × 14", images.vae, FASHION),
        Recipe("matrix-factorisation", "embeddings of 300 users and 200 items, 19,000 ratings", tables.factorisation),
        Recipe("tabular", "numbers and categories, 2 SiLU layers, regression", tables.tabular),
        Recipe("least-squares", "linear regression, condition 10⁴", tables.least_squares),
    )
}
"""Name → how the script is made."""
