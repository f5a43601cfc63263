from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from tiny import finish, quiet_trainer, start

from lightning_difftune.callbacks import ControlSimilarity, SuddenConvergence
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.metrics import BlurredSSIM, ControlMSE, PixelAccuracy

FLAT_THEN_HIGH = [0.1, 0.12, 0.11, 0.1, 0.7, 0.72, 0.71, 0.73]  # after steps 1, 2, ..


class CurveModel(BoringModel):
    """Logs a given value in the validation after step 1, 2, ...; ``None`` logs nothing."""

    def __init__(self, curve: Sequence[float | None]) -> None:
        super().__init__()
        self.curve = curve

    def value(self) -> float | None:
        return self.curve[self.trainer.global_step - 1]

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("other", 1.0)
        if (value := self.value()) is not None:
            self.log("similarity", value)


class RankCurveModel(CurveModel):
    """The curve on one process, zeros on the other, not synchronised."""

    def __init__(self, curve: Sequence[float | None], rank: int, rank_zero_only: bool) -> None:
        super().__init__(curve)
        self.rank = rank
        self.rank_zero_only = rank_zero_only

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        value = self.value() if self.global_rank == self.rank else 0.0
        assert value is not None
        self.log("similarity", value, rank_zero_only=self.rank_zero_only)


class LateLogger(Callback):
    """Another callback, later in the list, that logs the scalar."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("late", FLAT_THEN_HIGH[trainer.global_step - 1])


def make_trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    """One validation after each of 8 optimizer steps."""
    steps = options.pop("max_steps", 8)
    return quiet_trainer(tmp_path, steps, *callbacks, **{"val_check_interval": 1, "limit_val_batches": 1, **options})


def watching(values: Sequence[float], interval: int = 100, **options: Any) -> SuddenConvergence:
    """A callback that has seen these values, one every ``interval`` steps."""
    callback = SuddenConvergence("similarity", **options)
    callback.load_state_dict({"history": [(interval * (i + 1), value) for i, value in enumerate(values)]})
    return callback


@pytest.fixture
def curves() -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    return ((generator.standard_normal(12) * 0.1 + np.linspace(0, 0.6, 12)).round(3) for _ in range(30))


@pytest.mark.parametrize(
    ("patience", "expected"), [(1, 200), (2, 500), (3, 500), (4, None)], ids=["plain", "two", "three", "four"]
)
@pytest.mark.parametrize("mode", ["max", "min"])
def test_patience_asks_for_successive_validations(mode: str, patience: int, expected: int | None) -> None:
    curve = np.array([0.1, 0.6, 0.5, 0.2, 0.6, 0.7, 0.8, 0.3])  # 0.5 is not beyond 0.5
    values, threshold = (curve, 0.5) if mode == "max" else (-curve, -0.5)
    found = watching(values.tolist(), mode=mode, threshold=threshold, patience=patience)
    assert found.convergence_step == expected


def test_the_step_equals_the_plain_search(curves: Iterator[np.ndarray]) -> None:
    for curve in curves:
        for patience in (1, 2, 3):
            starts = [i for i in range(12 - patience + 1) if (curve[i : i + patience] > 0.3).all()]
            expected = 100 * (starts[0] + 1) if starts else None
            assert watching(curve.tolist(), threshold=0.3, patience=patience).convergence_step == expected


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("window", [1, 3, 50])
def test_the_leap_equals_the_plain_search(curves: Iterator[np.ndarray], mode: str, window: int) -> None:
    for curve in curves:
        pairs = [(i, j) for i in range(12) for j in range(i + 1, min(i + window, 11) + 1)]
        rises = [curve[j] - curve[i] if mode == "max" else curve[i] - curve[j] for i, j in pairs]
        leap = watching(curve.tolist(), mode=mode, window=window).leap
        assert leap is not None
        assert leap.rise == pytest.approx(max(rises))
        start, end = leap.start_step // 100 - 1, leap.end_step // 100 - 1
        assert (start, end) in pairs
        assert abs(curve[end] - curve[start]) == pytest.approx(max(rises))


def test_the_leap_is_the_shortest_and_earliest_of_equals() -> None:
    assert watching([0.0, 0.0, 1.0, 1.0, 0.0, 1.0]).leap == (1.0, 200, 300)
    assert watching([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], mode="min").leap == (1.0, 200, 300)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5], [0.5, 0.4, 0.1]])
def test_no_leap_where_nothing_rises(values: list[float]) -> None:
    assert watching(values).leap is None


@pytest.mark.parametrize(
    ("task", "threshold", "mode", "metric"),
    [
        ("edge", 0.55, "max", BlurredSSIM),
        ("sketch", 0.75, "max", BlurredSSIM),
        ("depth", 0.04, "min", ControlMSE),
        ("normal", 0.06, "min", ControlMSE),
        ("segmentation_coco", 0.5, "max", PixelAccuracy),
        ("segmentation_ade20k", 0.4, "max", PixelAccuracy),
    ],
)
def test_knows_the_tasks_of_the_paper(task: Any, threshold: float, mode: str, metric: type) -> None:
    similarity = ControlSimilarity(metric())
    assert SuddenConvergence.for_task(task).monitor == similarity.monitor
    assert similarity.metric.higher_is_better == (mode == "max")
    callback = SuddenConvergence.for_task(task, monitor="val/score", patience=2, stop=True, window=7)
    assert (callback.monitor, callback.threshold, callback.mode) == ("val/score", threshold, mode)
    assert (callback.patience, callback.stop, callback.window) == (2, True, 7)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'pose'.*edge, sketch, depth.*`threshold`"):
        SuddenConvergence.for_task("pose", monitor="val/score")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "up"}, "'max' or 'min', found 'up'"),
        ({"patience": 0}, "patience of SuddenConvergence must be at least 1, found 0"),
        ({"window": 0}, "window of SuddenConvergence must be at least 1, found 0"),
        ({"threshold": math.nan}, "finite number, found nan"),
        ({"stop": True}, "only at a threshold"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SuddenConvergence("similarity", **options)


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_watches_a_fit_and_reports_to_the_loggers(
    tmp_path: Path, mode: Any, sign: int, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SuddenConvergence("similarity", sign * 0.5, mode, patience=2)
    model, logger = CurveModel([sign * value for value in FLAT_THEN_HIGH]), CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, callback, logger=logger, num_sanity_val_steps=1).fit(model)
    assert callback.convergence_step == 5
    assert [step for step, _ in callback.history] == list(range(1, 9))  # not the sanity check's
    assert callback.leap is not None
    assert callback.leap[1:] == (4, 8)
    assert callback.leap.rise == pytest.approx(0.63)
    assert "Sudden convergence at step 5: 'similarity' is" in caplog.text
    assert "between steps 4 and 8" in caplog.text
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    names = ["sudden_convergence/" + name for name in ("step", "leap", "leap_start_step", "leap_end_step")]
    logged = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in names}
    assert logged == dict(zip(names, ([(6, 5)], [(8, pytest.approx(0.63))], [(8, 4)], [(8, 8)]), strict=True))


def test_several_report_under_names_of_their_own(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    several = SuddenConvergence("similarity", 0.5), SuddenConvergence("similarity", 2.0, "min")
    make_trainer(tmp_path, *several, logger=logger).fit(CurveModel(FLAT_THEN_HIGH))
    assert "sudden_convergence/similarity/step" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_stops_the_fit_if_asked(tmp_path: Path) -> None:
    for stop, end in ((False, 8), (True, 6)):
        callback = SuddenConvergence("similarity", 0.5, patience=2, stop=stop)
        trainer = make_trainer(tmp_path, callback)
        trainer.fit(CurveModel(FLAT_THEN_HIGH))
        assert trainer.global_step == end
        assert callback.convergence_step == 5


def test_answers_without_a_threshold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = SuddenConvergence("similarity", window=1)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, callback).fit(CurveModel(FLAT_THEN_HIGH))
    assert callback.convergence_step is None
    assert callback.leap is not None
    assert callback.leap[1:] == (4, 5)
    assert "Sudden convergence at" not in caplog.text
    assert "No sudden convergence" not in caplog.text


def test_says_that_convergence_did_not_come(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, SuddenConvergence("similarity", 0.9)).fit(CurveModel(FLAT_THEN_HIGH))
    assert "No sudden convergence: 'similarity' was not above 0.9" in caplog.text


def test_sees_what_a_later_callback_logs(tmp_path: Path) -> None:
    callback = SuddenConvergence("late", 0.5)
    make_trainer(tmp_path, callback, LateLogger()).fit(BoringModel())
    assert callback.convergence_step == 5


def test_a_missing_scalar_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, SuddenConvergence("similarty"))
    with pytest.raises(ConfigError, match=r"watches 'similarty', which was not logged.*'similarity'.*`monitor`"):
        trainer.fit(CurveModel(FLAT_THEN_HIGH))
    assert trainer.global_step == 1


def test_validations_without_a_number_neither_count_nor_interrupt(tmp_path: Path) -> None:
    curve = [math.nan, None, 0.6, None, math.nan, math.inf, 0.7, 0.8]
    callback = SuddenConvergence("similarity", 0.5, patience=2, stop=True)
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(CurveModel(curve))
    assert callback.history == [(3, pytest.approx(0.6)), (7, pytest.approx(0.7))]
    assert callback.convergence_step == 3
    assert trainer.global_step == 7


def test_an_equal_value_logged_anew_counts(tmp_path: Path) -> None:
    callback = SuddenConvergence("similarity", 0.5, patience=3)
    make_trainer(tmp_path, callback, max_steps=3).fit(CurveModel([0.6, 0.6, 0.6]))
    assert callback.convergence_step == 1


@pytest.mark.parametrize("interruption", [2, 5, 7])  # before, between the two validations of patience, and after
def test_a_resumed_run_finds_the_same(tmp_path: Path, interruption: int, caplog: pytest.LogCaptureFixture) -> None:
    whole = SuddenConvergence("similarity", 0.5, patience=2)
    make_trainer(tmp_path, whole).fit(CurveModel(FLAT_THEN_HIGH))

    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=False)  # after validation
    first = SuddenConvergence("similarity", 0.5, patience=2)
    make_trainer(tmp_path, first, checkpoint, max_steps=interruption).fit(CurveModel(FLAT_THEN_HIGH))
    caplog.clear()
    second = SuddenConvergence("similarity", 0.5, patience=2)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, second).fit(CurveModel(FLAT_THEN_HIGH), ckpt_path=tmp_path / "last.ckpt")
    assert second.convergence_step == whole.convergence_step == 5
    assert second.leap == whole.leap
    assert second.history == whole.history
    assert caplog.text.count("Sudden convergence at step 5") == (0 if interruption == 7 else 1)


def test_a_new_fit_starts_afresh(tmp_path: Path) -> None:
    callback = SuddenConvergence("similarity", 0.5)
    make_trainer(tmp_path, callback).fit(CurveModel(FLAT_THEN_HIGH))
    make_trainer(tmp_path, callback, max_steps=3).fit(CurveModel(FLAT_THEN_HIGH))
    assert [step for step, _ in callback.history] == [1, 2, 3]
    assert callback.convergence_step is None


def test_a_separate_validation_is_not_watched(tmp_path: Path) -> None:
    callback = SuddenConvergence("similarity", 0.5)
    make_trainer(tmp_path, callback).validate(CurveModel(FLAT_THEN_HIGH), verbose=False)
    make_trainer(tmp_path, callback, fast_dev_run=True).fit(CurveModel(FLAT_THEN_HIGH))
    assert callback.history == []


def test_the_state_of_something_else_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"holds \['averages'\], expected 'history'"):
        SuddenConvergence("similarity").load_state_dict({"averages": {}})


def test_is_set_up_from_a_config() -> None:
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    settings = {"monitor": "val/ssim", "threshold": 0.55, "mode": "max", "patience": 2}
    config = parser.parse_object(
        {"callbacks": [{"class_path": "lightning_difftune.callbacks.SuddenConvergence", "init_args": settings}]}
    )
    (callback,) = parser.instantiate(config).callbacks
    assert (callback.monitor, callback.threshold, callback.patience) == ("val/ssim", 0.55, 2)


def test_a_task_of_the_paper_is_named_in_a_config_and_watched_in_a_fit(tmp_path: Path) -> None:
    class Controlled(CurveModel):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("control/ssim", self.value() or 0.0)

    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    task = {"class_path": "lightning_difftune.callbacks.SuddenConvergence.for_task", "init_args": {"task": "edge"}}
    (callback,) = parser.instantiate(parser.parse_object({"callbacks": [task]})).callbacks
    make_trainer(tmp_path, callback).fit(Controlled([0.3, 0.5, 0.54, 0.5, 0.6, 0.7, 0.7, 0.7]))
    assert callback.convergence_step == 5  # the first above 0.55


def run_as_one_of_two(folder: Path) -> None:
    """Fit with each kind of logging and write what this process found."""
    found = []
    for rank, rank_zero_only in ((0, False), (1, False), (0, True)):
        callback = SuddenConvergence("similarity", 0.5, stop=True)
        trainer = make_trainer(folder, callback, strategy="ddp", devices=2)
        trainer.fit(RankCurveModel(FLAT_THEN_HIGH, rank, rank_zero_only))
        found.append([callback.convergence_step, callback.history, trainer.global_step])
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.slow  # starting processes
def test_all_processes_follow_the_first(tmp_path: Path) -> None:
    finish(start(__file__, 2, tmp_path))
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    # Only the first process sees it converge; only the second does; and the first alone logs.
    assert [(step, end) for step, _, end in first] == [(5, 5), (None, 8), (5, 5)]


if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]))
