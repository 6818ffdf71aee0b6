"""Who communicates, when, and with whom: what one rank does in tests/runtime/test_distributed.py.

Every scenario ends on all ranks, within the timeout; the numbers of a script's own collectives are right.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_worker import STEPS, compare, flat, minibatches, network, shard, train
from rules import RULES, make_rule
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from l2o_runtime import LearnedOptimizer, save_rule

Figures = dict[str, float]


@contextmanager
def counted() -> Iterator[list[Tensor]]:
    """The tensors that Python code sums over ranks meanwhile."""
    summed: list[Tensor] = []
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: object, **kwargs: object) -> object:
        summed.append(tensor)
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield summed
    finally:
        dist.all_reduce = all_reduce


def check_script() -> None:
    """The script's own collective, of two float64 numbers as are in ours, is paired with itself."""
    world = dist.get_world_size()
    counts = torch.tensor([7.0, 10.0 + dist.get_rank()], dtype=torch.float64)
    dist.all_reduce(counts)
    assert counts.tolist() == [7.0 * world, 10.0 * world + sum(range(world))], counts.tolist()


def backward(model: nn.Module, seed: int) -> Tensor:
    """The loss of a minibatch of this rank's own, with its gradients."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * seed + dist.get_rank()))
    model.zero_grad()
    loss: Tensor = (model(x) - x[:, :1].sin()).square().mean()
    loss.backward()
    return loss.detach()


def frozen_stage(rule: str) -> Figures:
    """The last rank has no gradient: it takes part, with no loss, and the others see the mean of theirs."""
    frozen = dist.get_rank() == dist.get_world_size() - 1
    model, twin = network().requires_grad_(not frozen), network()
    optimizer = LearnedOptimizer(model.parameters(), rule=rule, process_group=dist.group.WORLD)
    reference = LearnedOptimizer(twin.parameters(), rule=rule, process_group="self")
    for seed in range(5):
        loss = None if frozen else backward(model, seed)
        with counted() as summed:
            optimizer.step(loss=loss)
        assert len(summed) == 1, len(summed)
        known = torch.stack([torch.tensor(0.0) if loss is None else loss, torch.tensor(float(not frozen))]).double()
        dist.all_reduce(known)
        if not frozen:
            backward(twin, seed)
            reference.step(loss=(known[0] / known[1]).float())
    assert torch.equal(flat(model), flat(twin))
    assert optimizer.health()["steps"] == (0 if frozen else 5)
    return {}


def frozen_stage_alone() -> Figures:
    """The script of a pipeline that names no group: nothing is exchanged, so nobody waits."""
    frozen = dist.get_rank() == 1
    model = network().requires_grad_(not frozen)
    optimizer = LearnedOptimizer(model.parameters(), "scale")
    with counted() as summed:
        for seed in range(3):
            if not frozen:
                backward(model, seed)
            optimizer.step()
    assert not summed
    check_script()
    return {}


def no_parameters() -> Figures:
    """Some optimizers are built on all ranks, also on those to which no parameter has fallen."""
    empty = dist.get_rank() == 0
    model = network()
    params = [{"params": [] if empty else list(model.parameters())}]
    for safeguard in (None, "adam"):
        optimizer = LearnedOptimizer(params, "scale", process_group=dist.group.WORLD, safeguard=safeguard)
        for seed in range(3):
            loss = backward(model, seed)
            with counted() as summed:
                optimizer.step(loss=loss)
            assert len(summed) == 1, len(summed)
        assert optimizer.health()["steps"] == (0 if empty else 3)
    check_script()
    return {}


def one_trainer() -> Figures:
    """Rank 0 trains something by itself; it is told once that its rule does not see the loss, and what to do."""
    for group, told, seen in ((None, 1, 0), ("self", 0, 3)):
        with warnings.catch_warnings(record=True) as caught, counted() as summed:
            warnings.simplefilter("always")
            if dist.get_rank() == 0:
                model = network()
                optimizer = LearnedOptimizer(model.parameters(), "scale", process_group=group)
                for seed in range(3):
                    loss = backward(model, seed)
                    optimizer.step(loss=loss)
                (first, *_) = model.parameters()
                assert optimizer.state[first]["context_losses_seen"] == seen
                messages = [str(warning.message) for warning in caught]
                assert len(messages) == told, messages
                assert all("group.WORLD" in text and "process_group='self'" in text for text in messages)
        assert not summed
        check_script()
    return {}


def unequal_steps() -> Figures:
    """Several optimizers on every rank, each with steps of its own number; two ranks share one, in their group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 1])
    models = [network(seed) for seed in range(3)]
    first = LearnedOptimizer(models[0].parameters(), "scale")
    second = LearnedOptimizer(models[1].parameters(), "scale", process_group="self", safeguard="adam")
    with counted() as summed:
        for seed in range(rank + 1):
            backward(models[0], seed)
            first.step()
        for seed in range(2 * (world - rank)):
            second.step(loss=backward(models[1], seed))
    assert not summed
    check_script()
    if rank < 2:
        shared = LearnedOptimizer(models[2].parameters(), "scale", process_group=pair)
        with counted() as summed:
            for seed in range(3):
                shared.step(loss=backward(models[2], seed))
        assert len(summed) == 3
    else:
        with pytest.raises(ValueError, match="this rank is not in that group"):
            LearnedOptimizer(models[2].parameters(), "scale", process_group=pair)
    check_script()
    assert first.health()["steps"] == rank + 1
    return {}


def zero_redundancy() -> Figures:
    """Every rank steps what has fallen to it: unequally many tensors, or none; afterwards all have all of them."""
    figures = {}
    start = flat(network())
    for name, group in {"by itself": "self", "together": dist.group.WORLD, "unsaid": None}.items():
        for few in (False, True):
            model = network()
            chosen = [model[0].weight] if few else list(model.parameters())
            make = functools.partial(LearnedOptimizer, rule="scale", process_group=group)
            optimizer = ZeroRedundancyOptimizer(chosen, optimizer_class=make)
            parallel = DistributedDataParallel(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if group is None else "error")
                for seed in range(10):
                    optimizer.step(loss=backward(parallel, seed))
            optimizer.consolidate_state_dict(to=0)
            sizes = [0] * dist.get_world_size()
            dist.all_gather_object(sizes, sum(len(group["params"]) for group in optimizer.optim.param_groups))
            assert sum(sizes) == len(chosen)
            assert min(sizes) < max(sizes) or not few
            figure = compare(model, model)
            assert figure["between ranks"] == 0
            figures[f"{name}, {'one tensor' if few else 'all'}"] = float((flat(model) - start).abs().max())
    return figures


def ddp_alone(rule: str) -> Figures:
    """DDP without a word about groups: no collective of ours, ranks stay equal; as one process that passes no loss."""
    model = DistributedDataParallel(network())
    optimizer = LearnedOptimizer(model.parameters(), rule=rule)
    with warnings.catch_warnings(record=True) as caught, counted() as summed:
        warnings.simplefilter("always")
        train(model, optimizer)
    told = ["does not see the loss" in str(warning.message) for warning in caught]
    assert sum(told) == 1, told
    assert not summed
    alone = network()
    reference = LearnedOptimizer(alone.parameters(), rule=rule, process_group="self")
    for x, y in minibatches(0, STEPS):
        reference.zero_grad()
        (alone(x) - y).square().mean().backward()
        reference.step()
    return compare(model, alone)


def blind_rule() -> Figures:
    """A rule that does not look at losses exchanges none, and says nothing, whether it is given a group or not."""
    for group in (None, dist.group.WORLD):
        model = DistributedDataParallel(network())
        optimizer = LearnedOptimizer(model.parameters(), rule="l2o", process_group=group)
        with warnings.catch_warnings(), counted() as summed:
            warnings.simplefilter("error")
            train(model, optimizer, stop=10)
        assert not summed
    return compare(model, model)


def undecided_safeguard() -> Figures:
    """A safeguard has to know whose losses to compare; the message says what the choices are."""
    model = DistributedDataParallel(network())
    optimizer = LearnedOptimizer(model.parameters(), "scale", safeguard="adam")
    with pytest.raises(ValueError, match=r"process_group=torch\.distributed\.group\.WORLD .* process_group='self'"):
        optimizer.step(loss=backward(model, 0))
    assert torch.equal(flat(model), flat(network()))
    return {}


def fsdp1() -> Figures:
    """Of its parameters a rule sees pieces: it says what to use instead."""
    for original in (True, False):
        model = FullyShardedDataParallel(network(), use_orig_params=original, device_id=torch.device("cpu"))
        optimizer = LearnedOptimizer(model.parameters(), "scale")
        loss = model(torch.randn(8, 6)).square().mean()
        loss.backward()
        with pytest.raises(RuntimeError, match=r"torch\.distributed\.fsdp\.fully_shard"):
            optimizer.step(loss=loss)
    return {}


class Heads(nn.Module):
    """A frozen layer, and two heads of which every minibatch uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.body = nn.Linear(6, 7).requires_grad_(False), nn.Linear(7, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1)])

    def forward(self, x: Tensor, head: int) -> Tensor:
        y: Tensor = self.heads[head](self.body(self.frozen(x).tanh()).tanh())
        return y


def unused_layers(rule: str) -> Figures:
    """FSDP2: what is frozen, or unused in a step, is left alone as in one process."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model, alone = Heads(), Heads()
    for layer in (model.frozen, model.body, *model.heads):
        shard(nn.Sequential(layer))
    optimizer = LearnedOptimizer(model.parameters(), rule=rule)
    reference = LearnedOptimizer(alone.parameters(), rule=rule, process_group="self")
    for step, (x, y) in enumerate(minibatches(0, 40)):
        rows = torch.arange(len(x)).chunk(world)[rank]
        for net, opt, part in ((model, optimizer, rows), (alone, reference, slice(None))):
            opt.zero_grad()
            loss = (net(x[part], step // 3 % 2) - y[part]).square().mean()
            loss.backward()
            opt.step(loss=loss)
    assert optimizer.health() == reference.health()
    assert model.frozen.weight not in optimizer.state or not optimizer.state[model.frozen.weight].get("step")
    return compare(model, alone, Heads)


def sharded(value: Tensor, mesh: DeviceMesh, *placements: object) -> DTensor:
    return distribute_tensor(value, mesh, placements)


def unused_on_one_rank(rule: str) -> Figures:
    """Rank 1 has no gradient of a split tensor now and then, or none at all; copies and counters stay equal."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    rng = torch.Generator().manual_seed(0)
    split = [nn.Parameter(sharded(torch.randn(7, 3, generator=rng), mesh, Shard(dim))) for dim in (0, 1)]
    copy = nn.Parameter(sharded(torch.randn(5, generator=rng), mesh, Replicate()))
    optimizer = LearnedOptimizer([*split, copy], rule=rule)
    for step in range(24):
        for param, phase in ((split[0], 0), (split[1], 1)):
            grad = sharded(torch.randn(7, 3, generator=rng), mesh, *param.placements)
            param.grad = None if rank == 1 and step // 4 % 3 in (phase, 2) else grad
        grad = sharded(torch.randn(5, generator=rng), mesh, Replicate())
        copy.grad = None if step % 8 == 7 else grad
        before = split[0].to_local().clone()
        optimizer.step(loss=1.0 / (step + 1) + rank)
        assert split[0].grad is not None or torch.equal(split[0].to_local(), before)
    mine = copy.to_local().detach()
    overall = [v for k, v in optimizer.state[split[0]].items() if not isinstance(v, DTensor) and k != "step"]
    own = [v for k, v in optimizer.state[split[1]].items() if k.startswith("tensor_")]
    state = torch.cat([mine.double(), *(v.double().reshape(-1) for v in overall + own)])
    others = [torch.empty_like(state) for _ in range(world)]
    dist.all_gather(others, state)
    assert optimizer.health()["steps"] == 24
    return {"between ranks": max(float((state - other).abs().max()) for other in others)}


def several_meshes() -> Figures:
    """Losses are averaged over the ranks of the meshes, not of the world: of rows, of all, and of both together."""
    rank, world = dist.get_rank(), dist.get_world_size()
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("rows", "columns"))
    value = torch.arange(12.0).reshape(4, 3)
    kinds = {
        "row": lambda: [sharded(value, grid["columns"], Shard(0))],
        "grid": lambda: [sharded(value, grid, Replicate(), Shard(0))],
        "both": lambda: [sharded(value, grid["columns"], Shard(0)), sharded(value, grid, Shard(0), Shard(1))],
    }
    row = [rank // 2 * 2, rank // 2 * 2 + 1]
    expected = {"row": sum(row) / 2, "grid": sum(range(world)) / world, "both": sum(range(world)) / world}
    optimizers = {}
    for name, make in kinds.items():
        params = [nn.Parameter(tensor) for tensor in make()]
        optimizers[name] = LearnedOptimizer(params, rule="normalized-dmd")
        for param in params:
            param.grad = torch.ones_like(param)
    for _ in range(3):
        for name, optimizer in optimizers.items():
            optimizer.step(loss=float(rank))
            first = optimizer.param_groups[0]["params"][0]
            assert optimizer.state[first]["context_losses"][-1] == expected[name], name
    check_script()
    return {}


def a_mesh_of_some() -> Figures:
    """Ranks outside of a mesh hold nothing of its tensors: they neither wait nor are waited for."""
    mesh = DeviceMesh("cpu", [0, 1])
    param = nn.Parameter(sharded(torch.arange(6.0), mesh, Shard(0)))
    optimizer = LearnedOptimizer([param], "scale")
    for _ in range(3):
        if dist.get_rank() < 2:
            param.grad = torch.ones_like(param)
        optimizer.step(loss=1.0)
    check_script()
    return {}


def saved(name: str, folder: Path) -> str:
    """A rule of the table, in a file of this rank."""
    path = folder / f"{name}-{dist.get_rank()}.safetensors"
    save_rule(path, make_rule(RULES[name]))
    return str(path)


def make_scenarios(folder: Path) -> dict[str, Callable[[], Figures]]:
    return {
        "frozen stage": lambda: frozen_stage("scale"),
        "frozen stage, window": lambda: frozen_stage("normalized-dmd"),
        "frozen stage, no group": frozen_stage_alone,
        "no parameters": no_parameters,
        "one trainer": one_trainer,
        "unequal steps": unequal_steps,
        "ZeroRedundancyOptimizer": zero_redundancy,
        "DDP, no group": lambda: ddp_alone("scale"),
        "DDP, no group, window": lambda: ddp_alone("normalized-dmd"),
        "blind rule": blind_rule,
        "undecided safeguard": undecided_safeguard,
        "FSDP1": fsdp1,
        "FSDP2, unused layers": lambda: unused_layers("scale"),
        "FSDP2, unused layers, window": lambda: unused_layers("normalized-dmd"),
        "FSDP2, unused layers, directional": lambda: unused_layers(saved("directional-adam", folder)),
        "FSDP2, unused layers, hierarchical": lambda: unused_layers(saved("none-hierarchical", folder)),
        "unused on one rank": lambda: unused_on_one_rank("scale"),
        "unused on one rank, directional": lambda: unused_on_one_rank("directional"),
        "unused on one rank, hierarchical": lambda: unused_on_one_rank(saved("none-hierarchical", folder)),
        "unused on one rank, window": lambda: unused_on_one_rank("normalized-dmd"),
        "several meshes": several_meshes,
        "a mesh of some": a_mesh_of_some,
    }
