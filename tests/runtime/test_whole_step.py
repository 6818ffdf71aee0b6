"""A whole step in compiled code is that of the plain loop, whatever happens to parameters, states and gradients."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from l2o_runtime import LearnedOptimizer, make_rule, save_rule
from l2o_runtime.kernels import Kernel
from l2o_runtime.rules import DirectionalConfig, agreement
from l2o_runtime.rules.steering import STATES
from l2o_runtime.state import zeros
from l2o_runtime.stepping.parts import make_part

pytest.importorskip("llvmlite", reason="the CPU kernel needs llvmlite: pip install '.[fast]'")

from l2o_runtime.kernels import directional, pieces, plan

GROUP = {"lr": 1.0, "weight_decay": 0.0, "maximize": False}
SHAPES = [(5, 7), (40, 3), (4, 3, 3, 3), (9,), (1,), (), (30, 50), (2, 2)]


def random_rule(seed=1, **config):
    """No weight is zero, so that every formula counts."""
    rule = make_rule(DirectionalConfig(**({"hidden": 4, "rank": 3, "places": True} | config)))
    torch.manual_seed(seed)
    for p in rule.parameters():
        nn.init.normal_(p, std=0.3)
    return rule


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    path = tmp_path_factory.mktemp("rules") / "rule.safetensors"
    save_rule(path, random_rule())
    return path


def parameters(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in SHAPES]


def gradients(params, step, leave_out=()):
    rng = torch.Generator().manual_seed(100 + step)
    for index, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)
        if index in leave_out:
            p.grad = None


def both(rule, monkeypatch, script, **options):
    """A script with the compiled step, and with the plain loop: its parameters and optimizer."""
    found = []
    for kernels in ("", "plain"):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        params = parameters()
        optimizer = LearnedOptimizer(params, rule, **options)
        taken = script(params, optimizer)
        found.append((params, taken or optimizer))
    return found


def assert_same(found, rtol=2e-4, atol=2e-6):
    (fast, optimizer), (slow, other) = found
    for p, q in zip(fast, slow, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
    torch.testing.assert_close(optimizer.state_dict()["state"], other.state_dict()["state"], rtol=rtol, atol=atol)
    assert optimizer.health() == other.health()
    assert any(kernel is not None for kernel in optimizer._replicas.kernels.values())
    assert not any(kernel is not None for kernel in other._replicas.kernels.values())


def kernel_of(optimizer):
    return next(iter(optimizer._replicas.kernels.values()))


def takes_whole_steps(optimizer):
    kernel = kernel_of(optimizer)
    return kernel is not None and kernel.whole


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("bad", [None, "nan", "inf", "zero", "huge", "loss"])
def test_one_call_is_several_to_the_bit(rule, monkeypatch, size, bad):
    """Pieces of 500 coordinates, vectors of any width: sums are added up in the same order, and the same is told."""
    monkeypatch.setattr(directional, "widest", lambda: size)
    monkeypatch.setattr(pieces, "chunk_size", lambda *_: 500)
    found = []
    for framed in (True, False):
        if not framed:
            monkeypatch.setattr(directional, "at_once", lambda *_: False)
        params = parameters()
        optimizer = LearnedOptimizer(params, rule, total_steps=40, weight_decay=0.1)
        for step in range(6):
            gradients(params, step)
            if step == 4 and bad is not None:
                for p in params if bad == "zero" else params[1:2]:
                    p.grad.mul_({"nan": torch.nan, "inf": torch.inf, "zero": 0.0, "huge": 1e38, "loss": 1.0}[bad])
            optimizer.step(loss=torch.tensor(torch.nan if (step, bad) == (4, "loss") else 1.0))
        assert (kernel_of(optimizer).frame is not None) is framed
        found.append((params, optimizer))
    (one, first), (other, second) = found
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    for state, another in zip(first.state_dict()["state"].values(), second.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(value, another[key]) for key, value in state.items())
    assert first.health() == second.health()
    assert first.health()["steps"] == (5 if bad in {"nan", "inf", "zero", "loss"} else 6)


def test_large_networks_and_half_precision_take_several_calls(rule, monkeypatch):
    for changes, dtype, framed in (({}, "float32", True), ({"SHARED": 100}, "float32", False), ({}, "bfloat16", False)):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(plan, name, value)
            params = parameters()
            optimizer = LearnedOptimizer(params, rule, state_dtype=getattr(torch, dtype))
            gradients(params, 0)
            optimizer.step()
            assert (kernel_of(optimizer).frame is not None) is framed


@pytest.mark.parametrize("wave", [1, 40, 2**20])
@pytest.mark.parametrize(("threads", "shared"), [(1, 0), (2, 0), (1, 10**9)])
def test_changing_sets_of_gradients(rule, monkeypatch, wave, threads, shared):
    monkeypatch.setattr(plan, "WAVE", wave)
    monkeypatch.setattr(plan, "SHARED", shared)
    monkeypatch.setattr(plan, "SMALLEST", 20)

    def script(params, optimizer):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for step in range(9):
            gradients(params, step, leave_out={step % 4, 6} if step % 3 else ())
            optimizer.step()
        torch.set_num_threads(before)

    assert_same(both(rule, monkeypatch, script, weight_decay=0.1, total_steps=20))


def test_groups_that_are_added_and_rates_that_change(rule, monkeypatch):
    def script(params, optimizer):
        for step in range(8):
            gradients(params, step)
            if step == 3:
                more = nn.Parameter(torch.ones(6, 5))
                optimizer.add_param_group({"params": [more], "lr": 0.3, "weight_decay": 0.5})
                params.append(more)
            if step == 5:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.2)
                optimizer.param_groups[0]["weight_decay"] = 0.3
            if step == 6:
                optimizer.param_groups[0]["maximize"] = True
            if len(params) > len(SHAPES):
                params[-1].grad = torch.full((6, 5), 0.1) + torch.eye(6)[:, :5]
            optimizer.step()

    assert_same(both(rule, monkeypatch, script))


def test_parameters_that_are_swapped_under_it(rule, monkeypatch):
    def script(params, optimizer):
        for step in range(8):
            if step == 2:
                params[0].data = params[0].data.clone() + 1
            if step == 4:  # not contiguous any more, and then again
                params[1].data = params[1].data.t().contiguous().t()
            if step == 5:
                optimizer.state[params[3]]["m10"] = optimizer.state[params[3]]["m10"] * 2
            if step == 6:
                del optimizer.state[params[2]]
                optimizer.state[params[6]]["tensor_longer"].fill_(1.5)
            gradients(params, step)
            if step == 7:
                params[0].grad = params[0].grad.t().contiguous().t()
            optimizer.step()

    assert_same(both(rule, monkeypatch, script))


def test_parameters_of_another_type(rule, monkeypatch):
    def script(params, optimizer):
        for step in range(6):
            if step == 3:
                for p in params[:4]:
                    p.data = p.data.double()
            gradients(params, step)
            optimizer.step()

    assert_same(both(rule, monkeypatch, script))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_look_for_themselves(rule, monkeypatch, copied):
    def script(params, optimizer):
        for step in range(6):
            gradients(params, step)
            optimizer.step()
            if step == 2:
                before = [p.detach().clone() for p in params]
                twins, optimizer = copied((params, optimizer))
                originals, params[:] = list(params), twins
        for p, q in zip(originals, before, strict=True):
            assert torch.equal(p, q), "the copy stepped the original"
        return optimizer

    assert_same(both(rule, monkeypatch, script))


def test_a_state_that_is_loaded(rule, monkeypatch):
    def script(params, optimizer):
        for step in range(6):
            gradients(params, step)
            optimizer.step()
            if step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
            if step == 4:
                optimizer.load_state_dict(saved)

    assert_same(both(rule, monkeypatch, script))


@pytest.mark.parametrize("bad", ["nan gradient", "inf gradient", "no gradient", "nan parameter", "nan loss"])
def test_a_bad_step_changes_nothing_and_is_counted(rule, monkeypatch, bad):
    def script(params, optimizer):
        for step in range(5):
            gradients(params, step)
            loss = 1.0
            if step == 3:
                left = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state)
                if bad == "no gradient":
                    for p in params:
                        p.grad.zero_()
                elif bad == "nan parameter":
                    kept = params[2].detach().clone()
                    with torch.no_grad():
                        params[2].view(-1)[1] = torch.nan
                elif bad == "nan loss":
                    loss = float("nan")
                else:
                    params[0].grad[1, 2] = float(bad.split()[0])
            optimizer.step(loss=loss)
            if step == 3:
                if bad == "nan parameter":
                    with torch.no_grad():
                        params[2].copy_(kept)
                for p, q in zip(params, left[0], strict=True):
                    assert torch.equal(p, q)
                for p, q in zip(optimizer.state.values(), left[1].values(), strict=True):
                    assert all(torch.equal(p[key], q[key]) for key in p if key != "health")

    found = both(rule, monkeypatch, script)
    assert found[0][1].health()["steps"] == 4
    assert_same(found)


def test_a_gradient_that_does_not_fit_is_refused(rule):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    for step in range(3):
        gradients(params, step)
        optimizer.step()
    params[0].data = torch.zeros(7, 7)
    with pytest.raises(RuntimeError, match="gradient is"):
        optimizer.step()
    params[0].grad = torch.zeros(7, 7)
    with pytest.raises(RuntimeError, match="needs"):
        optimizer.step()


@pytest.mark.parametrize("key", ["m10", "tensor_steps", "step"])
def test_a_state_of_another_size_is_refused(rule, key):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    for step in range(2):
        gradients(params, step)
        optimizer.step()
    optimizer.state[params[0]][key].resize_(1 if key == "m10" else 3)
    with pytest.raises(RuntimeError, match=key):
        optimizer.step()


def test_gradients_and_parameters_are_not_kept(rule):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    gradients(params, 0)
    optimizer.step()
    optimizer.step()
    assert takes_whole_steps(optimizer)
    grads = [weakref.ref(p.grad) for p in params]
    for p in params:
        p.grad = None
    gc.collect()
    assert not [grad for grad in grads if grad() is not None]


@pytest.mark.parametrize("moved", ["shared", "resized", "released"])
def test_storages_that_move_with_all_tensors_in_them(rule, monkeypatch, moved):
    def script(params, optimizer):
        for step in range(5):
            if step == 2 and moved == "shared":
                params[0].share_memory_()
            if step == 2 and moved == "resized":
                params[6].data.resize_(300, 500)
                params[6].data.resize_(30, 50)
            if step == 2 and moved == "released":
                kept, storage = params[6].detach().clone(), params[6].untyped_storage()
                size = storage.nbytes()
                storage.resize_(0)
                storage.resize_(size)
                with torch.no_grad():
                    params[6].copy_(kept)
            gradients(params, step)
            optimizer.step()

    assert_same(both(rule, monkeypatch, script))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_torch_s_default_dtype_changes_nothing(rule, monkeypatch, dtype):
    def script(params, optimizer):
        torch.set_default_dtype(dtype)
        try:
            for step in range(4):
                gradients(params, step)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)

    assert_same(both(rule, monkeypatch, script))


def test_torch_s_default_device_changes_nothing(rule, monkeypatch):
    def script(params, optimizer):
        gradients(params, 0)
        with torch.device("meta"):
            optimizer.step()

    monkeypatch.setenv("L2O_KERNELS", "")
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    gradients(params, 0)
    optimizer.step()
    again = parameters()
    other = LearnedOptimizer(again, rule)
    script(again, other)
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["negated", "zero"])
def test_gradients_that_do_not_lie_where_they_say(rule, monkeypatch, kind):
    def script(params, optimizer):
        for step in range(3):
            gradients(params, step)
            grad = params[0].grad
            params[0].grad = torch._neg_view(grad) if kind == "negated" else torch._efficientzerotensor(grad.shape)
            optimizer.step()

    found = both(rule, monkeypatch, script)
    for p, q in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("key", ["step", "tensor_steps"])
def test_states_elsewhere_are_not_read_by_address(rule, key):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    gradients(params, 0)
    optimizer.step()
    optimizer.state[params[0]][key] = optimizer.state[params[0]][key].to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.step()


def test_autograd_sees_that_parameters_were_written(rule):
    weight = nn.Parameter(torch.ones(9))
    optimizer = LearnedOptimizer([weight], rule)
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    before = weight._version
    optimizer.step()
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_that_is_there_twice_steps_twice(rule, monkeypatch):
    def script(params, optimizer):
        for step in range(3):
            gradients(params, step)
            optimizer.step()

    ends = []
    for kernels in ("", "plain"):
        monkeypatch.setenv("L2O_KERNELS", kernels)
        params = parameters()
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = LearnedOptimizer([params[0], params[0], params[1]], rule)
        script(params, optimizer)
        ends.append((params[0].detach(), optimizer.state[params[0]]["step"]))
    assert ends[0][1] == ends[1][1] == 6
    # Which momentum is orthogonalised, before or after the first of both steps, is another.
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0.02, atol=0.01)


def test_autocast_changes_nothing_at_a_high_rank(tmp_path, monkeypatch):
    save_rule(tmp_path / "rule.safetensors", random_rule(rank=40))

    def script(params, optimizer):
        for step in range(3):
            gradients(params, step)
            with torch.autocast("cpu", torch.bfloat16):
                optimizer.step()

    assert_same(both(tmp_path / "rule.safetensors", monkeypatch, script))


def test_threads_that_step_one_optimizer_wait_for_each_other(rule):
    param = nn.Parameter(torch.randn(40, 30))
    optimizer = LearnedOptimizer([param], rule)
    param.grad = torch.randn(40, 30)
    optimizer.step()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(optimizer.step) for _ in range(100)]:
            done.result()
    assert param.isfinite().all()
    assert optimizer.health()["steps"] == 101


def test_numpy_s_error_state_changes_nothing(rule):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    gradients(params, 0)
    optimizer.step()
    for p in params:
        optimizer.state[p]["step"].fill_(20_000)
        optimizer.state[p]["tensor_steps"].fill_(20_000)
    with np.errstate(all="raise"):
        optimizer.step()
    assert optimizer.health()["steps"] == 2


def test_states_that_were_replaced_are_freed(rule):
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    gradients(params, 0)
    optimizer.step()
    optimizer.step()
    old = weakref.ref(optimizer.state[params[0]]["m10"])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert old() is None


def test_steps_are_whole(rule, monkeypatch):
    calls = []
    whole = directional.DirectionalKernel.step
    monkeypatch.setattr(directional.DirectionalKernel, "step", lambda *x: calls.append(1) or whole(*x))
    params = parameters()
    optimizer = LearnedOptimizer(params, rule)
    plans = []
    for step in range(4):
        gradients(params, step)
        optimizer.step()
        plans.append(kernel_of(optimizer).plan)
    assert len(calls) == 4
    assert plans[1] is plans[2] is plans[3], "tables are made anew"


def test_kernels_have_no_whole_step_unless_they_say_so():
    class Other(Kernel):
        def update(self, parts, steering, good):
            pass

    assert not Other().whole
    with pytest.raises(NotImplementedError):
        Other().step([], torch.tensor(0.0))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 7.0, 500.0]))
def test_tensors_are_steered_as_operators_do(count, seed, step):
    """Some sums are zero, some sizes one; from the first step on."""
    rng, rule = np.random.default_rng(seed), random_rule(seed % 5)
    sizes = rng.choice([1, 2, 10, 1000], count)
    params = [torch.zeros([int(size)] if rng.random() < 0.5 or size < 10 else [2, int(size) // 2]) for size in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    ages = rng.random(count) < 0.8
    columns = rng.random((6, count)) * sizes * 10.0 ** rng.integers(-8, 3, count)
    columns[:, rng.random(count) < 0.2] = 0
    state = {key: rng.random(count).astype(np.float32) * (step > 0) * ages for key in STATES}
    state["tensor_steps"] = np.full(count, step, dtype=np.float32) * ages
    sums, tensors = np.stack([sizes, *columns]), {key: torch.tensor(value) for key, value in state.items()}
    dimensions = torch.tensor([float(p.dim()) for p in params])
    with torch.no_grad():
        shapes = torch.stack([dimensions, torch.tensor(sizes).float()], dim=-1)
        expected, new = rule.steer(torch.tensor(sums.T), shapes, torch.tensor(0.0), tensors)
    kernel = directional.DirectionalKernel(rule)
    spec, own = rule.spec.coordinate, rule.spec.tensor
    parts = [make_part(GROUP, p, {}, spec, own, 0) for p in params]
    made = plan.Plan(parts, kernel.width, rule.config.rank, 1)
    for row, key in enumerate(STATES, 1):
        made.owned[row, :count] = state[key]
    found = kernel._steer(made, np.concatenate([np.ones((1, count)), sums]).T)
    close = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(torch.tensor(found.T), expected, **close)
    for row, key in enumerate(STATES, 1):
        torch.testing.assert_close(
            torch.tensor(made.owned[row, :count]), new[key], **close, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_the_table_of_states_is_the_rule_s():
    assert tuple(random_rule().spec.tensor) == STATES
    assert len(zeros(random_rule().spec.tensor, (2,))) == len(STATES)
    assert len(agreement.Sums._fields) == agreement.SUMS
