"""Solvers: what carries an optimization from point to point, learned or not."""

from l2o_runtime.solvers.base import Point, Problems, Solver, SolverConfig, Structure
from l2o_runtime.solvers.classical import AMP, FISTA, ISTA
from l2o_runtime.solvers.descent import Descent
from l2o_runtime.solvers.swarm import Swarm, SwarmConfig, SwarmSolver
from l2o_runtime.solvers.twin import MAX, MIN, Players, TwinConfig, TwinSolver
from l2o_runtime.solvers.unrolled import UnrolledConfig, UnrolledSolver

__all__ = [
    "AMP",
    "FISTA",
    "ISTA",
    "MAX",
    "MIN",
    "Descent",
    "Players",
    "Point",
    "Problems",
    "Solver",
    "SolverConfig",
    "Structure",
    "Swarm",
    "SwarmConfig",
    "SwarmSolver",
    "TwinConfig",
    "TwinSolver",
    "UnrolledConfig",
    "UnrolledSolver",
]
