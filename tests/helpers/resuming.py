"""Runs of meta-training that are stopped and go on."""

import pytest

from l2o_training.meta.trainer import Trainer


def assert_resumes_bit_for_bit(config, folder, epoch=2, midway=True):
    """Stop after an epoch, in the middle of an episode or not, and go on: the rule is that of a run in one go."""
    whole = Trainer(config, folder / "whole").run()

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.epoch == epoch:
            raise Stop

    trainer = Trainer(config, folder / "parts")
    with pytest.raises(Stop):
        trainer.run(stop)
    assert any(slot.under_way for slot in trainer.slots) == midway
    resumed = Trainer(config, folder / "parts", resume=True).run()
    assert resumed.read_bytes() == whole.read_bytes()
