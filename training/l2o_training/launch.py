"""Ranks on one machine, through torchrun's own launcher."""

import logging
import os
import signal
import sys
import uuid

from l2o_training.errors import Quiet, RunError


def launch(arguments: list[str], count: int, max_restarts: int) -> None:
    """Run `python arguments` as so many ranks, as `torchrun --standalone --nproc-per-node` does; wait for their end.

    Args:
        arguments: of python.
        count: number of ranks.
        max_restarts: how often all of them are started again after one died.

    Raises:
        RunError: a rank was killed or broke down; Quiet: a rank has said itself why it failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs tables of what is told below
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
        if failure.exitcode == 2:
            raise Quiet from None
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise RunError(f"rank {rank} was killed ({name}): add --resume to continue, or --max-restarts") from None
        raise RunError(f"rank {rank} broke down with exit code {failure.exitcode}") from None
    except SignalException as error:
        raise RunError(f"stopped by {error.sigval.name}") from None
