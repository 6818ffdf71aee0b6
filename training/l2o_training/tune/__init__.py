"""Hyper-parameters and weights of examples, tuned by hypergradients while a network trains."""

from l2o_training.tune.glocal import GlocalTuner

__all__ = ["GlocalTuner"]
