"""Hyper-parameters and weights of examples, tuned by hypergradients while a network trains."""

from l2o_training.tune.glocal import GlocalTuner
from l2o_training.tune.reweighting import ExampleWeights

__all__ = ["ExampleWeights", "GlocalTuner"]
