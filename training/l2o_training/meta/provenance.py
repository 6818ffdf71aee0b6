"""Where a rule comes from: what is compared and kept of a run, and what decides about a rule's bits."""

import json
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import l2o_runtime
from l2o_runtime.config import ConfigError, require, to_dict
from l2o_runtime.files.artifact import read_learned
from l2o_runtime.learned import Learned
from l2o_training.config import TrainConfig, read_config


def versions() -> dict[str, str]:
    """Versions of what decides about a rule's bits."""
    return {
        "l2o-runtime": l2o_runtime.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def comparable(config: TrainConfig) -> dict[str, Any]:
    """A configuration as plain data, to be compared and kept; what a preset says of itself aside."""
    return {key: value for key, value in to_dict(config).items() if key not in ("description", "minutes")}


def kept_config(data: Any) -> Any:
    """`comparable` as it was kept in JSON, by this version or an older one; other data as it is."""
    with suppress(ConfigError, TypeError, AttributeError):  # it is of a rule that is no longer, or none at all
        data = comparable(read_config(data))
    return json.loads(json.dumps(data))


def describe_run(
    config: TrainConfig,
    tasks: list[str],
    inner_steps: int,
    validation: float,
    adam: dict[str, Any] | None,
    ancestor: dict[str, Any] | None,
) -> dict[str, Any]:
    """What made a rule: configuration, score and versions; nothing that differs between equal runs.

    Args:
        config: of the run.
        tasks: names of what it was trained on.
        inner_steps: done, of all instances.
        validation: the rule's.
        adam: learning rate and loss of the Adam that it is held against, or name and loss of another.
        ancestor: provenance of the rule that it started from.
    """
    start = {"start": ancestor} if ancestor is not None else {}
    return start | {
        "config": comparable(config),
        "tasks": tasks,
        "inner_steps": inner_steps,
        "validation": validation,
        "adam": adam,
        "git": git_revision(),
        "versions": versions(),
    }


def differences(one: Any, other: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two pieces of plain data differ: a name such as tasks[0].kind, and what each has, None for nothing."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = ({f"[{i}]": part for i, part in enumerate(parts)} for parts in (one, other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [(key, one, other)]
    names = {name: f"{key}{name}" if not key or name.startswith("[") else f"{key}.{name}" for name in {**one, **other}}
    return [found for name, path in names.items() for found in differences(one.get(name), other.get(name), path)]


def spell(value: Any) -> str:
    """A value of plain data, for messages."""
    return "nothing" if value is None else json.dumps(value)


def git_revision() -> str:
    """Revision of the working copy this package runs from; empty for an installed one, wherever that lies."""
    here = Path(__file__)

    def ask(*words: str) -> str:
        command = ["git", *words]
        done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", here.name)
        return ask("describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return ""


def inherit(rule: Learned, start: str) -> dict[str, Any]:
    """Give a rule or solver the weights of another one; what that one has not stays as it is.

    Returns:
        The other one's provenance.

    Raises:
        ConfigError: the other one is of another architecture.
        ArtifactError: it cannot be read.
    """
    other, provenance = read_learned(start)
    lacking = sorted(other.state_dict().keys() - rule.state_dict().keys())
    hint = "set the keys under [rule] to what `l2o inspect` shows, or leave start out"
    there, here = _architecture(other), _architecture(rule)
    require(there == here, f"start: {start} is {there}; this run's rule is {here}: {hint}")
    require(not lacking, f"start: {start} has {', '.join(lacking)}, which this run's rule has not: {hint}")
    rule.load_state_dict(rule.state_dict() | other.state_dict())
    return provenance


def _architecture(rule: Learned) -> str:
    """What has to be equal for weights to fit."""
    config = rule.config
    bounded = ", bounded steps" if getattr(config, "bounded", False) else ""
    return f"{config.kind}, {config.network}{bounded}, context {json.dumps(to_dict(config.context))}"
