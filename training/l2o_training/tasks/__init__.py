"""Tasks: distributions of optimization problems, many instances advanced at once."""

from l2o_training.tasks.base import Instances, Task
from l2o_training.tasks.config import (
    AutoencoderConfig,
    ConvConfig,
    GameConfig,
    MLPConfig,
    PythonConfig,
    QuadraticConfig,
    RastriginConfig,
    RegressionConfig,
    SparseConfig,
    TaskConfig,
    TextConfig,
    make_task,
)

__all__ = [
    "AutoencoderConfig",
    "ConvConfig",
    "GameConfig",
    "Instances",
    "MLPConfig",
    "PythonConfig",
    "QuadraticConfig",
    "RastriginConfig",
    "RegressionConfig",
    "SparseConfig",
    "Task",
    "TaskConfig",
    "TextConfig",
    "make_task",
]
