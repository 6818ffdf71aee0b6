"""The step in few operators is the plain loop's, waits for no device, and does not grow with the number of tensors."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import CONTEXTS, make_rule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from l2o_runtime import LearnedOptimizer, save_rule
from l2o_runtime.config import DMDConfig
from l2o_runtime.kernels import foreach, foreach_plan, select
from l2o_runtime.kernels.foreach_plan import add_up, levels_of
from l2o_runtime.rules import DirectionalConfig, LSTMConfig, NormalizedConfig
from l2o_training.bench.operators import operators

CONFIG = DirectionalConfig(hidden=4, rank=3, places=True)
SHAPES = [(5, 7), (40, 3), (3, 40), (4, 3, 3, 3), (9,), (1,), (), (5, 7), (30, 50), (2, 2), (50, 30), (7, 5)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rules by name; no weight of a directional one is zero, so that every formula counts."""
    folder = tmp_path_factory.mktemp("rules")
    configs = {
        "rule": CONFIG,
        "adam": DirectionalConfig(hidden=4, rank=0),
        "sketch": DirectionalConfig(hidden=4, rank=3, context=CONTEXTS["dmd-sketch"]),
        "lstm": LSTMConfig(),
        "normalized": NormalizedConfig(),
    }
    for name, config in configs.items():
        save_rule(folder / f"{name}.safetensors", make_rule(config))
    return {name: folder / f"{name}.safetensors" for name in configs}


def parameters(shapes=SHAPES, dtype=torch.float32, device=CPU):
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng).to(device, dtype)) for shape in shapes]


def gradients(params, step, leave_out=(), scale=1.0):
    rng = torch.Generator().manual_seed(100 + step)
    for index, p in enumerate(params):
        grad = scale * torch.randn(p.shape, generator=rng)
        p.grad = None if index in leave_out else grad.to(p.device, p.dtype)


def run(monkeypatch, kernels, script, rule, params=parameters, **options):
    """A script with some kernels: its parameters and optimizer."""
    monkeypatch.setenv("L2O_KERNELS", kernels)
    params = params()
    optimizer = LearnedOptimizer(params, rule, **options)
    script(params, optimizer)
    return params, optimizer


def assert_same(found, other, **close):
    """Of two runs parameters, states and counters."""
    for p, q in zip(found[0], other[0], strict=True):
        torch.testing.assert_close(p, q, **close)
    torch.testing.assert_close(found[1].state_dict()["state"], other[1].state_dict()["state"], **close)
    assert found[1].health() == other[1].health()


def check(monkeypatch, script, rule, close=CLOSE, **options):
    """The step in few operators, twice, and the plain loop."""
    found, again, other = (
        run(monkeypatch, kernels, script, rule, **options) for kernels in ("foreach",) * 2 + ("plain",)
    )
    kernels = found[1]._replicas.kernels.values()
    assert all(isinstance(kernel, foreach.ForeachKernel) for kernel in kernels)
    assert_same(found, again, rtol=0, atol=0)
    assert_same(found, other, **close)
    return found


@pytest.mark.parametrize(("most", "width"), [(2**26, 256), (200, 4), (1, 8)], ids=str)
def test_changing_sets_of_gradients(files, monkeypatch, most, width):
    monkeypatch.setattr(foreach_plan, "MOST", most)
    monkeypatch.setattr(foreach_plan, "WIDTH", width)
    monkeypatch.setattr(foreach, "PLANS", 2)

    def script(params, optimizer):
        for step in range(9):
            gradients(params, step, leave_out={step % 4, 8} if step % 3 else ())
            optimizer.step()

    check(monkeypatch, script, files["rule"], weight_decay=0.1, total_steps=20)


def test_groups_rates_and_directions(files, monkeypatch):
    def script(params, optimizer):
        for step in range(7):
            if step == 2:
                more = nn.Parameter(torch.ones(6, 5))
                optimizer.add_param_group({"params": [more], "lr": 0.3, "weight_decay": 0.5})
                params.append(more)
            if step == 3:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.2)
            if step == 4:
                optimizer.param_groups[-1]["maximize"] = True
            if step == 5:  # not contiguous any more
                params[1].data = params[1].data.t().contiguous().t()
            gradients(params, step)
            optimizer.step()

    check(monkeypatch, script, files["rule"])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(files, monkeypatch, dtype, state_dtype):
    def script(params, optimizer):
        for step in range(4):
            gradients(params, step)
            optimizer.step()

    mixed = lambda: parameters(SHAPES[:6], dtype) + parameters(SHAPES[6:])  # noqa: E731
    # One number of half precision further where two roundings fall to different sides.
    close = CLOSE if dtype == torch.float64 else {"rtol": 0.02, "atol": 1e-4}
    close = close if state_dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    check(monkeypatch, script, files["rule"], close, params=mixed, weight_decay=0.1, state_dtype=state_dtype)


@pytest.mark.parametrize("bad", ["nan gradient", "inf gradient", "no gradient", "nan parameter", "nan loss"])
def test_a_bad_step_never_happened(files, monkeypatch, bad):
    def script(params, optimizer):
        for step in range(4):
            gradients(params, step, scale=0.0 if (step, bad) == (2, "no gradient") else 1.0)
            kept = params[8].detach().clone()
            if step == 2 and bad == "nan parameter":
                params[8].data[1, 2] = torch.nan
            if step == 2 and bad in ("nan gradient", "inf gradient"):
                params[0].grad[1, 2] = float(bad.split()[0])
            before = (
                [p.detach().clone() for p in params],
                {
                    p: {key: value.clone() for key, value in state.items() if key != "health"}
                    for p, state in optimizer.state.items()
                },
            )
            optimizer.step(loss=torch.nan if step == 2 and bad == "nan loss" else 1.0)
            if step == 2:
                torch.testing.assert_close([p.detach() for p in params], before[0], rtol=0, atol=0, equal_nan=True)
                for p, state in before[1].items():
                    assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
                params[8].data.copy_(kept)

    assert check(monkeypatch, script, files["rule"])[1].health()["steps"] == 3


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=8),
    st.integers(0, 10**6),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
)
def test_wild_shapes_and_sizes(files, shapes, seed, scale):
    def script(params, optimizer):
        for step in range(3):
            gradients(params, seed + step, scale=scale)
            optimizer.step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreach_plan, "WIDTH", 8)
        patch.setattr(foreach_plan, "MOST", 300)
        made = partial(parameters, [tuple(shape) for shape in shapes])
        check(patch, script, files["rule"], {"rtol": 1e-4, "atol": 1e-5 * max(1.0, scale)}, params=made)


@pytest.mark.parametrize("name", ["adam", "sketch"])
def test_other_rules_of_the_kind(files, monkeypatch, name):
    """Without matrices; and with a context, whose sums the plain loop adds up."""

    def script(params, optimizer):
        for step in range(9):
            gradients(params, step)
            optimizer.step(loss=torch.tensor(3.0 / (1 + step)))

    check(monkeypatch, script, files[name], {"rtol": 1e-4, "atol": 1e-4})


def test_a_real_network(monkeypatch):
    """The default rule on a small convolutional network: what rounding makes of a hundred steps."""
    from sklearn.datasets import load_digits

    images, labels = (torch.as_tensor(x) for x in load_digits(return_X_y=True))
    images = (images / 16).float().view(-1, 1, 8, 8)

    def network():
        torch.manual_seed(0)
        first = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*first, nn.Linear(216, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 10))

    ends = []
    for kernels in ("foreach", "plain"):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        model = network()
        optimizer = LearnedOptimizer(model.parameters(), total_steps=40)
        for step in range(20):
            batch = slice(32 * step, 32 * step + 32)
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, **CLOSE)


def test_a_parameter_that_is_there_twice_steps_twice(files, monkeypatch):
    def script(params, optimizer):
        for step in range(3):
            gradients(params, step)
            optimizer.step()

    def twice():
        weight = parameters()[0]
        return [weight, weight]

    with pytest.warns(UserWarning, match="duplicate parameters"):
        check(monkeypatch, script, files["rule"], {"rtol": 0.02, "atol": 0.01}, params=twice)


def test_compiled_functions_give_the_same(files, monkeypatch):
    """Each is one graph, whatever is read of the shapes."""
    compiler = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiler)

    def script(params, optimizer):
        for step in range(2):
            gradients(params, step)
            optimizer.step()

    found, other = (run(monkeypatch, kernels, script, files["rule"]) for kernels in ("compiled", "foreach"))
    assert_same(found, other, **CLOSE)


class Apart(TorchDispatchMode):
    """Refuses numbers that go from one device to another, but for scalars that operators take from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs or {}, found)) if isinstance(x, Tensor)]
        assert len({x.device for x in tensors if x.dim() or "copy" in func.name()}) < 2, f"{func} crosses devices"
        return found


@pytest.mark.parametrize(("loss", "total_steps"), [(None, None), (1.0, 30), ("device", 30)])
@pytest.mark.parametrize("name", ["rule", "lstm", "normalized"])
def test_no_device_is_waited_for(files, monkeypatch, name, loss, total_steps):
    """Numbers of the device "meta" cannot be read, as if they were never there in time."""
    monkeypatch.setenv("L2O_KERNELS", "foreach")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which "meta" has none of
    monkeypatch.setattr(Tensor, "data_ptr", lambda tensor: id(tensor if tensor._base is None else tensor._base))
    params = [nn.Parameter(p.to("meta")) for p in parameters()]
    optimizer = LearnedOptimizer(params, files[name], weight_decay=0.1, total_steps=total_steps)
    loss = torch.ones((), device="meta") if loss == "device" else loss
    for step in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        if step == 2:
            with Apart():
                optimizer.step(loss=loss)
        else:
            optimizer.step(loss=loss)
    assert (name == "rule") == any(optimizer._replicas.kernels.values())


def transformer(layers, width=8):
    """Shapes of a small one: twelve tensors of six shapes in a layer."""
    block = nn.TransformerEncoderLayer(width, 2, 4 * width)
    return [tuple(p.shape) for p in nn.TransformerEncoder(block, layers, enable_nested_tensor=False).parameters()]


@pytest.mark.parametrize(("total", "most"), [(9, 700), (None, 730)])
def test_operators_do_not_grow_with_the_number_of_tensors(files, monkeypatch, total, most):
    """Where nobody says how long the run is, parameters follow steps, in a few operators more."""
    counts = {}
    for kernels, layers in (("foreach", 2), ("foreach", 6), ("plain", 2), ("plain", 6)):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        params = parameters(transformer(layers))
        optimizer = LearnedOptimizer(params, files["rule"], total_steps=total)
        for step in range(2):
            gradients(params, step)
            optimizer.step()
        counts[kernels, layers] = operators(optimizer.step)
    assert counts["foreach", 2] == counts["foreach", 6] < most
    assert counts["plain", 2] > 5 * counts["foreach", 2]
    assert counts["plain", 6] > 15 * counts["foreach", 6]


def test_it_is_taken_only_if_asked_for(monkeypatch):
    rule = make_rule(CONFIG)
    for kernels, expected in (("foreach", True), ("compiled", True), ("", False), ("plain", False), ("triton", False)):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        assert isinstance(select(rule, CPU), foreach.ForeachKernel) == expected
    monkeypatch.setenv("L2O_KERNELS", "foreach")
    exact = DirectionalConfig(context=DMDConfig(window=4, rank=1))
    assert select(make_rule(exact), CPU) is None
    assert not isinstance(select(make_rule(LSTMConfig()), CPU), foreach.ForeachKernel)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 100))
def test_sums_over_rows(counts, seed):
    rows = torch.randn(sum(counts), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.stack([own.sum(0) for own in rows.split(counts)])
    torch.testing.assert_close(add_up(rows, levels_of(counts, CPU)), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the step in few operators runs on the CPU only")
@pytest.mark.parametrize("kernels", ["foreach", "compiled"])
def test_on_a_gpu_alone_and_in_a_graph(files, monkeypatch, kernels):
    """Against the plain loop on the CPU; and a graph's steps against those that are launched."""
    cuda = torch.device("cuda")

    def script(params, optimizer, graph=None):
        for step in range(6):
            if graph is None or step < 3:
                gradients(params, step)
                optimizer.step()
                continue
            kept = [p.grad for p in params]
            gradients(params, step)
            torch._foreach_copy_(kept, [p.grad for p in params])
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad
            if step == 3:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    optimizer.step()
            graph.replay()

    on_gpu = partial(parameters, device=cuda)
    found = run(monkeypatch, kernels, script, files["rule"], params=on_gpu)
    again = run(monkeypatch, kernels, script, files["rule"], params=on_gpu)
    assert_same(found, again, rtol=0, atol=0)
    plain, _ = run(monkeypatch, "plain", script, files["rule"])
    for p, q in zip(found[0], plain, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=1e-5)
    replayed = run(monkeypatch, kernels, partial(script, graph=torch.cuda.CUDAGraph()), files["rule"], params=on_gpu)
    assert_same(found, replayed, rtol=1e-6, atol=1e-6)
