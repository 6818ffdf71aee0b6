"""Machine code on disk is used again, and never if anybody else could have written it."""

import ctypes
import errno
import gc
import importlib
import os
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("llvmlite", reason="the CPU kernel needs llvmlite: pip install '.[fast]'")

import l2o_runtime
from l2o_runtime.kernels import cache, emit, machine

pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="code is kept where files have owners")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "code"))
    return tmp_path / "code"


@pytest.fixture
def passes(monkeypatch):
    """How often LLVM has optimised something."""
    made = []
    builder = machine.llvm.create_pass_builder
    monkeypatch.setattr(machine.llvm, "create_pass_builder", lambda *x: made.append(1) or builder(*x))
    return made


def exponentials(width=4):
    """Of four numbers, by code that is compiled or read."""
    code = machine.Compiled(emit.function_module, "exp", width)
    x, y = torch.linspace(-1, 1, width), torch.zeros(width)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    kind(code.address("apply"))(1, x.data_ptr(), y.data_ptr())
    torch.testing.assert_close(y, x.exp())


def test_code_is_compiled_once(place, passes):
    exponentials()
    exponentials()
    assert len(passes) == 1
    assert len(list(place.iterdir())) == 1
    exponentials(8)
    assert len(passes) == 2
    assert place.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in place.iterdir())


@pytest.fixture
def settled(monkeypatch):
    """The package's files as written long before they were imported, whatever was done to them just now."""
    monkeypatch.setattr(machine, "LOADED", machine.LOADED + 1e9)
    machine.sources.cache_clear()
    yield
    machine.sources.cache_clear()


def test_code_that_is_kept_is_not_written_again(place, settled, monkeypatch):
    def write(name, width):
        written.append(width)
        return module(name, width)

    written, module = [], emit.function_module
    write.__module__, write.__qualname__ = module.__module__, module.__qualname__
    monkeypatch.setattr(emit, "function_module", write)
    for width in (4, 4, 8, 4, 8):
        exponentials(width)
    assert written == [4, 8]


def test_constants_that_somebody_set_are_told_apart(place, settled, monkeypatch):
    """In the module that writes, in one that it takes functions from, and in numbers within numbers."""
    from l2o_runtime.kernels import steering_code
    from l2o_runtime.rules import DirectionalConfig, agreement

    config, seen = DirectionalConfig(), set()
    changes = [(steering_code, "WIDTH", 8), (agreement, "LENGTHENING", 0.0), (emit, "NUMERATOR", (1.0, 0.5))]
    for module, name, value in [(machine, "GRAIN", 1.0), *changes]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            seen.add(machine._told(steering_code.steering_module, (config,)))
    assert "" not in seen
    assert len(seen) == 1 + len(changes), "and GRAIN is not in the code"


@pytest.mark.parametrize("name", ["directional", "lstm", "orthogonal", "steering", "tiered", "whole"])
def test_constants_are_the_same_in_every_process(name):
    """Whatever else of the package it has imported."""
    module = f"l2o_runtime.kernels.{name}_code"
    for found in pkgutil.walk_packages(l2o_runtime.__path__, "l2o_runtime."):
        if find_spec("triton") is not None or "triton" not in found.name:
            importlib.import_module(found.name)
    script = f"import {module}; from l2o_runtime.kernels.machine import constants; print(constants('{module}'))"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert other.strip() == machine.constants(module)


def test_files_that_changed_since_they_were_imported_name_nothing(place, settled, monkeypatch):
    assert len(machine.sources()) == 64
    monkeypatch.setattr(machine, "LOADED", 0.0)
    machine.sources.cache_clear()
    assert machine.sources() == ""
    exponentials()
    exponentials()
    assert len(list(place.iterdir())) == 1, "it is named by its text"


def test_files_that_cannot_be_read_name_nothing(tmp_path, settled, monkeypatch):
    for package in (tmp_path / "missing", tmp_path):
        monkeypatch.setattr(machine, "PACKAGE", package)
        machine.sources.cache_clear()
        assert machine.sources() == ""
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere")
    machine.sources.cache_clear()
    assert machine.sources() == ""


def test_any_change_of_a_file_is_another_digest(tmp_path, settled, monkeypatch):
    monkeypatch.setattr(machine, "PACKAGE", tmp_path)
    (tmp_path / "inner").mkdir()
    found = set()
    for name, text in (("a.py", "1"), ("inner/b.py", "2"), ("a.py", "3"), ("inner/b.py", "")):
        (tmp_path / name).write_text(text)
        machine.sources.cache_clear()
        found.add(machine.sources())
    assert len(found) == 4


def test_functions_from_elsewhere_are_told_apart_by_what_they_write(place, settled):
    modules = [emit.function_module(name, 4) for name in ("exp", "log")]
    for module in modules:
        machine.Compiled(lambda module=module: module)
    assert len(list(place.iterdir())) == 2


def test_nothing_is_kept_if_it_is_turned_off(passes, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "off")
    exponentials()
    exponentials()
    assert len(passes) == 2
    assert cache.folder() is None


@pytest.mark.parametrize("damage", ["cut", "emptied", "changed", "digest"])
def test_damaged_files_are_compiled_anew_and_replaced(place, passes, damage):
    exponentials()
    (path,) = place.iterdir()
    good = path.read_bytes()
    bad = bytearray(good)
    bad[3 if damage == "digest" else -3] ^= 1
    path.write_bytes({"cut": good[:-7], "emptied": b""}.get(damage, bytes(bad)))
    exponentials()
    assert len(passes) == 2
    assert path.read_bytes() == good


@pytest.mark.parametrize("loosened", ["file", "folder"])
def test_what_others_may_write_to_is_not_read(place, passes, loosened):
    exponentials()
    (path,) = place.iterdir()
    (path if loosened == "file" else place).chmod(0o777)
    assert cache.read(path.name) is None
    exponentials()
    assert len(passes) == 2


def test_links_are_not_followed(place, tmp_path):
    exponentials()
    (path,) = place.iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.read(path.name) is None
    place.rename(tmp_path / "other")
    place.symlink_to(tmp_path / "other")
    assert cache.folder() is None


def test_another_user_s_folder_is_not_used(place, monkeypatch):
    cache.write("name", b"code")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cache.read("name") is None


@pytest.mark.parametrize("where", ["file", "/proc/nowhere"])
def test_a_folder_that_cannot_be_made_is_done_without(tmp_path, monkeypatch, passes, where):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / where))
    exponentials()
    assert len(passes) == 1


def test_a_full_disk_leaves_nothing(place, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache.write("name", b"code")
    assert list(place.iterdir()) == []
    assert cache.read("name") is None


def test_what_was_not_used_for_long_is_deleted_and_nothing_of_others(place, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 3)
    names = [cache.name_of(f"{number}") for number in range(5)]
    place.mkdir(mode=0o700)
    for number in range(7):
        (place / f"thesis-{number}.txt").write_text("mine")
    for number, name in enumerate(names):
        cache.write(name, b"code")
        os.utime(place / name, (number, number))
        if number == 2:
            assert cache.read(names[0]) == b"code"
    left = {path.name for path in place.iterdir()}
    assert {name for name in names if name in left} == {names[0], names[3], names[4]}
    assert len(left) == 3 + 7


@pytest.mark.parametrize("given", [True, False])
def test_a_user_without_a_home_has_no_cache(tmp_path, monkeypatch, given, passes):
    import pwd

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    if given:
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "code"))
    exponentials()
    assert (cache.folder() is not None) == given


def test_names_depend_on_all_there_is():
    names = {cache.name_of(*parts) for parts in (("a", "b"), ("ab", ""), ("", "ab"), ("a", "b", ""), ("b", "a"))}
    assert len(names) == 5


def test_the_usual_place_is_the_user_s_cache(tmp_path, monkeypatch):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "l2o"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "l2o"


@pytest.mark.parametrize("collects", [True, False])
def test_making_code_leaves_the_collection_of_garbage_as_it_was(collects):
    """And makes it once; with an error, too."""
    seen = []

    @machine.once
    def make(name):
        seen.append((name, gc.isenabled()))
        if name == "bad":
            raise ValueError(name)
        return name

    before = gc.isenabled()
    try:
        gc.enable() if collects else gc.disable()
        assert [make("good"), make("good")] == ["good", "good"]
        assert gc.isenabled() == collects
        with pytest.raises(ValueError, match="bad"):
            make("bad")
        assert gc.isenabled() == collects
    finally:
        gc.enable() if before else gc.disable()
    assert seen == [("good", False), ("bad", False)]
