"""The bar counts the steps of a run, over epochs and across a resume."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from lightning_difftune.callbacks.progress_bar import StepProgressBar


class Seen(L.Callback):
    """What the bar shows after every step."""

    def __init__(self, bar):
        self.bar = bar
        self.shown = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        task = self.bar.train_progress_bar
        self.shown.append((task.description.strip(), task.completed, task.total))


class LoggingModel(BoringModel):
    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        self.log("train/loss", output["loss"], prog_bar=True)
        return output


def fit(tmp_path, ckpt_path=None, **settings):
    bar = StepProgressBar()
    seen = Seen(bar)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[bar, seen],
        limit_train_batches=3,
        limit_val_batches=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )
    model = LoggingModel()
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer, bar.get_metrics(trainer, model), seen.shown


def test_steps_of_the_whole_run(tmp_path):
    _, metrics, shown = fit(tmp_path, max_steps=7)
    assert shown == [("Training", step, 7) for step in range(1, 8)]
    assert metrics.keys() == {"train/loss"}


def test_a_batch_is_not_always_a_step(tmp_path):
    _, _, shown = fit(tmp_path, max_steps=4, accumulate_grad_batches=2)
    assert shown[-1] == ("Training", 6, 8)  # Lightning steps at the end of an epoch, too: 2 + 1 batches, twice
    assert [completed for _, completed, _ in shown] == list(range(1, 7))


@pytest.mark.parametrize("steps_before", [3, 5])  # at the end of an epoch, and in the middle
def test_a_resumed_run_goes_on_counting(tmp_path, steps_before):
    trainer, _, _ = fit(tmp_path, max_steps=steps_before)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    _, _, shown = fit(tmp_path, tmp_path / "run.ckpt", max_steps=8)
    assert shown == [("Training", step, 8) for step in range(steps_before + 1, 9)]


def test_a_run_of_epochs_counts_epochs(tmp_path):
    _, _, shown = fit(tmp_path, max_epochs=2)
    assert [(completed, total) for _, completed, total in shown] == [(1, 3), (2, 3), (3, 3)] * 2
    assert shown[-1][0] == "Epoch 1/1"


def test_nothing_is_shown_where_bars_are_off(tmp_path):
    bar = StepProgressBar(refresh_rate=0)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[bar],
        max_steps=2,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(BoringModel())
    assert bar.progress is None
    assert bar.train_progress_bar_id is None
