"""The file format: golden bytes, and hostile files."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import make_rule

from l2o_runtime import ArtifactError, RuleConfig, load_rule, save_rule
from l2o_runtime.config import DMDConfig, to_dict
from l2o_runtime.files.artifact import bundled_rules, find_rule, parse_rule, read_rule, rule_bytes
from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.files.untrusted import canonical

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


def test_the_golden_file_loads_for_ever():
    """Written by the first version of l2o: every later version reads it, and to the same numbers."""
    path = Path(__file__).parents[1] / "data" / "rule-1.safetensors"
    assert path.read_bytes() == CONTENT
    rule, provenance = read_rule(path)
    assert rule.config == CONFIG
    assert provenance == {"seed": 0}
    for name, tensor in small_rule().state_dict().items():
        assert torch.equal(rule.state_dict()[name], tensor), name


def test_keys_that_an_older_file_lacks_take_their_defaults():
    """A file from before a key existed: the rest of its configuration is enough."""
    rule = make_rule(RuleConfig(hidden=2, layers=1))
    loaded, _ = parse_rule(rebuild(rule.state_dict(), config='{"hidden":2,"layers":1}'))
    assert loaded.config == rule.config
    rule = make_rule(RuleConfig(hidden=20, layers=2, context=DMDConfig()))
    loaded, _ = parse_rule(rebuild(rule.state_dict(), config='{"context":{"kind":"dmd"}}'))
    assert loaded.config == rule.config


def test_keys_younger_than_the_format_are_written_only_where_they_are_used():
    """So that an older l2o reads every rule that it could run, and an older rule is written again as it was."""
    assert "delay" not in to_dict(DMDConfig())
    assert to_dict(DMDConfig(snapshots="loss", delay=7))["delay"] == 7


def test_newer_files_are_refused_with_both_versions():
    with pytest.raises(ArtifactError, match=r"format l2o-rule/2, this version reads l2o-rule/1: upgrade"):
        parse_rule(rebuild(format="l2o-rule/2"))
    newer = safetensors.torch.save({"x": torch.zeros(1)}, metadata={"format": "l2o-rule/2", "anything": "else"})
    with pytest.raises(ArtifactError, match=r"l2o-rule/2.*l2o-rule/1"):
        parse_rule(newer)


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
    from l2o_runtime.files import artifact

    tensors = small_rule().state_dict() if tensors is None else tensors
    metadata = {"format": "l2o-rule/1", "config": json.dumps({"hidden": 2, "layers": 1}), "provenance": provenance}
    header, _, data = artifact._split(safetensors.torch.save(tensors, metadata=metadata | changes))
    header["__metadata__"]["digest"] = artifact._digest(header, data)
    text = canonical(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rebuild(format="other"), "not a rule"),
        (rebuild(config='{"hiden": 2}'), "did you mean hidden"),
        (rebuild(config='{"hidden": 100000000}'), "hidden: must be in"),
        (rebuild(config='{"hidden": 3, "layers": 1}'), "tensor .*: found"),
        (rebuild(config='{"hidden": 512, "layers": 8}'), "the LSTM has about 16777216 weights"),
        (rebuild(config='{"context": {"kind": "dmd", "window": 1024, "sketch": 65536}}'), r"\(window \+ 1\) · sketch"),
        (rebuild(config='{"context": {"kind": "kae", "window": 1024, "hidden": 1024}}'), "the autoencoder has about"),
        (rebuild(config='{"hidden": 2, "hidden": 2}'), "a key appears twice"),
        (rebuild(config='{"output_scale": NaN}'), "not a finite number"),
        (rebuild(config="[" * 1000 + "]" * 1000), "nested deeper than 64"),
        (rebuild(PLAIN, provenance="[]"), "provenance is not a JSON object"),
        (rebuild(author="x"), "metadata must be these strings"),
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
    assert find_rule("default").stem in bundled_rules()
    for name in bundled_rules():
        load_rule(name)
