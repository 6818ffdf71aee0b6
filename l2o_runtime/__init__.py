"""l2o runtime: run a frozen learned optimizer as an ordinary torch.optim.Optimizer."""

__version__ = "0.1.0"

from l2o_runtime.config import ConfigError
from l2o_runtime.files.artifact import ArtifactError, load_rule, save_rule
from l2o_runtime.learned_solver import LearnedSolver
from l2o_runtime.minimax import LearnedMinimax
from l2o_runtime.optimizer import LearnedOptimizer
from l2o_runtime.rules import Rule, RuleConfig, make_rule
from l2o_runtime.stepping.advice import HorizonWarning

__all__ = [
    "ArtifactError",
    "ConfigError",
    "HorizonWarning",
    "LearnedMinimax",
    "LearnedOptimizer",
    "LearnedSolver",
    "Rule",
    "RuleConfig",
    "load_rule",
    "make_rule",
    "save_rule",
]
