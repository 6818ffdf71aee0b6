"""Hostile `.safetensors` rules whose digest fits, as an attacker would make them.

What is wrong in them reaches the code behind the digest. As in `rule_mutators` otherwise.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from rule_mutators import (
    DEEP,
    DTYPES,
    NAMES,
    NUMBERS,
    VALUES,
    Header,
    Mutator,
    dump,
    flip,
    in_config,
    in_header,
    in_tensor,
    pack,
    sign,
    sign_text,
    split,
    tensors,
)


def header_text(rng: random.Random, content: bytes) -> bytes:
    """A header that says the same in other words, or in no UTF-8."""
    header, data = split(content)
    text = sign(header, data)[8 : -len(data)].rstrip()
    edits: list[Callable[[], bytes]] = [
        lambda: json.dumps(json.loads(text), sort_keys=True).encode(),
        lambda: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")).encode(),
        lambda: text.replace(b"cell", b"\\u0063ell", 1),
        lambda: b"\xef\xbb\xbf" + text,
        lambda: text.decode().encode(rng.choice(["utf-16", "utf-32", "utf-16-le", "utf-7"])),
        lambda: text.replace(b"F32", rng.choice([b"F32\xff", b"F\xc0\x8032", b"\xed\xa0\x80F32", b"F3\\/2"]), 1),
        lambda: text + rng.choice([b"\n", b"\0", b"\t", b" {}", b",", b"//x", b"}"]),
        lambda: rng.choice([b"[", b" ", b"\n", b"\0"]) + text,
        lambda: text.replace(b":", b" :", rng.randint(1, 9)),
        lambda: rng.choice(
            [b"[]", b"{}", b"null", b"1", b'"x"', b"[1]", b'{"__metadata__":{}}', b'{"__metadata__":[]}']
        ),
    ]
    return pack(rng.choice(edits)(), data)


def duplicate_header_key(rng: random.Random, content: bytes) -> bytes:
    """A tensor, or the metadata, twice."""
    name = rng.choice(tensors(split(content)[0]))
    entry = f'"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},'
    extra = rng.choice([entry, '"__metadata__":{"format":"l2o-rule/2"},', entry * 3])
    return sign_text(lambda text: rng.choice(["{" + extra + text[1:], text[:-1] + "," + extra[:-1] + "}"]), content)


def duplicate_inner_key(rng: random.Random, content: bytes) -> bytes:
    """A key of the metadata or of a tensor twice."""
    old, new = rng.choice(
        [
            ('"format":', '"format":"l2o-rule/9","format":'),
            ('"config":', '"config":"{}","config":'),
            ('"provenance":', '"provenance":"{}","provenance":'),
            ('"dtype":', '"dtype":"F64","dtype":'),
            ('"shape":', '"shape":[1],"shape":'),
            ('"data_offsets":', '"data_offsets":[0,0],"data_offsets":'),
        ]
    )
    return sign_text(lambda text: text.replace(old, new, rng.randint(1, 3)), content)


def duplicate_config_key(rng: random.Random, config: Header) -> str:
    """A key of the configuration twice."""
    key = rng.choice(sorted(config))
    text = dump(config)
    twice = f'"{key}":{dump(rng.choice([config[key], 1, "x"]))}'
    inner = text.replace('"kind":', f'"kind":{dump(rng.choice(VALUES))},"kind":')
    return rng.choice([text[:-1] + f",{twice}}}", "{" + twice + "," + text[1:], inner])


def nested(rng: random.Random) -> str:
    """JSON of great depth."""
    depth = rng.choice([65, 66, 100, 500, 900, 990, 1000, 1100, 5000, 50_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
    return opening * depth + "1" + closing * depth if rng.random() < 0.9 else opening * depth


def deep_header(rng: random.Random, content: bytes) -> bytes:
    """A header of great depth."""
    deep = nested(rng)
    old = rng.choice(['"shape":', '"__metadata__":', '"config":', '"dtype":'])
    whole = rng.random() < 0.2
    return sign_text(lambda text: deep if whole else text.replace(old, f"{old}{deep},{old}", 1), content)


def config_value(rng: random.Random, config: Header) -> None:
    """Any value in the configuration replaced by one of another kind or size."""
    table = rng.choice([config, config["context"]])
    table[rng.choice(sorted(table))] = rng.choice([*VALUES, rng.randint(-10, 2000), rng.random() * 10, DEEP])


def config_key(rng: random.Random, config: Header) -> None:
    """A key that is not known."""
    table = rng.choice([config, config["context"]])
    table[rng.choice([*NAMES, "hiden", "__init__", "context ", "Hidden", "k" * 100_000])] = rng.choice(VALUES)


def config_number(rng: random.Random, config: Header) -> str:
    """A number that is none, not finite, or enormous."""
    key = rng.choice(["output_scale", "hidden", "layers", "horizon", "output"])
    return dump(config | {key: "@"}).replace('"@"', rng.choice(NUMBERS))


def config_sizes(rng: random.Random, config: Header) -> None:
    """Sizes out of range."""
    key = rng.choice(["hidden", "layers", "horizon"])
    config[key] = rng.choice([0, -1, 2**31, 2**63, 10**18, 10**400, *([513, 10**6] if key != "horizon" else [])])


def config_bomb(rng: random.Random, config: Header) -> None:
    """Sizes that are each in range, and absurd together."""
    big = {"window": rng.randint(512, 1024), "sketch": rng.randint(16_384, 65_536)}
    kae = {"kind": "kae", "hidden": 1024, "latent": 256}
    config["hidden"], config["layers"] = rng.choice([(2, 1), (512, 8), (512, rng.randint(3, 8))])
    config["context"] = rng.choice([{"kind": "dmd", "rank": 1} | big, kae | big, {"kind": "placebo", "width": 1024}])


def config_text(rng: random.Random, config: Header) -> str:
    """Something else where the configuration should be."""
    others = ["", " ", "null", "[]", "1", '"x"', "{", "{}}", "<x/>", "{'hidden': 2}", "hidden=2", "\0", "\ud800"]
    others += ["[{}]"]
    return rng.choice([*others, dump([config]), dump(dump(config)), dump(config)[:-1], "{" * 9, "tru", nested(rng)])


def other_config(rng: random.Random, config: Header) -> None:
    """A good configuration of another rule."""
    config["hidden"] += rng.randint(1, 100)


def context(rng: random.Random, config: Header) -> None:
    """A context that is none."""
    good = config["context"]
    bad = [None, [], "dmd", 1, {}, [good], {"kind": good}, {"kind": [good["kind"]]}, {"kind": None}, {"kind": "DMD"}]
    bad += [good | {"kind": "os.system"}, {"kind": "kae", "latent": 3}, {"kind": "dmd", "rank": 17}, {"context": good}]
    bad += [{"kind": "flag", "window": 1}, {"kind": "flag", "width": 1}, {"kind": "dmd", "delay": 5}]
    bad += [{"kind": "dmd", "window": 4, "rank": 9}, {"kind": "placebo", "width": 10**9}, {"kind": "x" * 100_000}]
    config["context"] = rng.choice(bad)


def values(rng: random.Random, content: bytes) -> bytes:
    """Weights that are not finite."""
    header, data = split(content)
    numbers = np.frombuffer(data, dtype="<f4").copy()
    for index in rng.sample(range(len(numbers)), rng.randint(1, 3)):
        numbers[index] = rng.choice([np.nan, np.inf, -np.inf])
    return sign(header, numbers.tobytes())


def weights(rng: random.Random, content: bytes) -> bytes:
    """Other weights, by chance not finite."""
    header, data = split(content)
    return sign(header, flip(rng, data, rng.randint(1, 40)))


def data_size(rng: random.Random, content: bytes) -> bytes:
    """Too little data, or too much."""
    header, data = split(content)
    more = data + rng.randbytes(rng.randint(1, 100))
    return sign(header, rng.choice([b"", data[: rng.randrange(len(data))], more, data * 2]))


def any_shape(rng: random.Random, old: Any) -> Any:
    """Absurd, negative, fractional, of another rank, or no shape."""
    huge = [rng.choice([2**20, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30]) for _ in range(rng.randint(1, 4))]
    others = [huge, [0, *huge], [-1], [-d for d in old] + [-1], [d + 0.5 for d in old] + [0.5], [*old, 1], [1] * 100]
    others += [[0]]
    return rng.choice([*others, None, "x", {}, 8, [None], [[1]], [str(d) for d in old] + ["1"]])


def any_offsets(rng: random.Random, old: Any) -> Any:
    """Offsets that overlap, leave gaps, point outside, are reversed or no offsets."""
    a, b = old
    others = [[a + 4, b + 4], [a, b + 4], [b + 1, a], [-4, b], [a, 2**40], [2**63, 2**64], [0, 2**64 - 1], [a, 10**30]]
    others += [[a + 0.5, b + 0.5], [a], [a, b, b], [], None, "0,8", {}, [str(a), str(b)], [b + 8, b + 16]]
    return rng.choice(others)


def names(rng: random.Random, header: Header) -> None:
    """A tensor missing, added or renamed, to a path among others."""
    name = rng.choice(tensors(header))
    choice = rng.randrange(3)
    entry = header[name] if choice == 1 else header.pop(name)
    if choice:
        header[rng.choice([new for new in NAMES if new]) + rng.choice(["", name])] = entry


def many_tensors(rng: random.Random, header: Header) -> None:
    """Thousands of tensors."""
    for index in range(rng.choice([10, 100, 1000, 10_000])):
        header[f"x{index}"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def entry(rng: random.Random, header: Header) -> None:
    """A tensor whose entry is something else, or lacks a key."""
    name = rng.choice(tensors(header))
    if rng.random() < 0.5:
        header[name] = rng.choice(VALUES)
    else:
        del header[name][rng.choice(["dtype", "shape", "data_offsets"])]


def metadata(rng: random.Random, header: Header) -> None:
    """Metadata with keys too many or too few, with values that are no strings, or no metadata."""
    choice = rng.randrange(4)
    if choice == 0:
        header["__metadata__"] = rng.choice(VALUES)
    elif choice == 1:
        header["__metadata__"][rng.choice([*NAMES, "author"])] = rng.choice(["", "x", None, 1])
    elif choice == 2:
        del header["__metadata__"][rng.choice(["config", "provenance", "format"])]
    else:
        header["__metadata__"][rng.choice(["config", "provenance", "format"])] = rng.choice(
            [v for v in VALUES if v != "1"]
        )


def formats(rng: random.Random, header: Header) -> None:
    """Another format, or another version of it."""
    others = ["l2o-rule/3", "l2o-rule/10", "l2o-rule/0", "l2o-rule/", "l2o-rule/2 ", "L2O-RULE/2", "l2o-rule/2.0", "pt"]
    others += [""]
    others += ["l2o-rule/" + name for name in NAMES] + ["l2o-rule/" + "9" * 100_000, "l2o-rule/१", " l2o-rule/1"]
    header["__metadata__"]["format"] = rng.choice(others)


def provenance(rng: random.Random, header: Header) -> None:
    """Provenance that is no JSON object, is too deep, or has a key twice or numbers that are not finite."""
    others = ["", "null", "[]", "1", '"x"', "{", '{"a":1,"a":1}', '{"b":{"a":1,"a":2}}', "\ud800", "{'a':1}"]
    others += [nested(rng)]
    others += [f'{{"score":{number}}}' for number in NUMBERS if number not in ("-0.0", "1e-999", "1" * 400)]
    header["__metadata__"]["provenance"] = rng.choice([*others, f'{{"a":{nested(rng)}}}', "x" * 500_000])


def free_provenance(rng: random.Random, header: Header) -> None:
    """Provenance that is strange, and allowed."""
    header["__metadata__"]["provenance"] = dump({rng.choice(NAMES): rng.choice([*VALUES, *NAMES, "x" * 300_000])})


def large(rng: random.Random, content: bytes) -> bytes:
    """Megabytes of data: the largest file that is read at all, or larger, every twentieth time."""
    header, _ = split(content)
    size = rng.choice([48 * 2**20 - 4096, 48 * 2**20, 49 * 2**20]) if rng.random() < 0.05 else 2**20
    header["cell.bias.0"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    return sign(header, bytes(size))


def long_header(rng: random.Random, content: bytes) -> bytes:
    """A header as long as a header may be, or longer."""
    header, data = split(content)
    header["__metadata__"]["provenance"] = rng.choice('[{"1a') * rng.choice([2**19, 2**20 - 5000, 2**20])
    return sign(header, data)


SIGNED: dict[str, Mutator] = {
    "header text": header_text,
    "duplicate header key": duplicate_header_key,
    "duplicate inner key": duplicate_inner_key,
    "duplicate config key": in_config(duplicate_config_key),
    "deep header": deep_header,
    "config key": in_config(config_key),
    "config number": in_config(config_number),
    "config sizes": in_config(config_sizes),
    "config bomb": in_config(config_bomb),
    "config text": in_config(config_text),
    "config of another": in_config(other_config),
    "context": in_config(context),
    "values not finite": values,
    "data size": data_size,
    "dtype": in_tensor("dtype", lambda rng, old: rng.choice([*DTYPES, *VALUES])),
    "shape": in_tensor("shape", any_shape),
    "offsets": in_tensor("data_offsets", any_offsets),
    "tensor names": in_header(names),
    "many tensors": in_header(many_tensors),
    "tensor entry": in_header(entry),
    "metadata": in_header(metadata),
    "format": in_header(formats),
    "provenance": in_header(provenance),
    "large": large,
    "long header": long_header,
}

# These may hit on a good rule: then it is one, and loading it is right.
MAY_LOAD: dict[str, Mutator] = {
    "config value": in_config(config_value),
    "weights": weights,
    "free provenance": in_header(free_provenance),
}
