"""The Triton kernel against the plain loop. `test_triton` runs this file in a process of its own.

With TRITON_INTERPRET=1 on the CPU, else on a GPU: `python -m pytest tests/helpers/triton_cases.py`.
"""

import os

import pytest
import torch
from problems import Regression, flat, minibatches, train
from rules import RULES, make_rule
from torch import Tensor

from l2o_runtime import LearnedOptimizer, RuleConfig, save_rule
from l2o_runtime.config import PlaceboConfig
from l2o_runtime.kernels import fits
from l2o_runtime.kernels.triton import MAX_HIDDEN, TritonKernel, supported
from l2o_runtime.rules import LSTMConfig, NormalizedConfig
from l2o_runtime.stepping.parts import Part

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
BLOCK = 16
GROUP = {"lr": 0.3, "weight_decay": 0.0, "maximize": False}
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # σ(−100) is 0
ALL_FEATURES = [LSTMConfig(), NormalizedConfig(output="tanh", context=PlaceboConfig(width=3))]


def strong_rule(config: RuleConfig):
    """Its weights are large enough for the gates to leave their linear range."""
    rule = make_rule(config).to(DEVICE)
    for param in rule.cell.parameters():
        param.mul_(3)
    return rule


def random_grad(n: int) -> Tensor:
    """Of all sizes that the features tell apart, and 0."""
    grad = torch.randn(n) * torch.logspace(-9, 3, n)[torch.randperm(n)]
    grad[n // 2] = 0
    return grad


def random_part(rule, n, *, dtype=torch.float32, state_dtype=torch.float32, step=3.0, seed=0, **group) -> Part:
    """With a state as after some steps; one number more lies in memory behind all that is `n` long."""
    torch.manual_seed(seed)
    state = {key: torch.randn(n + 1, *shape) * 0.7 for key, (shape, _) in rule.spec.coordinate.items()}
    if "v" in state:
        state["v"] = state["v"].square()
    state = {key: (value if key == "window" else value.to(state_dtype)).to(DEVICE) for key, value in state.items()}
    theta = torch.randn(n + 1).to(DEVICE, dtype)
    grad = random_grad(n + 1).to(DEVICE, dtype)
    views = {key: value[:n] for key, value in state.items()} | {"step": torch.tensor([step], device=DEVICE)}
    return Part(GROUP | group, theta[:n], theta[:n], grad[:n], views, {}, theta[:n].shape, 0, ())


def plain(rule, part: Part, context: Tensor, good: Tensor) -> None:
    """What the engine does without a kernel; states of less than float32 are rounded when they are written."""
    for piece in part.chunks():
        state = {key: value.float() for key, value in piece.state.items()}
        delta, new = rule.update(piece.grad, piece.theta.float(), context.unsqueeze(0), state)
        for key in new.keys() - {"step"}:
            piece.state[key].copy_(torch.where(good, new[key], state[key]))
        part.move(piece.theta, delta, good, piece.state)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """To 1e-5; in half precision bit for bit, but for a few numbers that were rounded the other way."""
    if expected.dtype in (torch.float16, torch.bfloat16):
        assert (actual != expected).sum() <= max(2, expected.numel() // 50)
        rtol, atol = torch.finfo(expected.dtype).eps, 1e-6
    else:
        rtol, atol = 1e-5, 1e-6 if DEVICE.type == "cpu" else 1e-5
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def check(rule, n, *, good=True, kernel=None, **kwargs) -> tuple[Part, Part]:
    """One step by the plain loop and by the kernel."""
    parts = random_part(rule, n, **kwargs), random_part(rule, n, **kwargs)
    context = torch.randn(rule.config.context.width).to(DEVICE)
    flag = torch.tensor(good, device=DEVICE)
    plain(rule, parts[0], context, flag)
    (kernel or TritonKernel(rule, block=BLOCK)).advance(parts[1], context, flag)
    for key, expected in parts[0].state.items():
        assert_same(parts[1].state[key], expected)
    assert_same(parts[1].theta, parts[0].theta)
    untouched = random_part(rule, n, **kwargs)
    for key in ("theta", *untouched.state.keys() - {"step"}):
        before, after = (p.theta if key == "theta" else p.state[key] for p in (untouched, parts[1]))
        tails = [x.as_strided(x.shape[1:], x.stride()[1:], n * x.stride(0)) for x in (before, after)]
        assert torch.equal(*tails), f"{key}: written behind the end"
        assert good != torch.equal(before, after), f"{key}: written in a bad step, or not at all"
    return parts


@pytest.mark.parametrize("name", [name for name, config in RULES.items() if supported(make_rule(config))])
def test_every_rule_of_every_length(name):
    rule = strong_rule(RULES[name])
    kernel = TritonKernel(rule, block=BLOCK)
    for n in (1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK + 1):
        check(rule, n, kernel=kernel, seed=n)


@pytest.mark.parametrize("config", ALL_FEATURES, ids=["log_sign", "normalized"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(config, dtype, state_dtype):
    rule = strong_rule(config)
    kernel = TritonKernel(rule)
    check(rule, 100, dtype=dtype, state_dtype=state_dtype, kernel=kernel)
    # 0.75 · θ lies halfway between two numbers of half precision often enough to tell how ties are rounded.
    check(rule, 100, dtype=dtype, state_dtype=state_dtype, lr=0.5, weight_decay=0.5, kernel=kernel)


def test_double_precision_is_kept():
    """Δ is float32; what it is added to is not."""
    parts = check(strong_rule(ALL_FEATURES[1]), 40, dtype=torch.float64, lr=1e-6, weight_decay=0.5)
    torch.testing.assert_close(parts[1].theta, parts[0].theta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", ALL_FEATURES, ids=["log_sign", "normalized"])
@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"weight_decay": 0.5},
        {"lr": 0},
        {"lr": torch.tensor(0.2)},
        {"lr": torch.tensor([0.2], dtype=torch.float64), "weight_decay": 0.5},
        {"lr": torch.tensor(0.2), "weight_decay": torch.tensor(0.5), "maximize": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_a_group(config, options):
    options = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in options.items()}
    if options.get("lr", 1) == 0:
        with pytest.raises(AssertionError, match="theta: written in a bad step, or not at all"):
            check(strong_rule(config), 40, **options)
    else:
        check(strong_rule(config), 40, **options)


@pytest.mark.parametrize("name", ["none-log_sign", "dmd-exact-normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bad_step_writes_nothing(name, dtype):
    check(strong_rule(RULES[name]), 40, good=False, dtype=dtype, state_dtype=dtype, weight_decay=0.5)


def test_a_bad_step_writes_nothing_whatever_the_gradient():
    rule = strong_rule(ALL_FEATURES[1])
    part, before = random_part(rule, 40), random_part(rule, 40)
    part.grad.fill_(float("nan"))
    TritonKernel(rule, block=BLOCK).advance(part, torch.full((3,), float("nan")), torch.tensor(False, device=DEVICE))
    assert torch.equal(part.theta, before.theta)
    assert all(torch.equal(part.state[key], value) for key, value in before.state.items())


@pytest.mark.parametrize("step", [0, 1, 2, 9, 255, 256, 511, 512, 10**6])
def test_bias_correction(step):
    check(strong_rule(ALL_FEATURES[1]), 40, step=float(step))


@pytest.mark.parametrize("config", ALL_FEATURES, ids=["log_sign", "normalized"])
def test_extreme_gradients(config):
    rule = strong_rule(config)
    grads = torch.tensor([0.0, 1e-30, -1e-30, 4.5e-5, 4.6e-5, -4.5e-5, -4.6e-5, 1.0, 1e17, -1e17, 1e19, 3e38, -3e38])
    context = torch.zeros(rule.config.context.width, device=DEVICE)
    good = torch.tensor(True, device=DEVICE)
    parts = [random_part(rule, len(grads), step=0.0) for _ in range(2)]
    for part in parts:
        part.grad.copy_(grads)
        for value in part.state.values():
            value.zero_()
    for _ in range(3):
        plain(rule, parts[0], context, good)
        TritonKernel(rule, block=BLOCK).advance(parts[1], context, good)
        assert_same(parts[1].theta, parts[0].theta)
        for part in parts:
            part.finish(good)
    for key, expected in parts[0].state.items():
        torch.testing.assert_close(parts[1].state[key], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("hidden", "layers"), [(1, 1), (16, 2), (20, 3), (33, 1)])
def test_other_sizes(hidden, layers):
    check(strong_rule(NormalizedConfig(hidden=hidden, layers=layers)), 20)


def test_default_blocks():
    for precision in ("ieee", "tf32x3"):
        rule = strong_rule(LSTMConfig())
        check(rule, 150, kernel=TritonKernel(rule, precision))


def test_which_rules_are_supported():
    assert supported(make_rule(LSTMConfig(hidden=MAX_HIDDEN, layers=1)))
    assert not supported(make_rule(LSTMConfig(hidden=MAX_HIDDEN + 1, layers=1)))
    assert not supported(make_rule(RULES["none-moments"]))


@pytest.mark.parametrize("lay", [lambda x: x[::2], lambda x: x[:20].view(4, 5).mT, lambda x: x[:1].expand(20)])
def test_strided_gradients_and_parameters(lay):
    rule = strong_rule(ALL_FEATURES[1])
    context, good = torch.randn(3).to(DEVICE), torch.tensor(True, device=DEVICE)
    results = []
    for run in (lambda *args: plain(rule, *args), TritonKernel(rule, block=BLOCK).advance):
        torch.manual_seed(0)
        param, grad = torch.randn(40).to(DEVICE)[::2], lay(torch.randn(40).to(DEVICE)).reshape(-1)
        state = {key: torch.zeros(20, *shape, device=DEVICE) for key, (shape, _) in rule.spec.coordinate.items()}
        part = Part(
            GROUP,
            param,
            param.reshape(-1),
            grad,
            state | {"step": torch.zeros(1, device=DEVICE)},
            {},
            param.shape,
            0,
            (),
        )
        run(part, context, good)
        part.finish(good)
        results.append(part.param.clone())
    assert_same(results[1], results[0])


def test_an_empty_part():
    rule = strong_rule(ALL_FEATURES[1])
    TritonKernel(rule).advance(random_part(rule, 0), torch.zeros(3, device=DEVICE), torch.tensor(True, device=DEVICE))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["dmd-exact-normalized", "dmd-gradient-log_sign", "dmd-sketch-log_sign", "kae-normalized"]
)
def test_a_real_run(name, state_dtype, tmp_path, monkeypatch):
    """Some steps of real training, every one by the kernel."""
    path = tmp_path / "rule.safetensors"
    save_rule(path, make_rule(RULES[name]))
    results = []
    for use_kernel in (False, True):

        def advance(rules, parts, statistics, loss, context_state, good, use_kernel=use_kernel):
            rule = rules.on(DEVICE)
            context, new = rule.steer(statistics, None, loss, context_state)
            for key, value in new.items():
                context_state[key].copy_(value)
            kernel = TritonKernel(rule).advance if use_kernel else lambda *args: plain(rule, *args)
            for part in parts:
                assert fits(part)
                kernel(part, context.squeeze(0), good)
                part.finish(good)

        monkeypatch.setattr("l2o_runtime.optimizer.advance", advance)
        model = Regression().to(DEVICE)
        optimizer = LearnedOptimizer(model.parameters(), rule=path, weight_decay=0.01, state_dtype=state_dtype)
        train(model, optimizer, [(x.to(DEVICE), y.to(DEVICE)) for x, y in minibatches(9)])
        results.append((flat(model), optimizer.state_dict()["state"]))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if state_dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(results[1], results[0], **tolerance)
    assert not torch.equal(results[1][0], flat(Regression().to(DEVICE)))
