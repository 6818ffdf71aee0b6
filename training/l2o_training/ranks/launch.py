"""Ranks on one machine, through torchrun's own launcher."""

import logging
import os
import signal
import sys
import uuid

from l2o_training.errors import Interrupted, Quiet, RunError


def launch(arguments: list[str], count: int, max_restarts: int) -> None:
    """Run `python arguments` as so many ranks, as `torchrun --standalone --nproc-per-node` does; wait for their end.

    Args:
        arguments: of python.
        count: number of ranks.
        max_restarts: how often all of them are started again after one died.

    Raises:
        RunError: a rank was killed or broke down; Quiet: a rank has said itself why it failed, or what an interrupted
            run keeps.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # They log tables of what is told below, each logger at a level of its own.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (2, 130):
            raise (Quiet if failure.exitcode == 2 else Interrupted) from None
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise RunError(f"rank {rank} was killed ({name}): add --resume to continue, or --max-restarts") from None
        raise RunError(f"rank {rank} broke down with exit code {failure.exitcode}") from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise Interrupted from None
        raise RunError(f"stopped by {error.sigval.name}") from None
