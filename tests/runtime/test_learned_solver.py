"""Learned solvers as functions: what they give, what they refuse, what the safeguard promises."""

import pytest
import torch

from l2o_runtime import ArtifactError, ConfigError, LearnedSolver, save_rule
from l2o_runtime.solvers import UnrolledConfig, UnrolledSolver
from l2o_runtime.solvers.analytic import coherent_least, lipschitz
from l2o_runtime.solvers.classical import lasso, proximal_step

M, N, K = 12, 20, 5


def matrix_of(seed=0, rows=M, columns=N):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return matrix / matrix.norm(dim=0)


@pytest.fixture
def file_of(tmp_path):
    def make(cell="alista", noise=0.0, **keys):
        solver = UnrolledSolver(UnrolledConfig(cell=cell, rows=M, columns=N, layers=K, start="analytic", **keys))
        solver.fit_to(matrix_of())
        with torch.no_grad():
            for parameter in solver.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        path = tmp_path / f"{cell}.safetensors"
        save_rule(path, solver, {"config": {"tasks": [{"kind": "sparse", "weight": 0.01}]}})
        return path

    return make


def measurements(count=6, seed=2):
    return torch.randn(count, M, generator=torch.Generator().manual_seed(seed))


def test_any_shape_and_dtype(file_of):
    solver, b = LearnedSolver(file_of()), measurements()
    x = solver(b)
    assert x.shape == (6, N)
    assert not x.requires_grad
    torch.testing.assert_close(solver(b[0]), x[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(solver(b.view(2, 3, M)), x.view(2, 3, N), rtol=1e-4, atol=1e-5)
    assert solver(b.double()).dtype == torch.float64
    torch.testing.assert_close(solver(b.double()).float(), x)
    assert solver(b[:0]).shape == (0, N)
    torch.testing.assert_close(solver(b, layers=2), solver.solver(b, 2))
    assert repr(solver) == "LearnedSolver(alista, 5 layers, A of 12 × 20)"


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("cell", ["alista", "lamp"])
def test_signals_in_blocks_are_as_without(file_of, monkeypatch, cell, safeguard):
    solver, b = LearnedSolver(file_of(cell)), measurements(11).view(11, 1, M)
    whole = solver(b, safeguard=safeguard)
    monkeypatch.setattr("l2o_runtime.learned_solver.BLOCK", 4)
    parts = solver(b, safeguard=safeguard)
    assert parts.shape == (11, 1, N)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": torch.zeros(3, N)}, r"b: expected floating-point numbers \(…, 12\), got \(3, 20\)"),
        ({"b": torch.zeros(3, M, dtype=torch.int64)}, "got .* of torch.int64"),
        ({"b": torch.tensor(1.0)}, "b: expected"),
        ({"b": torch.full((M,), float("nan"))}, "b: it has numbers that are not finite"),
        ({"b": torch.zeros(M), "layers": 6}, r"layers: must be in 1\.\.5, as was trained; got 6"),
        ({"b": torch.zeros(M), "layers": 0}, r"layers: must be in 1\.\.5"),
        ({"b": torch.zeros(M), "layers": 1.5}, r"layers: must be in 1\.\.5"),
        ({"b": [0.0] * M}, "b: expected a tensor .* got list"),
        ({"b": torch.full((M,), 1e300, dtype=torch.float64)}, "b: it has numbers that are not finite in torch.float32"),
        (
            {"b": torch.zeros(M), "safeguard": True, "weight": -1.0},
            "weight: λ of the safeguard must be a finite number",
        ),
        ({"b": torch.zeros(M), "safeguard": True, "weight": float("nan")}, "weight: .* got nan"),
    ],
)
def test_what_cannot_be_solved_is_told(file_of, arguments, message):
    with pytest.raises(ConfigError, match=message):
        LearnedSolver(file_of())(**arguments)


def test_a_rule_is_no_solver():
    with pytest.raises(ArtifactError, match="which LearnedOptimizer"):
        LearnedSolver("default")


@pytest.mark.parametrize(("cell", "noise"), [("alista", 0.0), ("alista", 1.0), ("lista", 0.3), ("lamp", 0.3)])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_with_the_safeguard_no_row_is_worse_than_ista(file_of, cell, noise, size):
    solver, matrix, b = LearnedSolver(file_of(cell, noise)), matrix_of(), size * measurements(50)
    for layers, weight in ((1, None), (K, None), (K, 0.1)):
        told = 0.01 if weight is None else weight
        ista = torch.zeros(50, N)
        for _ in range(layers):
            ista = proximal_step(ista, b, matrix, lipschitz(matrix), told)
        guarded = solver(b, layers=layers, safeguard=True, weight=weight)
        assert (lasso(guarded, b, matrix, told) <= lasso(ista, b, matrix, told) * (1 + 1e-6)).all()


def test_the_safeguard_leaves_good_layers_alone(file_of):
    solver, matrix = LearnedSolver(file_of("step-lista", shrinkage=0.01)), matrix_of()
    with torch.no_grad():
        for step in solver.solver.step_size:
            step.copy_(1.2 / lipschitz(matrix))
    b = measurements()
    torch.testing.assert_close(solver(b, safeguard=True), solver(b))


def test_another_matrix_of_another_size(file_of):
    solver = LearnedSolver(file_of())
    theta = [float(value) for value in solver.solver.threshold]
    matrix = matrix_of(seed=7, rows=15, columns=30)
    assert solver.fit(matrix) is solver
    assert torch.equal(solver.matrix, matrix)
    torch.testing.assert_close(solver.solver.weight, coherent_least(matrix))
    assert [float(value) for value in solver.solver.threshold] == theta
    assert solver(torch.zeros(15)).shape == (30,)


@pytest.mark.parametrize(("rows", "columns"), [(12, 200), (8, 40), (20, 24)])
def test_steps_are_as_long_as_another_matrix_lets_them_be(file_of, rows, columns):
    """Untrained step-lista is ISTA, whatever A it began with."""
    solver, matrix = LearnedSolver(file_of("step-lista", shrinkage=0.01)), matrix_of(seed=7, rows=rows, columns=columns)
    b, ista = torch.randn(5, rows, generator=torch.Generator().manual_seed(0)), torch.zeros(5, columns)
    for _ in range(K):
        ista = proximal_step(ista, b, matrix, lipschitz(matrix), 0.01)
    torch.testing.assert_close(solver.fit(matrix)(b), ista)


@pytest.mark.parametrize(
    ("cell", "matrix", "message"),
    [
        ("lista", matrix_of(), "the weights of lista belong to its A"),
        ("alista", torch.zeros(3), r"A: expected a matrix, got \(3,\)"),
        ("alista", torch.full((3, 4), float("inf")), "A: it has numbers that are not finite"),
        ("alista", torch.ones(3, 4), "has rank 1; its 3 rows"),
    ],
)
def test_a_matrix_that_cannot_be_is_told(file_of, cell, matrix, message):
    solver = LearnedSolver(file_of(cell))
    before = solver.solver
    with pytest.raises(ConfigError, match=message):
        solver.fit(matrix)
    assert solver.solver is before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_it_goes_where_b_is(file_of):
    solver, b = LearnedSolver(file_of()), measurements()
    torch.testing.assert_close(solver(b.cuda()).cpu(), solver(b), rtol=1e-3, atol=1e-4)
