"""What an exported file may hold, checked before torch or onnxruntime reads it.

torch.export.load unpickles arbitrary objects, evaluates expressions and compiles strings that stand in the file. So
of a `.pt2` or `.pt` archive only the members that our exporter writes are passed on, in an archive of our own making,
without any Python pickle; and of the program in a `.pt2` only names, numbers and operators of PyTorch's own.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from l2o_runtime.files.artifact import MAX_BYTES, ArtifactError, check_format, read_config
from l2o_runtime.files.untrusted import parse_json, printable
from l2o_runtime.rules import RuleConfig, make_rule

METADATA_KEY = "l2o-rule.json"
DIGEST = 64
"""Length of a SHA-256 in hex, with which every exported file ends."""

# A zip archive ends with a comment. Serialized protobuf messages that are concatenated are merged: an ONNX file
# ends with one more entry (length 78) of ModelProto.metadata_props (field 14).
ONNX_TAIL = b"\x72\x4e\x0a\x0al2o-sha256\x12\x40"

KEPT = {
    ".pt": r"data\.pkl|data/\d+|constants\.pkl|constants/\d+|code/[\w/]+\.py|version|byteorder",
    ".pt2": r"models/model\.json|data/(weights|constants)/model_(weights|constants)_config\.json"
    r"|data/weights/weight_\d+|archive_format|archive_version|byteorder|\.data/version",
}
DROPPED = {
    ".pt": r"code/[\w/]+\.debug_pkl|code/[\w/]+\.py\.debug_pkl|traced_inputs\.pkl|traced_inputs/\d+|\.data/[\w]+",
    ".pt2": r"data/sample_inputs/model\.pt|\.data/serialization_id",
}

# Every string in a program, by the key it stands under; `name` and all others are plain identifiers.
OPERATORS = "getitem|add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_|not_"
SYMBOL = r"Symbol\('s\d{1,9}'(, (positive|integer)=True){0,2}\)"
INTEGER = r"Integer\(\d{1,9}\)"
FACTOR = rf"({INTEGER}|{SYMBOL}|Min\({INTEGER}, {SYMBOL}\))"
STRINGS = {
    "target": rf"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.sym_(max|min|not|ite)|_operator\.({OPERATORS})",
    "expr_str": rf"(\d{{1,9}}\*)?({SYMBOL}|s\d{{1,9}})|{FACTOR}|Mul\({FACTOR}(, {FACTOR}){{1,3}}\)",
    "fqn": r"[\w.]*",
    "parameter_name": r"[\w.]+",
    "torch_version": r"[\w.+-]+",
    "in_spec": r'([\[\]{}:, 1]|null|"(type|context|children_spec|builtins\.(tuple|dict)|null|\[\])")*',
}
STRINGS["out_spec"] = STRINGS["in_spec"]


def seal(content: bytes, suffix: str) -> bytes:
    """An exported file with its digest at the end; other programs read it as before."""
    if suffix == ".onnx":
        content += ONNX_TAIL
    else:
        content = content[:-2] + DIGEST.to_bytes(2, "little")  # the length of the archive's comment
    return content + hashlib.sha256(content).hexdigest().encode()


def check_seal(content: bytes) -> None:
    """Refuse a file that is not, bit by bit, what `l2o export` wrote.

    Raises:
        ArtifactError: it is damaged or has no digest.
    """
    digest = hashlib.sha256(memoryview(content)[:-DIGEST]).hexdigest().encode()
    if content[-DIGEST:] != digest:
        raise ArtifactError("damaged, or not written by `l2o export`: it does not end with its digest; export it again")


def check_metadata(text: str) -> RuleConfig:
    """The configuration in what an exported file says about itself.

    Raises:
        ArtifactError: another format, or not understood.
    """
    try:
        content = parse_json(text)
        written = content.get("format") if isinstance(content, dict) else None
        config = read_config(check_format(written), content.get("config"))
        if not isinstance(config, RuleConfig):
            raise ArtifactError(f"it is of kind {config.kind}, a solver, not a rule that an optimizer follows")
        return config
    except ArtifactError:
        raise
    except ValueError as error:
        raise ArtifactError(f"the file does not carry a rule's configuration ({printable(error)})") from None


def read_archive(content: bytes, suffix: str) -> tuple[str, dict[str, bytes]]:
    """Metadata and kept members of a `.pt` or `.pt2` archive.

    Raises:
        ArtifactError: not such an archive, or it has other members than `l2o export` writes.
    """
    try:
        members = dict(_members(content))
    except ArtifactError:
        raise
    except Exception as error:  # zipfile raises a dozen classes for damaged archives
        raise ArtifactError(f"not a zip archive, or damaged ({printable(error)})") from None
    metadata = members.pop(f"extra/{METADATA_KEY}", None)
    if metadata is None:
        raise ArtifactError("the file does not carry a rule's configuration: was it written by `l2o export`?")
    foreign = [name for name in members if not re.fullmatch(f"{KEPT[suffix]}|{DROPPED[suffix]}", name)]
    if foreign:
        raise ArtifactError(f"{printable(foreign[0], 80)} is in the archive, which `l2o export` does not write")
    kept = {name: data for name, data in members.items() if re.fullmatch(KEPT[suffix], name)}
    return metadata.decode(errors="replace"), kept


def write_archive(members: dict[str, bytes]) -> io.BytesIO:
    """An archive of these members, as torch reads it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    buffer.seek(0)
    return buffer


def safe_torchscript(members: dict[str, bytes]) -> dict[str, bytes]:
    """Members of a TorchScript archive that run nothing while they are read.

    Raises:
        ArtifactError: a class in it runs code of its own when it is read, or is not made of TorchScript.
    """
    if any(b"__setstate__" in data for name, data in members.items() if name.endswith(".py")):
        raise ArtifactError("its code would run while it is read (__setstate__), which no rule needs")
    if any(b"torch.classes" in data for name, data in members.items() if not name.startswith("data/")):
        raise ArtifactError("it uses classes from outside TorchScript, which no rule needs")
    return members


def safe_program(members: dict[str, bytes], config: RuleConfig) -> dict[str, bytes]:
    """Members of a torch.export archive without anything that is unpickled, evaluated or compiled.

    Raises:
        ArtifactError: something in it could run code, or its weights are not those of its configuration.
    """
    try:
        weights = parse_json(members["data/weights/model_weights_config.json"].decode())["config"]
        constants = parse_json(members["data/constants/model_constants_config.json"].decode())
        program = parse_json(members["models/model.json"].decode())
        found = {name: _payload(entry) for name, entry in weights.items()}
        nodes = program["graph_module"]["graph"]["nodes"]
        for node in nodes:
            node["metadata"] = {}  # where the operation came from; only of use to a debugger
        program["guards_code"] = []  # Python, which torch compiles: checks of sizes that the operations make anyway
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"its program is not understood ({printable(error)})") from None
    with torch.device("meta"):
        wanted = {f"rule.{name}": list(tensor.shape) for name, tensor in make_rule(config).state_dict().items()}
    if found != wanted or constants != {"config": {}}:
        raise ArtifactError("its weights are not those that its configuration asks for")
    for key, text in _strings(program):
        if not re.fullmatch(STRINGS.get(key, r"\w*"), text):
            raise ArtifactError(f"its program has {key} = {printable(text, 80)}, which no rule needs")
    return members | {"models/model.json": json.dumps(program).encode(), "data/sample_inputs/model.pt": b""}


def _members(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Names without the archive's root folder, and contents; each checked against its CRC."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) != len(entries):
            raise ArtifactError("a name appears twice in the archive")
        if sum(entry.file_size for entry in entries) > MAX_BYTES:
            raise ArtifactError(f"it unpacks to more than {MAX_BYTES} bytes; a rule does not")
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ArtifactError("it is compressed in a way that `l2o export` does not use")
            yield entry.filename.partition("/")[2], archive.read(entry)


def _payload(entry: Any) -> list[int]:
    """Shape of a weight that is stored as plain float32 numbers."""
    tensor = entry["tensor_meta"]
    plain = entry["use_pickle"] is False and re.fullmatch(r"weight_\d+", entry["path_name"]) and tensor["dtype"] == 7
    if not plain:
        raise ValueError("a weight that is not stored as plain float32 numbers")
    return [size["as_int"] for size in tensor["sizes"]]


def _strings(program: Any) -> Iterator[tuple[str, str]]:
    """Every string in parsed JSON, keys included, with the nearest key above it."""
    stack = [("", program)]
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            for name, child in value.items():
                yield "key", name
                stack.append((name, child))
        elif isinstance(value, list):
            stack.extend((key, child) for child in value)
        elif isinstance(value, str):
            yield key, value
