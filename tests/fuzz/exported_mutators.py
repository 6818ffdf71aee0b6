"""Hostile exported files: `.pt`, `.pt2` and `.onnx`, with and without a digest that fits.

As in `rule_mutators`, but a mutator also gets the suffix. What runs creates a file called `Payload.marker`.
"""

import hashlib
import io
import json
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable

import onnx
import torch
from rule_mutators import NAMES, Payload, flip
from signed_mutators import nested
from torch import Tensor, nn

Mutator = Callable[[random.Random, bytes, str], bytes]
CODE = f"open({Payload.marker!r}, 'w')"
ONNX_TAIL = b"\x72\x4e\x0a\x0al2o-sha256\x12\x40"


def unsealed(content: bytes, suffix: str) -> bytes:
    """The file without its digest."""
    return content[: -64 - len(ONNX_TAIL)] if suffix == ".onnx" else content[:-66] + b"\0\0"


def sealed(content: bytes, suffix: str) -> bytes:
    """The file with a digest that fits; a file too short or strange for one stays as it is."""
    if suffix == ".onnx":
        content += ONNX_TAIL
    elif content[-22:-18] == b"PK\x05\x06":
        content = content[:-2] + b"\x40\0"
    return content + hashlib.sha256(content).hexdigest().encode()


def members(content: bytes) -> dict[str, bytes]:
    """Contents of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive, in which names may repeat."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(buffer, "w", compression) as file:
            for name, data in entries:
                file.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def pickled(rng: random.Random) -> bytes:
    """A pickle that creates the marker, bare or in a torch.save archive."""
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        return pickle.dumps(rng.choice([Payload(), (Payload(),), {"x": Payload()}]), protocol=rng.randint(0, 4))
    torch.save(rng.choice([Payload(), {"x": Payload()}]), buffer)
    return buffer.getvalue()


# Without a new digest.


def truncated(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """Cut short."""
    return content[: rng.randrange(len(content))]


def flipped_bits(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """One bit, or several."""
    return flip(rng, content, rng.choice([1, 1, 2, 16]))


def noise(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """Random bytes, under a digest half of the time."""
    random_bytes = rng.randbytes(rng.randint(0, 4000))
    return random_bytes if rng.random() < 0.5 else sealed(random_bytes, suffix)


def without_digest(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """A file of others: no digest, or something behind it."""
    return rng.choice([unsealed(content, suffix), content + b"\0", content + content, b"", content[:-64] + b"0" * 64])


def pickle_file(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """A plain pickle or a torch.save file under this name, under a digest half of the time."""
    return pickled(rng) if rng.random() < 0.5 else sealed(pickled(rng), suffix)


# With a digest that fits; archives.


def pickle_member(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """A member that torch unpickles replaced by a malicious pickle, or one added."""
    entries = members(content)
    names = ["data.pkl", "constants.pkl", "attributes.pkl", "data/weights/model.pt", "data/constants/model.pt"]
    names += ["data/constants/opaque_obj_0", "data/constants/custom_obj_0", "version", "data/sample_inputs/other.pt"]
    names += ["models/other.json", "serialized_state_dict.pt", "data/aotinductor/model/x.so"]
    for name in rng.sample(names, rng.randint(1, 3)):
        entries[f"archive/{name}"] = pickled(rng)
    return sealed(archive(list(entries.items())), suffix)


def pickle_never_read(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """A malicious pickle where torch looks for example inputs, which are never passed on."""
    name = "data/sample_inputs/model.pt" if suffix == ".pt2" else "traced_inputs.pkl"
    return sealed(archive(list((members(content) | {f"archive/{name}": pickled(rng)}).items())), suffix)


def pickle_weights(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """A `.pt2` that says its weights or constants are pickles; in a `.pt` they become its code."""
    entries = members(content)
    if suffix == ".pt":
        code = rng.choice([name for name in entries if name.endswith(".py")])
        return sealed(archive(list((entries | {code: pickled(rng)}).items())), suffix)
    kind = rng.choice(["weights", "constants"])
    name = f"archive/data/{kind}/model_{kind}_config.json"
    config = json.loads(entries[name])
    path = rng.choice(["weight_0", "opaque_obj_0", "custom_obj_0", "../sample_inputs/model.pt", "tensor_0"])
    weight = next(iter(json.loads(entries["archive/data/weights/model_weights_config.json"])["config"].values()))
    key = rng.choice(["rule.cell.bias.0", "x"])
    config["config"][key] = weight | {"path_name": path, "use_pickle": rng.choice([True, True, 1])}
    new = {name: json.dumps(config).encode(), f"archive/data/{kind}/{path}": pickled(rng)}
    return sealed(archive(list((entries | new).items())), suffix)


def zip_tricks(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """Names twice, paths, bombs, other compressions, missing members."""
    entries = list(members(content).items())
    choice = rng.randrange(6)
    if choice == 0:
        entries.append((rng.choice(entries)[0], pickled(rng)))
    elif choice == 1:
        entries.append((rng.choice(["../x", "/etc/x", "archive/../../x", "archive/code/../x.py", *NAMES[2:8]]), b"x"))
    elif choice == 2:
        return sealed(archive([*entries, ("archive/data/99", bytes(60 * 2**20))], zipfile.ZIP_DEFLATED), suffix)
    elif choice == 3:
        return sealed(archive(entries, rng.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])), suffix)
    elif choice == 4:
        needed = [entry for entry in entries if entry[0].endswith(("data.pkl", ".json", "/constants.pkl", "/weight_1"))]
        entries.remove(rng.choice(needed))
    else:
        entries = [(name.replace("archive/", rng.choice(["", "a/b/"]), 1), data) for name, data in entries]
    return sealed(archive(entries), suffix)


def metadata(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """Other metadata: newer, duplicate keys, too deep, not JSON, another rule's."""
    good = extra(content, suffix)
    others = [good.replace("l2o-rule/2", "l2o-rule/3"), good.replace('"config"', '"config": 1, "config"'), "", "[]"]
    others += [nested(rng), good.replace('"hidden": ', '"hidden": 1e999, "x": ')]
    others += ["null", good[:-1], good.replace("hidden", "hiden"), good.replace('"config"', '"conf"'), "\0" * 1000]
    if suffix == ".pt2":  # in the others, that the sizes are another rule's shows at the first step
        others.append(good.replace('"hidden": ', '"hidden": 4'))
    new = rng.choice(others)
    if suffix != ".onnx":
        return sealed(archive(list((members(content) | {"archive/extra/l2o-rule.json": new.encode()}).items())), suffix)
    model = onnx.load_from_string(unsealed(content, suffix))
    onnx.helper.set_model_props(model, {"l2o-rule.json": new})
    return sealed(model.SerializeToString(), suffix)


def extra(content: bytes, suffix: str) -> str:
    """What a file says about itself."""
    if suffix != ".onnx":
        return members(content)["archive/extra/l2o-rule.json"].decode()
    return next(p.value for p in onnx.load_from_string(content).metadata_props if p.key == "l2o-rule.json")


def program(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """Python code wherever torch.export would evaluate, compile or look up strings of a `.pt2`."""
    entries = members(content)
    model = json.loads(entries["archive/models/model.json"])
    graph, module = model["graph_module"]["graph"], model["graph_module"]
    node = rng.choice([node for node in graph["nodes"] if node["outputs"]])
    expression = rng.choice([CODE, f"sympify.__globals__['__builtins__']['{CODE[:4]}']", "9**9**9**9", "s0" * 99999])
    choice = rng.randrange(7)
    if choice == 0:
        symbols = [s for value in graph["tensor_values"].values() for s in value["sizes"] if "as_expr" in s]
        rng.choice(symbols)["as_expr"]["expr_str"] = expression
    elif choice == 1:
        targets = ["torch.os.system", "torch.load", "torch.ops.aten.from_file.default", "_operator.attrgetter", "#x:y"]
        node["target"] = rng.choice(
            [*targets, "torch.ops.load_library", "math.exp", "builtins.open", expression, *NAMES]
        )
    elif choice == 2:
        node["outputs"][0] = {"as_tensor": {"name": f"x\n{CODE}"}}
    elif choice == 3:
        spec = json.dumps([1, {"type": "collections.defaultdict", "context": {"default_factory_module": "os"}}])
        module["module_call_graph"][0]["signature"][rng.choice(["in_spec", "out_spec"])] = rng.choice(
            [spec, expression]
        )
    elif choice == 4:
        module["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x={CODE}"]
    elif choice == 5:
        node["inputs"] = [{"name": "filename", "arg": {"as_string": "/etc/passwd"}, "kind": 1}]
    else:
        graph["tensor_values"][rng.choice(NAMES[:5])] = next(iter(graph["tensor_values"].values()))
    return sealed(archive(list((entries | {"archive/models/model.json": json.dumps(model).encode()}).items())), suffix)


def code_never_read(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """Python code in those parts of a `.pt2` that are never passed on."""
    entries = members(content)
    model = json.loads(entries["archive/models/model.json"])
    if rng.random() < 0.5:
        model["guards_code"] = [rng.choice([CODE, f"{CODE} == 1"])]
    else:
        node = rng.choice(model["graph_module"]["graph"]["nodes"])
        node["metadata"] = {rng.choice(["stack_trace", "source_fn_stack", "custom"]): f"x,{CODE}"}
    return sealed(archive(list((entries | {"archive/models/model.json": json.dumps(model).encode()}).items())), suffix)


class WritesWhileRead(nn.Module):
    """A TorchScript module that writes a file when it is loaded."""

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        """Something to keep."""
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        """What runs while the file is read."""
        self.training = state[1]
        torch.save(state[0], "unpickled")

    def forward(self, x: Tensor) -> Tensor:
        """Nothing."""
        return x


def running_code(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """TorchScript that writes a file while it is read."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(
            torch.jit.script(WritesWhileRead()), buffer, _extra_files={"l2o-rule.json": extra(content, suffix)}
        )
    return sealed(buffer.getvalue(), suffix)


def foreign_nodes(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """ONNX operators of a domain of one's own, numbers from other files, and cyclic or absurd graphs."""
    model = onnx.load_from_string(unsealed(content, suffix))
    node, choice = rng.choice([node for node in model.graph.node if node.input]), rng.randrange(4)
    if choice == 0:
        node.domain = rng.choice(["evil", "ai.onnx.contrib", "com.evil.python"])
    elif choice == 1:
        node.op_type = rng.choice(["PyOp", "Evil", "", "x" * 9999])
    elif choice == 2:
        tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = rng.choice(["../../etc/passwd", "/etc/passwd", "/dev/zero", "weights.bin", "/proc/self/mem"])
        for key, value in {"location": place, "offset": "0", "length": str(length)}.items():
            item = tensor.external_data.add()
            item.key, item.value = key, value
    else:
        node.input[0] = node.output[0]
    return sealed(model.SerializeToString(), suffix)


BOTH: dict[str, Mutator] = {"truncated": truncated, "flipped bits": flipped_bits, "noise": noise}
BOTH |= {"without digest": without_digest, "pickle file": pickle_file, "metadata": metadata}
ARCHIVE: dict[str, Mutator] = {
    "pickle member": pickle_member,
    "pickle weights": pickle_weights,
    "zip tricks": zip_tricks,
}
REFUSED: dict[str, dict[str, Mutator]] = {
    ".pt": BOTH | ARCHIVE | {"running code": running_code},
    ".pt2": BOTH | ARCHIVE | {"program": program},
    ".onnx": BOTH | {"foreign nodes": foreign_nodes},
}
# What is hostile here is never looked at, and the rest is the good rule.
IGNORED: dict[str, dict[str, Mutator]] = {
    ".pt": {"pickle never read": pickle_never_read},
    ".pt2": {"pickle never read": pickle_never_read, "code never read": code_never_read},
    ".onnx": {},
}


def resealed(rng: random.Random, content: bytes, suffix: str) -> bytes:
    """Bits flipped inside a file whose checksums all fit: what only torch and onnxruntime themselves can refuse."""
    if suffix == ".onnx":
        return sealed(flip(rng, unsealed(content, suffix), rng.choice([1, 4])), suffix)
    entries = members(content)
    name = rng.choice([name for name in sorted(entries) if entries[name]])
    entries[name] = flip(rng, entries[name], rng.choice([1, 4]))
    return sealed(archive(list(entries.items())), suffix)
