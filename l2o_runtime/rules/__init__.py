"""The rules: what is meta-trained, run, exported and read back."""

from l2o_runtime.config import RuleConfig
from l2o_runtime.rules.lstm import Rule
from l2o_runtime.rules.tiered import ScaleRule

__all__ = ["Rule", "ScaleRule", "make_rule"]


def make_rule(config: RuleConfig) -> Rule:
    """The rule that a configuration describes, with random weights."""
    return ScaleRule(config) if config.cell == "scale" else Rule(config)
