"""Exported rules in C++: the header takes the steps that Python takes, refuses what Python refuses, and trains."""

import functools
import os
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.trajectories import STEPS, Trajectory
from recordings import check_steps, eager, recording, with_bad_numbers

from l2o_export.formats import Source, to_torchscript
from l2o_runtime import load_rule
from l2o_runtime.files.artifact import bundled_rules
from l2o_runtime.files.exported import torchscript

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler for C++20"
    ),
]
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "export" / "runtimes" / "cpp"


def compile_all(folder, *options):
    """The program and the example in it; not optimized, for that would take a third of the time, and libtorch works."""
    program = Path(__file__).parent / "programs" / "follow.cpp"
    options = [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", f"-DL2O_PROGRAM={program}", *options]
    options += ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"]
    for command in (["cmake", "-S", FOLDER, "-B", folder, *options], ["cmake", "--build", folder, "-j1"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def build(once) -> Path:
    """The folder of the program, compiled once for all tests."""
    return once("cpp", compile_all)[0]


@pytest.fixture(scope="session")
def sanitized(once, tmp_path_factory) -> Path:
    """The same program, which stops at memory errors, undefined behaviour and leaks."""
    empty = tmp_path_factory.mktemp("sanitizers") / "empty.cpp"
    empty.write_text("int main() {}")
    command = ["c++", "-fsanitize=address,undefined", empty, "-o", empty.with_suffix("")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs a compiler with the libraries of -fsanitize=address,undefined")
    return once("cpp-sanitized", lambda folder: compile_all(folder, "-DL2O_SANITIZE=ON"))[0]


@pytest.fixture(scope="session")
def exported(once):
    """A bundled rule's name → its TorchScript file, as `l2o export` writes it; that it is right is tested elsewhere."""

    def write(name, folder):
        to_torchscript(Source(load_rule(name), {}), folder / "rule.pt")

    return lambda name: once(f"torchscript-{name}", functools.partial(write, name))[0] / "rule.pt"


def follow(build, rule, content, tmp_path):
    """What the program prints, and the parameters after every step if it ends well."""
    torch.save(content, tmp_path / "recording.pt")
    out = tmp_path / "out.pt"
    done = subprocess.run(
        [build / "follow", "follow", rule, tmp_path / "recording.pt", out], capture_output=True, text=True
    )
    return done, torch.load(out, weights_only=True) if done.returncode == 0 else None


@pytest.mark.parametrize("rule", bundled_rules())
def test_two_hundred_steps_are_those_that_were_recorded(build, exported, rule, tmp_path):
    """Halfway the state is saved, and loaded by a new optimizer."""
    content = recording(stop=77)
    done, params = follow(build, exported(rule), content, tmp_path)
    assert done.returncode == 0, done.stderr
    check_steps(Trajectory(content["losses"].double(), params), rule, rule)
    assert f"steps {STEPS}" in done.stdout.splitlines()


@pytest.mark.parametrize(("rule", "total"), [("directional", 0), ("directional", 30), ("scale", 30)])
def test_schedules_and_decay_are_those_of_python(build, exported, rule, total, tmp_path):
    content = recording(30, options=torch.tensor([0.5, 2.0, total], dtype=torch.float64))
    done, params = follow(build, exported(rule), content, tmp_path)
    assert done.returncode == 0, done.stderr
    expected, _ = eager(rule, content, lr=0.5, weight_decay=2.0, total_steps=total or None)
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)


def test_steps_with_bad_numbers_are_skipped_and_counted(build, exported, tmp_path):
    content = with_bad_numbers(recording(12))
    done, params = follow(build, exported("directional"), content, tmp_path)
    expected, health = eager("directional", content)
    assert dict(line.split() for line in done.stdout.splitlines()) == {key: str(n) for key, n in health.items()}
    assert health["steps"] == 8
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)


def bad_inputs(rule, tmp_path):
    """What the program cannot follow: files, recordings, what it has to say."""
    short, turned = recording(2), recording(2)
    short["grads"].pop()
    turned["grads"][2] = turned["grads"][2].mT.contiguous()
    truncated, foreign = tmp_path / "cut.pt", tmp_path / "foreign.pt"
    truncated.write_bytes(rule.read_bytes()[:5000])
    with torchscript():
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), foreign)
    newer = changed(rule, tmp_path, "l2o-rule/2; needs", "l2o-rule/3; needs")
    needy = changed(rule, tmp_path, "needs_loss 0", "needs_loss 1")
    strange = changed(rule, tmp_path, "layout grid", "layout edge")
    return (
        (rule, short, "expected one gradient for each of 4 shapes, got 3"),
        (rule, turned, "gradient 2 has shape [16, 15], expected [15, 16]"),
        (truncated, recording(2), "missing, damaged or no TorchScript"),
        (tmp_path / "nothing.pt", recording(2), "missing, damaged or no TorchScript"),
        (foreign, recording(2), "not a rule, or of an older l2o, without a signature"),
        (newer, recording(2), "this header reads l2o-rule/2"),
        (needy, recording(2, told=False), "needs the loss at every step"),
        (strange, recording(2), "layout.edge is unknown to this header"),
        (changed(rule, tmp_path, "decay_unit", "decay_eins"), recording(2), "which this header does not know"),
        (rule, recording(2, options=torch.tensor([float("nan"), 0, 0]).double()), "expected 0 or more"),
    )


def follow_all(build, cases, tmp_path, *words):
    """What one process says of many recordings."""
    more, words = words, []
    for number, (file, content, _) in enumerate(cases):
        torch.save(content, tmp_path / f"{number}.pt")
        words += [file, tmp_path / f"{number}.pt", tmp_path / f"{number}.out"]
    return subprocess.run([build / "follow", "follow", *words, *more], capture_output=True, text=True)


def test_bad_input_gets_one_line(build, exported, tmp_path):
    cases = bad_inputs(exported("directional"), tmp_path)
    done = follow_all(build, cases, tmp_path)
    assert done.returncode == 1
    for (_, _, message), line in zip(cases, done.stderr.splitlines(), strict=True):
        assert message in line


def test_sanitizers_find_nothing_but_the_memory_that_is_lost_on_purpose(sanitized, exported, tmp_path):
    """Steps that are taken and skipped, a state that is saved and loaded, refusals; nothing of libtorch is left out."""
    good = [
        (exported("directional"), recording(4, stop=2), ""),
        (exported("scale"), with_bad_numbers(recording(10)), ""),
    ]
    bad = bad_inputs(exported("directional"), tmp_path)
    done = follow_all(sanitized, [*good, *bad], tmp_path, "leak")
    said = [line for line in done.stderr.splitlines() if line]
    assert all(line.startswith("error: ") for line in said[: len(bad)]), done.stderr
    assert done.stdout.count("\nsteps ") == len(good)
    if "LeakSanitizer has encountered a fatal error" in done.stderr:
        pytest.skip("this system does not let LeakSanitizer look at processes; nothing else was found")
    assert said[-1] == "SUMMARY: AddressSanitizer: 12345 byte(s) leaked in 1 allocation(s).", done.stderr


def changed(rule, tmp_path, old, new):
    """The file with another signature."""
    path = tmp_path / f"{new.replace('/', '-').replace(' ', '')}.pt"
    with zipfile.ZipFile(rule) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("l2o-rule.json"):
                assert old.encode() in content
                content = content.replace(old.encode(), new.encode())
            target.writestr(entry.filename, content)
    return path


def test_the_page_on_deployment_quotes_the_example():
    page = (ROOT / "docs" / "howto" / "deploy.md").read_text(encoding="utf-8")
    program = (FOLDER / "train_mnist.cpp").read_text(encoding="utf-8")
    quoted = re.findall(r"^```cpp\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert quoted
    assert all(line.strip() in program for code in quoted for line in code.splitlines())


def test_the_header_is_short():
    assert len((FOLDER / "l2o.hpp").read_text(encoding="utf-8").splitlines()) <= 266


def test_the_example_trains_on_idx_files(build, exported, tmp_path):
    """Digits of scikit-learn, enlarged, in MNIST's format."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.pad(images.reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2))) * 15.9
    for kind, part in (("train", slice(0, 1500)), ("t10k", slice(1500, None))):
        for name, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{kind}-{name}-ubyte").write_bytes(header + array.astype("u1").tobytes())
    command = [build / "follow", "train", exported("directional"), tmp_path, "200"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1].removeprefix("accuracy ")) > 0.85
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x09")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "of another size than it says" in done.stderr
