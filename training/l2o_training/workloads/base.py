"""What a workload is: a network, its loss, and examples to train and to validate on."""

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from l2o_training.tasks.data import Dataset

Load = Callable[[str], Dataset]
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """A workload with its data in memory.

    Attributes:
        make_model: builds the network with PyTorch's default initialisation.
        loss: network and minibatch → scalar, the mean over the minibatch.
        train, validation: tensors whose first axis counts examples; no example is in both.
        batch_size: examples of a minibatch.
    """

    make_model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    train: Batch
    validation: Batch
    batch_size: int

    def batches(self, seed: int) -> Iterator[Batch]:
        """Minibatches without end: every epoch goes once through the examples, in an order of its own."""
        rng = torch.Generator().manual_seed(seed)
        count = len(self.train[0])
        while True:
            order = torch.randperm(count, generator=rng)
            for start in range(0, count - self.batch_size + 1, self.batch_size):
                index = order[start : start + self.batch_size]
                yield tuple(tensor[index] for tensor in self.train)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training problem that rules and baselines are compared on.

    Attributes:
        name: how tables call it.
        description: network, data and loss in one line.
        build: gives the problem; what it draws comes from seeds of its own.
        data: name of the data set that `build` loads; None where it makes its examples itself.
        modules: those with the code that its losses depend on.
    """

    name: str
    description: str
    build: Callable[[Load], Problem]
    modules: tuple[ModuleType, ...]
    data: str | None = None

    @property
    def version(self) -> str:
        """Twelve digits that change with the workload's code, but not with comments, docstrings or layout."""
        return code_version(*self.modules)


def code_version(*modules: ModuleType) -> str:
    """A digest of what the source code of modules does: of its syntax tree without docstrings."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(_stripped(inspect.getsource(module)).encode())
    return digest.hexdigest()[:12]


def _stripped(source: str) -> str:
    """Code in one canonical layout, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_text(part)] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(node: ast.AST) -> bool:
    """Whether a statement is nothing but a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
