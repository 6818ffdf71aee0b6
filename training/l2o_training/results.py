"""What a comparison ends with: `results.json` and `results.csv`."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from l2o_runtime.files.atomic import atomic_write


def write_results(out: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write both into a folder, each whole or not at all.

    Args:
        out: the folder; made if needed.
        settings: what goes before the rows in the JSON file.
        rows: with the same keys, which are the columns of the CSV file.
    """
    out.mkdir(parents=True, exist_ok=True)
    content = plain({**settings, "results": rows})
    with atomic_write(out / "results.json") as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode())
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(out / "results.csv") as file:
        file.write(table.getvalue().encode())


def plain(value: Any) -> Any:
    """As JSON takes it, which has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
