"""The command line as a user meets it: outputs, and one clear line for every mistake."""

import ast
import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
import torch
from rules import RULES, make_rule
from typer.testing import CliRunner

from l2o_cli.keys import rows
from l2o_cli.lists import GROUPS, PURPOSES
from l2o_cli.main import COMMANDS, app
from l2o_export.formats import WRITERS, Source
from l2o_runtime import __version__, save_rule
from l2o_runtime.files.artifact import ALIASES, bundled_rules
from l2o_runtime.rules import AnyRuleConfig, DirectionalConfig, NormalizedConfig, StepLimits, TieredConfig
from l2o_training.compare.papers.plans import PLANS
from l2o_training.config import TrainConfig, load_preset, preset_names
from l2o_training.tasks import TaskConfig

ROOT = Path(__file__).parents[2]
TINY = [
    "epochs=2",
    "horizon=20",
    "unroll=10",
    "batch=1",
    "validate_every=1",
    "validation_runs=2",
    "rule.context.window=5",
]


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_whole_way(cli, tmp_path):
    result = cli("train", "--preset", "demo", "--out", "run", "--seed", 5, *(f"--set={x}" for x in TINY))
    assert result.exit_code == 0, result.output
    written = {p.name for p in (tmp_path / "run").iterdir()}
    assert written >= {"config.json", "checkpoints", "metrics.jsonl", "rule.safetensors", "learning-curve.png"}
    facts = json.loads(cli("inspect", "run/rule.safetensors", "--json").stdout)
    assert facts["provenance"]["config"]["seed"] == 5
    result = cli("export", "run/rule.safetensors", "--to", "torchscript", "--out", "out", "--json")
    assert json.loads(result.stdout)["files"]["rule.pt"]["parity"]["step_error"] <= 1e-5
    result = cli(
        "eval", "run/rule.safetensors", "default", "--suite", "quadratics", "--steps", 12, "--runs", 2, "--out", "ev"
    )
    assert result.exit_code == 0, result.output
    assert "ratios to tuned Adam" in result.stdout


@pytest.mark.parametrize(
    ("config", "phrases"),
    [
        (TieredConfig(), ["they go on where a gradient is gone"]),
        (TieredConfig(noise_floor=1e-3), ["they fade where a gradient is gone"]),
        (NormalizedConfig(output="tanh"), ["at most 0.1 · lr"]),
        (TieredConfig(limits=StepLimits(known_parameters=30_000)), ["30,000 parameters"]),
        (DirectionalConfig(), ["times a schedule; they fade where a gradient is gone loss"]),
        (DirectionalConfig(places=True), ["by place × 2 first matrix, 1 between, 0.5 last matrix, 1 all else"]),
    ],
)
def test_inspect_says_what_bounds_steps(cli, tmp_path, config, phrases):
    rule = make_rule(config)
    if getattr(config, "places", False):
        rule.places.data.copy_(torch.tensor([0.732, 0.0, -0.76, 0.0]))
    save_rule(tmp_path / "rule.safetensors", rule)
    text = " ".join(cli("inspect", "rule.safetensors").stdout.split())
    assert all(phrase in text for phrase in phrases)


@pytest.mark.parametrize("command", ["presets", "rules", "suites"])
def test_lists(cli, command):
    listed = json.loads(cli(command, "--json").stdout)
    assert listed
    text = cli(command).stdout
    assert all(f" {name} " in text for name in listed)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_presets_say_how_long_they_take(cli):
    listed = json.loads(cli("presets", "--json").stdout)
    assert sorted(name for names in GROUPS.values() for name in names) == preset_names()
    assert all(preset["minutes"] >= 1 and preset["description"] for preset in listed.values())
    lines = [line.split() for line in cli("presets").stdout.splitlines()]
    assert [line[0] for line in lines if line and line[0] in listed][:3] == ["demo", "specialise", "directional"]
    assert ["scale-2", "36", "min"] in [line[:3] for line in lines]


def test_every_bundled_rule_has_a_purpose(cli):
    listed = json.loads(cli("rules", "--json").stdout)
    assert listed.keys() == {*bundled_rules(), *ALIASES}
    assert PURPOSES.keys() == set(bundled_rules())


def test_the_keys_are_those_of_the_configuration(cli):
    """Each default, where it is no table, can be given again, and leaves the default configuration as it was."""
    found = {key: (default, kinds) for key, _, default, kinds in rows(TrainConfig)}
    assert {field.name for field in dataclasses.fields(TrainConfig)} == {re.split(r"\W", key)[0] for key in found}
    plain = [
        f"{key}={default}"
        for key, (default, kinds) in found.items()
        if not kinds and "[" not in key and "(" not in default and default != "absent"
    ]
    assert "epochs=100" in plain
    own = Path("own.toml")
    own.write_text("")
    assert load_preset("own.toml", plain) == TrainConfig()
    assert found["rule.context.rank"] == ("1", "dmd, tensor_dmd")
    assert found["rule.limits.fading"] == ("25.0", "tiered")
    kinds = ", ".join(config.kind for config in typing.get_args(AnyRuleConfig))
    assert found["rule.needs_loss"] == ("false", kinds), "solvers have no such key"
    scale, having = found["rule.output_scale"]
    assert scale.startswith("0.1 (lstm, plain, normalized, rnnprop")
    assert "0.01 (moments); 0.003 (tiered); 0.015 (directional); 0.0001 (hierarchical)" in scale
    assert having.startswith(kinds)


def test_the_keys_fit_a_terminal_and_come_once(cli):
    listed = [row[0] for row in rows(TrainConfig)]
    assert len(listed) == len(set(listed))
    lines = cli("train", "--keys").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:] if line[0] != " "] == listed, "no key is cut or folded"


@pytest.mark.parametrize("command", ["train", "eval", "reproduce", "bench", "export"])
def test_help_flows_and_keeps_defaults(command):
    result = CliRunner().invoke(app, [command, "--help"], terminal_width=300)
    above = re.split("(Arguments|Options):", result.stdout)[0]
    paragraphs = [part.split("\n") for part in re.split(r"\n\s*\n", above.strip())]
    assert max(len(lines) for lines in paragraphs) <= 2, "a line breaks where the source does"
    shown = {"eval": "300; scripts: 100", "train": "runs/PRESET", "reproduce": "the plan's", "bench": "nine tenths"}
    assert shown.get(command, "runs/export") in result.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen(command):
    lines = CliRunner().invoke(app, [*command.split(), "--help"], terminal_width=80).stdout.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 80


def test_the_help_names_all_plans(cli):
    text = cli("reproduce", "--help").stdout
    assert [name for name in PLANS if name not in text] == []


def test_version_and_help(cli):
    assert cli("--version").stdout == f"l2o {__version__}\n"
    for command in ("train", "export", "eval", "reproduce", "bench", "inspect", "presets", "rules", "suites"):
        assert cli(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere.safetensors"], "does not exist"),
        (["inspect", "."], "is a folder"),
        (["inspect", "damaged.safetensors"], "cut short"),
        (["inspect", "exported.pt"], "give the .safetensors rule that it was exported from"),
        (["export", "defualt"], "bundled name: did you mean default"),
        (["export", "default", "--to", "onx"], "did you mean onnx"),
        (["export", "default", "--to", "torchscript", "--out", "a-file/out"], "a-file"),
        (["train", "--preset", "dmo"], "did you mean demo"),
        (["train", "--preset", "demo", "--set", "epcohs=3"], "did you mean epochs"),
        (["train", "--preset", "demo", "--set", "rule.context.window=500"], "larger than the horizon"),
        (["train", "--preset", "demo", "--set", "rule.context.rank=16", "--set", "rule.context.window=5"], "rank: 16"),
        (["train", "--preset", "demo", "--out", "a-file"], "a-file is no folder: choose another --out"),
        (["train", "--preset", "demo", "--out", "a-file/x"], "choose another --out"),
        (["train", "--preset", "demo", "--max-restarts", "2"], "only with --nproc"),
        (["train", "--preset", "demo", "--out", "new", "--resume"], "no run to resume"),
        (["train", "--preset", "mnist-l2o", "--data-root", "none"], "--download"),
        (["train", "--preset", "demo", "--set", "rule.features=moments"], 'now: kind, such as "moments"'),
        (["train", "--preset", "demo", "--set", "rule.cell=scale"], 'now: kind = "tiered"'),
        (["train", "--preset", "scale", "--set", "rule.known_parameters=9"], "now: limits.known_parameters"),
        (["train", "--preset", "demo", "--set", "rule.output=adam"], 'now: kind = "moments" or "tiered"'),
        (["train", "--preset", "scale", "--set", "rule.growth=1.1"], "rule.growth: 1.1 is how the first format"),
        (["train", "--preset", "demo", "--set", "rule.context.scope=tensor"], 'now: context.kind = "tensor_dmd"'),
        (["train", "--preset", "own.toml"], "own.toml"),
        (["train", "--preset", "bad.toml"], "unknown key task"),
        (["eval", "default", "--suite", "digit"], "did you mean digits"),
        (["eval", "default", "--baselines", "adm"], "did you mean adam"),
        (["train", "--preset", "demo", "--set", "clip=inf"], "clip: expected a finite number, got inf"),
        (["eval", "default", "directional"], "directional: this rule is given twice"),
        (["inspect", "[/x]/rule.safetensors"], "[/x]/rule.safetensors"),
        (["reproduce", "table1", "--rule", "default", "--rule", "directional"], "the name 'directional' is taken"),
        (["reproduce", "table1", "--out", "README"], "would take the place of"),
        (["eval", "default", "--suite", "table1", "--data-root", "none"], "--download"),
        (["eval", "default", "--suite", "quadratics", "--out", "a-file/x", "--steps", "5", "--runs", "1"], "a-file"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(cli, tmp_path, arguments, message):
    (tmp_path / "a-file").write_text("")
    for name in ("damaged.safetensors", "exported.pt"):
        (tmp_path / name).write_bytes(b"\x00" * 5)
    (tmp_path / "bad.toml").write_text("task = 3")
    (tmp_path / "README.md").write_text("# Mine")
    before = sorted(tmp_path.rglob("*"))
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written is left"


def test_unknown_tasks_are_refused(cli, tmp_path):
    (tmp_path / "own.toml").write_text('[[tasks]]\nkind = "mpl"\n')
    result = cli("train", "--preset", "own.toml")
    assert result.exit_code == 2
    kinds = ", ".join(sorted(config.kind for config in typing.get_args(TaskConfig)))
    assert f"tasks[0].kind: 'mpl' is not one of {kinds}" in result.stderr


def test_a_format_that_fails_is_named_and_the_others_are_written(cli, tmp_path, monkeypatch):
    save_rule(tmp_path / "rule.safetensors", make_rule(RULES["none-log_sign"]))

    def write_another(source, target):
        WRITERS["torchscript"][1](Source(make_rule(RULES["none-log_sign"], seed=1), source.provenance), target)

    monkeypatch.setitem(WRITERS, "pt2", (".pt", write_another))
    result = cli("export", "rule.safetensors", "--to", "pt2,safetensors", "--out", "out")
    assert result.exit_code == 1
    assert "rule.safetensors" in result.stdout
    assert result.stderr.startswith("error: pt2 was not written: from equal states it differs from eager in ")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"rule.safetensors", "manifest.json", "README.md"}


@pytest.mark.parametrize("version", [1, 2])
def test_inspect_says_which_format_a_file_has(cli, version):
    path = ROOT / f"tests/data/rule-{version}.safetensors"
    assert json.loads(cli("inspect", str(path), "--json").stdout)["format"] == f"l2o-rule/{version}"


@pytest.mark.parametrize("name", bundled_rules())
def test_inspect_fits_a_terminal_and_provenance_is_at_hand(cli, name):
    text = cli("inspect", name).stdout
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 80
    full = cli("inspect", name, "--provenance").stdout
    untrained = name == "directional"
    assert re.search(r"tasks +none: not meta-trained" if untrained else r"tasks +\d+ \(", text)
    assert ('"untrained"' if untrained else '"inner_steps"') in full


ALLOWED = {
    "l2o_runtime": set(),
    "training/l2o_training": {"l2o_runtime"},
    "export/l2o_export": {"l2o_runtime"},
    "cli/l2o_cli": {"l2o_runtime", "l2o_training", "l2o_export"},
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_packages_import_only_what_they_may(folder):
    own = Path(folder).name
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            used = {name.split(".")[0] for name in names if name.startswith("l2o_")}
            assert used <= ALLOWED[folder] | {own}, f"{path}: {used}"
