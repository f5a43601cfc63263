"""The bar counts the steps of a run, over epochs and across a resume."""

from __future__ import annotations

import io
import re

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_difftune.callbacks.progress_bar import PicturesColumn, StepLines, StepProgressBar, Throughput


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
        self.log("train/loss", output["loss"])
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
    assert metrics.keys() == {"loss"}


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


def test_the_bar_shows_pictures_per_second(tmp_path):
    rendered = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            (bar,) = [c for c in trainer.callbacks if isinstance(c, StepProgressBar)]
            column = next(c for c in bar.progress.columns if isinstance(c, PicturesColumn))
            rendered.append(column.render(bar.train_progress_bar).plain)
            assert column.render(type("Task", (), {"id": -1})()).plain == ""

    bar = StepProgressBar()
    bar.throughput = Throughput(clock=iter(range(1000)).__next__)  # a second a step
    L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[bar, Look()],
        max_steps=3,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(LoggingModel())
    assert rendered == ["1 images/s"] * 3  # BoringModel's batches are of one sample


def lines_of(tmp_path, capsys, every=None, ckpt_path=None, **settings):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[StepLines(every)],
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )
    capsys.readouterr()
    trainer.fit(LoggingModel(), ckpt_path=ckpt_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Training")]
    return trainer, [line.split("  ") for line in lines]


def test_lines_come_at_intervals_and_after_validation(tmp_path, capsys):
    _, lines = lines_of(tmp_path, capsys, 4, max_steps=10, limit_val_batches=1, limit_train_batches=6)
    assert [line[0] for line in lines] == [f"Training {step}/10" for step in (4, 6, 10)]
    for line in lines:
        assert re.fullmatch(r"\d+ images/s", line[1])
        assert re.fullmatch(r"\d:\d\d:\d\d left", line[2])
        assert re.fullmatch(r"loss \S+", line[3])


def test_there_is_a_line_for_each_log_by_default(tmp_path, capsys):
    _, lines = lines_of(tmp_path, capsys, max_steps=30, limit_val_batches=0, log_every_n_steps=2)
    assert len(lines) == 15
    trainer, lines = lines_of(tmp_path, capsys, max_steps=60, limit_val_batches=0, log_every_n_steps=20)
    assert [line[0] for line in lines] == ["Training 20/60", "Training 40/60", "Training 60/60"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, lines = lines_of(tmp_path, capsys, 5, tmp_path / "a.ckpt", max_steps=70, limit_val_batches=0)
    assert [line[0] for line in lines] == ["Training 65/70", "Training 70/70"]


def test_epochs_have_no_end_to_count_to(tmp_path, capsys):
    _, lines = lines_of(tmp_path, capsys, 2, max_epochs=2, limit_train_batches=2, limit_val_batches=0)
    assert [line[0] for line in lines] == ["Training 2", "Training 4"]
    assert not any("left" in part for line in lines for part in line)
    _, lines = lines_of(tmp_path, capsys, 3, max_epochs=2, limit_train_batches=2, limit_val_batches=0)
    assert [line[0] for line in lines] == ["Training 3", "Training 4"], "the last one, too"


def test_epochs_may_end_a_run_before_its_max_steps(tmp_path, capsys):
    settings = {"max_epochs": 2, "max_steps": 100, "limit_train_batches": 3}
    _, lines = lines_of(tmp_path, capsys, 3, **settings, limit_val_batches=0)
    assert [line[0] for line in lines] == ["Training 3/6", "Training 6/6"]
    assert lines[-1][2] == "0:00:00 left"
    bar = StepProgressBar()
    quiet = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    trainer = L.Trainer(accelerator="cpu", callbacks=[bar, seen := Seen(bar)], **quiet, **settings)
    trainer.fit(LoggingModel())
    assert seen.shown == [("Training", step, 6) for step in range(1, 7)]


def test_other_processes_say_nothing(capsys):
    lines = StepLines(1)
    lines.disable()
    lines._print(type("Trainer", (), {"global_step": 3})(), None)
    assert capsys.readouterr().out == ""


def test_pauses_do_not_count_and_the_time_between_steps_does():
    clock = iter([0.0, 1.0, 50.0, 51.0, 53.0])
    meter = Throughput(window=2, clock=lambda: next(clock))
    meter.stop(1000)  # without a start
    assert meter.rate == 0
    meter.start()
    meter.stop(100)
    meter.pause()
    for pictures in (4, 8):
        meter.start()
        meter.stop(pictures)
    assert meter.rate == 4  # of the latest two, from 50 to 53
    meter.pause()
    meter.stop(1000)
    assert meter.rate == 4


@pytest.mark.parametrize("kind", [StepProgressBar, StepLines])
def test_waits_for_data_count_and_validations_and_checkpoints_do_not(kind, tmp_path):
    now = [0.0]

    class SlowData(RandomDataset):
        def __getitem__(self, index):
            now[0] += 3
            return super().__getitem__(index)

    class Slow(LoggingModel):
        def train_dataloader(self):
            return DataLoader(SlowData(32, 64))

        def training_step(self, batch, batch_idx):
            now[0] += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            now[0] += 100

        def on_save_checkpoint(self, checkpoint):
            now[0] += 1000

    bar = kind()
    bar.throughput = Throughput(clock=lambda: now[0])
    steps = 8  # the start and three validations come before a step, with or without a checkpoint
    L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[bar, ModelCheckpoint(tmp_path, every_n_train_steps=4)],
        max_steps=steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(Slow())
    # Each step takes a second and waits three for its batch, but for those that begin after a pause.
    times = [time for time, _ in bar.throughput._steps]
    assert sorted(set(times)) == [1, 4]
    assert times.count(1) == 4
    assert bar.throughput.rate == steps / sum(times) == steps / (4 * 1 + 4 * 4)


class ChattyModel(LoggingModel):
    """A module that logs more than fits on a narrow terminal."""

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        for name in ("train/reconsolidation", "train/retention"):
            self.log(name, output["loss"])
        for name in ("val/loss", "fd_efficientnet_lite0", "control/ssim"):
            self.log(name, output["loss"], prog_bar=True)
        return output


@pytest.mark.parametrize("width", [80, 140])
def test_the_bar_stays_on_one_line(width, tmp_path, monkeypatch):
    terminal = Console(width=width, force_terminal=True, file=io.StringIO(), color_system=None)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: terminal)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **options: None)
    seen = []

    class Rendered(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            paper = Console(width=width, file=io.StringIO(), color_system=None)
            paper.print(bar.progress.get_renderable())
            seen.append([line for line in paper.file.getvalue().splitlines() if line.strip()])

    bar = StepProgressBar()
    settings = {"limit_val_batches": 0, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=CSVLogger(tmp_path),
        callbacks=[bar, Rendered()],
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(ChattyModel())
    assert [len(lines) for lines in seen] == [1, 1, 1]
    line = seen[-1][0]
    assert len(line.rstrip()) <= width
    assert "3/3" in line
    assert "images/s" in line
    assert "loss:" in line
