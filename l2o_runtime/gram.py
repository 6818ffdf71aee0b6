"""The sliding window of snapshots, kept as a Gram matrix.

With snapshots s_k = [θ_k; L_k], DMD and KAE read nothing but G_ij = s_i · s_j. G is rotation invariant,
additive over tensors, and its size does not depend on the number of coordinates; one step adds one row.
Snapshots are in chronological order: index 0 is the oldest, index m the newest. Everything starts at zero.
"""

import torch
from torch import Tensor, nn

from l2o_runtime.config import WindowConfig
from l2o_runtime.passes import compiled_pass
from l2o_runtime.sketch import count_sketch

State = dict[str, Tensor]
"""The state of a rule: named tensors, all of them zero at the start."""

StateSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Trailing shape and dtype of every tensor of a state (per coordinate, or per optimization)."""


def push(window: Tensor, newest: Tensor, dim: int) -> Tensor:
    """Drop the oldest entry along `dim` and append `newest` (which lacks `dim`)."""
    return torch.cat([window.narrow(dim, 1, window.shape[dim] - 1), newest.unsqueeze(dim)], dim=dim)


def slide(gram: Tensor, row: Tensor) -> Tensor:
    """Drop the oldest row and column of a Gram matrix and append the newest.

    Args:
        gram: (..., m+1, m+1).
        row: (..., m+1), inner products of the new snapshot with the kept ones, itself last.

    Returns:
        (..., m+1, m+1).
    """
    kept = gram[..., 1:, 1:]
    upper = torch.cat([kept, row[..., :-1].unsqueeze(-1)], dim=-1)
    return torch.cat([upper, row.unsqueeze(-2)], dim=-2)


def difference_gram(gram: Tensor) -> Tensor:
    """Gram matrix of the successive differences s_{k+1} − s_k: (..., m+1, m+1) → (..., m, m)."""
    rows = gram[..., 1:, :] - gram[..., :-1, :]
    return rows[..., :, 1:] - rows[..., :, :-1]


class GramWindow(nn.Module):
    """Keeps the Gram matrix of the last m + 1 snapshots.

    Exact mode stores the snapshots per coordinate, float32, and sums inner products in float64. Sketch mode
    stores one CountSketch per snapshot for the whole optimization.
    """

    def __init__(self, config: WindowConfig):
        super().__init__()
        self.size = config.window + 1
        self.sketch = config.sketch

    @property
    def coordinate_spec(self) -> StateSpec:
        """State kept for every coordinate."""
        return {"window": ((self.size,), torch.float32)} if self.sketch is None else {}

    @property
    def context_spec(self) -> StateSpec:
        """State kept once for the optimization."""
        spec: StateSpec = {
            "gram": ((self.size, self.size), torch.float64),
            "losses": ((self.size,), torch.float64),
            "count": ((), torch.int64),
        }
        if self.sketch is not None:
            spec["sketches"] = ((self.size, self.sketch), torch.float32)
        return spec

    def observe(self, param: Tensor, state: State, offset: int | Tensor) -> Tensor:
        """Additive statistics of the newest snapshot.

        Args:
            param: (..., n) coordinates θ.
            state: coordinate state, before this step.
            offset: global index of the first coordinate, or (n,) global minus local index of each.

        Returns:
            Exact: (..., m+1) float64, θ · θ_k for the m kept snapshots and θ · θ. Sketch: (..., d) float32.
        """
        if self.sketch is not None:
            return count_sketch(param, self.sketch, offset)
        add_products = compiled_pass("add_products", param, state["window"])
        if add_products is not None and param.dim() == 1:
            row = torch.zeros(self.size, dtype=torch.float64)
            add_products(param.numpy(), state["window"].numpy(), row.numpy())
            return row
        window = push(state["window"], param, -1).double()
        return (param.double().unsqueeze(-2) @ window).squeeze(-2)

    def remember(self, param: Tensor, state: State) -> State:
        """Coordinate state after this step: the window with θ appended."""
        return {} if self.sketch is not None else {"window": push(state["window"], param, -1)}

    def advance(self, statistics: Tensor, loss: Tensor, state: State) -> State:
        """Slide the Gram matrix by the summed statistics of a step.

        Args:
            statistics: what `observe` returned, summed over all tensors.
            loss: (...) loss values; zero where there is none.
            state: context state, before this step.

        Returns:
            Context state after this step.
        """
        row, new = statistics, {}
        if self.sketch is not None:
            newest = statistics.to(state["sketches"].dtype)  # the optimizer sums in float64
            new["sketches"] = push(state["sketches"], newest, -2)
            window = new["sketches"].double()
            row = (window @ newest.double().unsqueeze(-1)).squeeze(-1)
        new["gram"] = slide(state["gram"], row)
        new["losses"] = push(state["losses"], loss.double(), -1)
        new["count"] = state["count"] + 1
        return new

    def full(self, state: State) -> Tensor:
        """(...) bool: the window holds m + 1 snapshots."""
        return state["count"] >= self.size

    def snapshot_gram(self, state: State) -> Tensor:
        """G of s = [θ; L]: the stored θ · θ plus the products of the losses, (..., m+1, m+1) float64.

        A snapshot that is not finite (a diverged run) gives zeros, so that no decomposition ever sees it.
        """
        losses = state["losses"]
        gram = state["gram"] + losses.unsqueeze(-1) * losses.unsqueeze(-2)
        finite = gram.isfinite().all(-1).all(-1)
        return torch.where(finite[..., None, None], gram, torch.zeros_like(gram))
