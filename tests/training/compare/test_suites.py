"""The suites `everyday` and `larger`: what their losses say, and the texts and tables that they read."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import BASELINES, FAKE, run, script_of
from torch import nn

from l2o_training.compare.scripts import validate
from l2o_training.compare.suites import SUITES, find_suite, named, workloads
from l2o_training.tasks.data import DataError, Datasets
from l2o_training.tasks.records import FEWEST_CHARACTERS, FEWEST_ROWS, TABLES, load_table, load_text
from l2o_training.tasks.scripts import RECIPES, everyday, larger
from l2o_training.tasks.scripts.everyday import fields, images, networks, texts

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
    builds = [recipe.build for recipes in (RECIPES, everyday.RECIPES, larger.RECIPES) for recipe in recipes.values()]
    assert len(builds) == len(set(builds))
    for name in ("everyday", "larger"):
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
