"""Context from a Koopman autoencoder: a latent state in which the optimization moves linearly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2o_runtime.config import KAEConfig
from l2o_runtime.contexts.base import WindowContext
from l2o_runtime.contexts.gram import GramWindow, difference_gram
from l2o_runtime.state import State, StateSpec

EPSILON = 1e-12


def window_features(gram: Tensor, losses: Tensor, count: Tensor) -> Tensor:
    """Dimensionless description of a window, every entry in [−1, 1], 3m − 1 numbers.

    For lags k = 1 … m: 1 + log₁₀(r_k + 1e-6)/6 with r_k = ‖θ_t − θ_{t−k}‖/(‖θ_t‖ + ‖θ_{t−k}‖) (how far it came) and
    (L_{t−k} − L_t)/(|L_t| + |L_{t−k}|) (how much it gained); for k = 1 … m−1 the cosine of the step Δθ_t with
    Δθ_{t−k} (whether it turns). Lags that the window does not hold yet give zero.

    Args:
        gram: (..., m+1, m+1) float64, θ_i · θ_j.
        losses: (..., m+1) float64.
        count: (...) number of snapshots seen.

    Returns:
        (..., 3m − 1) float32.
    """
    m = gram.shape[-1] - 1
    square = gram.diagonal(dim1=-2, dim2=-1)
    newest = gram[..., -1, :-1]
    distance = (square[..., :-1] + square[..., -1:] - 2 * newest).clamp_min(0).sqrt()
    size = square[..., :-1].sqrt() + square[..., -1:].sqrt() + EPSILON
    travelled = 1 + (distance / size + 1e-6).log10() / 6

    steps = difference_gram(gram)
    step_squares = steps.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    norms = (step_squares[..., :-1] * step_squares[..., -1:]).sqrt() + EPSILON
    turned = (steps[..., -1, :-1] / norms).clamp(-1, 1)

    latest, earlier = losses[..., -1:], losses[..., :-1]
    gained = (earlier - latest) / (latest.abs() + earlier.abs() + EPSILON)

    lag = torch.arange(m, 0, -1, device=gram.device)
    held = (lag < count.unsqueeze(-1)).to(gram.dtype)
    step_held = (lag[:-1] < count.unsqueeze(-1)).to(gram.dtype)
    features = torch.cat([travelled * held, turned * step_held, gained * held], dim=-1)
    return torch.where(features.isfinite(), features, torch.zeros_like(features)).float()


def rotate(psi: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Kψ for the block-diagonal K of ρ_j R(ω_j): the first half of ψ holds x_j, the second y_j.

    Args:
        psi: (..., 2q).
        radius, angle: (q,).

    Returns:
        (..., 2q).
    """
    x, y = psi.chunk(2, dim=-1)
    cos, sin = radius * angle.cos(), radius * angle.sin()
    return torch.cat([cos * x - sin * y, sin * x + cos * y], dim=-1)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden tanh layers and a linear output."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
    )


class KAE(WindowContext):
    """ψ_t = enc(x_t), with ψ_{t+1} ≈ Kψ_t and x_t ≈ dec(ψ_t), where x_t describes the window.

    The eigenvalues of K are ρ_j e^{±iω_j}, with ρ_j = radius · σ(ν_j) below its bound by construction.
    """

    def __init__(self, config: KAEConfig):
        super().__init__(GramWindow(config))
        self.config = config
        self.inputs = 3 * config.window - 1
        self.encoder = mlp(self.inputs, config.hidden, config.latent)
        self.decoder = mlp(config.latent, config.hidden, self.inputs)
        blocks = config.latent // 2
        # Start close to |λ| = 0.95·bound, with slow rotations.
        self.radius_logit = nn.Parameter(torch.full((blocks,), 3.0))
        self.angle = nn.Parameter(torch.linspace(0, 0.5, blocks))

    @property
    def context_spec(self) -> StateSpec:
        """The window's state and x_t itself, from which the Koopman loss is computed."""
        return super().context_spec | {"features": ((self.inputs,), torch.float32)}

    @property
    def radius(self) -> Tensor:
        """ρ_j = |λ_j| of K, each in (0, bound)."""
        return self.config.radius * self.radius_logit.sigmoid()

    @property
    def operator(self) -> Tensor:
        """K as a (latent, latent) matrix, Kψ = `rotate(ψ)`."""
        eye = torch.eye(self.config.latent, device=self.angle.device)
        return rotate(eye, self.radius, self.angle).mT

    def read(self, statistics: Tensor, loss: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance the window, describe it and encode it."""
        new = self.window.advance(statistics, loss, state)
        new["features"] = window_features(new["gram"], new["losses"], new["count"])
        psi: Tensor = self.encoder(new["features"])
        return psi, new

    def koopman_loss(self, sequence: Tensor) -> Tensor:
        """Reconstruction and multi-step linear prediction over a stretch of an optimization.

        ⟨‖dec ψ_t − x_t‖²⟩ + (1/P) Σ_{k=1…P} ⟨‖K^k ψ_t − ψ_{t+k}‖² + ‖dec K^k ψ_t − x_{t+k}‖²⟩,
        ⟨·⟩ the mean over t and entries.

        Args:
            sequence: (s, ..., 3m − 1), x_t of s successive steps.

        Returns:
            Scalar.

        Source: Lusch, Kutz & Brunton 2018, eqs. 2–4; Azencot et al. 2020, eqs. 4–6.
        """
        psi = self.encoder(sequence)
        reconstruction = F.mse_loss(self.decoder(psi), sequence)
        steps = min(self.config.predict, sequence.shape[0] - 1)
        ahead, linear, prediction = psi, psi.new_zeros(()), psi.new_zeros(())
        for k in range(1, steps + 1):
            ahead = rotate(ahead[:-1], self.radius, self.angle)
            linear = linear + F.mse_loss(ahead, psi[k:])
            prediction = prediction + F.mse_loss(self.decoder(ahead), sequence[k:])
        total: Tensor = reconstruction + (linear + prediction) / max(steps, 1)
        return total
