"""Code versions: what results depend on, found through the imports, and nothing else."""

import ast

import pytest
from comparing import BASELINES, scripts

from l2o_training.compare import code, contenders
from l2o_training.compare.suites import SUITES, workloads
from l2o_training.tasks.data import Datasets

CACHES = (code.code_version, code._read, code._is_module)
SOURCE = code.source


@pytest.fixture
def edited(monkeypatch):
    """Pretend that a module has another text, or that it exists at all."""

    def forget():
        for cache in CACHES:
            cache.cache_clear()

    def edit(texts: dict[str, str]) -> None:
        forget()
        monkeypatch.setattr(code, "source", lambda module: texts.get(module) or SOURCE(module))

    yield edit
    monkeypatch.undo()
    forget()


def made(edited, **texts: str) -> str:
    """The version of `l2o_training.a:f` in made-up modules."""
    edited({f"l2o_training.{name}": text for name, text in texts.items()})
    return code.code_version("l2o_training.a:f")


PLAIN = "def f(x):\n    return x + 1\n"


def test_versions_follow_code_only(edited):
    plain = made(edited, a=PLAIN)
    assert made(edited, a='"""Text."""\n# why\ndef f(x):\n    """Text."""\n    return (x + 1)\n') == plain
    assert made(edited, a="def f(x):\n    return x + 2\n") != plain
    assert made(edited, a="def g(x):\n    return x\n\n" + PLAIN) == plain, "nobody asked for g"
    with pytest.raises(LookupError, match="no g"):
        code.code_version("l2o_training.compare.code:g")


@pytest.mark.parametrize(
    "importing",
    [
        "from l2o_training.b import g\ndef f(x):\n    return g(x)\n",
        "from l2o_training.b import g as h\nclass f:\n    def __call__(self, x):\n        return h(x)\n",
        "from l2o_training import b\ndef f(x):\n    return b.g(x)\n",
        "import l2o_training.b as b\ndef f(x):\n    return b.g(x)\n",
        "def f(x):\n    from l2o_training.b import g\n    return g(x)\n",
        "from l2o_training.b import g\nTABLE = {1: g}\ndef f(x):\n    return TABLE[1](x)\n",
        "from l2o_training.b import g\ndef f(x: g):\n    return x\n",
    ],
)
def test_versions_follow_names_through_imports(edited, importing):
    b = "from l2o_training.c import FACTOR\ndef g(x):\n    return FACTOR * x\ndef unasked():\n    return 1\n"
    plain = made(edited, a=importing, b=b, c="FACTOR = 2\nOTHER = 3\n")
    assert made(edited, a=importing, b=b, c="FACTOR = 4\nOTHER = 3\n") != plain
    assert made(edited, a=importing, b=b.replace("* x", "+ x"), c="FACTOR = 2\nOTHER = 3\n") != plain
    if "import b" not in importing and "b as b" not in importing:
        assert made(edited, a=importing, b=b.replace("return 1", "return 2"), c="FACTOR = 2\nOTHER = 5\n") == plain


def test_statements_that_act_belong_to_every_name(edited):
    assert made(edited, a="import torch\ntorch.set_flush_denormal(True)\n" + PLAIN) != made(edited, a=PLAIN)


def keys() -> dict[tuple[str, str], str]:
    """What results are kept under, of a rule and of Adam on some tasks of either kind."""
    (rule,) = contenders.rules(["scale"])
    load = Datasets("none")
    every = [*scripts(("char-gru", "tabular"), load), *workloads(SUITES["quadratics"], load)[:1]]
    pairs = [(workload, contender) for workload in every for contender in (rule, BASELINES["adam"])]
    return {(workload.name, contender.name): str(workload.key(contender)) for workload, contender in pairs}


RULE = {(task, "scale") for task in ("char-gru", "tabular", "quadratic-10")}
ADAM = {(task, "adam") for task in ("char-gru", "tabular", "quadratic-10")}
SCRIPTS = {(task, name) for task in ("char-gru", "tabular") for name in ("scale", "adam")}
CHANGES = {
    "l2o_runtime.rules.features:lowest_root": RULE,
    "l2o_runtime.optimizer:LearnedOptimizer": {("char-gru", "scale"), ("tabular", "scale")},
    "l2o_runtime.solvers.descent:Descent": RULE,  # who reads a file may read a pair of players, each of whom descends
    "l2o_training.tasks.scripts.texts:sentence": {("char-gru", "scale"), ("char-gru", "adam")},
    "l2o_training.tasks.scripts.tables:tabular": {("tabular", "scale"), ("tabular", "adam")},
    "l2o_training.tasks.modules:Tabular": {("tabular", "scale"), ("tabular", "adam")},
    "l2o_training.tasks.networks:side_by_side": (RULE | ADAM) - SCRIPTS,
    "l2o_training.tasks.networks:CharGRU": (RULE | ADAM) - {("tabular", "scale"), ("tabular", "adam")},
    "l2o_training.compare.scripts:train": SCRIPTS,
    "l2o_training.compare.flat:rollout": (RULE | ADAM) - SCRIPTS,
    "l2o_training.compare.baselines:Baseline": ADAM,
    "l2o_training.compare.baselines:warm_cosine": set(),
    "l2o_training.compare.muon:MuonAdamW": set(),
    "l2o_training.meta.trainer:Trainer": set(),
    "l2o_training.meta.unroll:unroll": set(),
    "l2o_training.compare.statistics:iqm": set(),
    "l2o_training.compare.report.words:verdict": set(),
    "l2o_training.tasks.scripts.images:vit": set(),
}
"""What is changed, and whose results depend on it."""


def changed(text: str, name: str) -> str:
    """The text of a module in which a function or class does something else."""
    tree = ast.parse(text)
    (found,) = (part for part in tree.body if getattr(part, "name", None) == name)
    found.body.append(ast.parse("changed = 1").body[0])
    return ast.unparse(tree)


@pytest.mark.parametrize("place", CHANGES)
def test_a_change_voids_the_results_that_depend_on_it_and_no_others(edited, place):
    module, name = place.split(":")
    text, before = SOURCE(module), keys()
    assert text is not None
    edited({module: changed(text, name)})
    after = keys()
    assert {pair for pair in before if before[pair] != after[pair]} == CHANGES[place]
    edited({module: f'"""Another text."""\n# A comment.\n{text}'})
    assert keys() == before


def test_meta_training_imports_no_unseen_network():
    """Nor what compares rules, but for the list of baselines that its validation stands beside."""
    modules = code.imported("l2o_training.meta.trainer") | code.imported("l2o_training.config")
    assert "l2o_training.tasks.networks" in modules
    unseen = {name for name in modules if name.startswith(("l2o_training.tasks.modules", "l2o_training.tasks.scripts"))}
    assert unseen == set()
    compared = {name for name in modules if name.startswith("l2o_training.compare")}
    assert compared == {f"l2o_training.compare{name}" for name in ("", ".baselines", ".classical", ".muon")}
