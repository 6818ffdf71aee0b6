"""Workloads: ordinary networks in ordinary training loops, which no meta-training has seen."""

from l2o_training.workloads.base import Load, Problem, Workload
from l2o_training.workloads.suite import WORKLOADS, find_workloads

__all__ = ["WORKLOADS", "Load", "Problem", "Workload", "find_workloads"]
