from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import torch
from controlled import SIZE, ControlData, ControlledModel, Examples, Report, scenes
from generating import make_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_difftune.callbacks import EMA, ControlSimilarity, SuddenConvergence
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.metrics import BlurredSSIM, ControlMSE
from lightning_difftune.pictures import pictures_of


def expected(shift: float, count: int) -> float:
    """MSE of the maps in plain numpy."""
    controls = scenes(range(count)).numpy()[:, 0].astype(np.float32)
    noise = scenes([1000 + index for index in range(count)]).numpy()[:, 0].astype(np.float32)
    drawn = (controls * 0.5 + noise * np.float32(0.3) + np.float32(shift)).clip(0, 255).astype(np.uint8)
    return float(np.mean((drawn / 255 - controls / 255) ** 2))


def make(**options: Any) -> ControlSimilarity:
    return ControlSimilarity(**{"metric": ControlMSE(), "num_samples": 6, "batch_size": 4} | options)


def test_logs_the_similarity_at_every_validation(tmp_path: Path) -> None:
    model, data, callback = ControlledModel(), ControlData(), make()
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(model, data)
    assert [step for step, _ in callback.history] == [2, 4, 6]
    for (_, value), shift in zip(callback.history, model.shifts[::2], strict=True):
        assert value == pytest.approx(expected(shift, 6), rel=1e-3)
    assert len({value for _, value in callback.history}) == 3
    assert callback.monitor == "control/mse"
    assert trainer.callback_metrics["control/mse"].item() == pytest.approx(callback.last_value, rel=1e-6)


def test_the_same_examples_every_time_and_controls_annotated_once(tmp_path: Path) -> None:
    model, data = ControlledModel(), ControlData()
    make_trainer(tmp_path, make()).fit(model, data)
    both = [([0, 1, 2, 3], [f"scene {i}" for i in range(4)]), ([4, 5], ["scene 4", "scene 5"])]
    assert model.asked == both * 3
    assert data.examples.asked == [[0, 1, 2, 3], [4, 5]]
    assert model.annotations == 6 + 3 * 6


def test_batch_size_does_not_matter(tmp_path: Path) -> None:
    values = []
    for batch_size in (1, 4, 6):
        callback = make(batch_size=batch_size)
        make_trainer(tmp_path, callback).validate(ControlledModel(), ControlData(), verbose=False)
        values.append(callback.last_value)
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-12)


def test_the_picture_has_a_column_an_example(tmp_path: Path) -> None:
    model = ControlledModel()
    make_trainer(tmp_path, make(num_shown=5), max_steps=2).fit(model, ControlData())
    (path,) = (tmp_path / "control").iterdir()
    assert path.name == "step-0000002.png"
    factor = 96 // SIZE  # small pictures are shown with larger pixels
    shown = pictures_of(path, 3, 5)[..., ::factor, ::factor]
    assert shown.shape == (3, 5, 3, SIZE, SIZE)
    controls = scenes(range(5))[:, :1]
    with torch.no_grad():
        drawn = model.eval().generate_controlled(torch.arange(5), controls, [])  # the weights are the last ones
    assert torch.equal(shown[0], controls.expand(-1, 3, -1, -1))
    assert torch.equal(shown[1], drawn)
    assert torch.equal(shown[2, :, 1], drawn[:, 0])


def test_cost_is_told_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback, logger = make(), CSVLogger(tmp_path, name="run")
    with caplog.at_level("INFO"):
        trainer = make_trainer(tmp_path, callback, logger=logger)
        trainer.fit(ControlledModel(), ControlData())
    assert caplog.text.count("'control/mse' costs 6 generated pictures x 20 denoising steps") == 1
    assert 0 < trainer.callback_metrics["control/seconds"].item() < 60
    assert 0 < trainer.callback_metrics["control/time_share"].item() < 1
    assert (tmp_path / "run" / "version_0" / "control" / "step-0000002.png").exists()
    trainer = make_trainer(tmp_path, callback)
    trainer.validate(ControlledModel(), ControlData(), verbose=False)
    assert "control/seconds" in trainer.callback_metrics
    assert "control/time_share" not in trainer.callback_metrics


@pytest.mark.parametrize(("seconds", "warned"), [(60.0, True), (0.0, False)])
def test_warns_when_evaluations_dominate(
    tmp_path: Path, seconds: float, warned: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    clock = [0.0]
    monkeypatch.setattr("lightning_difftune.callbacks.control_similarity.perf_counter", lambda: clock[0])

    class Slow(ControlledModel):
        def generate_controlled(self, *args: Any) -> Tensor:
            clock[0] += seconds
            return super().generate_controlled(*args)

        def on_train_batch_end(self, *args: Any) -> None:
            clock[0] += 20

    trainer = make_trainer(tmp_path, make())
    trainer.fit(Slow(), ControlData())
    assert trainer.callback_metrics["control/seconds"].item() == 2 * seconds
    assert trainer.callback_metrics["control/time_share"].item() == pytest.approx(6 * seconds / (6 * seconds + 120))
    warnings = [str(entry.message) for entry in recwarn if "has taken" in str(entry.message)]
    assert len(warnings) == warned
    if warned:
        assert "75% of the time since training began, 120.0 s" in warnings[0]  # 120 of the first 160


def test_sudden_convergence_watches_it(tmp_path: Path) -> None:
    callback, watcher = make(metric=BlurredSSIM(sigma=1)), SuddenConvergence("control/ssim", threshold=-1)
    make_trainer(tmp_path, watcher, callback).fit(ControlledModel(), ControlData())
    assert [value for _, value in watcher.history] == pytest.approx([value for _, value in callback.history], rel=1e-6)
    assert watcher.convergence_step == 2


def test_controls_of_its_own_in_any_project(tmp_path: Path) -> None:
    callback = make(controls=Examples())
    make_trainer(tmp_path, callback).validate(ControlledModel(), verbose=False)
    assert callback.last_value == pytest.approx(expected(ControlledModel().shift(), 6), rel=1e-3)


@pytest.mark.parametrize("ema_first", [True, False])
def test_looks_at_the_averages_wherever_it_stands(tmp_path: Path, ema_first: bool) -> None:
    model, ema, callback = ControlledModel(), EMA(decay=0.7), make()
    callbacks: list[Callback] = [ema, callback] if ema_first else [callback, ema]
    make_trainer(tmp_path, *callbacks).fit(model, ControlData())
    with ema.average_parameters(model):
        assert model.shifts[-1] == model.shift()
    assert model.shifts[-1] != model.shift()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_history_survives_resuming(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole = make()
    make_trainer(tmp_path, whole, saver).fit(ControlledModel(), ControlData())
    path = tmp_path / "step=4.ckpt"
    assert set(torch.load(path, weights_only=True)["state_dict"]) == {"layer.weight", "layer.bias"}
    resumed = make()
    make_trainer(tmp_path, resumed).fit(ControlledModel(), ControlData(), ckpt_path=path)
    assert resumed.history[0] == whole.history[0]
    assert resumed.history[-1][0] == 6


def test_every_n_steps(tmp_path: Path) -> None:
    callback = make(every_n_steps=4)
    make_trainer(tmp_path, callback).fit(ControlledModel(), ControlData())
    assert [step for step, _ in callback.history] == [2, 6]


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_what_is_missing_is_said_before_the_first_step(tmp_path: Path, stage: str) -> None:
    trainer = make_trainer(tmp_path, make())
    with pytest.raises(ConfigError, match=r"BoringModel lacks `generate_controlled\(indices"):
        getattr(trainer, stage)(BoringModel(), ControlData())
    assert trainer.global_step == 0
    with pytest.raises(ConfigError, match="the data module has no num_control_examples"):
        getattr(make_trainer(tmp_path, make()), stage)(ControlledModel())
    with pytest.raises(ConfigError, match="6 examples, but only 5 are held out"):
        getattr(make_trainer(tmp_path, make()), stage)(ControlledModel(), ControlData(5))
    with pytest.raises(ConfigError, match="`controls` has no num_control_examples"):
        getattr(make_trainer(tmp_path, make(controls=[1, 2])), stage)(ControlledModel())


@pytest.mark.parametrize(
    ("method", "returned", "message"),
    [
        ("annotate", torch.zeros(4, 1, SIZE, SIZE), r"ControlledModel.annotate returned torch.float32"),
        ("annotate", torch.zeros(4, 2, SIZE, SIZE).byte(), r"annotate returned torch.uint8 \(4, 2, 12, 12\)"),
        ("generate_controlled", torch.zeros(3, 3, SIZE, SIZE).byte(), "3 pictures for 4 indices"),
        ("generate_controlled", torch.zeros(4, 3, 8, 8).byte(), r"\(8, 8\) pixels for controls of \(12, 12\)"),
    ],
)
def test_other_pictures_and_maps_are_refused(tmp_path: Path, method: str, returned: Tensor, message: str) -> None:
    model = ControlledModel()
    setattr(model, method, lambda *args: returned)
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, make()).validate(model, ControlData())


@pytest.mark.parametrize("name", ["num_samples", "batch_size", "every_n_steps", "num_shown"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} of ControlSimilarity must be at least 1, found 0"):
        make(**{name: 0})


def test_can_be_written_in_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    metric = {"class_path": "lightning_difftune.metrics.BlurredSSIM", "init_args": {"sigma": 2}}
    settings = {"metric": metric, "num_samples": 4}
    config = parser.parse_object(
        {"callbacks": [{"class_path": "lightning_difftune.callbacks.ControlSimilarity", "init_args": settings}]}
    )
    (callback,) = parser.instantiate(config).callbacks
    assert (callback.monitor, callback.metric.sigma, callback.num_samples) == ("control/ssim", 2, 4)


@pytest.mark.slow  # starting processes
def test_two_processes_measure_and_show_what_one_does(tmp_path: Path) -> None:
    alone = make(batch_size=2, dirpath=tmp_path / "alone")
    make_trainer(tmp_path, alone).validate(ControlledModel(), ControlData(), verbose=False)
    callback = make(batch_size=2, dirpath=tmp_path / "together")
    trainer = make_trainer(tmp_path, callback, Report(tmp_path, callback), strategy="ddp_spawn", devices=2)
    trainer.validate(ControlledModel(), ControlData(), verbose=False)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["history"] == second["history"]
    assert first["logged"] == second["logged"]
    assert first["history"][0][1] == pytest.approx(alone.last_value, rel=1e-12)
    assert (first["asked"], second["asked"]) == ([[0, 1], [4, 5]], [[2, 3]])
    pictures = [(tmp_path / name / "step-0000000.png").read_bytes() for name in ("alone", "together")]
    assert pictures[0] == pictures[1]

    # With more processes than batches, the second one has nothing to do.
    callback = make(batch_size=6)
    trainer = make_trainer(tmp_path, callback, Report(tmp_path, callback), strategy="ddp_spawn", devices=2)
    trainer.validate(ControlledModel(), ControlData(), verbose=False)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["history"] == second["history"] == [[0, pytest.approx(alone.last_value, rel=1e-12)]]
    assert second["asked"] == []
