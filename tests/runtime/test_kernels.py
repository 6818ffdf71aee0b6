"""Every fast path gives what the plain loop gives, up to rounding."""

import copy
import ctypes
import dataclasses
import itertools
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from rules import RULES, make_rule
from torch import nn

from l2o_runtime import LearnedOptimizer, Rule, save_rule
from l2o_runtime.config import DMDConfig, WindowConfig
from l2o_runtime.contexts.gram import GramWindow
from l2o_runtime.contexts.gram import push as gram_push
from l2o_runtime.contexts.sketch import count_sketch
from l2o_runtime.kernels import fits, select
from l2o_runtime.rules import LSTMConfig, MomentsConfig, NormalizedConfig, RNNPropConfig
from l2o_runtime.rules.features import SMALLEST_SQUARE
from l2o_runtime.rules.lstm import CoordinateConfig
from l2o_runtime.state import LARGEST, zeros
from l2o_runtime.stepping.engine import Replicas, advance
from l2o_runtime.stepping.parts import CHUNK, STATE_DTYPES, Part, kept_in, make_part

pytest.importorskip("llvmlite", reason="the CPU kernel needs llvmlite: pip install '.[fast]'")

from llvmlite import ir

from l2o_runtime.kernels import emit, features, machine
from l2o_runtime.kernels import lstm as cpu
from l2o_runtime.kernels import lstm_code as lstm

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SHAPES = {
    "one-layer": LSTMConfig(hidden=20, layers=1),
    "three-layers": NormalizedConfig(hidden=8, layers=3),
    "bounded": LSTMConfig(hidden=20, output="tanh", output_scale=0.7),
    "odd": LSTMConfig(hidden=7),
    "even": NormalizedConfig(hidden=6),
    "one-unit": LSTMConfig(hidden=1, layers=2),
    "groups": LSTMConfig(hidden=32),
    "largest": LSTMConfig(hidden=64, layers=1),
    "odd-moments": MomentsConfig(hidden=7, output_scale=0.01),
    "groups-moments": MomentsConfig(hidden=32, layers=1, output_scale=0.01),
    "rnnprop": RNNPropConfig(hidden=20),
    "odd-rnnprop": RNNPropConfig(hidden=7, layers=1),
    "groups-rnnprop": RNNPropConfig(hidden=32, layers=1),
}


@pytest.fixture
def plain(monkeypatch):
    """Turns the kernels off and on."""

    def turn(off: bool) -> None:
        monkeypatch.setenv("L2O_KERNELS", "plain" if off else "")

    return turn


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[name for name, config in RULES.items() if isinstance(config, CoordinateConfig)])
def rule(request) -> Rule:
    """Every rule of the table that runs its LSTM for every coordinate; the others' kernel is tested with them."""
    return make_rule(RULES[request.param])


def group(**changes) -> dict:
    return {"lr": 0.3, "weight_decay": 0.0, "maximize": False} | changes


def random_part(
    rule: Rule, n: int, dtype=torch.float32, seed: int = 0, state_dtype=torch.float32, step: float = 3.0, **changes
) -> Part:
    """A parameter of n coordinates in the middle of an optimization; gradients of all magnitudes."""
    rng = torch.Generator().manual_seed(seed)
    param = nn.Parameter(torch.randn(n, generator=rng).to(dtype))
    param.grad = (torch.randn(n, generator=rng) * 10 ** (12 * torch.rand(n, generator=rng) - 9)).to(dtype)
    param.grad[::5] = 0
    state = {}
    spec = kept_in(state_dtype, rule.spec.coordinate)
    for key, (shape, kind) in spec.items():
        state[key] = torch.randn(n, *shape, generator=rng).to(kind)
    state |= {"step": torch.tensor(step)}
    for key in state:
        if key.startswith("v"):
            state[key] = state[key].square()
    return make_part(group(**changes), param, state, spec, {}, 0)


def both(rule: Rule, n: int, dtype=torch.float32, good: bool = True, **changes) -> list[Part]:
    """The same part, advanced by the plain loop and by the kernel; `changes` as for `random_part`."""
    parts = []
    for kernel in (None, cpu.make_kernel(rule)):
        part = random_part(rule, n, dtype, **changes)
        replicas = Replicas(rule)
        replicas.kernels[CPU] = kernel
        context = zeros(rule.spec.model, ())
        seen = rule.observe(part.theta.float(), part.grad.float(), part.state)
        statistics = torch.linspace(-1, 1, len(seen))
        if rule.progress:
            statistics[: rule.progress.SUMS] = seen[: rule.progress.SUMS]
        with torch.no_grad():
            advance(replicas, [part], statistics.unsqueeze(0), torch.tensor(0.5), context, torch.tensor(good))
        parts.append(part)
    return parts


def assert_same(parts: list[Part]) -> None:
    """To 1e-5, or 1e-6 in all; in half precision to one unit in the last place, which few numbers need.

    Gates that are all but shut, as raw gradients make them, are right to 1e-6, not to their own last place.
    """
    slow, fast = parts
    for key, value in ({"theta": slow.theta} | slow.state).items():
        found = fast.theta if key == "theta" else fast.state[key]
        half = value.dtype in (torch.float16, torch.bfloat16)
        rtol = torch.finfo(value.dtype).eps if half else 1e-5
        torch.testing.assert_close(found, value, rtol=rtol, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        if half and key != "theta":
            assert ((found - value).abs() > 1e-6).sum() <= max(2, value.numel() // 20), f"{key}: rounded otherwise"
    assert fast.theta.isfinite().all()


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 4, 7, 100])
def test_equals_the_plain_loop_for_every_rule(rule, n, state_dtype):
    assert_same(both(rule, n, state_dtype=state_dtype))


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("n", [1, 4, 101])
def test_equals_the_plain_loop_for_every_shape(name, n, state_dtype):
    assert_same(both(make_rule(SHAPES[name]), n, state_dtype=state_dtype))


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("widest", [4, 8, 16])
def test_equals_the_plain_loop_for_narrower_processors(widest, state_dtype, monkeypatch):
    monkeypatch.setattr(cpu, "widest", lambda: widest)
    names = ("none-log_sign", "placebo-normalized", "none-moments")
    for config in (*(RULES[name] for name in names), SHAPES["groups"], SHAPES["odd"], SHAPES["odd-moments"]):
        assert_same(both(make_rule(config), 21, state_dtype=state_dtype))


def test_bfloat16_is_rounded_as_torch_does():
    """Every number of bfloat16, those halfway between two, their neighbours; infinities, NaN, subnormal numbers."""
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    bits = torch.cat([upper + lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    numbers, width = bits.view(torch.float32), 16
    module = ir.Module()
    kind = ir.FunctionType(emit.VOID, [emit.I64, emit.POINTER, emit.BF16.as_pointer(), emit.POINTER])
    function = ir.Function(module, kind, name="convert")
    count, exact, narrow, wide = function.args
    builder = ir.IRBuilder(function.append_basic_block())

    def body(index, _):
        here, there, back = (builder.gep(p, [builder.mul(index, emit.I64(width))]) for p in (exact, narrow, wide))
        emit.store(builder, emit.load(builder, here, width), there)
        emit.store(builder, emit.load(builder, there, width), back)
        return []

    emit.loop(builder, count, [], body)
    builder.ret_void()
    compiled = machine.Compiled(lambda: module)
    call = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * 3)(compiled.address("convert"))
    stored, widened = torch.empty(len(numbers), dtype=torch.bfloat16), torch.empty_like(numbers)
    call(len(numbers) // width, numbers.data_ptr(), stored.data_ptr(), widened.data_ptr())
    expected = numbers.to(torch.bfloat16)
    assert torch.equal(stored.isnan(), expected.isnan())
    real = ~expected.isnan()
    assert torch.equal(stored.view(torch.int16)[real], expected.view(torch.int16)[real])
    assert torch.equal(widened.view(torch.int32)[real], expected.float().view(torch.int32)[real])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"maximize": True}, {"weight_decay": 0.1}, {"lr": torch.tensor([0.2])}], ids=str
)
def test_equals_the_plain_loop_for_every_dtype_and_option(dtype, changes):
    for name in ("none-normalized", "none-moments"):
        rule = make_rule(RULES[name])
        assert_same(both(rule, 37, dtype, **changes))


@pytest.mark.parametrize("size", [cpu.SMALLEST, cpu.CHUNK])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_equals_the_plain_loop_around_chunks(size, more, threads):
    for name, state_dtype in itertools.product(("none-normalized", "dmd-sketch-moments"), STATE_DTYPES):
        assert_same(both(make_rule(RULES[name]), 2 * size + more, state_dtype=state_dtype))


@pytest.mark.parametrize("step", [0.0, 1.0, 30.0, 999.0, 1e5])
@pytest.mark.parametrize("name", ["none-normalized", "none-moments"])
def test_equals_the_plain_loop_at_every_step(name, step):
    """Corrections of averages come from the number of steps."""
    assert_same(both(make_rule(RULES[name]), 50, step=step))


@pytest.mark.parametrize("name", ["dmd-sketch-normalized", "dmd-sketch-moments"])
def test_the_number_of_threads_changes_nothing(name):
    rule, thetas = make_rule(RULES[name]), []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        thetas.append(both(rule, 50_001)[1].theta)
    torch.set_num_threads(before)
    assert torch.equal(thetas[0], thetas[1])
    assert torch.equal(thetas[0], thetas[2])


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_a_bad_step_changes_nothing(rule, state_dtype):
    slow, fast = both(rule, 50, good=False, weight_decay=0.5, state_dtype=state_dtype)
    untouched = random_part(rule, 50, state_dtype=state_dtype)
    assert torch.equal(fast.theta, untouched.theta)
    assert torch.equal(slow.theta, untouched.theta)
    for key, value in untouched.state.items():
        assert torch.equal(fast.state[key], value), key


def test_extreme_gradients(plain):
    """The largest and smallest floats, zeros of both signs, both sides of the feature maps' thresholds."""
    values = [0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, LARGEST, -2 * LARGEST, 4.5e-5, -4.6e-5, 1.0]
    for name in ("none-log_sign", "none-normalized"):
        rule, parts = make_rule(RULES[name]), []
        for kernel in (None, cpu.make_kernel(rule)):
            param = nn.Parameter(torch.zeros(len(values)))
            param.grad = torch.tensor(values)
            part = make_part(group(), param, {}, rule.spec.coordinate, {}, 0)
            replicas = Replicas(rule)
            replicas.kernels[CPU] = kernel
            for _ in range(5):
                with torch.no_grad():
                    advance(replicas, [part], torch.zeros(1, 0), torch.tensor(0.0), {}, torch.tensor(True))
            parts.append(part)
        assert_same(parts)


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-20, 1e-10, 1.0, 1e18, 1e30])
def test_gradients_of_any_size_through_moments(scale, tmp_path, plain):
    """Squares that vanish in float32, subnormal ones, huge ones; what never had a gradient never moves."""
    save_rule(tmp_path / "rule.safetensors", make_rule(RULES["none-moments"]))
    runs = []
    for off in (True, False):
        plain(off)
        rng = torch.Generator().manual_seed(0)
        start = torch.randn(91, generator=rng)
        param = nn.Parameter(start.clone())
        optimizer = LearnedOptimizer([param], rule=tmp_path / "rule.safetensors")
        for _ in range(20):
            param.grad = scale * torch.randn(91, generator=rng)
            param.grad[::3] = 0
            optimizer.step()
        runs.append((param.detach(), optimizer.state[param]))
        assert torch.equal(param[::3], start[::3])
        assert scale < 1e-20 or (param != start).any()
    (slow, old), (fast, new) = runs
    assert not torch.equal(old["h0"], new["h0"]), "both took the plain path"
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    for key, value in old.items():
        # Of subnormal numbers the last bits may differ, and of what cancels.
        atol = {"v": 1e-44, "m": 1e-6 * min(scale, LARGEST)}.get(key[0], 1e-5)
        torch.testing.assert_close(new[key], value, rtol=1e-5, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


BUNDLED = ("scale", "mnist", "moments")
"""Bundled rules that do not amplify rounding."""


@pytest.mark.parametrize("rule", BUNDLED)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernel", "plain"])
def test_gradients_whose_squares_vanish_fade_out(plain, kernels, rule):
    """Where float32 has nothing left to divide by, steps get shorter rather than longer."""
    plain(not kernels)
    longest = []
    for scale in (1.0, 1e-18, 1e-19, 1e-20, 1e-21, 1e-22, 1e-24, 1e-30, 1e-44):
        param = nn.Parameter(torch.ones(4))
        optimizer = LearnedOptimizer([param], rule=rule)
        seen = [param.detach().clone()]
        for _ in range(5):
            param.grad = scale * torch.tensor([1.0, -2.0, 0.5, 0.1])
            optimizer.step()
            seen.append(param.detach().clone())
        longest.append(float(torch.stack(seen).diff(dim=0).abs().max()))
    assert all(after <= 1.01 * before for before, after in itertools.pairwise(longest)), longest
    assert longest[-1] < 1e-6


def digits_run(steps: int, moved: int = 0, **options) -> list[torch.Tensor]:
    """θ of every step of a real optimization, from a start that is moved by a rounding if `moved` is a seed of that."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Sigmoid(), nn.Linear(16, 10))
    if moved:
        noise = torch.Generator().manual_seed(moved)
        for p in model.parameters():
            p.data *= 1 + 2**-24 * torch.randn(p.shape, generator=noise)
    optimizer = LearnedOptimizer(model.parameters(), **options)
    seen = []
    for _ in range(steps):
        index = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return seen


@pytest.mark.parametrize("name", [*BUNDLED, "none-moments", "dmd-sketch-moments"])
def test_equals_the_plain_loop_on_a_real_trajectory(name, plain, tmp_path):
    """Of bundled rules, and of rules that are not trained, as nearly as from a start that is rounded otherwise.

    Trajectories amplify roundings, 1e-5 in 200 steps of `scale`, and how much depends on the processor's products.
    """
    rule = name
    if name not in BUNDLED:
        rule = tmp_path / "rule.safetensors"
        save_rule(rule, make_rule(dataclasses.replace(RULES[name], horizon=200)))
    plain(True)
    slow, *others = (digits_run(200, moved, rule=rule) for moved in range(3))
    plain(False)
    fast = digits_run(200, rule=rule)
    assert not torch.equal(slow[-1], fast[-1]), "both took the plain path"
    for step in (1, 10, 50, 100, 200):
        size = slow[step - 1].norm()
        distance, *rounded = ((run[step - 1] - slow[step - 1]).norm() / size for run in (fast, *others))
        assert distance < max(1e-6, 4 * max(rounded)), f"step {step}: {distance}, roundings {rounded}"


@pytest.mark.parametrize("rule", BUNDLED)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernel", "plain"])
def test_a_state_in_bfloat16_leads_nearly_where_float32_does(plain, kernels, rule):
    """`research/state_dtype.py` has the figures for more states, seeds and steps."""
    plain(not kernels)
    exact, rounded = digits_run(200, rule=rule), digits_run(200, rule=rule, state_dtype=torch.bfloat16)
    for step in (20, 200):
        way = (exact[step - 1] - exact[0]).norm()
        assert 0 < (rounded[step - 1] - exact[step - 1]).norm() < 0.1 * way, f"step {step}"


def test_tanh_is_bounded():
    x = torch.cat([torch.linspace(-12, 12, 2_000_001), torch.logspace(-37, 38, 100_001)])
    x = torch.cat([x, -x])
    y = cpu.apply("tanh", x)
    assert (y.double() - x.double().tanh()).abs().max() < 5e-7
    small = x.abs() < 1e-2
    assert ((y - x.tanh()).abs() <= 5e-7 * x.abs())[small].all(), "relative, near zero"
    assert (y.abs() <= 1 + 1.2e-7).all()
    inf = float("inf")
    special = cpu.apply("tanh", torch.tensor([inf, -inf, float("nan"), 0.0]))
    torch.testing.assert_close(special, torch.tensor([1.0, -1.0, float("nan"), 0.0]), equal_nan=True, rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    "x", [torch.linspace(-80, 80, 1_000_001), torch.linspace(-8, 8, 1_000_001)], ids=["wide", "used"]
)
def test_exp_is_accurate(x):
    exact = x.double().exp()
    assert ((cpu.apply("exp", x) - exact).abs() <= 1e-6 * exact).all()
    assert cpu.apply("exp", torch.tensor([0.0, -0.0, float("nan")])).nan_to_num(7).tolist() == [1, 1, 7]


def test_log_is_accurate():
    """From the smallest normal number to the largest; relative to the logarithm, or to one."""
    x = torch.logspace(-37.9, 38.5, 1_000_001).clamp_min(SMALLEST_SQUARE)
    exact = x.double().log()
    assert ((cpu.apply("log", x) - exact).abs() <= 2e-7 * exact.abs().clamp_min(1)).all()


def test_the_default_dtype_changes_nothing():
    expected = features.shared("moments", 3.0, -1.0)
    features.shared.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        found = features.shared("moments", 3.0, -1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["dmd-exact-normalized", "none-moments"])
def test_no_memory_is_taken_after_the_first_step(name):
    """Neither by torch, whatever the dtype, nor from the system."""
    from torch.profiler import ProfilerActivity, profile

    rule = make_rule(RULES[name])
    width = rule.cell.weight_context.shape[1] + (rule.progress is not None)
    for dtype, state_dtype in itertools.product((torch.float32, torch.float64, torch.bfloat16), STATE_DTYPES):
        kernel = cpu.make_kernel(rule)
        part = random_part(rule, 40_001, dtype, weight_decay=0.1, state_dtype=state_dtype)
        context, good = torch.zeros(width), torch.tensor(True)
        kernel.update([part], [context.unsqueeze(0)], good)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            kernel.update([part], [context.unsqueeze(0)], good)
        taken = sum(max(0, event.self_device_memory_usage, event.self_cpu_memory_usage) for event in seen.events())
        assert taken <= 256, f"{dtype}: {taken} bytes"  # numbers of no dimension


def test_a_long_run_does_not_grow():
    rule = make_rule(RULES["none-normalized"])
    kernel, part = cpu.make_kernel(rule), random_part(make_rule(RULES["none-normalized"]), 5_001)

    def resident() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not os.path.exists("/proc/self/statm"):  # noqa: PTH110
        pytest.skip("needs /proc/self/statm to see its own memory")
    for step in range(300):
        kernel.update([part], [torch.zeros(1, 0)], torch.tensor(True))
        if step == 100:
            before = resident()
    assert resident() - before < 2**20


def test_what_kernels_are_not_for():
    rule = make_rule(RULES["none-log_sign"])
    assert fits(random_part(rule, 5))
    param, spec = nn.Parameter(torch.ones(5), requires_grad=True), rule.spec.coordinate
    param.grad = torch.ones(5)
    state = {key: torch.zeros(5, *shape, dtype=torch.float64) for key, (shape, _) in spec.items() if key != "step"}
    assert not fits(make_part(group(), param, state, spec, {}, 0))
    assert select(make_rule(LSTMConfig(hidden=cpu.LARGEST + 4)), CPU) is None
    assert select(rule.double(), CPU) is None
    assert select(rule, torch.device("meta")) is None


def test_the_environment_turns_kernels_off(plain):
    rule = make_rule(RULES["none-log_sign"])
    plain(False)
    assert select(rule, CPU) is not None
    plain(True)
    assert select(rule, CPU) is None


def test_without_llvm_the_plain_loop_is_taken(monkeypatch):
    monkeypatch.setattr("l2o_runtime.kernels.find_spec", lambda name: None)
    assert select(make_rule(RULES["none-log_sign"]), CPU) is None


def test_copies_and_pickles_make_their_own_kernel(tmp_path):
    save_rule(tmp_path / "rule.safetensors", make_rule(LSTMConfig(context=DMDConfig(window=4, rank=1))))
    param = nn.Parameter(torch.ones(9))
    param.grad = torch.ones(9)
    optimizer = LearnedOptimizer([param], rule=tmp_path / "rule.safetensors")
    optimizer.step(loss=1.0)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = twin.param_groups[0]["params"][0]
        theirs.grad = torch.ones(9)
        start = theirs.detach().clone()
        twin.step(loss=1.0)
        assert not torch.equal(theirs, start)


def test_packing_keeps_every_weight():
    for config in SHAPES.values():
        for widest in (4, 8, 16):
            shape = lstm.choose_shape(config.hidden, widest)
            assert shape.units * shape.vectors * shape.groups == config.hidden
            weight = torch.arange(4.0 * config.hidden * 3).view(-1, 3)
            packed = lstm.pack(weight, shape)
            assert packed.shape == (shape.groups, 3, shape.vectors * shape.width)
            halves = weight.view(4, -1) * torch.tensor([0.5, 0.5, 1, 0.5])[:, None]
            assert torch.equal(packed.reshape(-1).sort().values, halves.reshape(-1).sort().values)
    assert machine.widest() in (4, 8, 16)


@pytest.mark.parametrize("size", [8, 1000, 1024, 65536])
@pytest.mark.parametrize("offset", [0, 5, 2**31 - 3, 2**33 + 7])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)], ids=str)
def test_the_compiled_sketch_is_the_sketch_bit_for_bit(size, offset, lead, plain):
    pytest.importorskip("numba", reason="numba is not installed: pip install '.[fast]'")
    for n in (0, 1, 7, 5000):
        vector = torch.randn(*lead, n, generator=torch.Generator().manual_seed(n))
        plain(True)
        expected = count_sketch(vector, size, offset)
        plain(False)
        assert torch.equal(count_sketch(vector, size, offset), expected)


@pytest.mark.parametrize("m", [2, 6, 20])
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)], ids=str)
def test_the_compiled_inner_products_are_those_of_the_window(m, lead, plain):
    """Of one optimization and of several; torch's operations and the compiled pass both sum in float64."""
    pytest.importorskip("numba", reason="numba is not installed: pip install '.[fast]'")
    gram = GramWindow(WindowConfig(window=m, sketch=None))
    for n in (0, 1, 7, 5000):
        rng = torch.Generator().manual_seed(n)
        theta, window = torch.randn(*lead, n, generator=rng), torch.randn(*lead, n, m + 1, generator=rng)
        plain(True)
        expected = gram.observe(theta, {"window": window}, 0)
        plain(False)
        found = gram.observe(theta, {"window": window}, 0)
        assert found.dtype == expected.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_window_is_pushed_in_place_bit_for_bit(dtype):
    for n, size in ((1, 2), (7, 5), (300, 21)):
        window, theta = torch.randn(n, size), torch.randn(n).to(dtype)
        expected = gram_push(window, theta.float(), -1)
        whole = torch.cat([torch.full((1, size), 7.0), window, torch.full((1, size), 7.0)])
        cpu.push(whole[1:-1], theta)
        assert torch.equal(whole[1:-1], expected)
        assert (whole[[0, -1]] == 7).all(), "its neighbours stay"


def test_a_step_with_an_exact_window_takes_no_memory_for_it(tmp_path):
    """No tensor is larger than a chunk in float64: neither the window nor a copy of it is made anew."""
    from torch.profiler import ProfilerActivity, profile

    save_rule(tmp_path / "rule.safetensors", make_rule(LSTMConfig(context=DMDConfig(window=20, rank=1))))
    param = nn.Parameter(torch.randn(40_000))
    param.grad = torch.randn(40_000)
    optimizer = LearnedOptimizer([param], rule=tmp_path / "rule.safetensors")
    optimizer.step(loss=1.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        optimizer.step(loss=1.0)
    taken = [event.self_cpu_memory_usage for event in seen.events()]
    assert 0 < max(taken) <= 8 * CHUNK


def test_passes_are_compiled_again_once_they_are_no_longer_turned_off(plain):
    pytest.importorskip("numba")
    from l2o_runtime.contexts.passes import compiled_pass

    found = []
    for off in (True, False, True):
        plain(off)
        found.append(compiled_pass("add_products", torch.zeros(4)) is None)
    assert found == [True, False, True]
