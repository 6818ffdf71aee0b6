"""Where an ONNX file, a message of Protocol Buffers, says that numbers are in other files."""

from collections.abc import Iterator

MAX_DEPTH = 100
"""Messages within messages, as Protocol Buffers' own readers have it."""

MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
"""Messages of ONNX in which there are tensors: number of a field → what it holds."""

EXTERNAL = (13, 14)
"""Fields of a tensor: the file that its numbers are in, and that they are in one."""

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5
"""Types of fields on the wire; the other two are of groups, which ONNX has none of."""


def reads_elsewhere(content: bytes | memoryview, message: str = "model", depth: int = 0) -> bool:
    """Whether any tensor of an ONNX model names another file for its numbers, in whatever order fields come.

    Args:
        content: of the message.
        message: its kind, a key of `MESSAGES`.
        depth: how many messages it is in.

    Raises:
        ValueError: it is no such message.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"messages nested deeper than {MAX_DEPTH}")
    known = MESSAGES[message]
    for field, value in _fields(memoryview(content)):
        if message == "tensor" and field in EXTERNAL:
            return True
        if value is not None and field in known and reads_elsewhere(value, known[field], depth + 1):
            return True
    return False


def _fields(content: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """Numbers of fields, and what those of bytes hold."""
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        field, kind, value, size = tag >> 3, tag & 7, None, 0
        if kind == VARINT:
            _, at = _varint(content, at)
        elif kind in (EIGHT, FOUR):
            size = 8 if kind == EIGHT else 4
        elif kind == BYTES:
            size, at = _varint(content, at)
            value = content[at : at + size]
        else:
            raise ValueError(f"a field of type {kind}")
        at += size
        if at > len(content) or not 0 < field < 2**29:
            raise ValueError("a field beyond its message's end, or of no number")
        yield field, value


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven per byte, and where it ends."""
    value = 0
    for index, byte in enumerate(content[at : at + 10]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    raise ValueError("a number without an end")
