"""The file format: golden bytes, and hostile files."""

import hashlib
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import make_rule

from l2o_runtime import ArtifactError, RuleConfig, load_rule, save_rule
from l2o_runtime.artifact import atomic_write, bundled_rules, parse_rule, rule_bytes
from l2o_runtime.config import DMDConfig

CONFIG = RuleConfig(hidden=2, layers=1, context=DMDConfig(window=4, rank=1))


def small_rule():
    """A rule whose weights are exact in every version of torch."""
    rule = make_rule(CONFIG)
    for parameter in rule.parameters():
        parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 64)
    return rule


CONTENT = rule_bytes(small_rule(), {"seed": 0})


def test_golden_bytes():
    assert hashlib.sha256(CONTENT).hexdigest() == GOLDEN
    header = json.loads(CONTENT[8 : 8 + int.from_bytes(CONTENT[:8], "little")])
    assert header["__metadata__"]["format"] == "l2o-rule/1"


GOLDEN = "028e8dad250293b3e20a6ef8712fb9fd08204a96eafbd40eb8e289a85547415f"


def test_round_trip(rule, tmp_path):
    path = tmp_path / "rule.safetensors"
    save_rule(path, rule, {"seed": 3})
    loaded = load_rule(path)
    assert loaded.config == rule.config
    for (name, a), b in zip(rule.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not any(p.requires_grad for p in loaded.parameters())
    assert path.read_bytes() == rule_bytes(loaded, {"seed": 3})
    assert set(safetensors.torch.load_file(path)) == set(rule.state_dict()), "any safetensors reader reads it"


@settings(max_examples=300, deadline=None)
@given(length=st.integers(0, len(CONTENT) - 1))
def test_truncated_files_are_refused(length):
    with pytest.raises(ArtifactError):
        parse_rule(CONTENT[:length])


@settings(max_examples=500, deadline=None)
@given(position=st.integers(0, 8 * len(CONTENT) - 1))
def test_flipped_bits_are_refused(position):
    damaged = bytearray(CONTENT)
    damaged[position // 8] ^= 1 << position % 8
    with pytest.raises(ArtifactError):
        parse_rule(bytes(damaged))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_noise_is_refused(content):
    with pytest.raises(ArtifactError):
        parse_rule(content)


PLAIN = make_rule(RuleConfig(hidden=2, layers=1)).state_dict()


def rebuild(tensors=None, provenance="{}", **changes) -> bytes:
    """A file with a valid digest but other contents."""
    from l2o_runtime import artifact

    tensors = small_rule().state_dict() if tensors is None else tensors
    metadata = {"format": "l2o-rule/1", "config": json.dumps({"hidden": 2, "layers": 1}), "provenance": provenance}
    header, data = artifact._split(safetensors.torch.save(tensors, metadata=metadata | changes))
    header["__metadata__"]["digest"] = artifact._digest(header, data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rebuild(format="l2o-rule/2"), "l2o-rule/2.*upgrade"),
        (rebuild(format="other"), "not a rule"),
        (rebuild(config='{"hiden": 2}'), "did you mean hidden"),
        (rebuild(config='{"hidden": 100000000}'), "hidden: must be in"),
        (rebuild(config='{"hidden": 3, "layers": 1}'), "tensor .*: found"),
        (rebuild(config="{"), "not a valid rule file"),
        (rebuild(tensors={"x": torch.zeros(1)}), "tensor .*: found"),
        (rebuild(tensors={k: v * float("nan") for k, v in PLAIN.items()}), "not finite"),
        (safetensors.torch.save({"x": torch.zeros(1)}), "not a rule"),
    ],
)
def test_wrong_contents_are_named(content, message):
    with pytest.raises(ArtifactError, match=message):
        parse_rule(content)


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines([b"half", None])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_bundled_rules_load():
    assert "default" in bundled_rules()
    for name in bundled_rules():
        load_rule(name)
