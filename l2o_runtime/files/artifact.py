"""Read and write rules: one safetensors file with its configuration, no pickle. See docs/artifact.md."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from l2o_runtime.config import ConfigError, build_union, nearest, require, to_dict
from l2o_runtime.files.atomic import atomic_write
from l2o_runtime.files.untrusted import canonical, parse_json, printable
from l2o_runtime.files.upgrade import upgraded
from l2o_runtime.learned import AnyConfig, Learned, make_learned
from l2o_runtime.rules import Rule

FORMAT = "l2o-rule/2"
FORMATS = ("l2o-rule/1", FORMAT)
"""Those that this version reads; it writes the last one."""
MAX_BYTES = 48 * 2**20
"""The largest file; the limits on sizes in `config` keep every rule below it."""
MAX_HEADER = 2**20
METADATA = {"format", "config", "provenance", "digest"}
BUNDLED = Path(__file__).parents[1] / "pretrained"
ALIASES = {"default": "directional"}
"""Other names of bundled rules: `default` is the one to begin with."""
SUFFIXES = {".pt": "TorchScript", ".pt2": "torch.export", ".onnx": "ONNX"}
"""Of exported rules, and what each is."""


class ArtifactError(ValueError):
    """A rule file is missing, damaged or of an unknown format."""


def bundled_rules() -> list[str]:
    """Names of the rules that ship with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.safetensors"))


def find_rule(rule: str | Path) -> Path:
    """The file that a bundled name, a path or a name on a hub stands for.

    Raises:
        ArtifactError: there is none of them.
    """
    if isinstance(rule, str) and rule.startswith("hf://"):
        from l2o_runtime.files.hub import fetch

        return fetch(rule)
    name = ALIASES.get(rule, rule) if isinstance(rule, str) else rule
    if name in bundled_rules():
        return BUNDLED / f"{name}.safetensors"
    path = Path(rule)
    try:
        kind = "file" if path.is_file() else "folder" if path.is_dir() else "other"
    except OSError:  # a folder that may not be searched, or a name that is too long
        kind = "other"
    if kind != "file":
        what = "is a folder" if kind == "folder" else "does not exist, or is no regular file"
        names = nearest(str(path), [*ALIASES, *bundled_rules()])
        raise ArtifactError(
            f"no rule at {path}: it {what}; expected a file that `l2o train` or `l2o export` wrote, "
            f"or a bundled name: {names}"
        )
    return path


def rule_bytes(rule: Learned, provenance: Mapping[str, Any] | None = None) -> bytes:
    """The file of a rule: equal rules and provenance give equal bytes.

    Raises:
        ValueError: the provenance is no strict JSON; NaN, for one.
    """
    tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in rule.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "config": canonical(to_dict(rule.config)),
        "provenance": canonical(dict(provenance or {})),
    }
    header, _, data = _split(safetensors.torch.save(tensors, metadata=metadata))
    header["__metadata__"]["digest"] = _digest(header, data)
    text = canonical(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def save_rule(path: str | Path, rule: Learned, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a rule; the file appears whole or not at all."""
    content = rule_bytes(rule, provenance)
    with atomic_write(path) as file:
        file.write(content)


def load_rule(rule: str | Path) -> Rule:
    """Read a frozen rule (evaluation mode, no gradients) from a bundled name or a `.safetensors` file.

    Raises:
        ArtifactError: with what was found, what was expected and what to do.
    """
    return read_rule(rule)[0]


def read_rule(rule: str | Path) -> tuple[Rule, dict[str, Any]]:
    """As `load_rule`, with the provenance beside the rule.

    Raises:
        ArtifactError: as there; or the file is of a learned solver, which no optimizer can follow.
    """
    found, provenance = read_learned(rule)
    if not isinstance(found, Rule):
        kind = found.config.kind
        raise ArtifactError(f"{find_rule(rule)}: a learned solver of kind {kind}, not a rule that an optimizer follows")
    return found, provenance


def read_learned(rule: str | Path) -> tuple[Learned, dict[str, Any]]:
    """What is learned, frozen, a rule or a solver, and its provenance; from a bundled name or a file.

    Raises:
        ArtifactError: with what was found, what was expected and what to do.
    """
    path = find_rule(rule)
    try:
        return parse_rule(read_limited(path))
    except ArtifactError as error:
        kind = SUFFIXES.get(path.suffix)
        advice = f"; if it is {kind}, give the .safetensors rule that it was exported from" if kind else ""
        raise ArtifactError(f"{path}: {error}{advice}") from None


def read_limited(path: Path) -> bytes:
    """The bytes of a file that is no larger than an artifact may be.

    Raises:
        ArtifactError: it is larger, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"cannot be read ({error.strerror})") from None
    if len(content) > MAX_BYTES:
        raise ArtifactError(f"larger than {MAX_BYTES} bytes; a rule is not")
    return content


def check_format(found: object) -> str:
    """A format that this version reads.

    Raises:
        ArtifactError: it is another one, with both versions in the message.
    """
    if not isinstance(found, str) or not found.startswith("l2o-rule/"):
        raise ArtifactError("not a rule: its metadata has no format l2o-rule/…; expected a file that l2o wrote")
    if found not in FORMATS:
        known = ", ".join(FORMATS)
        raise ArtifactError(f"format {printable(found, 80)}, this version reads {known}: upgrade l2o-runtime")
    return found


def read_config(written: str, config: Any) -> AnyConfig:
    """The configuration of a rule or a learned solver, as a format that is read has it.

    Args:
        written: the format.
        config: what its JSON gave.

    Raises:
        ConfigError: it is none.
    """
    if written != FORMAT:
        require(not isinstance(config, Mapping) or "kind" not in config, "unknown key kind")
        config = upgraded(config)
    found: AnyConfig = build_union(AnyConfig, config)
    return found


def parse_rule(content: bytes) -> tuple[Learned, dict[str, Any]]:
    """The rule or learned solver and its provenance in the bytes of a file.

    Raises:
        ArtifactError: not such a file, another version, damaged, or made for another architecture.
    """
    try:
        return _parse(content)
    except ArtifactError:
        raise
    except ConfigError as error:
        raise ArtifactError(f"configuration not understood: {printable(error)}") from None
    except (ValueError, SafetensorError) as error:
        raise ArtifactError(f"not a valid rule file: {printable(error)}") from None


def _parse(content: bytes) -> tuple[Learned, dict[str, Any]]:
    header, text, data = _split(content)
    metadata = header.get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    check_format(metadata.get("format"))
    if metadata.keys() != METADATA or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError(f"not a valid rule file: its metadata must be these strings, {', '.join(sorted(METADATA))}")
    if text.rstrip(" ") != canonical(header):
        raise ArtifactError("damaged: its header is not canonical JSON; copy it again from its source")
    if metadata.pop("digest") != _digest(header, data):
        raise ArtifactError("damaged: its contents do not match its digest; copy it again from its source")
    rule = _assemble(read_config(metadata["format"], parse_json(metadata["config"])), header, content)
    provenance = parse_json(metadata["provenance"])
    if not isinstance(provenance, dict):
        raise ArtifactError("not a valid rule file: its provenance is not a JSON object")
    return rule, provenance


def _assemble(config: AnyConfig, header: dict[str, Any], content: bytes) -> Learned:
    with torch.device("meta"):
        rule = make_learned(config).float()  # whatever torch's default dtype is
    # Compared before anything is read or allocated for them: the header may ask for tensors of any size.
    found = {name: _declared(entry) for name, entry in header.items() if name != "__metadata__"}
    wanted = {name: ("F32", list(tensor.shape)) for name, tensor in rule.state_dict().items()}
    if found != wanted:
        name = min(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
        raise ArtifactError(
            f"tensor {printable(name, 80)}: found {printable(found.get(name), 80)}, "
            f"its configuration asks for {wanted.get(name)}"
        )
    with torch.device("cpu"):  # whatever torch's default device is
        tensors = safetensors.torch.load(content)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtifactError(f"tensor {name} has values that are not finite")
    rule.load_state_dict(tensors, assign=True)
    return rule.eval().requires_grad_(False)


def _declared(entry: Any) -> tuple[Any, Any]:
    """Type and shape that a header gives a tensor."""
    return (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)


def _digest(header: dict[str, Any], data: memoryview) -> str:
    """SHA-256 of the header without its digest, as canonical JSON, followed by the data."""
    digest = hashlib.sha256(canonical(header).encode())
    digest.update(data)
    return digest.hexdigest()


def _split(content: bytes) -> tuple[dict[str, Any], str, memoryview]:
    """Header, its text, and the data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 10 or not 2 <= length <= min(MAX_HEADER, len(content) - 8):
        raise ArtifactError("not a rule file, or cut short: a safetensors header does not fit into it")
    try:
        text = content[8 : 8 + length].decode()
        header = parse_json(text)
    except ValueError:
        raise ArtifactError("not a rule file: it does not start with a safetensors header") from None
    if not isinstance(header, dict):
        raise ArtifactError("not a rule file: its header is not a JSON object")
    return header, text, memoryview(content)[8 + length :]
