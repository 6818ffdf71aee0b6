"""The cluster examples: what can be checked of them without a cluster."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from l2o_cli.main import app
from l2o_training.config import load_preset

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def is_bash(text):
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0


def train_options(text):
    """Options of `l2o train` in a script."""
    words = text.split("-m l2o_cli train", 1)[1].replace("\\\n", " ").split()
    return {word for word in words if word.startswith("--")}


def known_options():
    command = typer.main.get_command(app).commands["train"]
    return {option for parameter in command.params for option in parameter.opts}


@bash
def test_the_slurm_script_is_bash_and_its_options_exist():
    text = (CLUSTER / "slurm.sbatch").read_text()
    assert is_bash(text)
    assert not is_bash(text.replace("fi\n", "\n", 1)), "the check would find an error"
    assert {"--preset", "--out"} <= train_options(text) <= known_options()
    load_preset(re.search(r"PRESET:-(\w+)", text)[1])
    assert "has not been run" in text


@bash
def test_the_kubernetes_job_is_yaml_and_its_options_exist():
    yaml = pytest.importorskip("yaml")
    text = (CLUSTER / "kubernetes.yaml").read_text()
    job = yaml.safe_load(text)
    assert job["kind"] == "PyTorchJob"
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"]
    container = worker["template"]["spec"]["containers"][0]
    (script,) = container["args"]
    assert is_bash(script)
    assert {"--preset", "--out"} <= train_options(script) <= known_options()
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc-per-node={gpus}" in script
    assert f"lanes={gpus * worker['replicas']}" in script
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    assert "has not been run" in text


def test_help_names_the_options_of_ranks():
    said = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--nproc", "--max-restarts", "--timeout"):
        assert option in said
