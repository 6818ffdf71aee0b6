"""PyTorch's own optimizer tests, the cases of TestOptimRenewed, on LearnedOptimizer.

The cases keep PyTorch's names and check the same properties, in our own words; `docs/conformance.md` lists them all,
with the reason of every exclusion.
"""

import copy
import functools
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rules import RULES, make_rule
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from l2o_runtime import LearnedOptimizer, save_rule

pytest.importorskip("expecttest", reason="PyTorch's test harness needs expecttest: pip install expecttest")

from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCPU
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

pytestmark = pytest.mark.conformance

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
FLAGS = ("foreach", "fused", "differentiable")
CONTEXTS = ("none", "placebo", "dmd-exact", "dmd-sketch", "kae")
UNTRAINED = [f"{context}-{features}" for context in CONTEXTS for features in ("log_sign", "normalized")]


untrained = SimpleNamespace(folder=None)
"""The harness asks for inputs by a plain function, which cannot take a fixture: one leaves the folder here."""


@pytest.fixture(scope="session", autouse=True)
def _untrained_rules(tmp_path_factory):
    untrained.folder = tmp_path_factory.mktemp("rules")
    for name in UNTRAINED:
        save_rule(untrained.folder / f"{name}.safetensors", make_rule(RULES[name]))


def trained_inputs(device, dtype=None) -> list[OptimizerInput]:
    """The bundled rule with every hyper-parameter; made anew for each case, since schedulers write into a tensor lr."""
    return [
        OptimizerInput(params=None, kwargs=kwargs, desc=desc)
        for desc, kwargs in {
            "default": {},
            "non-default lr": {"lr": 0.5},
            "tensor lr": {"lr": torch.tensor(0.5)},
            "weight decay": {"weight_decay": 0.01},
            "maximize": {"maximize": True},
            "maximize and weight decay": {"maximize": True, "weight_decay": 0.01},
            "safeguard": {"safeguard": "adam", "safeguard_lr": 0.01},
        }.items()
    ]


def untrained_inputs(device, dtype=None) -> list[OptimizerInput]:
    """Every context with both feature maps. They need not go in the right direction."""
    return [
        OptimizerInput(params=None, kwargs={"rule": untrained.folder / f"{name}.safetensors"}, desc=name)
        for name in UNTRAINED
    ]


def error_inputs(device, dtype) -> list[ErrorOptimizerInput]:
    """What PyTorch expects of every optimizer, and what this one refuses besides."""
    ours = {"Tensor lr must be 1-element": "lr: expected a number or a tensor of one element"}
    common = get_error_inputs_for_all_optims(device, dtype)
    for error in common:
        error.error_regex = ours.get(error.error_regex, error.error_regex)
    embedding = nn.Parameter(torch.ones(4, 2, device=device, dtype=dtype))
    embedding.grad = torch.ones_like(embedding).to_sparse()
    refused = [
        ("negative lr", None, {"lr": -1.0}, "lr: expected a finite number, 0 or more"),
        ("lr that is no number", None, {"lr": float("nan")}, "lr: expected a finite number, 0 or more"),
        ("infinite lr", None, {"lr": torch.tensor(float("inf"))}, "lr: expected a finite number, 0 or more"),
        ("negative weight decay", None, {"weight_decay": -0.1}, "weight_decay: expected a finite number, 0 or more"),
        ("complex parameter", [nn.Parameter(torch.ones(2, dtype=torch.complex64, device=device))], {}, "complex"),
    ]
    return [
        *common,
        *(
            ErrorOptimizerInput(OptimizerInput(params, kwargs, desc), error_type=ValueError, error_regex=regex)
            for desc, params, kwargs, regex in refused
        ),
        ErrorOptimizerInput(
            OptimizerInput([embedding], {}, "sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="sparse gradients",
        ),
    ]


class Info(OptimizerInfo):
    """An entry with a name of its own: PyTorch names a case after the class, and both entries have the same."""

    def __init__(self, name, **arguments):
        self._name = name
        super().__init__(
            LearnedOptimizer,
            supported_impls=(),
            not_og_supported_flags=("maximize",),
            supports_complex=False,
            **arguments,
        )

    @property
    def name(self):
        return self._name


TRAINED = Info("LearnedOptimizer", optim_inputs_func=trained_inputs, optim_error_inputs_func=error_inputs)
ALL = [TRAINED, Info("LearnedOptimizer_untrained", optim_inputs_func=untrained_inputs)]


def every_input(optim_info, device, dtype) -> list[OptimizerInput]:
    return _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, optim_info)


class Regression:
    """‖W x + b‖², the problem of most cases."""

    def __init__(self, device, dtype=torch.float32, contiguous=True):
        tail = () if contiguous else (2,)
        weight, bias = (torch.randn(*shape, *tail, device=device, dtype=dtype) for shape in ((10, 5), (10,)))
        self.weight = nn.Parameter(weight if contiguous else weight[..., 0])
        self.bias = nn.Parameter(bias if contiguous else bias[..., 0])
        self.x = torch.randn(5, device=device, dtype=dtype)

    def params(self, named=False):
        return [("weight", self.weight), ("bias", self.bias)] if named else [self.weight, self.bias]

    def twin(self) -> "Regression":
        return copy.deepcopy(self)

    def loss(self):
        return (self.weight.mv(self.x) + self.bias).square().sum()

    def closure(self, optimizer):
        def evaluate():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return evaluate

    def run(self, optimizer, steps, schedulers=()):
        for _ in range(steps):
            loss = optimizer.step(self.closure(optimizer)).detach()
            for scheduler in schedulers:
                scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))

    def equals(self, other) -> bool:
        return torch.equal(self.weight, other.weight) and torch.equal(self.bias, other.bias)


def assert_right_direction(before, after, kwargs):
    """Up where it maximizes, down otherwise."""
    assert (after > before) if kwargs.get("maximize") else (after < before), (kwargs, float(before), float(after))


def without_names(state_dict):
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("param_names", None)
    return state_dict


class TestOptimRenewed(TestCase):
    @onlyCPU
    @optims(ALL)
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for optim_input in optim_info.optim_inputs_func(device=device):
            assert not set(FLAGS) & set(optim_input.kwargs)

    @optims([TRAINED])
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = error.optimizer_error_input
            make = functools.partial(LearnedOptimizer, given.params, **given.kwargs)
            fails = make if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR else make().step
            expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
            with expect(error.error_type, match=error.error_regex):
                fails()

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims([TRAINED])
    def test_forloop_goes_right_direction(self, device, dtype, optim_info, contiguous, with_lrsched):
        for makers in optim_info.scheduler_inputs if with_lrsched else [()]:
            for optim_input in optim_info.optim_inputs_func(device=device):
                problem = Regression(device, dtype, contiguous)
                optimizer = LearnedOptimizer(problem.params(), **optim_input.kwargs)
                before = problem.loss().item()
                problem.run(optimizer, 20, [make(optimizer) for make in makers])
                assert_right_direction(before, problem.loss().item(), optim_input.kwargs)

    @optims([TRAINED])
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for makers in optim_info.scheduler_inputs:
            problem = Regression(device, dtype)
            optimizer = LearnedOptimizer([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
            before = problem.loss().item()
            problem.run(optimizer, 20, [make(optimizer) for make in makers])
            assert_right_direction(before, problem.loss().item(), {})

    @parametrize("num_dim", [0, 1, 2])
    @optims(ALL)
    def test_tensor_lr(self, device, dtype, optim_info, num_dim):
        for optim_input in every_input(optim_info, device, dtype):
            number, tensor = (problem := Regression(device, dtype)), problem.twin()
            kwargs = optim_input.kwargs | {"lr": 0.25}
            first = LearnedOptimizer(number.params(), **kwargs)
            kwargs["lr"] = torch.full([1] * num_dim, 0.25, device=device)
            second = LearnedOptimizer(tensor.params(), **kwargs)
            for _ in range(5):
                number.run(first, 1)
                tensor.run(second, 1)
                assert number.equals(tensor), optim_input.desc

    @optims([TRAINED])
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            problem = Regression(device, dtype)
            kwargs = optim_input.kwargs
            optimizer = LearnedOptimizer(
                [{"params": [problem.weight], **kwargs}, {"params": [problem.bias], **kwargs, "weight_decay": 0.0}],
            )
            before = problem.loss().item()
            problem.run(optimizer, 20)
            assert_right_direction(before, problem.loss().item(), kwargs)

    @optims([TRAINED])
    def test_param_groups_lr(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            problem, other = Regression(device, dtype), nn.Parameter(torch.randn(2, 2, device=device, dtype=dtype))
            kwargs = {"lr": 0.5} | optim_input.kwargs
            optimizer = LearnedOptimizer([{"params": problem.params(), **kwargs}, {"params": [other]}], lr=1e-28)
            start, before = other.detach().clone(), problem.loss().item()
            for _ in range(20):
                loss = problem.closure(optimizer)()
                other.grad = torch.rand_like(other)
                optimizer.step(loss=loss)
            assert_right_direction(before, problem.loss().item(), kwargs)
            torch.testing.assert_close(other.detach(), start)

    @optims(ALL)
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
        start = copy.deepcopy(params)
        for optim_input in every_input(optim_info, device, dtype):
            LearnedOptimizer(params, **optim_input.kwargs).step(lambda: torch.ones(1, device=device, dtype=dtype))
            assert all(map(torch.equal, params, start)), optim_input.desc

    @optims(ALL)
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            if optim_input.kwargs.get("weight_decay"):
                continue  # decay does not ask for a gradient
            param = torch.randn(5, 1, device=device, dtype=dtype, requires_grad=True)
            start, param.grad = param.detach().clone(), torch.zeros_like(param)
            optimizer = LearnedOptimizer([param], **optim_input.kwargs)
            optimizer.step(lambda: torch.ones(1, device=device, dtype=dtype))
            assert torch.equal(param, start), optim_input.desc

    @optims(ALL)
    def test_grads_are_never_inplaced_into(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            param = torch.randn(5, 1, device=device, dtype=dtype, requires_grad=True)
            param.grad = torch.rand_like(param)
            version, optimizer = param.grad._version, LearnedOptimizer([param], **optim_input.kwargs)
            for _ in range(5):
                optimizer.step(lambda: torch.ones(1, device=device, dtype=dtype))
                assert param.grad._version == version, optim_input.desc

    @optims(ALL)
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            text = repr(LearnedOptimizer(Regression(device, dtype).params(), **optim_input.kwargs))
            assert re.match(r"LearnedOptimizer \(rule .*, (size from a schedule|made for [\d,]+ steps).*\nParam", text)

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(ALL)
    def test_state_dict_deterministic(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        for optim_input in every_input(optim_info, device, dtype):
            first = Regression(device, dtype)
            optimizer = LearnedOptimizer(first.params(is_named_optim0), **optim_input.kwargs)
            first.run(optimizer, 10)
            second = first.twin()
            resumed = LearnedOptimizer(second.params(is_named_optim1), **optim_input.kwargs)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for _ in range(10):
                first.run(optimizer, 1)
                second.run(resumed, 1)
                assert first.equals(second), optim_input.desc
            left, right = without_names(optimizer.state_dict()), without_names(resumed.state_dict())
            torch.testing.assert_close(left, right, rtol=0, atol=0)
            # A parameter that is listed again keeps its number.
            resumed.param_groups.extend(resumed.param_groups)
            assert without_names(resumed.state_dict())["param_groups"][-1] == left["param_groups"][-1]

    @optims(ALL)
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            problem = Regression(device, dtype)
            optimizer = LearnedOptimizer(problem.params(), **optim_input.kwargs)
            problem.run(optimizer, 3)
            older, flags = copy.deepcopy(optimizer.state_dict()), optim_info.not_og_supported_flags
            older["param_groups"] = [{k: v for k, v in g.items() if k not in flags} for g in older["param_groups"]]
            optimizer.load_state_dict(older)
            problem.run(optimizer, 1)
            assert problem.loss().isfinite()

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(ALL)
    def test_can_load_from_to_named_state_dict(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        for optim_input in every_input(optim_info, device, dtype):
            problem = Regression(device, dtype)
            optimizer = LearnedOptimizer(problem.params(is_named_optim0), **optim_input.kwargs)
            problem.run(optimizer, 3)
            loaded = LearnedOptimizer(problem.params(is_named_optim1), **optim_input.kwargs)
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            problem.run(loaded, 1)
            names = loaded.state_dict()["param_groups"][0].get("param_names")
            assert names == (["weight", "bias"] if is_named_optim0 or is_named_optim1 else None)

    @parametrize("is_named_optim", [True, False])
    @optims(ALL)
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named_optim):
        for optim_input in every_input(optim_info, device, dtype):
            problem = Regression(device, dtype)
            optimizer = LearnedOptimizer(problem.params(is_named_optim), **optim_input.kwargs)
            problem.run(optimizer, 3)
            for weights_only in (True, False):
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                loaded, saved = torch.load(file, weights_only=weights_only), optimizer.state_dict()
                torch.testing.assert_close(without_names(loaded), without_names(saved), rtol=0, atol=0)
                names = [[group.get("param_names") for group in d["param_groups"]] for d in (loaded, saved)]
                assert names[0] == names[1] == [["weight", "bias"] if is_named_optim else None]

    @optims(ALL)
    def test_load_nontensor_step(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            problem = Regression(device, dtype)
            optimizer = LearnedOptimizer(problem.params(), **optim_input.kwargs)
            problem.run(optimizer, 3)
            numbers = copy.deepcopy(optimizer.state_dict())
            for state in numbers["state"].values():
                state["step"] = state["step"].item()
            twin = problem.twin()
            loaded = LearnedOptimizer(twin.params(), **optim_input.kwargs)
            loaded.load_state_dict(numbers)
            problem.run(optimizer, 1)
            twin.run(loaded, 1)
            assert problem.equals(twin), optim_input.desc

    @optims(ALL)
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            optimizer = LearnedOptimizer(Regression(device, dtype).params(), **optim_input.kwargs)
            optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.state.update(mark=1))
            assert optimizer.state_dict()["state"]["mark"] == 1

    @optims(ALL)
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            optimizer = LearnedOptimizer(Regression(device, dtype).params(), **optim_input.kwargs)
            optimizer.register_state_dict_post_hook(lambda _, saved: saved | {"marked": "mark" in saved["state"]})
            assert optimizer.state_dict()["marked"] is False

    @optims(ALL)
    def test_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            optimizer = LearnedOptimizer(Regression(device, dtype).params(), **optim_input.kwargs)
            optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.state.update(mark=1))
            optimizer.register_state_dict_post_hook(
                lambda _, saved: saved | {"marked": saved["state"].pop("mark", None) is not None}
            )
            saved = optimizer.state_dict()
            assert saved["marked"] is True
            assert "mark" not in saved["state"]

    @optims(ALL)
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        def in_place(_, saved):
            saved["param_groups"][0]["lr"] = 0.002

        def replaced(_, saved):
            saved = copy.deepcopy(saved)
            saved["param_groups"][0]["lr"] = 0.003
            return saved

        for optim_input in every_input(optim_info, device, dtype):
            optimizer = LearnedOptimizer(Regression(device, dtype).params(), **optim_input.kwargs)
            saved = optimizer.state_dict()
            optimizer.register_load_state_dict_pre_hook(in_place)
            optimizer.load_state_dict(saved)
            assert optimizer.param_groups[0]["lr"] == 0.002
            optimizer.register_load_state_dict_pre_hook(replaced, prepend=True)
            optimizer.load_state_dict(saved)
            assert optimizer.param_groups[0]["lr"] == 0.002, "the hook that was put first is the one overruled"

    @optims(ALL)
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            optimizer = LearnedOptimizer(Regression(device, dtype).params(), **optim_input.kwargs)
            optimizer.register_load_state_dict_post_hook(lambda optimizer: optimizer.state.update(mark=1))
            optimizer.load_state_dict(optimizer.state_dict())
            assert optimizer.state["mark"] == 1

    @optims(ALL)
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        def before(_, saved):
            return saved | {"param_groups": [group | {"lr": 0.003} for group in saved["param_groups"]]}

        def after(optimizer):
            optimizer.state["seen"] = optimizer.param_groups[0]["lr"]

        for optim_input in every_input(optim_info, device, dtype):
            optimizer = LearnedOptimizer(Regression(device, dtype).params(), **optim_input.kwargs)
            optimizer.register_load_state_dict_pre_hook(before)
            optimizer.register_load_state_dict_post_hook(after)
            optimizer.load_state_dict(optimizer.state_dict())
            assert optimizer.state["seen"] == 0.003

    @optims(ALL)
    def test_step_post_hook(self, device, dtype, optim_info):
        self.check_step_hook(device, dtype, optim_info, "register_step_post_hook")

    @optims(ALL)
    def test_step_pre_hook(self, device, dtype, optim_info):
        self.check_step_hook(device, dtype, optim_info, "register_step_pre_hook")

    def check_step_hook(self, device, dtype, optim_info, register):
        for optim_input in every_input(optim_info, device, dtype):
            optimizer = LearnedOptimizer(Regression(device, dtype).params(), **optim_input.kwargs)
            seen = []
            handle = getattr(optimizer, register)(lambda *seen_by, seen=seen: seen.append(seen_by[0]))
            optimizer.step()
            optimizer.step()
            handle.remove()
            optimizer.step()
            assert seen == [optimizer, optimizer]

    @optims(ALL)
    def test_step_all_hooks(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            params = Regression(device, dtype).params()
            pair = LearnedOptimizer(params, **optim_input.kwargs), torch.optim.SGD(params)
            seen = []

            def note(name, seen=seen):
                return lambda *_: seen.append(name)

            handles = [register_optimizer_step_pre_hook(note("all before"))]
            handles += [register_optimizer_step_post_hook(note("all after"))]
            for optimizer in pair:
                handles += [optimizer.register_step_pre_hook(note("before"))]
                handles += [optimizer.register_step_post_hook(note("after"))]
            try:
                for optimizer in (pair[0], pair[1], pair[0]):
                    optimizer.step()
                    assert seen == ["all before", "before", "after", "all after"]
                    seen.clear()
            finally:
                for handle in handles:
                    handle.remove()
            for optimizer in pair:
                optimizer.step()
            assert seen == []

    @optims(ALL)
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        def public(optimizer):
            return {name for name in vars(optimizer) if not name.startswith("_")}

        for optim_input in every_input(optim_info, device, dtype):
            problem = Regression(device, dtype)
            optimizer = LearnedOptimizer(problem.params(), **optim_input.kwargs)
            problem.run(optimizer, 3)
            assert public(copy.deepcopy(optimizer)) == public(optimizer)

    @optims(ALL)
    def test_non_empty_state(self, device, dtype, optim_info):
        for optim_input in every_input(optim_info, device, dtype):
            problem = Regression(device, dtype)
            optimizer = LearnedOptimizer(problem.params(), **optim_input.kwargs)
            problem.run(optimizer, 1)
            assert set(optimizer.state) == set(problem.params())
            assert all(optimizer.state.values())


PORTED = {name for name in vars(TestOptimRenewed) if name.startswith("test_")}
instantiate_device_type_tests(TestOptimRenewed, globals())


def documented() -> dict[str, str]:
    """Outcome by case, as the document's table says."""
    return dict(re.findall(r"^\| `(test_\w+)` \| (\w+) \|", DOCUMENT.read_text(), re.MULTILINE))


def test_the_document_lists_every_case_that_is_ported():
    assert {name for name, outcome in documented().items() if outcome == "passed"} == PORTED
    assert set(documented().values()) == {"passed", "excluded"}


def test_the_document_lists_every_case_that_the_harness_knows():
    """The installed harness names cases that single optimizers skip; a new one there shows that the table is behind."""
    named = {
        decorator.test_name
        for info in optim_db
        for decorator in info.decorators
        if getattr(decorator, "cls_name", None) == "TestOptimRenewed" and decorator.test_name
    }
    assert named
    assert named <= set(documented()), named - set(documented())
