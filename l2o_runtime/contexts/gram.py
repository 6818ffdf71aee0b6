"""The sliding window of snapshots, kept as a Gram matrix.

With snapshots s_k = [x_k; L_k], where x is θ or the gradient, DMD and KAE read nothing but G_ij = s_i · s_j. G is
rotation invariant, additive over tensors, and its size does not depend on the number of coordinates; one step adds one
row.
Snapshots are in chronological order: index 0 is the oldest, index m the newest. Everything starts at zero.
"""

import torch
from torch import Tensor, nn

from l2o_runtime.config import WindowConfig
from l2o_runtime.contexts.passes import compiled_pass, listed
from l2o_runtime.contexts.sketch import count_sketch, count_sketches
from l2o_runtime.state import State, StateSpec


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


def zero_unless_finite(gram: Tensor) -> Tensor:
    """Zeros where a Gram matrix (..., m+1, m+1) is not finite (a diverged run), so that no decomposition sees it."""
    finite = gram.isfinite().all(-1).all(-1)
    return torch.where(finite[..., None, None], gram, torch.zeros_like(gram))


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

    def observe(self, snapshot: Tensor, state: State, offset: int | Tensor) -> Tensor:
        """Additive statistics of the newest snapshot.

        Args:
            snapshot: (..., n) coordinates x.
            state: coordinate state, before this step.
            offset: global index of the first coordinate, or (n,) global minus local index of each.

        Returns:
            Exact: (..., m+1) float64, x · x_k for the m kept snapshots and x · x. Sketch: (..., d) float32.
        """
        if self.sketch is not None:
            return count_sketch(snapshot, self.sketch, offset)
        add_products = compiled_pass("add_products", snapshot, state["window"])
        if add_products is not None:
            rows = snapshot.new_zeros((*snapshot.shape[:-1], self.size), dtype=torch.float64)
            for each in zip(listed(snapshot, 1), listed(state["window"], 2), listed(rows, 1), strict=True):
                add_products(*each)
            return rows
        window = push(state["window"], snapshot, -1).double()
        return (snapshot.double().unsqueeze(-2) @ window).squeeze(-2)

    def observe_tensors(self, snapshot: Tensor, state: State, owner: Tensor, tensors: int) -> Tensor:
        """`observe` for every tensor that the coordinates are made of: (..., S, m+1) or (..., S, d).

        Args:
            snapshot, state: as in `observe`, of all coordinates.
            owner: (n,) number of each coordinate's tensor.
            tensors: S.
        """
        if self.sketch is not None:
            return count_sketches(snapshot, self.sketch, owner, tensors)
        window = push(state["window"], snapshot, -1).double()
        rows = window.new_zeros((*snapshot.shape[:-1], tensors, self.size))
        return rows.index_add(-2, owner, snapshot.double().unsqueeze(-1) * window)

    def remember(self, snapshot: Tensor, state: State) -> State:
        """Coordinate state after this step: the window with x appended."""
        return {} if self.sketch is not None else {"window": push(state["window"], snapshot, -1)}

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
        """G of s = [x; L]: the stored x · x plus the products of the losses, (..., m+1, m+1) float64."""
        losses = state["losses"]
        return zero_unless_finite(state["gram"] + losses.unsqueeze(-1) * losses.unsqueeze(-2))


class LossWindow(nn.Module):
    """As `GramWindow`, of m + 1 delay embeddings of the loss: s_k = [L_{k−q+1} … L_k], a Hankel matrix.

    The window is made of the last m + q losses; nothing is kept or computed per coordinate. A loss that is not known
    (zero) repeats the last one: zeros among losses would be a rhythm, and the decomposition would find it.

    Source: Arbabi & Mezić 2017 (Hankel-DMD), section 3.
    """

    def __init__(self, window: int, delay: int):
        super().__init__()
        self.delay = delay
        self.size = window + delay

    @property
    def coordinate_spec(self) -> StateSpec:
        """Nothing."""
        return {}

    @property
    def context_spec(self) -> StateSpec:
        """The last losses and the number of steps."""
        return {"losses": ((self.size,), torch.float64), "count": ((), torch.int64)}

    def observe(self, snapshot: Tensor, state: State, offset: int | Tensor) -> Tensor:
        """No statistics (..., 0)."""
        return snapshot.new_zeros((*snapshot.shape[:-1], 0))

    def remember(self, snapshot: Tensor, state: State) -> State:
        """Nothing."""
        return {}

    def advance(self, statistics: Tensor, loss: Tensor, state: State) -> State:
        """Context state after a step with loss (...)."""
        known = torch.where(loss == 0, state["losses"][..., -1], loss.double())
        return {"losses": push(state["losses"], known, -1), "count": state["count"] + 1}

    def full(self, state: State) -> Tensor:
        """(...) bool: m + q losses were seen."""
        return state["count"] >= self.size

    def snapshot_gram(self, state: State) -> Tensor:
        """G_ij = Σ_d L_{i+d} L_{j+d}, d = 0 … q − 1: (..., m+1, m+1) float64."""
        embedded = state["losses"].unfold(-1, self.delay, 1)
        # No product with a transposed matrix, for old onnxruntimes: see `spectra.transposed_product`.
        return zero_unless_finite((embedded.unsqueeze(-2) * embedded.unsqueeze(-3)).sum(-1))
