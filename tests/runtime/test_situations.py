"""Situations that users of other optimizers have reported: what must not crash, hang, or go wrong without a word."""

import copy
import os
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from l2o_runtime import LearnedOptimizer
from l2o_runtime.files.artifact import bundled_rules
from l2o_runtime.stepping.advice import HorizonWarning

pytestmark = pytest.mark.slow

BUNDLED = bundled_rules()


def quadratic_step(optimizer: LearnedOptimizer, *params: nn.Parameter) -> None:
    """One step on ½ Σ θ²."""
    for param in params:
        param.grad = param.detach().clone()
    optimizer.step(loss=sum(float(param.detach().square().sum()) for param in params))


# Sizes, types and places that change under the optimizer


def grow(param: nn.Parameter) -> None:
    param.data = torch.cat([param.data, torch.ones_like(param.data)])


def shrink(param: nn.Parameter) -> None:
    param.data = param.data[: len(param.data) // 2].clone()


@pytest.mark.parametrize("kernels", ["", "plain"], ids=["compiled", "plain"])
@pytest.mark.parametrize("change", [grow, shrink])
@pytest.mark.parametrize("rule", BUNDLED)
def test_a_parameter_of_another_size_is_an_error_before_anything_is_written(rule, change, kernels, monkeypatch):
    monkeypatch.setenv("L2O_KERNELS", kernels)
    first, second = (nn.Parameter(torch.randn(40, 3)) for _ in range(2))
    optimizer = LearnedOptimizer([first, second], rule=rule)
    quadratic_step(optimizer, first, second)
    change(second)
    before = copy.deepcopy((first.data, second.data, optimizer.state_dict()["state"]))
    with pytest.raises(RuntimeError, match=r"state \w+ is .*needs"):
        quadratic_step(optimizer, first, second)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    for old, new in zip(before[2].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    del optimizer.state[second]
    quadratic_step(optimizer, first, second)
    assert optimizer.health()["steps"] == 2


@pytest.mark.parametrize("rule", BUNDLED)
def test_a_gradient_of_another_size_is_an_error(rule):
    param = nn.Parameter(torch.randn(40, 3))
    optimizer = LearnedOptimizer([param], rule=rule)
    quadratic_step(optimizer, param)
    grow(param)
    with pytest.raises(RuntimeError, match=r"gradient is \(40, 3\).*parameter \(80, 3\).*backward"):
        optimizer.step()


ACTIONS = (
    "step",
    "grow",
    "shrink",
    "reallocate",
    "transpose",
    "double",
    "half",
    "alias",
    "swap states",
    "narrow state",
)


def disturb(action: str, params: list[nn.Parameter], optimizer: LearnedOptimizer) -> None:
    """Something that scripts do to parameters and states between two steps."""
    one, other = params
    states = [key for key, value in optimizer.state[one].items() if value.shape[:1] == one.shape[:1] and one.dim()]
    key = states[0] if states else None
    if action == "grow":
        grow(one)
    elif action == "shrink":
        shrink(one)
    elif action == "reallocate":
        one.data = one.data.clone()
    elif action == "transpose":
        one.data = one.data.t().contiguous().t()
    elif action in ("double", "half"):
        one.data = one.data.double() if action == "double" else one.data.bfloat16()
    elif action == "alias":
        one.data = other.data.view_as(one.data) if one.numel() == other.numel() else one.data
    elif action == "swap states" and key is not None and key in optimizer.state[other]:
        mine, theirs = optimizer.state[one], optimizer.state[other]
        mine[key], theirs[key] = theirs[key], mine[key]
    elif action == "narrow state" and key is not None:
        optimizer.state[one][key] = optimizer.state[one][key][:1]


def story(rule: str, actions: list[str], kernels: str) -> list[object]:
    """What comes of steps with disturbances between them: parameters, or the error that ends it."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(30, 5)), nn.Parameter(torch.randn(30, 5))]
    optimizer = LearnedOptimizer(params, rule=rule)
    with mock.patch.dict(os.environ, L2O_KERNELS=kernels):
        quadratic_step(optimizer, *params)
        for action in actions:
            disturb(action, params, optimizer)
            for param in params:
                param.grad = param.detach().clone()
            try:
                optimizer.step(loss=1.0)
            except RuntimeError as error:
                return [str(error)]
    return [param.detach().double() for param in params]


@settings(
    max_examples=int(os.environ.get("L2O_FUZZ", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
@given(rule=st.sampled_from(BUNDLED), actions=st.lists(st.sampled_from(ACTIONS), max_size=4))
def test_whatever_happens_between_steps_kernels_do_as_the_plain_loop(rule, actions):
    compiled, plain = (story(rule, actions, kernels) for kernels in ("", "plain"))
    assert len(compiled) == len(plain)
    for one, other in zip(compiled, plain, strict=True):
        if isinstance(one, str):
            assert one == other
        elif "alias" not in actions:  # what two parameters share is read before or after it is written
            amplifies = rule.startswith("l2o")  # the papers' rules: rounding of 1e-7 is 1e-4 after five steps
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2 if amplifies else 1e-4)


# Checkpoints


def regression(model: nn.Module, optimizer: LearnedOptimizer, steps: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 3, generator=rng)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def frozen_first(rule: str, **options) -> tuple[nn.Module, LearnedOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].weight.requires_grad_(False)
    return model, LearnedOptimizer(model.parameters(), rule=rule, **options)


def assert_goes_on(one: tuple[nn.Module, LearnedOptimizer], other: tuple[nn.Module, LearnedOptimizer]) -> None:
    assert one[1].health() == other[1].health()
    for model, optimizer in (one, other):
        regression(model, optimizer, 10, seed=1)
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("options", [{}, {"safeguard": "adam"}], ids=["plain", "safeguard"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("rule", ["scale", "normalized-dmd", "l2o-kae"])
def test_distributed_checkpoints_keep_the_context_though_the_first_parameter_is_frozen(rule, flat, options, tmp_path):
    kind = StateDictOptions(flatten_optimizer_state_dict=flat)
    first, second = frozen_first(rule, **options), frozen_first(rule, **options)
    regression(*first, 70, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of writing without a process group
        dcp.save(get_optimizer_state_dict(*first, options=kind), checkpoint_id=tmp_path)
        second[0].load_state_dict(first[0].state_dict())
        state = get_optimizer_state_dict(*second, options=kind)
        dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(*second, state, options=kind)
    assert_goes_on(first, second)


@pytest.mark.parametrize("rule", ["scale", "normalized-dmd"])
def test_the_context_survives_whichever_state_is_left_out(rule):
    for dropped in (0, 1, 2, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        optimizer = LearnedOptimizer(model.parameters(), rule=rule)
        regression(model, optimizer, 30, seed=0)
        saved = optimizer.state_dict()
        del saved["state"][dropped]
        other = LearnedOptimizer(model.parameters(), rule=rule)
        other.load_state_dict(saved)
        assert other.health()["steps"] == 30
        regression(model, other, 1, seed=1)
        assert other.health()["steps"] == 31
        del optimizer.state[list(model.parameters())[dropped]]
        assert optimizer.health()["steps"] == 30


def test_a_layer_that_is_inserted_in_front_leaves_the_context(recwarn):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = LearnedOptimizer(model.parameters())
    regression(model, optimizer, 5, seed=0)
    saved = optimizer.state_dict()
    larger = nn.Sequential(nn.Linear(3, 3), *model)
    saved["state"] = {index + 2: state for index, state in saved["state"].items()}
    saved["param_groups"][0]["params"] = list(range(6))
    other = LearnedOptimizer(larger.parameters())
    other.load_state_dict(saved)
    assert other.health()["steps"] == 5
    regression(larger, other, 1, seed=0)
    assert other.health()["steps"] == 6
    assert not recwarn.list


def test_a_state_without_what_belongs_to_the_whole_optimization_is_told():
    model = nn.Linear(3, 1)
    optimizer = LearnedOptimizer(model.parameters())
    regression(model, optimizer, 3, seed=0)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for key in [key for key in state if key == "health" or key.startswith("context_")]:
            del state[key]
    with pytest.warns(UserWarning, match="start again"):
        LearnedOptimizer(model.parameters()).load_state_dict(saved)


def test_a_state_from_before_the_noise_floor_goes_on():
    model = nn.Linear(3, 1)
    optimizer = LearnedOptimizer(model.parameters(), rule="normalized-dmd")
    regression(model, optimizer, 30, seed=0)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        del state["context_steps"], state["context_energy"]
    other = LearnedOptimizer(model.parameters(), rule="normalized-dmd")
    other.load_state_dict(saved)
    regression(model, other, 1, seed=1)
    assert other.health()["steps"] == 31


def test_states_that_lie_beside_ours_are_carried_along():
    model = nn.Linear(4, 1)
    optimizer = LearnedOptimizer(model.parameters())
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    for param in model.parameters():
        optimizer.state[param]["slow_weights"] = param.detach().clone()
    optimizer.load_state_dict(optimizer.state_dict())
    for param in model.parameters():
        assert torch.equal(optimizer.state[param]["slow_weights"], param)


def test_the_state_of_another_optimizer_is_told_as_such():
    model = nn.Linear(4, 1)
    adam = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 4)).square().mean().backward()
    adam.step()
    with pytest.raises(ValueError, match=r"state \w+ is missing.*another optimizer"):
        LearnedOptimizer(model.parameters()).load_state_dict(adam.state_dict())


# Compilation


@pytest.mark.parametrize("rule", BUNDLED)
def test_a_step_compiles_to_one_graph_for_every_bundled_rule(rule):
    torch.compiler.reset()
    torch.manual_seed(0)
    whole, parts = ((nn.Linear(6, 3), nn.Linear(3, 1)) for _ in range(2))
    for one, other in zip(whole, parts, strict=True):
        other.load_state_dict(one.state_dict())
    optimizers = [LearnedOptimizer([*a.parameters(), *b.parameters()], rule=rule) for a, b in (whole, parts)]
    compiled = torch.compile(optimizers[0].step, backend="eager", fullgraph=True)
    x = torch.randn(3, 32, 6)
    with mock.patch.dict(os.environ, L2O_KERNELS="plain"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for batch in x:
            for (a, b), optimizer, step in zip((whole, parts), optimizers, (compiled, optimizers[1].step), strict=True):
                optimizer.zero_grad()
                loss = b(a(batch).tanh()).square().mean()
                loss.backward()
                step(loss=loss.detach())
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)


# The safeguard


def test_the_safeguard_keeps_copies_of_what_is_trained_only():
    base, head = nn.Linear(100, 100).requires_grad_(False), nn.Linear(100, 1)
    optimizer = LearnedOptimizer([*base.parameters(), *head.parameters()], safeguard="adam")
    for _ in range(80):
        loss = head(base(torch.randn(4, 100))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    assert optimizer.health()["trials"] > 0
    assert sum(value.numel() for state in optimizer.state.values() for value in state.values()) < 20 * 101 + 1000
    assert not any(optimizer.state.get(param) for param in base.parameters())


def test_the_safeguard_accepts_weights_that_the_script_has_set():
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    optimizer = LearnedOptimizer(model.parameters(), safeguard="adam")
    done = False
    for _ in range(80):
        if optimizer.health()["learned_steps"] == 3 and not done:
            model.weight.data.fill_(7.0)
            done = True
        x = torch.randn(64, 6)
        loss = (model(x) - x[:, :1].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        if done:
            break
    assert done
    assert 6 < model.weight.mean().item() < 8


# What a script passes


@pytest.mark.parametrize("returned", [(torch.tensor(1.0), {}), {"loss": 1.0}, "1.0", [1.0]], ids=str)
def test_a_closure_that_returns_no_loss_is_told(returned):
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer = LearnedOptimizer([param])
    with pytest.raises(TypeError, match=f"closure: expected .* got a {type(returned).__name__}"):
        optimizer.step(lambda: returned)
    with pytest.raises(TypeError, match=f"loss: expected .* got a {type(returned).__name__}"):
        optimizer.step(loss=returned)
    optimizer.step(lambda: np.float32(1.0))
    optimizer.step(lambda: None)


def test_states_that_were_cast_by_hand_are_told():
    param = nn.Parameter(torch.ones(2))
    optimizer = LearnedOptimizer([param])
    quadratic_step(optimizer, param)
    for key, value in optimizer.state[param].items():
        optimizer.state[param][key] = value.bfloat16()
    with pytest.raises(RuntimeError, match="bfloat16"):
        quadratic_step(optimizer, param)


def steps_with(lrs: list[float], **options) -> list[warnings.WarningMessage]:
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], lr=lrs[0], **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for lr in lrs:
            optimizer.param_groups[0]["lr"] = lr
            quadratic_step(optimizer, param)
    return told


def test_a_learning_rate_that_was_meant_for_adam_is_told_once():
    (told,) = steps_with([1e-3] * 25)
    assert "lr has been at most 0.001" in str(told.message)
    assert "1.0" in str(told.message)
    assert told.filename == __file__
    assert not steps_with([1e-3 * 1.1**step for step in range(60)]), "a warm-up, or a range test"
    assert not steps_with([1.0] * 5 + [1e-3] * 20), "a schedule"
    assert not steps_with([0.06] * 20)


def test_weight_decay_means_what_it_means_in_adamw():
    """At lr = 1 as in AdamW at its default rate; the gradient is that of another parameter."""
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = LearnedOptimizer([ours], "scale", weight_decay=0.01)
    adamw = torch.optim.AdamW([theirs], weight_decay=0.01)
    pushed = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [pushed], "weight_decay": 0.0})
    for _ in range(100):
        ours.grad, theirs.grad, pushed.grad = torch.zeros(3), torch.zeros(3), torch.ones(3)
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)


def test_the_horizon_is_told_at_the_line_of_the_script_with_advice():
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], rule="l2o")
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)  # it wraps `step` in a function of torch's
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(102):
            quadratic_step(optimizer, param)
            scheduler.step()
    assert [(each.category, each.filename) for each in told] == [(HorizonWarning, __file__)]
    assert "let lr fall" in str(told[0].message)


def test_the_text_of_an_optimizer_names_its_rule():
    for rule, made in (("default", "size from a schedule"), ("scale", "made for 2,000 steps")):
        text = repr(LearnedOptimizer([nn.Parameter(torch.ones(1))], rule, safeguard="adam"))
        assert text.startswith(f"LearnedOptimizer (rule {rule}, {made}, safeguard adam\nParameter Group 0")


def test_a_word_of_a_vocabulary_that_trains_alone():
    """A padded, rarely seen row stays where it is until it is seen."""
    torch.manual_seed(0)
    embedding = nn.Embedding(10, 4, padding_idx=0)
    optimizer = LearnedOptimizer(embedding.parameters())
    before = embedding.weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        F.mse_loss(embedding(torch.tensor([0, 1, 2])), torch.ones(3, 4)).backward()
        optimizer.step()
    assert torch.equal(embedding.weight[3:], before[3:])


@pytest.mark.parametrize(("bad", "reason"), [(1e20, "nonfinite_parameter"), (torch.nan, "nonfinite_gradient")])
def test_a_run_that_does_nothing_is_told_of_once(bad, reason):
    """A parameter whose square overflows, or gradients that never are finite: a hundred steps, and none was taken."""
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param])
    if reason == "nonfinite_parameter":
        param.data[1] = bad

    def steps(count):
        for _ in range(count):
            param.grad = torch.full((3,), 1.0 if reason == "nonfinite_parameter" else bad)
            optimizer.step()

    steps(100)
    with pytest.warns(UserWarning, match="none of the first 100 steps was taken") as told:
        steps(50)
    assert len(told) == 1
    assert told[0].filename == __file__
    assert optimizer.health()[reason] == 150
