"""Tasks: distributions of optimization problems, many instances advanced at once."""

from l2o_training.tasks.base import Instances, Task
from l2o_training.tasks.config import ConvConfig, MLPConfig, QuadraticConfig, TaskConfig, make_task

__all__ = ["ConvConfig", "Instances", "MLPConfig", "QuadraticConfig", "Task", "TaskConfig", "make_task"]
