"""Exported files do what the rule does, for any number of coordinates, and bad files are refused."""

import copy
import json
import subprocess
import sys

import onnx
import pytest
import torch
from rules import RULES, first_state, make_rule
from torch import nn

from l2o_export.export import export_rule, parse_formats
from l2o_export.formats import WRITERS, ExportError
from l2o_export.verify import parity, part_at
from l2o_runtime import ArtifactError, ConfigError, LearnedOptimizer, save_rule
from l2o_runtime.artifact import find_rule
from l2o_runtime.exported import load_exported, torchscript
from l2o_runtime.rule import zeros

FORMATS = ["torchscript", "pt2", "onnx"]
EXPORTED = [
    "none-log_sign",
    "flag-log_sign",
    "dmd-raw-normalized",
    "dmd-sketch-log_sign",
    "dmd-gradient-log_sign",
    "dmd-loss-normalized",
    "kae-normalized",
]
TWO_TIERS = ["none-scale", "dmd-sketch-scale", "layers-sketch-scale"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every format of some rules, written without verification."""
    folder, made = tmp_path_factory.mktemp("export"), {}
    for name in EXPORTED + TWO_TIERS:
        rule = make_rule(RULES[name])
        for form in FORMATS:
            suffix, writer = WRITERS[form]
            made[name, form] = folder / f"{name}{suffix}"
            writer(rule, {"seed": 0}, made[name, form])
    return made


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", EXPORTED)
def test_one_step_agrees_for_any_number_of_coordinates(files, name, form):
    rule, exported = make_rule(RULES[name]), load_exported(files[name, form])
    assert exported.config == rule.config
    torch.manual_seed(0)
    for n in (2, 7, 300):
        ours = zeros(rule.coordinate_spec, (n,)), zeros(rule.context_spec, ())
        theirs = copy.deepcopy(ours)
        theta = torch.randn(n)
        for _ in range(9):
            grad, loss = torch.randn(n), torch.rand(())
            grad[0] = 0  # a weight behind an input that is always zero
            delta, *ours = rule(theta, grad, loss, *ours)
            other, *theirs = exported(theta, grad, loss, *theirs)
            torch.testing.assert_close(delta, other, rtol=1e-4, atol=1e-5)
            theta = theta - 0.05 * grad


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", TWO_TIERS)
def test_one_step_agrees_for_any_tensors(files, name, form):
    rule, exported = make_rule(RULES[name]), load_exported(files[name, form])
    torch.manual_seed(0)
    for shapes in ([(2,), (1,)], [(4, 3), (5,), (), (2, 2, 2)], [(7,)]):
        ours, layout = first_state(rule, (), shapes)
        theirs = copy.deepcopy(ours)
        theta = torch.randn(len(layout[0].owner))
        for _ in range(9):
            grad, loss = torch.randn_like(theta), torch.rand(())
            grad[0] = 0
            delta, *ours = rule(theta, grad, loss, *ours, *layout)
            other, *theirs = exported(theta, grad, loss, *theirs, *layout)
            torch.testing.assert_close(delta, other, rtol=1e-4, atol=1e-5)
            theta = theta - 0.05 * grad


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_the_optimizer_runs_and_resumes_exported_files(files, form, state_dtype):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    options = {"rule": files["dmd-raw-normalized", form], "state_dtype": state_dtype}
    optimizer = LearnedOptimizer([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.0}], **options)
    bias = model.bias.detach().clone()

    def step(optimizer, model):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step(loss=1.0)

    for _ in range(6):
        step(optimizer, model)
    assert torch.equal(model.bias, bias)
    twin_model = copy.deepcopy(model)
    twin = LearnedOptimizer([{"params": [twin_model.weight]}, {"params": [twin_model.bias]}], **options)
    twin.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        step(optimizer, model)
        step(twin, twin_model)
    assert torch.equal(model.weight, twin_model.weight)
    assert optimizer.state[model.weight]["h0"].dtype == state_dtype


@pytest.mark.parametrize("name", EXPORTED + TWO_TIERS)
def test_onnx_is_standard_and_self_describing(files, name):
    model = onnx.load(files[name, "onnx"])
    assert {entry.domain for entry in model.opset_import} == {""}
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)
    content = json.loads({p.key: p.value for p in model.metadata_props}["l2o-rule.json"])
    assert [i.name for i in model.graph.input] == content["inputs"]
    assert [o.name for o in model.graph.output] == content["outputs"]


def test_export_verifies_and_describes(tmp_path):
    manifest = export_rule_of_default(tmp_path / "out")
    names = {"rule.safetensors", "rule.pt", "rule.pt2", "rule.onnx", "manifest.json", "README.md"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert all(entry["parity"] is None or entry["parity"] <= 1e-4 for entry in manifest["files"].values())
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert "coordinate.m100" in (tmp_path / "out" / "README.md").read_text()


def export_rule_of_default(out):
    return export_rule(find_rule("default"), list(WRITERS), out)


def test_export_fails_where_a_file_parts_from_eager(tmp_path, monkeypatch):
    path = tmp_path / "rule.safetensors"
    save_rule(path, make_rule(RULES["none-log_sign"]))

    def write_another(rule, provenance, target):
        WRITERS["torchscript"][1](make_rule(RULES["none-log_sign"], seed=1), provenance, target)

    monkeypatch.setitem(WRITERS, "pt2", (".pt", write_another))
    with pytest.raises(ExportError, match="pt2: parts from eager at step 1 "):
        export_rule(path, ["pt2"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["l2o", "l2o-dmd", "l2o-kae"])
def test_rules_that_amplify_rounding_are_compared_with_the_plain_loop(tmp_path, name):
    manifest = export_rule(find_rule(name), ["torchscript"], tmp_path)
    assert manifest["files"]["rule.pt"]["parity"] == 0


def test_where_trajectories_part():
    a = [torch.ones(2) * k for k in (1.0, 2.0, 3.0)]
    assert part_at(parity(a, a)) is None
    assert part_at(parity(a, [a[0], a[1] + 1, a[2]])) == 2
    assert part_at(parity(a, [a[0], a[1], a[2] * float("nan")])) == 3


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx"])
@pytest.mark.parametrize("content", [b"", b"nonsense" * 100])
def test_damaged_files_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"rule{suffix}"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        load_exported(path)


def test_files_of_others_are_refused(tmp_path):
    with torchscript():
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "other.pt")
    with pytest.raises(ArtifactError, match="not written by `l2o export`"):
        load_exported(tmp_path / "other.pt")


@pytest.mark.parametrize("form", FORMATS)
def test_newer_exported_files_are_refused_with_both_versions(files, form, tmp_path, monkeypatch):
    suffix, writer = WRITERS[form]
    monkeypatch.setattr("l2o_export.formats.FORMAT", "l2o-rule/2")
    writer(make_rule(RULES["none-log_sign"]), {}, tmp_path / f"rule{suffix}")
    with pytest.raises(ArtifactError, match="format l2o-rule/2, this version reads l2o-rule/1: upgrade"):
        load_exported(tmp_path / f"rule{suffix}")


def test_other_programs_read_sealed_files(files):
    with torchscript():
        torch.jit.load(files["none-log_sign", "torchscript"])
    torch.export.load(files["none-log_sign", "pt2"])


def test_formats_are_parsed():
    assert parse_formats("all") == list(WRITERS)
    assert parse_formats("onnx, pt2") == ["onnx", "pt2"]
    with pytest.raises(ConfigError, match="did you mean onnx"):
        parse_formats("onx")


def test_runtime_imports_nothing_but_its_own_needs():
    others = "l2o_training l2o_export l2o_cli typer rich onnx onnxruntime matplotlib torchvision sklearn"
    code = f"import sys, l2o_runtime; bad = set('{others}'.split()) & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)
