"""Sharded parameters (DTensor: FSDP2, tensor parallelism) and data-parallel losses.

`observe` is additive and `update` coordinatewise, so a rank works on its own shards and the ranks exchange
sums only: statistics over the ranks among which a tensor is split, the loss over all that step together.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Groups = tuple[Any, ...]
"""Process groups over which a tensor is split; none for a plain or a replicated one."""


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; its module, which takes a while to import, is only looked at if it is loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """This rank's part of a tensor, sharing its memory; a plain tensor is its own part.

    Args:
        tensor: plain or DTensor.
        like: where given, `tensor` is first placed as this DTensor is (gradients may come as partial sums).
    """
    if not is_dtensor(tensor):
        return tensor
    if like is not None and tensor.placements != like.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def zeros_beside(param: Tensor, trailing: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of shape (*param.shape, *trailing) on the same device, placed over the ranks as `param` is."""
    shape = (*param.shape, *trailing)
    if not is_dtensor(param):
        return torch.zeros(shape, dtype=dtype, device=param.device)
    from torch.distributed.tensor import zeros

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return zeros(shape, dtype=dtype, device_mesh=mesh, placements=placements)


def shard_groups(param: Tensor) -> Groups:
    """The process groups to sum over so that every coordinate of a tensor counts once."""
    if not is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim, p in enumerate(placements) if not p.is_replicate())


def first_index(param: Tensor) -> int | Tensor:
    """Where this rank's part starts in the flat tensor, as an offset to be added to 0, 1, 2, …

    Returns:
        0 for a plain tensor; a number where rows are split; else, for splits along other dimensions,
        a tensor (n,): global index minus local index of each of the part's n coordinates.
    """
    if not is_dtensor(param):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    sizes, offsets = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    strides = [param.shape[dim + 1 :].numel() for dim in range(param.dim())]
    start = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    if tuple(sizes[1:]) == tuple(param.shape[1:]):
        return start
    index = torch.full((), start, device=param.device)
    for size, stride in zip(sizes, strides, strict=True):
        index = index.unsqueeze(-1) + torch.arange(size, device=param.device) * stride
    return index.flatten() - torch.arange(index.numel(), device=param.device)


def sum_over(groups: Groups, tensor: Tensor) -> Tensor:
    """The sum of a tensor over process groups, one after the other (the dimensions of a mesh)."""
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


def mean_loss(loss: Tensor, known: bool, group: Any = None) -> Tensor:
    """The loss of the whole batch: the mean over the ranks that have one, 0 if none has.

    Under data parallelism gradients agree between ranks, losses do not; ranks whose contexts saw different
    losses would drift apart.

    Args:
        loss: () this rank's.
        known: this rank has one.
        group: the ranks that step together; all by default.

    Returns:
        () float32, the same on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return loss
    pair = torch.stack([loss.double() * known, torch.full_like(loss, known, dtype=torch.float64)])
    dist.all_reduce(pair, group=group)
    return (pair[0] / pair[1].clamp_min(1)).float()
