"""What results depend on: the code that is reached from where they are computed, name by name through the imports."""

import ast
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

OWN = ("l2o_runtime", "l2o_training")
"""Packages that are followed; of others the result cache keeps nothing."""

ALL = "*"
"""Stands for all names of a module."""

Place = tuple[str, str]
"""A module, and a name at its top, or `ALL`."""


@dataclass
class Module:
    """The top of a module, without comments and docstrings.

    Attributes:
        definitions: name → the statements that give it a value.
        imports: name → where it comes from, for names from packages of our own.
        rest: statements that only act.
    """

    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, Place] = field(default_factory=dict)
    rest: list[ast.stmt] = field(default_factory=list)


@functools.cache
def code_version(*entries: str) -> str:
    """Twelve digits that change with the code that is reached, but not with comments, docstrings or layout.

    A function is reached with all that its text names, a class with all its methods. What an object turns out to be
    while a program runs is not known: name the places where objects are made too.

    Args:
        entries: where to begin, "package.module:name".

    Raises:
        LookupError: an entry leads nowhere.
    """
    found: dict[Place, str] = {}
    waiting = [_place(entry) for entry in entries]
    for module, name in waiting:
        if not _definitions(module, name) and name not in _read(module).imports:
            raise LookupError(f"{module} has no {name}")
    while waiting:
        place = waiting.pop()
        if place not in found:
            statements = _definitions(*place)
            found[place] = "\n".join(map(_written, statements))
            waiting += _followed(*place)
            waiting += [target for statement in statements for target in _named(place[0], statement)]
    text = "\n".join(f"{place}\n{found[place]}" for place in sorted(found) if found[place])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def imported(module: str) -> set[str]:
    """Modules of our own that come with a module when it is imported, itself among them; those that functions import
    later as well.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for node in ast.walk(ast.parse(source(name) or "")):
                waiting += [part for where, _ in _origins(node).values() for part in _parents(where)]
                waiting += [f"{where}.{what}" for where, what in _origins(node).values() if _is_module(where, what)]
    return found


def source(module: str) -> str | None:
    """The text of a module of our own; None where there is none."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else None


def _place(entry: str) -> Place:
    module, _, name = entry.partition(":")
    return module, name or ALL


@functools.cache
def _read(module: str) -> Module:
    return _parse(source(module) or "")


@functools.cache
def _parse(text: str) -> Module:
    found = Module()
    for statement in _stripped(ast.parse(text)).body:
        names = list(_defined(statement))
        for name in names:
            found.definitions.setdefault(name, []).append(statement)
        found.imports |= _origins(statement)
        if not names and not isinstance(statement, ast.Import | ast.ImportFrom):
            found.rest.append(statement)
    return found


def _stripped(tree: ast.Module) -> ast.Module:
    """Code without docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not _is_text(part)]
            node.body = kept or ([] if node is tree else [ast.Pass()])  # type: ignore[attr-defined]
    return tree


def _is_text(node: ast.AST) -> bool:
    """Whether a statement is nothing but a string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _defined(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement gives a value."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def _origins(node: ast.AST) -> dict[str, Place]:
    """Names that an import binds, and where they come from, for packages of our own."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN:
        return {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    if isinstance(node, ast.Import):
        own = [alias for alias in node.names if alias.name.split(".")[0] in OWN]
        return {alias.asname or alias.name.split(".")[0]: (alias.name, ALL) for alias in own}
    return {}


def _definitions(module: str, name: str) -> list[ast.stmt]:
    """The statements that a place stands for; those that only act belong to every name of a module."""
    read = _read(module)
    if name == ALL:
        return [*(part for parts in read.definitions.values() for part in parts), *read.rest]
    return [*read.definitions[name], *read.rest] if name in read.definitions else []


@functools.cache
def _written(statement: ast.stmt) -> str:
    """A statement in one canonical layout."""
    return ast.unparse(statement)


def _followed(module: str, name: str) -> list[Place]:
    """Where a name comes from that a module itself imports, or that is a module."""
    if name == ALL:
        return []
    read = _read(module)
    if name in read.definitions:
        return []
    if name in read.imports:
        return [read.imports[name]]
    return [(f"{module}.{name}", ALL)] if _is_module(module, name) else []


def _named(module: str, statement: ast.stmt) -> Iterator[Place]:
    """Places that a statement of a module names."""
    read = _read(module)
    local = dict(read.imports)
    for node in ast.walk(statement):
        local |= _origins(node)
    whole = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in local:
            where, what = local[node.value.id]
            if _is_module(where, what):  # of a module only what is taken from it
                whole.add(node.value)
                yield f"{where}.{what}", node.attr
        elif isinstance(node, ast.Name) and node not in whole:
            if node.id in local:
                yield local[node.id]
            elif node.id in read.definitions:
                yield module, node.id


@functools.cache
def _is_module(package: str, name: str) -> bool:
    return name != ALL and source(f"{package}.{name}") is not None


def _parents(module: str) -> list[str]:
    """A module and the packages around it."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
