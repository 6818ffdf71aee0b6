"""Parameters of every dtype, layout and shape, and the ways torch copies, swaps and compiles an optimizer."""

import copy
import io
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from rules import RULES, make_rule
from torch import nn

from l2o_runtime import LearnedOptimizer, save_rule

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SOME_RULES = [
    "none-log_sign",
    "placebo-normalized",
    "flag-log_sign",
    "dmd-exact-normalized",
    "dmd-sketch-log_sign",
    "dmd-gradient-normalized",
    "dmd-loss-log_sign",
    "kae-normalized",
]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=SOME_RULES)
def some_rule(request, tmp_path):
    """One rule of each context."""
    return saved_rule(tmp_path, request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def saved_rule(folder, name):
    path = folder / f"{name}.safetensors"
    save_rule(path, make_rule(RULES[name]))
    return path


def values(*shape, seed=0, device="cpu"):
    """Multiples of 1/8 below 4: every dtype holds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-31, 32, shape, generator=generator) / 8).to(device)


def set_gradients(params, seed):
    for i, param in enumerate(params):
        param.grad = values(*param.shape, seed=1000 * seed + i, device=param.device).to(param.dtype)


def run(optimizer, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(listed(optimizer), step)
        optimizer.step(loss=1.0 / (1 + step))


def listed(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def all_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_same_state(first, second):
    """Bit for bit, key for key, with dtype."""
    for a, b in zip(listed(first), listed(second), strict=True):
        left, right = first.state[a], second.state[b]
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype, key
            assert torch.equal(left[key], right[key]), key


# Dtypes


def test_one_step_is_the_float32_step_rounded(some_rule, dtype, device):
    exact, param = (nn.Parameter(values(3, 4, device=device).to(d)) for d in (torch.float32, dtype))
    optimizers = [LearnedOptimizer([p], rule=some_rule, lr=0.5) for p in (exact, param)]
    for optimizer in optimizers:
        run(optimizer, 1)
    assert param.dtype == dtype
    assert not torch.equal(exact, values(3, 4, device=device)), "the step moves what it is compared on"
    tolerance = {"rtol": max(1e-6, 2 * torch.finfo(dtype).eps), "atol": 1e-7}
    torch.testing.assert_close(param.detach().float(), exact.detach(), **tolerance)
    assert_same_state(*optimizers)


def test_groups_of_different_dtypes_share_one_context(some_rule, device):
    """θ and g are the same numbers in every dtype, so the states are the same bits after the first step."""
    results = []
    for dtypes in (DTYPES, [torch.float32] * 4):
        params = [nn.Parameter(values(2, 3, seed=i, device=device).to(d)) for i, d in enumerate(dtypes)]
        groups = [{"params": [p], "lr": 0.25 * i} for i, p in enumerate(params)]
        results.append(LearnedOptimizer(groups, rule=some_rule))
        run(results[-1], 1)
        assert [p.dtype for p in params] == list(dtypes)
    assert_same_state(*results)
    run(results[0], 12, first=1)
    assert all(p.isfinite().all() for p in listed(results[0]))


def test_states_keep_the_dtypes_of_the_rule(some_rule, dtype):
    param = nn.Parameter(values(3, 4).to(dtype))
    optimizer = LearnedOptimizer([param], rule=some_rule)
    run(optimizer, 3)
    reference = LearnedOptimizer([nn.Parameter(values(3, 4))], rule=some_rule)
    run(reference, 3)
    found, want = ({k: v.dtype for k, v in o.state[listed(o)[0]].items()} for o in (optimizer, reference))
    assert found == want


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*SOME_RULES, "dmd-sketch-scale"])
def test_the_default_dtype_changes_nothing(tmp_path, name, default):
    rule, results = saved_rule(tmp_path, name), []
    for dtype in (torch.float32, default):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            results.append(LearnedOptimizer([nn.Parameter(values(3, 4).float())], rule=rule))
            for step in range(9):
                listed(results[-1])[0].grad = values(3, 4, seed=step).float()
                results[-1].step()
        finally:
            torch.set_default_dtype(before)
    assert all_equal(*map(listed, results))
    assert_same_state(*results)


# Copies


def through_load_state_dict(optimizer, **arguments):
    twin = LearnedOptimizer(clones(optimizer), **arguments)
    twin.load_state_dict(optimizer.state_dict())
    return twin


def through_torch_save(optimizer, **arguments):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = LearnedOptimizer(clones(optimizer), **arguments)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


def clones(optimizer):
    return [nn.Parameter(p.detach().clone()) for p in listed(optimizer)]


COPIES = {
    "load_state_dict": through_load_state_dict,
    "torch.save": through_torch_save,
    "deepcopy": lambda optimizer, **_: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, **_: pickle.loads(pickle.dumps(optimizer)),
}


def assert_copy_continues_alike(copier, dtype, first, then, **arguments):
    params = [nn.Parameter(values(2, 3).to(dtype)), nn.Parameter(values(4).to(dtype))]
    optimizer = LearnedOptimizer(params, **arguments)
    run(optimizer, first)
    twin = copier(optimizer, **arguments)
    assert_same_state(optimizer, twin)
    for left, right in zip(listed(optimizer), listed(twin), strict=True):
        assert right.dtype == dtype
        memory = [{v.data_ptr() for v in o.state[p].values()} for o, p in ((optimizer, left), (twin, right))]
        assert memory[0].isdisjoint(memory[1]), "nothing is shared"
    run(optimizer, then, first=first)
    run(twin, then, first=first)
    assert all_equal(listed(optimizer), listed(twin))
    assert_same_state(optimizer, twin)


@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_exact_state_and_continues_alike(some_rule, dtype, copier):
    assert_copy_continues_alike(copier, dtype, first=8, then=5, rule=some_rule)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
def test_a_safeguarded_copy_continues_alike(dtype, copier, state_dtype):
    """In the middle of the first trial, which starts with the tenth step, and past its end."""
    arguments = {"safeguard": "adam", "safeguard_lr": 0.01, "state_dtype": state_dtype}
    assert_copy_continues_alike(copier, dtype, first=14, then=12, **arguments)


# State in bfloat16

NARROW_KEYS = {"h0", "c0", "h1", "c1", "m"}


@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
def test_a_copy_with_its_state_in_bfloat16_continues_alike(some_rule, copier):
    assert_copy_continues_alike(copier, torch.float32, 8, 5, rule=some_rule, state_dtype=torch.bfloat16)


def test_only_the_memory_of_the_network_is_narrow(some_rule):
    wide, narrow = (
        LearnedOptimizer([nn.Parameter(values(50, 20))], rule=some_rule, state_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    states = []
    for optimizer in (wide, narrow):
        run(optimizer, 2)
        states.append(optimizer.state[listed(optimizer)[0]])
    changed = {key for key, value in states[1].items() if value.dtype != states[0][key].dtype}
    assert changed == NARROW_KEYS & states[0].keys()
    assert all(states[1][key].dtype == torch.bfloat16 for key in changed)


@pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_loaded_state_is_cast_to_the_optimizers_own_dtype(some_rule, pair):
    first, second = (LearnedOptimizer([nn.Parameter(values(2, 3))], rule=some_rule, state_dtype=d) for d in pair)
    run(first, 8)
    second.load_state_dict(first.state_dict())
    saved, loaded = first.state[listed(first)[0]], second.state[listed(second)[0]]
    assert saved.keys() == loaded.keys()
    for key, value in saved.items():
        assert loaded[key].dtype == (pair[1] if key in NARROW_KEYS else value.dtype), key
        assert torch.equal(loaded[key], value.to(loaded[key].dtype)), key
    run(second, 5, first=8)
    assert listed(second)[0].isfinite().all()


@pytest.mark.parametrize("asked", [torch.float16, torch.float64, "bfloat16", None])
def test_other_state_dtypes_are_refused(asked):
    with pytest.raises(ValueError, match=r"state_dtype: expected one of .*bfloat16"):
        LearnedOptimizer([nn.Parameter(values(3))], state_dtype=asked)


def test_a_state_moves_to_parameters_of_another_dtype_without_a_cast(some_rule, dtype):
    optimizer = LearnedOptimizer([nn.Parameter(values(2, 3))], rule=some_rule)
    run(optimizer, 8)
    other = LearnedOptimizer([nn.Parameter(values(2, 3).to(dtype))], rule=some_rule)
    other.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, other)


def test_load_hooks_have_the_last_word():
    """A pre-hook may return another dictionary, a post-hook may change what was loaded."""
    optimizer = LearnedOptimizer([nn.Parameter(values(3))])
    run(optimizer, 2)

    def replaced(_, saved):
        saved = copy.deepcopy(saved)
        saved["state"][0]["step"].fill_(7)
        return saved

    handle = optimizer.register_load_state_dict_pre_hook(replaced)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[listed(optimizer)[0]]["step"] == 7
    handle.remove()
    optimizer.register_load_state_dict_post_hook(lambda o: o.state[listed(o)[0]]["step"].fill_(9))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[listed(optimizer)[0]]["step"] == 9


def test_a_refused_state_leaves_the_optimizer_as_it_was():
    adam, optimizer = torch.optim.Adam([nn.Parameter(values(3))]), LearnedOptimizer([nn.Parameter(values(3))])
    set_gradients(listed(adam), 0)
    adam.step()
    run(optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="another rule"):
        optimizer.load_state_dict(adam.state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert optimizer.state_dict()["state"][0].keys() == before["state"][0].keys()


# Layouts and shapes

LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("of_gradient", [True, False], ids=["gradient too", "gradient contiguous"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_changes_nothing(some_rule, layout, of_gradient):
    param = nn.Parameter(layout(values(2, 3, 4, 5)))
    plain = nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    strides = param.stride()
    assert not param.is_contiguous()
    optimizers = [LearnedOptimizer([p], rule=some_rule) for p in (param, plain)]
    for step in range(8):
        plain.grad = values(*plain.shape, seed=step)
        param.grad = values(*param.shape, seed=step)
        if of_gradient:
            param.grad = torch.empty_like(param).copy_(plain.grad)
        for optimizer in optimizers:
            optimizer.step(loss=1.0)
    assert param.stride() == strides
    assert torch.equal(param, plain)
    assert_same_state(*optimizers)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 3, 1, 2)], ids=["0-d", "one element", "5-d"])
def test_the_shape_changes_nothing(some_rule, shape):
    param = nn.Parameter(values(*shape))
    plain = nn.Parameter(param.detach().reshape(-1).clone())
    optimizers = [LearnedOptimizer([p], rule=some_rule) for p in (param, plain)]
    for step in range(8):
        param.grad = values(*shape, seed=step)
        plain.grad = param.grad.reshape(-1)
        for optimizer in optimizers:
            optimizer.step(loss=1.0)
    assert param.shape == shape
    assert not torch.equal(param, values(*shape))
    assert torch.equal(param.reshape(-1), plain)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_empty_parameters_change_nothing(some_rule, shape, place):
    results = []
    for empties in ([], [nn.Parameter(torch.empty(shape))]):
        params = [nn.Parameter(values(3)), nn.Parameter(values(2, 2, seed=1))]
        with_empties = params[:place] + empties + params[place:]
        optimizer = LearnedOptimizer(with_empties, rule=some_rule)
        for step in range(8):
            set_gradients(params, step)
            for empty in empties:
                empty.grad = torch.empty(shape)
            optimizer.step(loss=1.0)
        assert copy.deepcopy(optimizer.state_dict())["state"]
        results.append(params)
    assert all_equal(*results)


def test_only_empty_parameters_are_no_reason_to_fail(some_rule):
    param = nn.Parameter(torch.empty(0, 3))
    param.grad = torch.empty(0, 3)
    optimizer = LearnedOptimizer([param], rule=some_rule)
    optimizer.step(loss=1.0)
    through_torch_save(optimizer, rule=some_rule).step()


def test_tied_parameters_move_once(some_rule):
    """One parameter in two places has one state, and takes one step with the sum of its gradients."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    tied, single = nn.Sequential(embedding, head), nn.Parameter(embedding.weight.detach().clone())
    optimizers = [LearnedOptimizer(tied.parameters(), rule=some_rule), LearnedOptimizer([single], rule=some_rule)]
    index, target = torch.arange(5), torch.arange(5).flip(0)
    for _ in range(8):
        losses = [tied(index), single[index] @ single.T]
        for optimizer, logits in zip(optimizers, losses, strict=True):
            loss = nn.functional.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
    assert len(optimizers[0].state) == 1
    assert head.weight is embedding.weight
    assert optimizers[0].state[embedding.weight]["step"] == 8
    torch.testing.assert_close(embedding.weight.detach(), single.detach(), rtol=1e-4, atol=1e-5)


# What is refused


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_refused_at_once(dtype):
    param = nn.Parameter(torch.ones(2, dtype=dtype))
    with pytest.raises(ValueError, match=r"complex .*view_as_real"):
        LearnedOptimizer([nn.Parameter(torch.ones(2)), param])
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [param]})


def test_a_complex_parameter_may_be_viewed_as_real():
    param = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    view = torch.view_as_real(param.detach()).requires_grad_()
    optimizer = LearnedOptimizer([view])
    view.grad = torch.ones_like(view)
    optimizer.step()
    assert not torch.equal(param, torch.ones(2, dtype=torch.complex64))


def test_a_sparse_gradient_is_refused_before_anything_moves(some_rule):
    dense, embedding = nn.Parameter(values(3)), nn.Embedding(4, 2, sparse=True)
    optimizer = LearnedOptimizer([dense, embedding.weight], rule=some_rule)
    dense.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(dense, values(3))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_parameters_are_refused_at_once(layout):
    param = nn.Parameter(torch.eye(3).to_sparse(layout=layout))
    with pytest.raises(ValueError, match="sparse"):
        LearnedOptimizer([param])


# Hyper-parameters


def test_maximize_climbs_as_the_default_descends(some_rule):
    """With −g and −L in place of g and L, bit for bit."""
    up, down = nn.Parameter(values(3, 2)), nn.Parameter(values(3, 2))
    optimizers = [
        LearnedOptimizer([up], rule=some_rule, maximize=True, weight_decay=0.01),
        LearnedOptimizer([down], rule=some_rule, weight_decay=0.01),
    ]
    for step in range(10):
        up.grad = values(3, 2, seed=step)
        down.grad = -up.grad
        optimizers[0].step(loss=0.5 + step)
        optimizers[1].step(loss=-0.5 - step)
    assert not torch.equal(up, values(3, 2))
    assert torch.equal(up, down)
    assert_same_state(*optimizers)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("of_lr", [torch.float32, torch.float64])
@pytest.mark.parametrize("param_shape", [(), (3,), (2, 3)])
def test_a_tensor_lr_equals_the_number(dtype, of_lr, shape, param_shape):
    number, tensor = (nn.Parameter(values(*param_shape).to(dtype)) for _ in range(2))
    optimizers = [
        LearnedOptimizer([number], lr=0.5, weight_decay=0.25),
        LearnedOptimizer([tensor], lr=torch.full(shape, 0.5, dtype=of_lr), weight_decay=0.25),
    ]
    for optimizer in optimizers:
        run(optimizer, 3)
    assert torch.equal(number, tensor)


def test_a_tensor_lr_is_read_at_every_step_and_saved(some_rule):
    param = nn.Parameter(values(3))
    lr = torch.tensor(1.0)
    optimizer = LearnedOptimizer([param], rule=some_rule, lr=lr)
    run(optimizer, 1)
    lr.zero_()
    before = param.detach().clone()
    run(optimizer, 1)
    assert torch.equal(param, before)
    assert torch.equal(through_torch_save(optimizer, rule=some_rule).param_groups[0]["lr"], torch.tensor(0.0))


# Training loops


def test_accumulated_gradients_are_the_gradient_of_the_sum(some_rule):
    torch.manual_seed(0)
    batches = torch.randn(8, 12, 6)
    results = []
    for pieces in (1, 4):
        torch.manual_seed(0)
        model = nn.Linear(6, 1)
        optimizer = LearnedOptimizer(model.parameters(), rule=some_rule)
        for batch in batches:
            optimizer.zero_grad()
            losses = [(model(x) - x.sin().sum(1, keepdim=True)).square().sum() / 12 for x in batch.chunk(pieces)]
            for loss in losses:
                loss.backward()
            optimizer.step(loss=sum(losses))
        results.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


CLIPPERS = {
    "by norm": (lambda p: nn.utils.clip_grad_norm_(p, 0.5), lambda g: g * (0.5 / (g.norm() + 1e-6))),
    "by value": (lambda p: nn.utils.clip_grad_value_(p, 0.5), lambda g: g.clamp(-0.5, 0.5)),
}


@pytest.mark.parametrize(("clip", "formula"), CLIPPERS.values(), ids=CLIPPERS)
def test_the_rule_sees_clipped_gradients(some_rule, clip, formula):
    clipped, given = nn.Parameter(values(3, 2)), nn.Parameter(values(3, 2))
    optimizers = [LearnedOptimizer([p], rule=some_rule) for p in (clipped, given)]
    for step in range(8):
        clipped.grad, given.grad = values(3, 2, seed=step), formula(values(3, 2, seed=step))
        clip([clipped])
        for optimizer in optimizers:
            optimizer.step(loss=1.0)
    torch.testing.assert_close(clipped.detach(), given.detach(), rtol=1e-4, atol=1e-5)


# Swapping


def swapped(optimizer, params, state_dict):
    swap_in = getattr(torch.optim, "swap_in_optimizer_params_and_state", None)
    if swap_in is None:
        pytest.skip(f"torch {torch.__version__} has no swap_in_optimizer_params_and_state")
    return swap_in(optimizer, {str(i): p for i, p in enumerate(params)}, state_dict)


@pytest.fixture(params=[None, "adam"], ids=["bare", "safeguarded"])
def visit(request, some_rule):
    """A host that took 3 steps, and a guest that took 12, on two parameters each."""
    host, guest, alone = (
        LearnedOptimizer(
            [
                {"params": [nn.Parameter(values(2, 3, seed=seed))]},
                {"params": [nn.Parameter(values(4, seed=seed))], "lr": 0.1 * (1 + seed)},
            ],
            rule=some_rule,
            weight_decay=0.01,
            safeguard=request.param,
        )
        for seed in (0, 1, 1)
    )
    run(host, 3)
    run(guest, 12)
    run(alone, 12)
    return SimpleNamespace(host=host, guest=guest, alone=alone)


def test_swapped_in_parameters_and_state_take_their_own_steps(visit):
    """The host steps for the guest, who then stands where it would alone; the host does not notice."""
    before = copy.deepcopy(visit.host.state_dict())
    params, start, saved = (
        listed(visit.host),
        [p.detach().clone() for p in listed(visit.host)],
        visit.guest.state_dict(),
    )
    with swapped(visit.host, listed(visit.guest), saved):
        assert all(a is b for a, b in zip(listed(visit.host), listed(visit.guest), strict=True))
        run(visit.host, 4, first=12)
    run(visit.alone, 4, first=12)
    assert all_equal(listed(visit.guest), listed(visit.alone))
    assert all(a is b for a, b in zip(listed(visit.host), params, strict=True))
    assert all_equal(params, start)
    torch.testing.assert_close(visit.host.state_dict(), before, rtol=0, atol=0)


def test_the_swapped_in_state_is_advanced_in_place(visit):
    """torch hands back what was changed in place only, so a step may not rebind any tensor of the state.

    What a step adds to the state is lost for the same reason; after 12 steps even the safeguard has all of its own.
    """
    saved = visit.guest.state_dict()
    with swapped(visit.host, listed(visit.guest), saved):
        run(visit.host, 4, first=12)
    run(visit.alone, 4, first=12)
    torch.testing.assert_close(saved["state"], visit.alone.state_dict()["state"], rtol=0, atol=0)


def test_the_host_is_restored_after_an_exception(visit):
    before = copy.deepcopy(visit.host.state_dict())
    listed(visit.guest)[0].grad = torch.ones(2, 3)
    with (
        pytest.raises(ValueError, match="expected one number"),
        swapped(visit.host, listed(visit.guest), visit.guest.state_dict()),
    ):
        visit.host.step(loss=torch.ones(2))
    torch.testing.assert_close(visit.host.state_dict(), before, rtol=0, atol=0)


def test_converted_modules_keep_their_state(some_rule):
    """`module.to(dtype)` that swaps tensors keeps parameters as keys: the state survives as it is."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = nn.Linear(3, 2)
        optimizer = LearnedOptimizer(model.parameters(), rule=some_rule)
        run(optimizer, 4)
        before = copy.deepcopy(optimizer.state_dict()["state"])
        model.to(torch.float64)
        torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
        run(optimizer, 4, first=4)
        assert model.weight.dtype == torch.float64
        assert optimizer.state[model.weight]["step"] == 8
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# torch.compile


def compiled_and_eager(rule, shapes, backend, eager_steps, **options):
    """Parameters after 8 steps, those after the first `eager_steps` compiled, and none of them."""
    torch.compiler.reset()
    results = []
    for eager in (eager_steps, 8):
        optimizer = LearnedOptimizer([nn.Parameter(values(*shape)) for shape in shapes], rule=rule, **options)
        compiled = torch.compile(optimizer.step, backend=backend, fullgraph=True)
        for i in range(8):
            set_gradients(listed(optimizer), i)
            (optimizer.step if i < eager else compiled)(loss=torch.tensor(1.0 / (1 + i)))
        results.append([param.detach() for param in listed(optimizer)])
    torch.compiler.reset()
    return results


@pytest.mark.parametrize(
    "name", ["none-log_sign", "dmd-sketch-normalized", "kae-log_sign", "directional", "none-hierarchical"]
)
def test_compiled_steps_are_one_graph_and_equal_eager_ones(tmp_path, name):
    """The first step too, which makes the state."""
    results = compiled_and_eager(saved_rule(tmp_path, name), [(2, 3), (4,)], "aot_eager", eager_steps=0)
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_compiled_steps_take_a_state_in_bfloat16(tmp_path):
    """From the second step on; numbers that are rounded the other way make the difference."""
    rule = saved_rule(tmp_path, "none-normalized")
    results = compiled_and_eager(rule, [(2, 3)], "aot_eager", eager_steps=1, state_dtype=torch.bfloat16)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, and there is no g++")
def test_steps_compiled_by_inductor_equal_eager_ones(tmp_path):
    """On one parameter and from the second step on: inductor takes its time over every graph."""
    results = compiled_and_eager(saved_rule(tmp_path, "none-normalized"), [(2, 3)], "inductor", eager_steps=1)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
