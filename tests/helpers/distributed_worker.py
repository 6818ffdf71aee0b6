"""What one rank does in tests/runtime/test_distributed.py: parallel training, faults and checkpoints.

Every scenario trains the same network on the same minibatches as a single process does. The sizes do not
divide by the number of ranks, and some ranks hold no row at all of the smallest tensors.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rules import RULES, make_rule
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from l2o_runtime import LearnedOptimizer, save_rule
from l2o_runtime.wrappers.koopman import KoopmanAccelerated

RULE = "normalized-dmd"
"""A bundled rule with a context, unless a scenario has its own."""

STEPS = 26
"""Of most runs: windows are full after 21."""

RESUMED_STEPS = 44
"""Of those that are saved half-way: windows are full by then."""

GUARDED_STEPS = 100
"""Under a safeguard: its first trial begins at step 50, and is undone at 80; the second ends at 100."""

BATCH = 16


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def minibatches(start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    inputs = torch.randn(stop, BATCH, 6, generator=rng)[start:]
    return [(x, x[:, :1].sin()) for x in inputs]


def train(model: nn.Module, optimizer: LearnedOptimizer, start: int = 0, stop: int = STEPS, split: bool = True) -> None:
    """Data parallel where `split`: every rank has its own rows of a minibatch, and its own loss."""
    for x, y in minibatches(start, stop):
        if split:
            rows = torch.arange(BATCH).chunk(dist.get_world_size())[dist.get_rank()]
            x, y = x[rows], y[rows]
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def length(options: dict[str, object]) -> int:
    """Steps of a run with such options of the optimizer."""
    return GUARDED_STEPS if "safeguard" in options else STEPS


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat(model: nn.Module) -> Tensor:
    return torch.cat([whole(p.detach()).reshape(-1) for p in model.parameters()])


def compare(model: nn.Module, alone: nn.Module, make: Callable[[], nn.Module] = network) -> dict[str, float]:
    """Between ranks: 0 if equal bit for bit. To the single process, and from the start: largest differences."""
    mine = flat(model)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    return {
        "between ranks": max(float((mine - other).abs().max()) for other in others),
        "to one process": float((mine - flat(alone)).abs().max()),
        "travelled": float((mine - flat(make())).abs().max()),
    }


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fully_sharded(seed: int = 0) -> nn.Module:
    return shard(network(seed))


def hybrid() -> nn.Module:
    """Replicated over one dimension of the mesh, sharded over the other."""
    return shard(
        network(), init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "parts"))
    )


class ColumnsAndCopies(nn.Module):
    """Tensors split along columns, and replicated ones: every rank computes the whole minibatch."""

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.parts = nn.ParameterList()
        for p in network().parameters():
            placement = Shard(1) if p.dim() == 2 else Replicate()
            self.parts.append(nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))

    def forward(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2, w3, b3 = (p.full_tensor() for p in self.parts)
        return (x @ w1.T + b1).tanh().matmul(w2.T).add(b2).tanh().matmul(w3.T).add(b3)


@functools.cache
def in_one_process(**options: object) -> tuple[nn.Module, LearnedOptimizer]:
    """What scenarios of the same options are held against."""
    model = network()
    optimizer = LearnedOptimizer(model.parameters(), **options)
    train(model, optimizer, stop=length(options), split=False)
    return model, optimizer


def parallel(build: Callable[[], nn.Module], split: bool = True, **options: object) -> dict[str, float]:
    """A distributed run against the same run in one process."""
    model = build()
    optimizer = LearnedOptimizer(model.parameters(), **{"rule": RULE} | options)
    train(model, optimizer, stop=length(options), split=split)
    alone, reference = in_one_process(**{"rule": RULE} | options | {"process_group": "self"})
    health = optimizer.health()
    assert health == reference.health(), (health, reference.health())
    figures = compare(model, alone)
    if "averaging" in options:
        with optimizer.averaged(), reference.averaged():
            means = compare(model, alone)
        figures |= {key: max(figures[key], means[key]) for key in ("between ranks", "to one process")}
    if "safeguard" not in options:  # which keeps no window while Adam acts
        window, expected = window_of(optimizer), window_of(reference)
        figures["of the window"] = float((window - expected).abs().max() / expected.abs().max())
    return figures


def window_of(optimizer: LearnedOptimizer) -> Tensor:
    """The Gram matrix: tensors that are counted twice, or not at all, show in it."""
    return optimizer.state[optimizer.param_groups[0]["params"][0]]["context_gram"]


def save_half_way(folder: Path, **options: object) -> dict[str, float]:
    """Train, write a checkpoint in the middle, and go on to the end."""
    model = fully_sharded()
    optimizer = LearnedOptimizer(model.parameters(), **{"rule": RULE} | options)
    end = max(length(options), RESUMED_STEPS)
    half = end // 2
    train(model, optimizer, 0, half)
    if "safeguard" in options:
        assert optimizer.health()["trials"] == 1
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    train(model, optimizer, half, end)
    if dist.get_rank() == 0:
        torch.save(flat(model), folder / "end.pt")
    else:
        flat(model)
    return {}


def resume(folder: Path, **options: object) -> dict[str, float]:
    """With another number of ranks, from another start."""
    model = fully_sharded(seed=5)
    optimizer = LearnedOptimizer(model.parameters(), **{"rule": RULE} | options)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    end = max(length(options), RESUMED_STEPS)
    half = end // 2
    assert optimizer.health()["steps"] == half
    train(model, optimizer, half, end)
    return {"to the uninterrupted run": float((flat(model) - torch.load(folder / "end.pt")).abs().max())}


def a_bad_batch_on_one_rank() -> dict[str, float]:
    """All ranks skip the step together, and go on equal."""
    model = DistributedDataParallel(network())
    optimizer = LearnedOptimizer(model.parameters(), rule=RULE, process_group=dist.group.WORLD)
    train(model, optimizer, 0, 5)
    before = flat(model)
    for gradient_too in (False, True):
        optimizer.zero_grad()
        loss = model(minibatches(0, 1)[0][0]).square().mean()
        (loss * float("nan") if gradient_too and dist.get_rank() == 0 else loss).backward()
        optimizer.step(loss=float("nan") if dist.get_rank() == 0 else loss)
        assert torch.equal(flat(model), before)
    assert optimizer.health() == {
        "steps": 5, "nonfinite_gradient": 1, "nonfinite_loss": 2, "nonfinite_parameter": 0, "zero_gradient": 0,
    }  # fmt: skip
    train(model, optimizer, 5, 10)
    return compare(model, model)


def with_ddp(**options: object) -> dict[str, float]:
    return parallel(lambda: DistributedDataParallel(network()), process_group=dist.group.WORLD, **options)


def accelerated(build: Callable[[], nn.Module], split: bool = True) -> dict[str, float]:
    """Koopman acceleration on one minibatch, whose mean loss all ranks know; half-way another takes the state over."""

    def begin(model: nn.Module) -> KoopmanAccelerated:
        return KoopmanAccelerated(torch.optim.SGD(model.parameters(), 0.1), window=4, every=8, stride=1)

    def descend(model: nn.Module, split: bool) -> KoopmanAccelerated:
        optimizer = begin(model)
        ((x, y),) = minibatches(0, 1)
        rows = torch.arange(BATCH).chunk(dist.get_world_size())[dist.get_rank()] if split else torch.arange(BATCH)
        for step in range(2 * STEPS):
            if step == STEPS:
                saved, optimizer = optimizer.state_dict(), begin(model)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            loss = (model(x[rows]) - y[rows]).square().mean()
            loss.backward()
            mean = loss.detach().clone()
            if split:
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            optimizer.step(loss=mean)
        optimizer.settle()
        return optimizer

    model, alone = build(), network()
    optimizer, reference = descend(model, split), descend(alone, split=False)
    assert optimizer.health() == reference.health()
    assert optimizer.health()["jumps"] > 0
    figures = compare(model, alone)
    with optimizer.averaged(), reference.averaged():
        means = compare(model, alone)
    return {key: max(figures[key], means[key]) for key in figures}


def make_scenarios(folder: Path) -> dict[str, Callable[[], dict[str, float]]]:
    exact = folder / f"exact-{dist.get_rank()}.safetensors"
    save_rule(exact, make_rule(RULES["dmd-exact-normalized"]))
    kae = folder / f"kae-{dist.get_rank()}.safetensors"
    save_rule(kae, make_rule(RULES["kae-sketch-normalized"]))
    adam = folder / f"directional-{dist.get_rank()}.safetensors"
    save_rule(adam, make_rule(replace(RULES["directional-dmd"], rank=0)))
    tiers = folder / f"hierarchical-{dist.get_rank()}.safetensors"
    save_rule(tiers, make_rule(RULES["dmd-sketch-hierarchical"]))
    fall: dict[str, object] = {
        "rule": adam,
        "lr": 2.0,
        "total_steps": 2 * STEPS,
        "averaging": True,
        "weight_decay": 0.1,
    }
    return {
        "DDP": with_ddp,
        "DDP, safeguard": lambda: with_ddp(safeguard="adam"),
        "FSDP2": lambda: parallel(fully_sharded),
        "FSDP2, safeguard": lambda: parallel(fully_sharded, safeguard="adam", weight_decay=0.01),
        "FSDP2, exact window": lambda: parallel(fully_sharded, rule=exact, lr=0.4),
        "FSDP2, KAE": lambda: parallel(fully_sharded, rule=kae, lr=0.4),
        "FSDP2 over copies": lambda: parallel(hybrid),
        "FSDP2, directional": lambda: parallel(fully_sharded, **fall),
        "FSDP2 over copies, directional": lambda: parallel(hybrid, **fall),
        "FSDP2, hierarchical": lambda: parallel(fully_sharded, rule=tiers, lr=10.0),
        "columns and copies": lambda: parallel(ColumnsAndCopies, split=False),
        "columns and copies, directional": lambda: parallel(ColumnsAndCopies, split=False, **fall),
        "FSDP2, Koopman": lambda: accelerated(fully_sharded),
        "FSDP2 over copies, Koopman": lambda: accelerated(hybrid),
        "columns and copies, Koopman": lambda: accelerated(ColumnsAndCopies, split=False),
        "FSDP2, bfloat16 state": lambda: parallel(fully_sharded, state_dtype=torch.bfloat16),
        "columns and copies, bfloat16 state": lambda: parallel(
            ColumnsAndCopies, split=False, state_dtype=torch.bfloat16
        ),
        "a bad batch on one rank": a_bad_batch_on_one_rank,
        "save": lambda: save_half_way(folder / "plain"),
        "resume": lambda: resume(folder / "plain"),
        "save in bfloat16": lambda: save_half_way(folder / "narrow", state_dtype=torch.bfloat16),
        "resume in bfloat16": lambda: resume(folder / "narrow", state_dtype=torch.bfloat16),
        "save a directional run": lambda: save_half_way(folder / "directional", rule="directional", averaging=True),
        "resume a directional run": lambda: resume(folder / "directional", rule="directional", averaging=True),
        "save in a trial": lambda: save_half_way(folder / "trial", safeguard="adam"),
        "resume in a trial": lambda: resume(folder / "trial", safeguard="adam"),
    }
