"""The report: what is in the file, and what a browser makes of it."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from comparing import scripts

from l2o_training.compare import contenders
from l2o_training.compare.report.page import render, write_report
from l2o_training.compare.report.pictures import as_element, forest, profiles
from l2o_training.compare.report.words import NAMED, cautions, headline, verdict
from l2o_training.compare.study import Study
from l2o_training.compare.summary import Findings, summarise
from l2o_training.compare.workloads import Curves, looks
from l2o_training.tasks.data import Datasets

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=alert(1)>$x_1$ \"'&amp;"
COMMAND = "l2o eval '<default>' --suite unseen"
VOID = {"meta", "link", "input", "br", "img", "hr"}


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> Findings:
    """Made-up runs of a rule, another with a hostile name, and all baselines; momentum diverges on one task."""
    folder = tmp_path_factory.mktemp("report")
    (rule,) = contenders.rules(["moments"])
    study = Study(
        suite="unseen",
        workloads=scripts(("convnet", "vae", "tabular"), Datasets(folder)),
        contenders=[rule, replace(rule, name=HOSTILE, seen=frozenset({"cifar10"})), *contenders.baselines("all")],
        steps=500,
        horizons=(1, 3),
        cache=folder,
    )
    places = {contender.name: index for index, contender in enumerate(study.contenders)}

    def read(study, workload, contender, lr, horizon):
        runs = [made_up(study.steps * horizon, workload, contender, lr, seed, horizon) for seed in range(study.runs)]
        train, held = map(np.array, zip(*runs, strict=True))
        return Curves(train, held, np.empty((study.runs, 0)), 12_345, 8.0)

    def made_up(steps, workload, contender, lr, seed, horizon):
        rng = np.random.default_rng([seed, places[contender.name], horizon])
        end = 0.2 + 0.02 * places[contender.name] + abs(math.log10(lr / 0.01)) / 20
        curve = 2 * np.exp(-np.linspace(0, 5, steps)) + end + 0.01 * rng.random(steps)
        if (contender.name, workload.name) == ("momentum", "vae"):
            curve[steps // 2 :] = math.nan
        held = [float(curve[k - 1]) + 0.1 for k in looks(steps)]
        return curve, held

    patch = pytest.MonkeyPatch()
    with patch.context() as change:
        change.setattr("l2o_training.compare.summary.read_curves", read)
        change.setattr(
            "l2o_training.compare.summary.read_times",
            lambda study, _: {c.name: (0.01, 0.004 if c.learned else 0.001) for c in study.contenders},
        )
        return summarise(study)


@pytest.fixture(scope="module")
def page(findings, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report with space.html"
    write_report(findings, COMMAND, path)
    return path


class Reader(HTMLParser):
    """Tags with their attributes; fails where they do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_file_stands_alone(page):
    text = page.read_text()
    reader = Reader(text)
    assert {tag for tag, _ in reader.tags} & {"script", "iframe", "object", "img"} == set()
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), (tag, target)
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(text) < 2_000_000


def test_what_users_chose_is_escaped(page):
    text = page.read_text()
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;$x_1$" in text
    assert "&lt;default&gt;" in text


def test_ids_are_unique_and_references_lead_somewhere(page):
    reader = Reader(page.read_text())
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a.get(name) or "" for _, a in reader.tags for name in ("href", "xlink:href")]
    wanted = [link[1:] for link in links if link.startswith("#")]
    wanted += re.findall(r"url\(#([^)]+)\)", page.read_text())
    wanted += [a["aria-labelledby"] for _, a in reader.tags if "aria-labelledby" in a]
    assert wanted
    assert set(wanted) <= set(ids)


def test_it_is_made_for_everybody(page):
    reader = Reader(page.read_text())
    assert reader.of("html")[0]["lang"] == "en"
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in reader.of("figure"))
    assert all("scope" in header for header in reader.of("th"))
    assert all(a.get("aria-label") for _, a in reader.tags if a.get("role") == "region")
    labelled = page.read_text().count("<label><input ")
    assert labelled == len(reader.of("input")) > 0


def test_the_figures_are_those_of_the_results(findings, page):
    text = page.read_text()
    for row in findings.rows:
        if row.train is not None:
            assert f"{row.train:#.3g} ± {row.train_std:#.3g}" in text
    assert "diverged" in text
    assert text.count("<figure") == 2 * 4 + 2 * 3 * 2  # per length: overview, and two per task


def test_rules_stand_beside_each_other_optimizer(findings, page):
    text = page.read_text()
    rules = sum(contender.learned for contender in findings.study.contenders)
    rivals = len(findings.study.contenders)  # all but itself, and the better schedule
    assert len(findings.versus) == len(findings.study.horizons) * rules * rivals
    assert text.count("<td>validation</td>") == len(findings.versus)
    assert f"{findings.versus[0].train.worst}: " in text


def test_three_tasks_are_too_few_for_an_interval(findings, page):
    assert all(math.isnan(bound) for row in findings.overall for bound in (*row.train[1:], *row.validation[1:]))
    text = page.read_text()
    assert "over tasks, too few for an interval; below 1" in text
    assert not re.search(r"\d \[[\d.]+, [\d.]+\]", text)


def test_readers_are_warned(findings):
    found = " ".join(cautions(findings))
    assert "moments was meta-trained for 1,000 steps and runs for up to 1,500" in found
    assert "meta-trained on cifar10" in found
    edges = [row for row in findings.rows if row.edge]
    assert {(row.optimizer, row.workload) for row in edges} == {("momentum", "vae")}, "elsewhere 0.01 is best, inside"
    assert "momentum on vae (500 steps, 0.001)" in found
    few = replace(findings.study, runs=2, contenders=[replace(e, lrs=e.lrs[:3]) for e in findings.study.contenders])
    edge = [replace(row, edge=True) for row in findings.rows]
    found = " ".join(cautions(replace(findings, study=few, rows=edge)))
    assert f"and {len(edge) - NAMED} more, marked in results.csv" in found
    assert "over 3 of the 14" in found
    assert "Runs per setting: 2" in found


def test_the_headline_says_what_the_interval_says(findings):
    row = findings.overall[0]
    for interval, word in (
        ((0.8, 0.7, 0.9), "better"),
        ((1.0, 0.7, 1.2), "no difference shown"),
        ((2.0, 1.1, 3.0), "worse"),
        ((0.5, math.nan, math.nan), "3 tasks, too few for an interval"),
    ):
        assert verdict(replace(row, train=interval)) == word
    said = headline(findings, findings.study.contenders[0])
    assert len(said) == 3
    assert "4.00 times" in said[-1]


def test_pictures_take_the_colours_of_the_page():
    svg = profiles("p", np.array([[1.0, 2.0], [math.inf, 1.0]]), "τ")
    assert svg.startswith("<svg ")
    assert "#5e" not in svg, "every colour is a variable"
    assert set(re.findall(r'class="s(\d)"', svg)) == {"0", "1"}
    assert profiles("p", np.array([[1.0, 2.0], [math.inf, 1.0]]), "τ") == svg, "the same bytes every time"
    assert "adam-0.001</text>" in forest("f", ["adam-0.001"], [(1.2345, 1.0, 1.5)], "ratio")
    assert as_element('<?xml?><svg width="5pt" id="a"><g id="b"/><use href="#b" x="1.2345"/></svg>') == (
        '<svg aria-hidden="true" focusable="false"><g id="b"/><use href="#b" x="1.2"/></svg>'
    )


def test_the_same_findings_give_the_same_page(findings, page):
    assert render(findings, COMMAND) == page.read_text()


def test_a_page_that_cannot_be_written_leaves_nothing(findings, tmp_path, monkeypatch):
    monkeypatch.setattr("l2o_training.compare.report.page.render", lambda findings, command: "page")
    with pytest.raises(OSError, match="none"):
        write_report(findings, COMMAND, tmp_path / "none" / "r.html")
    assert list(tmp_path.iterdir()) == []


VISIBLE = "(e => e.checkVisibility() && e.getBoundingClientRect().width > 0)"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1440])
def test_it_loads_and_fits(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"
    long = "document.querySelector('#protocol + ul code').append('LearnedOptimizer'.repeat(9))"
    assert browser.evaluate(f"{long}, document.documentElement.scrollWidth") <= width, "nor would longer code"
    drawn = f"[...document.querySelectorAll('figure svg')].filter({VISIBLE})"
    assert browser.evaluate(f"{drawn}.length") == 4 + 3 * 2
    assert browser.evaluate(f"{drawn}.every(s => s.querySelectorAll('path').length > 5 && s.getBBox().height > 50)")
    # What is smallest in the pictures is still to be read.
    texts = f"{drawn}.flatMap(s => [...s.querySelectorAll('text')])"
    assert browser.evaluate(f"Math.min(...{texts}.map(t => t.getBoundingClientRect().height))") >= 9
    dim = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(x => x < 60)"
    assert browser.evaluate(dim) is dark


CONTRAST = """(() => {
  const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const ratio = c => (Math.max(light(c), ground) + 0.05) / (Math.min(light(c), ground) + 0.05);
  const lines = [...document.querySelectorAll('svg.key path')].map(p => ratio(getComputedStyle(p).stroke));
  const texts = [...document.querySelectorAll('p, td, th, label, a, figure text')].map(p =>
    ratio(getComputedStyle(p)[p.tagName == 'text' ? 'fill' : 'color']));
  return [Math.min(...lines), Math.min(...texts)];
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(browser, page, dark):
    """WCAG 2.2: at least 3 for lines, 4.5 for text."""
    browser.open(page, 1440, dark=dark)
    lines, texts = browser.evaluate(CONTRAST)
    assert lines >= 3
    assert texts >= 4.5


def test_switches_work(browser, page):
    browser.open(page, 1440)
    shown = f"[...document.querySelectorAll('figure svg .s2')].filter({VISIBLE}).length"
    others = f"[...document.querySelectorAll('figure svg .s3')].filter({VISIBLE}).length"
    before, beside = browser.evaluate(shown), browser.evaluate(others)
    assert before > 0
    browser.evaluate("document.querySelector('#show-2').click()")
    assert (browser.evaluate(shown), browser.evaluate(others)) == (0, beside)
    browser.evaluate("document.querySelector('#show-2').click()")
    assert browser.evaluate(shown) == before
    first, second = (f"[...document.querySelectorAll('.length-{n}')].filter({VISIBLE}).length" for n in (1, 3))
    assert browser.evaluate(f"[{first}, {second}]") == [4, 0]
    browser.evaluate("document.querySelector('#length-3').click()")
    assert browser.evaluate(f"[{first}, {second}]") == [0, 4]
    assert browser.complaints() == []


def test_switches_work_from_the_keyboard(browser, page):
    browser.open(page, 1440)
    visited = []
    for _ in range(8):
        browser.press("Tab")
        visited.append(browser.evaluate("document.activeElement.id || document.activeElement.className"))
        if visited[-1] == "show-0":
            break
    assert visited[0] == "skip"
    assert visited[-1] == "show-0"
    browser.press(" ")
    assert browser.evaluate("document.querySelector('#show-0').checked") is False
    assert browser.evaluate(f"[...document.querySelectorAll('figure svg .s0')].filter({VISIBLE}).length") == 0
