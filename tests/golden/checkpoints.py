"""Small runs of meta-training that stop half-way, and where they get when they are resumed."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from golden.trajectories import HERE
from safetensors.torch import load_file

FOLDER = HERE / "checkpoints-v1"
STOP, END = 2, 4
"""Epochs when the checkpoint is written, and of the whole run."""

COMMON = f"""
epochs = {STOP}
horizon = 40
shortest = 20
unroll = 10
batch = 2
lanes = 2
lr = 0.01
average = 0.9
validate_every = 2
validation_runs = 2
"""
TASKS = """
[[tasks]]
kind = "quadratic"
size = 6

[[tasks]]
kind = "regression"
size = 5
hidden = [3]
batch_size = 8
"""
RUNS = {
    "log-sign-dmd": """
rule.hidden = 4
rule.features = "log_sign"
rule.context = { kind = "dmd", rank = 1, window = 8 }
""",
    "scale": """
rule.cell = "scale"
rule.features = "moments"
rule.output = "adam"
rule.layers = 1
rule.hidden = 4
rule.output_scale = 0.01
""",
}


def run(preset: Path | str, folder: Path, *options: str) -> None:
    """`l2o train` without compiled code."""
    command = [sys.executable, "-m", "l2o_cli", "train", "--preset", str(preset), "--out", str(folder), *options]
    done = subprocess.run(
        [*command, "--device", "cpu", "--threads", "1"], env=os.environ | {"L2O_KERNELS": "plain"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def resume(name: str, folder: Path) -> Path:
    """Resume a copy of a recorded run, to its end; gives the rule."""
    shutil.copytree(FOLDER / name, folder)
    run(folder / "preset.toml", folder, "--resume", "--set", f"epochs={END}")
    return folder / "rule.safetensors"


def digest(rule: Path) -> str:
    """Of all weights of a rule."""
    state = load_file(rule)
    return hashlib.sha256(b"".join(state[key].numpy().tobytes() for key in sorted(state))).hexdigest()


def record(name: str, scratch: Path) -> None:
    """Write `FOLDER`/name: a run that stopped, and the rule and the metrics it gives when resumed."""
    kept = FOLDER / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    preset = kept / "preset.toml"
    preset.write_text((COMMON + RUNS[name] + TASKS).lstrip())
    folder = scratch / name
    run(preset, folder)
    for part in ("config.json", "metrics.jsonl"):
        shutil.copy(folder / part, kept)
    shutil.copytree(folder / "checkpoints", kept / "checkpoints")
    rule = resume(name, scratch / f"{name}-resumed")
    shutil.copy(rule, kept / "expected.safetensors")
    shutil.copy(rule.with_name("metrics.jsonl"), kept / "expected.jsonl")
