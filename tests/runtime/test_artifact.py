"""The file format: golden bytes, and hostile files."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import make_rule

from l2o_runtime import ArtifactError, load_rule, save_rule
from l2o_runtime.config import DMDConfig, TensorDMDConfig, to_dict
from l2o_runtime.files.artifact import bundled_rules, find_rule, parse_rule, read_rule, rule_bytes
from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.files.untrusted import canonical
from l2o_runtime.rules import LSTMConfig, MomentsConfig, NormalizedConfig, StepLimits, TieredConfig

CONFIG = LSTMConfig(hidden=2, layers=1, context=DMDConfig(window=4, rank=1))


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
    assert header["__metadata__"]["format"] == "l2o-rule/2"


@pytest.mark.parametrize("number", [1, 2])
def test_golden_files_load_for_ever(number):
    """Written by the first version of l2o that had the format: every later version reads it, to the same numbers."""
    path = Path(__file__).parents[1] / "data" / f"rule-{number}.safetensors"
    assert number == 1 or path.read_bytes() == CONTENT
    rule, provenance = read_rule(path)
    assert rule.config == CONFIG
    assert provenance == {"seed": 0}
    for name, tensor in small_rule().state_dict().items():
        assert torch.equal(rule.state_dict()[name], tensor), name


V1 = {
    "lstm": ('{"hidden":3,"output":"tanh"}', LSTMConfig(hidden=3, output="tanh")),
    "normalized": ('{"features":"normalized","noise_floor":0.001}', NormalizedConfig(noise_floor=0.001)),
    "moments": ('{"features":"moments","output":"adam"}', MomentsConfig(output_scale=0.1)),
    "tiered": (
        '{"cell":"scale","context":{"kind":"dmd","scope":"tensor","sketch":8},"features":"moments",'
        '"known_parameters":7,"layers":1,"output":"adam","output_scale":0.5}',
        TieredConfig(output_scale=0.5, limits=StepLimits(known_parameters=7), context=TensorDMDConfig(sketch=8)),
    ),
}


@pytest.mark.parametrize("kind", V1)
def test_configurations_of_the_first_format_are_read(kind):
    text, config = V1[kind]
    content = rebuild(make_rule(config).state_dict(), format="l2o-rule/1", config=text)
    assert parse_rule(content)[0].config == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cell": "scale"}, "no rule is scale over log_sign"),
        ({"features": []}, "no rule is lstm over"),
        ({"features": "moments"}, "'adam' goes with features 'moments', got 'linear'"),
        ({"output": "adam"}, "'adam' is not one of linear, tanh"),
        ({"known_parameters": 7}, "known_parameters: goes with cell 'scale'"),
        ({"cell": "scale", "features": "moments", "output": "adam"}, "layers: 1 goes with cell 'scale', got 2"),
        ({"growth": 1.1}, "growth: rules whose steps may only grow so fast"),
        ({"context": {"kind": "dmd", "scope": "tensor"}}, "'tensor_dmd' is not one of"),
        ({"context": {"kind": "dmd", "scope": 1}}, "context.scope: 1 is not one of model, tensor"),
        ({"noise_floor": 0.1}, "unknown key noise_floor"),
        ({"kind": "lstm"}, "unknown key kind"),
        ([], "expected a table"),
    ],
)
def test_what_the_first_format_did_not_have_is_refused(config, message):
    content = rebuild(PLAIN, format="l2o-rule/1", config=json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        parse_rule(content)


def test_keys_that_an_older_file_lacks_take_their_defaults():
    """A file from before a key existed: the rest of its configuration is enough."""
    rule = make_rule(LSTMConfig(hidden=2, layers=1))
    loaded, _ = parse_rule(rebuild(rule.state_dict(), config='{"hidden":2,"kind":"lstm","layers":1}'))
    assert loaded.config == rule.config
    rule = make_rule(LSTMConfig(hidden=20, layers=2, context=DMDConfig()))
    loaded, _ = parse_rule(rebuild(rule.state_dict(), config='{"context":{"kind":"dmd"},"kind":"lstm"}'))
    assert loaded.config == rule.config


def test_keys_younger_than_the_format_are_written_only_where_they_are_used():
    """So that an older l2o reads every rule that it could run, and an older rule is written again as it was."""
    assert "delay" not in to_dict(DMDConfig())
    assert to_dict(DMDConfig(snapshots="loss", delay=7))["delay"] == 7


def test_newer_files_are_refused_with_both_versions():
    with pytest.raises(ArtifactError, match=r"format l2o-rule/3, this version reads l2o-rule/1, l2o-rule/2: upgrade"):
        parse_rule(rebuild(format="l2o-rule/3"))
    newer = safetensors.torch.save({"x": torch.zeros(1)}, metadata={"format": "l2o-rule/3", "anything": "else"})
    with pytest.raises(ArtifactError, match=r"l2o-rule/3.*l2o-rule/2"):
        parse_rule(newer)


GOLDEN = "7c9e638dadd9dc4da675348fa2f8b101489df3c6fa969d9901578a273ab9ae22"


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


PLAIN = make_rule(LSTMConfig(hidden=2, layers=1)).state_dict()


def rebuild(tensors=None, provenance="{}", **changes) -> bytes:
    """A file with a valid digest but other contents."""
    from l2o_runtime.files import artifact

    tensors = small_rule().state_dict() if tensors is None else tensors
    config = json.dumps({"hidden": 2, "kind": "lstm", "layers": 1})
    metadata = {"format": "l2o-rule/2", "config": config, "provenance": provenance}
    header, _, data = artifact._split(safetensors.torch.save(tensors, metadata=metadata | changes))
    header["__metadata__"]["digest"] = artifact._digest(header, data)
    text = canonical(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rebuild(format="other"), "not a rule"),
        (rebuild(config='{"kind":"lstm","hiden": 2}'), "did you mean hidden"),
        (rebuild(config='{"kind":"lstm","hidden": 100000000}'), "hidden: must be in"),
        (rebuild(config='{"kind":"lstm","hidden": 3, "layers": 1}'), "tensor .*: found"),
        (rebuild(config='{"kind":"lstm","hidden": 512, "layers": 8}'), "the LSTM has about 16777216 weights"),
        (
            rebuild(config='{"kind":"lstm","context": {"kind": "dmd", "window": 1024, "sketch": 65536}}'),
            r"\(window \+ 1\) · sketch",
        ),
        (
            rebuild(config='{"kind":"lstm","context": {"kind": "kae", "window": 1024, "hidden": 1024}}'),
            "the autoencoder has about",
        ),
        (rebuild(config='{"kind":"lstm","hidden": 2, "hidden": 2}'), "a key appears twice"),
        (rebuild(config='{"kind":"lstm","output_scale": NaN}'), "not a finite number"),
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


def test_files_that_cannot_be_written_are_named(tmp_path):
    """Not their temporary ones; and by what a full disk gives, which has no name."""
    with pytest.raises(FileNotFoundError) as missing, atomic_write(tmp_path / "none" / "file"):
        pass
    with pytest.raises(OSError, match="No space left") as full, atomic_write(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="of others") as foreign, atomic_write(tmp_path / "file"):
        raise OSError(errno.EACCES, "of others", "other")
    names = [caught.value.filename for caught in (missing, full, foreign)]
    assert names == [str(tmp_path / "none" / "file"), str(tmp_path / "file"), "other"]
    assert list(tmp_path.iterdir()) == []


def test_bundled_rules_load():
    assert find_rule("default").stem in bundled_rules()
    for name in bundled_rules():
        load_rule(name)
