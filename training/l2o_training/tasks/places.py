"""Where a task of one's own is found: a function in a file or module, which is run; and how its mistakes are told."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from l2o_runtime.config import ConfigError, require
from l2o_training.tasks.together import NotTogether

Make = Callable[[int], tuple[Any, ...]]
"""From a seed to (model, loss), or (model, loss, validate): a module, `loss(model, step)` and `validate(model)`."""


class TaskError(ValueError):
    """A task of the user's own cannot be used.

    Args:
        message: one line.
        trace: where their code failed, if it did; from their first line on.
    """

    def __init__(self, message: str, trace: str = ""):
        super().__init__(message)
        self.trace = trace


@contextmanager
def theirs(what: str) -> Iterator[None]:
    """Their code: what it raises is told with their traceback."""
    try:
        yield
    except (TaskError, NotTogether):
        raise
    except (Exception, SystemExit) as error:
        own = str(Path(__file__).parent.parent)
        frames = traceback.extract_tb(error.__traceback__)
        kept = [f for f in frames if not f.filename.startswith(own) and "importlib" not in f.filename]
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(kept)] if kept else []
        lines += traceback.format_exception_only(error)
        raise TaskError(f"{what} failed: {type(error).__name__}: {error}", "".join(lines)) from None


def is_place(text: str) -> bool:
    """Whether a text is "file.py:function" or "package.module:function", rather than a task's name."""
    return ":" in text


def name_of(place: str) -> str:
    """What tables call a task: its file or module, and the function unless that is `make`.

    >>> name_of("examples/gallery/siren.py:make"), name_of("mine.tasks:small")
    ('siren', 'tasks.small')
    """
    where, _, function = place.rpartition(":")
    stem = Path(where).stem if where.endswith(".py") else where.rpartition(".")[2]
    return stem if function == "make" else f"{stem}.{function}"


def distinct(places: Sequence[str]) -> None:
    """Do all have names of their own, by which results are kept and told?

    Raises:
        ConfigError: two are called alike.
    """
    names = [name_of(place) for place in places]
    twice = next((name for name in names if names.count(name) > 1), None)
    require(
        twice is None, f"--task: two of {', '.join(places)} are called {twice}: give files or functions other names"
    )


def find_make(place: str) -> Make:
    """The function of a place, whose file or module is run.

    Args:
        place: "file.py:function" or "package.module:function".

    Raises:
        ConfigError: there is no such file, module or function.
        TaskError: running the file failed.
    """
    where, colon, name = place.rpartition(":")
    require(bool(colon and where and name), f"task {place!r}: expected file.py:function or package.module:function")
    module = _run_file(Path(where)) if where.endswith(".py") else _imported(where)
    make = getattr(module, name, None)
    if make is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        own = [key for key in functions if getattr(vars(module)[key], "__module__", None) == module.__name__]
        raise ConfigError(f"task {place}: {where} has no {name!r}; it has {', '.join(own) or 'no functions'}")
    require(callable(make), f"task {place}: {name} is of type {type(make).__name__}, not a function")
    return make  # type: ignore[no-any-return]


RAN: dict[tuple[Path, int, int], ModuleType] = {}
"""Files that were run, by path, time of their last change, and size: each runs once."""


def _run_file(path: Path) -> ModuleType:
    require(path.is_file(), f"task file {path} does not exist (looked in {Path.cwd()})")
    key = path.resolve(), path.stat().st_mtime_ns, path.stat().st_size
    if key in RAN:
        return RAN[key]
    if str(path.parent.resolve()) not in sys.path:  # as when Python runs a file, so that it may import its neighbours
        sys.path.insert(0, str(path.parent.resolve()))
    name = f"l2o_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with theirs(f"task file {path}"):
        spec.loader.exec_module(module)
    RAN[key] = module
    return module


def _imported(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    if str(Path.cwd()) not in sys.path:  # as with `python -m`
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        found = None
    require(found is not None, f"task module {name!r} is not found: give file.py:function, or install the package")
    with theirs(f"task module {name}"):
        return importlib.import_module(name)


def text_of(make: Make) -> bytes:
    """The text of the file that a function is in; of one without a file, as in a notebook, its own."""
    file = inspect.getsourcefile(make)
    return Path(file).read_bytes() if file is not None and Path(file).is_file() else inspect.getsource(make).encode()
