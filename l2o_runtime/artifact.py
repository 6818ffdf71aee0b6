"""Read and write rules: one safetensors file with its configuration, no pickle. See docs/artifact.md."""

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from l2o_runtime.config import ConfigError, RuleConfig, build, to_dict
from l2o_runtime.rule import Rule

FORMAT = "l2o-rule/1"
MAX_BYTES = 256 * 2**20
MAX_HEADER = 2**20
TEMPORARY = ".tmp"
BUNDLED = Path(__file__).parent / "pretrained"


class ArtifactError(ValueError):
    """A rule file is missing, damaged or of an unknown format."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under `path` whole, or not at all.

    The bytes go to a temporary file in the same folder, are flushed to disk, and take the name at the end. A process
    that is killed meanwhile leaves the temporary file; see `remove_leftovers`.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp gives 0600; a file is as readable as any other
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | Path) -> None:
    """Remove what writers of `path` that were killed left behind; for when no other process can be writing it.

    Args:
        path: what `atomic_write` was to write.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.????????{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def bundled_rules() -> list[str]:
    """Names of the rules that ship with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.safetensors"))


def find_rule(rule: str | Path) -> Path:
    """The file that a bundled name or a path stands for.

    Raises:
        ArtifactError: there is neither.
    """
    if isinstance(rule, str) and rule in bundled_rules():
        return BUNDLED / f"{rule}.safetensors"
    path = Path(rule)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        names = ", ".join(bundled_rules()) or "none"
        raise ArtifactError(
            f"no rule at {path}: it {what}; expected a file that `l2o train` or `l2o export` wrote, "
            f"or a bundled name ({names})"
        )
    return path


def rule_bytes(rule: Rule, provenance: Mapping[str, Any] | None = None) -> bytes:
    """The file of a rule: equal rules and provenance give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in rule.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "config": _canonical(to_dict(rule.config)),
        "provenance": _canonical(dict(provenance or {})),
    }
    header, data = _split(safetensors.torch.save(tensors, metadata=metadata))
    header["__metadata__"]["digest"] = _digest(header, data)
    text = _canonical(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def save_rule(path: str | Path, rule: Rule, provenance: Mapping[str, Any] | None = None) -> None:
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
    """As `load_rule`, with the provenance beside the rule."""
    path = find_rule(rule)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"larger than {MAX_BYTES} bytes; a rule is not")
        return parse_rule(path.read_bytes())
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None


def parse_rule(content: bytes) -> tuple[Rule, dict[str, Any]]:
    """The rule and its provenance in the bytes of a file.

    Raises:
        ArtifactError: not such a file, another version, damaged, or made for another architecture.
    """
    header, data = _split(content)
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not str(metadata.get("format", "")).startswith("l2o-rule/"):
        raise ArtifactError("a safetensors file, but not a rule: its metadata has no format l2o-rule/…")
    if metadata["format"] != FORMAT:
        raise ArtifactError(f"format {metadata['format']}, this version reads {FORMAT}: upgrade l2o-runtime")
    if metadata.pop("digest", None) != _digest(header, data):
        raise ArtifactError("damaged: its contents do not match its digest; copy it again from its source")
    try:
        config = build(RuleConfig, json.loads(metadata["config"]))
        provenance = json.loads(metadata["provenance"])
        tensors = safetensors.torch.load(content)
    except ConfigError as error:
        raise ArtifactError(f"configuration not understood: {error}") from None
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise ArtifactError(f"not a valid rule file: {error!r}") from None
    return _assemble(config, tensors), provenance


def _assemble(config: RuleConfig, tensors: dict[str, torch.Tensor]) -> Rule:
    with torch.device("meta"):
        rule = Rule(config)
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    wanted = {name: (tuple(t.shape), t.dtype) for name, t in rule.state_dict().items()}
    if found != wanted:
        wrong = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))[0]
        raise ArtifactError(f"tensor {wrong}: found {found.get(wrong)}, its configuration asks for {wanted.get(wrong)}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtifactError(f"tensor {name} has values that are not finite")
    rule.load_state_dict(tensors, assign=True)
    return rule.eval().requires_grad_(False)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(header: dict[str, Any], data: bytes) -> str:
    """SHA-256 of the header without its digest, as canonical JSON, followed by the data."""
    return hashlib.sha256(_canonical(header).encode() + data).hexdigest()


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 10 or not 2 <= length <= min(MAX_HEADER, len(content) - 8):
        raise ArtifactError("not a rule file, or cut short: a safetensors header does not fit into it")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        raise ArtifactError("not a rule file: it does not start with a safetensors header") from None
    if not isinstance(header, dict):
        raise ArtifactError("not a rule file: its header is not a JSON object")
    return header, content[8 + length :]
