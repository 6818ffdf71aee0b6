"""Solvers: what carries an optimization from point to point, learned or not."""

from l2o_runtime.solvers.base import Point, Problems, Solver
from l2o_runtime.solvers.descent import Descent

__all__ = ["Descent", "Point", "Problems", "Solver"]
