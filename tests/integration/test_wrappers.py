"""Real runs under Lightning, Accelerate and the Hugging Face Trainer, each held against the plain loop.

Every wrapper is optional: `pip install '.[integrations]'`.
"""

import csv
import os
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from problems import Regression, assert_same_state, context_state, dataset, flat, minibatches, train
from rules import CONTEXTS, RULES, make_rule
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

from l2o_runtime import LearnedOptimizer, save_rule
from l2o_runtime.rules import LSTMConfig

pytestmark = pytest.mark.wrappers

COUNT = 12
"""Minibatches per epoch: more than the rule's window of 7 snapshots."""


def installed(module: str, package: str):
    return pytest.importorskip(module, reason=f"{package} is not installed: pip install '.[integrations]'")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch):
    """No network, and nothing left behind: the libraries write environment variables and process-wide state."""

    def refuse(*arguments):
        raise AssertionError(f"a wrapper wants the network: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}):
        yield
    if state := sys.modules.get("accelerate.state"):  # the Trainer uses it too
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture
def window_file(tmp_path):
    """A rule that looks at the loss, through a window."""
    path = tmp_path / "window.safetensors"
    save_rule(path, make_rule(RULES["dmd-sketch-normalized"]))
    return path


@pytest.fixture
def plain(window_file):
    """A run of the plain loop over the same minibatches: model and optimizer."""

    def run(batches=None, *, lr_lambda=None, **keywords):
        model = Regression()
        optimizer = LearnedOptimizer(model.parameters(), rule=window_file)
        scheduler = LambdaLR(optimizer, lr_lambda) if lr_lambda else None
        train(model, optimizer, minibatches(COUNT) if batches is None else batches, scheduler=scheduler, **keywords)
        return model, optimizer

    return run


def assert_same_run(model, optimizer, reference) -> None:
    assert torch.equal(flat(model), flat(reference[0]))
    a, b = optimizer.state_dict()["state"], reference[1].state_dict()["state"]
    assert_same_state(a, b)


# Lightning

lightning_warnings = [
    # Lightning 2.6 asks for leaves of a tree in a way that torch has deprecated.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    # Depends on the number of cores of the machine.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


@pytest.fixture
def lightning(tmp_path, window_file):
    """Model and trainer classes with everything that a test does not ask for switched off."""
    module = installed("lightning.pytorch", "lightning")

    class Model(module.LightningModule):
        def __init__(self, seed=0, schedule=None):
            super().__init__()
            self.model = Regression(seed)
            self.schedule = schedule

        def training_step(self, batch, _):
            return self.model(*batch)

        def configure_optimizers(self):
            optimizer = LearnedOptimizer(self.parameters(), rule=window_file)
            return [optimizer], [self.schedule(optimizer)] if self.schedule else []

    class Manual(Model):
        automatic_optimization = False

        def training_step(self, batch, _):
            optimizer = self.optimizers()
            loss = self.model(*batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.1)
            optimizer.step(loss=loss)

    def trainer(max_epochs=1, logger=False, **keywords):
        return module.Trainer(
            max_epochs=max_epochs,
            accelerator="cpu",
            devices=1,
            logger=logger,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **keywords,
        )

    def fit(model, trainer, size=16, **keywords):
        trainer.fit(model, DataLoader(dataset(COUNT), batch_size=size), **keywords)
        return model.model, trainer.optimizers[0]

    return SimpleNamespace(module=module, Model=Model, Manual=Manual, trainer=trainer, fit=fit)


class TestLightning:
    pytestmark = lightning_warnings

    @pytest.mark.parametrize(
        ("keywords", "loop"),
        [
            ({}, {}),
            ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
            ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
            ({"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
        ],
        ids=["as-it-is", "clipping", "accumulation", "bf16-mixed"],
    )
    def test_automatic_optimization_is_the_plain_loop(self, lightning, plain, keywords, loop):
        """The closure brings the loss: divided by the number of batches where gradients are accumulated."""
        model, optimizer = lightning.fit(lightning.Model(), lightning.trainer(**keywords))
        assert (context_state(optimizer)["context_losses"] != 0).any()
        assert_same_run(model, optimizer, plain(**loop))

    def test_manual_optimization_is_the_plain_loop_with_clipping(self, lightning, plain):
        model, optimizer = lightning.fit(lightning.Manual(), lightning.trainer())
        assert_same_run(model, optimizer, plain(clip=0.1))

    def test_fp16_mixed_brings_no_loss_and_skips_overflows(self, lightning, plain):
        """Lightning runs the closure itself there and calls `step()` bare."""

        def scaler():
            return torch.amp.GradScaler("cpu", init_scale=2.0**24)

        plugin = lightning.module.plugins.MixedPrecision("16-mixed", device="cpu", scaler=scaler())
        model, optimizer = lightning.fit(lightning.Model(), lightning.trainer(plugins=[plugin]))
        context = context_state(optimizer)
        assert 0 < context["context_count"] < COUNT
        assert (context["context_losses"] == 0).all()
        assert_same_run(model, optimizer, plain(autocast=torch.float16, scaler=scaler(), pass_loss=False))

    def test_a_batch_without_a_loss_is_no_step(self, lightning, plain):
        class Picky(lightning.Model):
            def training_step(self, batch, index):
                loss = super().training_step(batch, index)
                return None if index == 4 else loss

        with pytest.warns(UserWarning, match="returned `None`"):
            model, optimizer = lightning.fit(Picky(), lightning.trainer())
        batches = minibatches(COUNT)
        assert_same_run(model, optimizer, plain(batches[:4] + batches[5:]))

    def test_the_monitor_logs_the_lr_that_the_steps_had(self, lightning, tmp_path, plain):
        logger = lightning.module.loggers.CSVLogger(tmp_path)
        monitor = lightning.module.callbacks.LearningRateMonitor("step", log_weight_decay=True)
        model = lightning.Model(
            schedule=lambda o: {"scheduler": LambdaLR(o, lambda step: 0.9**step), "interval": "step"}
        )
        trainer = lightning.trainer(logger=logger, callbacks=[monitor], log_every_n_steps=1)
        trained, optimizer = lightning.fit(model, trainer)
        with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
            logged = [float(row["lr-LearnedOptimizer"]) for row in csv.DictReader(file)]
        assert logged == pytest.approx([0.9**step for step in range(COUNT)])
        assert_same_run(trained, optimizer, plain(lr_lambda=lambda step: 0.9**step))

    def test_a_resumed_run_equals_the_uninterrupted_one(self, lightning, tmp_path):
        def model(seed=0):
            return lightning.Model(seed, schedule=lambda o: CosineAnnealingLR(o, T_max=8))

        whole = lightning.fit(model(), lightning.trainer(max_epochs=4))
        first = lightning.trainer(max_epochs=2)
        lightning.fit(model(), first)
        first.save_checkpoint(tmp_path / "last.ckpt")
        resumed = lightning.fit(
            model(1), lightning.trainer(max_epochs=4), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
        assert resumed[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"] < 1
        assert_same_run(*resumed, whole)


# Accelerate


@pytest.fixture
def accelerator_of():
    module = installed("accelerate", "accelerate")
    return lambda **keywords: module.Accelerator(cpu=True, **keywords)


def accelerated(accelerator, path, seed=0):
    model = Regression(seed)
    optimizer = LearnedOptimizer(model.parameters(), rule=path)
    scheduler = LambdaLR(optimizer, lambda step: 0.95**step)
    loader = DataLoader(dataset(COUNT), batch_size=16)
    return accelerator.prepare(model, optimizer, scheduler, loader)


def accelerated_epoch(accelerator, model, optimizer, scheduler, batches, clip=None) -> None:
    for x, y in batches:
        with accelerator.accumulate(model):
            loss = model(x, y)
            accelerator.backward(loss)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            # The wrapped step takes a closure and no `loss`: one that returns what was computed will do.
            optimizer.step(lambda loss=loss: loss)
            scheduler.step()
            optimizer.zero_grad()


class TestAccelerate:
    @pytest.mark.parametrize("clip", [None, 0.1])
    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_a_prepared_run_is_the_plain_loop(self, accelerator_of, window_file, plain, precision, clip):
        accelerator = accelerator_of(mixed_precision=precision)
        model, optimizer, scheduler, loader = accelerated(accelerator, window_file)
        accelerated_epoch(accelerator, model, optimizer, scheduler, loader, clip)
        autocast = torch.bfloat16 if precision == "bf16" else None
        reference = plain(clip=clip, autocast=autocast, lr_lambda=lambda step: 0.95**step)
        assert (context_state(optimizer)["context_losses"] != 0).any()
        assert_same_run(accelerator.unwrap_model(model), optimizer, reference)

    def test_accumulation_steps_once_per_large_batch(self, accelerator_of, window_file):
        accelerator = accelerator_of(gradient_accumulation_steps=3)
        model, optimizer, scheduler, loader = accelerated(accelerator, window_file)
        accelerated_epoch(accelerator, model, optimizer, scheduler, loader)
        assert context_state(optimizer)["context_count"] == COUNT // 3
        assert all(state["step"] == COUNT // 3 for state in optimizer.state.values())

        reference = Regression()
        plain_optimizer = LearnedOptimizer(reference.parameters(), rule=window_file)
        plain_scheduler = LambdaLR(plain_optimizer, lambda step: 0.95**step)
        losses = []
        for index, batch in enumerate(minibatches(COUNT), start=1):
            losses.append(reference(*batch))
            (losses[-1] / 3).backward()
            if index % 3 == 0:
                plain_optimizer.step(loss=losses[-1])
                plain_scheduler.step()
                plain_optimizer.zero_grad()
        assert_same_run(model, optimizer, (reference, plain_optimizer))

    def test_an_overflow_is_skipped(self, accelerator_of, window_file, plain):
        """Accelerate makes a scaler for fp16 on accelerators only; this is the one it would make."""
        accelerator = accelerator_of()
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        model, optimizer, scheduler, _ = accelerated(accelerator, window_file)
        batches = minibatches(COUNT)
        overflowing = (torch.full((16, 6), torch.inf), torch.zeros(16, 1))
        skipped = []
        for batch in [*batches[:8], overflowing, *batches[8:]]:
            accelerated_epoch(accelerator, model, optimizer, scheduler, [batch])
            skipped.append(optimizer.step_was_skipped)
        assert [index for index, was in enumerate(skipped) if was] == [8]
        assert_same_run(model, optimizer, plain(lr_lambda=lambda step: 0.95**step))

    def test_a_saved_state_continues_as_the_run_itself_does(self, accelerator_of, window_file, tmp_path):
        batches = minibatches(20)
        accelerator = accelerator_of()
        *first, _ = accelerated(accelerator, window_file)
        accelerated_epoch(accelerator, *first, batches[:9])
        accelerator.save_state(tmp_path / "state")
        accelerated_epoch(accelerator, *first, batches[9:])
        finished = flat(first[0]), first[1].state_dict()

        accelerator.free_memory()
        *second, _ = accelerated(accelerator, window_file, seed=1)
        accelerator.load_state(tmp_path / "state")
        accelerated_epoch(accelerator, *second, batches[9:])
        assert torch.equal(flat(second[0]), finished[0])
        assert_same_state(second[1].state_dict(), finished[1])


# Hugging Face Trainer


class Named(torch.utils.data.Dataset):
    """Items as the keyword arguments of the model."""

    def __init__(self, *parts, names):
        self.parts, self.names = parts, names

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, index):
        return dict(zip(self.names, (part[index] for part in self.parts), strict=True))


class WithLoss(Regression):
    """The Trainer wants the loss in a dictionary."""

    def forward(self, x, y):
        return {"loss": super().forward(x, y)}


@pytest.fixture
def hf(tmp_path):
    installed("accelerate", "accelerate")
    transformers = installed("transformers", "transformers")

    def trainer(model, data, folder="run", base=transformers.Trainer, max_steps=COUNT, **keywords):
        arguments = {
            "max_steps": max_steps,
            "per_device_train_batch_size": 16,
            "save_strategy": "no",
            **keywords.pop("arguments", {}),
        }
        return base(
            model,
            transformers.TrainingArguments(
                str(tmp_path / folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=0, **arguments
            ),
            train_dataset=data,
            **keywords,
        )

    return SimpleNamespace(module=transformers, trainer=trainer, folder=tmp_path)


def regression_data():
    return Named(*dataset(COUNT).tensors, names=("x", "y"))


def tokens():
    ids = torch.randint(16, (64, 8), generator=torch.Generator().manual_seed(0))
    return Named(ids, ids, names=("input_ids", "labels"))


def tiny_gpt2(hf, seed=0):
    """Two layers, tied embeddings, dropout."""
    torch.manual_seed(seed)
    config = hf.module.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return hf.module.GPT2LMHeadModel(config)


class TestTrainer:
    def test_a_run_with_own_optimizer_and_scheduler_is_the_plain_loop_without_a_loss(self, hf, window_file, plain):
        model = WithLoss()
        optimizer = LearnedOptimizer(model.parameters(), rule=window_file)
        scheduler = LambdaLR(optimizer, lambda step: 0.95**step)
        clip = {"max_grad_norm": 0.1}
        hf.trainer(model, regression_data(), optimizers=(optimizer, scheduler), arguments=clip).train()
        assert len(model.seen) == COUNT
        assert (context_state(optimizer)["context_losses"] == 0).all()
        reference = plain(model.seen, clip=0.1, pass_loss=False, lr_lambda=lambda step: 0.95**step)
        assert_same_run(model, optimizer, reference)

    def test_a_hook_brings_the_loss_to_the_context(self, hf, window_file, plain):
        class LossTrainer(hf.module.Trainer):
            def training_step(self, *arguments, **keywords):
                self.loss = super().training_step(*arguments, **keywords)
                return self.loss

        model = WithLoss()
        optimizer = LearnedOptimizer(model.parameters(), rule=window_file)
        trainer = hf.trainer(
            model,
            regression_data(),
            base=LossTrainer,
            optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
            arguments={"max_grad_norm": 0.0},
        )
        optimizer.register_step_pre_hook(lambda _, args, keywords: (args, {**keywords, "loss": trainer.loss}))
        trainer.train()
        assert (context_state(optimizer)["context_losses"] != 0).all()
        assert_same_run(model, optimizer, plain(model.seen))

    def test_a_rule_that_needs_the_loss_says_so(self, hf, tmp_path):
        save_rule(
            tmp_path / "needy.safetensors", make_rule(LSTMConfig(context=CONTEXTS["dmd-sketch"], needs_loss=True))
        )
        model = WithLoss()
        optimizer = LearnedOptimizer(model.parameters(), rule=tmp_path / "needy.safetensors")
        trainer = hf.trainer(model, regression_data(), optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)))
        with pytest.warns(UserWarning, match=r"step\(loss=loss\)") as warned:
            trainer.train()
        assert sum("step(loss=loss)" in str(warning.message) for warning in warned) == 1
        assert all(p.isfinite().all() for p in model.parameters())

    def test_the_trainer_makes_groups_with_and_without_weight_decay(self, hf, window_file):
        """Its own linear schedule takes lr from ours to zero; its own learning rate is not used."""
        model = tiny_gpt2(hf)
        trainer = hf.trainer(
            model,
            tokens(),
            max_steps=4,
            optimizer_cls_and_kwargs=(LearnedOptimizer, {"rule": window_file, "lr": 0.5}),
            arguments={"weight_decay": 0.01},
        )
        seen = []
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
        trainer.train()
        decayed, others = trainer.optimizer.param_groups
        assert seen == [[lr, lr] for lr in (0.5, 0.375, 0.25, 0.125)]
        assert decayed["weight_decay"] == 0.01
        assert others["weight_decay"] == 0
        assert all(p.dim() >= 2 for p in decayed["params"])
        assert all(p.dim() == 1 for p in others["params"])
        assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
        assert context_state(trainer.optimizer)["context_count"] == 4

    def test_a_resumed_run_equals_the_uninterrupted_one(self, hf, window_file):
        """Dropout, shuffling and accumulation included."""

        def run(folder, seed=0, **keywords):
            model = tiny_gpt2(hf, seed)
            trainer = hf.trainer(
                model,
                tokens(),
                folder,
                max_steps=16,
                optimizer_cls_and_kwargs=(LearnedOptimizer, {"rule": window_file}),
                arguments={
                    "save_strategy": "steps",
                    "save_steps": 9,
                    "gradient_accumulation_steps": 2,
                    "per_device_train_batch_size": 8,
                    "weight_decay": 0.001,
                },
            )
            trainer.train(**keywords)
            return model, trainer.optimizer

        whole = run("whole")
        resumed = run("resumed", 1, resume_from_checkpoint=str(hf.folder / "whole" / "checkpoint-9"))
        assert context_state(whole[1])["context_count"] == 16
        assert_same_run(*resumed, whole)


# The documentation

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
HEAD, *SECTIONS = PAGE.split("\n## ")
IMPORTED = re.compile(r"^(?:import|from) (\w+)", flags=re.MULTILINE)
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
WARNINGS = {
    "ignite": [pytest.mark.filterwarnings("ignore:Run completed without loss diverging")],
    "fastai": [pytest.mark.filterwarnings("ignore")],  # it warns of its own imports, by torch and by pandas
}
RECIPES = [
    pytest.param(
        BLOCK.findall(HEAD)[0] + recipe,
        id=section.splitlines()[0].replace(" ", "-"),
        marks=[mark for module in IMPORTED.findall(recipe) for mark in WARNINGS.get(module, ())],
    )
    for section in SECTIONS
    for recipe in BLOCK.findall(section)
]


class TestRecipes:
    pytestmark = lightning_warnings

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_a_recipe_runs_as_it_stands(self, recipe, tmp_path, monkeypatch):
        for module in sorted(set(IMPORTED.findall(recipe)) - {"l2o_runtime", "torch"}):
            installed(module, module)
            if module == "transformers":
                installed("accelerate", "accelerate")
        monkeypatch.chdir(tmp_path)
        stepped = []
        hook = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))
        torch.manual_seed(0)
        try:
            exec(recipe, {"__name__": "recipe"})
        finally:
            hook.remove()
        assert len(stepped) >= 4
        assert {type(optimizer) for optimizer in stepped} == {LearnedOptimizer}
        assert all(p.isfinite().all() for group in stepped[-1].param_groups for p in group["params"])
