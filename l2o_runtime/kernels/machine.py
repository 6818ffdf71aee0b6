"""Machine code of what `emit` writes: compiled once, kept on disk, and read there by later processes."""

import functools
import gc
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from l2o_runtime.kernels import LOADED, cache

P = ParamSpec("P")
R = TypeVar("R")

OPTIONS = {"speed_level": 2}
"""Of LLVM's passes."""

OURS = "l2o_runtime."

PACKAGE = Path(__file__).parents[1]

GRAIN = 2.0
"""Seconds; times of files are no finer on some disks."""


def once(make: Callable[P, R]) -> Callable[P, R]:
    """`functools.cache` for what makes code, without the collection of garbage meanwhile.

    Code is a hundred thousand small objects. Each full collection that they bring about goes through all objects of the
    process, which with torch takes longer than to make the code.
    """

    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        collects = gc.isenabled()
        gc.disable()
        try:
            return make(*args, **kwargs)
        finally:
            if collects:
                gc.enable()

    return functools.cache(functools.wraps(make)(made))  # type: ignore[return-value]  # its arguments are hashable


@functools.cache
def sources() -> str:
    """Digest of this package's files; nothing if they cannot be read, or were written after they were imported."""
    digest = hashlib.sha256()
    try:
        paths = sorted(PACKAGE.rglob("*.py"))
        for path in paths:
            if path.stat().st_mtime > LOADED - GRAIN:
                return ""
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(cache.name_of(f"{path.relative_to(PACKAGE)}", content).encode())
    except OSError:
        return ""
    return digest.hexdigest() if paths else ""


class Compiled:
    """Machine code for this processor; it lives as long as this object.

    Code that was kept on disk is named by what wrote it, if that is a function of this package, and by the constants of
    its modules, so that it need not be written again, which takes longer than the rest of a first step; else by its
    text.

    Args:
        write: writes LLVM code.
        given: its arguments, whose `repr` tells them apart.
    """

    def __init__(self, write: Callable[..., ir.Module], *given: object):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        processor, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        target = llvm.Target.from_default_triple()
        machine = target.create_target_machine(cpu=processor, features=features, opt=3, jit=True)
        versions = f"{llvmlite.__version__} {llvm.llvm_version_info} {OPTIONS}"
        written = _told(write, given)
        text = "" if written else str(write(*given))
        name = cache.name_of(written, text, processor, features, target.triple, versions)
        kept = cache.read(name)
        if kept is None:
            code = llvm.parse_assembly(text or str(write(*given)))
            code.verify()
            options = llvm.create_pipeline_tuning_options(**OPTIONS)
            options.loop_vectorization = options.slp_vectorization = False
            passes = llvm.create_pass_builder(machine, options)
            passes.getModulePassManager().run(code, passes)
            self.engine = llvm.create_mcjit_compiler(code, machine)
            self.engine.set_object_cache(lambda _, made: cache.write(name, made))
        else:
            self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
            self.engine.add_object_file(llvm.ObjectFileRef.from_data(kept))
        self.engine.finalize_object()

    def address(self, name: str) -> int:
        """Where a function starts."""
        return int(self.engine.get_function_address(name))


def _told(write: Callable[..., ir.Module], given: tuple[object, ...]) -> str:
    """What tells code apart that a function of this package writes; nothing for others."""
    module, name = getattr(write, "__module__", ""), getattr(write, "__qualname__", "")
    ours = module.startswith(OURS) and getattr(sys.modules[module], name, None) is write
    return f"{sources()} {constants(module)} {module}.{name}{given}" if ours and sources() else ""


def constants(module: str) -> str:
    """Constants at the tops of a module and of those that it takes functions from, as they are now: a script or a test
    may have set them.
    """
    found: dict[str, list[str]] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name.startswith(OURS) and name not in found:
            values = vars(sys.modules[name])
            found[name] = [f"{key}={values[key]!r}" for key in sorted(values) if key.isupper() and _plain(values[key])]
            for key, value in values.items():
                origin = str(getattr(value, "__module__", None) or getattr(value, "__name__", ""))
                if origin != f"{name}.{key}":  # a package has those of its modules that happen to be loaded
                    waiting.append(origin)
    return f"{sorted(found.items())}"


def _plain(value: object) -> bool:
    """Whether its `repr` says what it is."""
    if isinstance(value, tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(_plain(item) for pair in value.items() for item in pair)
    return isinstance(value, int | float | str)


@functools.cache
def widest() -> int:
    """Floats in a vector register of this processor: 16, 8 or 4."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4
