"""Meta-training on several ranks: the same as on one, whatever their number, and whatever becomes of one of them."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import ranks_worker
import torch
from safetensors import safe_open
from torch.distributed import HashStore
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from typer.testing import CliRunner

from l2o_cli.main import app
from l2o_runtime import ConfigError
from l2o_training.config import load_preset
from l2o_training.errors import Quiet, RunError
from l2o_training.meta import checkpoints
from l2o_training.meta.trainer import Trainer
from l2o_training.ranks.group import ALONE, Ranks

pytestmark = pytest.mark.ranks

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *sys.path]),
}
SETTINGS = """
epochs = 40
horizon = 20
unroll = 10
lanes = 4
validate_every = 2
validation_runs = 3
[rule]
hidden = 3
layers = 1
[[tasks]]
kind = "quadratic"
size = 5
"""


def torchrun(world, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:6000]


def work(world, jobs, folder):
    torchrun(world, str(Path(ranks_worker.__file__)), jobs, str(folder))


def weights(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """2 ranks: gradients, and a run that stops; from there 4 ranks go on, and, in the tests, one process."""
    folder = tmp_path_factory.mktemp("ranks")
    work(2, "gradients,start-two", folder)
    for copy in ("one", "four"):
        shutil.copytree(folder / "two", folder / copy)
    work(4, "gradients,finish-four", folder)
    return folder


def test_meta_gradients_do_not_depend_on_the_number_of_ranks(folder, tmp_path):
    alone = ranks_worker.gradients(tmp_path, ALONE)
    for world in (2, 4):
        found = torch.load(folder / f"gradients-{world}.pt")
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            error = (found[name] - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert error.max() <= (0 if name in ("es", "pes") else 1e-6), (world, name)
            assert expected.norm() > 0


def test_checkpoints_of_two_ranks_continue_on_one_and_on_four(folder, tmp_path):
    ranks_worker.train(tmp_path, ALONE, stop=False)
    ranks_worker.train(folder / "one", ALONE, stop=False)
    for estimator in ranks_worker.ESTIMATORS:
        whole = weights(tmp_path / estimator / "rule.safetensors")
        for resumed in ("one", "four"):
            found = weights(folder / resumed / estimator / "rule.safetensors")
            for name, expected in whole.items():
                torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)
        rows = (folder / "four" / estimator / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == ranks_worker.CONFIG.epochs
        waited = [json.loads(row)["idle"] for row in rows]
        assert [len(seconds) for seconds in waited] == [2] * ranks_worker.STOP + [4] * ranks_worker.STOP
        assert min(map(min, waited)) > 0


def test_checkpoints_are_what_torch_distributed_checkpoint_reads(folder):
    path = checkpoints.find(folder / "two" / "pes")[ranks_worker.STOP]
    assert len(list(path.glob("*.safetensors"))) == 2
    assert not list(path.glob("*.metadata")), "metadata of the default format are a pickle"
    found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    nested, info = checkpoints.read(path)
    flat = checkpoints.flatten(nested)
    assert found.keys() - flat.keys() == {"info", "rank/0", "rank/1"}
    assert flat.keys() <= found.keys()
    assert info["epoch"] == ranks_worker.STOP


@pytest.mark.parametrize("damage", ["a file is missing", "a file is torn"])
def test_damaged_checkpoints_are_refused(folder, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(folder / "two" / "tbptt", run)
    file = sorted(checkpoints.find(run)[ranks_worker.STOP].glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    if damage == "a file is missing":
        file.unlink()
    with pytest.raises(RunError, match=rf"epoch-{ranks_worker.STOP:08} is damaged .*remove it to go on"):
        Trainer(ranks_worker.config("tbptt"), run, resume=True)
    shutil.rmtree(checkpoints.find(run)[ranks_worker.STOP])
    assert Trainer(ranks_worker.config("tbptt"), run, resume=True).epoch == ranks_worker.STOP - 1


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    writer = checkpoints.Checkpoints(tmp_path)
    for epoch in range(0, 60, 10):
        writer.save(epoch, 20 if epoch >= 20 else 0, {"x": {"y": torch.full((2,), epoch)}}, {"epoch": epoch})
    assert list(checkpoints.find(tmp_path)) == [20, 40, 50]
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []
    nested, info = checkpoints.read(checkpoints.find(tmp_path)[20])
    assert nested["x"]["y"].tolist() == [20, 20]
    assert info["epoch"] == 20


def test_ranks_that_resume_remove_what_a_killed_run_had_yet_to_remove(tmp_path):
    settings, run = dataclasses.replace(ranks_worker.config("tbptt"), epochs=3), tmp_path / "run"
    Trainer(settings, run).run()
    before = set(run.rglob("*"))
    found = checkpoints.find(run)
    for name in (f"epoch-{min({0, 1} - set(found)):08}", ".epoch-00000001.tmp"):
        shutil.copytree(found[3], run / "checkpoints" / name)
    resume = lambda ranks: Trainer(settings, run, resume=True, ranks=ranks).run()  # noqa: E731
    assert together(resume, resume) == [None, None]
    assert {path for path in run.rglob("*") if path.parent.name != "tensorboard"} <= before


def test_fewer_lanes_than_ranks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="lanes: 4 are too few for 5 ranks"):
        Trainer(ranks_worker.CONFIG, tmp_path, ranks=Ranks(size=5))


def test_evaluation_is_the_same_on_any_number_of_ranks(tmp_path):
    """One rank here alone; two and its own shares by torchrun."""
    options = ["default", "--suite=quadratics", "--steps=15", "--runs=2", "--baselines=adam", "--threads=1", "--out"]
    line = ["-m", "l2o_cli", "eval", *options]
    assert CliRunner().invoke(app, [*line[2:], str(tmp_path / "one")]).exit_code == 0
    torchrun(2, *line, str(tmp_path / "two"))
    files, others = (
        {path.relative_to(tmp_path / out) for path in (tmp_path / out).rglob("*.*") if path.suffix != ".lock"}
        for out in ("one", "two")
    )
    assert files == others
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# What follows goes through the command.


def settings(tmp_path):
    (tmp_path / "tiny.toml").write_text(SETTINGS)
    return ["--preset", str(tmp_path / "tiny.toml")]


def command(tmp_path, out, *more):
    return [sys.executable, "-m", "l2o_cli", "train", *settings(tmp_path), "--out", str(tmp_path / out), *more]


def rank_process(rank, out):
    """The process of a rank that trains into a folder."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line, variables = (place.joinpath(name).read_text().split("\0") for name in ("cmdline", "environ"))
            if str(out) in line and f"RANK={rank}" in variables:
                return int(place.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


def disturb(tmp_path, out, ranks, what, *more):
    """Start ranks and send the last but one a signal when it is busy; exit code and what was said."""
    log = tmp_path / f"{out}.log"
    with log.open("w") as file:
        run = subprocess.Popen(
            command(tmp_path, out, f"--nproc={ranks}", *more), env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT
        )
    metrics = tmp_path / out / "metrics.jsonl"
    while run.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 4):
        time.sleep(0.02)
    process = rank_process(ranks - 2, tmp_path / out)
    os.kill(process, what)
    while what == signal.SIGSTOP and run.poll() is None and not is_told_to_end(process):
        time.sleep(0.02)
    if what == signal.SIGSTOP:  # else torchrun waits for it for half a minute
        os.kill(process, signal.SIGCONT)
    return run.wait(300), log.read_text()


def is_told_to_end(process):
    """Whether SIGTERM waits for a process that is stopped."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(status["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds ranks in /proc")
def test_a_killed_rank_is_started_again_and_the_rule_is_the_same(tmp_path):
    code, said = disturb(tmp_path, "killed", 3, signal.SIGKILL, "--max-restarts=1")
    assert code == 0, said
    assert said.count("with 3 ranks into") == 2
    assert "Traceback" not in said
    Trainer(load_preset(settings(tmp_path)[1]), tmp_path / "whole").run()
    whole = weights(tmp_path / "whole" / "rule.safetensors")
    for name, tensor in weights(tmp_path / "killed" / "rule.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-8)
    rows = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 40


def test_rank_0_is_named_where_it_hangs_after_all_have_said_their_word():
    store = HashStore()
    store.set("say/1/0", "")
    with pytest.raises(RunError, match=r"rank 0 gave no answer within 0\.2 s"):
        Ranks(store, rank=1, size=2).exchange("", timeout=0.2)


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds ranks in /proc")
def test_a_rank_that_hangs_is_named(tmp_path):
    code, said = disturb(tmp_path, "hangs", 2, signal.SIGSTOP, "--timeout=3")
    assert code == 2
    # Wherever it was stopped: in a sum, or where texts are exchanged between sums.
    assert re.search(r"rank 0 ((did not come to|came to, but hangs in) sum \d+|gave no answer within 3 s: hangs)", said)
    assert "Traceback" not in said
    assert said.count("error:") == 1


@pytest.mark.parametrize(("every", "ranks"), [(2, 1), (2, 2), (1000, 1)])
def test_interrupted_runs_say_what_is_kept(tmp_path, every, ranks):
    settings = ["--set", "epochs=100000", "--set", f"validate_every={every}", f"--nproc={ranks}"]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            command(tmp_path, "run", *settings),
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells let background jobs ignore it
        )
    folder = tmp_path / "run" / "checkpoints"
    try:
        while run.poll() is None and not (folder / f"epoch-{0 if every > 2 else 2:08}").is_dir():
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 130
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    newest = max(checkpoints.find(tmp_path / "run"))
    assert said.count("interrupted after epoch") == 1
    assert (f"; the checkpoint is of epoch {newest}; go on with --resume" if newest else "nothing was kept") in said
    assert not any(word in said for word in ("error", "Traceback", "signal", "Aborted")), said
    assert (newest == 0) == (every == 1000)


def test_other_commands_say_that_they_were_interrupted(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("l2o_runtime.files.artifact.bundled_rules", interrupt)
    result = CliRunner().invoke(app, ["rules"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_bad_input_is_told_once(tmp_path):
    line = command(tmp_path, "run", "--nproc=2", "--set", "lanes=1")
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "lanes: 1 are too few for 2 ranks" in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


def together(*actions):
    """Do something as each of several ranks, which are threads here; the exceptions that came of it, or None."""
    store, found = HashStore(), [None] * len(actions)

    def act(rank, action):
        try:
            action(Ranks(store, rank, len(actions), timeout=2))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=act, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def said(found):
    """The message of rank 0; the others are silent."""
    assert type(found[0]) is RunError
    assert all(type(error) is Quiet for error in found[1:])
    return str(found[0])


def refuse(message):
    def action():
        raise RunError(message)

    return action


def test_ranks_that_agree_go_on():
    results = {}

    def work(ranks):
        results[ranks.rank] = ranks.exchange(f"{ranks.rank}"), ranks.agree(lambda: ranks.rank)
        ranks.require_same({"config": {"lr": 0.1}})

    assert together(work, work, work) == [None] * 3
    assert results == {rank: (["0", "1", "2"], rank) for rank in range(3)}


def test_what_goes_wrong_anywhere_is_told_by_rank_0():
    fine, fails = (lambda ranks: ranks.agree(dict)), (lambda ranks: ranks.agree(refuse("no data")))
    assert said(together(fine, fine, fails)) == "rank 2: no data"
    assert said(together(fails, fails)) == "no data"
    one, other = ({"config": {"tasks": [{"size": size}]}, "version": "1"} for size in (3, 4))
    message = said(together(lambda ranks: ranks.require_same(one), lambda ranks: ranks.require_same(other)))
    assert "rank 1 was started with config.tasks[0].size = 4, rank 0 with 3" in message


def test_folders_that_are_not_shared_are_told(tmp_path):
    here, there = (lambda ranks: ranks.require_shared(tmp_path / "here")), lambda ranks: ranks.require_shared(tmp_path)
    assert f"rank 1: {tmp_path} is not the folder that rank 0 writes to" in said(together(here, there))
    assert together(here, here) == [None, None]
    assert not list((tmp_path / "here").iterdir())


def test_a_rank_that_says_nothing_is_named():
    found = together(lambda ranks: ranks.exchange(""), lambda ranks: None, lambda ranks: ranks.exchange(""))
    told = [error for error in found if type(error) is RunError]
    assert len(told) == 1
    assert "rank 1 gave no answer within 2 s" in str(told[0])
    assert found[1] is None


@pytest.mark.parametrize(("at", "message"), [(4, "did not come to sum 5"), (5, "came to, but hangs in sum 5")])
def test_a_rank_that_hangs_before_or_in_a_sum_is_named(at, message):
    """Rank 1 of three hangs; the others wait for it in sum 5, and rank 2 a little less than rank 0."""

    def wait(ranks):
        ranks.sums = 5
        for rank, number in enumerate((5, at, 5)):
            ranks.store.set(f"at/{rank}", f"{number}")
        ranks._lost(RuntimeError("timed out"), ranks.timeout * (1 if ranks.main else 0.96))

    found = together(wait, lambda ranks: None, wait)
    assert found[1] is None
    (told,) = (error for error in found if type(error) is RunError)
    assert str(told) == f"rank 1 {message} within 2 s: hangs" or str(told) == f"rank 1 {message} for 2 s"


def test_ranks_that_were_started_differently_are_told(tmp_path):
    """By hand, as on two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank, extra in enumerate(["lr=0.003", "lr=0.1"]):
        place = {"RANK": f"{rank}", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        line = command(tmp_path, "run", "--set", extra)
        ranks.append(subprocess.Popen(line, env=ENVIRONMENT | place, stderr=subprocess.PIPE, text=True))
    heard = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], heard
    assert heard[0].count("error:") == 1
    assert "rank 1 was started with config.lr = 0.1, rank 0 with 0.003" in heard[0]
    assert heard[1] == ""


def test_a_rendezvous_out_of_reach_is_told(tmp_path):
    place = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29613",
        "L2O_START_TIMEOUT": "2",
    }
    done = subprocess.run(
        command(tmp_path, "run"), env=ENVIRONMENT | place, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "rank 1: no rendezvous at 127.0.0.1:29613 within 2 s" in done.stderr
    assert "Traceback" not in done.stderr
