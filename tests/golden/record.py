"""Record what every bundled rule does: `python -m tests.golden.record`, from the project's folder.

Names of parts (trajectories, segments, files, runs) may follow: only these are recorded then.
To be run only where what rules do is meant to change, and said so in the change; but for the part `digests`, which has
to be named: it writes down the bits of a processor that has none yet.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden import checkpoints, meta
from golden.trajectories import HERE, MODELS, RULES, amplified, last_bits, processor, train, upwards

from l2o_runtime.files.artifact import BUNDLED


def trajectories() -> None:
    """`trajectories.safetensors`: losses, projections, and how rounding is amplified; `digests.json`: every bit."""
    tensors, digests = {}, {}
    for rule in RULES:
        for name in MODELS:
            plain = train(rule, name, compiled=False)
            own = amplified(rule, name, plain).float()
            key = f"{rule}/{name}"
            tensors |= {f"{key}/losses": plain.losses, f"{key}/projection": plain.projection, f"{key}/own": own}
            tensors[f"{key}/final"] = plain.params[-1].clone()
            digests[f"{key}/plain"] = plain.digest
            digests[f"{key}/compiled"] = train(rule, name, compiled=True).digest
            print(key, flush=True)
    save_file(tensors, HERE / "trajectories.safetensors")
    note(digests)


def segments() -> None:
    """`meta.safetensors`: losses and summaries of meta-gradients of every segment, and what rounding does to them."""
    tensors, digests, names = {}, {}, {}
    for rule in RULES:
        for task in meta.TASKS:
            plain = meta.segments(rule, task, compiled=False)
            nudged = [meta.segments(rule, task, compiled=False, nudge=nudge) for nudge in (last_bits, upwards)]
            for way, found in (("plain", plain), ("compiled", meta.segments(rule, task, compiled=True))):
                digests |= {f"meta/{rule}/{task}/{k}/{way}": segment.digest for k, segment in enumerate(found)}
            for k, segment in enumerate(plain):
                own = [meta.errors(other[k], segment.losses, segment.summary) for other in nudged]
                key = f"{rule}/{task}/{k}"
                tensors |= {f"{key}/losses": segment.losses, f"{key}/summary": segment.summary}
                tensors[f"{key}/own"] = torch.stack(own).amax(0).float()
                names[rule] = " ".join(segment.grads)
            print(rule, task, flush=True)
    save_file(tensors, HERE / "meta.safetensors", names)
    note(digests)


def digests() -> None:
    """`digests.json` alone, on a processor that has none yet: bits of what `test_golden` finds to be as recorded."""
    found = {}
    for rule in RULES:
        for name in MODELS:
            for way in ("plain", "compiled"):
                found[f"{rule}/{name}/{way}"] = train(rule, name, compiled=way == "compiled").digest
        for task in meta.TASKS:
            for way in ("plain", "compiled"):
                segments = meta.segments(rule, task, compiled=way == "compiled")
                found |= {f"meta/{rule}/{task}/{k}/{way}": segment.digest for k, segment in enumerate(segments)}
        print(rule, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in checkpoints.RUNS:
            found[f"checkpoints/{name}"] = checkpoints.digest(checkpoints.resume(name, Path(folder) / name))
    note(found)


def files() -> None:
    """`v1/`: today's files of the bundled rules."""
    for rule in RULES:
        shutil.copy(BUNDLED / f"{rule}.safetensors", HERE / "v1")


def runs() -> None:
    """`checkpoints-v1/`: runs that were stopped, and where they get."""
    with tempfile.TemporaryDirectory() as folder:
        for name in checkpoints.RUNS:
            checkpoints.record(name, Path(folder))


def note(found: dict[str, str]) -> None:
    """Write down digests for this processor."""
    path = HERE / "digests.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[processor()] = known.get(processor(), {}) | found
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


PARTS = {"trajectories": trajectories, "segments": segments, "files": files, "runs": runs}
ALONE = {"digests": digests}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        (PARTS | ALONE)[part]()
