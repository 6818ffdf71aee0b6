"""The result cache: one JSON file per measurement, under a key that says what it belongs to."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from l2o_runtime.files.atomic import atomic_write


def read_result(path: Path, key: dict[str, Any], *fields: str) -> dict[str, Any] | None:
    """What is kept in a file, if it is there, whole, and belongs to `key`.

    Args:
        path: of the file.
        key: as it was written with.
        fields: numbers in rows of equal length that have to be in it.

    Returns:
        Its content, `fields` as arrays in which null is NaN; None where it has to be measured again.
    """
    try:
        content = json.loads(path.read_text())
        if content["of"] != key:
            return None
        return {**content, **{name: np.array(content[name], dtype=float) for name in fields}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # missing, cut short or something else
        return None


def write_result(path: Path, key: dict[str, Any], content: dict[str, Any]) -> None:
    """Keep what was measured; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps({"of": key, **content}, allow_nan=False).encode())


def rounded(values: Any) -> Any:
    """Nested lists of numbers with six digits each; JSON has no NaN or infinity, which become null."""
    if isinstance(values, list | tuple):
        return [rounded(value) for value in values]
    return float(f"{values:.6g}") if math.isfinite(values) else None
