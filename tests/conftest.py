"""Shared fixtures: one thread, every rule of the table, real windows, and where real data may lie."""

import functools
import gc
import getpass
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import Browser, find_browser
from filelock import FileLock
from rules import RULES, make_rule
from torch import nn

from l2o_export.export import export_rule
from l2o_export.formats import WRITERS
from l2o_runtime import Rule, save_rule
from l2o_runtime.files.artifact import find_rule
from l2o_runtime.rules import agreement

torch.set_num_threads(1)
# Compiled once for all workers, and not in the user's own folder.
os.environ.setdefault("L2O_CACHE", str(Path(tempfile.gettempdir()) / f"l2o-tests-{getpass.getuser()}"))
# Tracing, for exports above all, makes so many objects that a fifth of its time went into looking for garbage.
gc.freeze()
gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    """What asks for a browser is marked so."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


@pytest.fixture
def nothing_lengthens(monkeypatch):
    """Steps of the directional rule stay as long as they are; code that was compiled before has the constant in it."""
    monkeypatch.setattr(agreement, "LENGTHENING", 0.0)
    if find_spec("llvmlite") is not None:
        from l2o_runtime.kernels import directional

        fresh = functools.cache(directional.compile_steering.__wrapped__)
        monkeypatch.setattr(directional, "compile_steering", fresh)


@pytest.fixture(params=RULES)
def rule(request) -> Rule:
    """Every rule of the table, untrained."""
    return make_rule(RULES[request.param])


@pytest.fixture
def rule_file(rule, tmp_path) -> Path:
    path = tmp_path / "rule.safetensors"
    save_rule(path, rule)
    return path


Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Once:
    """Fills a folder once for all processes of pytest-xdist: its name, what fills it → the folder, what that gave.

    Tests share the folder, so they only read it.
    """
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"
    root.mkdir(exist_ok=True)

    def fill_once(name: str, fill: Callable[[Path], Any]) -> tuple[Path, Any]:
        folder, gave = root / name, root / f"{name}.pickle"
        with FileLock(root / f"{name}.lock"):
            if not gave.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                content = pickle.dumps(fill(folder))
                gave.write_bytes(content)
        return folder, pickle.loads(gave.read_bytes())

    return fill_once


@pytest.fixture(scope="session")
def bundled_exports(once) -> Callable[[str], tuple[Path, Any]]:
    """A bundled rule's name → a folder of all its formats, the manifest."""
    return lambda name: once(f"export-{name}", lambda out: export_rule(find_rule(name), list(WRITERS), out))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium, where there is one."""
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on the PATH: set L2O_CHROMIUM to one")
    with Browser(path) as found:
        yield found


@pytest.fixture(scope="session")
def snapshots() -> np.ndarray:
    """[θ; L] of a real optimization: (n + 1, 120), Adam on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Sigmoid(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = []
    for _ in range(120):
        index = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[index]), labels[index])
        theta = nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy()
        seen.append(np.append(theta, loss.item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.array(seen).T


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real MNIST, Fashion-MNIST and CIFAR-10, where they are at hand (L2O_DATA, or ../shared/data)."""
    root = Path(os.environ.get("L2O_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "MNIST").is_dir():
        pytest.skip(f"no MNIST under {root}: set L2O_DATA to a folder that has it")
    return root
