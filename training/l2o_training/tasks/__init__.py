"""Tasks: distributions of optimization problems, many instances advanced at once."""

from l2o_training.tasks.base import Instances, Task
from l2o_training.tasks.config import (
    AutoencoderConfig,
    ConvConfig,
    MLPConfig,
    PythonConfig,
    QuadraticConfig,
    RegressionConfig,
    SparseConfig,
    TaskConfig,
    TextConfig,
    make_task,
)

__all__ = [
    "AutoencoderConfig",
    "ConvConfig",
    "Instances",
    "MLPConfig",
    "PythonConfig",
    "QuadraticConfig",
    "RegressionConfig",
    "SparseConfig",
    "Task",
    "TaskConfig",
    "TextConfig",
    "make_task",
]
