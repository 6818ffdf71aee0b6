"""Record what every bundled rule does: `python -m tests.golden.record [trajectories …]`, from the project's folder.

To be run only where what rules do is meant to change, and said so in the change.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.trajectories import HERE, MODELS, RULES, amplified, processor, train


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
    write("digests.json", {processor(): digests})


def write(name: str, content: dict) -> None:
    (HERE / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


PARTS = {"trajectories": trajectories}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
