"""Where a rule comes from: what is compared and kept of a run, and what decides about a rule's bits."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import l2o_runtime
from l2o_runtime.config import to_dict
from l2o_training.config import TrainConfig


def versions() -> dict[str, str]:
    """Versions of what decides about a rule's bits."""
    return {
        "l2o-runtime": l2o_runtime.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def comparable(config: TrainConfig) -> dict[str, Any]:
    """A configuration as plain data (its description aside), to be compared and kept."""
    return {key: value for key, value in to_dict(config).items() if key != "description"}


def git_revision() -> str:
    """Revision of the working copy this package runs from; empty for an installed one."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
