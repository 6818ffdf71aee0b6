"""Sharded parameters (DTensor: FSDP2, tensor parallelism) and data-parallel losses.

`observe` is additive and `update` coordinatewise, so a rank works on its own shards and the ranks exchange
sums only: statistics over the ranks among which a tensor is split, the loss over all that step together.

Who steps together is known of the ranks of a DTensor's mesh, and of a process group that the script names. Of plain
tensors it is not: the ranks may be DDP's, or each may train something of its own. Then nothing is exchanged.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Groups = tuple[Any, ...]
"""Process groups over which a tensor is split; none for a plain or a replicated one."""

ALONE = "self"
"""In place of a process group: this rank steps by itself."""


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


def zeros_beside(param: Tensor, trailing: tuple[int, ...], dtype: torch.dtype, leading: tuple[int, ...] = ()) -> Tensor:
    """Zeros of shape (*leading, *param.shape, *trailing) on the same device, placed over the ranks as `param` is."""
    shape = (*leading, *param.shape, *trailing)
    if not is_dtensor(param):
        return torch.zeros(shape, dtype=dtype, device=param.device)
    from torch.distributed.tensor import Shard, zeros

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if leading:
        placements = [Shard(p.dim + len(leading)) if p.is_shard() else p for p in placements]
    return zeros(shape, dtype=dtype, device_mesh=mesh, placements=placements)


def shard_groups(param: Tensor) -> Groups:
    """The process groups to sum over so that every coordinate of a tensor counts once."""
    if not is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return _mesh_groups(mesh, [dim for dim, p in enumerate(placements) if not p.is_replicate()])


def _mesh_groups(mesh: Any, dims: Iterable[int]) -> Groups:
    """The process groups of dimensions of a mesh; none where this rank has no part in it, or is the only one."""
    if mesh.get_coordinate() is None:
        return ()
    return tuple(mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1)


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


def check_process_group(group: Any) -> None:
    """Is a `process_group` one that this rank is in, "self", or None?

    Raises:
        ValueError: it is not.
    """
    if group is None or group == ALONE or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return
    if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"process_group: this rank is not in that group; {ALONE!r} lets it step by itself")
    raise ValueError(f"process_group: expected a torch.distributed.ProcessGroup, {ALONE!r} or None, got {group!r}")


def loss_groups(params: Iterable[Tensor], group: Any) -> Groups | None:
    """The process groups over which losses are averaged, one after the other.

    Args:
        params: all of an optimizer's.
        group: what it was given as `process_group`.

    Returns:
        The given group, or those of all dimensions of the parameters' meshes; () where this rank is alone; None where
        it is not known with whom it steps: the parameters are plain, and there are other ranks.

    Raises:
        RuntimeError: the parameters are FSDP1's.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ()
    params = list(params)
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise RuntimeError(
            "parameters of FullyShardedDataParallel (FSDP1) are pieces whose shapes and sums a rule cannot know: "
            "shard with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    if group is not None:
        return () if group == ALONE or dist.get_world_size(group) == 1 else (group,)
    meshes = dict.fromkeys(param.device_mesh for param in params if is_dtensor(param))  # type: ignore[attr-defined]
    if not meshes:
        return None
    # Dimension by dimension, in the order of the parameters, which all ranks have in common: means of equally many
    # ranks' means. Groups of several meshes may be of the same ranks.
    found = [group for mesh in meshes for group in _mesh_groups(mesh, range(mesh.ndim))]
    return tuple({tuple(dist.get_process_group_ranks(group)): group for group in found}.values())


def meeting_place(params: Iterable[Tensor], groups: Groups) -> torch.device:
    """Where a rank's loss is exchanged: beside its first parameter, or where its group works if it has none."""
    for param in params:
        return param.device
    if not groups or dist.get_backend(groups[0]) == "gloo":
        return torch.device("cpu")
    accelerator: torch.device | None = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def mean_loss(loss: Tensor, known: bool, groups: Groups) -> Tensor:
    """The loss of the whole batch: the mean over the ranks that have one, 0 if none has.

    Under data parallelism gradients agree between ranks, losses do not; ranks whose contexts saw different
    losses would drift apart.

    Args:
        loss: () this rank's.
        known: this rank has one.
        groups: from `loss_groups`; all of their ranks have to call.

    Returns:
        () float32, the same on every rank.
    """
    if not groups:
        return loss
    pair = torch.stack([loss.double() * known, torch.full_like(loss, known, dtype=torch.float64)])
    sum_over(groups, pair)
    return (pair[0] / pair[1].clamp_min(1)).float()
