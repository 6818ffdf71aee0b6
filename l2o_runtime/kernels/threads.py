"""Threads that all CPU kernels share."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_pool: ThreadPoolExecutor | None = None


def share(work: Callable[[T, int], None], items: Sequence[T]) -> None:
    """Deal items out to as many threads as torch uses.

    Args:
        work: takes an item and the number of its thread, which has scratch of its own; nothing is differentiated.
        items: all of them are worked on, in no order that is known.
    """
    left = iter(items)

    def some(thread: int) -> None:
        with torch.no_grad():  # which every thread says for itself
            for item in left:  # taking the next one is atomic
                work(item, thread)

    helpers = range(1, min(torch.get_num_threads(), len(items)))
    futures = [_threads().submit(some, thread) for thread in helpers]
    try:
        some(0)
    finally:
        for future in futures:
            future.result()


def _threads() -> ThreadPoolExecutor:
    """The pool, started when it is needed."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count() or 1, "l2o")
    return _pool


def _forget_threads() -> None:
    """Threads do not survive a fork."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
