"""Estimators of the meta-gradient: truncated back-propagation, evolution strategies, both, and a search by ranks."""

from l2o_training.config import TrainConfig
from l2o_training.meta.estimators.base import Estimator
from l2o_training.meta.estimators.cem import CEM
from l2o_training.meta.estimators.es import ES, PES
from l2o_training.meta.estimators.mixed import Mixed
from l2o_training.meta.estimators.tbptt import TBPTT

ESTIMATORS: dict[str, type[Estimator]] = {"tbptt": TBPTT, "es": ES, "pes": PES, "mixed": Mixed, "cem": CEM}


def make_estimator(config: TrainConfig) -> Estimator:
    """The estimator of a run."""
    return ESTIMATORS[config.estimator](config)


__all__ = ["CEM", "ES", "ESTIMATORS", "PES", "TBPTT", "Estimator", "Mixed", "make_estimator"]
