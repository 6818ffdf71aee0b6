"""Passes over ONNX graphs change no step: each by itself, and all of them; one that drops ε is caught."""

import numpy as np
import onnx
import onnx_ir
import pytest
from rules import RULES, make_rule

from l2o_export import formats
from l2o_export.formats import Source, to_onnx
from l2o_export.graph import PASSES, shorten
from l2o_export.verify import STEP_TOLERANCE, make_problem, record, step_error
from l2o_runtime.files.archive import seal
from l2o_runtime.files.exported import load_exported

pytestmark = pytest.mark.slow
NAME = "none-scale"
"""Of the table of rules. Others are verified with all passes, as every file that is exported."""
STEPS = 20


@pytest.fixture(scope="module")
def plain(once):
    """The rule's ONNX model as the exporter gives it."""

    def fill(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "PASSES", {})
            patch.setattr(formats, "shorten", lambda graph: None)
            to_onnx(Source(make_rule(RULES[NAME]), {}), folder / "rule.onnx")

    model = onnx.load(once(f"graph-{NAME}", fill)[0] / "rule.onnx")
    del model.metadata_props[-1]  # the digest
    return model


@pytest.fixture(scope="module")
def steps():
    """Shapes of a small network, and steps of eager on it."""
    problem = make_problem(4)
    return problem.shapes, list(record(make_rule(RULES[NAME]), problem, STEPS))


def error(model, steps, path):
    """The largest relative error of a step of a model."""
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(seal(model.SerializeToString(), ".onnx"))
    (shapes, recorded), rule = steps, load_exported(path)
    return max(step_error(rule, shapes, number, step)[0] for number, step in enumerate(recorded, 1))


def changed(model, *passes):
    """A model after passes over its representation in memory."""
    found = onnx_ir.from_proto(model)
    for change in passes:
        change(found)
    model = onnx_ir.to_proto(found)
    shorten(model.graph)
    return model


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_by_itself_changes_no_step(plain, steps, name, tmp_path):
    assert error(changed(plain, PASSES[name]), steps, tmp_path / "rule.onnx") <= STEP_TOLERANCE


def test_all_of_them_leave_half_of_the_nodes_and_no_names(plain, steps, tmp_path):
    after = changed(plain, *PASSES.values())
    assert error(after, steps, tmp_path / "rule.onnx") <= STEP_TOLERANCE
    assert len(after.graph.node) < 0.6 * len(plain.graph.node)
    assert len(after.SerializeToString()) < 0.6 * len(plain.SerializeToString())
    assert [value.name for value in after.graph.input] == [value.name for value in plain.graph.input]
    assert [value.name for value in after.graph.output] == [value.name for value in plain.graph.output]
    assert not any(node.name or node.metadata_props for node in after.graph.node)
    assert len(changed(after, *PASSES.values()).graph.node) == len(after.graph.node)


def test_a_pass_that_takes_epsilon_for_zero_is_caught(plain, steps, tmp_path):
    model = changed(plain, *PASSES.values())
    found = 0
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and values.size == 1 and 0 < abs(values.item()) <= 1e-8:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros_like(values), tensor.name))
            found += 1
    assert found > 0
    assert error(model, steps, tmp_path / "rule.onnx") > STEP_TOLERANCE
