"""Tasks: distributions of optimization problems, many instances advanced at once."""

from l2o_training.tasks.base import Instances, Task
from l2o_training.tasks.config import (
    AutoencoderConfig,
    ClippedConfig,
    ConvConfig,
    GameConfig,
    MLPConfig,
    OpenL2OConfig,
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
    "ClippedConfig",
    "ConvConfig",
    "GameConfig",
    "Instances",
    "MLPConfig",
    "OpenL2OConfig",
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
