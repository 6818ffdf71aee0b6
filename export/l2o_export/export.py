"""Export a rule: write the formats, verify each against eager, and say so in a manifest and a card."""

import hashlib
import json
import logging
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from l2o_export.card import model_card
from l2o_export.formats import WRITERS, ExportError
from l2o_export.verify import STEPS, TOLERANCE, parity, part_at, trajectory
from l2o_runtime.artifact import atomic_write, read_rule
from l2o_runtime.config import nearest, require


def parse_formats(text: str) -> list[str]:
    """Format names from "torchscript,onnx"; "all" is all of them.

    Raises:
        ConfigError: an unknown format.
    """
    names = list(WRITERS) if text == "all" else [part.strip() for part in text.split(",") if part.strip()]
    require(bool(names), f"no export format given: known: {', '.join(WRITERS)}")
    for name in names:
        require(name in WRITERS, f"unknown export format {name!r}: {nearest(name, list(WRITERS))}")
    return names


def export_rule(rule_path: Path, formats: Iterable[str], out: Path) -> dict[str, Any]:
    """Write a rule in several formats and verify each on a real optimization.

    Nothing reaches `out` unless every format was written and agrees with eager.

    Args:
        rule_path: a `.safetensors` rule.
        formats: keys of `WRITERS`.
        out: folder; made if needed.

    Returns:
        The manifest, which is also written as `manifest.json` beside `README.md`, the model card.

    Raises:
        ExportError: a format could not be written, or parts from eager by more than 1e-4 (relative) by step 200.
    """
    rule, provenance = read_rule(rule_path)
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "steps": STEPS,
        "tolerance": TOLERANCE,
        "provenance": provenance,
        "versions": _versions(),
        "files": {},
    }
    reference = trajectory(rule_path)
    contents: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(dir=out, prefix=".export.") as folder:
        for name in formats:
            suffix, writer = WRITERS[name]
            path = Path(folder) / f"rule{suffix}"
            with _quiet():
                writer(rule, provenance, path)
            distances = None if name == "safetensors" else parity(reference, trajectory(path))
            step = part_at(distances) if distances is not None else None
            if distances is not None and step is not None:
                raise ExportError(
                    f"{name}: parts from eager at step {step} (relative distance {distances[step - 1]:.1e}, "
                    f"{distances[-1]:.1e} at step {STEPS}; at most {TOLERANCE:.0e} is allowed); nothing was written"
                )
            contents[path.name] = path.read_bytes()
            manifest["files"][path.name] = {
                "format": name,
                "bytes": len(contents[path.name]),
                "sha256": hashlib.sha256(contents[path.name]).hexdigest(),
                "parity": None if distances is None else distances[-1],
            }
    contents["manifest.json"] = json.dumps(manifest, indent=2, sort_keys=True).encode()
    contents["README.md"] = model_card(rule, manifest).encode()
    for name, content in contents.items():
        with atomic_write(out / name) as file:
            file.write(content)
    return manifest


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("l2o-runtime", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters log notices of their own internals; what matters is measured afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
