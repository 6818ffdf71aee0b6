"""Rules by name, from a hub on the loopback: what is downloaded is checked, kept, and never run."""

import hashlib
import importlib
import json
import pickle

import pytest
import torch
from fake_hub import FakeHub
from typer.testing import CliRunner

from l2o_cli.main import app
from l2o_runtime import ArtifactError, LearnedOptimizer, load_rule
from l2o_runtime.files import hub as module
from l2o_runtime.files.artifact import find_rule
from l2o_runtime.files.hub import card_digest, parse_address

hub_library = pytest.importorskip("huggingface_hub", reason="needs the extra hub")
constants = importlib.import_module("huggingface_hub.constants")
RULE = find_rule("directional")


def point_to(url, monkeypatch):
    """The library has read its environment long ago."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and an empty cache."""
    with FakeHub() as fake:
        point_to(fake.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        yield fake


def card(content: bytes) -> bytes:
    return f"---\nlicense: mit\nl2o_sha256: {hashlib.sha256(content).hexdigest()}\n---\n".encode()


def run(*words: str):
    return CliRunner().invoke(app, list(words))


def test_a_rule_is_downloaded_once_and_trains(hub):
    content = RULE.read_bytes()
    name = f"hf://you/rule@{hub.add('you/rule', {'rule.safetensors': content, 'README.md': card(content)})}"
    model = torch.nn.Linear(3, 1)
    optimizer = LearnedOptimizer(model.parameters(), rule=name)
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    assert optimizer.health()["steps"] == 1
    asked = len(hub.asked)
    assert asked > 0
    weights = load_rule(name).state_dict()
    assert len(hub.asked) == asked  # from the cache, without a question
    torch.testing.assert_close(weights, load_rule(RULE).state_dict(), rtol=0, atol=0)


def test_what_was_downloaded_is_there_without_a_network(hub, monkeypatch):
    content = RULE.read_bytes()
    name = f"hf://you/rule@{hub.add('you/rule', {'rule.safetensors': content, 'README.md': card(content)})}"
    load_rule(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_rule(name).config.kind == "directional"
    with pytest.raises(ArtifactError, match="not in the cache and cannot be downloaded"):
        load_rule(f"hf://you/other@{'0' * 40}")


def test_a_file_that_has_changed_in_the_cache_is_refused(hub):
    content = RULE.read_bytes()
    name = f"hf://you/rule@{hub.add('you/rule', {'rule.safetensors': content, 'README.md': card(content)})}"
    find_rule(name).resolve().write_bytes(content[:-1] + b"\1")
    with pytest.raises(ArtifactError, match="its card says"):
        find_rule(name)


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a file was unpickled",)


@pytest.mark.parametrize(
    ("rule", "readme", "message"),
    [
        (b"x" * 100, card(b"y" * 100), "its card says"),
        (b"x" * 100, b"# no metadata", "states no l2o_sha256"),
        (b"x" * 100, b"l2o_sha256: " + b"0" * 64, "states no l2o_sha256"),
        (b"x" * 100, card(b"x" * 100), "not a rule file"),
        (pickle.dumps(Trap()), card(pickle.dumps(Trap())), "not a rule file"),
        (RULE.read_bytes()[:-4], card(RULE.read_bytes()[:-4]), "damaged|not a valid rule file"),
        (RULE.read_bytes().replace(b"l2o-rule/2", b"l2o-rule/9"), None, "this version reads"),
        (b"x" * 4000, None, "at most 3000 are expected"),
        (None, card(b""), "rule.safetensors is not in the cache and cannot be downloaded"),
        (RULE.read_bytes(), b"", "states no l2o_sha256"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(hub, monkeypatch, rule, readme, message):
    monkeypatch.setattr(module, "MAX_BYTES", 3000)
    files = {"README.md": card(rule) if readme is None else readme}
    files |= {} if rule is None else {"rule.safetensors": rule}
    name = f"hf://you/rule@{hub.add('you/rule', files)}"
    with pytest.raises(ArtifactError, match=message):
        LearnedOptimizer([torch.zeros(2, requires_grad=True)], rule=name)
    done = run("inspect", name)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://you/rule", "none is given"),
        ("hf://you/rule@main", "main is none"),
        ("hf://you/rule@0123abc", "expected a pinned revision"),
        ("hf://rule@" + "0" * 40, "expected hf://owner/name@revision"),
        ("hf://../rule@" + "0" * 40, "expected hf://owner/name@revision"),
        ("hf://you/rule/file@" + "0" * 40, "expected hf://owner/name@revision"),
        ("hf://you/rule@" + "A" * 40, "expected a pinned revision"),
    ],
)
def test_names_are_pinned(name, message):
    with pytest.raises(ArtifactError, match=message):
        parse_address(name)


def test_nothing_there_gets_one_line(hub):
    done = run("pull", f"you/rule@{'0' * 40}")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be downloaded" in done.stderr


def test_a_rule_is_pushed_with_its_licence_and_pulled(hub, tmp_path):
    done = run("push", "default", "you/rule", "--json")
    assert done.exit_code == 0, done.output
    name = json.loads(done.stdout)["rule"]
    files = hub.commits["you/rule", name.partition("@")[2]]
    text = files["README.md"].decode()
    assert text.startswith("---\nlicense: mit\n")
    assert "| licence of the weights | MIT |" in text
    assert card_digest(text) == hashlib.sha256(RULE.read_bytes()).hexdigest()
    out = tmp_path / "mine.safetensors"
    assert run("pull", name.removeprefix("hf://"), "--out", str(out)).exit_code == 0
    assert out.read_bytes() == RULE.read_bytes()
    done = run("push", str(out), "you/mine")
    assert done.exit_code == 2
    assert "licence of the weights is not known" in done.stderr
    assert run("push", str(out), "you/mine", "--license", "cc-by-4.0").exit_code == 0
    assert run("push", str(out), "mine", "--license", "mit").exit_code == 2


def test_a_hub_that_is_gone_gets_one_line(hub, monkeypatch):
    point_to("http://127.0.0.1:9", monkeypatch)
    for words in (("push", "default", "you/rule"), ("pull", f"you/rule@{'0' * 40}")):
        done = run(*words)
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1


def test_bundled_rules_state_their_licence():
    assert json.loads(run("inspect", "default", "--json").stdout)["license"] == "MIT"
    assert "MIT, of the weights" in run("inspect", "scale").stdout
