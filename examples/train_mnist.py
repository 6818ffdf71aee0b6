"""Train a small MNIST classifier: an ordinary script, with one line changed.

python examples/train_mnist.py --data-root data
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets, transforms

from l2o_runtime import LearnedOptimizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data-root", default="data")
parser.add_argument("--download", action="store_true")
parser.add_argument("--rule", default="default", help="bundled name or a file that `l2o export` wrote")
parser.add_argument("--steps", type=int, default=300)
args = parser.parse_args()

torch.manual_seed(0)
data = datasets.MNIST(args.data_root, train=True, download=args.download, transform=transforms.ToTensor())
loader = torch.utils.data.DataLoader(data, batch_size=128, shuffle=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))

# optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
optimizer = LearnedOptimizer(model.parameters(), rule=args.rule)

for step, (images, labels) in zip(range(args.steps), loader, strict=False):
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 or step == args.steps - 1:
        print(f"step {step:4d}  loss {loss.item():.4f}")
