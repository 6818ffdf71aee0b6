"""`l2o reproduce`: controls that are what they claim to be, statistics, caches, shared work, pages."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from typer.testing import CliRunner

from l2o_cli.main import app
from l2o_runtime import ConfigError, load_rule
from l2o_runtime.solvers import Descent
from l2o_training import plots
from l2o_training.compare.contenders import Contender, of_rule
from l2o_training.compare.flat import FlatWorkload, rollout, task_name
from l2o_training.compare.papers import sections, variants
from l2o_training.compare.papers.lab import Lab
from l2o_training.compare.papers.numbers import collect
from l2o_training.compare.papers.page import write_page
from l2o_training.compare.papers.plans import PLANS, Plan, find_plan, never_sees_context
from l2o_training.compare.papers.run import reproduce, save_derived, select
from l2o_training.compare.papers.variants import Variant
from l2o_training.compare.run import measure
from l2o_training.compare.statistics import Interval, log_ratios, spread, t_interval, verdict
from l2o_training.compare.study import Study, read_curves
from l2o_training.config import load_preset
from l2o_training.errors import RunError
from l2o_training.meta.trainer import Trainer
from l2o_training.tasks import MLPConfig, make_task
from l2o_training.tasks.data import DataError

pytestmark = pytest.mark.slow

TINY = (
    "epochs=3",
    "batch=1",
    "validate_every=2",
    "validation_runs=2",
    'tasks=[{kind="mlp", data="digits", hidden=[2], batch_size=8}]',
)
"""Overrides of any variant of the MNIST plans; the horizon stays 100, for the sake of DMD (1, 100)."""

CPU = torch.device("cpu")
NAMES = ("MNIST-1L", "MNIST-RELU")


def shrink(name: str, **changes) -> Plan:
    """A plan with its own variants on two tiny tasks, which bear names of Table 1."""
    tasks = tuple(MLPConfig(name=task, hidden=(2,), batch_size=8) for task in NAMES)
    plan = find_plan(name)
    settings = {"tasks": tasks, "steps": 20, "runs": 3, "seeds": 2} | changes
    return replace(plan, experiments=tuple(replace(experiment, **settings) for experiment in plan.experiments))


def lab_in(folder: Path, *changes: str) -> Lab:
    return Lab(folder / "runs", folder / "data", changes=(*TINY, *changes))


@pytest.fixture(scope="module")
def done(once, tmp_path_factory) -> tuple[Plan, Lab]:
    """The plan `table1`, reproduced on digits."""
    plan, folder = shrink("table1"), tmp_path_factory.mktemp("reproduction")
    finished, _ = once("table1", lambda folder: reproduce(plan, lab_in(folder)))
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return plan, replace(lab_in(folder), data_root=finished / "data")  # losses are kept with where their data are


CONTROLS = {
    "dmd (1, 100) raw": ("mnist-dmd", ["rule.context.window=100"]),
    "placebo of width 2": ("mnist-l2o", ['rule.context={kind="placebo", width=2}']),
    "placebo of width 8": ("mnist-l2o", ['rule.context={kind="placebo", width=8}']),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Settings → a trainer without context that has run, and the weights that its head had before."""

    @cache
    def train(*settings):
        trainer = Trainer(load_preset("mnist-l2o", settings), tmp_path_factory.mktemp("plain") / "run")
        start = trainer.rule.cell.head.weight.detach().clone()
        trainer.run()
        return trainer, start

    return train


@pytest.mark.parametrize("clip", [1.0, 0.01])
@pytest.mark.parametrize("name", CONTROLS)
def test_a_context_of_zeros_trains_exactly_like_none(tmp_path, plain, name, clip):
    """Whatever its width, and also where the meta-gradient is clipped; its own weights stay as drawn."""
    preset, overrides = CONTROLS[name]
    settings = [*TINY, f"clip={clip}", "seed=4"]
    ours = Trainer(load_preset(preset, [*settings, *overrides]), tmp_path / "ours")
    drawn = ours.rule.cell.weight_context.detach().clone()
    ours.run()
    trainer, start = plain(*settings)
    assert not torch.equal(start, trainer.rule.cell.head.weight), "it was trained at all"
    for key, value in trainer.rule.state_dict().items():
        other = ours.rule.state_dict()[key]
        assert torch.equal(other, drawn if key == "cell.weight_context" else value), key
    assert ours.best == trainer.best


def test_a_placebo_is_no_context_in_evaluation_too(tmp_path):
    task = make_task(MLPConfig(hidden=(2,), batch_size=8), Lab(tmp_path, tmp_path).load, CPU)
    rules = []
    for overrides in ([], CONTROLS["placebo of width 8"][1]):
        folder = tmp_path / str(len(rules))
        rules.append(load_rule(Trainer(load_preset("mnist-l2o", [*TINY, *overrides]), folder).run()))
    assert torch.equal(*(rollout(Descent(rule), task.instances(3, 0), 30) for rule in rules))


def test_the_derived_rule_is_the_one_that_training_gives(tmp_path):
    config = variants.DMD_1_100.config(3, TINY)
    assert never_sees_context(config)
    assert not never_sees_context(variants.DMD_1_20.config(3, TINY))
    expected = load_rule(Trainer(config, tmp_path / "trained").run())
    placebo = Trainer(variants.L2O.config(3, TINY), tmp_path / "l2o").run()
    before = torch.get_rng_state()
    save_derived(placebo, config, tmp_path / "derived.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    derived = load_rule(tmp_path / "derived.safetensors")
    assert derived.config == expected.config
    for key, value in expected.state_dict().items():
        assert torch.equal(derived.state_dict()[key], value), key


def test_a_derived_rule_keeps_what_sees_progress(tmp_path):
    changes = ["epochs=1", "horizon=20", "unroll=20", "shortest=20", "lanes=1", "validation_runs=1"]
    changes += ['tasks=[{kind="quadratic", size=3}]', "validation_tasks=[]", "average=0.5"]
    configs = {variant.name: variant.config(0, changes) for variant in variants.TWO_TIERS}
    config = configs["scale-dmd-model"]
    assert never_sees_context(config)
    expected = load_rule(Trainer(config, tmp_path / "trained").run())
    placebo = Trainer(configs["scale-placebo"], tmp_path / "placebo").run()
    save_derived(placebo, config, tmp_path / "derived.safetensors")
    derived = load_rule(tmp_path / "derived.safetensors")
    for key, value in expected.state_dict().items():
        assert torch.equal(derived.state_dict()[key], value), key


VARIANTS = [
    (experiment, variant)
    for plan in PLANS.values()
    for experiment in plan.experiments
    for variant in experiment.variants
]


@pytest.mark.parametrize(("study", "variant"), VARIANTS, ids=[variant.name for _, variant in VARIANTS])
def test_variants_differ_from_their_placebo_in_the_context_alone(study, variant):
    config = variant.config(1)
    assert config.seed == 1
    if variant.placebo:
        placebo = study.variant(variant.placebo).config(1)
        zeros = placebo.rule.context
        assert zeros.kind == "none" or (zeros.kind == "placebo" and zeros.width == config.rule.context.width)
        told = {"description": "", "minutes": placebo.minutes}
        assert replace(config, rule=placebo.rule, **told) == replace(placebo, description="")
        assert replace(config.rule, context=placebo.rule.context) == placebo.rule


def test_folders_never_hold_two_configurations():
    """A name means the same in every plan."""
    names: dict[str, Variant] = {}
    for _, variant in VARIANTS:
        assert names.setdefault(variant.name, variant) == variant


def test_plans_are_found_and_adjusted():
    with pytest.raises(ConfigError, match="did you mean table1"):
        find_plan("tabel1")
    (study,) = find_plan("table1", seeds=5, runs=7, rules=["default"]).experiments
    assert (study.seeds, study.runs, study.rules) == (5, 7, ("moments", "default"))
    (study,) = find_plan("horizon").experiments
    assert study.steps == 25 * load_rule("scale").config.horizon > 25 * load_rule("moments").config.horizon
    assert [task_name(task) for task in study.tasks] == list(NAMES)
    assert set(variants.PAPER) == {task_name(task) for task in variants.TABLE1}


finite = st.floats(-1e3, 1e3)


@given(arrays(float, st.integers(2, 8), elements=finite))
def test_intervals_are_student_s(values):
    ours = t_interval(values)
    n = len(values)
    deviation = np.sqrt(((values - values.sum() / n) ** 2).sum() / (n - 1))
    half = stats.t.ppf(0.975, n - 1) * deviation / np.sqrt(n)
    np.testing.assert_allclose((ours.low, ours.high), (values.mean() - half, values.mean() + half), atol=1e-9)
    if deviation > 1e-6:
        reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        np.testing.assert_allclose((ours.low, ours.high), (reference.low, reference.high), rtol=1e-6, atol=1e-9)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = [i.low <= 1 <= i.high for i in (t_interval(x) for x in rng.normal(1, 2, (2000, 3)))]
    assert 0.935 <= np.mean(hits) <= 0.965


@pytest.mark.parametrize("values", [[1.0], [1.0, np.nan]])
def test_no_interval_without_numbers(values):
    assert np.isnan([t_interval(np.array(values)).low, t_interval(np.array(values)).high]).all()


def test_log_ratios_average_within_seeds():
    rng = np.random.default_rng(0)
    control = rng.uniform(0.1, 2, (3, 4, 5))
    scaled = control * np.array([0.5, 1, 2])[:, None, None]
    np.testing.assert_allclose(log_ratios(scaled, control), np.log([0.5, 1, 2]), atol=1e-12)
    broken = scaled.copy()
    broken[1, 0, 0], broken[2, 1, 3] = np.nan, 0
    assert np.isfinite(log_ratios(broken, control)).tolist() == [True, False, False]


def test_spread_tells_runs_from_seeds():
    assert spread(np.array([[1.0, 1.0], [3.0, 3.0]])).runs == 0
    assert spread(np.array([[1.0, 1.0], [3.0, 3.0]])).seeds == pytest.approx(np.sqrt(2))
    alike = spread(np.array([[1.0, 3.0], [1.0, 3.0]]))
    assert (alike.mean, alike.seeds) == (2, 0)
    assert alike.runs == pytest.approx(np.sqrt(2))
    assert np.isnan([spread(np.ones((1, 2))).seeds, spread(np.ones((2, 1))).runs]).all()


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(np.log(0.8), -0.4, -0.01, 3), "helps by 20 %"),
        (Interval(np.log(1.5), 0.01, 0.8, 3), "hurts by 50 %"),
        (Interval(0.1, -0.1, 0.3, 3), "no effect shown beyond placebo"),
        (Interval(0.0, 0.0, 0.0, 3), "no effect shown beyond placebo"),
        (Interval(0.1, np.nan, np.nan, 1), "one seed: no verdict"),
        (Interval(np.nan, np.nan, np.nan, 3), "not comparable: runs diverged"),
    ],
)
def test_verdicts(interval, words):
    assert verdict(interval) == words


def measured(study: Study, lr: float = 1.0) -> np.ndarray:
    """Losses (runs, steps) of a study's only contender on its only task."""
    measure(study)
    found = read_curves(study, study.workloads[0], study.contenders[0], lr, 1)
    assert found is not None
    return found.train


def only(study: Study, contender: Contender, **changes) -> Study:
    """A contender alone on the first task."""
    return replace(study, workloads=study.workloads[:1], contenders=[contender], **changes)


def test_losses_are_those_of_l2o_eval(done, tmp_path):
    """Runs in groups of five with seeds 0, 1, …, to the bit."""
    plan, lab = done
    experiment = plan.experiments[0]
    study = lab.study(replace(experiment, runs=7))
    for contender, lr in ((of_rule("mine", lab.rule(variants.DMD_1_20, 1)), 1.0), (study.contenders[-1], 0.01)):
        found = measured(only(study, contender), lr)
        assert found.shape == (7, study.steps)
        for seed, (start, stop) in enumerate([(0, 5), (5, 7)]):
            plain = FlatWorkload(experiment.tasks[0], lab.load)
            alone = {"workloads": [plain], "runs": stop - start, "seed": seed, "cache": tmp_path / str(seed)}
            np.testing.assert_array_equal(found[start:stop], measured(replace(only(study, contender), **alone), lr))


def test_losses_are_kept_and_belong_to_one_rule(done, tmp_path, monkeypatch):
    plan, lab = done
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(lab.rule(variants.L2O, 0).read_bytes())
    study = only(lab.study(plan.experiments[0]), of_rule("mine", mine), cache=tmp_path / "cache")
    kept = measured(study)
    with monkeypatch.context() as patch:
        patch.setattr(FlatWorkload, "measure", lambda *_: pytest.fail("measured again"))
        np.testing.assert_array_equal(measured(study), kept)
    (workload,) = study.workloads
    assert read_curves(replace(study, runs=4), workload, study.contenders[0], 1.0, 1) is None
    mine.write_bytes(lab.rule(variants.L2O, 1).read_bytes())
    other = only(study, of_rule("mine", mine))
    assert read_curves(other, workload, other.contenders[0], 1.0, 1) is None
    assert not np.array_equal(measured(other), kept)


def test_what_diverged_is_kept_as_such(tmp_path, monkeypatch):
    study = lab_in(tmp_path).study(replace(shrink("table1").experiments[0], runs=2, steps=3))
    curves = torch.tensor([[1.0, 2.0], [3.0, float("nan")], [float("inf"), 1e30]])
    monkeypatch.setattr("l2o_training.compare.flat.rollout", lambda *_: curves)
    adam = replace(study.contenders[-1], lrs=(1.0,))
    np.testing.assert_array_equal(measured(only(study, adam)), np.array([[1, 3, np.nan], [2, np.nan, 1e30]]))


def test_a_damaged_file_is_measured_again(tmp_path):
    study = lab_in(tmp_path).study(shrink("table1").experiments[0])
    study = only(study, replace(study.contenders[-1], lrs=(0.1,)))
    measured(study, 0.1)
    (path,) = (path for path in study.cache.rglob("*.json"))
    kept = path.read_text()
    path.write_text(kept[: len(kept) // 2])
    assert read_curves(study, study.workloads[0], study.contenders[0], 0.1, 1) is None
    measured(study, 0.1)
    assert path.read_text() == kept


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_second_call_does_nothing(done):
    plan, lab = done
    before = snapshot(lab.runs)
    reproduce(plan, lab)
    assert snapshot(lab.runs) == before


def test_a_stopped_run_is_resumed_to_the_same_rule(done, tmp_path):
    plan, finished = done
    lab = lab_in(tmp_path)

    def stop(what, detail, epoch, total):
        if what == "meta-training dmd-1-20-s0" and epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(plan, lab, report=stop, train_only=True)
    folder = lab.folder(variants.DMD_1_20, 0)
    assert any((folder / "checkpoints").iterdir())
    assert not (folder / "rule.safetensors").exists()
    epochs = []
    reproduce(plan, lab, report=lambda what, _, epoch, __: epochs.append((what, epoch)), train_only=True)
    assert epochs[0] == ("meta-training dmd-1-20-s0", 3), "the checkpoint of epoch 2 is taken up"
    for variant in (variants.L2O, variants.DMD_1_20, variants.DMD_1_100):
        for seed in range(2):
            ours, theirs = (where.rule(variant, seed).read_bytes() for where in (lab, finished))
            assert ours == theirs
    assert not (lab.runs / "cache").exists(), "--train-only measures nothing"


def test_runs_equal_those_of_l2o_train(done, tmp_path):
    plan, lab = done
    page = write_page("table1", plan, lab, tmp_path / "pages", []).read_text()
    (command,) = [line for line in page.splitlines() if line.endswith("runs/reproduction/dmd-1-20-s$seed")]
    script = command.replace("$seed", "1").replace("runs/reproduction", str(tmp_path)).replace("l2o ", "-m l2o_cli ", 1)
    subprocess.run(f"{sys.executable} {script}", shell=True, check=True, capture_output=True)
    ours = lab.rule(variants.DMD_1_20, 1).read_bytes()
    assert (tmp_path / "dmd-1-20-s1" / "rule.safetensors").read_bytes() == ours


def test_only_names_variants_and_brings_their_placebo(tmp_path):
    plan, lab = shrink("controls", seeds=1), lab_in(tmp_path)
    with pytest.raises(ConfigError, match="did you mean scaled-1-20"):
        select(plan, ["scaled-1-2"])
    with pytest.raises(ConfigError, match="trains nothing"):
        select(find_plan("horizon"), ["l2o"])
    (study,) = select(plan, ["scaled-1-20"])
    assert [v.name for v in study.variants] == ["l2o", "scaled-1-20"]
    reproduce(replace(plan, experiments=(study,)), lab, only=["l2o"])
    assert {path.name for path in lab.runs.iterdir()} == {"l2o-s0", "cache"}


def test_another_configuration_is_refused_before_anything_is_done(done, tmp_path):
    plan, lab = done
    before = snapshot(lab.runs)
    with pytest.raises(RunError, match=r"another configuration.*--runs-dir"):
        reproduce(plan, replace(lab, changes=(*TINY, "lr=0.5")))
    assert snapshot(lab.runs) == before


def test_missing_data_is_told_first(tmp_path):
    with pytest.raises(DataError, match="--download"):
        reproduce(find_plan("table1"), lab_in(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_work_that_another_process_holds_is_left_and_taken_up_later(tmp_path):
    plan, lab = shrink("fig3", lrs=(), rules=()), lab_in(tmp_path)
    folder = lab.folder(variants.L2O, 0)
    folder.mkdir(parents=True)
    held, order = FileLock(folder / ".reproduce.lock"), []
    held.acquire()

    def report(what, detail, epoch, total):
        order.append(what)
        if detail == "waiting":
            assert what == "another process is at l2o-s0"
            held.release()

    reproduce(plan, lab, train_only=True, report=report, poll=0.0)
    trainings = list(dict.fromkeys(what for what in order if what.startswith("meta-training")))
    assert trainings == [f"meta-training {name}" for name in ("dmd-1-20-s0", "l2o-s1", "dmd-1-20-s1", "l2o-s0")]


def test_a_running_l2o_train_is_waited_for(tmp_path):
    plan, lab = shrink("fig3", seeds=1, lrs=(), rules=()), lab_in(tmp_path)
    folder = lab.folder(variants.L2O, 0)
    folder.mkdir(parents=True)
    held, told = FileLock(folder / ".lock"), []
    held.acquire()

    def report(what, detail, epoch, total):
        if detail == "waiting":
            told.append(what)
            held.release()

    reproduce(plan, lab, train_only=True, report=report, poll=0.0)
    assert told == ["another process is at l2o-s0"]
    assert lab.rule(variants.L2O, 0).is_file()


WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_papers import lab_in, shrink
from l2o_training.compare.papers.run import reproduce
seen = set()
def report(what, detail, epoch, total):
    piece = what if what.startswith("meta") else what + ", " + detail
    if piece not in seen and detail != "waiting":
        seen.add(piece)
        print(piece, flush=True)
reproduce(shrink("table1"), lab_in(Path({folder!r})), report=report, poll=0.05)
"""


def test_two_processes_share_the_work(done, tmp_path):
    """Every piece is done once, and both end with everything done."""
    source = WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    command = [sys.executable, "-W", "error", "-c", source]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    lines = [line for output, _ in outputs for line in output.splitlines()]
    assert len(lines) == len(set(lines)), "nothing is done twice"
    plan, finished = done
    assert collect(lab_in(tmp_path), plan.experiments[0]).missing() == []
    for variant in plan.experiments[0].variants:
        ours, theirs = (where.rule(variant, 0).read_bytes() for where in (lab_in(tmp_path), finished))
        assert ours == theirs


def test_the_page_of_table1(done, tmp_path):
    plan, lab = done
    path = write_page("table1", plan, lab, tmp_path / "pages", ["--seeds", "2", "--threads", "1"])
    text = path.read_text()
    assert path == tmp_path / "pages" / "table1.md"
    assert "l2o reproduce table1 --data-root data --seeds 2 --threads 1" in text
    assert "for seed in 0 1; do" in text
    assert "Changed for this page: `epochs=3`" in text
    numbers = collect(lab, plan.experiments[0])
    curves = numbers.of("l2o", "MNIST-1L")
    share = curves[..., -10:].mean() / numbers.of("adam-0.01", "MNIST-1L")[..., -10:].mean()
    (row,) = [line for line in text.splitlines() if line.startswith("| MNIST-1L")]
    assert f"0.55 (1.90)<br>{curves[..., -10:].mean():.3f} ± " in row
    assert f"({share:.2f})" in row
    assert "| dmd-1-100-s0 |" in text
    assert "put together" in text
    assert "not run" not in text
    assert (tmp_path / "pages" / "table1.png").read_bytes()[:4] == b"\x89PNG"
    index = (tmp_path / "pages.md").read_text()
    assert "](pages/table1.png)" in index
    assert row in index
    assert "Not run: `l2o reproduce fig4`." in index
    assert "for seed in" not in index, "details stay on the plan's page"
    assert str(tmp_path) not in text + index


def test_the_best_learning_rate_is_chosen_for_each_task(done):
    plan, lab = done
    numbers = collect(lab, plan.experiments[0])
    best, lr = numbers.tuned("MNIST-1L")
    finals = {x: numbers.of(f"adam-{x:g}", "MNIST-1L")[..., -10:].mean() for x in plan.experiments[0].lrs}
    assert lr == min(finals, key=finals.get)
    assert best == pytest.approx(finals[lr])
    assert len(finals) >= 7
    del numbers.curves["adam-0.1", "MNIST-1L"]
    assert numbers.tuned("MNIST-1L") is None


def test_effects_are_paired_by_seed_task_and_run(done):
    plan, lab = done
    numbers = collect(lab, plan.experiments[0])
    for task in NAMES:
        for seed in range(2):
            numbers.curves[f"dmd-1-20-s{seed}", task] = numbers.curves[f"l2o-s{seed}", task] * (0.5 if seed else 0.8)
    effect = numbers.effect(variants.DMD_1_20)
    assert effect["all"].mean == pytest.approx((np.log(0.5) + np.log(0.8)) / 2)
    assert effect["MNIST-1L"].count == 2
    reverse = numbers.effect(variants.L2O, control="dmd-1-20")
    assert reverse["all"].mean == pytest.approx(-effect["all"].mean)
    del numbers.curves["dmd-1-20-s1", "MNIST-RELU"]
    assert numbers.effect(variants.DMD_1_20)["all"].mean == pytest.approx(np.log(0.8))


PAGES = [name for name in PLANS if name not in ("table1", "koopman")]


@pytest.mark.parametrize("name", PAGES)
def test_pages_say_what_is_missing(name, tmp_path, done):
    """Every page can be written from what another plan has left, and from nothing."""
    plan, empty = shrink(name), lab_in(tmp_path)
    for lab in (done[1], empty):
        text = write_page(name, plan, lab, tmp_path / "pages", []).read_text()
        assert ("Not run, or" in text) == any(collect(lab, experiment).missing() for experiment in plan.experiments)
        assert "Not run, or" in text or lab is not empty
        assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", text)


def test_a_training_that_two_experiments_share_is_on_the_page_once(tmp_path):
    one, _ = find_plan("networks").experiments
    plan = replace(find_plan("networks"), experiments=(replace(one, seeds=2), replace(one, seeds=1, steps=2000)))
    text = write_page("networks", plan, lab_in(tmp_path), tmp_path / "pages", []).read_text()
    commands = re.findall(r"l2o train .*--out runs/reproduction/(\S+)-s\$seed", text)
    assert commands == ["dm", "dm-enhanced", "rnnprop", "rnnprop-enhanced"]
    assert text.count("| dm-s1 |") == text.count("| dm-s0 |") == 1


def test_the_pages_of_controls_fig3_bundled_and_horizon(done, tmp_path, monkeypatch):
    """Plans whose rules are there already only measure; bundled rules here for a tenth of the steps, or less.

    Beyond its horizon goes the rule with the shortest, in place of the longest.
    """
    _, lab = done
    seen, horizon = [], load_rule("moments").config.horizon
    monkeypatch.setattr(sections, "CHECKPOINTS", (30, 100))
    monkeypatch.setattr(sections, "MULTIPLES", (1, 2, 3))
    for name in ("controls", "fig3", "bundled", "horizon"):
        plan = shrink(name)
        if name == "controls":
            (study,) = plan.experiments
            plan = replace(plan, experiments=(replace(study, variants=(variants.L2O, variants.DMD_1_20)),))
        if name in ("bundled", "horizon"):
            (study,) = plan.experiments
            steps = {"bundled": 100, "horizon": 3 * horizon}[name]
            rules = ("moments",) if name == "horizon" else study.rules
            few = {"steps": steps, "runs": 1, "tasks": study.tasks[:1], "lrs": (0.01,), "rules": rules}
            plan = replace(plan, experiments=(replace(study, **few),))
        reproduce(plan, lab, report=lambda what, *_: seen.append(what))
        text = write_page(name, plan, lab, tmp_path / "pages", []).read_text()
        assert "not run" not in text.lower(), text
        assert (tmp_path / "pages" / f"{name}.png").is_file()
    assert not any(what.startswith("meta-training") for what in seen)


def test_the_koopman_plan(tmp_path):
    """Its quadratics, shortened; the tasks that need data stay away."""
    plan = find_plan("koopman", seeds=2, runs=3)
    plan = replace(plan, experiments=plan.experiments[:1])
    lab = Lab(tmp_path / "runs", tmp_path, changes=("epochs=11", "horizon=80", "validation_runs=2"))
    reproduce(plan, lab)
    text = write_page("koopman", plan, lab, tmp_path / "pages", []).read_text()
    assert "not run" not in text.lower()
    row = next(line for line in text.splitlines() if line.startswith("| quadratics-kae-s0"))
    rows = (tmp_path / "runs" / "quadratics-kae-s0" / "metrics.jsonl").read_text().splitlines()
    koopman = [json.loads(line)["koopman_loss"] for line in rows]
    assert f"{np.mean(koopman[:10]):.3f} → {np.mean(koopman[-10:]):.3f}" in row
    numbers = collect(lab, plan.experiments[0])
    mean = numbers.of("quadratics-l2o", "quadratic-10").mean()
    assert f"| no context | {mean:.3f} ± " in text
    other, flag = (
        [numbers.curves[f"quadratics-{name}-s{seed}", "quadratic-10"].mean(-1) for seed in range(2)]
        for name in ("kae", "flag")
    )
    (row,) = [line for line in text.splitlines() if line.startswith("| KAE")]
    assert row.split("|")[-2].split()[0] == f"{np.exp(np.mean(np.log(other) - np.log(flag))):.2f}"
    assert "| flag: the window is full |" in text


def test_the_fig4_sweep(tmp_path):
    plan = shrink("fig4", seeds=1, runs=2, steps=60, tasks=shrink("fig4").experiments[0].tasks[:1])
    reproduce(plan, lab_in(tmp_path, "epochs=1"))
    lab = lab_in(tmp_path, "epochs=1")
    text = write_page("fig4", plan, lab, tmp_path / "pages", []).read_text()
    assert "not run" not in text.lower()
    numbers = collect(lab, plan.experiments[0])
    share = (
        numbers.of("sweep-dmd-2-50", "MNIST-1L")[..., -10:].mean()
        / numbers.of("adam-0.01", "MNIST-1L")[..., -10:].mean()
    )
    (row, *_) = [line for line in text.splitlines() if line.startswith("| R = 2")]
    assert row.endswith(f"{share:.2f} |")


def test_where_all_runs_diverged_there_is_a_picture_too():
    curves = {"a": np.full((2, 5), np.nan), "b": np.full((2, 5), np.inf)}
    plots.panels({"one": curves, "two": {"a": np.ones((2, 5))}}, target := io.BytesIO(), marks=(3,))
    assert target.getvalue().startswith(b"\x89PNG")


def test_a_name_has_one_colour_in_all_panels(monkeypatch):
    """Also where a task lacks one of them; the legend has them all."""
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    losses = np.ones((2, 5))
    panels = {"one": {"a": losses, "c": losses}, "two": {"a": losses, "b": losses, "c": losses}}
    plots.panels(panels, io.BytesIO())
    monkeypatch.undo()
    (figure,) = drawn
    colours = [{line.get_label(): line.get_color() for line in axes.get_lines()} for axes in figure.axes]
    assert colours[1].items() >= colours[0].items()
    assert len(set(colours[1].values())) == 3
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == {"a", "b", "c"}
    plots.plt.close(figure)


def test_the_command(tmp_path, monkeypatch):
    """Koopman's quadratics alone need no data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PLANS, "koopman", replace(PLANS["koopman"], experiments=PLANS["koopman"].experiments[:1]))
    arguments = ["reproduce", "koopman", "--only", "quadratics-kae", "--seeds", "1", "--runs", "2", "--set", "epochs=2"]
    arguments += ["--set", "validation_runs=1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "docs/reproduction/koopman.md"
    text = Path("docs/reproduction/koopman.md").read_text()
    assert "l2o reproduce koopman --data-root data --seeds 1 --runs 2 --set epochs=2 --set validation_runs=1" in text
    assert "Not run, or not compared: quadratics-flag-s0; quadratics-dmd-raw-s0; quadratics-dmd-scaled-s0." in text
    assert Path("docs/reproduction.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel1"], "did you mean table1"),
        (["table1", "--only", "l2"], "did you mean l2o"),
        (["table1", "--data-root", "none"], "--download"),
        (["table1", "--set", "epcohs=3"], "did you mean epochs"),
        (["table1", "--rule", "nowhere.safetensors"], "does not exist"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["reproduce", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
