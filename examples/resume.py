"""Train a digits classifier that survives being killed: run it again and it continues, to the same bits.

python examples/resume.py --out runs/resume
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from l2o_runtime import LearnedOptimizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, default=Path("runs/resume"))
parser.add_argument("--rule", default="default", help="bundled name or a file that `l2o export` wrote")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint that is whole or not there: into another file, which then takes the name."""
    temporary = path.with_suffix(".tmp")  # always the same name, so that killed runs leave one at most
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


torch.manual_seed(0)
torch.set_num_threads(args.threads)
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
batches = len(images) // args.batch_size

model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
optimizer = LearnedOptimizer(model.parameters(), rule=args.rule)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * batches)
step = 0

args.out.mkdir(parents=True, exist_ok=True)
checkpoint = args.out / "checkpoint.pt"
if checkpoint.is_file():
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])  # dropout's; on a GPU, keep torch.cuda.get_rng_state_all() as well
    step = state["step"]
    print(f"continuing after step {step}")

while step < args.epochs * batches:
    # The order of an epoch comes from its number alone: a run resumed in its midst sees the same minibatches.
    epoch, batch = divmod(step, batches)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
    index = order[batch * args.batch_size :][: args.batch_size]

    loss = F.cross_entropy(model(images[index]), labels[index])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(loss=loss)
    scheduler.step()
    step += 1

    last = step == args.epochs * batches
    if step % args.every == 0 or last:
        save(
            checkpoint,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
                "step": step,
            },
        )
    if batch == batches - 1:
        print(f"epoch {epoch + 1}  loss {loss.item():.4f}")
