"""The benchmark: its figures have the right meaning and its mistakes one line. Nothing here depends on speed."""

import csv
import io
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam
from typer.testing import CliRunner

from l2o_cli.main import app
from l2o_export.export import export_rule
from l2o_runtime import LearnedOptimizer, save_rule
from l2o_runtime.rules import LSTMConfig, NormalizedConfig, make_rule
from l2o_training.bench import plan, plots
from l2o_training.bench import run as bench
from l2o_training.bench.memory import allocated_peak, available_bytes, resident_peak, state_bytes
from l2o_training.bench.models import MODELS, count, parse_sizes, shapes_of
from l2o_training.bench.plan import Line, Need
from l2o_training.bench.racers import FOREACH, FUSED, NO_CONTEXT, Racer, racers, stepper
from l2o_training.bench.reference import PlainLSTM
from l2o_training.bench.timing import race

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MB = 10**6
SHAPES = [(40, 30), (30,)]


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["bench", "--out", "out", *(str(a) for a in arguments)])


@pytest.fixture
def tiny(monkeypatch):
    """Models of 1,230 parameters under every name, and small pilots."""
    monkeypatch.setattr(bench, "shapes_of", lambda size: SHAPES)
    monkeypatch.setattr(plan, "PILOT", (2, 4))
    monkeypatch.setattr("l2o_training.bench.timing.WARM_UP", (2, 2))


class Known(torch.optim.Optimizer):
    """40 MB, then 20 MB after the first are released, and 12 MB beside those: 40 MB at the peak. A state of 8 MB is
    replaced, so 8 MB more are there for a moment, but not at the peak."""

    def __init__(self, params):
        super().__init__(params, {})
        (self.first,) = self.param_groups[0]["params"]
        self.state[self.first]["kept"] = torch.zeros(2 * MB)

    @torch.no_grad()
    def step(self, closure=None):
        torch.zeros(10 * MB)
        second, third = torch.zeros(5 * MB), torch.zeros(3 * MB)
        del second, third
        self.state[self.first]["kept"] = torch.zeros(2 * MB)


class Replacing(Known):
    def step(self, closure=None):
        self.state[self.first]["kept"] = torch.zeros(2 * MB)


class Outside(Known):
    """Memory that torch knows nothing of."""

    def step(self, closure=None):
        np.ones(5 * MB)


@pytest.fixture
def param():
    return torch.zeros(3, requires_grad=True)


def test_models_have_the_sizes_they_are_known_for():
    sizes = {name: count(shapes_of(name)) for name in parse_sizes(",".join(MODELS))}
    assert sizes == {
        "tiny": 1_810,
        "mlp": 15_910,
        "lenet": 61_706,
        "transformer": 108_481,
        "cnn": 1_199_882,
        "resnet18": 11_689_512,
        "gpt": 25_139_336,
        "vit": 86_567_656,
    }
    assert list(sizes.values()) == sorted(sizes.values())


@pytest.mark.parametrize(("kind", "expected"), [(Known, 40 * MB), (Replacing, 8 * MB), (Outside, 0)])
def test_allocated_peak_is_that_of_a_known_allocation(param, kind, expected):
    assert allocated_peak(kind([param]).step, CPU) == pytest.approx(expected, abs=1000)


def test_resident_peak_sees_what_is_not_torchs(param):
    found = resident_peak(Outside([param]).step)
    if found is None:
        pytest.skip("this system does not tell")
    assert found == pytest.approx(40 * MB, rel=0.1)


@pytest.mark.parametrize(("make", "expected"), [(Adam, 8), (SGD, 0), (lambda p: SGD(p, momentum=0.9), 4)])
def test_state_bytes_of_known_optimizers(make, expected):
    param = torch.zeros(1000, requires_grad=True)
    param.grad = torch.ones(1000)
    optimizer = make([param])
    optimizer.step()
    assert state_bytes(optimizer) == pytest.approx(1000 * expected, abs=8)


def test_the_plain_lstm_is_the_same_rule(tmp_path):
    torch.manual_seed(0)
    rule = make_rule(LSTMConfig()).eval().requires_grad_(False)
    save_rule(tmp_path / "rule.safetensors", rule)
    ends = []
    for make in (lambda p: PlainLSTM(p, rule), lambda p: LearnedOptimizer(p, tmp_path / "rule.safetensors")):
        params = [torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_(), torch.ones(2, requires_grad=True)]
        optimizer = make(params)
        for _ in range(5):
            for param in params:
                param.grad = param.detach().clone()
            optimizer.step()
        ends.append(torch.cat([param.detach().flatten() for param in params]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_the_plain_lstm_refuses_rules_that_it_is_not(param):
    with pytest.raises(ValueError, match="log_sign"):
        PlainLSTM([param], make_rule(NormalizedConfig()))


def test_the_loss_is_passed_to_those_who_take_it(param):
    param.grad = torch.ones(3)
    loss = torch.ones(())
    learned = LearnedOptimizer([param], rule="normalized-dmd")
    stepper(learned, loss)()
    assert learned.state[param]["context_losses"][-1] == 1
    stepper(Adam([param]), loss)()


def test_every_optimizer_finds_the_same_gradients():
    seen = []

    class Spoiler(SGD):
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                seen.append(param.grad.clone())
                param.grad.zero_()

    competing = [Racer("a", Spoiler, ()), Racer("b", Spoiler, ("a",))]
    lanes, rates = race(competing, [(5,)], steps=4, seconds=60, device=CPU)
    assert all(torch.equal(grad, seen[0]) for grad in seen)
    assert seen[0].abs().min() > 0
    assert [len(lane.seconds) for lane in lanes] == [4, 4]
    assert rates.gemm > 0
    assert rates.copy > 0


def test_the_budget_ends_a_race_after_three_rounds():
    lanes, _ = race([Racer("a", SGD, ())], [(5,)], steps=50, seconds=0, device=CPU)
    assert len(lanes[0].seconds) == 3


def need(state: float, transient: float = 0.0) -> Need:
    return Need(Line(0, state), Line(0, transient))


def test_plan_groups_by_memory_and_keeps_references():
    a, b, c, d = (Racer(x, SGD, refs) for x, refs in (("a", ()), ("b", ("a",)), ("c", ("a", "b")), ("d", ("a",))))
    needs = {"a": need(8), "b": need(100), "c": need(100), "d": need(10**6)}
    n = 10**6
    roomy = plan.group_bytes([a, b, c], needs, n)
    groups, skipped = plan.plan([a, b, c, d], needs, n, roomy)
    assert groups == [[a, b, c]]
    assert "GB" in skipped["d"]
    assert "M parameters fit" in skipped["d"]
    groups, _ = plan.plan([a, b, c, d], needs, n, roomy - 1)
    assert groups == [[a, b], [a, c]]
    groups, skipped = plan.plan([a, b, c, d], needs, n, 1000)
    assert groups == []
    assert set(skipped) == {"a", "b", "c", "d"}


def test_largest_is_where_it_stops_fitting():
    a = Racer("a", SGD, ())
    needs = {"a": need(100, 50)}
    most = plan.largest([a], needs, 10**10)
    assert plan.group_bytes([a], needs, most) <= 10**10 < plan.group_bytes([a], needs, most + 1)


def test_a_pilot_measures_slopes():
    found = plan.pilot(next(c for c in racers("default") if c.name == FOREACH), CPU)
    assert found.state.slope == pytest.approx(8)
    assert found.transient.slope == pytest.approx(4, rel=0.1)


def test_memory_is_known():
    assert 10**6 < available_bytes(CPU) < 10**15


def test_the_command(cli, tmp_path, tiny):
    (tmp_path / "own_optimizer.py").write_text("from torch.optim import SGD\nclass Own(SGD): pass\n")
    result = cli("--sizes", "mlp,cnn", "--steps", 3, "--extra", "own_optimizer:Own", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content == json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["machine"]["threads"] == torch.get_num_threads()
    rows = content["results"]
    assert len(rows) == 2 * 10
    by_name = {row["optimizer"]: row for row in rows if row["size"] == "mlp"}
    assert by_name[FOREACH]["ratio_foreach"] == 1
    assert by_name["Adam"]["ratio_adam"] == 1
    assert by_name["rule default"]["ratio_adam"] > 0
    assert by_name[FUSED]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.1)
    assert by_name[NO_CONTEXT]["state_bytes_per_parameter"] == pytest.approx(320, abs=0.2)
    assert by_name["2×20, dmd exact"]["state_bytes_per_parameter"] > 400
    assert by_name["plain nn.LSTMCell"]["state_bytes"] == 320 * 1230
    assert by_name["own_optimizer:Own"]["state_bytes"] == 0
    for name, row in by_name.items():
        assert row["steps"] == 3
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"]
        assert row["ns_per_parameter"] == pytest.approx(1e9 * row["median_s"] / 1230)
        assert (row["context_overhead"] is not None) == ("dmd" in name or "kae" in name)
        assert (row["gemm_floor_ns"] is not None) == ("2×20" in name or "rule" in name or "LSTM" in name)
        assert row["copy_floor_ns"] > 0
    with (tmp_path / "out" / "results.csv").open() as file:
        assert [row["optimizer"] for row in csv.DictReader(file)] == [row["optimizer"] for row in rows]
    assert (tmp_path / "out" / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_exported_files_are_timed(cli, tmp_path, tiny):
    rule = make_rule(LSTMConfig(hidden=4))
    save_rule(tmp_path / "rule.safetensors", rule)
    export_rule(tmp_path / "rule.safetensors", ["torchscript"], tmp_path / "exported")
    result = cli("--sizes", "mlp", "--steps", 3, "--exported", tmp_path / "exported", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["exported"] == str(tmp_path / "exported")
    row = next(row for row in content["results"] if row["optimizer"] == "rule.pt")
    assert row["steps"] == 3
    assert row["ratio_adam"] > 0


@pytest.mark.parametrize("sizes", [["mlp"], ["mlp", "cnn"]])
def test_the_picture_names_every_optimizer(sizes, monkeypatch):
    """Of one size, a row for each: lines of one point would tell nothing."""
    rows = [
        asdict(replace(bench.Result("", 10**k, name, 3, 2e-3, 1e-3, 3e-3, 2e6 / 10**k), size=size, copy_floor_ns=0.5))
        for k, size in enumerate(sizes, start=4)
        for name in ("Adam foreach", "rule $x$")
    ]
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    plots.growth(rows, io.BytesIO())
    monkeypatch.undo()
    (axes,) = drawn[0].axes
    if len(sizes) == 1:
        assert [text.get_text() for text in axes.get_yticklabels()] == ["Adam foreach", "rule $x$"]
        assert [len(line.get_xdata()) for line in axes.lines] == [2, 2], "medians and one floor"
        assert "mlp" in axes.get_title()
    else:
        assert [line.get_label() for line in axes.lines] == ["Adam foreach", "rule $x$"]
    plots.plt.close(drawn[0])


def test_a_state_in_bfloat16_is_planned_with_and_said(cli, tmp_path, tiny):
    found = {}
    for dtype in ("float32", "bfloat16"):
        result = cli("--sizes", "mlp", "--steps", 1, "--state-dtype", dtype, "--json")
        assert result.exit_code == 0, result.output
        content = json.loads(result.stdout)
        assert content["state_dtype"] == dtype
        found[dtype] = {row["optimizer"]: row["state_bytes_per_parameter"] for row in content["results"]}
    assert found["bfloat16"][NO_CONTEXT] == pytest.approx(160, abs=0.2)
    assert found["bfloat16"]["rule default"] == pytest.approx(found["float32"]["rule default"] - 4, abs=0.01)
    assert found["bfloat16"][FOREACH] == found["float32"][FOREACH]


def test_86_million_parameters_fit_into_24_gb_with_a_state_in_bfloat16():
    """Beside Adam, of what is free of 24 GB after the system's share."""
    n, room = count(shapes_of("vit")), int(0.9 * 22e9)
    fits = {}
    for dtype in (torch.float32, torch.bfloat16):
        chosen = [c for c in racers("default", state_dtype=dtype) if c.name in (FOREACH, NO_CONTEXT, "rule default")]
        needs = {c.name: plan.pilot(c, CPU) for c in chosen}
        _, skipped = plan.plan([replace(c, references=c.references[:1]) for c in chosen], needs, n, room)
        fits[dtype] = {c.name for c in chosen} - skipped.keys()
    assert fits == {torch.float32: {FOREACH, "rule default"}, torch.bfloat16: {FOREACH, NO_CONTEXT, "rule default"}}


def test_what_does_not_fit_is_skipped_with_a_reason(cli, tmp_path, tiny, monkeypatch):
    # The window of exact DMD is what does not fit; everything else does, though not all at once.
    needs = {c.name: plan.pilot(c, CPU) for c in racers("default")}
    by_name = {c.name: c for c in racers("default")}
    n = count(SHAPES)
    adam, exact = by_name[FOREACH], by_name["2×20, dmd exact"]
    room = plan.group_bytes([adam, exact], needs, n) - 1
    monkeypatch.setattr(bench, "available_bytes", lambda device: room)
    monkeypatch.setattr(bench, "pilot", lambda racer, device: needs[racer.name])
    result = cli("--sizes", "vit", "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "2×20, dmd exact skipped: needs" in result.stdout
    assert "--state-dtype bfloat16" in result.stdout
    rows = {row["optimizer"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}
    assert rows["2×20, dmd exact"]["median_s"] is None
    assert rows[NO_CONTEXT]["median_s"] > 0
    assert rows[NO_CONTEXT]["ratio_foreach"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "mpl"], "did you mean mlp"),
        (["--sizes", ","], "--sizes: expected"),
        (["--rule", "defualt"], "bundled name"),
        (["--extra", "torch.optim"], "expected module:Class"),
        (["--extra", "nowhere_at_all:X"], "cannot import nowhere_at_all"),
        (["--extra", "torch.optim:Adm"], "no class Adm"),
        (["--exported", "nowhere"], "no .pt, .pt2, .onnx file there; `l2o export RULE --out nowhere` writes them"),
        (["--extra", "broken:X"], "cannot import broken: RuntimeError: it is broken"),
        (["--extra", "torch.optim:LBFGS"], "cannot be timed: TypeError"),
        (["--extra", "torch.optim:Muon"], "cannot be timed: ValueError"),
        (["--out", "a-file/x", "--steps", "1"], "a-file"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(cli, tmp_path, tiny, arguments, message):
    (tmp_path / "a-file").write_text("")
    (tmp_path / "broken.py").write_text("raise RuntimeError('it is\\nbroken')")
    before = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before
