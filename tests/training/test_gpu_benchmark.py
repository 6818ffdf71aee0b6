"""The script that is prepared for a GPU runs from end to end, at small sizes on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def benchmark(*options, **environment):
    """Run the script as it is run on a bare machine."""
    full = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", *options]
    return subprocess.run(command, env=full, capture_output=True, text=True, cwd=ROOT.parent)


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path):
    done = benchmark("--cpu", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["parts"]) == ["tests", "default", "lstm", "network", "meta"]
    lines = [line for part in results["parts"].values() for line in part]
    assert not [line for line in lines if "failed" in line]
    found = {line["optimizer"]: line for line in results["parts"]["default"]}
    assert found["default, foreach"]["differs"] < 1e-5
    assert 0 < found["default, foreach"]["operators"] < found["default, plain"]["operators"] / 5
    assert found["Adam fused"]["ms"] > found["Adam fused"]["floor_ms"] > 0
    assert results["parts"]["meta"][0]["steps_per_s"] > 0
    assert "GPU" in found["default, compiled, graph"]["skipped"]
    text = (tmp_path / "results.md").read_text()
    assert all(f"## {part}" in text for part in results["parts"])


def test_a_missing_package_is_named_and_a_failure_stops_nothing(tmp_path):
    """Packages that are not there, and a folder where a part cannot work."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'pytest' else found(name, *more)\n"
    )
    (blocked / "torchvision").mkdir()
    (blocked / "torchvision" / "__init__.py").write_text("raise OSError('broken')\n")
    out = tmp_path / "out"
    done = benchmark("--cpu", "--out", out, "--parts", "network,tests", PYTHONPATH=str(blocked))
    assert done.returncode == 1, done.stdout + done.stderr
    parts = json.loads((out / "results.json").read_text())["parts"]
    assert parts["tests"] == [{"skipped": "not installed: pytest"}]
    assert parts["network"][0]["failed"].startswith("ended with 1")
    assert "broken" in parts["network"][0]["tail"][-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_claimed(tmp_path):
    done = benchmark("--out", tmp_path)
    assert done.returncode == 2
    assert "nothing was measured" in done.stderr
    assert not list(tmp_path.iterdir())
