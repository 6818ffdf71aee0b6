"""What MkDocs does not do by itself: files from outside docs/, links to them, and pages that are made from the code.

Pages are written for a forge, where links go by the files' places in the repository. On the site a link to a file that
has a page there leads to that page, and one to any other file outside docs/ is plain text.
"""

import dataclasses
import posixpath
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Docstring, DocstringSectionKind
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "research/README.md": "research.md",
    "research/sketch-error.png": "pictures/sketch-error.png",
    "l2o_runtime/pretrained/README.md": "bundled.md",
}
"""File in the repository → file on the site, of those outside docs/."""

PLACES = {page: place for place, page in PAGES.items()}
PACKAGES = {"l2o_runtime": ".", "l2o_training": "training", "l2o_export": "export", "l2o_cli": "cli"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
KEYS = "<!-- keys -->"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the packages' modules into the navigation, and the records of decisions."""
    for item in _lists(config.nav):
        if "api/index.md" in item:
            item.extend({name: f"api/{name}.md"} for name in rooms())
        for entry in item:
            if isinstance(entry, dict) and entry.get("Decisions") == "decisions/README.md":
                records = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
                entry["Decisions"] = ["decisions/README.md", *(f"decisions/{record.name}" for record in records)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/, and the pages of the modules."""
    for place, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / place)))
    for name, modules in rooms().items():
        text = f"# {name}\n\n" + "\n\n".join(
            f"::: {module}\n    options:\n      heading_level: 2" for module in modules
        )
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to where their files are on the site; write the keys of the configuration."""
    if KEYS in markdown:
        markdown = markdown.replace(KEYS, "\n".join(configuration()))
    here = page.file.src_uri
    folder = posixpath.dirname(PLACES.get(here, f"docs/{here}"))

    def lead(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if re.match(r"\w+:", target) or not path:
            return found[0]
        place = posixpath.normpath(posixpath.join(folder, path))
        goal = PAGES.get(place, place.removeprefix("docs/") if place.startswith("docs/") else None)
        if goal is None:
            return text
        return f"{mark}[{text}]({posixpath.relpath(goal, posixpath.dirname(here) or '.')}{hash_}{anchor})"

    return LINK.sub(lead, markdown)


def rooms() -> dict[str, list[str]]:
    """The packages and the packages in them, each with its own modules: those that have a docstring."""
    found: dict[str, list[str]] = {}
    for package, folder in PACKAGES.items():
        paths = (ROOT / folder / package).rglob("*.py")
        for path in sorted(paths, key=lambda path: (path.parent, path.name)):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if path.name.startswith("_") or not path.read_text(encoding="utf-8").startswith('"""'):
                continue
            found.setdefault(".".join(parts[:-1]), []).append(".".join(parts))
    return found


def configuration() -> Iterator[str]:
    """A table of keys, types, defaults and meanings for every dataclass of the configuration of meta-training."""
    from l2o_cli.keys import rows
    from l2o_training.config import TrainConfig

    for path, kind in _dataclasses(TrainConfig):
        says = Docstring(kind.__doc__ or "", parser="google").parse()
        meanings = {
            entry.name: " ".join(entry.description.split())
            for section in says
            if section.kind is DocstringSectionKind.attributes
            for entry in section.value
        }
        own = [row for row in rows(kind) if "." not in row[0]]
        yield f"## {path or 'The run'}\n\n{says[0].value if says else ''}\n"
        if own:
            yield '<div class="keys" markdown>\n\n| key | type | default | meaning |\n|---|---|---|---|'
        for key, type_, default, _ in own:
            cells = (f"`{key}`", type_, f"`{default}`", meanings.get(key, ""))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield "\n</div>\n" if own else ""


def _dataclasses(kind: type) -> Iterator[tuple[str, type]]:
    """A dataclass and those in its fields, level by level, each once, with its place in a preset."""
    waiting, seen = [("", kind)], set()
    for place, each in waiting:
        if each in seen:
            continue
        seen.add(each)
        tag = getattr(each, "kind", None)
        yield f'{place}, kind = "{tag}"' if isinstance(tag, str) else place, each
        hints = typing.get_type_hints(each)
        for field in dataclasses.fields(each):
            inner = f"{place}.{field.name}".removeprefix(".")
            waiting += [(inner, found) for found in _within(hints[field.name])]


def _within(hint: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for part in typing.get_args(hint):
        yield from _within(part)


def _lists(nav: Any) -> Iterator[list[Any]]:
    if isinstance(nav, list):
        yield nav
        for item in nav:
            yield from _lists(item)
    elif isinstance(nav, dict):
        for item in list(nav.values()):
            yield from _lists(item)
