"""Games: their solutions, the field that players see, learned pairs in meta-training and in scripts."""

import dataclasses
from copy import deepcopy

import pytest
import torch
from torch import nn

from l2o_runtime import ArtifactError, ConfigError, LearnedMinimax, LearnedOptimizer, load_rule, save_rule
from l2o_runtime.files.artifact import read_learned
from l2o_runtime.rules import DirectionalConfig, LSTMConfig, OptimisticConfig, make_rule
from l2o_runtime.solvers import MAX, MIN, Players, Point, SwarmConfig, SwarmSolver, TwinConfig, TwinSolver
from l2o_training.compare.baselines import BASELINES, find_baselines
from l2o_training.compare.flat import rollout
from l2o_training.config import TrainConfig, load_preset
from l2o_training.meta.objectives import Distance, Reward
from l2o_training.meta.trainer import Trainer
from l2o_training.meta.unroll import begin, unroll
from l2o_training.tasks import GameConfig, QuadraticConfig, make_task
from l2o_training.tasks.data import load_dataset

CPU = torch.device("cpu")
GAMES = {
    "saddle": GameConfig(game="saddle", size=2),
    "rotated-saddle": GameConfig(),
    "seesaw": GameConfig(game="seesaw"),
    "matrix": GameConfig(game="matrix", size=3),
}
CONFIG = TrainConfig(
    rule=TwinConfig(),
    tasks=(GAMES["rotated-saddle"],),
    objective="distance",
    horizon=8,
    unroll=4,
    batch=4,
    epochs=2,
    validate_every=2,
    validation_runs=4,
)


def instances_of(name, count=4, seed=1):
    return make_task(GAMES[name], load_dataset, CPU).instances(count, seed)


def random_twin(seed=0, **rule):
    """A pair whose networks say something."""
    torch.manual_seed(seed)
    made = OptimisticConfig(hidden=4, **rule)
    twin = TwinSolver(TwinConfig(minimizer=made, maximizer=made))
    for player in (MIN, MAX):
        twin.rule(player).cell.head.weight.data.normal_(std=0.2)
    return twin.requires_grad_(False)


@pytest.mark.parametrize("name", GAMES)
def test_the_field_is_the_gradient_of_each_players_own_loss(name):
    instances = instances_of(name)
    n = instances.params.shape[1] // 2
    points = instances.params.double().requires_grad_()
    drawn = instances._batches()[0].double()
    u, v = points[:, :n], points[:, n:]
    a, b = (drawn[:, 0], drawn[:, 1]) if name != "matrix" else (None, None)
    f = {
        "saddle": lambda: a * (u**2).sum(1) - b * (v**2).sum(1),
        "rotated-saddle": lambda: a * (u**2).sum(1) - b * (v**2).sum(1) + 2 * (u * v).sum(1),
        "seesaw": lambda: -b * v[:, 0] * torch.sin(a * torch.pi * u[:, 0]),
        "matrix": lambda: torch.stack([x @ m @ y for x, m, y in zip(u, drawn, v, strict=True)]),
    }[name]()
    (gradient,) = torch.autograd.grad(f.sum(), points)
    loss, field = instances.value_and_grad(instances.params)
    torch.testing.assert_close(loss.double(), f.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(field.double(), gradient * torch.tensor([1.0] * n + [-1.0] * n), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GAMES)
def test_distances_are_zero_where_the_field_is(name):
    """The nearest solution is one, and lies where it is said to."""
    instances = instances_of(name, count=16)
    solutions = instances.params - instances.structure.apart(instances.params).float()
    assert instances.value_and_grad(solutions)[1].abs().max() < 1e-5
    assert instances.look(solutions, instances.statistics).score.max() < 1e-5
    assert instances.look(instances.params, instances.statistics).score.min() > 0


def test_solutions_of_a_seesaw_are_periodic():
    instances = instances_of("seesaw", count=1)
    period = 1 / instances._batches()[0][:, 0]
    points = torch.stack([3 * period + 0.01, torch.zeros(1)], dim=1)
    torch.testing.assert_close(
        instances.look(points, instances.statistics).score, torch.tensor([0.01]).double(), rtol=1e-3, atol=0
    )


def test_games_of_training_and_of_tests_are_apart():
    task = make_task(GAMES["matrix"], load_dataset, CPU)
    same, other = task.instances(4, 1), task.instances(4, 2)
    assert torch.equal(same.params, instances_of("matrix").params)
    assert not torch.equal(same.params, other.params)
    assert not torch.equal(same._batches()[0], other._batches()[0])


def test_players_move_by_turns_from_where_the_other_is():
    instances, twin = instances_of("matrix"), TwinSolver(TwinConfig()).requires_grad_(False)
    inner = begin(twin, instances)
    matrix = instances._batches()[0]
    u, v = instances.params.chunk(2, dim=1)
    before_u, before_v = torch.zeros_like(u), torch.zeros_like(v)
    for _ in range(3):  # untrained it is optimistic gradient descent and ascent by turns
        slope = torch.einsum("bij,bj->bi", matrix, v)
        u, before_u = u - 0.1 * (2 * slope - before_u), slope
        slope = torch.einsum("bi,bij->bj", u, matrix)
        v, before_v = v + 0.1 * (2 * slope - before_v), slope
    with torch.no_grad():
        unroll(twin, inner, 6)
    torch.testing.assert_close(inner.params, torch.cat([u, v], dim=1))


def test_a_reward_is_of_the_mover_alone():
    instances, twin = instances_of("rotated-saddle"), TwinSolver(TwinConfig())
    inner, slopes = begin(twin, instances), []
    for _ in range(2):
        with torch.no_grad():
            unroll(twin, inner, 1)
        point = instances.look(inner.params, inner.statistics)
        value, slope = Reward().after(inner.state).at(instances, point_of(inner))
        slopes.append(slope)
        torch.testing.assert_close(value.abs(), point.loss.abs().double())
    assert slopes[0].ne(0).tolist() == [[True, False]] * 4, "u has moved"
    assert slopes[1].ne(0).tolist() == [[False, True]] * 4, "v has moved"


def point_of(inner):
    return Point(inner.params, inner.loss, inner.grad)


def test_the_slope_of_a_distance_is_its_gradient():
    instances = instances_of("matrix")
    value, slope = Distance().at(instances, point_of(begin(random_twin(), instances)))
    x = instances.params.double().requires_grad_()
    u, v = x.chunk(2, dim=1)
    project = instances.structure.projections
    logs = torch.einsum("bij,bj->bi", project, torch.cat([u, v], 1)).norm(dim=1).log()
    (gradient,) = torch.autograd.grad(logs.sum(), x)
    torch.testing.assert_close(value, logs.detach())
    torch.testing.assert_close(Distance().measure(instances, instances.params, torch.zeros(())).log(), value)
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-4, atol=1e-6)


def test_steps_are_in_proportion_to_gradients():
    """The rule has no length of its own, so it converges however small gradients are."""
    torch.manual_seed(0)
    rule = make_rule(OptimisticConfig(hidden=4))
    rule.cell.head.weight.data.normal_()
    grads = torch.randn(5, 7)

    def steps(scale):
        state = {key: torch.zeros(7, *shape) for key, (shape, _) in rule.spec.coordinate.items()}
        deltas = []
        for grad in scale * grads:
            delta, state, _ = rule(torch.zeros(7), grad, torch.zeros(()), state, {})
            deltas.append(delta / scale)
        return torch.stack(deltas)

    torch.testing.assert_close(steps(1.0), steps(1e-12), rtol=1e-4, atol=1e-6)


def test_it_is_meta_trained_kept_and_read_back(tmp_path):
    path = Trainer(CONFIG, tmp_path).run()
    twin, provenance = read_learned(path)
    assert isinstance(twin, TwinSolver)
    assert twin.config.horizon == 8
    assert twin.config.minimizer.horizon == 4, "each player makes half of the moves"
    assert provenance["tasks"] == ["rotated-saddle"]
    with pytest.raises(ArtifactError, match="a learned solver of kind twin, not a rule"):
        load_rule(path)


def test_a_script_takes_the_steps_of_the_solver(tmp_path):
    twin, instances = random_twin(), instances_of("rotated-saddle", count=1)
    save_rule(tmp_path / "twin.safetensors", twin)
    (a, b), (u, v) = instances._batches()[0][0], (nn.Parameter(x.clone()) for x in instances.params[0])
    optimizer = LearnedMinimax([u], [v], tmp_path / "twin.safetensors")

    def closure():
        optimizer.zero_grad()
        f = a * u**2 - b * v**2 + 2 * u * v
        f.backward()
        return f

    values = [float(optimizer.step(closure).detach()) for _ in range(20)]
    with torch.no_grad():
        inner = begin(twin, instances)
        losses = unroll(twin, inner, 40).losses
    torch.testing.assert_close(torch.stack([u, v]).detach(), inner.params[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(values[1:]), losses[1:-1:2, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [8, 9])
def test_schedules_of_a_pair_end_with_its_moves(steps):
    """Of which each player makes half: the last one of either has no length."""
    made = DirectionalConfig(hidden=2)
    twin, ends = TwinSolver(TwinConfig(minimizer=made, maximizer=made)).requires_grad_(False), []
    for done in (steps - 4, steps - 2, steps):
        instances = instances_of("rotated-saddle")
        instances.steps = steps
        with torch.no_grad():
            inner = begin(twin, instances)
            unroll(twin, inner, done)
        ends.append(inner.params)
    assert torch.equal(ends[1], ends[2])
    assert not torch.equal(ends[0], ends[1])


def test_a_script_resumes(tmp_path):
    save_rule(tmp_path / "twin.safetensors", random_twin())
    u, v = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = LearnedMinimax([u], [v], tmp_path / "twin.safetensors")

    def closure():
        optimizer.zero_grad()
        f = u @ v + (u**2).sum() / 2
        f.backward()
        return f

    for _ in range(3):
        optimizer.step(closure)
    saved, places = deepcopy(optimizer.state_dict()), [x.detach().clone() for x in (u, v)]
    optimizer.step(closure)
    after = [x.detach().clone() for x in (u, v)]
    for x, place in zip((u, v), places, strict=True):
        x.data.copy_(place)
    optimizer = LearnedMinimax([u], [v], tmp_path / "twin.safetensors")
    optimizer.load_state_dict(saved)
    optimizer.step(closure)
    assert all(torch.equal(x, wanted) for x, wanted in zip((u, v), after, strict=True))


def test_a_rule_that_was_loaded_already_is_taken_as_it_is():
    rule = random_twin().rule(MIN)
    optimizer = LearnedOptimizer([nn.Parameter(torch.ones(2))], rule=rule)
    assert "optimistic" in repr(optimizer)


def test_other_kinds_are_no_pairs(tmp_path):
    params = [nn.Parameter(torch.ones(2))]
    for name, learned in (("rule", make_rule(LSTMConfig())), ("swarm", SwarmSolver(SwarmConfig()))):
        save_rule(tmp_path / f"{name}.safetensors", learned)
        with pytest.raises(ArtifactError, match="no rules for two players; expected one of kind twin"):
            LearnedMinimax(params, params, tmp_path / f"{name}.safetensors")


def test_players_share_no_parameter(tmp_path):
    save_rule(tmp_path / "twin.safetensors", random_twin())
    one, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match="max_params: 1 of its parameters are among min_params too"):
        LearnedMinimax([one], [other, one], tmp_path / "twin.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (QuadraticConfig(size=4),), "objective": "loss"}, "twin: this task has no players"),
        ({"rule": LSTMConfig(), "objective": "reward"}, "objective: reward is what players gain: only with"),
        ({"rescale": 1.0}, "rescale: not with problems whose structure"),
    ],
)
def test_what_does_not_fit_is_told(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Trainer(dataclasses.replace(CONFIG, **changes), tmp_path).run()


@pytest.mark.parametrize("name", ["sgd", "alternating", "optimistic", "extra-gradient"])
def test_what_is_not_learned_solves_a_rotated_saddle(name):
    scores = rollout(BASELINES[name].solver(0.1, 200), instances_of("rotated-saddle"), 200)
    assert scores[-1].max() < 1e-3 * scores[0].min()


def test_bilinear_games_are_for_optimists():
    """Descent and ascent at once run away from the solution, by turns they go round it."""
    task = make_task(GameConfig(game="matrix", size=1), load_dataset, CPU)
    instances = task.instances(32, 0)
    ends = {
        name: rollout(BASELINES[name].solver(0.3, 400), instances, 400)[[0, -1]].amax(1)
        for name in ("sgd", "alternating", "optimistic", "extra-gradient")
    }
    assert ends["sgd"][1] > 10 * ends["sgd"][0]
    assert ends["alternating"][1] > ends["alternating"][0] / 10
    assert ends["optimistic"][1] < ends["optimistic"][0] / 10
    assert ends["extra-gradient"][1] < ends["extra-gradient"][0] / 10


def test_a_line_search_decreases_what_it_accepts():
    instances = make_task(QuadraticConfig(size=5), load_dataset, CPU).instances(8, 0)
    solver = BASELINES["line-search"].solver(1.0, 100)
    state, params, lowest = solver.init(instances), instances.params, []
    for _ in range(100):
        loss, grad = instances.value_and_grad(params)
        params, state = solver.step(Point(params, loss, grad), state)
        lowest.append(state["lowest"])
    falls = torch.stack(lowest).diff(dim=0)
    assert falls.max() <= 0
    fixed = rollout(BASELINES["sgd"].solver(0.01, 100), instances, 100)[-1]
    assert lowest[-1].median() < fixed.median()


def test_baselines_that_are_no_optimizers_have_to_be_named():
    assert all(baseline.scripts for baseline in find_baselines("all", flat=True))
    assert [baseline.name for baseline in find_baselines("optimistic", flat=True)] == ["optimistic"]
    with pytest.raises(ConfigError, match="is no torch optimizer: it runs on flat tasks only"):
        find_baselines("optimistic")


def test_players_own_whole_tensors():
    players = Players(owners=(MIN, MAX, MIN))
    assert players.places(MIN, [torch.Size([2]), torch.Size([1, 2]), torch.Size([])]).tolist() == [0, 1, 4]


def test_presets_are_read():
    assert load_preset("twin").rule.kind == "twin"
