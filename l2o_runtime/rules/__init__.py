"""The rules: what is meta-trained, run, exported and read back. A new one is a file here, and a line in `RULES`."""

from typing import Any

from l2o_runtime.rules.base import Rule, RuleConfig, Spec
from l2o_runtime.rules.directional import DirectionalConfig, DirectionalRule
from l2o_runtime.rules.hierarchical import HierarchicalConfig, HierarchicalRule
from l2o_runtime.rules.limits import StepLimits
from l2o_runtime.rules.lstm import LSTMConfig, LSTMRule, MomentsConfig, NormalizedConfig, PlainConfig
from l2o_runtime.rules.optimistic import OptimisticConfig, OptimisticRule
from l2o_runtime.rules.rnnprop import RNNPropConfig, RNNPropRule
from l2o_runtime.rules.tiered import TieredConfig, TieredRule

AnyRuleConfig = (
    LSTMConfig
    | PlainConfig
    | NormalizedConfig
    | MomentsConfig
    | RNNPropConfig
    | TieredConfig
    | DirectionalConfig
    | HierarchicalConfig
    | OptimisticConfig
)
"""A rule's configuration, told apart by its `kind`."""

RULES: dict[type[RuleConfig], Any] = {
    LSTMConfig: LSTMRule,
    PlainConfig: LSTMRule,
    NormalizedConfig: LSTMRule,
    MomentsConfig: LSTMRule,
    RNNPropConfig: RNNPropRule,
    TieredConfig: TieredRule,
    DirectionalConfig: DirectionalRule,
    HierarchicalConfig: HierarchicalRule,
    OptimisticConfig: OptimisticRule,
}
"""Configuration → rule."""

__all__ = [
    "RULES",
    "AnyRuleConfig",
    "DirectionalConfig",
    "DirectionalRule",
    "HierarchicalConfig",
    "HierarchicalRule",
    "LSTMConfig",
    "LSTMRule",
    "MomentsConfig",
    "NormalizedConfig",
    "OptimisticConfig",
    "OptimisticRule",
    "PlainConfig",
    "RNNPropConfig",
    "RNNPropRule",
    "Rule",
    "RuleConfig",
    "Spec",
    "StepLimits",
    "TieredConfig",
    "TieredRule",
    "make_rule",
]


def make_rule(config: RuleConfig) -> Rule:
    """The rule that a configuration describes, with random weights."""
    rule: Rule = RULES[type(config)](config)
    return rule
