"""The suites `everyday`, `larger` and `heldout`: what their losses say, and the texts and tables that they read."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import BASELINES, EVERY, FAKE, run, script_of
from torch import nn

from l2o_training.compare.scripts import validate
from l2o_training.compare.suites import SUITES, find_suite, named, workloads
from l2o_training.tasks.data import DataError, Datasets
from l2o_training.tasks.records import FEWEST_CHARACTERS, FEWEST_ROWS, TABLES, load_table, load_text
from l2o_training.tasks.scripts import everyday, heldout, larger
from l2o_training.tasks.scripts.everyday import fields, images, networks, texts
from l2o_training.tasks.scripts.heldout import densities, functions, relations, sequences

SIZES = {
    "vit-4x96": 320_554,
    "vgg": 225_034,
    "vgg-batchnorm": 225_482,
    "resnet-48": 258_010,
    "deep-autoencoder": 419_120,
    "shufflenet": 352_042,
    "squeezenet": 727_626,
    "mobilenet": 2_236_682,
    "resnet-18": 11_181_642,
}


def test_suites_share_no_script_and_are_long_enough():
    assert len(everyday.RECIPES) >= 14
    assert len(larger.RECIPES) >= 8
    names = [named(task) for suite in SUITES.values() for task in suite.tasks]
    assert len(names) == len(set(names))
    assert len(heldout.RECIPES) == 24
    builds = [recipe.build for recipe in EVERY.values()]
    assert len(builds) == len(set(builds))
    for name in ("everyday", "larger", "heldout"):
        found = workloads(find_suite(name), Datasets("none"))
        assert len({workload.key(BASELINES["adam"])["code"] for workload in found}) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", larger.RECIPES)
def test_larger_networks_have_their_size_and_train(name):
    script = larger.RECIPES[name].build(FAKE)
    torch.manual_seed(0)
    model = script.make_model()
    size = sum(param.numel() for param in model.parameters())
    assert size == SIZES.get(name, size)
    assert 150_000 <= size <= 12_000_000
    optimizer, batch, losses = torch.optim.Adam(model.parameters(), lr=3e-4), next(script.batches(0)), []
    for _ in range(3):  # the vision transformer's head begins at zero, so that other gradients come later
        optimizer.zero_grad()
        loss = script.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [key for key, param in model.named_parameters() if param.grad is None or not param.grad.any()] == []
    assert losses[-1] < losses[0] or name == "squeezenet"


@pytest.mark.parametrize("name", heldout.RECIPES)
def test_held_out_scripts_train_and_validate(name):
    """With Adam, at losses above zero, which ratios ask for; every parameter that is trained has a part in it."""
    script = script_of(name)
    found = run(script, BASELINES["adam"], 3e-3, 0, 30)
    assert min(found.train) > 0
    assert np.isfinite(found.validation).all()
    assert np.mean(found.train[-5:]) < np.mean(found.train[:5])
    torch.manual_seed(0)
    model = script.make_model()
    script.loss(model, next(script.batches(0))).backward()
    trained = {key for key, param in model.named_parameters() if param.requires_grad}
    without = trained - {key for key, param in model.named_parameters() if param.grad is not None}
    assert without == ({"5.bias"} if name == "pendulum" else set()), "an energy is known but for a constant"


def test_a_flow_s_density_integrates_to_one():
    torch.manual_seed(0)
    axis = torch.linspace(-8, 8, 321)
    with torch.no_grad():
        density = torch.exp(-densities.Flow(6)(torch.cartesian_prod(axis, axis)))
    assert float(density.sum()) * 0.05**2 == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", ["mixture", "network", "process"])
def test_likelihoods_are_those_of_torch_s_distributions(kind):
    torch.manual_seed(0)
    x, y = torch.randn(6, 2), torch.randn(6, 1)
    normal = torch.distributions.Normal
    if kind == "mixture":
        model = densities.Mixture(3)
        each = normal(model.mean, model.log_deviation.exp()).log_prob(x[:, None]).sum(-1)
        found, expected = model(x), -torch.logsumexp(each - math.log(3), -1)
    elif kind == "network":
        out = torch.randn(6, 15)
        logits, mean, log_deviation = out.chunk(3, -1)
        parts = torch.distributions.Categorical(logits=logits), normal(mean, log_deviation.exp())
        expected = -torch.distributions.MixtureSameFamily(*parts).log_prob(y[:, 0]).mean()
        found = densities.mixture_loss(lambda _: out, (x, y))
    else:
        place, reading = x.T
        distance = place[:, None] - place
        covariance = torch.exp(-0.5 * distance.square()) + 1.0001 * torch.eye(6)
        expected = -torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(reading) / 6
        found = densities.Kernel()(place, reading)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_losses_of_held_out_scripts_are_zero_or_lowest_at_the_truth():
    x = script_of("counts").train[0]
    rate = torch.tensor([1.0, 5.0])
    assert functions.deviance(lambda _: rate.log()[:, None], (x[:2], rate)).item() == pytest.approx(0, abs=1e-6)
    own, chances = script_of("distillation").train
    assert functions.divergence(lambda _: chances.log(), (own, chances)).item() == pytest.approx(0, abs=1e-6)
    states, target = script_of("pendulum").train

    def energy(state):
        return state[:, 1].square() / 2 - state[:, 0].cos()

    assert functions.field_error(energy, (states, target)).item() < 1e-10
    values = torch.arange(1.0, 101)
    guesses = [torch.full((100, 3), at) for at in (40.0, 50.5, 61.0)]
    errors = [functions.pinball(lambda _, guess=guess: guess, (values, values)) for guess in guesses]
    assert errors[1] < min(errors[0], errors[2])


def test_a_partial_likelihood_counts_who_is_still_there():
    """Three people with times 1, 2 and 3: −log of e^a / (e^a + e^b + e^c), of e^b / (e^b + e^c), and of 1."""
    risk = torch.tensor([0.3, -0.2, 1.1])
    expected = (torch.logsumexp(risk, 0) - risk[0] + torch.logsumexp(risk[1:], 0) - risk[1]) / 3
    order = torch.tensor([2, 0, 1])
    found = functions.partial_likelihood(lambda x: x, (risk[order, None], torch.tensor([1.0, 2.0, 3.0])[order]))
    torch.testing.assert_close(found, expected)


def test_sequences_and_words_hold_their_answers():
    x, target = script_of("adding").train
    marked = x[..., 0][x[..., 1] > 0].view(-1, 2)
    torch.testing.assert_close(marked.prod(-1), target)
    pair, same = script_of("skip-gram").train
    assert (pair[same > 0] % relations.TOPICS).diff().eq(0).all()
    assert (pair < relations.WORDS).all()
    digits, ordered = script_of("sorting").train
    assert torch.equal(torch.sort(digits).values, ordered)
    assert len(digits) == sequences.TRAIN


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("lenet", 0.5), ("friedman-mlp", 0.2), ("siren", 0.2), ("heat-pinn", 0.3)])
def test_losses_fall_over_two_hundred_steps(name, share):
    losses = run(script_of(name), BASELINES["adam"], 1e-3, 0, 200).train
    assert np.mean(losses[-10:]) < share * np.mean(losses[:10])


@pytest.mark.slow
def test_everyday_scripts_on_real_data(data_root):
    load = Datasets(data_root)
    for name in ("lenet", "transformer-2x64", "diamond-prices", "diamond-cuts", "word-vectors"):
        found = run(everyday.RECIPES[name].build(load), BASELINES["adam"], 3e-3, 0, 20)
        assert found.validation[-1] < found.validation[0], name


def test_biases_before_batch_norm_and_dropout_are_as_people_write_them():
    layers = list(networks.resnet(4, 10).modules())
    before = [first for first, second in pairwise(layers) if isinstance(second, nn.BatchNorm2d)]
    assert before
    assert all(isinstance(layer, nn.Conv2d) and layer.bias is not None for layer in before)
    dropping = {
        name
        for name in everyday.RECIPES
        for layer in script_of(name).make_model().modules()
        if isinstance(layer, nn.Dropout) and layer.p > 0
    }
    assert dropping == {"char-lstm", "transformer-4x128", "diamond-prices", "diabetes"}
    script = script_of("diabetes")
    model = script.make_model()
    assert validate(script, model) == validate(script, model), "nothing is drawn in evaluation mode"
    assert script.loss(model, script.validation) != script.loss(model, script.validation)


def test_the_solution_of_the_heat_equation_leaves_no_residual():
    class Exact(nn.Module):
        def forward(self, points):
            return fields.solution(*points.unbind(-1))[:, None]

    (points,) = script_of("heat-pinn").validation
    assert fields.residuals(Exact(), (points,)).item() < 1e-9
    model = networks.mlp((2, 8, 1), nn.Tanh)
    assert fields.residuals(model, (points,)).item() > 0.1
    with torch.no_grad():
        assert fields.residuals(Exact().eval(), (points,)).item() == 0


def test_sines_keep_their_distribution_through_the_layers():
    torch.manual_seed(0)
    hidden = 2 * torch.rand(2000, 2) - 1
    for layer in networks.siren(2, 64, 3)[:-1]:
        hidden = layer(hidden)
        assert hidden.std().item() == pytest.approx(math.sqrt(0.5), rel=0.15), "that of the sine of a uniform angle"


def test_the_gradient_of_drawn_guesses_is_that_of_the_expected_cost(monkeypatch):
    monkeypatch.setattr(images, "ENTROPY", 0.0)
    torch.manual_seed(0)
    model, features, labels = nn.Linear(3, 4), torch.randn(512, 3), torch.randint(4, (512,))
    model.eval()
    images.policy_gradient(model, (features, labels)).backward()
    expected = model.weight.grad.clone()
    model.train()
    found = torch.zeros_like(expected)
    for _ in range(300):
        model.weight.grad = None
        cost = images.policy_gradient(model, (features, labels))
        cost.backward()
        found += model.weight.grad / 300
        assert (512 * cost).item() == pytest.approx(round((512 * cost).item()), abs=1e-3), "a share of the guesses"
    torch.testing.assert_close(found, expected, rtol=0.2, atol=0.003)


def test_co_occurrences_are_counted_by_distance():
    table = texts.co_occurrences("one two, one? THREE " + 10 * "one ")
    assert table.equal(table.T)
    order = {"one": 0, "two": 1, "three": 2}
    assert table[order["two"], order["one"]].item() == pytest.approx(1 + 1 + 1 / 3 + 1 / 4 + 1 / 5)
    assert table[order["two"], order["three"]].item() == pytest.approx(1 / 2)
    assert not table[3:].any()


def test_pieces_to_validate_on_come_after_all_others():
    (train,), (validation,) = texts.pieces(torch.arange(65 * 40))
    assert train.shape == (36, 65)
    assert validation.shape == (4, 65)
    assert train.max() < validation.min()


def header(name: str = "diamonds") -> str:
    return ",".join((*TABLES[name].numbers, *TABLES[name].categories))


ROW = "1,2,3,4,5,6,7,Good,E,SI1\n"


def test_texts_and_tables_are_read(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("añ" * FEWEST_CHARACTERS, encoding="utf-8")
    assert load_text("tinyshakespeare", tmp_path)[:4] == "añañ"
    rows = FEWEST_ROWS * ROW + "0.5,2,3,4,5,6,7,Fair,E,SI1\n"
    (tmp_path / "diamonds.csv").write_text(f"{header()}\n{rows}")
    load = Datasets(tmp_path)
    table = load.table("diamonds")
    assert table is load.table("diamonds"), "read once"
    assert table.numbers["carat"][-2:].tolist() == [1.0, 0.5]
    assert table.categories["cut"][-2:].tolist() == [1, 0], "Fair comes before Good"
    for name in ("tinyshakespeare", "diamonds", "digits"):
        load.prepare(name)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tinyshakespeare.txt", None, r"no usable tinyshakespeare: .*tinyshakespeare\.txt .*--data-root"),
        ("tinyshakespeare.txt", b"\xff\xfe", "no UTF-8"),
        ("tinyshakespeare.txt", b"To be", "has 5 characters, expected 100,000 or more"),
        ("diamonds.csv", None, r"no usable diamonds: .*diamonds\.csv"),
        ("diamonds.csv", b"", "lacks the columns carat, "),
        ("diamonds.csv", f"{header()[6:]}\n".encode(), "lacks the columns carat:"),
        ("diamonds.csv", f"{header()}\n{ROW}".encode(), "has 1 rows, expected 1,000 or more"),
        ("diamonds.csv", f"{header()}\n{ROW}x{FEWEST_ROWS * ROW}".encode(), "'x1' in column carat, line 3"),
        ("diamonds.csv", f"{header()}\n{ROW}1,2\n{FEWEST_ROWS * ROW}".encode(), "None in column table, line 3"),
    ],
)
def test_missing_and_damaged_files_are_told(tmp_path: Path, file, content, message):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    name = file.partition(".")[0]
    with pytest.raises(DataError, match=message):
        Datasets(tmp_path).prepare(name)


def test_unknown_texts_and_tables_get_the_nearest(tmp_path):
    with pytest.raises(DataError, match="did you mean diamonds"):
        load_table("diamond", tmp_path)
    with pytest.raises(DataError, match="did you mean tinyshakespeare"):
        load_text("tinyshakespere", tmp_path)
