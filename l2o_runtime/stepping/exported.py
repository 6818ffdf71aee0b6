"""How a file that holds a whole step is run over the parts of a model."""

import torch
from torch import Tensor

from l2o_runtime.files.exported import ExportedRule
from l2o_runtime.state import State
from l2o_runtime.stepping.engine import write, write_contexts
from l2o_runtime.stepping.parts import Part


def advance_exported(rule: ExportedRule, parts: list[Part], loss: Tensor, context_state: State, good: Tensor) -> None:
    """One step, as `advance` of `l2o_runtime.stepping.engine` takes it, with an exported file.

    It takes all coordinates at once, and computes its own statistics.

    Raises:
        RuntimeError: a parameter is sharded.
    """
    if any(part.groups for part in parts):
        raise RuntimeError(f"{rule.path.name} holds the whole step; sharded parameters need a .safetensors rule")
    sizes = [len(part.theta) for part in parts]

    def join(tensors: list[Tensor]) -> Tensor:
        # The step count is one number per parameter here, and one per coordinate in the file.
        return torch.cat([(t.expand(n) if len(t) != n else t).cpu() for t, n in zip(tensors, sizes, strict=True)])

    coordinates = {key: join([part.state[key].float() for part in parts]) for key in rule.spec.coordinate}
    thetas = join([part.theta.float() for part in parts])
    grads = torch.cat([piece.grad.cpu() for part in parts for piece in part.chunks()])
    states = {key: torch.stack([part.own[key].cpu() for part in parts]) for key in rule.spec.tensor}
    layout = rule.layout([part.shape for part in parts]) if rule.per_tensor else None
    loss = torch.where(good, loss, 0.0)
    delta, coordinates, new = rule(thetas, grads, loss, coordinates, context_state | states, layout)
    write_contexts(context_state, parts, new, good)
    pieces = {key: value.split(sizes) for key, value in coordinates.items()}
    for i, (part, move) in enumerate(zip(parts, delta.split(sizes), strict=True)):
        fine = good.to(part.param.device)
        write(part.state, {key: split[i] for key, split in pieces.items()}, fine)
        part.move(part.theta, move.to(fine.device), fine, part.state)
        part.finish(fine)
