"""The directional rule: what it is before meta-training, and what no weights can make of it."""

import math

import pytest
import torch
from torch import nn

from l2o_runtime import LearnedOptimizer, make_rule, save_rule
from l2o_runtime.rules import DirectionalConfig
from l2o_runtime.rules.orthogonal import (
    grid_of,
    orthogonalise,
    orthogonalise_all,
    orthogonalise_each,
    orthonormal,
    squares,
    whitened,
    whitening,
)
from l2o_runtime.rules.steering import correction
from l2o_runtime.state import zeros

WIDE = DirectionalConfig(rank=64)
"""Of all matrices here no singular value is left over."""


@pytest.fixture
def untrained(tmp_path):
    path = tmp_path / "rule.safetensors"
    torch.manual_seed(0)
    save_rule(path, make_rule(WIDE))
    return path


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 2))


def batches(count):
    rng = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = torch.randn(16, 1, 6, 6, generator=rng)
        yield x, x.mean((1, 2, 3)).unsqueeze(-1) * torch.tensor([3.0, -2.0])


def orthogonalise_one(matrix, rank):
    return orthogonalise_each([matrix[None]], rank)[0][0]


def newton_schulz(matrix):
    """Muon's, on the whole matrix."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm()
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class HandMade:
    """The step before meta-training, written down plainly: z ← z − lr(t) ρ d / RMS(d), where θ is z, or follows it."""

    def __init__(self, params, lr, follows=False):
        self.params, self.lr, self.done = list(params), lr, 0
        self.follows = follows
        self.z, self.x = ([p.detach().clone() for p in self.params] for _ in range(2))
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]
        self.initial = None

    @torch.no_grad()
    def step(self):
        self.done += 1
        t, count = self.done, sum(p.numel() for p in self.params)
        overall = sum(p.square().sum() for p in self.params) / count
        own = [p.square().mean() for p in self.params]
        sizes = [
            x + overall / 16 if p.dim() > 1 else min(x, overall) + overall
            for p, x in zip(self.params, own, strict=True)
        ]
        rho = [math.sqrt(x + 1e-6) for x in sizes]
        self.initial = self.initial or rho
        places = zip(self.z, self.x, strict=True)
        rows = zip(self.params, places, self.m, self.v, rho, self.initial, strict=True)
        for p, (z, x), m, v, size, first in rows:
            m.lerp_(p.grad, 0.1)
            v.lerp_(p.grad.square(), 0.01)
            u = (m / (1 - 0.9**t)) / (v / (1 - 0.99**t)).sqrt()
            d, fading = u, min(1.0, float(u.square().mean().sqrt()) / 0.1)
            if p.dim() > 1:
                d = newton_schulz((0.9 * m + 0.1 * p.grad).flatten(1)).view_as(p)
            step = self.lr(t) * min(size, 2 * first) * fading * d / d.square().mean().sqrt()
            if not self.follows:
                p -= step
                continue
            z -= step
            x += (z - x) * 4 / (t + 3)
            p.copy_(z + (x - z) * t / (t + 100))


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        ({"total_steps": 40}, lambda t: 0.045 * min(1, t / 0.8) * (1 - t / 40)),
        ({}, lambda t: 0.0225 * min(1, t / 20) / (1 + t / 250) ** 0.75),
        ({"schedule": "constant", "lr": 0.5}, lambda t: 0.0075),
    ],
)
def test_untrained_it_is_the_hand_made_step(untrained, options, lr):
    ours, plain = network(), network()
    optimizer, reference = (
        LearnedOptimizer(ours.parameters(), untrained, **options),
        HandMade(plain.parameters(), lr, follows=not options),
    )
    for x, y in batches(40):
        for model in (ours, plain):
            model.zero_grad()
            (model(x) - y).square().mean().backward()
        optimizer.step()
        reference.step()
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-3, atol=2e-5)
        if options:
            plain.load_state_dict(ours.state_dict())  # rounding is not to be amplified


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (30, 30)])
def test_large_singular_values_are_made_equal_and_the_rest_is_scaled_together(shape):
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 4))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 4))
    noise = torch.randn(shape) / math.sqrt(max(shape))
    matrix = u @ torch.diag(torch.tensor([300.0, 200.0, 100.0, 60.0])) @ v.mT + noise
    values = torch.linalg.svdvals(orthogonalise_one(matrix, 4)) / math.sqrt(max(shape))
    large, rest = values[:4], values[4:]
    assert large.min() > 0.6
    assert large.max() < 1.3
    wanted = torch.linalg.svdvals(matrix)[4:] / (0.01 * matrix.norm())  # no more than a hundredfold beside ‖M‖
    torch.testing.assert_close(rest, wanted, rtol=0.3, atol=0.1)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_all_at_once_is_one_by_one(rank):
    torch.manual_seed(0)
    shapes = [torch.Size(shape) for shape in ((4, 6), (5,), (7, 3), (2, 3, 2, 2), (1, 9))]
    tensors = [torch.randn(2, *shape) for shape in shapes]
    flat = torch.cat([t.flatten(1) for t in tensors], dim=1)
    for elementary in (False, True):
        found, inside = orthogonalise_all(flat, grid_of(shapes, rank), rank, elementary)
        for tensor, piece, there in zip(
            tensors,
            found.split([s.numel() for s in shapes], 1),
            inside.split([s.numel() for s in shapes]),
            strict=True,
        ):
            matrix = tensor.dim() > 2 and tensor.shape[1] > 1
            assert (there == matrix).all()
            for one, got in zip(tensor, piece, strict=True):
                wanted = orthogonalise_one(one.flatten(1), rank).flatten() if matrix else torch.zeros_like(got)
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_zero_and_broken_matrices_give_no_numbers_to_fear():
    for elementary in (False, True):
        for matrix in (torch.zeros(4, 5), torch.full((4, 5), 1e-38)):
            assert orthogonalise(matrix, torch.tensor(4), 2, elementary).isfinite().all()
        # What is not finite gives no error, and stays within its own matrix; such steps are not taken.
        both = torch.stack([torch.full((4, 5), math.nan), torch.ones(4, 5)])
        assert orthogonalise(both, torch.tensor(4), 2, elementary)[1].isfinite().all()
    once = torch.zeros(4, 5)
    once[1, 2] = 3.0
    assert (orthogonalise(once, torch.tensor(4), 2)[[0, 2, 3]].abs() < 1e-5).all(), "rows without gradient do not move"


def test_gradients_of_logits_lose_no_direction():
    """Their rows add up to zero: eight sums of ten rows show eight directions nevertheless, none of them rounding."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(10, 16) - torch.randn(10, 16).mean(0), full_matrices=False)
    matrix = u @ torch.diag(torch.logspace(0, -2, 10)) @ v
    matrix = matrix - matrix.mean(0)
    for elementary in (False, True):
        found = orthogonalise(matrix, torch.tensor(10), 8, elementary)
        again = orthogonalise(matrix * (1 + 1e-6 * torch.randn_like(matrix)), torch.tensor(10), 8, elementary)
        assert torch.linalg.svdvals(found)[8] > 0.6
        torch.testing.assert_close(again, found, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-25, 1e17])
def test_the_scale_of_a_matrix_changes_nothing(scale):
    torch.manual_seed(0)
    matrix = torch.randn(6, 9)
    torch.testing.assert_close(orthogonalise_one(scale * matrix, 3), orthogonalise_one(matrix, 3), rtol=1e-3, atol=1e-3)


def test_bases_are_orthonormal():
    torch.manual_seed(0)
    columns = torch.randn(3, 9, 4) * torch.tensor([1.0, 1e-2, 1e2, 1.0])
    for basis in (whitened(columns, whitening(squares(columns.mT))), orthonormal(columns)):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4).expand(3, 4, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compiled_steps_are_those_of_the_plain_loop(tmp_path, monkeypatch, dtype, threads):
    """Of vectors, matrices, convolutions and what is not contiguous, with decay, and uphill."""
    pytest.importorskip("llvmlite", reason="the CPU kernel needs llvmlite: pip install '.[fast]'")
    rule = make_rule(DirectionalConfig(hidden=4, rank=3))
    torch.manual_seed(1)
    for p in rule.parameters():
        nn.init.normal_(p, std=0.3)
    save_rule(tmp_path / "rule.safetensors", rule)
    shapes = [(5, 7), (40, 3), (10, 16), (4, 3, 3, 3), (9,), (1,), (100, 300)]
    ends = []
    for kernels in ("plain", ""):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        params.append(nn.Parameter(torch.randn(6, 4).to(dtype).t()))
        groups = [{"params": params[:4], "weight_decay": 0.1}, {"params": params[4:], "maximize": True, "lr": 0.5}]
        optimizer = LearnedOptimizer(
            groups,
            tmp_path / "rule.safetensors",
            state_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        )
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for _ in range(6):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        torch.set_num_threads(before)
        ends.append((params, optimizer.state_dict()["state"]))
    (params, states), (others, their_states) = ends
    close = {"rtol": 0, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(q, p, **close)
    torch.testing.assert_close(their_states, states, **close)


def steered(rule, grads, shapes):
    """Steering of one tensor in every step, from gradients of one that stays where it is."""
    state, kept = zeros(rule.spec.coordinate, (6,)), zeros(rule.spec.tensor, (1,))
    for grad in grads:
        sums = rule.observe(torch.ones(6), grad, state)
        steering, kept = rule.steer(sums.unsqueeze(0), shapes, torch.tensor(0.0), kept)
        _, new = rule.update(grad, torch.ones(6), steering, state)
        state |= new
        yield steering[0]


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_tensors_whose_gradients_are_zero_or_too_small_to_square_break_nothing(untrained, size):
    living, dead = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5, 2))
    start = living.detach().clone()
    optimizer = LearnedOptimizer([living, dead], untrained)
    torch.manual_seed(0)
    for _ in range(3):
        living.grad, dead.grad = torch.randn(3, 4), torch.full((5, 2), size)
        optimizer.step()
    assert living.isfinite().all()
    assert not torch.equal(living, start)
    assert torch.equal(dead, torch.ones(5, 2))
    assert optimizer.health()["steps"] == 3


def test_a_tensor_whose_gradients_were_gone_for_long_moves_again():
    """Longer than it takes for the averages of squares to become zero."""
    rule, shapes = make_rule(DirectionalConfig()), torch.tensor([[1.0, 6.0]])
    grads = [torch.ones(6), *[torch.zeros(6)] * 3000, torch.ones(6)]
    with torch.no_grad():
        found = list(steered(rule, grads, shapes))
    assert all(row.isfinite().all() for row in found)
    assert found[-2][0] == 0
    assert found[-1][0] > 0


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_size_stays_within_its_bounds_whatever_the_weights(sign, nothing_lengthens):
    rule = make_rule(DirectionalConfig())
    nn.init.constant_(rule.head.bias, sign * 1e4)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        grads = 3 + torch.randn(300, 6, generator=rng)  # noise alone would make steps fade
        found = list(steered(rule, grads, torch.tensor([[1.0, 6.0]])))
    usual = 0.015 * math.sqrt(2)  # of ones, beside ones
    assert float(found[-1][0]) / usual == pytest.approx(20 if sign > 0 else 0.25, rel=1e-3)
    assert max(float(row[0]) / usual for row in found) <= 20.01
    assert min(float(row[0]) / usual for row in found) >= 0.2499
    assert all(row[1:].abs().max() <= 1 for row in found)


def of_places(values):
    """A rule of which nothing but what places add to sizes differs from the one without."""
    rule = make_rule(DirectionalConfig(places=True))
    with torch.no_grad():
        rule.places.copy_(torch.tensor(values))
    return rule


@pytest.mark.parametrize("kernels", ["plain", "foreach", ""])
@pytest.mark.parametrize(
    ("shapes", "places"),
    [
        ([(3,), (4, 5), (4,), (5, 4), (2, 3, 3), (3, 5), (5,), ()], "ofoiiloo"),
        ([(4, 5), (5, 4)], "fl"),
        ([(4, 1), (4,)], "lo"),
        ([(4,), ()], "oo"),
        ([(4, 5), (1, 1), (5, 4)], "fil"),
    ],
)
def test_tensors_have_sizes_by_their_place(tmp_path, monkeypatch, nothing_lengthens, kernels, shapes, places):
    """The first matrix, the last, those in between and all else: after many steps each is as much longer as it says."""
    monkeypatch.setenv("L2O_KERNELS", kernels)
    values = {"f": 0.5, "i": -0.25, "l": 1.0, "o": 0.1}
    lengths = []
    for name, given in (("without", [0.0] * 4), ("with", list(values.values()))):
        path = tmp_path / f"{name}.safetensors"
        save_rule(path, of_places(given))
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = LearnedOptimizer(params, path, schedule="constant")
        for step in range(200):
            rng = torch.Generator().manual_seed(step)
            for p in params:
                nn.init.ones_(p)
                p.grad = 3 + torch.randn(p.shape, generator=rng)
            optimizer.step()
        lengths.append([(p - 1).norm().item() for p in params])
    found = [math.log(one / other) for other, one in zip(*lengths, strict=True)]
    expected = [correction(torch.tensor(values[place]), DirectionalConfig()).item() for place in places]
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("noise", "longer"), [(0.0, 20.0), (1.0, 20.0), (30.0, 1.0), (math.inf, 1.0)])
@pytest.mark.parametrize("count", [5, 400])
def test_steps_lengthen_where_there_is_far_to_go(untrained, noise, longer, count):
    """Gradients that point on lengthen steps, up to the bound; noise does not, of few coordinates either."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.ones(count))
    optimizer = LearnedOptimizer([param], untrained, schedule="constant", lr=0.1)
    for _ in range(500):
        param.grad = torch.randn(count) if math.isinf(noise) else torch.ones(count) + noise * torch.randn(count)
        optimizer.step()
    assert float(optimizer.state[param]["tensor_longer"]) == pytest.approx(longer, rel=1e-3)


def test_they_stay_as_they_are_where_they_lead_to_and_fro(untrained):
    """On a bowl steps lengthen until they reach its floor."""
    torch.manual_seed(0)
    param, far = nn.Parameter(0.01 * torch.randn(100)), 100 * torch.randn(100)
    optimizer = LearnedOptimizer([param], untrained, schedule="constant")
    found = []
    for _ in range(2000):
        param.grad = param.detach() - far
        optimizer.step()
        found.append(float(optimizer.state[param]["tensor_longer"]))
    assert 2 < found[-1] <= 20.001
    assert found == sorted(found)
    assert found[-1] == found[-500]


def test_lengthening_is_what_agrees_of_a_tensor_and_of_all_and_turning_what_agrees_of_it(untrained):
    """Beside formulas that keep all of the past."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(7, 3)), nn.Parameter(torch.randn(60))]
    optimizer = LearnedOptimizer(params, untrained, schedule="constant", lr=0.1)
    history, kept, logs, turns = [[], []], [[], []], [0.0, 0.0], [0.0, 0.0]
    for t in range(1, 151):
        for index, param in enumerate(params):
            param.grad = (index + 0.5) * torch.ones_like(param) + torch.randn_like(param)
            history[index].append(param.grad.double())
        optimizer.step()
        cosines = []
        for grads, statistics in zip(history, kept, strict=True):
            m = sum(0.01 * 0.99 ** (t - 2 - i) * grad for i, grad in enumerate(grads[:-1]))
            v = sum(0.01 * 0.99 ** (t - 1 - i) * grad.square() for i, grad in enumerate(grads)) / (1 - 0.99**t)
            x, before = grads[-1] / v.sqrt(), m / v.sqrt()
            noise = x.square().mean() * 0.01 / 1.99 * (1 - 0.99 ** (2 * t - 2))
            found = [float((x * before).mean()), float(before.square().mean()), float(noise), float(x.square().mean())]
            statistics.append(found if t > 1 else [0.0, 0.0, 0.0, found[3]])
            weights = [0.05 * 0.95 ** (t - 1 - i) / (1 - 0.95**t) for i in range(t)]
            product, energy, noise, xx = (
                sum(w * row[k] for w, row in zip(weights, statistics, strict=True)) for k in range(4)
            )
            cosines.append(product / math.sqrt((xx + 1e-6) * (energy + noise / 10 + 1e-6)))
        everywhere = (21 * cosines[0] + 60 * cosines[1]) / 81
        for index in range(2):
            known = (1 - 0.99**t) ** 2
            logs[index] += 0.05 * max(0.0, min(cosines[index], everywhere) * known - max(0.05, 0.5 / 9))
            turns[index] += 0.05 * max(0.0, cosines[index] * known - max(0.05, 0.5 / math.sqrt((21, 60)[index])))
    for key, expected in (("longer", logs), ("turned", turns)):
        found = [float(optimizer.state[param][f"tensor_{key}"].log()) for param in params]
        assert found == pytest.approx(expected, rel=1e-3)
    assert 0.1 < logs[0] < logs[1] < math.log(20)
    assert 0.05 < turns[0] < logs[0]


def test_a_matrix_whose_gradients_go_on_agreeing_turns_to_adam_s_direction(untrained):
    """Of columns in units of their own the orthogonalised step moves few; others of the network do not count."""
    torch.manual_seed(0)
    units = torch.logspace(-2, 0, 5)
    matrix, other = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(300))
    signs = torch.randn(4, 5).sign()
    optimizer = LearnedOptimizer([matrix, other], untrained, schedule="constant", lr=0.1)
    shares = []
    for _ in range(500):
        matrix.grad = units * (signs + 0.5 * torch.randn(4, 5))
        other.grad = torch.randn(300)
        before = matrix.detach().clone()
        optimizer.step()
        moved = before - matrix.detach()
        shares.append(float((moved * signs).mean() / moved.square().mean().sqrt()))
    assert max(shares[:20]) < 0.9  # of 1, were all coordinates moved alike
    assert min(shares[-20:]) > 0.97
    assert float(optimizer.state[matrix]["tensor_turned"]) == pytest.approx(20, rel=1e-3)
    assert float(optimizer.state[matrix]["tensor_longer"]) < 1.1
    assert float(optimizer.state[other]["tensor_turned"]) == 1


@pytest.mark.parametrize("value", [0.0, 0.01, 1.0])
def test_parameters_that_are_smaller_than_drawn_ones_move_as_if_they_were_not(untrained, value):
    params = [nn.Parameter(torch.full(shape, value)) for shape in ((6, 5), (7,), (2, 2))]
    before = [param.detach().clone() for param in params]
    optimizer = LearnedOptimizer(params, untrained, schedule="constant")
    torch.manual_seed(0)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    square = max(value**2, (math.sqrt(30) + math.sqrt(7) + 2) / 12 / 41)
    moved = [(param - old).square().mean().sqrt().item() / 0.015 for param, old in zip(params, before, strict=True)]
    wanted = [math.sqrt(share * square + 1e-6) for share in (1 + 1 / 16, 2, 1 + 1 / 16)]
    assert moved == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("started", [0.0, 0.001])
def test_a_model_of_zeros_or_nearly_gets_as_far_as_one_that_is_drawn(untrained, started):
    """Weights that are drawn are of 0.07 here, and 0.03 is about half of it."""
    ends = []
    for deviation in (started, 0.03):
        torch.manual_seed(0)
        layer, x = nn.Linear(64, 10), torch.randn(256, 64)
        target = (x @ torch.randn(64, 10)).argmax(1)
        for param in layer.parameters():
            nn.init.normal_(param, std=deviation)
        optimizer = LearnedOptimizer(layer.parameters(), untrained, total_steps=200)
        for _ in range(200):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(layer(x), target)
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] < 1.3 * ends[1] < 0.1


@pytest.mark.parametrize(("start", "size"), [(0.02, 0.2), (100.0, 100.0), (0.0, 2.887), (-0.02, 0.2)])
def test_a_scalar_may_have_a_unit_of_its_own(untrained, start, size):
    """Beside one of 100 it moves by ten times its own size, and by no less once it passes through zero."""
    scalar, other = nn.Parameter(torch.tensor(start)), nn.Parameter(torch.tensor(100.0))
    optimizer = LearnedOptimizer([scalar, other], untrained, schedule="constant")
    for _ in range(20):
        before = scalar.item()
        scalar.grad, other.grad = torch.tensor(0.5 if start >= 0 else -0.5), torch.tensor(0.0)
        optimizer.step()
        assert 0.99 < abs(scalar.item() - before) / (0.015 * size) < 2.02, "it grows at most twofold"


def test_time_alone_changes_nothing(nothing_lengthens):
    """The same gradients again and again: what it makes of them settles, and stays.

    Their mean is not zero, so steps would lengthen up to their bound.
    """
    torch.manual_seed(0)
    rule = make_rule(DirectionalConfig())
    nn.init.normal_(rule.head.weight)
    grads = torch.randn(50, 6).repeat(60, 1)
    with torch.no_grad():
        found = torch.stack(list(steered(rule, grads, torch.tensor([[1.0, 6.0]]))))
    torch.testing.assert_close(found[1500:1550], found[2950:3000], rtol=1e-3, atol=1e-5)


def test_the_scale_of_gradients_changes_nothing(untrained):
    ends = []
    for scale in (1.0, 1e-4, 1e4):
        model = network()
        optimizer = LearnedOptimizer(model.parameters(), untrained)
        for x, y in batches(10):
            model.zero_grad()
            (scale * (model(x) - y).square().mean()).backward()
            optimizer.step()
        ends.append(nn.utils.parameters_to_vector(model.parameters()))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-3, atol=1e-4)


def test_a_tensor_without_gradient_does_not_spoil_the_others(untrained):
    layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    optimizer = LearnedOptimizer(layers.parameters(), untrained)
    before = [param.detach().clone() for param in layers.parameters()]
    for _ in range(3):
        for index, param in enumerate(layers.parameters()):
            param.grad = torch.ones_like(param) if index else torch.zeros_like(param)
        optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(layers.parameters(), before, strict=True)]
    assert moved == [False, True, True, True]
    assert all(p.isfinite().all() for p in layers.parameters())


def test_steps_fade_where_gradients_are_gone(untrained):
    layer = nn.Linear(6, 5)
    optimizer = LearnedOptimizer(layer.parameters(), untrained, schedule="constant")
    torch.manual_seed(0)
    for step in range(400):
        for param in layer.parameters():
            param.grad = torch.randn_like(param) if step < 50 else torch.zeros_like(param)
        layer.bias.grad[0] = 1e-30  # or the step is not taken at all
        if step == 100:
            before = layer.weight.detach().clone()
        optimizer.step()
    assert (layer.weight - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize(
    ("matrices", "gains", "factor"),
    [(1, 0, 1.0), (5, 0, 1.0), (10, 0, 0.5), (20, 0, 0.25), (40, 0, 0.25), (20, 1, 0.5), (20, 9, 1.0)],
)
def test_steps_are_shorter_where_many_matrices_follow_one_another(untrained, matrices, gains, factor):
    """Norms count by their gains, which are ones at first and may be anything later; biases and scalars do not."""
    torch.manual_seed(0)
    layers = [nn.Parameter(torch.randn(4, 4)) for _ in range(matrices)]
    norms, other = [nn.Parameter(torch.ones(4)) for _ in range(gains)], nn.Parameter(0.3 * torch.ones(4))
    scalar = nn.Parameter(torch.ones(()))
    params = [*layers, *norms, other, scalar]
    optimizer = LearnedOptimizer(params, untrained, schedule="constant", lr=0.1)
    for _ in range(3):
        before = [layer.detach().clone() for layer in layers]
        size = (sum(p.square().sum() for p in params if p.dim()) / sum(p.numel() for p in params if p.dim())).sqrt()
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        with torch.no_grad():
            moved = layers[0] - before[0]
            rho = (before[0].square().mean() + (size / 4) ** 2).sqrt()
            assert float(moved.square().mean().sqrt() / (0.1 * 0.015 * rho)) == pytest.approx(factor, rel=1e-3)
            for norm in norms:
                norm.mul_(0.1)
    found = [float(optimizer.state[param]["tensor_gain"]) for param in (*norms, layers[0], other, scalar)]
    assert found == [1.0] * gains + [0.0] * 3
