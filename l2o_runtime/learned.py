"""Everything that is meta-trained, kept in a file and read back: rules, which solvers follow, and learned solvers."""

from typing import Any, TypeAlias

from l2o_runtime.rules import RULES, AnyRuleConfig, Rule
from l2o_runtime.solvers import (
    Descent,
    Solver,
    SwarmConfig,
    SwarmSolver,
    TwinConfig,
    TwinSolver,
    UnrolledConfig,
    UnrolledSolver,
)

AnyConfig: TypeAlias = AnyRuleConfig | UnrolledConfig | SwarmConfig | TwinConfig
"""The configuration of what is learned, told apart by its `kind`."""

Learned: TypeAlias = Rule | Solver

LEARNED: dict[Any, Any] = RULES | {UnrolledConfig: UnrolledSolver, SwarmConfig: SwarmSolver, TwinConfig: TwinSolver}
"""Configuration → what is learned. A new solver is a file in `solvers`, and a line here."""


def make_learned(config: AnyConfig) -> Learned:
    """What a configuration describes, with random weights."""
    learned: Learned = LEARNED[type(config)](config)
    return learned


def as_solver(learned: Learned) -> Solver:
    """The solver that is learned, or the one that follows the rule."""
    return Descent(learned) if isinstance(learned, Rule) else learned
