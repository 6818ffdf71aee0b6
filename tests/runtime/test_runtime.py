"""Window, sketch, features, cell and contexts, each against a plain reference."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import RULES, first_state, make_rule
from torch import nn

from l2o_runtime import ConfigError, LearnedOptimizer, RuleConfig
from l2o_runtime.config import (
    DMDConfig,
    FlagConfig,
    KAEConfig,
    NoneConfig,
    PlaceboConfig,
    WindowConfig,
    build_union,
    to_dict,
)
from l2o_runtime.contexts import KAE, make_context
from l2o_runtime.contexts.gram import GramWindow, LossWindow
from l2o_runtime.contexts.kae import rotate
from l2o_runtime.contexts.progress import Progress
from l2o_runtime.contexts.sketch import count_sketch
from l2o_runtime.files.artifact import save_rule
from l2o_runtime.rules import AnyRuleConfig, LSTMConfig, MomentsConfig
from l2o_runtime.rules import make_rule as new_rule
from l2o_runtime.rules.coordinate_lstm import CoordinateLSTM
from l2o_runtime.rules.features import FEATURE_SPECS, features_of, log_sign
from l2o_runtime.state import LARGEST, zeros


def run_window(window: GramWindow, snapshots: np.ndarray, parts: int = 1) -> dict[str, torch.Tensor]:
    """Feed [θ; L] columns through a window, θ split into parts."""
    theta = torch.tensor(snapshots[:-1], dtype=torch.float32)
    pieces = theta.tensor_split(parts)
    coordinates = [zeros(window.coordinate_spec, (len(piece),)) for piece in pieces]
    context = zeros(window.context_spec, ())
    for t in range(snapshots.shape[1]):
        statistics, offset = torch.zeros(()), 0
        for i, piece in enumerate(pieces):
            statistics = statistics + window.observe(piece[:, t], coordinates[i], offset)
            coordinates[i] = window.remember(piece[:, t], coordinates[i])
            offset += len(piece)
        context = window.advance(statistics, torch.tensor(snapshots[-1, t]), context)
    return context


@pytest.mark.parametrize("parts", [1, 3])
def test_sliding_gram_equals_one_from_scratch(snapshots, parts):
    window = GramWindow(WindowConfig(window=10))
    state = run_window(window, snapshots[:, :50], parts)
    s = snapshots[:, 39:50].copy()
    s[:-1] = s[:-1].astype(np.float32)
    np.testing.assert_allclose(window.snapshot_gram(state).numpy(), s.T @ s, rtol=1e-12)
    assert window.full(state)


def test_sketched_gram_is_close_and_additive(snapshots):
    window = GramWindow(WindowConfig(window=10, sketch=1024))
    state = run_window(window, snapshots[:, :50])
    s = snapshots[:, 39:50]
    gram = window.snapshot_gram(state).numpy()
    assert np.abs(gram - s.T @ s).max() < 0.1 * np.abs(s.T @ s).max()
    np.testing.assert_allclose(run_window(window, snapshots[:, :50], 3)["gram"], state["gram"], rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), cut=st.integers(0, 300), offset=st.integers(0, 2**40), d=st.sampled_from([8, 100]))
def test_sketch_is_linear_and_additive(n, cut, offset, d):
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    cut = min(cut, n)
    whole = count_sketch(x, d, offset)
    torch.testing.assert_close(whole, count_sketch(x[:cut], d, offset) + count_sketch(x[cut:], d, offset + cut))
    torch.testing.assert_close(count_sketch(-2 * x, d, offset), -2 * whole)


def test_sketch_keeps_inner_products():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20_000, generator=rng)
    y = x + 0.5 * y
    for d in (256, 4096):
        error = (count_sketch(x, d) @ count_sketch(y, d) - x @ y).abs() / (x.norm() * y.norm())
        assert error < 4 * math.sqrt(2 / d)


def test_log_sign_against_its_definition():
    grads = torch.tensor([0.0, 1e-6, -1e-3, 1.0, -20.0])
    logarithms, signs = (feature.tolist() for feature in log_sign(grads).features)
    for g, a, b in zip(grads.tolist(), logarithms, signs, strict=True):
        large = abs(g) >= math.exp(-10)
        assert a == pytest.approx(math.log(abs(g)) / 10 if large else -1, abs=1e-6)
        assert b == pytest.approx(math.copysign(1, g) if large else math.exp(10) * g, abs=1e-6)


def test_normalized_equals_adam_statistics():
    state = {key: torch.zeros(4) for key in ("m", "v", "step")}
    m = v = np.zeros(4)
    for t in range(1, 20):
        g = torch.randn(4, generator=torch.Generator().manual_seed(t))
        seen, state = features_of("normalized", g, torch.zeros(4), torch.zeros(1), state)
        m, v = 0.95 * m + 0.05 * g.numpy(), 0.95 * v + 0.05 * g.numpy() ** 2
        root = np.sqrt(v / (1 - 0.95**t)) + 1e-8
        np.testing.assert_allclose(seen.features[0], m / (1 - 0.95**t) / root, rtol=2e-5)
        np.testing.assert_allclose(seen.features[1], g.numpy() / root, rtol=2e-5)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_moments_against_their_definition_whatever_the_scale_of_gradients(scale):
    """Averages and their bias corrections in float64 NumPy; the level stands for the scale."""
    rng = np.random.default_rng(0)
    grads, theta = rng.normal(size=(60, 5)), rng.normal(size=5)
    grads[:, 4] = 0
    state = {key: torch.zeros(5) for key in FEATURE_SPECS["moments"]}
    for grad in grads:
        level = torch.tensor([np.log(scale)], dtype=torch.float32)
        g, param = torch.tensor(scale * grad).float(), torch.tensor(theta).float()
        seen, state = features_of("moments", g, param, level, state)

    def average(values, span):
        weights = (1 - 1 / span) ** np.arange(len(values))[::-1] / span
        return (weights[:, None] * values).sum(0) / weights.sum()

    m, slow = (average(grads, span) for span in (10, 100))
    v10, v100, v1000 = (average(grads**2, span) for span in (10, 100, 1000))
    root = np.sqrt(v1000) + 1e-6
    expected = [
        grads[-1] / root,
        m / root,
        slow / root,
        np.clip(grads[-1] * m / root**2, -3, 3),
        np.log((v10 + 1e-12) / (v100 + 1e-12)) / 2,
        np.log((v100 + 1e-12) / (v1000 + 1e-12)) / 2,
        np.clip(np.log(v1000 + 1e-12) / 8, -3, 3),
        np.log(np.abs(slow / root) + 1e-3) / 3 + 1,
        np.log(np.abs(theta) + 1e-4) / 3 + 1,
        np.clip(10 * theta, -3, 3),
        grads[0] != 0,
    ]
    np.testing.assert_allclose(np.stack(seen.features), np.stack(expected), rtol=2e-4, atol=2e-5)
    directions = np.stack([m / root, grads[0] != 0, slow / root, grads[-1] / root])
    np.testing.assert_allclose(np.stack(seen.directions), directions, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1e-30, 1e30])
def test_moments_are_finite_whatever_the_size_of_gradients(scale):
    """Also where squares vanish in float32: the logarithm of zero is infinite, and a difference of two such is NaN."""
    state = {key: torch.zeros(3) for key in FEATURE_SPECS["moments"]}
    level = torch.tensor([max(scale, 1e-18)]).clamp_max(LARGEST).log()
    for _ in range(3):
        seen, state = features_of("moments", torch.tensor([scale, 0.0, -scale]), torch.ones(3), level, state)
        features, directions = torch.stack(seen.features), torch.stack(seen.directions)
        assert features.isfinite().all()
        assert directions.isfinite().all()
        assert (directions[:, 1] == 0).all()


def test_a_new_moments_rule_is_adam(tmp_path):
    rule = new_rule(MomentsConfig())
    save_rule(tmp_path / "rule.safetensors", rule, {})
    target = torch.linspace(-1, 1, 7)
    params = [torch.nn.Parameter(torch.ones(7)) for _ in range(2)]
    ours = LearnedOptimizer([params[0]], tmp_path / "rule.safetensors")
    adam = torch.optim.Adam([params[1]], lr=0.01, betas=(0.9, 0.999), eps=1e-12)
    for _ in range(50):
        for param, optimizer in zip(params, (ours, adam), strict=True):
            param.grad = param.detach() - target
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-4, atol=1e-4)


def test_where_there_was_never_a_gradient_a_moments_rule_does_not_move(tmp_path):
    save_rule(tmp_path / "rule.safetensors", make_rule(RULES["dmd-sketch-moments"]), {})
    param = torch.nn.Parameter(torch.ones(20))
    optimizer = LearnedOptimizer([param], tmp_path / "rule.safetensors")
    for step in range(20):
        param.grad = torch.where(torch.arange(20) < 10, torch.randn(20), 0.0)
        optimizer.step(loss=1.0 + step)
    assert torch.equal(param[10:], torch.ones(10))
    assert (param[:10] != 1).all()


def test_progress_against_its_definition():
    """The loss is hidden at first, and once later; one coordinate never had a gradient before."""
    losses = [0, 0, 3.0, 2.0, 0, 1.5, 1.0]
    rng = np.random.default_rng(0)
    grads, averages = rng.normal(size=(len(losses), 6)), {"m10": rng.normal(size=6), "v1000": rng.uniform(1, 2, size=6)}
    averages["v1000"][5] = 0
    coordinates = {key: torch.tensor(value).float() for key, value in averages.items()}
    progress = Progress()
    state = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in progress.context_spec.items()}
    for loss, grad in zip(losses, grads, strict=True):
        halves = torch.tensor(grad).float().split(3)
        split = [{key: value[part] for key, value in coordinates.items()} for part in (slice(3), slice(3, 6))]
        statistics = sum(
            progress.observe(half, part["m10"], part["v1000"]) for half, part in zip(halves, split, strict=True)
        )
        vector, state = progress.read(statistics, torch.tensor(float(loss)), state)
    logs = np.log([loss for loss in losses if loss])
    fast, slow = (np.average(logs, weights=(1 - 1 / span) ** np.arange(len(logs))[::-1]) for span in (10, 50))
    energy = np.average((grads**2).mean(-1), weights=0.99 ** np.arange(len(losses))[::-1])
    g, m = (x[:5] / np.sqrt(averages["v1000"][:5]) for x in (grads[-1], averages["m10"]))
    cosine = g @ m / np.linalg.norm(g) / np.linalg.norm(m)
    expected = [np.log(energy) / 2, 7 / 17, 7 / 107, 7 / 1007, 5 * (fast - slow), fast - np.log(3), 1, cosine]
    np.testing.assert_allclose(vector.numpy(), [*expected, np.log(m @ m / (g @ g)) / 4], rtol=1e-4)


def test_lstm_equals_torchs_cells():
    torch.manual_seed(0)
    ours = CoordinateLSTM(2, 3, 5, 2)
    cells = [nn.LSTMCell(5, 5), nn.LSTMCell(5, 5)]
    with torch.no_grad():
        for layer, cell in enumerate(cells):
            weight = ours.weight_ih[layer]
            cell.weight_ih.copy_(torch.cat([weight, ours.weight_context], 1) if layer == 0 else weight)
            cell.weight_hh.copy_(ours.weight_hh[layer])
            cell.bias_ih.copy_(ours.bias[layer])
            cell.bias_hh.zero_()
    state = zeros(ours.coordinate_spec, (7,))
    plain = [(torch.zeros(7, 5), torch.zeros(7, 5)) for _ in cells]
    for _ in range(4):
        x, context = torch.randn(7, 2), torch.randn(3)
        output, state = ours(x, context, state)
        h = torch.cat([x, context.expand(7, 3)], 1)
        for layer, cell in enumerate(cells):
            plain[layer] = cell(h, plain[layer])
            h = plain[layer][0]
        torch.testing.assert_close(output, ours.head(h))


def test_batched_and_single_runs_agree(rule):
    """A batch of optimizations gives what each alone gives."""
    torch.manual_seed(1)
    shapes = [(2, 3), (5,)]
    state, layout = first_state(rule, (3,), shapes)
    single = [first_state(rule, (), shapes)[0] for _ in range(3)]
    for _ in range(9):
        param, grad, loss = torch.randn(3, 11), torch.randn(3, 11), torch.rand(3)
        delta, *state = rule(param, grad, loss, *state, *layout)
        for i in range(3):
            one, *single[i] = rule(param[i], grad[i], loss[i], *single[i], *layout)
            torch.testing.assert_close(delta[i], one, rtol=1e-4, atol=1e-5)


def network(rule):
    """Weights of the network that sees the context."""
    weights = getattr(rule, "cell", rule).state_dict()
    return {name: tensor for name, tensor in weights.items() if not name.startswith("context.")}


def test_same_seed_gives_the_same_cell_whatever_the_context(rule):
    """A placebo of the same width has all of its weights, a rule without context all but the context's."""
    width = rule.config.context.width
    cell = network(rule)
    none = network(make_rule(dataclasses.replace(rule.config, context=NoneConfig())))
    units, seen = cell["weight_context"].shape
    assert none.pop("weight_context").shape == (units, seen - width)
    control = PlaceboConfig(width=width) if width else NoneConfig()
    placebo = network(make_rule(dataclasses.replace(rule.config, context=control)))
    assert cell.keys() == placebo.keys() == none.keys() | {"weight_context"}
    for name, tensor in cell.items():
        assert torch.equal(tensor, placebo[name]), name
        assert name == "weight_context" or torch.equal(tensor, none[name]), name


def test_dmd_is_zero_until_the_window_is_full_and_held_in_between():
    context = make_context(DMDConfig(window=4, rank=1, every=3))
    coordinates, state = zeros(context.coordinate_spec, (6,)), zeros(context.context_spec, ())
    seen = []
    for t in range(12):
        theta = torch.sin(torch.arange(6.0) + 0.3 * t)
        statistics = context.observe(theta, -theta, coordinates, 0)
        coordinates = context.remember(theta, -theta, coordinates)
        features, state = context.read(statistics, torch.tensor(1.0 / (t + 1)), state)
        seen.append(features)
    assert all(not f.any() for f in seen[:4])
    assert all(f[-1] == 1 for f in seen[4:]), "the ready flag"
    assert torch.equal(seen[4], seen[5])
    assert torch.equal(seen[5], seen[6])
    assert not torch.equal(seen[6], seen[7])


def contexts_of(config: RuleConfig, steps: int) -> list[torch.Tensor]:
    """The contexts of a smooth optimization of six coordinates."""
    rule = make_rule(config)
    state = zeros(rule.spec.coordinate, (6,)), zeros(rule.spec.model, ())
    seen = []
    for t in range(steps):
        theta, grad = torch.sin(torch.arange(6.0) + 0.3 * t), torch.cos(torch.arange(6.0) + 0.3 * t)
        sums = rule.observe(theta, grad, state[0]).unsqueeze(-2)
        context, optimization = rule.steer(sums, None, torch.tensor(0.9**t), state[1])
        _, coordinates = rule.update(grad, theta, context, state[0])
        state = coordinates, optimization
        seen.append(context.squeeze(-2))
    return seen


@pytest.mark.parametrize("window", [2, 7])
def test_the_flag_rises_when_the_window_is_full(window):
    flags = torch.cat(contexts_of(LSTMConfig(context=FlagConfig(window=window)), 12))
    assert flags.tolist() == [0.0] * window + [1.0] * (12 - window)
    ready = [context[-1] for context in contexts_of(LSTMConfig(context=DMDConfig(window=window)), 12)]
    assert torch.equal(flags, torch.stack(ready)), "as that of DMD"


def test_a_diverged_run_gives_a_context_of_zeros():
    rule = make_rule(LSTMConfig(context=DMDConfig(window=3)))
    coordinates, state = zeros(rule.spec.coordinate, (4,)), zeros(rule.spec.model, ())
    for value in (1.0, 2.0, float("inf"), 3.0, float("nan")):
        statistics = rule.observe(torch.full((4,), value), torch.ones(4), coordinates)
        context, state = rule.steer(statistics.unsqueeze(-2), None, torch.tensor(1.0), state)
        assert not context.any()


@pytest.mark.parametrize("sketch", [None, 4096])
def test_dmd_of_gradients_is_dmd_of_theta_where_theta_is_the_gradient(snapshots, sketch):
    """The gradient context never looks at θ, and sees of g what the other sees of θ."""
    columns = torch.tensor(snapshots[:, :20], dtype=torch.float32).T
    ends = []
    for kind in ("theta", "gradient"):
        rule = make_rule(LSTMConfig(context=DMDConfig(window=6, rank=2, sketch=sketch, snapshots=kind)))
        n = columns.shape[1] - 1
        coordinates, state = zeros(rule.spec.coordinate, (n,)), zeros(rule.spec.model, ())
        for column in columns:
            vector, other = column[:-1], torch.randn(n)
            theta, grad = (vector, other) if kind == "theta" else (other, vector)
            statistics = rule.observe(theta, grad, coordinates)
            context, state = rule.steer(statistics.unsqueeze(-2), None, column[-1], state)
            _, coordinates = rule.update(grad, theta, context, coordinates)
        assert context[0, -1] == 1, "the window is full"
        ends.append((context, state))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def features_of_losses(config: DMDConfig, losses: torch.Tensor) -> list[torch.Tensor]:
    """The contexts of an optimization of which only the losses matter."""
    context = make_context(config)
    assert context.coordinate_spec == {}, "nothing per coordinate"
    state, seen = zeros(context.context_spec, ()), []
    for loss in losses:
        statistics = context.observe(torch.randn(3), torch.randn(3), {}, 0)
        features, state = context.read(statistics, loss, state)
        seen.append(features)
    return seen


@pytest.mark.parametrize("delay", [1, 5])
def test_gram_of_losses_equals_one_from_scratch(snapshots, delay):
    window = LossWindow(8, delay)
    state = zeros(window.context_spec, ())
    losses = snapshots[-1, :40].astype(np.float32)
    for t, loss in enumerate(torch.tensor(losses)):
        assert window.full(state) == (t >= 8 + delay)
        state = window.advance(torch.zeros(0), loss, state)
    s = np.lib.stride_tricks.sliding_window_view(losses.astype(np.float64), delay)[-9:].T
    np.testing.assert_allclose(window.snapshot_gram(state), s.T @ s, rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, -1e-6, 1e12])
def test_dmd_of_losses_finds_their_rates_of_decay(scale):
    """A loss Σ a_j λ_j^t has these λ_j (Prony's method), in whatever unit it is measured."""
    t = torch.arange(12.0)
    losses = scale * (2 * 0.9**t + 0.5 * 0.7**t)
    *early, features = features_of_losses(DMDConfig(window=6, rank=2, snapshots="loss", delay=4), losses[:10])
    assert all(not f.any() for f in early), "zero until 6 + 4 losses were seen"
    expected = torch.tensor([6 * math.log(0.9), 6 * math.log(0.7), 0, 0, 0, 1])
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_the_leading_mode_of_minibatch_losses_is_their_slope(snapshots):
    """As noisy as they are, λ₁ says how fast the loss falls: as a line through log L does."""
    losses = snapshots[-1]
    seen = features_of_losses(DMDConfig(window=20, rank=1, snapshots="loss"), torch.tensor(losses))[29:]
    slopes = [20 * np.polyfit(np.arange(30), np.log(losses[k : k + 30]), 1)[0] for k in range(len(seen))]
    assert np.corrcoef(slopes, [features[0] for features in seen])[0, 1] > 0.9


def test_a_loss_that_is_not_known_repeats_the_last_one():
    config = DMDConfig(window=4, rank=2, snapshots="loss", delay=3)
    shown = 0.9 ** torch.arange(20.0)
    hidden, held = shown.clone(), shown.clone()
    hidden[5::3], held[5::3] = 0, shown[4:-1:3]
    assert torch.equal(torch.cat(features_of_losses(config, hidden)), torch.cat(features_of_losses(config, held)))
    assert not torch.equal(features_of_losses(config, hidden)[-1], features_of_losses(config, shown)[-1])


def test_losses_never_shown_give_a_context_of_zeros():
    config = DMDConfig(window=4, rank=1, snapshots="loss", delay=3)
    assert not torch.cat(features_of_losses(config, torch.zeros(12))).any()


@pytest.mark.parametrize("sketch", [None, 16])
@pytest.mark.parametrize("value", [1e30, 3e38, math.inf, -math.inf, math.nan])
def test_a_gradient_of_any_size_gives_finite_statistics(sketch, value):
    context = make_context(DMDConfig(window=2, rank=1, sketch=sketch, snapshots="gradient"))
    coordinates, state = zeros(context.coordinate_spec, (4,)), zeros(context.context_spec, ())
    for sign in (1, -1, 1, 1):
        grad = torch.full((4,), sign * value)
        statistics = context.observe(torch.zeros(4), grad, coordinates, 0)
        coordinates = context.remember(torch.zeros(4), grad, coordinates)
        features, state = context.read(statistics, torch.tensor(1.0), state)
        assert all(tensor.isfinite().all() for tensor in (statistics, features, *coordinates.values(), state["gram"]))
    assert features[-1] == 1, "the window is full"


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(-100, 100), radius=st.floats(0.1, 2))
def test_koopman_operator_is_bounded_by_construction(scale, radius):
    kae = KAE(KAEConfig(latent=6, radius=radius))
    with torch.no_grad():
        kae.radius_logit.fill_(scale)
        kae.angle.copy_(torch.tensor([0.0, 1.0, -40.0]))
    moduli = torch.linalg.eigvals(kae.operator.double()).abs()
    assert moduli.max() <= radius * (1 + 1e-6)
    torch.testing.assert_close(moduli.sort().values[::2], kae.radius.double().sort().values, rtol=1e-5, atol=1e-7)
    psi = torch.randn(6)
    torch.testing.assert_close(kae.operator @ psi, rotate(psi, kae.radius, kae.angle), rtol=1e-4, atol=1e-4)


def test_koopman_loss_falls_in_training(snapshots):
    torch.manual_seed(0)
    kae = KAE(KAEConfig(window=10))
    coordinates, state = zeros(kae.coordinate_spec, (len(snapshots) - 1,)), zeros(kae.context_spec, ())
    sequence = []
    with torch.no_grad():
        for column in torch.tensor(snapshots, dtype=torch.float32).T:
            statistics = kae.observe(column[:-1], -column[:-1], coordinates, 0)
            coordinates = kae.remember(column[:-1], -column[:-1], coordinates)
            _, state = kae.read(statistics, column[-1], state)
            sequence.append(state["features"])
    data = torch.stack(sequence)
    assert data.abs().max() <= 1 + 1e-6
    optimizer = torch.optim.Adam(kae.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = kae.koopman_loss(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in kae.parameters())
    assert losses[-1] < 0.5 * losses[0]


def test_configurations_survive_a_round_trip(rule):
    assert build_union(AnyRuleConfig, to_dict(rule.config)) == rule.config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"hiden": 20}, "did you mean hidden"),
        ({"hidden": "20"}, "hidden: expected int"),
        ({"hidden": True}, "hidden: expected int"),
        ({"kind": "logsign"}, "kind: 'logsign' is not one of directional, hierarchical, lstm, moments"),
        ({"context": {"kind": "dmd", "rank": 9, "window": 5}}, "context.rank: 9 is larger than the window"),
        ({"context": {"kind": "dmdd"}}, "context.kind"),
        ({"context": {"kind": "flag", "window": 1}}, "context.window: must be in 2..1024, got 1"),
        ({"context": {"kind": "dmd", "delay": 5}}, 'delay: only snapshots "loss" have one, these are "theta"'),
        ({"context": {"kind": "dmd", "snapshots": "loss", "delay": 0}}, "context.delay: must be in 1..1024, got 0"),
        ({"context": {"kind": "dmd", "snapshots": "loss", "sketch": 64}}, "sketch: a snapshot of losses has no"),
        ({"context": {"kind": "dmd", "snapshots": "loss", "delay": 2, "rank": 3}}, "rank: 3 is larger than the delay"),
        ({"context": {"kind": "kae", "latent": 3}}, "latent: must be an even number"),
        ([], "expected a table"),
    ],
)
def test_bad_configurations_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        build_union(AnyRuleConfig, {"kind": "lstm"} | data if isinstance(data, dict) else data)
