"""Real runs under skorch, ignite, timm, fastai and range tests of the learning rate, held against the plain loop.

Every framework is optional: `pip install '.[integrations]'`; fastai is not among them.
"""

from functools import partial

import pytest
import torch
from problems import Regression, assert_same_state, context_state, dataset, flat, minibatches, train
from rules import RULES, make_rule
from torch import nn
from torch.utils.data import DataLoader

from l2o_runtime import LearnedOptimizer, save_rule

pytestmark = pytest.mark.wrappers

COUNT = 12
"""Minibatches per epoch: more than the rule's window of 7 snapshots."""

LOSS = nn.MSELoss()


def installed(module: str):
    return pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[integrations]'")


@pytest.fixture(autouse=True)
def _no_windows(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.fixture
def window_file(tmp_path):
    """A rule that looks at the loss, through a window."""
    path = tmp_path / "window.safetensors"
    save_rule(path, make_rule(RULES["dmd-sketch-normalized"]))
    return path


def network() -> nn.Module:
    return Regression().net


def loader() -> DataLoader:
    return DataLoader(dataset(COUNT), batch_size=16)


def assert_same_run(net, optimizer, window_file, *, pass_loss: bool = True) -> None:
    """As the plain loop over the same minibatches, bit for bit."""
    model = Regression()
    reference = LearnedOptimizer(model.parameters(), rule=window_file)
    train(model, reference, minibatches(COUNT), pass_loss=pass_loss)
    assert torch.equal(flat(net), flat(model))
    assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
    assert (context_state(optimizer)["context_losses"] != 0).any() == pass_loss


class TestSkorch:
    def net(self, path, **keywords):
        settings = {"optimizer__rule": path, "batch_size": 16, "train_split": None, "verbose": 0, **keywords}
        kind = installed("skorch").NeuralNetRegressor
        return kind(network(), criterion=nn.MSELoss, optimizer=LearnedOptimizer, **settings)

    def test_a_fit_is_the_plain_loop_with_its_losses(self, window_file):
        net = self.net(window_file, lr=1.0, max_epochs=1)
        net.fit(*dataset(COUNT).tensors)
        assert_same_run(net.module_, net.optimizer_, window_file)

    def test_its_own_learning_rate_is_far_too_small(self, window_file):
        """What the page says of it; a version that passes none would be welcome."""
        net = self.net(window_file, max_epochs=1)
        net.fit(*dataset(5).tensors)
        assert net.optimizer_.param_groups[0]["lr"] == 0.01


class TestIgnite:
    def test_a_supervised_trainer_is_the_plain_loop_without_a_loss(self, window_file):
        engine = installed("ignite.engine")
        net = network()
        optimizer = LearnedOptimizer(net.parameters(), rule=window_file)
        engine.create_supervised_trainer(net, optimizer, LOSS).run(loader())
        assert_same_run(net, optimizer, window_file, pass_loss=False)

    def test_an_own_update_brings_the_loss(self, window_file):
        engine = installed("ignite.engine")
        net = network()
        optimizer = LearnedOptimizer(net.parameters(), rule=window_file)

        def update(_, batch):
            optimizer.zero_grad()
            loss = LOSS(net(batch[0]), batch[1])
            loss.backward()
            optimizer.step(loss=loss)

        engine.Engine(update).run(loader())
        assert_same_run(net, optimizer, window_file)


class TestTimm:
    def test_groups_and_a_schedule_with_warm_up(self):
        installed("timm")
        from timm.optim import param_groups_layer_decay
        from timm.scheduler import CosineLRScheduler

        net = network()
        net.no_weight_decay = set
        groups = param_groups_layer_decay(net, weight_decay=0.01, layer_decay=0.5)
        optimizer = LearnedOptimizer(groups)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.01}
        scheduler = CosineLRScheduler(optimizer, t_initial=8, warmup_t=2, warmup_lr_init=0.1, t_in_epochs=False)
        rates = []
        for number, (x, y) in enumerate(minibatches(8), start=1):
            optimizer.zero_grad()
            LOSS(net(x), y).backward()
            optimizer.step()
            rates.append([group["lr"] / group["lr_scale"] for group in optimizer.param_groups])
            scheduler.step_update(number)
        seen = torch.tensor(rates, dtype=torch.float64)
        assert torch.allclose(seen, seen[:, :1], rtol=1e-6), "every layer follows, by its own factor"
        assert seen[0, 0] < seen[1, 0] < seen[2, 0] > seen[-1, 0]


class TestFastai:
    pytestmark = pytest.mark.filterwarnings("ignore")  # it warns of its own imports, by torch and by pandas

    def test_one_cycle_and_lr_find(self, tmp_path):
        installed("fastai")
        from fastai.callback.schedule import Learner
        from fastai.data.core import DataLoaders
        from fastai.optimizer import OptimWrapper

        make = partial(OptimWrapper, opt=LearnedOptimizer)
        learner = Learner(DataLoaders(loader(), loader()), network(), LOSS, make, lr=1.0, path=tmp_path)
        before = flat(learner.model)
        with learner.no_bar(), learner.no_logging():
            learner.lr_find(start_lr=1e-7, end_lr=10, num_it=50, show_plot=False)
            assert torch.equal(flat(learner.model), before)
            assert torch.stack(learner.recorder.losses).isfinite().all()
            learner.fit_one_cycle(4, lr_max=1.0)
        assert learner.opt.opt.health()["steps"] == 4 * COUNT
        assert 0.9 < learner.opt.opt.param_groups[0]["momentum"] < 1
        losses = [float(values[0]) for values in learner.recorder.values]
        assert losses[-1] < 0.7 * losses[0]


class TestRangeTests:
    """From 1e-7 to 10, as usual: losses stay finite, and weights and state are put back."""

    def test_torch_lr_finder(self, window_file):
        finders = installed("torch_lr_finder")
        net = network()
        optimizer = LearnedOptimizer(net.parameters(), rule=window_file)
        before = flat(net)
        finder = finders.LRFinder(net, optimizer, LOSS, cache_dir=None)
        finder.range_test(loader(), start_lr=1e-7, end_lr=10, num_iter=40, diverge_th=1e9)
        assert len(finder.history["lr"]) == 40
        assert finder.history["lr"][-1] == pytest.approx(10)
        assert torch.tensor(finder.history["loss"]).isfinite().all()
        finder.reset()
        assert torch.equal(flat(net), before)
        assert_untouched(optimizer)

    @pytest.mark.filterwarnings("ignore:Run completed without loss diverging")
    def test_ignite(self, window_file):
        engine, handlers = installed("ignite.engine"), installed("ignite.handlers")
        net = network()
        optimizer = LearnedOptimizer(net.parameters(), rule=window_file)
        before = flat(net)
        trainer = engine.create_supervised_trainer(net, optimizer, LOSS)
        finder, saved = handlers.FastaiLRFinder(), {"model": net, "optimizer": optimizer}
        with finder.attach(trainer, saved, start_lr=1e-7, end_lr=10.0, num_iter=40, diverge_th=1e9) as tester:
            tester.run(loader())
        assert torch.tensor(finder.get_results()["loss"]).isfinite().all()
        assert torch.equal(flat(net), before)
        assert_untouched(optimizer)


def assert_untouched(optimizer) -> None:
    """No step counts, and lr is the one that it was made with."""
    assert optimizer.health()["steps"] == 0
    assert optimizer.param_groups[0]["lr"] == 1
