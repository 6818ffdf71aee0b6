"""Hostile `.safetensors` rules: named ways to spoil a good file without a new digest.

A mutator takes a random generator and a good file and gives a file. The format is written down here a second time, from
docs/artifact.md.
"""

import copy
import gzip
import hashlib
import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Header = dict[str, Any]
Mutator = Callable[[random.Random, bytes], bytes]

NAMES = ["../../etc/passwd", "/etc/passwd", "C:\\windows\\x", "a\0b", "..", "", "__class__", "cell.__init__", "\ud800"]
NAMES += ["x" * 10_000, "\x1b[2J", "cell..bias", "%n%s", "${HOME}", "__metadata__ ", "é" * 300, "\u202ebias"]
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "9" * 5000, "1e-999", "-0.0", "0x10", "1_0"]
NUMBERS += ["01"]
VALUES = [None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, "", "1", "none", [], {}, [[]], [1]]
VALUES += [{"a": 1}]
DEEP = json.loads("[" * 60 + "]" * 60)
DTYPES = ["F16", "BF16", "F64", "I8", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "X", "", "f32", "float32"]


def split(content: bytes) -> tuple[Header, bytes]:
    """Header and data of a good file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def pack(text: bytes, data: bytes) -> bytes:
    """A file with this text as its header."""
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def dump(value: Any) -> str:
    """Canonical JSON, which here may also hold what is not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def sign(header: Header, data: bytes) -> bytes:
    """A file whose digest fits."""
    header = copy.deepcopy(header)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"].pop("digest", None)
        header["__metadata__"]["digest"] = hashlib.sha256(dump(header).encode() + data).hexdigest()
    return pack(dump(header).encode(), data)


def sign_text(edit: Callable[[str], str], content: bytes) -> bytes:
    """A file whose header was edited as text; its digest fits what Python's json makes of it, where it makes any."""
    header, data = split(content)
    del header["__metadata__"]["digest"]
    text = edit(dump(header))
    try:
        digest = hashlib.sha256(dump(json.loads(text)).encode() + data).hexdigest()
    except (ValueError, RecursionError):
        digest = "0" * 64
    return pack(text.replace('"format"', f'"digest":"{digest}","format"', 1).encode(errors="surrogatepass"), data)


def tensors(header: Header) -> list[str]:
    """Names of the tensors in a header."""
    return sorted(header.keys() - {"__metadata__"})


def in_header(change: Callable[[random.Random, Header], Any]) -> Mutator:
    """A signed mutator that changes the header in place."""

    def mutate(rng: random.Random, content: bytes) -> bytes:
        header, data = split(content)
        change(rng, header)
        return sign(header, data)

    return mutate


def in_config(change: Callable[[random.Random, Header], Any]) -> Mutator:
    """A signed mutator that changes the configuration in place, or gives its text."""

    def mutate(rng: random.Random, header: Header) -> None:
        config = json.loads(header["__metadata__"]["config"])
        text = change(rng, config)
        header["__metadata__"]["config"] = text if isinstance(text, str) else dump(config)

    return in_header(mutate)


def in_tensor(key: str, change: Callable[[random.Random, Any], Any]) -> Mutator:
    """A signed mutator of one key of one tensor, or of all."""

    def mutate(rng: random.Random, header: Header) -> None:
        names = tensors(header)
        for name in names if rng.random() < 0.2 else [rng.choice(names)]:
            header[name][key] = change(rng, header[name][key])

    return in_header(mutate)


def truncated(rng: random.Random, content: bytes) -> bytes:
    """Cut short."""
    return content[: rng.randrange(len(content))]


def flipped_bit(rng: random.Random, content: bytes) -> bytes:
    """One bit."""
    return flip(rng, content, 1)


def flipped_bits(rng: random.Random, content: bytes) -> bytes:
    """Up to 64 bits."""
    return flip(rng, content, rng.randint(2, 64))


def flip(rng: random.Random, content: bytes, count: int) -> bytes:
    """So many different bits."""
    damaged = bytearray(content)
    for position in rng.sample(range(8 * len(content)), count):
        damaged[position // 8] ^= 1 << position % 8
    return bytes(damaged)


def length_lies(rng: random.Random, content: bytes) -> bytes:
    """A header length that is not the header's."""
    true = int.from_bytes(content[:8], "little")
    lies = [0, 1, 2, true - 1, true + 1, true - 8, true + 8, len(content), len(content) - 8, 2**20, 2**20 + 1]
    lies += [2**31, 2**32 + true, 2**63, 2**64 - 1, rng.randrange(2**64), rng.randrange(len(content))]
    return rng.choice([lie for lie in lies if lie != true]).to_bytes(8, "little") + content[8:]


def spliced(rng: random.Random, content: bytes) -> bytes:
    """A piece removed, doubled, zeroed or put elsewhere."""
    a, b = sorted(rng.sample(range(len(content) + 1), 2))
    piece, c = content[a:b], rng.randrange(len(content))
    rest = content[:a] + content[b:]
    options = [rest, content[:b] + piece + content[b:], content[:a] + bytes(b - a) + content[b:]]
    options.append(rest[:c] + piece + rest[c:])
    changed = [option for option in options if option != content]
    return rng.choice(changed or [content[:-1]])


def swapped(rng: random.Random, content: bytes) -> bytes:
    """Sections in another order."""
    end = 8 + int.from_bytes(content[:8], "little")
    length, header, data = content[:8], content[8:end], content[end:]
    return b"".join(rng.choice([(length, data, header), (header, length, data), (data, header), (length, data)]))


def noise(rng: random.Random, content: bytes) -> bytes:
    """Random bytes, half of them behind a plausible length."""
    random_bytes = rng.randbytes(rng.randint(0, 4000))
    return random_bytes if rng.random() < 0.5 else (len(random_bytes) // 2).to_bytes(8, "little") + random_bytes


def appended(rng: random.Random, content: bytes) -> bytes:
    """Something behind the end, or before the start."""
    extra = rng.choice([b"\0", b" ", b"PK\x05\x06" + bytes(18), rng.randbytes(rng.randint(1, 500)), content])
    return rng.choice([content + extra, extra + content])


def wrong_digest(rng: random.Random, content: bytes) -> bytes:
    """Another digest, or one that is no digest."""
    header, data = split(content)
    good = header["__metadata__"]["digest"]
    other = rng.choice(
        [good.upper(), good[:-1], good + " ", "", "0" * 64, rng.randbytes(32).hex(), "é" * 64, None, [good]]
    )
    header["__metadata__"]["digest"] = other if other != good else "0"
    return pack(dump(header).encode(), data)


def edited_metadata(rng: random.Random, content: bytes) -> bytes:
    """Other metadata under the old digest."""
    header, data = split(content)
    header["__metadata__"][rng.choice(["config", "provenance", "author"])] = rng.choice(
        ["{}", "", '{"hidden":2}', "[]"]
    )
    return pack(dump(header).encode(), data)


class Payload:
    """Unpickles by creating a file: if that ever exists, something was unpickled."""

    marker = "unpickled"

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (Payload.marker, "w")


def disguised(rng: random.Random, content: bytes) -> bytes:
    """A pickle, a torch.save file, a zip, an npz, an older or another format, all named as a rule."""
    kind, buffer = rng.randrange(9), io.BytesIO()
    if kind == 0:
        return pickle.dumps([Payload(), rng.random()], protocol=rng.randint(0, 5))
    if kind == 1:
        torch.save({"x": Payload(), "y": rng.random()}, buffer, _use_new_zipfile_serialization=rng.random() < 0.5)
    elif kind == 2:
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(rng.choice(["data.pkl", "../../x", "archive/constants.pkl"]), pickle.dumps(Payload()))
            archive.writestr("rule.safetensors", content)
    elif kind == 3:
        np.savez(buffer, x=np.zeros(rng.randint(1, 9)))
    elif kind == 4:
        np.save(buffer, np.array([Payload()], dtype=object), allow_pickle=True)
    elif kind == 5:
        buffer.write(gzip.compress(content, mtime=rng.randrange(2**31)))
    elif kind == 6:  # a pickle behind a plausible length
        buffer.write((rng.randint(2, 40)).to_bytes(8, "little") + pickle.dumps(Payload()))
    elif kind == 7:  # a polyglot: a good file with a zip at its end
        buffer.write(content)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr("data.pkl", pickle.dumps(Payload()))
    else:
        buffer.write(
            rng.choice([b"", b"{}", b"\0" * rng.randint(1, 99), b"<html>", b"\x7fELF", b"\x08\x07", b"\x93NUMPY"])
        )
    return buffer.getvalue()


RAW: list[Mutator] = [truncated, flipped_bit, flipped_bits, length_lies, spliced, swapped, noise, appended]
RAW += [wrong_digest, edited_metadata, disguised]
