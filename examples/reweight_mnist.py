"""Train a small network on MNIST where many labels are wrong, with weights of examples learned from a clean set.

python examples/reweight_mnist.py --data-root data --wrong 0.4 --seeds 1 2 3

All contenders take the same steps. `none` has equal weights, `with the clean set` trains on its examples, too, as many
times as on others; `local` and `mean` take the last or the mean of the hypergradients that `glocal` foretells from;
`oracle` knows which labels are right. Printed are accuracies on unseen images, and how well weights tell right labels
from wrong ones (the area under the ROC curve; 0.5 is by chance).
"""

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

from l2o_training.tasks.data import Datasets
from l2o_training.tasks.scripts.images import examples
from l2o_training.tune import ExampleWeights

CONTENDERS = ("none", "with the clean set", "local", "mean", "glocal", "oracle")


def train(data, who: str, seed: int, args) -> tuple[float, float]:
    """An ordinary training loop: accuracy on unseen images, and the area under the ROC curve."""
    (images, labels), (held_out, answers) = data
    clean = held_out[: args.clean], answers[: args.clean]
    rng = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=rng) < args.wrong
    given = torch.where(wrong, (labels + torch.randint(1, 10, labels.shape, generator=rng)) % 10, labels)
    if who == "with the clean set":
        images, given = torch.cat([images, clean[0]]), torch.cat([given, clean[1]])
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    learned = who in ("local", "mean", "glocal")
    weights = ExampleWeights(len(images), args.tau, meta_lr=args.meta_lr, estimate=who if learned else "mean")
    if who == "oracle":
        weights.logits = torch.where(wrong, -30.0, 30.0)
    for step in range(args.steps):
        if learned and step % args.every == 0:
            losses = F.cross_entropy(net(images), given, reduction="none")
            weights.measure(losses, F.cross_entropy(net(clean[0]), clean[1]), list(net.parameters()))
        index = torch.randint(len(images), (64,), generator=rng)
        share = weights(index)
        losses = F.cross_entropy(net(images[index]), given[index], reduction="none")
        optimizer.zero_grad()
        ((share * losses).sum() / share.sum()).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (net(held_out[args.clean :]).argmax(1) == answers[args.clean :]).float().mean().item()
    if learned:
        print(f"  {who}, seed {seed}: {weights.fallbacks} of {weights.updates} updates fell back", flush=True)
    return accuracy, float(roc_auc_score(~wrong, weights.logits[: len(wrong)]))


def main() -> None:
    """Train all, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--data", choices=["mnist", "fashion-mnist"], default="mnist")
    parser.add_argument("--wrong", type=float, default=0.4, help="share of labels")
    parser.add_argument("--train", type=int, default=2000, help="images")
    parser.add_argument("--clean", type=int, default=200, help="images with right labels")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=5, help="steps between hypergradients")
    parser.add_argument("--tau", type=int, default=6)
    parser.add_argument("--meta-lr", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = examples(Datasets(args.data_root), args.data, 2, args.train, args.clean + 2000)
    runs = {who: [train(data, who, seed, args) for seed in args.seeds] for who in CONTENDERS}
    print("| weights | accuracy | by seed | right from wrong |\n|---|---:|---|---:|")
    for who, found in runs.items():
        accuracies, areas = zip(*found, strict=True)
        by_seed = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        print(f"| {who} | {statistics.fmean(accuracies):.3f} | {by_seed} | {statistics.fmean(areas):.2f} |")


if __name__ == "__main__":
    main()
