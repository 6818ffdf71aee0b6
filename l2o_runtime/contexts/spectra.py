"""Small eigenvalue problems: Dynamic Mode Decomposition from a Gram matrix.

Two interchangeable solvers. `linalg` calls LAPACK through torch.linalg. `elementary` uses only matrix
products and elementwise operations, because ONNX has no eigen-solver at all; it is tested against `linalg`.
Complex numbers are pairs of real tensors (re, im) throughout, since ONNX has no complex type either.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SQUARINGS = 30
"""Matrix squarings per leading eigenvector: 2³⁰ power iterations, which separates gaps of 1e-8."""

ROOT_ITERATIONS = 60
"""Durand–Kerner sweeps; it converges quadratically from roots spread on a circle."""


FLOOR = 1e-30
"""Guards divisions by quantities of order one; a float32 too, since exporters may store constants so."""

NOISE = 1e-10
"""σ²/σ₁² below which a mode is rounding noise of the float32 snapshots and is dropped."""


def repeat(times: int, body: Callable[..., tuple[Tensor, ...]], *values: Tensor) -> tuple[Tensor, ...]:
    """Apply `body` to its own results `times` times; exported as one loop instead of `times` copies."""
    if torch.compiler.is_exporting():
        from torch._higher_order_ops.while_loop import while_loop

        def count(i: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            return i + 1, *body(*values)

        def unfinished(i: Tensor, *values: Tensor) -> Tensor:
            return i < times

        start = torch.zeros((), dtype=torch.int64)
        return tuple(while_loop(unfinished, count, (start, *values))[1:])
    for _ in range(times):
        values = body(*values)
    return values


def leading_eigenpairs(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues, descending, and eigenvectors of symmetric positive semi-definite matrices.

    Args:
        a: (..., m, m) float64.

    Returns:
        (..., rank) and (..., m, rank).
    """
    values, vectors = torch.linalg.eigh(a)
    return values[..., -rank:].flip(-1), vectors[..., -rank:].flip(-1)


def leading_eigenpairs_elementary(a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As `leading_eigenpairs`, from matrix products alone.

    Repeated squaring, P ← P²/tr P², turns `a` into the projector on its dominant eigenspace; the column of P
    with the largest diagonal entry is an eigenvector. Projecting it out, a ← (I − vvᵀ) a (I − vvᵀ), exposes the
    next. One Rayleigh quotient on the original `a` gives the value.
    """
    eye = identity(a)

    def square(power: Tensor) -> tuple[Tensor]:
        return (_unit_trace(power @ power),)

    values: list[Tensor] = []
    vectors: list[Tensor] = []
    rest = a
    for _ in range(rank):
        (power,) = repeat(SQUARINGS, square, _unit_trace(rest))
        diagonal = (power * eye).sum(-1)
        column = power @ _one_hot_max(diagonal).unsqueeze(-1)
        for previous in vectors:
            column = column - previous @ transposed_product(previous, column)
        vector = column / column.square().sum(-2, keepdim=True).sqrt().clamp_min(FLOOR)
        values.append(transposed_product(vector, a @ vector)[..., 0, 0])
        vectors.append(vector)
        projector = eye - vector * vector.squeeze(-1).unsqueeze(-2)
        rest = projector @ rest @ projector
        rest = (rest + rest.mT) / 2
    return torch.stack(values, dim=-1), torch.cat(vectors, dim=-1)


def identity(a: Tensor) -> Tensor:
    """The identity matrix for the last dimension of `a`; in ONNX `torch.eye` compares bytes, which few runtimes do."""
    return torch.ones(a.shape[-1], dtype=a.dtype, device=a.device).diag_embed()


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb, (..., m, k) and (..., m, l) → (..., k, l); without a transposition, which old onnxruntimes fuse with a
    product of doubles, for which they then have no kernel.
    """
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).sum(-3)


def trace(a: Tensor) -> Tensor:
    """Σ_i a_ii over the last two dimensions."""
    return (a * identity(a)).sum((-2, -1))


def _unit_trace(a: Tensor) -> Tensor:
    return a / trace(a).clamp_min(FLOOR)[..., None, None]


def _one_hot_max(x: Tensor) -> Tensor:
    """1 at the first largest entry of the last dimension, else 0."""
    index = torch.arange(x.shape[-1], device=x.device)
    return (index == x.argmax(-1, keepdim=True)).to(x.dtype)


def eigenvalues(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of small real matrices, (..., r, r) → real and imaginary parts, each (..., r)."""
    values = torch.linalg.eigvals(a)
    return values.real, values.imag


def eigenvalues_elementary(a: Tensor) -> tuple[Tensor, Tensor]:
    """As `eigenvalues`, by the characteristic polynomial and its simultaneous roots.

    The matrix is centred at its mean eigenvalue and scaled to norm 1 first: DMD eigenvalues cluster around 1,
    and the roots of a polynomial are well conditioned only when they are spread out.
    """
    r = a.shape[-1]
    eye = identity(a)
    mean = trace(a) / r
    centred = a - mean[..., None, None] * eye
    scale = centred.square().sum((-2, -1)).sqrt()
    re, im = polynomial_roots(characteristic_polynomial(centred / scale.clamp_min(FLOOR)[..., None, None]))
    return mean.unsqueeze(-1) + scale.unsqueeze(-1) * re, scale.unsqueeze(-1) * im


def characteristic_polynomial(a: Tensor) -> list[Tensor]:
    """Coefficients c_0 … c_{r−1} of det(λI − a) = λ^r + c_{r−1} λ^{r−1} + … + c_0 (Faddeev–LeVerrier).

    M_1 = I, c_{r−k} = −tr(a M_k)/k, M_{k+1} = a M_k + c_{r−k} I.
    """
    r = a.shape[-1]
    eye = identity(a)
    m = eye.expand_as(a)
    coefficients: list[Tensor] = []
    for k in range(1, r + 1):
        product = a @ m
        c = -trace(product) / k
        coefficients.insert(0, c)
        m = product + c[..., None, None] * eye
    return coefficients


def polynomial_roots(coefficients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All roots of λ^r + … + c_0 at once: z_j ← z_j − p(z_j) / Π_{k≠j} (z_j − z_k) (Durand–Kerner).

    Args:
        coefficients: c_0 … c_{r−1}, each (...).

    Returns:
        Real and imaginary parts, each (..., r), in no particular order.
    """
    r = len(coefficients)
    # An asymmetric circle: no starting point is the conjugate of another, or real roots could never part.
    angles = [2 * math.pi * j / r + 0.4 for j in range(r)]
    one = torch.ones_like(coefficients[0])  # onnxruntime has had no cosine of doubles for long
    re, im = (torch.stack([0.9 * f(angle) * one for angle in angles], dim=-1) for f in (math.cos, math.sin))
    eye = identity(re)

    def sweep(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
        value_re, value_im = torch.ones_like(re), torch.zeros_like(im)
        for c in reversed(coefficients):
            product_re = value_re * re - value_im * im
            value_im = value_re * im + value_im * re
            value_re = product_re + c.unsqueeze(-1)
        # z_j − z_k off the diagonal and 1 on it, multiplied up along k.
        gap_re = re.unsqueeze(-1) - re.unsqueeze(-2) + eye
        gap_im = im.unsqueeze(-1) - im.unsqueeze(-2)
        bottom_re, bottom_im = gap_re[..., 0], gap_im[..., 0]
        for k in range(1, r):
            product_re = bottom_re * gap_re[..., k] - bottom_im * gap_im[..., k]
            bottom_im = bottom_re * gap_im[..., k] + bottom_im * gap_re[..., k]
            bottom_re = product_re
        square = (bottom_re.square() + bottom_im.square()).clamp_min(FLOOR)
        step_re = (value_re * bottom_re + value_im * bottom_im) / square
        step_im = (value_im * bottom_re - value_re * bottom_im) / square
        return re - step_re, im - step_im

    re, im = repeat(ROOT_ITERATIONS, sweep, re, im)
    return re, im


def dmd(gram: Tensor, rank: int, *, elementary: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic Mode Decomposition from the Gram matrix of m + 1 successive snapshots.

    With X = s_0 … s_{m−1}, Y = s_1 … s_m and XᵀX = V Σ² Vᵀ truncated to rank R,
    Ã = Σ⁻¹ Vᵀ (XᵀY) V Σ⁻¹ and Λ = eig(Ã). Directions with σ² ≤ 1e-10 σ₁² are rounding noise of float32
    snapshots; they are dropped (their rows of Ã are zero).
    The residual is ‖Y − AX‖ / ‖Y‖ = √(1 − ‖MV‖² / ‖Y‖²) with M = Σ⁻¹Vᵀ(XᵀY).

    Args:
        gram: (..., m+1, m+1) float64.
        rank: R ≤ m.
        elementary: use only operations that ONNX has.

    Returns:
        Real parts (..., R), imaginary parts (..., R) ≥ 0, and the residual (...). Eigenvalues are in order of
        descending modulus; of a conjugate pair only the one with positive imaginary part is given; the
        places that this leaves empty come last and hold zero.

    Source: Tu et al. 2014, eq. 7; Šimánek et al., arXiv 2211.16268.

    >>> s = 0.9 ** torch.arange(6, dtype=torch.float64)  # one mode, λ = 0.9
    >>> re, im, residual = dmd(torch.outer(s, s), rank=1)
    >>> round(re.item(), 12), im.item(), round(residual.item(), 6)
    (0.9, 0.0, 0.0)
    """
    gram = _unit_trace(gram)
    past, cross = gram[..., :-1, :-1], gram[..., :-1, 1:]
    pairs = leading_eigenpairs_elementary if elementary else leading_eigenpairs
    sigma2, v = pairs(past, rank)
    safe = sigma2 > (NOISE * sigma2[..., :1]).clamp_min(FLOOR)
    inverse = torch.where(safe, sigma2.clamp_min(FLOOR).rsqrt(), torch.zeros_like(sigma2))
    v = v * safe.to(v.dtype).unsqueeze(-2)  # else the residual would depend on which noise a solver takes for a mode
    projected = inverse.unsqueeze(-1) * transposed_product(v, cross)
    mv = projected @ v
    operator = mv * inverse.unsqueeze(-2)
    energy = trace(gram[..., 1:, 1:]).clamp_min(FLOOR)
    residual = (1 - mv.square().sum((-2, -1)) / energy).clamp(0, 1).sqrt()
    if rank == 1:  # a number is its own eigenvalue, and in order
        return operator[..., 0], torch.zeros_like(operator[..., 0]), residual
    re, im = (eigenvalues_elementary if elementary else eigenvalues)(operator)
    return *order_spectrum(re, im), residual


def order_spectrum(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by descending modulus, one eigenvalue per conjugate pair, zeros in the places left over.

    An imaginary part below 1e-7 of the largest modulus counts as zero: that is how far rounding splits a double root.
    """
    modulus = (re.square() + im.square()).sqrt()
    im = torch.where(im.abs() > 1e-7 * modulus.amax(-1, keepdim=True), im, torch.zeros_like(im))
    # Real before complex of equal modulus, larger real part first: a fixed order even for ±λ.
    key = torch.where(im < 0, torch.full_like(re, -1.0), modulus * (1 + 1e-9 * re.sign()))
    order = key.topk(key.shape[-1], dim=-1).indices
    keep = (im >= 0).to(re.dtype)
    return (re * keep).gather(-1, order), (im * keep).gather(-1, order)
