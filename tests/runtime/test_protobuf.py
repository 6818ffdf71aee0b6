"""No field of an ONNX file in which a tensor can say that its numbers are elsewhere is overlooked."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2o_runtime.files.protobuf import MAX_DEPTH, MESSAGES, reads_elsewhere

onnx = pytest.importorskip("onnx", reason="ONNX files are written by onnx: pip install '.[onnx]'")


def varint(value: int, more: int = 0) -> bytes:
    """In as few bytes as can be, and so many more than need be."""
    parts = [value & 127]
    while value := value >> 7:
        parts.append(value & 127)
    parts += [0] * more
    return bytes([part | 128 for part in parts[:-1]] + parts[-1:])


def field(number: int, content: bytes, more: int = 0) -> bytes:
    return varint(number << 3 | 2, more) + varint(len(content), more) + content


def paths() -> list[list[int]]:
    """Fields from the model to a tensor, through every one that is known, once at most each."""
    found, waiting = [], [("model", [], [])]
    while waiting:
        message, path, been = waiting.pop()
        if message == "tensor":
            found.append(path)
        for number, inner in MESSAGES[message].items():
            if (message, number) not in been and len(path) < 7:
                waiting.append((inner, [*path, number], [*been, (message, number)]))
    return found


def wrapped(content: bytes, path: list[int], more: int = 0) -> bytes:
    for number in reversed(path):
        content = field(number, content, more)
    return content


PATHS = paths()


def test_all_places_of_tensors_are_known_as_onnx_has_them():
    """Every message of onnx's own description that may hold a tensor, and the number of each field."""
    names = {"model": "ModelProto", "training": "TrainingInfoProto", "graph": "GraphProto", "function": "FunctionProto"}
    names |= {
        "node": "NodeProto",
        "attribute": "AttributeProto",
        "sparse": "SparseTensorProto",
        "tensor": "TensorProto",
    }
    ours = {name: kind for kind, name in names.items()}
    for kind, name in names.items():
        fields = getattr(onnx, name).DESCRIPTOR.fields
        inner = {each.number: each.message_type.name for each in fields if each.message_type is not None}
        assert MESSAGES[kind] == {number: ours[held] for number, held in inner.items() if held in ours}
    tensor = onnx.TensorProto.DESCRIPTOR.fields_by_name
    assert (tensor["external_data"].number, tensor["data_location"].number) == (13, 14)


@pytest.mark.parametrize("more", [0, 1, 3])
def test_it_is_seen_wherever_it_is(more):
    entry = field(2, b"secret.bin") + field(1, b"location")  # the value before its key
    assert len(PATHS) > 50
    for path in PATHS:
        other = field(1, b"a name") + varint(8) + varint(7)
        for told in (field(13, entry, more), varint(14 << 3) + varint(1, more)):
            for tensor in (told, other + told, told + other):
                assert reads_elsewhere(wrapped(tensor, path, more)), path
        assert not reads_elsewhere(wrapped(other + field(9, entry), path, more)), path


@pytest.mark.parametrize(
    "content",
    [b"\x80", b"\x3a", b"\x3a\x05abc", b"\x3b\x3c", b"\x02\x00", b"\xff" * 11, b"\x3d\x00", varint(2**40) + b"\x00"],
)
def test_what_is_no_message_is_told(content):
    with pytest.raises(ValueError, match=r"a field|a number"):
        reads_elsewhere(content)


def test_messages_in_messages_end_somewhere():
    content = b""
    for _ in range(MAX_DEPTH):
        content = field(6, content)  # a graph in an attribute
        content = field(1, field(5, content))
    with pytest.raises(ValueError, match="nested deeper"):
        reads_elsewhere(field(7, content))


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_noise_is_read_or_told(content):
    with suppress(ValueError):
        assert reads_elsewhere(content) in (True, False)
