"""Memory: what is free, what an optimizer keeps, and what a step takes for a moment."""

import ctypes
import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MARK = "l2o second call"
"""Event between two profiled calls."""

MARGIN = 0.9
"""Part of the free memory that may be planned with."""


def available_bytes(device: torch.device) -> int:
    """Memory that can be planned with: free, or easily freed, within the limit of the control group if there is one."""
    if device.type == "cuda":
        return int(MARGIN * torch.cuda.mem_get_info(device)[0])
    return int(MARGIN * min(_system_free(), _group_free()))


def _system_free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    names = ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
    pages = next((os.sysconf(name) for name in names if name in getattr(os, "sysconf_names", {})), 2**40)
    return pages * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else pages


def _group_free() -> int:
    """What is left under the limits of the control groups that this process is in (version 2, or 1)."""
    free = 2**62
    for folder in _groups():
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / used).read_text()) - int(fields[cache])  # cached files make room when asked to
                free = min(free, max(int((folder / limit).read_text()) - taken, 0))
            except (OSError, ValueError, KeyError):  # no such file, or no limit ("max")
                continue
    return free


def _groups() -> list[Path]:
    """Folders of this process's control groups, and of those around them."""
    folders = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup") / controllers
            inner = root / name.lstrip("/")
            folders += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]
    return folders


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state; tensors that share memory count once."""
    storages = {}
    for tensor in _tensors(list(optimizer.state.values())):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for child in children for tensor in _tensors(child)]


def allocated_peak(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `call` holds at once beyond what was allocated before, as torch's allocator counts them.

    On the CPU the profiler reports every allocation and release, and the peak is that of their running sum. It does not
    report the release of blocks from before its time, such as a state that a step replaces; so the first of two calls
    is only there for the second to have none. Buffers that kernels take from elsewhere are not seen; see
    `resident_peak`.

    Args:
        call: called once on CUDA, twice on the CPU.
        device: whose memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
        with torch.profiler.record_function(MARK):
            pass
        call()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    second = next(event.start_ns() for event in events if event.name() == MARK)
    changes: list[tuple[int, int]] = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(itertools.accumulate((size for time, size in changes if time >= second), initial=0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what native code writes to standard error: the profiler logs every start and stop there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def resident_peak(call: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at its highest during `call`, whoever allocates; None where unknown.

    Free memory is given back to the system first, or `call` could take from it unseen. Unlike `allocated_peak` this
    sees buffers that do not come from torch, but also what the C library holds back of freed blocks, and it is coarse:
    the system counts pages in batches.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError, KeyError):
        return None
    call()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[key].split()[0]) * 1024
