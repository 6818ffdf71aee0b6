"""Cells of unrolled solvers against the published recurrences in plain numpy, and the matrices that belong to A."""

import math

import numpy as np
import pytest
import torch

from l2o_runtime import ConfigError
from l2o_runtime.solvers import AMP, FISTA, ISTA, Point, UnrolledConfig, UnrolledSolver
from l2o_runtime.solvers.analytic import coherence, coherent_least, coherent_least_by_gradient, lipschitz
from l2o_runtime.solvers.cells import CELLS, momentum
from l2o_runtime.solvers.thresholds import chosen_support, kth_largest, posterior_mean, shrink, shrink_rest

M, N, K, B = 12, 20, 5, 3


def matrix_of(seed=0, rows=M, columns=N):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return matrix / matrix.norm(dim=0)


def solver_of(cell, *, noise=0.02, **keys):
    """A solver of random variables near those that it begins with."""
    solver = UnrolledSolver(UnrolledConfig(cell=cell, rows=M, columns=N, layers=K, **keys))
    solver.fit_to(matrix_of())
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=rng)
    return solver


def measurements(seed=2):
    return torch.randn(B, M, generator=torch.Generator().manual_seed(seed))


def soft(x, theta):
    return np.sign(x) * np.maximum(np.abs(x) - theta, 0)


def soft_but_largest(x, theta, count):
    out = soft(x, theta)
    for row, (values, old) in enumerate(zip(x, out, strict=True)):
        for index in np.argsort(-np.abs(values))[:count]:
            if abs(values[index]) > theta:
                out[row, index] = old[index] + np.sign(values[index]) * theta
    return out


def plain(cell, solver, b):
    """x after every layer, written as the papers have it, with column vectors."""
    value = {name: [p.detach().double().numpy() for p in getattr(solver, name)] for name in solver.names}
    a, b = solver.matrix.double().numpy(), b.double().numpy().T
    config, x, found = solver.config, np.zeros((N, B)), []
    v = before = support = np.zeros(1)
    for k in range(K):
        theta = value.get("threshold", [0] * K)[k]
        count = round(min(config.percent * (k + 1), config.most) / 100 * N)
        if cell == "lista":
            new = soft(value["encoder"][0].T @ b + value["mutual"][k].T @ x, theta)
        elif cell == "lista-cp":
            new = soft(x + value["weight"][k].T @ (b - a @ x), theta)
        elif cell == "lista-cpss":
            new = soft_but_largest((x + value["weight"][k].T @ (b - a @ x)).T, theta, count).T
        elif cell == "alista":
            w = solver.weight.double().numpy()
            new = soft_but_largest((x + value["step_size"][k] * w.T @ (b - a @ x)).T, theta, count).T
        elif cell == "lfista":
            inertia = value["inertia"][k].T @ before if k else 0
            new = soft(value["encoder"][0].T @ b + value["mutual"][k].T @ x + inertia, theta)
        elif cell == "lamp":
            v = b - a @ x + (x != 0).sum(0) / M * v
            new = soft(x + value["weight"][k].T @ v, value["tuning"][k] * np.linalg.norm(v, axis=0) / M**0.5)
        elif cell == "glista":
            gate = value["gate"][k][:, None] * np.abs(x)
            y = x * (1 + value["gain"][k] * np.maximum(1 - np.maximum(gate, 0), 0))
            z = y + value["weight"][k].T @ (b - a @ y)
            moved = soft_but_largest(z.T, theta, count).T
            over = 1 + value["overshoot"][k] * theta * (1 - support) / (np.abs(moved - x) + 0.1)
            new = over * moved + (1 - over) * x
            kept = np.sort(np.abs(z), axis=0)[-count] if count else np.full(B, np.inf)
            support = ((np.abs(z) >= kept) & (np.abs(z) > theta)).astype(float)
        elif cell == "step-lista":
            alpha = value["step_size"][k]
            new = soft(x + alpha * a.T @ (b - a @ x), config.shrinkage * alpha)
        else:
            w, gamma = np.linalg.pinv(a), value["step_size"][k]
            error = np.maximum((np.linalg.norm(b - a @ x, axis=0) ** 2 - M * config.noise) / np.trace(a.T @ a), 1e-12)
            tau = error / N * (N + (gamma**2 - 2 * gamma) * M) + gamma**2 * config.noise / N * np.trace(w @ w.T)
            r, p, xi = x + gamma * w @ (b - a @ x), config.sparsity, 1 + tau
            gauss = [np.exp(-(r**2) / 2 / s) / np.sqrt(s) for s in (tau, xi)]
            new = r / xi * p * gauss[1] / ((1 - p) * gauss[0] + p * gauss[1])
        before, x = x, new
        found.append(x.T)
    return found


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("start", ["ista", "analytic"])
def test_layers_are_the_published_ones(cell, start):
    solver = solver_of(cell, start=start, percent=10.0, most=25.0, noise=0.01, gain_size=0.5)
    b = measurements()
    for layers, expected in enumerate(plain(cell, solver, b), 1):
        found = solver(b, layers).detach().double().numpy()
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("cell", ["lista", "lista-cp", "lista-cpss", "glista", "step-lista"])
def test_untrained_they_are_ista(cell):
    keys = {"percent": 0.0, "gain_size": 0.0}
    solver = UnrolledSolver(UnrolledConfig(cell=cell, rows=M, columns=N, layers=K, shrinkage=0.1, **keys))
    solver.fit_to(matrix_of())
    torch.testing.assert_close(solver(measurements()), run(ISTA(0.1), measurements()))


def test_untrained_lfista_and_lamp_are_fista_and_amp():
    for cell, classical, shrinkage in (("lfista", FISTA(0.1), 0.1), ("lamp", AMP(1.2), 1.2)):
        solver = UnrolledSolver(UnrolledConfig(cell=cell, rows=M, columns=N, layers=K, shrinkage=shrinkage))
        solver.fit_to(matrix_of())
        torch.testing.assert_close(solver(measurements()), run(classical, measurements()), rtol=1e-4, atol=1e-5)


class Given:
    """Problems of which all is known but the solution."""

    def __init__(self, b):
        from l2o_runtime.solvers import Structure

        self.params, self.shapes, self.steps = torch.zeros(len(b), N), [torch.Size([N])], None
        self.structure = Structure(matrix=matrix_of(), target=b, weight=0.1)


def run(solver, b, steps=K):
    state, x = solver.init(Given(b)), torch.zeros(len(b), N)
    for _ in range(steps):
        x, state = solver.step(Point(x, torch.zeros(len(b)), torch.zeros_like(x)), state)
    return x.detach()


@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_the_layers_and_rows_know_nothing_of_each_other(cell):
    solver, b = solver_of(cell), measurements()
    torch.testing.assert_close(run(solver, b), solver(b).detach())
    torch.testing.assert_close(solver(b[1]), solver(b)[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(solver(b.expand(2, 2, B, M))[1, 0], solver(b), rtol=1e-4, atol=1e-5)
    assert torch.equal(run(solver, b, K + 3), run(solver, b)), "after the last layer it stays"


def test_fista_finds_what_coordinate_descent_finds():
    from sklearn.linear_model import Lasso

    b, weight = measurements(), 0.1
    found = run(FISTA(weight), b, 3000)
    for row, target in zip(found, b, strict=True):
        oracle = Lasso(alpha=weight / M, fit_intercept=False, tol=1e-10, max_iter=100_000)
        oracle.fit(matrix_of().double().numpy(), target.double().numpy())
        np.testing.assert_allclose(row.numpy(), oracle.coef_, atol=1e-4)


def test_both_ways_to_the_analytic_weight_agree():
    matrix = matrix_of()
    closed, descended = coherent_least(matrix), coherent_least_by_gradient(matrix, 20_000)
    torch.testing.assert_close(closed, descended, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((closed * matrix).sum(0), torch.ones(N))
    off = [float((weight.T @ matrix - torch.eye(N)).square().sum()) for weight in (closed, matrix)]
    assert off[0] < 0.9 * off[1]


def test_the_analytic_weight_of_a_gaussian_matrix_is_less_coherent():
    matrix = matrix_of(rows=50, columns=100)
    assert coherence(coherent_least(matrix), matrix) < coherence(matrix, matrix)


def test_dependent_rows_are_told():
    matrix = matrix_of()
    matrix[1] = 2 * matrix[0]
    for cell in ("alista", "tista"):
        solver = UnrolledSolver(UnrolledConfig(cell=cell, rows=M, columns=N, layers=2))
        with pytest.raises(ConfigError, match="has rank 11; its 12 rows must not depend"):
            solver.fit_to(matrix)
    assert coherent_least_by_gradient(matrix, 10).isfinite().all()


def test_lipschitz_bounds_the_curvature():
    matrix = matrix_of()
    largest = torch.linalg.eigvalsh(matrix.T @ matrix)[-1]
    assert largest < lipschitz(matrix) < 1.002 * largest


def test_the_support_passes_and_the_rest_is_shrunk():
    x, theta = torch.tensor([[3.0, -2.0, 1.5, 0.2]]), torch.tensor(0.5)
    support = chosen_support(x, theta, 2)
    assert shrink_rest(x, theta, support).tolist() == [[3.0, -2.0, 1.0, 0.0]]
    assert chosen_support(x, torch.tensor(2.5), 3).tolist() == [[1.0, 0.0, 0.0, 0.0]], "only above the threshold"
    assert torch.equal(shrink_rest(x, theta, chosen_support(x, theta, 0)), shrink(x, theta))
    assert chosen_support(x, theta, 4).tolist() == [[1.0, 1.0, 1.0, 0.0]], "as many as there are"
    assert chosen_support(torch.tensor([3.0, -2.0, 2.0]), theta, 2).tolist() == [1.0, 0.0, 0.0], "equal ones"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 40), (2, 5, 9), (0, 6)])
def test_the_kth_largest_is_that_of_a_sorted_row(shape: tuple[int, ...], dtype: torch.dtype):
    size = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(3)).to(dtype)  # with ties
    for count in range(1, shape[-1] + 1):
        expected = size.sort(dim=-1, descending=True).values[..., count - 1 : count]
        assert torch.equal(kth_largest(size, count), expected)


def test_a_number_that_is_none_counts_as_the_largest():
    row = torch.tensor([[1.0, math.nan, 3.0, math.inf]])
    assert [float(kth_largest(row, count)) for count in (2, 3, 4)] == [math.inf, 3.0, 1.0]
    assert kth_largest(row, 1).isnan().all()
    assert row.topk(1).values.isnan().all()


def test_thresholds_may_be_negative_and_have_gradients():
    theta = torch.tensor(-0.5, requires_grad=True)
    out = shrink(torch.tensor([-1.0, 0.0, 2.0]), theta)
    assert out.tolist() == [-1.5, 0.0, 2.5]
    out.square().sum().backward()
    assert theta.grad == pytest.approx(-8.0)


def test_the_posterior_mean_is_the_integral():
    variance, p, x = 0.3, 0.2, 0.8
    s = np.linspace(-12, 12, 400_001)
    slab = p * np.exp(-(s**2) / 2) / np.sqrt(2 * np.pi) * np.exp(-((x - s) ** 2) / 2 / variance)
    spike = (1 - p) * np.exp(-(x**2) / 2 / variance)
    expected = np.trapezoid(s * slab, s) / (np.trapezoid(slab, s) + spike)
    found = posterior_mean(torch.tensor([x]), torch.tensor([variance]), p)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_momentum_is_that_of_fista():
    t = [1.0]
    for _ in range(5):
        t.append((1 + (1 + 4 * t[-1] ** 2) ** 0.5) / 2)
    assert momentum(5) == pytest.approx([0, *((t[k] - 1) / t[k + 1] for k in range(4))])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cell": "list"}, "did you mean lista"),
        ({"cell": "lista", "rows": 512, "columns": 1024}, "17,.* numbers, more than a file has"),
        ({"layers": 0}, "layers: must be in"),
        ({"percent": 101.0}, "percent: must be in 0..100"),
        ({"sparsity": 1.0}, "sparsity: must be between"),
        ({"noise": -1.0}, "noise: must be 0 or more"),
    ],
)
def test_what_cannot_be_is_told(keys, message):
    with pytest.raises(ConfigError, match=message):
        UnrolledConfig(**keys)


@pytest.mark.parametrize("cell", CELLS)
def test_weights_are_counted(cell):
    solver = solver_of(cell)
    counted = sum(value.numel() for value in solver.state_dict().values())
    assert counted <= solver.config.weights <= counted + 3 * K
