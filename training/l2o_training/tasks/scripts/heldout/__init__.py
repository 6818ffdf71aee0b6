"""Training scripts for verdicts: written when the default rule was done, and nothing was chosen by them.

They need no download: what they train on is drawn from a seed, or is scikit-learn's digits.
"""

from l2o_training.tasks.scripts.base import Recipe
from l2o_training.tasks.scripts.heldout import densities, digits, functions, relations, sequences

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("flow", "6 affine couplings, two moons", densities.flow),
        Recipe("mixture-density", "mixture of 5 Gaussians given x, inverse problem", densities.mixture_density),
        Recipe("gaussian-mixture", "8 Gaussians fitted to points of the plane", densities.gaussian_mixture),
        Recipe("diffusion", "denoising diffusion in 100 steps, two moons", densities.diffusion),
        Recipe("gaussian-process", "three hyper-parameters by marginal likelihood", densities.gaussian_process),
        Recipe("adding", "RNN of 64 units, product of two of 20 numbers", sequences.adding),
        Recipe("sorting", "transformer encoder with dropout, 8 digits sorted", sequences.sorting),
        Recipe("forecast", "GRU of 32 units, noisy waves", sequences.forecast),
        Recipe("deep-sets", "sums over sets of 10 points, their largest norm", relations.deep_sets),
        Recipe("graph", "graph convolutions with dropout, 60 labelled nodes of 300", relations.graph),
        Recipe("recommender", "MLP on embeddings of users and items", relations.recommender),
        Recipe("skip-gram", "skip-gram with negative samples, 400 words of 20 topics", relations.skip_gram),
        Recipe("contrastive", "SimCLR with BatchNorm, digits", digits.contrastive),
        Recipe("denoiser", "small U-Net, digits", digits.denoiser),
        Recipe("squeeze-excite", "depthwise convolutions, GroupNorm, gates of channels, digits", digits.squeeze_excite),
        Recipe("sigmoid-autoencoder", "64-128-32-8-32-128-64 with sigmoids, digits", digits.sigmoid_autoencoder),
        Recipe("adapters", "adapters of rank 4 on frozen layers, digits", digits.adapters),
        Recipe("quantiles", "three quantiles by an MLP, pinball loss", functions.quantiles),
        Recipe("counts", "Poisson regression, features that are not standardised", functions.counts),
        Recipe("survival", "Cox's partial likelihood, SELU and AlphaDropout", functions.survival),
        Recipe("distance-field", "MLP of 128 softplus units, signed distances", functions.distance_field),
        Recipe("pendulum", "Hamiltonian network, a pendulum's field", functions.pendulum),
        Recipe("hypernetwork", "MLP that writes another MLP's weights", functions.hypernetwork),
        Recipe("distillation", "MLP 20-32-32-10 after a wider teacher", functions.distillation),
    )
}
"""Name → how the script is made."""
