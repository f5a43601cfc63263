"""A resumed run does what its settings now say; what they say as before is restored to the bit."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import signal
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny import noise_pixels, quiet_trainer, tiny_pictures, tiny_weights
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_difftune import DiffTuningObjective, DiTDiffTuningModule, MemoryBankDataModule, MirroredPowerSchedule
from lightning_difftune.callbacks.preemption import Preemption
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.sampling import Sampler

# The data module goes on in the middle of an epoch where the run was, whatever Lightning supposes.
pytestmark = pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before the epoch")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights(tmp_path_factory.mktemp("weights"))


class Rates(L.Callback):
    """The optimizer's settings in each step."""

    def __init__(self):
        self.seen = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen[trainer.global_step] = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}

    def rates(self):
        return [group["lr"] for group in self.seen.values()]


def run(weights, folder, steps, optimizer=None, scheduler=None, ckpt_path=None, save_at=None, data=None, **settings):
    """Fit, and save after ``save_at`` steps; the trainer, the settings of each step and the module."""
    optimizer = optimizer or partial(torch.optim.AdamW, lr=1e-3)
    module = DiTDiffTuningModule(
        str(weights), num_classes=3, optimizer=optimizer, lr_scheduler=scheduler, sampler=Sampler(num_inference_steps=2)
    )
    options = {"target": tiny_pictures(), "batch_size": 4, "val_target": tiny_pictures()} | (data or {})
    data = MemoryBankDataModule(num_classes=3, image_size=8, channels=1, **options)
    seen = Rates()
    callbacks = [seen, *settings.pop("callbacks", [])]
    if save_at:
        callbacks.append(
            ModelCheckpoint(
                folder, f"at{save_at}", every_n_train_steps=save_at, save_top_k=-1, save_on_train_epoch_end=False
            )
        )
    settings = {"val_check_interval": 1000, "check_val_every_n_epoch": None} | settings
    trainer = quiet_trainer(folder, steps, *callbacks, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, seen, module


def state_of(trainer, module):
    return {
        "state_dict": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }


def assert_equal(one, two):
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        for pair in zip(one, two, strict=True):
            assert_equal(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


ONE_CYCLE = partial(OneCycleLR, pct_start=0.4)
SCHEDULERS = {
    "constant": None,
    "one cycle": ONE_CYCLE,
    "cosine": CosineAnnealingLR,
    "steps": partial(StepLR, step_size=3),
    "plateau": partial(ReduceLROnPlateau, patience=0, threshold=10.0),
    "warm-up": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, 6)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_unchanged_settings_resume_to_the_bit(weights, tmp_path, name):
    options = {"scheduler": SCHEDULERS[name], "val_check_interval": 2}
    trainer, seen, module = run(weights, tmp_path, 8, save_at=5, **options)
    again, resumed, same = run(weights, tmp_path, 8, ckpt_path=tmp_path / "at5.ckpt", **options)
    assert list(resumed.seen) == [5, 6, 7]
    assert {step: seen.seen[step] for step in (5, 6, 7)} == resumed.seen
    assert_equal(state_of(trainer, module), state_of(again, same))


@pytest.mark.parametrize("scheduler", [None, ReduceLROnPlateau])
def test_a_changed_rate_and_decay_take_effect(weights, tmp_path, scheduler, caplog):
    run(weights, tmp_path, 3, save_at=2, scheduler=scheduler)
    optimizer = partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.3, betas=(0.5, 0.6))
    with caplog.at_level(logging.INFO):
        _, seen, _ = run(weights, tmp_path, 4, optimizer, scheduler, tmp_path / "at2.ckpt")
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in seen.seen.values()] == [(1e-6, 0.3, (0.5, 0.6))] * 2
    said = "Changed since the checkpoint, from step 2 on: lr 0.001 -> 1e-06, betas [0.9, 0.999] -> [0.5, 0.6], "
    assert said in caplog.text
    assert "weight_decay 0.01 -> 0.3" in caplog.text


def test_a_rate_of_numpy_is_noticed(weights, tmp_path, caplog):
    before, now = (partial(torch.optim.AdamW, lr=rate) for rate in np.logspace(-3, -4, 2))
    run(weights, tmp_path, 3, before, save_at=2)
    with caplog.at_level(logging.INFO):
        _, seen, _ = run(weights, tmp_path, 4, now, ckpt_path=tmp_path / "at2.ckpt")
    assert seen.rates() == [1e-4] * 2
    assert "from step 2 on: lr 0.001 -> 0.0001." in caplog.text


@pytest.mark.parametrize("name", ["one cycle", "cosine", "steps"])
@pytest.mark.parametrize(("rate", "steps"), [(1e-4, 8), (1e-3, 12), (1e-4, 12)])
def test_under_a_scheduler_the_rate_is_that_of_the_new_settings_at_the_step(weights, tmp_path, name, rate, steps):
    optimizer = partial(torch.optim.AdamW, lr=rate)
    scheduler = SCHEDULERS[name]
    _, expected, _ = run(weights, tmp_path, steps, optimizer, scheduler)
    run(weights, tmp_path, 8, save_at=5, scheduler=scheduler)
    _, seen, _ = run(weights, tmp_path, steps, optimizer, scheduler, tmp_path / "at5.ckpt")
    assert seen.rates() == pytest.approx(expected.rates()[5:], rel=1e-9)
    assert [group["betas"] for group in seen.seen.values()] == [g["betas"] for g in list(expected.seen.values())[5:]]


def test_a_scheduler_that_follows_validations_needs_some(weights, tmp_path):
    with pytest.raises(ConfigError, match="follows val/loss from validation to validation, and this run has none"):
        run(weights, tmp_path, 3, scheduler=ReduceLROnPlateau, limit_val_batches=0)


def test_a_change_is_kept_by_the_runs_that_follow(weights, tmp_path):
    run(weights, tmp_path / "a", 3, save_at=2)
    optimizer = partial(torch.optim.AdamW, lr=1e-5)
    run(weights, tmp_path / "b", 5, optimizer, ckpt_path=tmp_path / "a/at2.ckpt", save_at=4)
    _, seen, _ = run(weights, tmp_path / "c", 6, optimizer, ckpt_path=tmp_path / "b/at4.ckpt")
    assert seen.rates() == [1e-5] * 2


def test_decay_alone_leaves_the_schedule_as_it_was(weights, tmp_path):
    _, before, _ = run(weights, tmp_path, 8, save_at=5, scheduler=ONE_CYCLE)
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.5)
    _, seen, _ = run(weights, tmp_path, 8, optimizer, ONE_CYCLE, tmp_path / "at5.ckpt")
    assert seen.rates() == before.rates()[5:]
    assert {group["weight_decay"] for group in seen.seen.values()} == {0.5}


@pytest.mark.parametrize(
    ("before", "after"), [(None, CosineAnnealingLR), (ONE_CYCLE, None), (ONE_CYCLE, CosineAnnealingLR)]
)
def test_another_scheduler_takes_effect(weights, tmp_path, before, after):
    run(weights, tmp_path, 8, save_at=5, scheduler=before)
    _, expected, _ = run(weights, tmp_path, 8, scheduler=after)
    trainer, seen, _ = run(weights, tmp_path, 8, scheduler=after, ckpt_path=tmp_path / "at5.ckpt")
    assert seen.rates() == pytest.approx(expected.rates()[5:])
    assert seen.seen[7]["betas"] == expected.seen[7]["betas"]
    assert [type(config.scheduler) for config in trainer.lr_scheduler_configs] == ([after] if after else [])


def test_patience_takes_effect(weights, tmp_path):
    run(weights, tmp_path, 3, save_at=2, callbacks=[EarlyStopping("val/loss", patience=3)], val_check_interval=1)
    stopping = EarlyStopping("val/loss", patience=7)
    run(weights, tmp_path, 4, callbacks=[stopping], ckpt_path=tmp_path / "at2.ckpt", val_check_interval=1)
    assert stopping.patience == 7


@pytest.mark.parametrize(
    ("kind", "expected"), [(torch.optim.SGD, "torch.optim.sgd.SGD"), (torch.optim.Adam, "torch.optim.adam.Adam")]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_another_optimizer_is_refused_before_anything_is_written(weights, tmp_path, kind, expected, accumulate):
    run(weights, tmp_path, 3, save_at=2)
    with pytest.raises(CheckpointError, match=rf"is torch.optim.adamw.AdamW, and the model's is {expected}"):
        run(
            weights,
            tmp_path / "new",
            6,
            partial(kind, lr=1e-3),
            ckpt_path=tmp_path / "at2.ckpt",
            save_at=1,
            accumulate_grad_batches=accumulate,
        )
    assert not list(tmp_path.glob("new/*"))


def test_without_a_record_another_optimizer_is_still_noticed(weights, tmp_path):
    run(weights, tmp_path, 3, save_at=2)
    content = torch.load(tmp_path / "at2.ckpt", weights_only=True)
    del content["optimization"]
    torch.save(content, tmp_path / "old.ckpt")
    run(weights, tmp_path, 4, ckpt_path=tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"another, without dampening, .*momentum"):
        run(weights, tmp_path, 4, partial(torch.optim.SGD, lr=1e-3), ckpt_path=tmp_path / "old.ckpt")


def test_a_run_that_is_past_its_end_is_refused(weights, tmp_path):
    run(weights, tmp_path, 4, save_at=4)
    with pytest.raises(ConfigError, match=r"stands at step 4, and trainer.max_steps is 3"):
        run(weights, tmp_path, 3, ckpt_path=tmp_path / "at4.ckpt")


def test_weights_alone_are_refused(weights, tmp_path):
    trainer, _, _ = run(weights, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match=r"weights\.ckpt holds only weights"):
        run(weights, tmp_path, 2, ckpt_path=tmp_path / "weights.ckpt")


def test_a_changed_batch_size_says_what_it_means_for_the_stream(weights, tmp_path, caplog):
    run(weights, tmp_path, 3, save_at=2)
    with caplog.at_level(logging.INFO):
        run(weights, tmp_path, 4, ckpt_path=tmp_path / "at2.ckpt", data={"batch_size": 6})
    assert "Changed since the checkpoint: batch_size 4 -> 6. Each further step has the batch" in caplog.text


def test_a_schedule_that_needs_no_bank_changes_the_batches(weights, tmp_path, caplog):
    """The bank's share of a batch becomes the target's, whose stream is then read faster."""
    for tau, steps, start in ((1.0, 2, None), (0.0, 3, tmp_path / "last.ckpt")):
        objective = DiffTuningObjective(MirroredPowerSchedule(tau))
        sampler = Sampler(num_inference_steps=2)
        module = DiTDiffTuningModule(str(weights), num_classes=3, objective=objective, sampler=sampler)
        bank = {"bank": tmp_path / "bank", "bank_size": 4, "batch_size": 5}
        data = MemoryBankDataModule(tiny_pictures(), num_classes=3, image_size=8, channels=1, **bank)
        saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
        with caplog.at_level(logging.INFO):
            quiet_trainer(tmp_path, steps, saving).fit(module, data, ckpt_path=start)
    assert "Changed since the checkpoint: retention_batch_size 1 -> 0. Each further step" in caplog.text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"horizontal_flip": True}, "horizontal_flip False -> True"),
        ({"class_balanced": True}, "class_balanced False -> True"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"target": tiny_pictures(9)}, r"pictures 12 -> 9, the target's pictures"),
        ({"target": tiny_pictures(classes=2)}, r"the target's pictures \(their files' .*, labels or captions"),
        ({"target": ArrayImages(255 - noise_pixels(12, 8, 8), np.arange(12) % 3)}, r"the target's pictures"),
    ],
)
def test_other_pictures_are_named(weights, tmp_path, caplog, data, said):
    run(weights, tmp_path, 3, save_at=2)
    with caplog.at_level(logging.INFO):
        run(weights, tmp_path, 4, ckpt_path=tmp_path / "at2.ckpt", data=data)
    assert re.search(f"Changed since the checkpoint: {said}", caplog.text)


def test_pictures_that_only_reading_would_tell_are_not_compared(weights, tmp_path, caplog):
    pictures = [(picture, label) for picture, label in tiny_pictures()]
    run(weights, tmp_path, 3, save_at=2, data={"target": pictures})
    with caplog.at_level(logging.INFO):
        run(weights, tmp_path, 4, ckpt_path=tmp_path / "at2.ckpt")
    assert "Changed since" not in caplog.text


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        (tiny_pictures(), None),
        (None, None),
        ([(picture, label) for picture, label in tiny_pictures()], None),  # only reading would tell
        (tiny_pictures(9), "12 before, 9 now"),
        (tiny_pictures(classes=2), "their files' names, sizes or times, or labels"),
    ],
)
def test_other_held_out_pictures_are_warned_of(recwarn, held_out, said):
    before, now = (
        MemoryBankDataModule(tiny_pictures(), 3, image_size=8, channels=1, val_target=source)
        for source in (tiny_pictures(), held_out)
    )
    now.trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), global_rank=0, world_size=1, lightning_module=None, datamodule=now
    )
    now.load_state_dict(before.state_dict())
    warned = [str(warning.message) for warning in recwarn if "held-out pictures changed" in str(warning.message)]
    assert len(warned) == (said is not None)
    assert all(f"changed since the checkpoint ({said}): val/loss" in text for text in warned)


def test_the_same_batch_size_says_nothing(weights, tmp_path, caplog):
    run(weights, tmp_path, 3, save_at=2)
    with caplog.at_level(logging.INFO):
        run(weights, tmp_path, 4, ckpt_path=tmp_path / "at2.ckpt")
    assert "Changed since" not in caplog.text


# -- how long ---------------------------------------------------------------------------------------------------------


def test_one_cycle_takes_length_and_peak_from_the_run(weights, tmp_path):
    _, seen, _ = run(weights, tmp_path, 10, scheduler=ONE_CYCLE)
    assert max(seen.rates()) == pytest.approx(1e-3)
    assert seen.seen[9]["lr"] == pytest.approx(1e-3 / 25 / 1e4)


def test_cosine_ends_at_0_with_the_run(weights, tmp_path):
    _, seen, _ = run(weights, tmp_path, 10, scheduler=CosineAnnealingLR)
    assert seen.rates() == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)])


def test_epochs_say_how_long_too(weights, tmp_path):
    trainer, seen, _ = run(weights, tmp_path, -1, scheduler=ONE_CYCLE, max_epochs=3)
    assert trainer.global_step == 9
    assert seen.seen[8]["lr"] == pytest.approx(1e-3 / 25 / 1e4)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (partial(OneCycleLR, max_lr=2e-3, total_steps=7), r"LR ends at step 7 \(total_steps\).*has 12 steps .*error"),
        (partial(OneCycleLR, max_lr=2e-3, total_steps=20), r"ends at step 20 .*not come down to its end"),
        (partial(CosineAnnealingLR, T_max=5), r"CosineAnnealingLR ends at step 5 \(T_max\).*rise again"),
        (partial(PolynomialLR, total_iters=5), r"PolynomialLR ends at step 5 .*be 0 from there"),
        (lambda o: CosineAnnealingLR(o, 5), "CosineAnnealingLR ends at step 5"),
        (lambda o: SequentialLR(o, [ConstantLR(o), CosineAnnealingLR(o, 8)], [2]), r"ends at step 10"),
        (lambda o: ChainedScheduler([StepLR(o, 2), OneCycleLR(o, 1e-3, 7)]), r"ends at step 7"),
    ],
)
def test_a_contradiction_is_refused_at_the_start(weights, tmp_path, scheduler, message):
    with pytest.raises(ConfigError, match=message):
        run(weights, tmp_path, 12, partial(torch.optim.AdamW, lr=2e-3), scheduler=scheduler)


def test_a_rate_that_the_scheduler_does_not_use_is_said(weights, tmp_path):
    with pytest.warns(UserWarning, match=r"up to max_lr = 0.005; the optimizer's lr of 0.002 is not used"):
        run(weights, tmp_path, 4, partial(torch.optim.AdamW, lr=2e-3), scheduler=partial(OneCycleLR, max_lr=5e-3))


def test_a_changed_rate_that_would_have_no_effect_is_refused(weights, tmp_path):
    scheduler = partial(OneCycleLR, max_lr=1e-3)
    run(weights, tmp_path, 8, save_at=5, scheduler=scheduler)
    message = r"lr was 0.001 and is 1e-06, which has no effect: OneCycleLR has a rate of its own, max_lr = 0.001"
    with pytest.raises(ConfigError, match=message):
        run(weights, tmp_path, 8, partial(torch.optim.AdamW, lr=1e-6), scheduler, tmp_path / "at5.ckpt")


def test_minus_one_is_left_out(weights, tmp_path):
    _, seen, _ = run(weights, tmp_path, 4, scheduler=partial(OneCycleLR, max_lr=-1.0, total_steps=-1))
    assert seen.seen[3]["lr"] == pytest.approx(1e-3 / 25 / 1e4)


# -- the last step ----------------------------------------------------------------------------------------------------


class Validations(L.Callback):
    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"val_check_interval": 100}, [5]),
        ({"val_check_interval": 2}, [2, 4, 5]),
        ({"val_check_interval": 5}, [5]),
        ({"val_check_interval": 1.0, "check_val_every_n_epoch": 1}, [3, 5]),
        ({"val_check_interval": 1.0, "check_val_every_n_epoch": 7}, [5]),
        ({"val_check_interval": 100, "limit_val_batches": 0}, []),
        ({"val_check_interval": 100, "accumulate_grad_batches": 2}, [5]),
        ({"val_check_interval": 1.0, "check_val_every_n_epoch": 2, "max_epochs": 1}, [3]),
    ],
)
def test_the_last_step_is_validated_once(weights, tmp_path, settings, expected):
    validations = Validations()
    trainer, _, _ = run(weights, tmp_path, 5, callbacks=[validations], **settings)
    assert validations.steps == expected
    assert trainer.check_val_every_n_epoch == settings.get("check_val_every_n_epoch")
    assert not trainer.should_stop


def test_a_run_that_is_made_longer_goes_on_after_its_last_validation(weights, tmp_path):
    saving = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1, save_on_train_epoch_end=False)
    run(weights, tmp_path, 5, callbacks=[saving])
    saved = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    validations = Validations()
    _, seen, _ = run(weights, tmp_path, 8, callbacks=[validations], ckpt_path=saved)
    assert list(seen.seen) == [5, 6, 7]
    assert validations.steps == [8]


# -- windows of accumulated batches -----------------------------------------------------------------------------------


class Windows(L.Callback):
    def __init__(self):
        self.sizes, self.count = [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.sizes.append(self.count)
        self.count = 0


@pytest.mark.parametrize("batch_size", [2, 5, 12, 40])  # epochs of 6, 2, 1 and 1 batches
def test_windows_are_whole(weights, tmp_path, batch_size):
    windows = Windows()
    run(weights, tmp_path, 5, callbacks=[windows], data={"batch_size": batch_size}, accumulate_grad_batches=4)
    assert windows.sizes == [4] * 5


@pytest.mark.parametrize(("limit", "shown"), [(6, "6"), (0.8, "0.8, 6 batches")])
def test_a_limit_that_cuts_a_window_is_refused(weights, tmp_path, limit, shown):
    with pytest.raises(ConfigError, match=rf"limit_train_batches is {shown}, which cuts a window of 4 .*multiple of 4"):
        run(weights, tmp_path, 5, data={"batch_size": 2}, accumulate_grad_batches=4, limit_train_batches=limit)
    run(weights, tmp_path, 2, data={"batch_size": 2}, accumulate_grad_batches=4, limit_train_batches=0.5)
    with pytest.raises(ConfigError, match="overfit_batches is 2, which cuts a window of 4"):
        run(weights, tmp_path, 5, data={"batch_size": 2}, accumulate_grad_batches=4, overfit_batches=2)


def test_a_try_of_one_batch_cuts_a_window(weights, tmp_path):
    windows = Windows()
    run(weights, tmp_path, 5, callbacks=[windows], accumulate_grad_batches=4, fast_dev_run=True)
    assert windows.sizes == [1]


class Save(L.Callback):
    """Writes a checkpoint after some batches."""

    def __init__(self, path, batches):
        self.path, self.batches = path, batches

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("batches", range(1, 9))
def test_a_checkpoint_in_an_open_window_resumes_to_the_bit(weights, tmp_path, batches):
    options = {"data": {"batch_size": 5}, "accumulate_grad_batches": 3, "scheduler": ONE_CYCLE}
    trainer, _, module = run(weights, tmp_path, 4, callbacks=[Save(tmp_path / "open.ckpt", batches)], **options)
    again, _, same = run(weights, tmp_path, 4, ckpt_path=tmp_path / "open.ckpt", **options)
    assert_equal(state_of(trainer, module), state_of(again, same))
    if batches % 3:
        with pytest.raises(ConfigError, match="in the middle of a window of 3 accumulated batches"):
            run(weights, tmp_path, 4, ckpt_path=tmp_path / "open.ckpt", **options | {"accumulate_grad_batches": 2})


@pytest.mark.parametrize("batches", [2, 3, 6, 7, 8, 11, 12, 13])  # six in an epoch
def test_windows_that_change_with_the_epoch_resume_to_the_bit(weights, tmp_path, batches):
    def once(*callbacks, **settings):
        windows = Windows()
        changing = GradientAccumulationScheduler({0: 3, 1: 2})
        given = {"data": {"batch_size": 5}, "scheduler": ONE_CYCLE, **settings}
        trainer, _, module = run(weights, tmp_path, 6, callbacks=[changing, windows, *callbacks], **given)
        return state_of(trainer, module), windows.sizes

    state, sizes = once(Save(tmp_path / "some.ckpt", batches))
    assert sizes == [3, 3, 2, 2, 2, 2]
    assert_equal(once(ckpt_path=tmp_path / "some.ckpt")[0], state)


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("trainer.overfit_batches", {"overfit_batches": 2}),
        ("StochasticWeightAveraging", {"callbacks": [StochasticWeightAveraging(1e-3)], "max_epochs": 9}),
    ],
)
def test_what_lightning_does_not_restore_is_refused(weights, tmp_path, named, settings):
    run(weights, tmp_path, 3, save_at=1)
    with pytest.raises(ConfigError, match=f"A run with {named} cannot be resumed"):
        run(weights, tmp_path, 3, ckpt_path=tmp_path / "at1.ckpt", **settings)


def test_other_windows_after_a_resume_are_whole(weights, tmp_path):
    run(weights, tmp_path, 4, save_at=3, data={"batch_size": 2}, accumulate_grad_batches=1)
    windows = Windows()
    run(
        weights,
        tmp_path,
        8,
        callbacks=[windows],
        ckpt_path=tmp_path / "at3.ckpt",
        data={"batch_size": 4},
        accumulate_grad_batches=2,
    )
    assert windows.sizes == [2] * 5


def test_a_resumed_run_does_not_save_again_in_the_middle_of_a_window(weights, tmp_path):
    run(weights, tmp_path, 2, save_at=2, accumulate_grad_batches=3)

    class Saves(L.Callback):
        seen = []

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            self.seen.append(trainer.fit_loop.total_batch_idx + 1)

    saving = ModelCheckpoint(tmp_path / "more", every_n_train_steps=2, save_top_k=-1)
    run(weights, tmp_path, 6, callbacks=[Saves(), saving], ckpt_path=tmp_path / "at2.ckpt", accumulate_grad_batches=3)
    assert Saves.seen == [12, 18]


@pytest.mark.parametrize("batches", [4, 5, 6])
def test_a_signal_in_an_open_window_stops_at_its_end(weights, tmp_path, batches):
    class Signal(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.fit_loop.total_batch_idx + 1 == batches:
                os.kill(os.getpid(), signal.SIGTERM)

    options = {"data": {"batch_size": 5}, "accumulate_grad_batches": 3, "scheduler": ONE_CYCLE}
    trainer, _, module = run(weights, tmp_path, 4, **options)
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=100)
    with pytest.raises(SIGTERMException):
        run(weights, tmp_path, 4, callbacks=[Signal(), Preemption(), saving], **options)
    content = torch.load(tmp_path / "saved/last.ckpt", weights_only=True)
    assert content["global_step"] == 2
    assert "open_window" not in content
    again, _, same = run(weights, tmp_path, 4, ckpt_path=tmp_path / "saved/last.ckpt", **options)
    assert_equal(state_of(trainer, module), state_of(again, same))


def fit_of_three_steps(weights, folder, **settings):
    """A run of three steps, two in an epoch, and its checkpoint callback."""
    checkpoint = ModelCheckpoint(dirpath=folder / "saved", filename="{step}", **settings)
    module = DiTDiffTuningModule(str(weights), num_classes=3, sampler=Sampler(num_inference_steps=2))
    data = MemoryBankDataModule(tiny_pictures(8), 3, 8, 1, val_target=tiny_pictures(4), batch_size=4)
    quiet_trainer(folder, 3, checkpoint).fit(module, data)
    return checkpoint, module


PERIODS = [
    {"every_n_train_steps": 50},
    {"every_n_train_steps": 2},
    {"every_n_train_steps": 3},
    {"every_n_train_steps": 2, "monitor": "val/loss"},
    {"every_n_epochs": 5},
    {"train_time_interval": timedelta(hours=1)},
    {},
]


@pytest.mark.parametrize("last", [True, "link"])
@pytest.mark.parametrize("period", PERIODS, ids=str)
def test_last_ckpt_is_of_the_last_step_however_often_checkpoints_are_due(weights, tmp_path, period, last):
    checkpoint, module = fit_of_three_steps(weights, tmp_path, save_last=last, **period)
    content = torch.load(tmp_path / "saved/last.ckpt", weights_only=True)
    assert content["global_step"] == 3
    assert checkpoint.last_model_path == str(tmp_path / "saved/last.ckpt")
    assert content["state_dict"]
    for name, weight in content["state_dict"].items():
        assert torch.equal(weight, module.state_dict()[name])
    assert [path.name for path in (tmp_path / "saved").glob("last*")] == ["last.ckpt"]


def test_steps_that_no_checkpoint_holds_are_said(weights, tmp_path):
    with pytest.warns(UserWarning, match="saved step 2 and the run ends at step 3.*save_last: true"):
        fit_of_three_steps(weights, tmp_path, every_n_train_steps=2)


def test_a_fast_dev_run_which_saves_nothing_is_not_warned_of_it(weights, tmp_path, recwarn):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=50)
    module = DiTDiffTuningModule(str(weights), num_classes=3, sampler=Sampler(num_inference_steps=2))
    data = MemoryBankDataModule(tiny_pictures(8), 3, 8, 1, val_target=tiny_pictures(4), batch_size=4)
    quiet_trainer(tmp_path, -1, checkpoint, fast_dev_run=True).fit(module, data)
    assert not [warning for warning in recwarn if "in no checkpoint" in str(warning.message)]


# -- runs that a callback ends ------------------------------------------------------------------------------------


class Stop(L.Callback):
    """Ends a run in a hook, once."""

    def __init__(self, hook="on_train_batch_end", batches=3):
        self.batches, self.seen = batches, 0
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        self.seen += not trainer.sanity_checking
        if self.seen == self.batches:
            trainer.should_stop = True


class StopInModule(DiTDiffTuningModule):
    """A module that ends its run itself, after all callbacks."""

    batches = 3

    def on_train_batch_end(self, *_):
        self.trainer.should_stop = self.trainer.fit_loop.total_batch_idx + 1 == self.batches


def stopped(weights, folder, *callbacks, kind=DiTDiffTuningModule, ckpt_path=None, steps=-1, **settings):
    """A run of four epochs of four steps; its trainer, stream of pictures and module."""
    checkpoint = ModelCheckpoint(folder / "saved", "{step}", save_last=True, **settings.pop("period", {}))
    module = kind(str(weights), num_classes=3, sampler=Sampler(num_inference_steps=2))
    data = MemoryBankDataModule(tiny_pictures(16), 3, 8, 1, val_target=tiny_pictures(4), batch_size=4)
    seen = Batches()
    settings = {"max_epochs": 4, **settings}
    trainer = quiet_trainer(folder, steps, seen, *callbacks, checkpoint, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, seen.sums, module


class Batches(L.Callback):
    def __init__(self):
        self.sums = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sums.append(batch["target"]["pixel_values"].sum().item())


NO_GAIN = {"patience": 1, "min_delta": 99.0}
ENDS = {
    "a callback": ([Stop()], 3, {}),
    "a callback in an open window": ([Stop(batches=5)], 2, {"accumulate_grad_batches": 2}),
    "max_time": ([], 1, {"max_time": {"seconds": 0.001}}),
    "early stopping": ([EarlyStopping("val/loss", **NO_GAIN)], 4, {"val_check_interval": 2}),
    "early stopping by epochs": ([EarlyStopping("train/loss", check_on_train_epoch_end=True, **NO_GAIN)], 8, {}),
    "the end of a validation": ([Stop("on_validation_end", 2)], 7, {"val_check_interval": 3}),
    "the end of an epoch": ([Stop("on_train_epoch_end", 2)], 8, {}),
    "the module": ([], 3, {"kind": StopInModule}),
    "the module without validation": ([], 3, {"kind": StopInModule, "limit_val_batches": 0}),
}
SELDOM, BY_EPOCHS = {"every_n_train_steps": 50}, {}


@pytest.mark.parametrize(
    ("end", "period"),
    [(end, SELDOM) for end in ENDS] + [(end, BY_EPOCHS) for end in ("a callback", "a callback in an open window")],
)
def test_a_run_that_is_ended_early_resumes_from_its_last_step(weights, tmp_path, end, period):
    callbacks, step, settings = copy.deepcopy(ENDS[end])
    first, begun, _ = stopped(weights, tmp_path, *callbacks, period=period, **settings)
    last = tmp_path / "saved/last.ckpt"
    assert first.global_step == torch.load(last, weights_only=True)["global_step"] == step
    kept = {name: value for name, value in settings.items() if name not in ("max_time", "kind")}
    again, continued, module = stopped(weights, tmp_path / "again", ckpt_path=last, **kept)
    whole, expected, same = stopped(weights, tmp_path / "whole", **kept)
    assert len(begun) < len(expected)
    assert expected[-len(continued) :] == continued  # the pictures that were left
    assert again.current_epoch == whole.current_epoch == 4
    assert_equal(state_of(again, module), state_of(whole, same))


def test_a_run_that_is_ended_early_validates_and_saves_once(weights, tmp_path):
    validations = Validations()
    trainer, _, _ = stopped(weights, tmp_path, Stop(), validations, check_val_every_n_epoch=3)
    assert validations.steps == [3]
    assert trainer.should_stop
    assert trainer.check_val_every_n_epoch == 3


def test_a_stop_before_min_steps_saves_nothing(weights, tmp_path):
    trainer, _, _ = stopped(weights, tmp_path, Stop(), period={"every_n_train_steps": 50}, min_steps=16)
    assert trainer.global_step == 16
