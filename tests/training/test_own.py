"""Tasks of one's own: any module, the same losses as in an ordinary loop, and mistakes told in one line."""

import copy
import itertools
import json
import math
import random
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2o_runtime import ConfigError
from l2o_runtime.files.artifact import read_rule
from l2o_training import specialise, specialising
from l2o_training.compare.baselines import BASELINES
from l2o_training.compare.flat import rollout
from l2o_training.compare.own import OwnWorkload, train
from l2o_training.compare.study import Study
from l2o_training.config import load_preset, read_config
from l2o_training.errors import RunError
from l2o_training.meta.plan import FEWEST, Speed, best_factor, extended, fit, with_fewer_checked
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.validation import speedup
from l2o_training.specialising import place_of
from l2o_training.tasks import PythonConfig, make_task
from l2o_training.tasks.own import EVALUATION, TRAINING, VALIDATION, OwnTask, Problem, examine
from l2o_training.tasks.places import TaskError, distinct, find_make

CPU = torch.device("cpu")


class Doubled(torch.autograd.Function):
    """A function with a gradient of its own."""

    @staticmethod
    def forward(context, x):
        return 2 * x

    @staticmethod
    def backward(context, grad):
        return 3 * grad


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return Doubled.apply(self.inner(x))


class Tied(nn.Module):
    """An embedding that is the last layer's weight too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x.abs().long() % 6)).mean(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.2, batch_first=True)

    def forward(self, x):
        return self.inner(x.unsqueeze(1)).squeeze(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.GRU(1, 6, batch_first=True)

    def forward(self, x):
        return self.inner(x.unsqueeze(-1))[0][:, -1]


def frozen():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
    model[0].requires_grad_(False)
    return model


MODULES = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.4), nn.Linear(5, 6)),
    "batch-norm": lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(4, 6)
    ),
    "gru": Recurrent,
    "attention": Attention,
    "tied": Tied,
    "frozen": frozen,
    "custom": Custom,
    "double": lambda: nn.Linear(6, 6).double(),
}


def task_of(build):
    def make(seed):
        model, target = build(), torch.randn(6)
        dtype = next(model.parameters()).dtype

        def loss(model, step):
            x = torch.randn(8, 6).to(dtype) * random.choice([1.0, 2.0])
            return (model(x) - target.roll(step)).square().mean() + np.random.rand()

        return model, loss

    return make


def own_task(make):
    task = OwnTask.__new__(OwnTask)
    task.name, task.device, task.make, task._way = "own", CPU, make, None
    return task


@pytest.mark.parametrize("name", MODULES)
def test_instances_are_what_an_ordinary_loop_trains(name):
    """SGD over stacked parameters, and on each module by itself; Adam would make steps of what is rounding."""
    make, steps = task_of(MODULES[name]), 6
    instances = own_task(make).instances(3, 2**40 + 1)
    seeds = [p.seed for p in instances.problems]
    draws = copy.deepcopy(instances)._batches
    rows = [draws()[0].tolist() for _ in range(steps)]
    instances.rng.set_state(copy.deepcopy(own_task(make).instances(3, 2**40 + 1).rng.get_state()))
    scores = rollout(BASELINES["sgd"].solver(0.05, steps), instances, steps)
    for index, seed in enumerate(seeds):
        problem = Problem(make, seed, CPU)
        optimizer = torch.optim.SGD(problem.params, lr=0.05)
        for step in range(steps):
            with torch.random.fork_rng(devices=[]):
                seed_all(rows[step][index])
                if problem.buffers:
                    kept = [buffer.clone() for buffer in problem.buffers]
                    problem.model.eval()
                    score = problem(step)
                    problem.model.train()
                    seed_all(rows[step][index])
                    assert all(torch.equal(*pair) for pair in zip(kept, problem.buffers, strict=True))
                loss = problem(step)
            expected = score if problem.buffers else loss
            torch.testing.assert_close(scores[step, index], expected.detach().float(), rtol=2e-5, atol=1e-6)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def seed_all(number):
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


AT_ONCE = {"mlp": True, "batch-norm": True, "dropout": False, "conv": False, "gru": False, "attention": False}


@pytest.mark.parametrize("name", AT_ONCE)
def test_models_run_at_once_where_that_is_the_same(name):
    task = own_task(task_of(MODULES[name]))
    instances = task.instances(3, 2**40)
    assert task.together == (instances.forward is not None) == AT_ONCE[name]
    assert own_task(task_of(MODULES[name])).instances(1, 2**40).forward is None


def twice(model, x):
    return model(x) + model(x)


def looks_inside(model, x):
    return model(x) + 0 * model[0].weight.sum()


def by_name(model, x):
    return model(input=x)


def slope(model, x):
    x = x.requires_grad_()
    return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]


def bare(model, x):
    try:
        return model(x)
    except Exception:
        return x


def changes_later(model, x):
    return model(x) if x.sum() < 0 else model(x) + 0 * model[0].weight.sum()


@pytest.mark.parametrize("use", [changes_later, twice, looks_inside, by_name, slope, bare])
def test_losses_that_do_more_than_call_their_model_once_are_as_they_are(use):
    """One after the other, or, where exceptions are caught, at once; the same numbers as alone."""

    def make(seed):
        def loss(model, step):
            x = torch.randn(8, 6)
            return (use(model, x) + torch.randn(6)).square().mean()

        return MODULES["mlp"](), loss

    task = own_task(make)
    instances = task.instances(3, 2**40)
    assert task.together == (use is bare)
    rng = instances.rng.get_state()
    seen = instances.look(instances.params, instances.statistics)
    instances.rng.set_state(rng)
    instances.forward = None
    alone = instances.look(instances.params, instances.statistics)
    torch.testing.assert_close(seen.loss, alone.loss)
    torch.testing.assert_close(seen.grad, alone.grad)


def test_models_that_differ_by_more_than_parameters_run_one_by_one():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.shift = nn.Linear(6, 1), random.random()

        def forward(self, x):
            return self.inner(x) + self.shift

    task = own_task(lambda seed: (Shifted(), lambda model, step: model(torch.randn(4, 6)).square().mean()))
    task.instances(4, 2**40)
    assert not task.together


def test_a_loss_that_changes_its_ways_goes_on_one_by_one():
    def make(seed):
        def loss(model, step):
            x = torch.randn(4, 6)
            return sum(model(x).square().mean() for _ in range(1 if step < 5 else 2))

        return MODULES["mlp"](), loss

    instances = own_task(make).instances(3, 2**40)
    statistics = instances.statistics
    for step in range(8):
        assert (instances.forward is not None) == (step < 6)
        statistics = instances.look(instances.params, statistics).statistics


def test_instances_can_be_met_again():
    """Equal seeds, equal instances; a part has the minibatches of the whole; rewound, the same losses come again."""
    make = task_of(MODULES["batch-norm"])
    one, other = (own_task(make).instances(4, 2**40 + 3) for _ in range(2))
    assert torch.equal(one.params, other.params)
    part = other.part(1, 3)
    before = one.rng.get_state()
    whole, some = one.look(one.params, one.statistics), part.look(part.params, part.statistics)
    for field in ("loss", "grad", "score", "statistics"):
        assert torch.equal(getattr(whole, field)[1:3], getattr(some, field))
    assert whole.statistics[:, 0].tolist() == [1.0] * 4
    one.look(one.params + 1, whole.statistics)
    one.rng.set_state(before)
    again = one.look(one.params, one.statistics)
    assert torch.equal(again.loss, whole.loss)
    assert torch.equal(again.statistics, whole.statistics)


def test_scaled_parameters_are_the_same_problem():
    instances = own_task(task_of(MODULES["mlp"])).instances(2, 2**40)
    rng, plain = instances.rng.get_state(), instances.look(instances.params, instances.statistics)
    instances.rescale(torch.tensor([[2.0], [0.5]]))
    instances.rng.set_state(rng)
    scaled = instances.look(instances.params, instances.statistics)
    torch.testing.assert_close(scaled.loss, plain.loss)
    torch.testing.assert_close(scaled.grad, plain.grad * torch.tensor([[2.0], [0.5]]))


def test_nothing_outside_is_disturbed():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    instances = own_task(task_of(MODULES["dropout"])).instances(2, 5)
    instances.look(instances.params, instances.statistics)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_seeds_of_training_validation_and_evaluation_are_apart():
    seen = {"training": set(), "validation": set(), "evaluation": set()}
    purpose = ["evaluation"]

    def make(seed):
        seen[purpose[0]].add(seed)
        return nn.Linear(1, 1), lambda model, step: model(torch.ones(1)).sum()

    for run in (0, 7, 2**31 - 1):
        train(make, BASELINES["adam"].optimizer, 0.1, run, 1)
    for what, numbers in (("training", (0, 2**31 - 1, 2**32, 2**40)), ("validation", (2**31, 2**31 + 5, 2**32 - 1))):
        purpose[0] = what
        for number in numbers:
            own_task(make).instances(3, number)
    assert all(EVALUATION <= seed < VALIDATION for seed in seen["evaluation"])
    assert all(VALIDATION <= seed < TRAINING for seed in seen["validation"])
    assert all(TRAINING <= seed < 2**31 for seed in seen["training"])


def returning(*made):
    return lambda seed: made if len(made) != 1 else made[0]


def linear_loss(change):
    return lambda seed: (nn.Linear(2, 1), lambda model, step: change(model(torch.ones(3, 2))))


def no_seed():
    """Takes no seed."""


WRONG = {
    "returns nothing": (returning(None), "got (NoneType)"),
    "returns a model alone": (returning(nn.Linear(1, 1)), "got (Linear)"),
    "returns them the other way round": (returning(len, nn.Linear(1, 1)), "got (builtin_function_or_method, Linear)"),
    "no numbers": (returning(nn.ParameterList([torch.zeros(0)]), len), "no parameters with requires_grad"),
    "numbers in one place": (
        lambda seed: (nn.ParameterList([torch.ones(1, 6).expand(4, 6)]), lambda model, step: model[0].sum()),
        "numbers of parameter 0 lie in one place",
    ),
    "takes no seed": (no_seed, "TypeError"),
    "no parameters": (returning(nn.ReLU(), len), "no parameters with requires_grad"),
    "a loss per example": (linear_loss(lambda x: x), "a scalar tensor, got a tensor of shape (3, 1)"),
    "a loss that is a number": (linear_loss(lambda x: x.sum().item()), "a scalar tensor, got float"),
    "detached": (linear_loss(lambda x: x.sum().detach()), "does not depend on the model's parameters"),
    "another model's": (
        linear_loss(lambda x: nn.Linear(2, 1)(torch.ones(2)).sum()),
        "does not depend on the model's parameters",
    ),
    "NaN": (linear_loss(lambda x: x.sum() * math.nan), "the loss is nan at the start"),
    "infinite gradients": (linear_loss(lambda x: (x * 0).abs().sum().sqrt()), "gradients are not finite at the start"),
    "complex parameters": (
        lambda seed: (
            nn.ParameterList([torch.ones(2, dtype=torch.complex64)]),
            lambda model, step: model[0].abs().sum(),
        ),
        "parameter 0 is complex, which rules do not move",
    ),
    "a complex loss": (linear_loss(lambda x: x.sum() * 1j), "a real number, got torch.complex64"),
    "sparse gradients": (
        lambda seed: (nn.Embedding(3, 2, sparse=True), lambda model, step: model(torch.tensor([1])).sum()),
        "gradients are sparse, which rules do not take",
    ),
    "an error": (
        linear_loss(lambda x: x @ torch.ones(7)),
        "loss(model, 0) of make(2089551405) failed: RuntimeError",
    ),
    "lazy layers": (
        lambda seed: (nn.Sequential(nn.ReLU(), nn.LazyLinear(1)), lambda model, step: model(torch.ones(3, 2)).sum()),
        "1.weight has no shape yet: call the model once",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_in_a_line(name):
    make, text = WRONG[name]
    with pytest.raises(TaskError) as caught:
        examine(own_task(make))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value) or name == "an error"


def test_modules_that_cannot_be_copied_run_one_by_one():
    def make(seed):
        model = nn.Linear(2, 1)
        model.lock = threading.Lock()
        return model, lambda model, step: model(torch.ones(3, 2)).square().mean()

    task = own_task(make)
    instances = task.instances(3, 2**40)
    assert not task.together
    assert instances.look(instances.params, instances.statistics).loss.isfinite().all()


def test_shapes_that_differ_are_refused():
    with pytest.raises(TaskError, match="different shapes"):
        own_task(lambda seed: (nn.Linear(1, 1 + seed % 97), lambda model, step: model(torch.ones(1)).sum())).instances(
            8, 2**40
        )


def test_errors_of_theirs_come_with_their_lines(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n\ndef make(seed):\n    return nn.Linear(1, 1), loss\n\n"
        "def loss(model, step):\n    return inner(model)\n\ndef inner(model):\n    return 1 / 0\n"
    )
    with pytest.raises(TaskError, match="ZeroDivisionError") as caught:
        examine(OwnTask(f"{file}:make", CPU))
    assert "return 1 / 0" in caught.value.trace
    assert "own.py" not in caught.value.trace
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(TaskError, match="nothing_of_this_name"):
        find_make(f"{file}:make")
    file.write_text("def make(seed:\n")
    with pytest.raises(TaskError, match="SyntaxError"):
        find_make(f"{file}:make")
    file.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(TaskError, match="SystemExit"):
        find_make(f"{file}:make")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("{}/absent.py:make", "does not exist"),
        ("{}/there.py:absent", "has no 'absent'; it has make"),
        ("{}/there.py:NUMBER", "NUMBER is of type int, not a function"),
        ("no_such_package_here.tasks:make", "is not found"),
        ("json:nothing", "has no 'nothing'"),
        (":make", "expected file.py:function"),
        ("there.py:", "expected file.py:function"),
    ],
)
def test_places_that_lead_nowhere(place, text, tmp_path):
    (tmp_path / "there.py").write_text("NUMBER = 1\n\ndef make(seed):\n    pass\n")
    with pytest.raises(ConfigError) as caught:
        find_make(place.format(tmp_path))
    assert text in str(caught.value)
    with pytest.raises(ConfigError, match="expected file"):
        PythonConfig(make="digits")


def test_a_task_that_is_not_deterministic_is_told():
    assert examine(own_task(task_of(MODULES["dropout"]))).deterministic
    calls = iter(range(100))
    wild = examine(own_task(linear_loss(lambda x: x.sum() + next(calls))))
    assert not wild.deterministic


def test_evaluation_trains_fresh_instances():
    """Adam's losses are those of a plain loop; held-out losses are taken where there are some."""
    make = task_of(MODULES["mlp"])
    curves = train(make, BASELINES["adam"].optimizer, 0.02, 3, 5)
    problem, draws = Problem(make, EVALUATION + 3, CPU), torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(problem.params, lr=0.02)
    for step in range(5):
        with torch.random.fork_rng(devices=[]):
            seed_all(int(torch.randint(2**62, (), generator=draws)))
            loss = problem(step)
        assert curves.train[0, step] == pytest.approx(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert curves.validation.size == 0

    def with_validation(seed):
        model, loss = make(seed)
        return model, loss, lambda model: 7.0 if not model.training else -1.0

    assert train(with_validation, BASELINES["adam"].optimizer, 0.02, 3, 5).validation.tolist() == [[7.0] * 5]


def test_results_are_kept_for_a_text(tmp_path):
    """Another text of the user's file is another task."""
    file = tmp_path / "mine.py"
    body = "from torch import nn, ones\n\ndef make(seed):\n    return nn.Linear(1, 1), lambda m, s: m(ones(1)).sum()\n"
    keys = []
    for text in (body, body, body + "# more\n"):
        file.write_text(text)
        keys.append(OwnWorkload(f"{file}:make").own_key())
    assert keys[0] == keys[1] != keys[2]


def test_tasks_are_configured():
    config = read_config(
        {"start": "default", "tasks": [{"kind": "python", "make": "test_own:make_line"}], "horizon": 20}
    )
    assert config.tasks[0].name == "test_own.make_line"
    assert config.rule == read_rule("default")[0].config
    changed = read_config({"start": "default", "rule": {"output_scale": 0.5}})
    assert changed.rule.output_scale == 0.5
    assert changed.rule.kind == "directional"


def make_line(seed):
    """Lines through points: a task that takes no time."""
    slope = torch.randn(2)

    def loss(model, step):
        x = torch.randn(8, 2)
        return F.mse_loss(model(x).squeeze(-1), x @ slope)

    return nn.Linear(2, 1), loss


@pytest.fixture
def place(monkeypatch):
    """Where this file's `make_line` is found."""
    monkeypatch.setitem(sys.modules, "test_own", sys.modules[make_line.__module__])
    return "test_own:make_line"


@pytest.fixture
def steady(monkeypatch):
    """Time goes by the number of looks at the clock, on a machine of a speed that is known: what fits is what fits."""
    looks = itertools.count()
    monkeypatch.setattr(specialising, "time", SimpleNamespace(monotonic=lambda: 0.01 * next(looks)))
    speed = Speed(step=0.05, checked=0.001, adam=0.001)
    monkeypatch.setattr(specialising, "measure_speed", lambda config, rule, tasks: speed)


@pytest.mark.usefixtures("steady")
def test_a_rule_is_specialised(place, tmp_path):
    """In a tenth of a minute; then for longer. The configuration is the folder's."""
    seen, out = [], tmp_path / "run"
    path = specialise(place, steps=8, minutes=0.1, out=out, callback=seen.append, progress=False)
    rule, provenance = read_rule(path)
    assert rule.config.kind == "directional"
    assert provenance["config"]["tasks"] == [{"kind": "python", "make": place}]
    assert seen
    kept = json.loads((out / "config.json").read_text())
    assert kept["horizon"] == 8
    more = specialise(place, steps=8, minutes=0.05, out=out, progress=False, resume=True)
    assert more == path
    assert json.loads((out / "config.json").read_text())["epochs"] >= kept["epochs"]


def make_codebook(seed):
    """What moves is no parameter: a buffer, a frozen copy, one that the loss alone knows, and a count."""
    model = nn.Linear(2, 1)
    model.register_buffer("centre", torch.zeros(1))
    model.target, hidden, calls = copy.deepcopy(nn.Linear(2, 1)).requires_grad_(False), copy.deepcopy(model), []

    def loss(model, step):
        calls.append(step)
        x, own = torch.randn(8, 2), [model.weight, model.bias]
        out = model(x)
        with torch.no_grad():
            model.centre.lerp_(out.mean(0), 0.3)
            for p, theirs, other in zip(own, model.target.parameters(), hidden.parameters(), strict=False):
                theirs.lerp_(p, 0.3)
                other.lerp_(p, 0.3)
        goal = model.centre + model.target(x) + hidden(x).detach()
        return F.mse_loss(out, goal) + 0.1 * len(calls)

    return model, loss


def test_what_is_tried_to_run_at_once_leaves_nothing_behind():
    """The first instances of a process are those of later ones."""
    task = own_task(make_codebook)
    first, second = [task.instances(3, 2**31) for _ in range(2)]
    seen = [instances.look(instances.params, instances.statistics) for instances in (first, second)]
    assert torch.equal(seen[0].loss, seen[1].loss)


def test_tasks_of_one_name_are_refused():
    for ask in (lambda: specialise(["a/mine.py:make", "b/mine.py:make"]), lambda: distinct(["m:make", "n.m:make"])):
        with pytest.raises(ConfigError, match=r"two of .* are called m(ine)?: give files or functions other names"):
            ask()


@pytest.mark.parametrize("estimator", ["cem", "es"])
def test_perturbations_do_not_see_what_the_one_before_has_left(estimator, place, tmp_path):
    """Of a σ that is lost in rounding all score alike."""
    task = PythonConfig(make=place.replace("make_line", "make_codebook"))
    config = replace(load_preset("specialise"), tasks=(task,), estimator=estimator, horizon=6, lanes=1, batch=2)
    trainer = Trainer(replace(config, particles=4, sigma=1e-30, validation_runs=2), tmp_path)
    trainer.slots[0].tick()
    message = trainer.estimator.share(trainer.learner.solver, trainer.slots[0]).message
    assert message.isfinite().all()
    assert len(message.unique()) == 1
    assert estimator == "cem" or not message.any()


def test_functions_that_nobody_finds_again_are_refused():
    with pytest.raises(ConfigError, match="top of a module"):
        place_of(lambda seed: None)
    assert place_of(make_line).endswith(":make_line")
    with pytest.raises(ConfigError, match="expected a function or several"):
        specialise([])
    for minutes in (0, math.inf):
        with pytest.raises(ConfigError, match="--minutes: must be a number greater than 0"):
            specialise(make_line, minutes=minutes)


def test_runs_are_fitted_to_their_time():
    config = read_config(
        {"start": "default", "estimator": "es", "unroll": 0, "horizon": 100, "batch": 4, "validation_runs": 4}
    )
    speed = Speed(step=0.001, checked=0.001, adam=0.0001)
    long, short = fit(config, 600, speed), fit(config, 60, speed)
    assert long.lanes > short.lanes
    for run, seconds in ((long, 600), (short, 60)):
        assert run.epochs % run.validate_every == 0
        spent = run.epochs * (run.lanes * 0.1 + 0.1 / run.validate_every)
        assert 0.6 * seconds < spent < seconds
    with pytest.raises(ConfigError, match=r"0 updates of the rule fit, .* are the least: give 0.1 minutes"):
        fit(config, 0.3, speed)
    with pytest.raises(ConfigError, match=r"give 1\.1 minutes"):
        fit(config, 60.3, speed, spent=60)
    assert fit(config, 60, speed, ranks=4).lanes >= 4
    assert extended(replace_epochs(config, 8), 8, 60, 40).epochs == 18
    assert extended(replace_epochs(config, 40), 8, 1, 40).epochs == 40


def test_long_runs_are_checked_less():
    """A second and a half per run, in ten minutes: validations and perturbations shrink until some updates fit."""
    config = read_config({"start": "default", "estimator": "cem", "unroll": 0, "horizon": 1000, "batch": 16})
    config = replace(config, particles=8, validation_runs=12)
    slow = Speed(step=8 * 16 * 0.005, instance=8 * 0.005, checked=12 * 0.005, adam=12 * 0.005)
    with pytest.raises(ConfigError, match="0 updates of the rule fit"):
        fit(config, 600, slow, fewest=1)
    fewer, speed = with_fewer_checked(config, 600, slow)
    assert fewer.validation_runs == 3
    assert speed.checked == pytest.approx(3 * 0.005)
    run = fit(fewer, 600, speed, fewest=1)
    assert run.epochs >= 1
    assert (run.batch, run.particles) == (2, 4)
    shared = fit(fewer, 150, replace(speed, checked=0.001, adam=0.001), ranks=2, fewest=1)
    assert (shared.lanes, shared.batch, shared.particles) == (2, 1, 4)
    spent = run.epochs * run.batch * run.particles * 5 + (7 + 1 + run.epochs / run.validate_every) * 3 * 5
    assert spent < 600
    quick = replace(slow, step=0.01, instance=0.001, checked=0.001, adam=0.001)
    assert with_fewer_checked(config, 600, quick) == (config, quick)
    assert fit(config, 600, quick).particles == 8


def make_late(seed):
    """A line whose loss is not finite any more in step 3."""
    model, loss = make_line(seed)
    return model, lambda model, step: loss(model, step) * (torch.nan if step >= 3 else 1.0)


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(("minutes", "error", "text"), [(0.1, TaskError, "no run of 8 steps"), (0, RunError, "finite")])
def test_losses_that_are_nan_later_on_are_told_before_the_training(minutes, error, text, place, tmp_path, monkeypatch):
    """Where lengths are tried; else after the first validation. Nothing is left that looks like a rule."""
    monkeypatch.setattr(Trainer, "train_epoch", lambda self: pytest.fail("it is trained"))
    monkeypatch.setattr(specialising, "FEWEST_SIZES", 3 if minutes else 99)
    late = place.replace("make_line", "make_late")
    with pytest.raises(error, match=text):
        specialise(late, steps=8, minutes=minutes or 0.1, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "rule.safetensors").exists()


@pytest.mark.usefixtures("steady")
def test_tasks_may_change_the_default_dtype(place, tmp_path):
    """Rules stay what readers ask for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        path = specialise(place, steps=8, minutes=0.1, out=tmp_path / "run", progress=False)
    finally:
        torch.set_default_dtype(before)
    assert {tensor.dtype for tensor in read_rule(path)[0].state_dict().values()} == {torch.float32}


@pytest.mark.usefixtures("steady")
def test_a_run_that_was_stopped_before_its_first_checkpoint_is_fitted_anew(place, tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", stop)
        with pytest.raises(KeyboardInterrupt):
            specialise(place, steps=8, minutes=0.2, out=out, progress=False)
    before = read_config(json.loads((out / "config.json").read_text()))
    specialise(place, steps=8, minutes=0.1, out=out, progress=False, resume=True)
    after = read_config(json.loads((out / "config.json").read_text()))
    assert after.epochs * after.batch < before.epochs * before.batch
    with pytest.raises(RunError, match="another configuration"):
        specialise(place, steps=9, minutes=0.1, out=out, progress=False, resume=True)


@pytest.mark.usefixtures("steady")
def test_on_a_machine_that_becomes_slow_lengths_are_not_tried_for_ever(place, tmp_path, monkeypatch):
    """The best of those that were tried is kept, though no update fits any more."""
    looks = itertools.count()
    monkeypatch.setattr(specialising, "time", SimpleNamespace(monotonic=lambda: 1.0 * next(looks)))
    seen, asked = [], []
    best = specialising.best_factor

    def counted(score, most):
        return best(lambda factor: asked.append(score(factor)) or asked[-1], most)

    monkeypatch.setattr(specialising, "best_factor", counted)
    specialise(place, steps=8, minutes=0.1, out=tmp_path / "run", callback=seen.append, progress=False)
    assert math.isfinite(asked[0])
    assert asked[-1] == math.inf
    assert read_rule(tmp_path / "run" / "rule.safetensors")[0].config.kind == "directional"
    assert not seen


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_one_update_is_enough_where_lengths_were_tried(place, tmp_path, monkeypatch, factor):
    """Whichever length does best: that is found, and the update is more."""
    monkeypatch.setattr(specialising, "measure_speed", lambda *_: Speed(step=0.4, checked=0.001, adam=0.001))
    monkeypatch.setattr(specialising, "best_factor", lambda *_: factor)
    specialise(place, steps=8, minutes=0.1, out=tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] < FEWEST


def replace_epochs(config, epochs):
    return replace(config, epochs=epochs, validate_every=2)


@pytest.mark.parametrize("best", [0.2, 1.0, 1.3, 3.0, 40.0])
def test_the_best_length_is_found(best):
    found = best_factor(lambda factor: abs(math.log(factor / best)), 20)
    assert abs(math.log(found / best)) <= math.log(2) / 4 + 1e-9
    asked = []
    best_factor(lambda factor: asked.append(factor) or 0.0, 4)
    assert len(asked) == len(set(asked)) <= 4
    assert best_factor(lambda factor: math.nan if factor > 1 else factor, 20) < 1


def test_steps_are_counted_until_adam_s_end():
    losses = torch.tensor([[1.0] * 10 + [0.1] * 10, [1.0] * 20])
    assert speedup(losses[:1], torch.tensor([0.2])) == pytest.approx(20 / 12)
    assert speedup(losses, torch.tensor([0.2, 0.2])) is None


def negative(seed):
    """A loss below zero, as of a likelihood."""
    model, loss = make_line(seed)
    return model, lambda model, step: loss(model, step) - 1000


@pytest.mark.usefixtures("steady")
def test_losses_below_zero_train_alone_and_are_not_compared(place, tmp_path, monkeypatch):

    both = ["test_own:negative", place]
    assert specialise(both[0], steps=8, minutes=0.05, out=tmp_path / "alone", progress=False).is_file()
    with pytest.raises(ConfigError, match=r"its first loss is -\d+.*above 0"):
        specialise(both, steps=8, minutes=0.05, out=tmp_path / "both", progress=False)
    with pytest.raises(ConfigError, match="ratios of losses, which have to stay above 0"):
        OwnWorkload(both[0]).prepare()


GALLERY = Path(__file__).parents[2] / "examples" / "gallery"


@pytest.mark.parametrize("family", sorted(path.stem for path in GALLERY.glob("*.py") if path.stem != "build"))
def test_families_of_the_gallery_can_be_trained(family, monkeypatch):
    monkeypatch.delenv("L2O_DATA", raising=False)
    file = GALLERY / f"{family}.py"
    assert examine(OwnTask(f"{file}:make", CPU)).deterministic
    assert len(file.read_text().splitlines()) <= 60


def test_files_run_once_unless_they_change(tmp_path):
    file = tmp_path / "mine.py"
    text = "from pathlib import Path\n\nmake = print\nwith Path(__file__ + '.ran').open('a') as file:\n"
    file.write_text(text + "    file.write('x')\n")
    for _ in range(3):
        find_make(f"{file}:make")
    assert (tmp_path / "mine.py.ran").read_text() == "x"
    file.write_text(file.read_text() + "\n")
    find_make(f"{file}:make")
    assert (tmp_path / "mine.py.ran").read_text() == "xx"


def test_studies_of_own_tasks(place, tmp_path):
    from l2o_training.compare import contenders
    from l2o_training.compare.report.words import advice
    from l2o_training.compare.run import measure
    from l2o_training.compare.summary import summarise

    study = Study(
        suite="own",
        workloads=[OwnWorkload(place)],
        contenders=[*contenders.rules(["default"], ["total"]), *contenders.baselines("adam", thin=7)],
        steps=80,
        runs=5,
        cache=tmp_path,
    )
    measure(study)
    findings = summarise(study)
    assert findings.timed
    (line,) = advice(findings, study.contenders[0])
    assert line.startswith("test_own.make_line, 80 steps: ")
    assert any(words in line for words in ("use it", "leave it", "no better than adam"))
    make_task(PythonConfig(make=place), None, CPU)
