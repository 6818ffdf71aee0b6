"""DMD from a Gram matrix against a plain NumPy SVD, and the elementary solver against LAPACK."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2o_runtime.contexts.gram import difference_gram
from l2o_runtime.contexts.spectra import dmd, eigenvalues, eigenvalues_elementary, order_spectrum

WINDOW = 20
RANKS = [1, 2, 4, 8]
STARTS = range(0, 100, 9)


def reference(s: np.ndarray, rank: int) -> np.ndarray:
    """The six lines: exact DMD by the SVD of the snapshots."""
    x, y = s[:, :-1], s[:, 1:]
    u, sigma, vh = np.linalg.svd(x, full_matrices=False)
    u, sigma, v = u[:, :rank], sigma[:rank], vh[:rank].T
    values = np.linalg.eigvals(u.T @ y @ v / sigma)
    values = values[values.imag >= 0]
    return values[np.argsort(-np.abs(values), kind="stable")]


def distance(re: torch.Tensor, im: torch.Tensor, expected: np.ndarray) -> float:
    """Largest distance of an eigenvalue from its counterpart, by assignment in order of modulus."""
    found = (re + 1j * im).numpy()
    assert np.all(found[len(expected) :] == 0), "places left over hold zeros"
    return max(min(abs(found - value)) for value in expected)


@pytest.mark.parametrize("elementary", [False, True])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_eigenvalues_agree_with_numpy_on_real_windows(snapshots, rank, delta, elementary):
    for start in STARTS:
        window = snapshots[:, start : start + WINDOW + 1]
        gram = torch.tensor(window.T @ window)
        re, im, _ = dmd(difference_gram(gram) if delta else gram, rank, elementary=elementary)
        expected = reference(np.diff(window, axis=1) if delta else window, rank)
        assert distance(re, im, expected) < 1e-8


@pytest.mark.parametrize("rank", RANKS)
def test_eigenvalues_agree_with_pydmd(snapshots, rank):
    pydmd = pytest.importorskip("pydmd", reason="PyDMD is not installed")
    window = snapshots[:, 40 : 40 + WINDOW + 1]
    re, im, _ = dmd(torch.tensor(window.T @ window), rank)
    values = pydmd.DMD(svd_rank=rank).fit(window).eigs
    assert distance(re, im, np.array([v for v in values if v.imag >= 0])) < 1e-8


@pytest.mark.parametrize("rank", [1, 3])
def test_residual_is_that_of_the_projected_model(snapshots, rank):
    window = snapshots[:, 30 : 30 + WINDOW + 1]
    x, y = window[:, :-1], window[:, 1:]
    u, sigma, vh = np.linalg.svd(x, full_matrices=False)
    u, sigma, v = u[:, :rank], sigma[:rank], vh[:rank].T
    # The best approximation of Y within the span of A's range: Y V Vᵀ seen through U.
    model = u @ (u.T @ y) @ v @ v.T
    expected = np.sqrt(np.linalg.norm(y) ** 2 - 2 * np.sum(y * model) + np.linalg.norm(model) ** 2)
    _, _, residual = dmd(torch.tensor(window.T @ window), rank)
    m = np.diag(1 / sigma) @ v.T @ (x.T @ y) @ v
    assert residual.item() == pytest.approx(np.sqrt(1 - np.sum(m**2) / np.sum(y**2)), abs=1e-7)
    assert residual.item() == pytest.approx(expected / np.linalg.norm(y), abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), size=st.integers(1, 6), scale=st.floats(1e-3, 1e3))
def test_elementary_eigenvalues_of_random_matrices(seed, size, scale):
    matrix = scale * torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = torch.complex(*eigenvalues(matrix))
    found = torch.complex(*eigenvalues_elementary(matrix))
    for value in expected:
        assert (found - value).abs().min() < 1e-6 * scale


def test_batches_are_independent(snapshots):
    grams = [torch.tensor(w.T @ w) for w in (snapshots[:, a : a + WINDOW + 1] for a in (0, 30, 60))]
    for elementary in (False, True):
        together = dmd(torch.stack(grams), 3, elementary=elementary)
        for row, gram in enumerate(grams):
            for whole, single in zip(together, dmd(gram, 3, elementary=elementary), strict=True):
                torch.testing.assert_close(whole[row], single, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("elementary", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_degenerate_windows_are_finite(value, elementary):
    """No movement at all: one mode with λ = 1, or none."""
    re, im, residual = dmd(torch.full((7, 7), value, dtype=torch.float64), 3, elementary=elementary)
    torch.testing.assert_close(re, torch.tensor([value, 0.0, 0.0], dtype=torch.float64))
    assert torch.equal(im, torch.zeros_like(im))
    assert residual.isfinite()


def test_dropped_modes_have_no_part_in_the_residual():
    """Each solver takes other noise for the modes that are not there."""
    values = torch.tensor([1.5, -1.4, 1.6, -1.5, 1.3, -1.6], dtype=torch.float64)
    gram = torch.outer(values, values)
    _, _, one = dmd(gram, 1)
    for elementary in (False, True):
        _, _, residual = dmd(gram, 3, elementary=elementary)
        torch.testing.assert_close(residual, one, rtol=1e-6, atol=0)


def test_order_is_by_modulus_with_one_of_each_pair():
    re = torch.tensor([0.5, 0.9, 0.9, -1.2])
    im = torch.tensor([0.0, -0.3, 0.3, 0.0])
    re, im = order_spectrum(re, im)
    torch.testing.assert_close(re, torch.tensor([-1.2, 0.9, 0.5, 0.0]))
    torch.testing.assert_close(im, torch.tensor([0.0, 0.3, 0.0, 0.0]))
