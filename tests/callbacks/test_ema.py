from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import quiet_trainer
from torch import nn

from lightning_difftune.callbacks import EMA
from lightning_difftune.errors import CheckpointError, ConfigError


class PartlyFrozenModel(BoringModel):
    """A model with a frozen part, whose weights are recorded after every optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(32, 2)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.trajectory: list[np.ndarray] = []
        self.seen: dict[str, list[np.ndarray]] = {"validation": [], "test": [], "predict": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.frozen(x))

    def weights(self) -> np.ndarray:
        return self.layer.weight.detach().float().numpy().copy()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.trajectory.append(self.weights())

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        assert not self.layer.weight.is_inference()  # as without EMA, for those who need gradients to sample
        self.seen["validation"].append(self.weights())
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        self.seen["test"].append(self.weights())
        return super().test_step(batch, batch_idx)

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen["predict"].append(self.weights())
        return self(batch)


def make_trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    steps = options.pop("max_steps", 6)
    limits: dict[str, Any] = {f"limit_{stage}_batches": 1 for stage in ("val", "test", "predict")}
    return quiet_trainer(tmp_path, steps, *callbacks, **{**limits, **options})


def averaged(
    start: np.ndarray, trajectory: list[np.ndarray], decay: float, warmup: bool = False, every: int = 1
) -> np.ndarray:
    """The recurrence in plain numpy, float64."""
    average = start.astype(np.float64)
    for n in range(0, len(trajectory) - every + 1, every):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = d**every * average + (1 - d**every) * trajectory[n + every - 1]
    return average


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("every", [2, 4])
def test_every_k_steps_the_decay_is_raised_to_k(tmp_path: Path, warmup: bool, every: int) -> None:
    model, ema = PartlyFrozenModel(), EMA(decay=0.7, warmup=warmup, every_n_steps=every)
    start = model.weights()
    make_trainer(tmp_path, ema, limit_val_batches=0, accumulate_grad_batches=2).fit(model)
    assert ema.num_updates == 6 // every
    average = ema.state_dict()["averages"]["layer.weight"].numpy()
    expected = averaged(start, model.trajectory, 0.7, warmup, every)
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({}, {}, "will be 100% the weights that it began with"),
        ({"decay": 0.9}, {}, "will be 53% the weights"),
        ({"decay": 0.5, "every_n_steps": 10}, {}, "will be 100% the weights that it began with"),
        (
            {"decay": 0.9},
            {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 5},
            "When this run ends, at step 5,",
        ),
        ({"decay": 0.8}, {}, None),
        ({"warmup": True}, {}, None),
        ({}, {"fast_dev_run": 2}, None),
    ],
)
def test_averages_that_hardly_move_in_a_run_are_said(
    tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], said: str | None
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, EMA(**settings), **options).fit(PartlyFrozenModel())
    about = [str(warning.message) for warning in caught if "averages of EMA" in str(warning.message)]
    assert [said is not None and said in message for message in about] == ([True] if said else [])


def test_steps_between_two_averages_are_at_least_one() -> None:
    with pytest.raises(ConfigError, match="every_n_steps of EMA must be at least 1, found 0"):
        EMA(every_n_steps=0)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_the_recurrence_in_numpy(tmp_path: Path, warmup: bool, accumulate: int) -> None:
    model, ema = PartlyFrozenModel(), EMA(decay=0.7, warmup=warmup)
    start = model.weights()
    make_trainer(tmp_path, ema, accumulate_grad_batches=accumulate, limit_val_batches=0).fit(model)
    assert len(model.trajectory) == 6  # optimizer steps, whatever the number of batches
    assert ema.num_updates == 6
    average = ema.state_dict()["averages"]["layer.weight"].numpy()
    np.testing.assert_allclose(average, averaged(start, model.trajectory, 0.7, warmup), rtol=1e-5, atol=1e-7)
    assert not np.allclose(average, model.weights(), atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)]
)
def test_holds_the_trained_parameters_alone_in_float32(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    model, ema = PartlyFrozenModel(), EMA(decay=0.9)
    start = model.weights()
    trainer = make_trainer(tmp_path, ema, precision=precision)
    trainer.fit(model)
    averages = ema.state_dict()["averages"]
    assert set(averages) == {"layer.weight", "layer.bias"}
    assert {average.dtype for average in averages.values()} == {torch.float32}
    expected = averaged(torch.from_numpy(start).to(dtype).float().numpy(), model.trajectory, 0.9)
    np.testing.assert_allclose(averages["layer.weight"].numpy(), expected, rtol=1e-5, atol=1e-7)
    with ema.average_parameters(model):
        assert model.layer.weight.dtype == dtype
        torch.testing.assert_close(model.layer.weight.data, averages["layer.weight"].to(dtype), rtol=0, atol=0)
    trainer.validate(model, verbose=False)
    np.testing.assert_array_equal(model.weights(), model.trajectory[-1])


def test_validation_test_and_predict_see_the_averages_and_training_does_not(tmp_path: Path) -> None:
    model, ema = PartlyFrozenModel(), EMA(decay=0.7)
    start, frozen = model.weights(), model.frozen.weight.clone()
    trainer = make_trainer(tmp_path, ema, val_check_interval=3)
    L.seed_everything(3, verbose=False)
    trainer.fit(model)
    raw = model.weights()
    np.testing.assert_array_equal(raw, model.trajectory[-1])
    for steps, seen in zip((3, 6), model.seen["validation"], strict=True):
        np.testing.assert_allclose(seen, averaged(start, model.trajectory[:steps], 0.7), rtol=1e-5, atol=1e-7)

    plain = PartlyFrozenModel()
    L.seed_everything(3, verbose=False)
    make_trainer(tmp_path, val_check_interval=3).fit(plain)
    np.testing.assert_array_equal(plain.trajectory, model.trajectory)

    trainer.validate(model, verbose=False)
    trainer.test(model, verbose=False)
    trainer.predict(model, model.test_dataloader())
    average = ema.state_dict()["averages"]["layer.weight"].numpy()
    for stage in ("validation", "test", "predict"):
        np.testing.assert_array_equal(model.seen[stage][-1], average)
    np.testing.assert_array_equal(model.weights(), raw)
    torch.testing.assert_close(model.frozen.weight, frozen, rtol=0, atol=0)

    trainer.fit_loop.epoch_loop.max_steps = 8  # training continues after inference mode from the same state
    trainer.fit(model)
    assert ema.num_updates == 8
    np.testing.assert_allclose(
        ema.state_dict()["averages"]["layer.weight"].numpy(),
        averaged(start, model.trajectory, 0.7),
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (2, 1), (2, 2)])
def test_resuming_is_exact_to_the_bit(tmp_path: Path, accumulate: int, every: int) -> None:
    class SameBatch(PartlyFrozenModel):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            x = torch.sin(torch.arange(64.0).view(2, 32) * (self.trainer.global_step + 1))
            return self(x).square().mean()

    def fit(steps: int, ckpt_path: Path | None) -> tuple[SameBatch, EMA]:
        model, ema = SameBatch(), EMA(decay=0.8, warmup=True, every_n_steps=every)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(tmp_path, saver, ema, max_steps=steps, accumulate_grad_batches=accumulate)
        trainer.fit(model, ckpt_path=ckpt_path)
        return model, ema

    model, ema = fit(6, None)
    resumed_model, resumed = fit(6, tmp_path / "step=3.ckpt")
    assert len(resumed_model.trajectory) == 3
    assert resumed.num_updates == ema.num_updates == 6 // every
    for name, average in ema.state_dict()["averages"].items():
        assert torch.equal(average, resumed.state_dict()["averages"][name])
    np.testing.assert_array_equal(model.weights(), resumed_model.weights())


class SaveDuringValidation(Callback):
    """Saves while the averages replace the weights, and at the end of validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "inside.ckpt")


def test_checkpoints_hold_the_raw_weights_and_the_averages(tmp_path: Path) -> None:
    model, ema = PartlyFrozenModel(), EMA(decay=0.7)
    saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=False)
    make_trainer(tmp_path, SaveDuringValidation(tmp_path), ema, saver, val_check_interval=6, max_steps=6).fit(model)
    average = ema.state_dict()["averages"]["layer.weight"].numpy()
    for name in ("inside.ckpt", "end.ckpt"):
        checkpoint = torch.load(tmp_path / name, weights_only=True)
        np.testing.assert_array_equal(checkpoint["state_dict"]["layer.weight"].numpy(), model.trajectory[-1])
        np.testing.assert_array_equal(checkpoint["callbacks"]["EMA"]["averages"]["layer.weight"].numpy(), average)
        assert set(checkpoint["callbacks"]["EMA"]["averages"]) == {"layer.weight", "layer.bias"}
    np.testing.assert_array_equal(model.seen["validation"][-1], average)  # and the averages stood in again


def trained_checkpoint(tmp_path: Path, *callbacks: Callback, name: str = "trained.ckpt") -> Path:
    trainer = make_trainer(tmp_path, *callbacks)
    trainer.fit(PartlyFrozenModel())
    trainer.save_checkpoint(tmp_path / name)
    return tmp_path / name


def test_a_checkpoint_is_evaluated_with_its_averages(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path, EMA(decay=0.7))
    checkpoint = torch.load(path, weights_only=True)
    average = checkpoint["callbacks"]["EMA"]["averages"]["layer.weight"].numpy()
    raw = checkpoint["state_dict"]["layer.weight"].numpy()
    model = PartlyFrozenModel()
    trainer = make_trainer(tmp_path, EMA(decay=0.7))
    trainer.validate(model, ckpt_path=path, verbose=False)
    trainer.test(model, ckpt_path=path, verbose=False)
    trainer.predict(model, model.test_dataloader(), ckpt_path=path)
    for stage in ("validation", "test", "predict"):
        np.testing.assert_array_equal(model.seen[stage][-1], average)
    np.testing.assert_array_equal(model.weights(), raw)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_without_averages_is_not_evaluated_with_those_of_an_earlier_fit(
    tmp_path: Path, weights_only: bool
) -> None:
    other = make_trainer(tmp_path)
    other.fit(PartlyFrozenModel())
    path = tmp_path / "other.ckpt"
    other.save_checkpoint(path, weights_only=weights_only)
    trainer = make_trainer(tmp_path, EMA(decay=0.7))
    model = PartlyFrozenModel()
    trainer.fit(model)
    trainer.validate(model, ckpt_path=path, verbose=False)
    saved = torch.load(path, weights_only=True)["state_dict"]["layer.weight"].numpy()
    np.testing.assert_array_equal(model.seen["validation"][-1], saved)


def test_averages_of_one_checkpoint_are_not_used_with_the_next(tmp_path: Path) -> None:
    with_averages, without = (
        trained_checkpoint(tmp_path, EMA(decay=0.7)),
        trained_checkpoint(tmp_path, name="plain.ckpt"),
    )
    model, trainer = PartlyFrozenModel(), make_trainer(tmp_path, EMA(decay=0.7))
    trainer.validate(model, ckpt_path=with_averages, verbose=False)
    trainer.validate(model, ckpt_path=without, verbose=False)
    np.testing.assert_array_equal(model.seen["validation"][-1], model.weights())


def test_another_model_is_not_evaluated_with_these_averages(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EMA(decay=0.7))
    trainer.fit(PartlyFrozenModel())
    other = PartlyFrozenModel()
    trainer.validate(other, verbose=False)
    np.testing.assert_array_equal(other.seen["validation"][-1], other.weights())


def test_resuming_from_a_checkpoint_without_averages_starts_from_its_weights(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path)
    saved = torch.load(path, weights_only=True)["state_dict"]["layer.weight"].numpy()
    model, ema = PartlyFrozenModel(), EMA(decay=0.7)
    make_trainer(tmp_path, ema).fit(model)  # so that there are averages to be forgotten
    model.trajectory.clear()
    with pytest.warns(UserWarning, match="holds no averages"):
        make_trainer(tmp_path, ema, max_steps=8).fit(model, ckpt_path=path)
    assert ema.num_updates == len(model.trajectory) == 2
    average = ema.state_dict()["averages"]["layer.weight"].numpy()
    np.testing.assert_allclose(average, averaged(saved, model.trajectory, 0.7), rtol=1e-5, atol=1e-7)


def test_a_reused_callback_starts_anew_with_another_model(tmp_path: Path) -> None:
    ema = EMA(decay=0.7)
    make_trainer(tmp_path, ema).fit(PartlyFrozenModel())
    model = PartlyFrozenModel()
    start = model.weights()
    make_trainer(tmp_path, ema).fit(model)
    assert ema.num_updates == 6
    average = ema.state_dict()["averages"]["layer.weight"].numpy()
    np.testing.assert_allclose(average, averaged(start, model.trajectory, 0.7), rtol=1e-5, atol=1e-7)


class WiderModel(PartlyFrozenModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 3)
        self.extra = nn.Linear(2, 2)


def test_averages_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path, EMA(decay=0.7))
    state = torch.load(path, weights_only=True)["callbacks"]["EMA"]
    state["averages"]["layer.gone"] = torch.zeros(1)
    ema = EMA(decay=0.7)
    ema.load_state_dict(state)
    with pytest.raises(CheckpointError) as raised:
        make_trainer(tmp_path, ema).fit(WiderModel())
    message = str(raised.value)
    assert "2 missing (extra.weight, extra.bias)" in message
    assert "1 unexpected (layer.gone)" in message
    assert "2 of another shape (layer.weight " in message


def test_the_checkpoint_whose_averages_do_not_fit_is_named(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path, EMA(decay=0.7))
    thawed = PartlyFrozenModel()
    thawed.frozen.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"trained\.ckpt.*frozen\.weight, frozen\.bias"):
        make_trainer(tmp_path, EMA(decay=0.7)).fit(thawed, ckpt_path=path)


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'averages' and 'num_updates'"):
        EMA().load_state_dict({"latest_update_step": 3})


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_an_exception_puts_the_weights_back(tmp_path: Path, stage: str) -> None:
    class Failing(PartlyFrozenModel):
        fail = True

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            super().validation_step(batch, batch_idx)
            if self.fail:
                raise RuntimeError("out of luck")

    model, ema = Failing(), EMA(decay=0.7)
    model.fail = stage == "fit"
    trainer = make_trainer(tmp_path, ema, val_check_interval=3)
    if stage == "validate":
        trainer.fit(model)
        model.fail = True
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(model) if stage == "fit" else trainer.validate(model)
    np.testing.assert_array_equal(model.weights(), model.trajectory[-1])
    assert not np.array_equal(model.seen["validation"][-1], model.trajectory[-1])


def test_the_context_manager_swaps_in_and_out_even_on_errors(tmp_path: Path) -> None:
    model, ema = PartlyFrozenModel(), EMA(decay=0.7)
    make_trainer(tmp_path, ema).fit(model)
    raw, average = model.weights(), ema.state_dict()["averages"]["layer.weight"].numpy()
    with ema.average_parameters(model):
        np.testing.assert_array_equal(model.weights(), average)
        with ema.average_parameters(model):
            pass
        np.testing.assert_array_equal(model.weights(), average)  # the inner one left the outer one in place
    np.testing.assert_array_equal(model.weights(), raw)
    with pytest.raises(RuntimeError, match="no more luck"), ema.average_parameters(model):
        raise RuntimeError("no more luck")
    np.testing.assert_array_equal(model.weights(), raw)


def test_averages_from_a_checkpoint_in_a_notebook(tmp_path: Path) -> None:
    path = trained_checkpoint(tmp_path, EMA(decay=0.7))
    checkpoint = torch.load(path, weights_only=True)
    model, ema = PartlyFrozenModel.load_from_checkpoint(path), EMA()
    ema.load_state_dict(checkpoint["callbacks"]["EMA"])
    with ema.average_parameters(model):
        torch.testing.assert_close(
            model.layer.weight.data, checkpoint["callbacks"]["EMA"]["averages"]["layer.weight"], rtol=0, atol=0
        )
    torch.testing.assert_close(model.layer.weight.data, checkpoint["state_dict"]["layer.weight"], rtol=0, atol=0)
    with (
        pytest.raises(ConfigError, match="no averages of this PartlyFrozenModel"),
        ema.average_parameters(PartlyFrozenModel()),
    ):
        pass


def test_tied_weights_are_averaged_once(tmp_path: Path) -> None:
    class Tied(PartlyFrozenModel):
        def __init__(self) -> None:
            super().__init__()
            self.same = self.layer

    model, ema = Tied(), EMA(decay=0.7)
    make_trainer(tmp_path, ema, SaveDuringValidation(tmp_path), val_check_interval=6).fit(model)
    assert set(ema.state_dict()["averages"]) == {"layer.weight", "layer.bias"}
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
    np.testing.assert_array_equal(saved["same.weight"].numpy(), model.trajectory[-1])


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=str(decay)):
        EMA(decay=decay)


def test_sharded_strategies_and_models_without_trained_parameters_are_refused(tmp_path: Path) -> None:
    model = BoringModel()
    with pytest.raises(ConfigError, match="FSDPStrategy"):
        EMA().setup(type("Sharded", (), {"strategy": L.pytorch.strategies.FSDPStrategy()})(), model, "fit")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to average"):
        make_trainer(tmp_path, EMA()).fit(model)
