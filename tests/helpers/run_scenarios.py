"""One rank of tests/runtime/test_distributed.py: started by torchrun, writes the figures of its scenarios as JSON."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import collectives_worker
import distributed_worker
import torch
import torch.distributed as dist


def main() -> None:
    """Run the scenarios named on the command line; a rank that waits for others that do not come is an error."""
    torch.set_num_threads(1)
    folder, *names = (Path(sys.argv[1]), *sys.argv[2:])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    scenarios = distributed_worker.make_scenarios(folder) | collectives_worker.make_scenarios(folder)
    figures = {name: scenarios[name]() for name in names}
    if dist.get_rank() == 0:
        (folder / f"figures-{dist.get_world_size()}.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort while the interpreter is torn down


if __name__ == "__main__":
    main()
