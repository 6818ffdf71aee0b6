"""Compiled orthogonalisation does what torch's operators do, for matrices of all shapes and sizes."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2o_runtime.rules.directional import nesterov
from l2o_runtime.rules.orthogonal import orthogonalise_each

pytest.importorskip("llvmlite", reason="the CPU kernel needs llvmlite: pip install '.[fast]'")

from l2o_runtime.kernels.directional import compile_orthogonal
from l2o_runtime.kernels.machine import widest
from l2o_runtime.kernels.orthogonal_code import LARGEST_RANK, room

GUARD = 64
"""Numbers around what is written that have to stay what they are."""


def compiled(matrices, rank, width=None):
    """The result for pairs of gradients and averages, each (rows, columns); all in one call."""
    results, rows, kept = [], [], []
    for grad, momentum in matrices:
        sides = sorted(grad.shape)
        result = torch.full((grad.numel() + 2 * GUARD,), 7.0)
        free = torch.full((room(rank, *sides) + 2 * GUARD,), 7.0)
        places = [t.data_ptr() for t in (grad, momentum, result[GUARD:], free[GUARD:])]
        rows.append([*sides, grad.shape[0] <= grad.shape[1], *places])
        results.append(result)
        kept.append(free)
    table = np.array(rows, dtype=np.int64)
    compile_orthogonal(rank, width or widest())[0]["orthogonalise"](len(table), ctypes.c_void_p(table.ctypes.data))
    for guarded in (*results, *kept):
        assert (guarded[:GUARD] == 7).all()
        assert (guarded[-GUARD:] == 7).all()
    return [r[GUARD:-GUARD].view(grad.shape) for r, (grad, _) in zip(results, matrices, strict=True)]


def plain(matrices, rank):
    return [orthogonalise_each([nesterov(grad, momentum)[None]], rank)[0][0] for grad, momentum in matrices]


def drawn(shape, seed, decay=0.0):
    """A gradient and its average; singular values fall by `decay` powers of ten."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        matrix = torch.randn(shape, generator=rng, dtype=torch.float64)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        fall = 10 ** (-decay * torch.linspace(0, 1, len(s), dtype=torch.float64))
        found.append(((u * (s * fall)) @ v).float())
    return tuple(found)


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 70), st.integers(2, 70)), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3, 4, 7, 16, LARGEST_RANK]),
    st.sampled_from([0.0, 2.0]),
    st.integers(0, 1000),
)
def test_equals_operators_for_every_shape_and_rank(shapes, rank, decay, seed):
    matrices = [drawn(shape, seed + index, decay) for index, shape in enumerate(shapes)]
    assert_close(compiled(matrices, rank), plain(matrices, rank))


@pytest.mark.parametrize("shape", [(512, 300), (300, 512), (16, 3000), (3000, 16), (257, 257)])
def test_equals_operators_for_large_matrices(shape):
    matrices = [drawn(shape, 3)]
    assert_close(compiled(matrices, 16), plain(matrices, 16))


@pytest.mark.parametrize("width", [4, 8, 16])
def test_equals_operators_for_narrower_processors(width):
    matrices = [drawn((9, 33), 0), drawn((33, 9), 1)]
    assert_close(compiled(matrices, 5, width), plain(matrices, 5))


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e-10, 1e10, 1e17])
def test_the_size_of_a_matrix_changes_nothing(scale):
    grad, momentum = drawn((20, 12), 0)
    expected = compiled([(grad, momentum)], 8)[0]
    found = compiled([(grad * scale, momentum * scale)], 8)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_what_is_zero_stays_zero_and_nothing_is_not_finite(rank):
    zeros = torch.zeros(8, 30), torch.zeros(8, 30)
    gone = drawn((8, 30), 0)
    for matrix in gone:
        matrix[2], matrix[:, 5] = 0, 0
    alike = tuple(torch.ones(8, 1) * torch.arange(30.0) for _ in range(2))
    single = torch.zeros(30, 8), torch.zeros(30, 8)
    single[0][3, 4] = 2.0
    found = compiled([zeros, gone, alike, single], rank)
    assert all(one.isfinite().all() for one in found)
    assert (found[0] == 0).all()
    assert (found[1][2].abs() < 1e-3).all()
    assert (found[1][:, 5].abs() < 1e-3).all()
    assert_close(found[2:], plain([alike, single], rank))
    mask = torch.ones(30, 8, dtype=torch.bool)
    mask[3, 4] = False
    assert (found[3][mask].abs() < 1e-3).all()
