"""Exported solvers: every cell in every format gives eager's x, whatever the batch."""

import dataclasses
import json

import onnxruntime
import pytest
import torch

from l2o_export import solvers
from l2o_export.export import export_rule
from l2o_export.formats import ExportError, to_torchscript
from l2o_export.solvers import SolverGraph, SolverReference, measurements, read_solver, verify_solver
from l2o_runtime import save_rule
from l2o_runtime.files.artifact import ArtifactError
from l2o_runtime.solvers import UnrolledConfig, UnrolledSolver
from l2o_runtime.solvers.cells import CELLS

M, N, K = 10, 20, 3


def solver_of(cell, **keys):
    solver = UnrolledSolver(UnrolledConfig(cell=cell, rows=M, columns=N, layers=K, percent=10.0, **keys))
    matrix = torch.randn(M, N, generator=torch.Generator().manual_seed(0))
    solver.fit_to(matrix / matrix.norm(dim=0))
    return solver.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save_rule(folder / "rule.safetensors", solver_of("alista"), {})
    return folder, export_rule(
        folder / "rule.safetensors", ["safetensors", "torchscript", "pt2", "onnx"], folder / "out"
    )


def test_all_formats_agree_with_eager(exported):
    folder, manifest = exported
    assert manifest["failed"] == {}
    assert set(manifest["files"]) == {"rule.safetensors", "rule.pt", "rule.pt2", "rule.onnx"}
    assert all(entry["parity"]["distance"] <= 1e-4 for entry in manifest["files"].values())
    card = (folder / "out/README.md").read_text()
    assert "# Learned solver `rule.safetensors`" in card
    assert json.loads((folder / "out/manifest.json").read_text())["steps"] == K


def test_onnxruntime_runs_any_batch(exported):
    folder, _ = exported
    session, solver = onnxruntime.InferenceSession(folder / "out/rule.onnx"), solver_of("alista")
    for count in (1, 2, 17):
        b = measurements(solver, count)
        (x,) = session.run(None, {"b": b.numpy()})
        torch.testing.assert_close(torch.from_numpy(x), solver(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", sorted(CELLS))
def test_every_cell_is_exported(cell, tmp_path):
    save_rule(tmp_path / "rule.safetensors", solver_of(cell, gain_size=0.1), {})
    formats = ["torchscript", "onnx"] if cell in ("lamp", "tista", "glista") else ["torchscript"]
    assert export_rule(tmp_path / "rule.safetensors", formats, tmp_path / "out")["failed"] == {}


def test_a_file_that_differs_is_told(tmp_path):
    solver, other = solver_of("lista"), solver_of("lista")
    with torch.no_grad():
        other.threshold[1].add_(1e-3)
    to_torchscript(SolverGraph(other, {}), tmp_path / "rule.pt")
    found = verify_solver(SolverReference(solver), {"pt": read_solver(tmp_path / "rule.pt"), "broken": lambda b: b})
    assert "differs from eager in x of a batch of" in str(found["pt"])
    assert isinstance(found["broken"], ExportError)


def test_a_damaged_file_is_not_read(exported, tmp_path):
    folder, _ = exported
    content = bytearray((folder / "out/rule.pt").read_bytes())
    content[500] ^= 1
    (tmp_path / "rule.pt").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        read_solver(tmp_path / "rule.pt")


def test_a_solver_that_diverges_is_not_exported(tmp_path):
    solver = solver_of("lista")
    with torch.no_grad():
        for weight in solver.mutual:
            weight.fill_(1e30)
    with pytest.raises(ExportError, match="not finite"):
        SolverReference(solver)


def test_configurations_are_kept(exported):
    folder, _ = exported
    found = read_solver(folder / "out/rule.safetensors")
    assert found.config == dataclasses.replace(solver_of("alista").config)
    assert solvers.TOLERANCE >= 1e-6
