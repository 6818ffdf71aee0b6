"""A small regression, and the plain training loop that every other way of training is held against."""

import contextlib
import copy
import io
from collections.abc import Iterable

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Regression(nn.Module):
    """y ≈ sin x₁ with 41 weights. Keeps its minibatches, so that another loop can be fed the same ones."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        self.seen: list[Batch] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.seen.append((x.clone(), y.clone()))
        return (self.net(x).float() - y).square().mean()


def minibatches(count: int, size: int = 16, seed: int = 0) -> list[Batch]:
    rng = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 6, generator=rng) for _ in range(count)]
    return [(x, x[:, :1].sin()) for x in inputs]


def dataset(count: int, size: int = 16) -> torch.utils.data.TensorDataset:
    """The same minibatches end to end."""
    return torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*minibatches(count, size), strict=True)))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    pass_loss: bool = True,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> list[float]:
    """The plain loop; gives the loss of every minibatch."""
    losses = []
    optimizer.zero_grad()
    for index, (x, y) in enumerate(batches, start=1):
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            loss = model(x, y) / accumulate
        losses.append(loss.item() * accumulate)
        (scaler.scale(loss) if scaler else loss).backward()
        if index % accumulate:
            continue
        if scaler:
            scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        keywords = {"loss": loss} if pass_loss else {}
        if scaler:
            scaler.step(optimizer, **keywords)
            scaler.update()
        else:
            optimizer.step(**keywords)
        if scheduler:
            scheduler.step()
        optimizer.zero_grad()
    return losses


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def context_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The context's part of the state: it lies beside that of the first parameter."""
    state = optimizer.state[next(p for group in optimizer.param_groups for p in group["params"])]
    return {key: value for key, value in state.items() if key.startswith("context_")}


def assert_same_state(a: dict, b: dict) -> None:
    """Two `state_dict`s agree bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_resumes(make, learn, batches, stop):
    """A run that goes on from a saved state, or as a copy, is to the bit the run that was not stopped; its optimizer.

    Args:
        make: an optimizer of a model.
        learn: model, optimizer and minibatches, and steps are taken.
        batches: of the whole run.
        stop: after so many of them.
    """
    model = Regression()
    optimizer = make(model)
    learn(model, optimizer, batches[:stop])
    saved = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), saved)
    copied_model, copied = copy.deepcopy((model, optimizer))
    learn(model, optimizer, batches[stop:])
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    twin = Regression(seed=3)
    twin.load_state_dict(weights)
    resumed = make(twin)
    resumed.load_state_dict(state)
    learn(twin, resumed, batches[stop:])
    learn(copied_model, copied, batches[stop:])
    for other, its in ((twin, resumed), (copied_model, copied)):
        assert torch.equal(flat(model), flat(other))
        assert_same_state(optimizer.state_dict(), its.state_dict())
    return optimizer
