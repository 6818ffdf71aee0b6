"""The rule with two tiers: against NumPy, its symmetries, and what moves and what does not."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import Regression, flat, minibatches
from rules import RULES, first_state, make_rule
from torch import nn

from l2o_runtime import ConfigError, LearnedOptimizer, save_rule
from l2o_runtime.config import DMDConfig, NoneConfig
from l2o_runtime.contexts.dmd import DMD
from l2o_runtime.layout import Layout
from l2o_runtime.rules import StepLimits, TieredRule

CONFIG = dataclasses.replace(RULES["none-scale"], output_scale=0.01)
LIMITS = StepLimits(known_parameters=1)


def limited(known):
    """The configuration with limits from so many parameters on, or without any."""
    return dataclasses.replace(CONFIG, limits=None if known is None else StepLimits(known_parameters=known))


SHAPES = [(3, 4), (4,), (2, 2, 3), (1,), ()]
SIZE = 30


def run(rule, params, grads, losses=None, shapes=SHAPES):
    """Steps (T, n) of a rule that is shown the same parameters and gradients whatever it does."""
    state, layout = first_state(rule, (), shapes)
    steps = []
    for step, (param, grad) in enumerate(zip(params, grads, strict=True)):
        loss = torch.tensor(1.0 if losses is None else losses[step])
        delta, *state = rule(param, grad, loss, *state, *layout)
        steps.append(delta)
    return torch.stack(steps)


def wild(seed, steps=6, size=SIZE):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(steps, size, generator=rng), torch.randn(steps, size, generator=rng)


@pytest.mark.parametrize("growth", [0.1, 1.0, 3.0, 30.0])
def test_untrained_it_is_adam_with_steps_in_proportion_to_parameters(growth):
    """Against NumPy: Δ = −scale ρ u / max(RMS u, 0.1), u = m̂₁₀/√v̂₁₀₀, ρ² = mean θ² of the tensor + of all + 10⁻⁶.

    ρ is no more than 10 times that before the first step, or 1. Here parameters grow (or shrink) with every step.
    """
    params, grads = wild(0)
    params = 0.3 * params * growth ** torch.arange(len(params)).unsqueeze(-1)
    steps = run(TieredRule(CONFIG), params, grads).detach().numpy()
    theta, g = params.double().numpy(), grads.double().numpy()
    m, v = np.zeros(SIZE), np.zeros(SIZE)
    bounds = np.cumsum([0, *(math.prod(shape) for shape in SHAPES)])
    for t in range(len(g)):
        m, v = 0.9 * m + 0.1 * g[t], 0.99 * v + 0.01 * g[t] ** 2
        fast, root = m / (1 - 0.9 ** (t + 1)), np.sqrt(v / (1 - 0.99 ** (t + 1)))
        for a, b in pairwise(bounds):
            present, initial = (math.sqrt((x[a:b] ** 2).mean() + (x**2).mean() + 1e-6) for x in (theta[t], theta[0]))
            rho = min(present, max(10 * initial, 1.0))
            size = max(math.sqrt(((fast / root)[a:b] ** 2).mean()), 0.1)
            floor = 1e-6 * math.sqrt((root[a:b] ** 2).mean())
            expected = -0.01 * rho * fast[a:b] / (root[a:b] + floor) / size
            np.testing.assert_allclose(steps[t, a:b], expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
def test_steps_do_not_change_with_the_scale_of_gradients(scale):
    rule, (params, grads) = make_rule(CONFIG), wild(1)
    torch.testing.assert_close(run(rule, params, grads * scale), run(rule, params, grads), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_steps_are_in_proportion_to_the_parameters(scale):
    rule, (params, grads) = make_rule(CONFIG), wild(2)
    torch.testing.assert_close(run(rule, params * scale, grads) / scale, run(rule, params, grads), rtol=1e-3, atol=1e-5)


def test_clocks_stop_after_a_hundred_steps_but_in_meta_training():
    rule, (params, grads) = make_rule(CONFIG), wild(4)

    def step_after(steps):
        (coordinates, optimization), layout = first_state(rule, (), SHAPES)
        optimization["steps"] = torch.tensor(float(steps))
        return rule(params[0], grads[0], torch.tensor(0.0), coordinates, optimization, *layout)[0]

    # From 3,000 on an average over 100 steps is the same in float32 with and without correction of its bias.
    assert torch.equal(step_after(3_000), step_after(100_000))
    assert not torch.allclose(step_after(50), step_after(3_000), rtol=1e-3)
    rule.config = rule.config.unrolled
    assert not torch.equal(step_after(3_000), step_after(100_000))


def test_meta_training_and_evaluation_mode_compute_the_same():
    rule = make_rule(CONFIG)
    assert torch.equal(run(rule.train(), *wild(2)), run(rule.eval(), *wild(2)))


def test_the_size_of_a_step_is_bounded_by_the_magnitude_that_the_tensor_was_given():
    rule, (params, grads) = TieredRule(CONFIG), wild(3)
    steps = run(rule, params, 10 ** (6 * grads)).detach()
    for part, theta in zip(steps.split([12, 4, 12, 1, 1], -1), params.split([12, 4, 12, 1, 1], -1), strict=True):
        rho = (theta.square().mean(-1) + params.square().mean(-1) + 1e-6).sqrt()
        rho = rho.clamp_max((10 * rho[0]).clamp_min(1.0))
        assert (part.square().mean(-1).sqrt() <= 0.01 * rho * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("known", "longest"), [(1, LIMITS.largest * SIZE**-0.25), (None, math.exp(6)), (SIZE, math.exp(6))]
)
def test_in_networks_of_more_parameters_than_it_knows_directions_are_cut(known, longest):
    """In the first step u is ± 1 everywhere, and its root mean square 1."""
    rule, (params, grads) = make_rule(limited(known)), wild(6, steps=1)
    rule.cell.head.weight.zero_()
    rule.out.weight.zero_()
    rule.out.bias.zero_()
    rule.out.bias[0] = 3.0
    part = run(rule, params, grads)[0, :12]
    rho = (params[0, :12].square().mean() + params[0].square().mean() + 1e-6).sqrt()
    assert float(part.abs().max() / rho) == pytest.approx(0.01 * longest, rel=1e-4)


@pytest.mark.parametrize(("known", "factor"), [(1, SIZE**-0.25), (2, (SIZE / 2) ** -0.25), (SIZE, 1.0), (10**6, 1.0)])
def test_steps_are_shorter_in_networks_of_more_parameters_than_it_knows(known, factor):
    free, held = (make_rule(limited(number)) for number in (None, known))
    torch.testing.assert_close(run(held, *wild(0)), factor * run(free, *wild(0)))


@pytest.mark.parametrize("known", [1, 7, SIZE, 10**6])
def test_in_networks_of_more_parameters_than_it_knows_steps_fade_no_faster_than_with_the_root_of_time(known):
    """Steps are what they would be, times κ, and e^(2 s) at least (1 − κ) / √(1 + t / 25)."""
    params, grads = wild(7, steps=60)
    low, free, held = (make_rule(limited(number)) for number in (None, None, known))
    for rule, size in ((low, -4.0), (free, 0.0), (held, -4.0)):
        rule.cell.head.weight.zero_()
        rule.cell.head.bias[0] = size
    kappa = min(1.0, (known / SIZE) ** 0.25)
    times = 1 + torch.arange(60).unsqueeze(-1)
    shortest = ((1 - kappa) / (1 + times / LIMITS.fading).sqrt()).clamp_min(math.exp(-8.0))
    torch.testing.assert_close(run(held, params, grads), kappa * shortest * run(free, params, grads))
    assert known < SIZE or torch.equal(run(held, params, grads), run(low, params, grads))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"known_parameters": 0}, r"known_parameters: must be in 1\.\."),
        ({"known_parameters": 10**16}, r"known_parameters: must be in 1\.\."),
        ({"known_parameters": 1, "fading": 0.0}, r"fading: must be in \(0"),
        ({"known_parameters": 1, "largest": 0.5}, r"largest: must be in \[1"),
    ],
)
def test_bad_limits_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        StepLimits(**changes)


@pytest.mark.parametrize("stop", [0, 10**10])
def test_bad_clocks_are_refused(stop):
    with pytest.raises(ConfigError, match=r"clock_stop: must be in 1\.\."):
        dataclasses.replace(CONFIG, clock_stop=stop)


def test_coordinates_and_tensors_without_any_gradient_do_not_move():
    rule, (params, grads) = make_rule(CONFIG), wild(4)
    grads[:, ::3] = 0
    grads[:, 12:16] = 0
    steps = run(rule, params, grads)
    assert not steps[:, ::3].any()
    assert not steps[:, 12:16].any()
    assert steps[:, 1].all()
    assert steps.isfinite().all()


def test_the_order_of_tensors_does_not_matter():
    rule, (params, grads) = make_rule(CONFIG), wild(5)
    order = [3, 0, 4, 2, 1]
    pieces = torch.arange(SIZE).split([math.prod(shape) for shape in SHAPES])
    index = torch.cat([pieces[i] for i in order])
    moved = run(rule, params[:, index], grads[:, index], shapes=[SHAPES[i] for i in order])
    torch.testing.assert_close(moved, run(rule, params, grads)[:, index], rtol=1e-4, atol=1e-7)


def test_extreme_gradients_leave_the_step_finite():
    rule, (params, _) = make_rule(CONFIG), wild(6)
    for size in (0.0, 1e-38, 1e-30, 1e-20, 1e18, 3e38):
        assert run(rule, params, torch.full((6, SIZE), size)).isfinite().all()
        assert run(rule, torch.zeros(6, SIZE), torch.full((6, SIZE), size)).isfinite().all()


def test_every_weight_gets_a_meta_gradient():
    rule, (params, grads) = make_rule(RULES["dmd-sketch-scale"]).requires_grad_(), wild(7, steps=12)
    (run(rule, params, grads) * grads).sum().backward()
    for name, weight in rule.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


@pytest.mark.parametrize("window", ["exact", "sketch"])
def test_of_one_tensor_a_window_per_tensor_is_that_of_the_model(window):
    config = RULES[f"layers-{window}-scale"]
    whole = dataclasses.replace(config, context=DMDConfig(**dataclasses.asdict(config.context)))
    params, grads = wild(8, steps=12)
    steps = [run(make_rule(own), params, grads, shapes=[(SIZE,)]) for own in (config, whole)]
    torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-8)
    without = dataclasses.replace(config, context=NoneConfig())
    assert not torch.allclose(steps[0][-1], run(make_rule(without), params, grads, shapes=[(SIZE,)])[-1])


def test_a_window_per_tensor_sees_nothing_of_the_others():
    """The contexts of all tensors but one stay what they are when that one has other parameters."""
    rule = make_rule(RULES["layers-sketch-scale"])

    def last_context(factor):
        (params, grads), found = wild(9, steps=12), []

        def spy(*args):
            found.append(DMD.read(rule.context, *args))
            return found[-1]

        rule.context.read = spy
        params[:, :12] *= torch.linspace(1, factor, 12).unsqueeze(-1)
        run(rule, params, grads)
        return found[-1][0]

    one, other = last_context(1.0), last_context(3.0)
    assert one.shape == (len(SHAPES), rule.config.context.width)
    assert torch.equal(one[1:], other[1:])
    assert not torch.equal(one[0], other[0])


def test_layout_numbers_the_tensors():
    layout = Layout.of([torch.Size(shape) for shape in SHAPES])
    assert layout.owner.bincount().tolist() == [12, 4, 12, 1, 1]
    assert layout.shapes.tolist() == [[2, 12], [1, 4], [3, 12], [1, 1], [0, 1]]


def test_a_late_tensor_starts_afresh_and_the_others_go_on(tmp_path):
    """Rows belong to their parameters, whichever of them have a gradient."""
    save_rule(tmp_path / "rule.safetensors", make_rule(CONFIG))
    model = Regression()
    optimizer = LearnedOptimizer(model.parameters(), rule=tmp_path / "rule.safetensors")
    first, *others = model.parameters()
    for step, batch in enumerate(minibatches(4)):
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        if step < 2:
            first.grad = None
        before = first.detach().clone()
        optimizer.step(loss=loss)
        assert torch.equal(first, before) == (step < 2)
        assert ("tensor_h0" in optimizer.state[first]) == (step >= 2)
    assert all(optimizer.state[param]["tensor_h0"].any() for param in others)
    assert optimizer.state[first]["step"] == 2


def test_weights_are_shared_by_an_embedding_that_moves_in_few_rows(tmp_path):
    """Rows that are never looked up stay where they are, those that are move at most tenfold."""
    save_rule(tmp_path / "rule.safetensors", TieredRule(CONFIG))
    torch.manual_seed(0)
    table = nn.Embedding(1000, 4)
    optimizer, start = LearnedOptimizer(table.parameters(), rule=tmp_path / "rule.safetensors"), flat(table)
    table(torch.tensor([3, 7])).square().sum().backward()
    optimizer.step()
    moved = (flat(table) - start).view(1000, 4)
    assert moved[[3, 7]].all()
    assert moved.count_nonzero() == 8
    assert moved.abs().max() <= 10 * 0.01 * math.sqrt(2) * 1.1


def optimize(path, sizes, steps=5, dtype=torch.float32, **options):
    """Parameters and states after some steps on gradients of all magnitudes, every fifth of them zero."""
    rng = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=rng).to(dtype)) for size in sizes]
    optimizer = LearnedOptimizer(params, rule=path, **options)
    for step in range(steps):
        for param in params:
            size = torch.rand(param.shape, generator=rng)
            param.grad = (torch.randn(param.shape, generator=rng) * 10 ** (8 * size - 6)).to(dtype)
            param.grad[::5] = 0
        optimizer.step(loss=torch.tensor(1.0 / (1 + step)))
    return [param.detach() for param in params], [optimizer.state[param] for param in params]


OPTIONS = {
    "float32": {},
    "two threads": {"sizes": [5, 3 * 16384 + 11, 40_000], "steps": 2},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "state in bfloat16": {"state_dtype": torch.bfloat16},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "safeguard": {"safeguard": "adam", "steps": 60},
}


CASES = [("none-scale", options) for options in OPTIONS]
# Over many steps eigenvalues of almost static windows take rounding for motion.
CASES += [("dmd-sketch-scale", options) for options in OPTIONS if options != "safeguard"]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_kernel_does_what_the_plain_loop_does(tmp_path, monkeypatch, name, options):
    path = tmp_path / "rule.safetensors"
    save_rule(path, make_rule(dataclasses.replace(RULES[name], horizon=200)))
    arguments = {"sizes": [1, 7, 15, 16, 17, 16383, 16385]} | OPTIONS[options]
    torch.set_num_threads(2 if options == "two threads" else 1)
    results = []
    for kernels in ("plain", ""):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        results.append(optimize(path, **arguments))
    torch.set_num_threads(1)
    (plain, plain_states), (fast, fast_states) = results
    eps = torch.finfo(plain[0].dtype).eps
    torch.testing.assert_close(fast, plain, rtol=max(2e-5, 2 * eps), atol=1e-6)
    for one, other in zip(fast_states, plain_states, strict=True):
        for key, value in one.items():
            narrow = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
            torch.testing.assert_close(value, other[key], rtol=1e-2 if narrow else 1e-4, atol=1e-6, msg=key)


def test_the_sums_do_not_depend_on_which_thread_was_faster(tmp_path):
    path = tmp_path / "rule.safetensors"
    save_rule(path, make_rule(CONFIG))
    torch.set_num_threads(2)
    first, *others = (optimize(path, [100_000], steps=3)[0][0] for _ in range(4))
    torch.set_num_threads(1)
    assert all(torch.equal(first, other) for other in others)
