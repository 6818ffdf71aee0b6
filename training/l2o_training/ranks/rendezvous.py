"""How ranks meet that torchrun has started, or somebody by hand with the same environment variables."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from l2o_training.errors import Quiet, RunError
from l2o_training.ranks.group import ALONE, START_TIMEOUT, TIMEOUT, Ranks, first_line, name_ranks, span

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether this process was started as a rank: by torchrun, or with its environment variables."""
    return all(name in os.environ for name in LAUNCHED)


@contextmanager
def join(timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """Meet the other ranks, if this process was started as one of several.

    Args:
        timeout: seconds that ranks wait for each other once they have met.

    Raises:
        RunError: they do not meet within START_TIMEOUT seconds.
    """
    if not launched():
        yield ALONE
        return
    ranks = _meet(timeout)
    try:
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        raise
    ranks.leave()


def _meet(timeout: float) -> Ranks:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(rendezvous("env://", timeout=span(START_TIMEOUT)))
    except (RuntimeError, ValueError) as error:
        message = f"rank {os.environ['RANK']}: no rendezvous at {where} within {START_TIMEOUT:g} s"
        # One line per machine: no rank can know of the others.
        raise (RunError if os.environ.get("LOCAL_RANK", "0") == "0" else Quiet)(
            f"{message} ({first_line(error)}): check MASTER_ADDR, MASTER_PORT and the network"
        ) from None
    # Launchers keep their store when they start ranks again: what the ranks before have left in it is not to be read.
    ranks = Ranks(store, rank, size, timeout)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    try:
        ranks.store = PrefixStore(_generation(store, rank, size), store)
    except RuntimeError as error:
        raise Quiet(f"rank 0 did not answer: {first_line(error)}") from None
    ranks.restarted = "restarted" in ranks.exchange("restarted" if restarted else "", START_TIMEOUT)
    return ranks


def _generation(store: Store, rank: int, size: int) -> str:
    """A name for this start of the ranks, which rank 0 chooses.

    Every rank asks for it under a name of its own that was never used before, so that no answer is an old one.
    """
    token, end = uuid.uuid4().hex, time.monotonic() + START_TIMEOUT
    store.set(f"hello/{rank}", token)
    if rank:
        name = store.get(f"welcome/{token}").decode()
        store.set(f"ready/{name}/{rank}", "")
        return name
    others, welcomed = range(1, size), set()
    while missing := [other for other in others if not store.check([f"ready/{token}/{other}"])]:
        for other in missing:
            if store.check([f"hello/{other}"]):
                asked = store.get(f"hello/{other}").decode()
                if asked not in welcomed:
                    welcomed.add(asked)
                    store.set(f"welcome/{asked}", token)
        if time.monotonic() > end:
            raise RunError(
                f"{name_ranks(missing)} gave no answer within {START_TIMEOUT:g} s: hangs, or was not started"
            )
        time.sleep(0.01)
    return token
