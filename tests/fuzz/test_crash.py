"""What a killed process leaves: whole files, nothing that piles up, and a run that continues to the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from l2o_runtime.files.atomic import atomic_write, remove_leftovers
from l2o_training.config import load_preset
from l2o_training.errors import RunError
from l2o_training.meta import checkpoints
from l2o_training.meta.trainer import Trainer
from l2o_training.tasks.data import DataError, load_dataset

pytestmark = pytest.mark.slow

HARNESS = Path(__file__).with_name("kill_and_resume.py")
TINY = [
    *("epochs=4", "horizon=10", "unroll=5", "batch=1", "validate_every=2", "validation_runs=1"),
    *("rule.context.window=5", "rule.hidden=4", "rule.layers=1"),
]


def trainer(folder, **options):
    return Trainer(load_preset("demo", TINY), folder, **options)


def test_killed_processes_resume_to_the_same_bits():
    done = subprocess.run([sys.executable, HARNESS, "--kills=0", "--points=3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 failures") == 2


def test_a_run_that_was_killed_before_its_first_checkpoint_resumes(tmp_path):
    whole = trainer(tmp_path / "whole").run().read_bytes()
    killed = tmp_path / "killed"
    killed.mkdir()
    with pytest.raises(RunError, match="no run to resume"):
        trainer(killed, resume=True)
    (killed / ".lock").touch()
    assert trainer(killed, resume=True).run().read_bytes() == whole


def test_what_a_checkpoint_says_is_done_is_on_disk(tmp_path, monkeypatch):
    rename, epochs = Path.replace, []

    def rename_and_look(self, target):
        renamed = rename(self, target)
        if renamed.name.startswith("epoch-"):
            epochs.append(checkpoints.read(renamed)[1]["epoch"])
            board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
            logged = board.Scalars("meta_loss") if epochs[-1] else []
            assert [event.step for event in logged] == list(range(1, epochs[-1] + 1))
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == epochs[-1]
        return renamed

    monkeypatch.setattr(Path, "replace", rename_and_look)
    trainer(tmp_path).run()
    assert epochs == [0, 2, 4]


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    for name in (".rule.notes", ".rule.notes.tmp", "rule", "rule.tmp", ".lock"):
        (tmp_path / name).touch()
    with atomic_write(tmp_path / "rule.safetensors"):
        kept = set(tmp_path.iterdir())
        killed = [atomic_write(tmp_path / "rule") for _ in range(2)]
        for writer in killed:
            writer.__enter__()
        assert len(set(tmp_path.iterdir()) - kept) == 2
        remove_leftovers(tmp_path / "rule")
        assert set(tmp_path.iterdir()) == kept


def test_a_resumed_run_tidies_up(tmp_path):
    run = trainer(tmp_path / "run")
    run.run()
    writers = [atomic_write(tmp_path / "run" / name) for name in ("metrics.jsonl", "rule.safetensors", "mine")]
    before = set((tmp_path / "run").iterdir())
    for writer in writers:
        writer.__enter__()
    torn = tmp_path / "run" / "checkpoints" / ".epoch-00000006.tmp"
    torn.mkdir()
    (torn / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"torn")
    trainer(tmp_path / "run", resume=True).run()
    assert not torn.exists()
    left = set((tmp_path / "run").iterdir()) - before
    assert [path.name.startswith(".mine.") for path in left] == [True]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("place", "name"), [(Path, "replace"), (checkpoints.shutil, "rmtree")])
def test_old_checkpoints_go_though_nothing_is_left_to_train(tmp_path, monkeypatch, place, name):
    """Killed when the last checkpoint was written, and one that it makes needless was there, or about to be removed."""

    def run(folder, **options):
        Trainer(load_preset("demo", [*TINY, "epochs=6", "validate_every=1"]), tmp_path / folder, **options).run()

    def names(folder):
        paths = [*(tmp_path / folder).iterdir(), *(tmp_path / folder / "checkpoints").rglob("*")]
        return sorted(str(path.relative_to(tmp_path / folder)) for path in paths)

    def die(*arguments):
        if (tmp_path / "killed" / "checkpoints" / "epoch-00000006").exists():
            raise Killed
        return real(*arguments)

    run("whole")
    real = getattr(place, name)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, die)
        with pytest.raises(Killed):
            run("killed")
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) > len(checkpoints.find(tmp_path / "whole"))
    run("killed", resume=True)
    assert names("killed") == names("whole")


def test_data_cut_short_is_refused(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    header = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (10, 28, 28))
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{name}-ubyte").write_bytes(header + bytes(28 * 28))
    with pytest.raises(DataError, match="remove what is damaged"):
        load_dataset("mnist", tmp_path)
