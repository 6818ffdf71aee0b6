"""Exported files do what the rule does, for any number of coordinates, and bad files are refused."""

import copy
import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import onnx
import pytest
import torch
from rules import RULES, first_state, make_rule
from torch import nn

from l2o_export.export import export_rule, parse_formats
from l2o_export.formats import WRITERS, ExportError, Source
from l2o_export.verify import (
    DRAWS,
    STEP_TOLERANCE,
    Reference,
    make_problem,
    make_reference,
    record,
    relative_error,
    step_error,
    verify,
)
from l2o_runtime import ArtifactError, ConfigError, LearnedOptimizer, save_rule
from l2o_runtime.contexts import dmd, kae, progress
from l2o_runtime.contexts.gram import GramWindow
from l2o_runtime.files.archive import seal
from l2o_runtime.files.artifact import bundled_rules, load_rule
from l2o_runtime.files.exported import load_exported, step_names, torchscript
from l2o_runtime.rules import coordinate_lstm as cells
from l2o_runtime.rules import directional, features, orthogonal
from l2o_runtime.rules import lstm as rule_module
from l2o_runtime.rules import tiered as scale
from l2o_runtime.state import zeros

pytestmark = pytest.mark.slow

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
PER_TENSOR = [
    *("none-scale", "dmd-sketch-scale", "layers-sketch-scale"),
    *("directional-places", "directional-adam", "dmd-sketch-hierarchical"),
]


@functools.lru_cache(maxsize=1)
def source(name):
    """A rule of the table; tests of its formats follow each other, and share its program."""
    return Source(make_rule(RULES[name]), {"seed": 0})


@pytest.fixture(scope="module")
def written(once):
    """A rule of the table and a format → its file, written without verification."""

    def file(name, form):
        suffix, writer = WRITERS[form]
        fill = lambda folder: writer(source(name), folder / f"rule{suffix}")  # noqa: E731
        return once(f"{name}-{form}", fill)[0] / f"rule{suffix}"

    return file


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", EXPORTED)
def test_one_step_agrees_for_any_number_of_coordinates(written, name, form):
    rule, exported = make_rule(RULES[name]), load_exported(written(name, form))
    assert exported.config == rule.config
    torch.manual_seed(0)
    for n in (2, 7, 300):
        ours = zeros(rule.spec.coordinate, (n,)), zeros(rule.spec.model, ())
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
@pytest.mark.parametrize("name", PER_TENSOR)
def test_one_step_agrees_for_any_tensors(written, name, form):
    rule, exported = make_rule(RULES[name]), load_exported(written(name, form))
    torch.manual_seed(0)
    for shapes in ([(2,), (1,)], [(4, 3), (5,), (), (2, 2, 2)], [(7,)], [(1, 9), (9, 1)], [(40, 2)], [(5, 9), (9, 12)]):
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
def test_the_optimizer_runs_and_resumes_exported_files(written, form, state_dtype):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    options = {"rule": written("dmd-raw-normalized", form), "state_dtype": state_dtype}
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


@pytest.mark.parametrize("name", EXPORTED + PER_TENSOR)
def test_onnx_is_standard_and_self_describing(written, name):
    model = onnx.load(written(name, "onnx"))
    assert {entry.domain for entry in model.opset_import} == {""}
    assert not model.functions
    onnx.checker.check_model(model, full_check=True)
    content = json.loads({p.key: p.value for p in model.metadata_props}["l2o-rule.json"])
    assert [i.name for i in model.graph.input] == content["inputs"]
    assert [o.name for o in model.graph.output] == content["outputs"]
    assert list(beyond_old_runtimes(onnx.shape_inference.infer_shapes(model).graph)) == []


def beyond_old_runtimes(graph):
    """Nodes that onnxruntime 1.15 has no kernel for, or makes into one that it has none for."""
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        inputs = [types.get(name) for name in node.input]
        bytewise = node.op_type == "Equal" and onnx.TensorProto.UINT8 in inputs
        fused = node.op_type == "MatMul" and "Transpose" in map(made_by.get, node.input)
        doubles = onnx.TensorProto.DOUBLE in inputs
        if bytewise or (doubles and (fused or node.op_type in ("Cos", "Sin", "Atan"))):
            yield node.name
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from beyond_old_runtimes(attribute.g)


@pytest.fixture(params=bundled_rules())
def exported(request, bundled_exports):
    """A bundled rule in all formats: its name, the manifest, the folder."""
    out, manifest = bundled_exports(request.param)
    return request.param, manifest, out


def test_every_bundled_rule_exports_to_every_format(exported):
    _, manifest, out = exported
    assert manifest["failed"] == {}
    names = {"rule.safetensors", "rule.pt", "rule.pt2", "rule.onnx"}
    assert manifest["files"].keys() == names
    assert {p.name for p in out.iterdir()} == names | {"manifest.json", "README.md"}
    for entry in manifest["files"].values():
        parity = entry["parity"]
        assert parity["step_error"] <= 1e-5
        assert parity["distance"] <= parity["allowed"] == max(10 * manifest["eager_distance"], 1e-4)
    assert json.loads((out / "manifest.json").read_text()) == manifest


def test_the_card_says_what_was_measured_and_fits_a_page(exported):
    _, manifest, out = exported
    card = (out / "README.md").read_text()
    assert len(card.splitlines()) <= 40
    assert max(map(len, card.splitlines())) <= 80
    text = " ".join(card.split())
    for name, entry in manifest["files"].items():
        parity = entry["parity"]
        assert f"`{name}`: step {parity['step_error']:.1e}, free {parity['distance']:.1e}" in text
        assert f"at the end, ≤ {parity['allowed']:.1e} (eager's own" in text
    assert f"last bit changed: {manifest['eager_distance']:.1e})" in text
    rule = load_exported(out / "rule.onnx")
    for name in step_names(rule)[0][3 + len(rule.layout_keys) :]:
        group, _, key = name.partition(".")
        (line,) = re.findall(rf"- `{group}\.`: (.*?) (?:- `|```)", text)
        assert re.search(rf"\b{key}\b.* \(", line)
    assert "Full provenance: `manifest.json`" in text
    assert "IR 8, opset 18" in card


def test_the_loop_of_the_card_runs_as_it_stands(exported):
    _, _, out = exported
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) <= 16
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 100
    assert losses[-1] < 0.5 * losses[0]


def test_torchscript_arguments_are_named_as_in_the_card(exported):
    _, _, out = exported
    rule = load_exported(out / "rule.pt")
    with torchscript():
        module = torch.jit.load(out / "rule.pt")
    names = [argument.name for argument in module.forward.schema.arguments]
    assert names == ["self", *(name.replace(".", "_") for name in step_names(rule)[0])]


def test_onnx_files_are_for_old_runtimes_and_name_no_paths(exported):
    _, manifest, out = exported
    model = onnx.load(out / "rule.onnx")
    entry = manifest["files"]["rule.onnx"]
    assert (model.ir_version, model.opset_import[0].version) == (entry["ir_version"], entry["opset"]) == (8, 18)
    assert b"l2o_runtime/" not in (out / "rule.onnx").read_bytes()
    assert entry["bytes"] <= 100_000
    nodes = [node for node in model.graph.node if node.op_type == "Loop"]
    assert not any(node.metadata_props for body in nodes for node in body.attribute[0].g.node)


def test_an_old_runtime_says_why_it_refuses_a_file(written, tmp_path):
    model = onnx.load(written("none-scale", "onnx"))
    model.ir_version = 99
    path = tmp_path / "rule.onnx"
    del model.metadata_props[-1]  # the digest
    path.write_bytes(seal(model.SerializeToString(), ".onnx"))
    with pytest.raises(
        ArtifactError, match=r"onnxruntime \d.*Unsupported model IR version: 99, max supported"
    ) as caught:
        load_exported(path)
    assert "damaged" not in str(caught.value)


def test_a_format_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    path = tmp_path / "rule.safetensors"
    save_rule(path, make_rule(RULES["none-log_sign"]))

    def write_another(source, target):
        WRITERS["torchscript"][1](Source(make_rule(RULES["none-log_sign"], seed=1), source.provenance), target)

    def write_nothing(source, target):
        raise TypeError("no such operator")

    monkeypatch.setitem(WRITERS, "pt2", (".pt", write_another))
    monkeypatch.setitem(WRITERS, "onnx", (".onnx", write_nothing))
    out = tmp_path / "out"
    manifest = export_rule(path, ["pt2", "safetensors", "onnx"], out)
    assert manifest["failed"].keys() == {"pt2", "onnx"}
    assert re.search(r"differs from eager in \w+ of step 1, tensor \d, by", manifest["failed"]["pt2"])
    assert "TypeError: no such operator" in manifest["failed"]["onnx"]
    assert {p.name for p in out.iterdir()} == {"rule.safetensors", "manifest.json", "README.md"}
    card = (out / "README.md").read_text()
    assert all(f"**{name} was not written**" in card for name in ("pt2", "onnx"))
    manifest = export_rule(path, ["pt2"], tmp_path / "none")
    assert manifest["files"] == {}
    assert list((tmp_path / "none").iterdir()) == []


def test_a_rule_that_diverges_is_not_verified():
    rule = make_rule(RULES["none-log_sign"])
    with torch.no_grad():
        rule.cell.head.weight.fill_(1e38)
    with pytest.raises(ExportError, match="the rule itself diverges"):
        make_reference(rule)


def test_errors_are_relative_to_size_and_conditioning():
    ours = torch.tensor([3.0, 4.0])
    assert relative_error(ours, ours + torch.tensor([0.0, 5e-5]), ours) == pytest.approx(1e-5, rel=1e-2)
    assert relative_error(ours, ours + torch.tensor([0.0, 5e-5]), ours + 1e-3) < 1e-8
    assert relative_error(ours, ours * float("nan"), ours) == float("inf")
    assert relative_error(0 * ours, -0.0 * ours, ours * 0) == 0
    assert relative_error(0 * ours, 0 * ours + 1e-45, ours * 0) < 1e-5
    assert relative_error(0 * ours, 0 * ours + 1e-30, ours * 0) > 1
    assert relative_error(torch.tensor(3), torch.tensor(3), torch.tensor(3)) == 0
    assert relative_error(torch.tensor(3), torch.tensor(4), torch.tensor(3)) == float("inf")


def test_one_draw_of_last_bits_that_does_nothing_refuses_nothing():
    """What the rule returns is right where changed bits move it as far, in one of the draws."""
    rule, problem = make_rule(RULES["none-log_sign"]), make_problem(4)
    (step,) = record(rule, problem, 1)

    def moved(by):
        return step.gave[0] * (1 + by), *step.gave[1:]

    off = step._replace(gave=moved(2 * STEP_TOLERANCE))
    asked = []

    def changed(draw):
        asked.append(draw)
        return off.gave if draw < DRAWS - 1 else moved(3 * STEP_TOLERANCE)

    assert step_error(rule, problem.shapes, 1, off._replace(changed=changed))[0] < STEP_TOLERANCE
    assert sorted(set(asked)) == list(range(DRAWS))
    assert step_error(rule, problem.shapes, 1, off._replace(changed=lambda draw: off.gave))[0] > STEP_TOLERANCE
    asked.clear()
    step_error(rule, problem.shapes, 1, step._replace(changed=changed))
    assert asked == [0], "where one is enough"


# Wrong files. Each mutant changes what is written, by the same means as a mistake would: name → rules, change.
DECAYING, WINDOWED, TIERED = ("moments", "normalized-dmd"), ("l2o-dmd", "normalized-dmd"), ("mnist", "scale")
DIRECTED = ("directional",)
GATED = [name for name in bundled_rules() if name not in DIRECTED]


def change_features(change):
    """A mutant of what is computed of a coordinate's gradients: `change` gets the function, its arguments and state."""

    def apply(monkeypatch, name):
        owners = dict.fromkeys(TIERED, scale) | dict.fromkeys(DIRECTED, directional)
        owner, attribute = (owners[name], "averages_of") if name in owners else (rule_module, "features_of")
        monkeypatch.setattr(owner, attribute, partial(change, getattr(owner, attribute)))

    return apply


def uncorrected(function, *arguments):
    *others, state = arguments
    result, new = function(*others, state | {"step": torch.full_like(state["step"], 1e9)})
    return result, new | {"step": state["step"] + 1}


def decayed(function, *arguments):
    result, new = function(*arguments)
    grad, old = next(x for x in arguments if isinstance(x, torch.Tensor)), arguments[-1]
    key, beta = ("m", 0.951) if "m" in old else ("m10", 0.901)
    return result, new | {key: beta * old[key] + (1 - beta) * grad}


def no_epsilon(monkeypatch, name):
    monkeypatch.setattr(features, "EPSILON", 0.0)
    for module in (features, scale):
        monkeypatch.setattr(module, "lowest_root", lambda level: 0 * level)


def wrong(owner, attribute, change):
    """A mutant that changes what a function returns."""

    def apply(monkeypatch, name):
        function = getattr(owner, attribute)
        monkeypatch.setattr(owner, attribute, lambda *a, **k: change(function(*a, **k)))

    return apply


def swapped_gates(monkeypatch, name):
    def cell(gates, c):
        i, f, g, o = gates.chunk(4, dim=-1)
        return lstm_cell(torch.cat([f, i, g, o], dim=-1), c)

    lstm_cell = cells.lstm_cell
    monkeypatch.setattr(cells, "lstm_cell", cell)


def shifted_window(monkeypatch, name):
    monkeypatch.setattr(
        kae,
        "window_features",
        lambda gram, losses, count, f=kae.window_features: f(gram.roll((1, 1), (-1, -2)), losses, count),
    )
    wrong(GramWindow, "snapshot_gram", lambda gram: gram.roll((1, 1), (-1, -2)))(monkeypatch, name)


def constant(module, name, value):
    return lambda monkeypatch, rule: monkeypatch.setattr(module, name, value)


def early(monkeypatch, name):
    monkeypatch.setattr(GramWindow, "full", lambda self, state: state["count"] >= self.size - 1)


def fading(monkeypatch, name):
    lengthen = scale.StepLimits.lengthen
    monkeypatch.setattr(
        scale.StepLimits, "lengthen", lambda limits, *args: lengthen(replace(limits, fading=26.0), *args)
    )


def log_sign_of_another_p(grad, p, log_sign=features.log_sign):
    """10.01 in place of 10."""
    return log_sign(grad, p + 0.01)


MUTANTS = {
    "epsilon dropped": ((*DECAYING, *TIERED), no_epsilon),
    "gates swapped": (GATED, swapped_gates),
    "window shifted by one": ((*WINDOWED, "l2o-kae"), shifted_window),
    "window full one step early": (WINDOWED, early),
    "a decay in its third digit": ((*DECAYING, *TIERED, *DIRECTED), change_features(decayed)),
    "no bias correction": ((*DECAYING, *TIERED, *DIRECTED), change_features(uncorrected)),
    "log_sign in its third digit": (("l2o",), constant(features, "log_sign", log_sign_of_another_p)),
    "eigenvalue's sign": (WINDOWED, wrong(dmd, "dmd", lambda found: (-found[0], *found[1:]))),
    "real and imaginary part swapped": (("l2o-dmd",), wrong(dmd, "dmd", lambda found: (found[1], found[0], found[2]))),
    "growth and rotation swapped": (
        ("normalized-dmd",),
        wrong(dmd, "scaled_features", lambda x: torch.cat([x[..., 1:2], x[..., :1], x[..., 2:]], dim=-1)),
    ),
    "latent state rotated": (("l2o-kae",), wrong(kae.KAE, "read", lambda x: (x[0].roll(1, -1), x[1]))),
    "energy's decay in its third digit": (("moments", *TIERED), constant(progress, "ENERGY_SPAN", 101)),
    "fading of large networks": (("scale",), fading),
    "iterations of Newton and Schulz": (DIRECTED, constant(orthogonal, "ITERATIONS", 4)),
    "matrices turned": (DIRECTED, wrong(orthogonal, "newton_schulz", lambda found: -found)),
}
CASES = [(rule, mutant) for rule in bundled_rules() for mutant, (rules, _) in MUTANTS.items() if rule in rules]


def subject(name):
    """A bundled rule, with a lower rank where it has one: each adds to what is written out for ONNX."""
    rule = load_rule(name)
    if name in DIRECTED:
        rule.config = replace(rule.config, rank=3)
    return rule


def complaint(name, file):
    """What is wrong with a file of a bundled rule; all of these files are to fail before they would run free."""
    problem = make_problem()
    reference = Reference(subject(name), problem, problem.start, own=0.0)
    return verify(reference, {"file": file})["file"].complaint


@functools.lru_cache(maxsize=1)
def mutant_source(name, mutant):
    """Written while the mutant is at work; its formats follow each other, and share what they are made of."""
    return Source(subject(name), {})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("name", "mutant"), CASES)
def test_wrong_files_are_refused(tmp_path, name, mutant, form):
    suffix, writer = WRITERS[form]
    path = tmp_path / f"rule{suffix}"
    with pytest.MonkeyPatch.context() as patch:
        MUTANTS[mutant][1](patch, name)
        writer(mutant_source(name, mutant), path)
    assert "differs from eager in" in complaint(name, load_exported(path))


@pytest.mark.parametrize("change", ["gates", "rounded", "sign"])
@pytest.mark.parametrize("name", GATED)
def test_wrong_weights_are_refused(tmp_path, name, change):
    """All that can be wrong in a .safetensors file."""
    rule = load_rule(name)
    if change == "gates":
        for parameter in (rule.cell.weight_ih[0], rule.cell.weight_hh[0], rule.cell.bias[0]):
            parameter.copy_(torch.cat([parameter.chunk(4)[k] for k in (1, 0, 2, 3)]))
    elif change == "rounded":
        rule.cell.head.weight.copy_(rule.cell.head.weight.bfloat16())
    else:
        rule.cell.weight_hh[0][0, 0] *= -1
    WRITERS["safetensors"][1](Source(rule, {}), tmp_path / "rule.safetensors")
    assert "differs from eager in" in complaint(name, load_rule(tmp_path / "rule.safetensors"))


@pytest.mark.parametrize("output", [0, 1, 4])
def test_wrong_weights_of_a_rule_without_a_memory_are_refused(tmp_path, output):
    rule = load_rule("directional")
    rule.head.bias[output] += 0.01
    WRITERS["safetensors"][1](Source(rule, {}), tmp_path / "rule.safetensors")
    assert "differs from eager in" in complaint("directional", load_rule(tmp_path / "rule.safetensors"))


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
def test_newer_exported_files_are_refused_with_both_versions(form, tmp_path, monkeypatch):
    suffix, writer = WRITERS[form]
    monkeypatch.setattr("l2o_export.formats.FORMAT", "l2o-rule/3")
    writer(Source(make_rule(RULES["none-log_sign"]), {}), tmp_path / f"rule{suffix}")
    with pytest.raises(ArtifactError, match="format l2o-rule/3, this version reads l2o-rule/1, l2o-rule/2: upgrade"):
        load_exported(tmp_path / f"rule{suffix}")


def test_other_programs_read_sealed_files(written):
    with torchscript():
        torch.jit.load(written("none-log_sign", "torchscript"))
    torch.export.load(written("none-log_sign", "pt2"))


def test_formats_are_parsed():
    assert parse_formats("all") == list(WRITERS)
    assert parse_formats("onnx, pt2") == ["onnx", "pt2"]
    with pytest.raises(ConfigError, match="did you mean onnx"):
        parse_formats("onx")


def test_runtime_imports_nothing_but_its_own_needs():
    others = "l2o_training l2o_export l2o_cli typer rich onnx onnxruntime matplotlib torchvision sklearn"
    code = f"import sys, l2o_runtime; bad = set('{others}'.split()) & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)
