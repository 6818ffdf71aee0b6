"""What is written: links lead somewhere, the README stays short, decisions are dated, snippets run, the site builds."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from l2o_cli.main import app
from l2o_training.config import load_preset, preset_names

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
FENCE = re.compile(r"^( *)```.*?^\1```", flags=re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
PATH = re.compile(r"(?<![\w/.<>-])(?:[\w.-]+/)+(?:[\w.-]+\.(?:jinja|md|png|py|sbatch|toml|yaml|yml))?(?![\w/*{<-])")
COMMAND = re.compile(r"\b(?:python|sh|sbatch) ([\w./-]+\.\w+)")
PROGRAM = typer.main.get_command(app)
ELSEWHERE = {"runs/", "data/", "site/", "test/test_optim.py"}
"""What programs make or users have, and a file of PyTorch's."""


def documents() -> list[Path]:
    """All pages in the repository, but for what is made or installed in it."""
    made = {".venv", "runs", "site", "dist"}
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in made and path.name[0] != "."]
    pages = [page for folder in folders for page in folder.rglob("*.md") if "node_modules" not in page.parts]
    return sorted([*ROOT.glob("*.md"), *pages])


CURRENT = [page for page in documents() if not re.match(r"\d{4}-", page.name)]
"""Names and commands in a record are those of its day."""


def commands(text: str) -> list[str]:
    """What is to be typed into a terminal: lines of code, fenced or indented, and code in a line."""
    blocks = [*FENCE.finditer(text), *re.finditer(r"^(?: {4}.+\n)+", text, flags=re.MULTILINE)]
    lines = [line.strip() for block in blocks for line in block[0].replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    return [line for line in lines if re.match(r"(?:l2o|python|pytest) \S", line)]


def anchors(page: Path) -> set[str]:
    """Of the headings, as forges make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    wrong = []
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    named = {path for code in CODE.findall(FENCE.sub("", text)) for path in PATH.findall(code)}
    named |= {path for path in COMMAND.findall(text) if "/" in path}
    rooms = [ROOT, ROOT / "tests", *(ROOT / "training").glob("l2o_*")]
    written = {path for path in named if "NAME" not in path and not path.startswith(".venv")}
    wrong = {path for path in written - ELSEWHERE if not any((room / path).exists() for room in rooms)}
    assert not wrong


def with_neighbours(script: Path) -> str:
    """The text of a script, and of the modules beside it that it imports, which may add options."""
    text = script.read_text(encoding="utf-8")
    beside = [script.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
    return text + "".join(path.read_text(encoding="utf-8") for path in beside if path.is_file())


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_what_programs_take(page):
    """Options of `l2o` exist, presets take what is set, and scripts name their options."""
    wrong = []
    for line in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)
        if words[0] == "l2o" and words[1] in PROGRAM.commands:
            taken = {name for option in PROGRAM.commands[words[1]].params for name in option.opts} | {"-h", "--help"}
            wrong += [(line, word) for word in words if re.match("--?[a-z]", word) and word.split("=")[0] not in taken]
            if "--preset" in words and (name := words[words.index("--preset") + 1]) in preset_names():
                load_preset(name, [word for flag, word in pairwise(words) if flag == "--set"])
        elif words[0] == "python" and words[1].endswith(".py"):
            source = with_neighbours(ROOT / words[1])
            wrong += [(line, word) for word in words if word[:2] == "--" and f'"{word.split("=")[0]}"' not in source]
        elif words[:3] == ["python", "-m", "pytest"] or words[0] == "pytest":
            wrong += [(line, word) for word in words if "/" in word and not (ROOT / word).exists()]
    assert not wrong


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []


def test_readme_has_sentences_of_at_most_forty_words():
    text = FENCE.sub("", (ROOT / "README.md").read_text(encoding="utf-8"))
    prose = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "!")))
    prose = LINK.sub(lambda found: found[0].partition("](")[0], prose)
    sentences = re.split(r"(?<=[.:;])\s|\n\n|\n- | · ", prose)
    assert [sentence for sentence in sentences if len(sentence.split()) > 40] == []


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/which-rule.md", "docs/results/index.md"])
def test_figures_are_those_of_the_pages_that_have_their_commands(page):
    interval = re.compile(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]")
    sources = [ROOT / "docs" / "evaluation.md", *(ROOT / "docs" / "reproduction").glob("*.md")]
    known = set(interval.findall(" ".join(source.read_text(encoding="utf-8") for source in sources)))
    assert set(interval.findall((ROOT / page).read_text(encoding="utf-8"))) <= known


def test_decisions_are_dated_records_in_one_list():
    folder = ROOT / "docs" / "decisions"
    records = sorted(folder.glob("[0-9]*.md"))
    assert [record.name[:4] for record in records] == [f"{number + 1:04d}" for number in range(len(records))]
    rows = []
    for record in records:
        title, _, line, *_ = record.read_text(encoding="utf-8").splitlines()
        date, status = line.split(" · ")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
        assert re.fullmatch(r"in force|superseded by \[\d{4}\]\(.*\)", status), record.name
        rows.append(f"| {record.name[:4]} | [{title[2:]}]({record.name}) | {date} | {status} |")
    listed = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in listed if re.match(r"\| \d", line)] == rows


@pytest.mark.parametrize("page", ["check", "resume"])
def test_snippets_run(page, tmp_path):
    text = (ROOT / "docs" / "howto" / f"{page}.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": _path()},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_site_builds_without_warnings_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    env = os.environ | {"PYTHONPATH": _path(), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    start = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\"\s>]+)|<link[^>]* href=\"?([^\"\s>]+)", start)
    assert fetched
    assert [url for urls in fetched for url in urls if re.match(r"\w+:", url)] == []
    page = (tmp_path / "site" / "configuration.html").read_text(encoding="utf-8")
    assert all(f"<code>{key}</code>" in page for key in ("epochs", "horizon", "noise_floor", "sketch", "label_noise"))


def _path() -> str:
    folders = [ROOT, ROOT / "training", ROOT / "export", ROOT / "cli"]
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
