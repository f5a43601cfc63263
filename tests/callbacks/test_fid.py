from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import pytest
import torch
from generating import (
    GeneratingModel,
    PixelFeatures,
    ReferenceData,
    Report,
    expected_distance,
    make_trainer,
    noise_pictures,
)
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from lightning_difftune.callbacks import EMA, FID, SampleGrid, SuddenConvergence
from lightning_difftune.errors import ConfigError, DataError


def make_fid(**options: Any) -> FID:
    return FID(**{"num_samples": 40, "feature_extractor": PixelFeatures(), "batch_size": 16} | options)


def generated(shift: float, count: int = 40) -> Tensor:
    return (noise_pictures(torch.arange(count), seed=2).float() + shift).clamp(0, 255).byte()


def test_fit_logs_the_distance_of_the_formula_at_every_validation(tmp_path: Path) -> None:
    model, data, fid = GeneratingModel(), ReferenceData(), make_fid()
    trainer = make_trainer(tmp_path, fid)
    trainer.fit(model, data)
    assert [step for step, _ in fid.history] == [2, 4, 6]
    shifts = model.brightness[::3]  # three batches in each evaluation
    for (_, value), shift in zip(fid.history, shifts, strict=True):
        assert value == pytest.approx(expected_distance(data.images, generated(shift)), rel=1e-5)
    assert len({value for _, value in fid.history}) == 3
    assert fid.monitor == "fd_pixels"
    assert fid.last_value == fid.history[-1][1]
    assert trainer.callback_metrics["fd_pixels"].item() == pytest.approx(fid.last_value, rel=1e-6)
    assert "fid" not in trainer.callback_metrics  # another extractor's distance is not FID


def test_samples_come_in_fixed_batches_of_consecutive_indices(tmp_path: Path) -> None:
    model = GeneratingModel()
    make_trainer(tmp_path, make_fid()).validate(model, ReferenceData(), verbose=False)
    assert model.asked == [list(range(16)), list(range(16, 32)), list(range(32, 40))]


def test_any_module_with_a_function_and_a_list_of_pictures(tmp_path: Path) -> None:
    real = noise_pictures(torch.arange(30), seed=1, channels=3)
    fid = make_fid(reference=list(real.split(7)), generate=lambda indices: noise_pictures(indices, 5, channels=3))
    trainer = make_trainer(tmp_path, fid)
    results = trainer.validate(BoringModel(), verbose=False)
    expected = expected_distance(real, noise_pictures(torch.arange(40), 5, channels=3))
    assert fid.last_value == pytest.approx(expected, rel=1e-5)
    assert results[0]["fd_pixels"] == pytest.approx(expected, rel=1e-5)


def test_reference_is_looked_at_once_in_a_run_and_anew_when_it_changes(tmp_path: Path) -> None:
    data, fid = ReferenceData(), make_fid()
    trainer = make_trainer(tmp_path, fid)
    trainer.fit(GeneratingModel(), data)
    assert data.times_shown == 1
    model, other = GeneratingModel(), ReferenceData(seed=9)
    trainer.validate(model, other, verbose=False)
    assert other.times_shown == 1
    assert fid.last_value == pytest.approx(expected_distance(other.images, generated(model.shift())), rel=1e-5)


def validated(tmp_path: Path, data: ReferenceData, extractor: PixelFeatures, cache_dir: Path | None) -> float:
    fid = make_fid(feature_extractor=extractor, cache_dir=cache_dir)
    make_trainer(tmp_path, fid).validate(GeneratingModel(), data, verbose=False)
    assert fid.last_value is not None
    return fid.last_value


def test_another_reference_that_is_given_is_measured(tmp_path: Path) -> None:
    fid, model = make_fid(), GeneratingModel()
    for seed in (3, 4):
        fid.reference = [noise_pictures(torch.arange(20), seed)]
        make_trainer(tmp_path, fid).validate(model, ReferenceData(), verbose=False)
        assert fid.last_value == pytest.approx(expected_distance(fid.reference[0], generated(model.shift())), rel=1e-4)


def test_reference_statistics_are_kept_between_runs(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = PixelFeatures(), PixelFeatures()
    data, again = ReferenceData(), ReferenceData()
    value = validated(tmp_path, data, first, cache)
    assert first.looked_at == 50 + 40
    assert validated(tmp_path, again, second, cache) == value
    assert again.times_shown == 0
    assert second.looked_at == 40  # the generated pictures alone

    # Other pictures, and an extractor of other weights, have files of their own.
    for other, extractor in ((ReferenceData(seed=9), PixelFeatures()), (ReferenceData(), PixelFeatures(seed=4))):
        assert validated(tmp_path, other, extractor, cache) != value
        assert other.times_shown == 1
    assert len(list(cache.iterdir())) == 3


def test_damaged_reference_statistics_are_computed_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    value = validated(tmp_path, ReferenceData(), PixelFeatures(), cache)
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    data = ReferenceData()
    with pytest.warns(UserWarning, match="damaged"):
        assert validated(tmp_path, data, PixelFeatures(), cache) == value
    assert data.times_shown == 1
    unread = ReferenceData()
    assert validated(tmp_path, unread, PixelFeatures(), cache) == value
    assert unread.times_shown == 0  # the file is repaired


def test_an_interrupted_reference_does_not_count(tmp_path: Path) -> None:
    class Flaky(ReferenceData):
        def reference_images(self) -> Any:
            yield self.images[:8]
            if self.times_shown == 0:
                self.times_shown = 1
                raise OSError("disk gone")
            yield self.images[8:]

    fid, model, first, data = make_fid(), GeneratingModel(), ReferenceData(), Flaky(seed=9)
    trainer = make_trainer(tmp_path, fid)
    trainer.validate(model, first, verbose=False)
    with pytest.raises(OSError, match="disk gone"):
        trainer.validate(model, data)
    trainer.validate(model, first, verbose=False)
    assert fid.history[0] == fid.history[1]
    trainer.validate(model, data, verbose=False)
    assert fid.last_value == pytest.approx(expected_distance(data.images, generated(model.shift())), rel=1e-5)


def test_a_reference_without_identity_is_not_kept_on_disk(tmp_path: Path) -> None:
    fid = make_fid(reference=[ReferenceData().images], cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match="no reference_identity"):
        make_trainer(tmp_path, fid).validate(GeneratingModel(), ReferenceData(), verbose=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_nothing_to_generate_or_compare_with_is_an_error_before_the_first_step(tmp_path: Path, stage: str) -> None:
    trainer = make_trainer(tmp_path, make_fid(reference=[ReferenceData().images]))
    with pytest.raises(ConfigError, match=r"BoringModel has no method `generate\(indices\)`"):
        getattr(trainer, stage)(BoringModel())
    assert trainer.global_step == 0
    with pytest.raises(ConfigError, match="Pass `reference=`"):
        getattr(make_trainer(tmp_path, make_fid()), stage)(GeneratingModel())


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.rand(16, 3, 4, 4), "float32"),
        (torch.zeros(16, 2, 4, 4).byte(), r"\(16, 2, 4, 4\)"),
        (torch.zeros(15, 3, 4, 4).byte(), "15 pictures for 16 indices"),
        ([1, 2], "a list"),
    ],
)
def test_pictures_of_another_kind_are_refused(tmp_path: Path, pictures: Any, message: str) -> None:
    fid = make_fid(generate=lambda indices: pictures)
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, fid).validate(BoringModel(), ReferenceData())


def test_too_few_reference_pictures_and_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 real and 40 generated"):
        make_trainer(tmp_path, make_fid(reference=[])).validate(GeneratingModel())
    with pytest.raises(DataError, match=r"The reference gave torch\.float32"):
        make_trainer(tmp_path, make_fid(reference=[torch.rand(4, 3, 4, 4)])).validate(GeneratingModel())


def test_sanity_check_and_fast_dev_run_are_left_alone(tmp_path: Path) -> None:
    class Counting(FID):
        def evaluate(self, *args: Any) -> None:
            super().evaluate(*args)
            assert not args[0].sanity_checking

    fid = Counting(num_samples=40, feature_extractor=PixelFeatures())
    make_trainer(tmp_path, fid, num_sanity_val_steps=1, max_steps=2).fit(GeneratingModel(), ReferenceData())
    assert [step for step, _ in fid.history] == [2]
    quick = make_fid()
    make_trainer(tmp_path, quick, fast_dev_run=True).fit(GeneratingModel(), ReferenceData())
    assert quick.history == []


def test_every_n_steps_limits_fit_but_not_validate(tmp_path: Path) -> None:
    fid = make_fid(every_n_steps=4)
    trainer = make_trainer(tmp_path, fid, max_steps=10)
    model = GeneratingModel()
    trainer.fit(model, ReferenceData())
    assert [step for step, _ in fid.history] == [2, 6, 10]
    trainer.validate(model, ReferenceData(), verbose=False)
    assert [step for step, _ in fid.history] == [2, 6, 10, 10]
    make_trainer(tmp_path, fid, max_steps=6).fit(GeneratingModel(), ReferenceData())  # another run
    assert [step for step, _ in fid.history] == [2, 6]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_history_survives_resuming_and_the_extractor_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fid = make_fid(every_n_steps=4)
    make_trainer(tmp_path, fid, saver, max_steps=5).fit(GeneratingModel(), ReferenceData())
    path = tmp_path / "step=4.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {"layer.weight", "layer.bias"}
    assert "projection" not in str(checkpoint["callbacks"][fid.state_key])
    assert checkpoint["callbacks"][fid.state_key]["history"] == fid.history
    assert [step for step, _ in fid.history] == [2]

    resumed = make_fid(every_n_steps=6)
    make_trainer(tmp_path, resumed, max_steps=10).fit(GeneratingModel(), ReferenceData(), ckpt_path=path)
    assert [step for step, _ in resumed.history] == [2, 8, 10]
    assert resumed.history[0] == fid.history[0]

    validated = make_fid(every_n_steps=4)
    trainer = make_trainer(tmp_path, validated)
    trainer.validate(GeneratingModel(), ReferenceData(), ckpt_path=path, verbose=False)
    assert [step for step, _ in validated.history] == [2, 4]  # the checkpoint's step, not the new trainer's
    trainer.validate(GeneratingModel(), ReferenceData(), verbose=False)
    assert [step for step, _ in validated.history] == [2, 4, 0]


def test_the_extractor_is_neither_trained_nor_part_of_the_module(tmp_path: Path) -> None:
    extractor, model = PixelFeatures(), GeneratingModel()
    before = extractor.projection.detach().clone()
    make_trainer(tmp_path, make_fid(feature_extractor=extractor)).fit(model, ReferenceData())
    assert torch.equal(extractor.projection, before)
    assert extractor.projection.grad is None
    assert extractor not in set(model.modules())


def test_several_may_watch_with_different_extractors(tmp_path: Path) -> None:
    other = PixelFeatures(seed=4)
    other.name = "FD-other"
    trainer = make_trainer(tmp_path, make_fid(), make_fid(feature_extractor=other))
    trainer.fit(GeneratingModel(), ReferenceData())
    assert {"fd_pixels", "fd_other"} <= set(trainer.callback_metrics)


def test_the_best_checkpoint_can_be_kept_by_it(tmp_path: Path) -> None:
    fid = make_fid()
    saver = ModelCheckpoint(tmp_path, monitor=fid.monitor, filename="{step}", save_top_k=1)
    make_trainer(tmp_path, fid, saver).fit(GeneratingModel(), ReferenceData())
    best_step, _ = min(fid.history, key=lambda entry: entry[1])
    assert Path(saver.best_model_path).name == f"step={best_step}.ckpt"


def test_says_which_extractor_looks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*too few")
        make_trainer(tmp_path, make_fid(num_samples=5)).validate(GeneratingModel(), ReferenceData(), verbose=False)
    assert "'fd_pixels' is a Fréchet distance through FD-pixels" in caplog.text
    assert "not FID: compare it with itself, at the same number" in caplog.text


def test_fid_of_too_few_pictures_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fid = make_fid(num_samples=5)
    monkeypatch.setattr(type(fid.distance), "key", "fid")
    with pytest.warns(UserWarning, match="5 pictures are too few.*Raise num_samples above 6"):
        make_trainer(tmp_path, fid).validate(GeneratingModel(), ReferenceData(), verbose=False)


def test_fid_against_too_few_real_pictures_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fid = make_fid(cache_dir=tmp_path / "cache")
    monkeypatch.setattr(type(fid.distance), "key", "fid")
    for _ in range(2):  # measured, and from the cache
        with pytest.warns(UserWarning, match="compares with 5 real pictures, too few .* of 6 features"):
            make_trainer(tmp_path, fid).validate(GeneratingModel(), ReferenceData(5), verbose=False)
        fid = make_fid(cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("callback", [make_fid(), SuddenConvergence("loss"), SampleGrid(4, at_start=False)])
@pytest.mark.parametrize("batches", [0, 1])
def test_a_run_without_validation_is_warned_of(
    tmp_path: Path, callback: Any, batches: int, recwarn: pytest.WarningsRecorder
) -> None:
    class Logging(GeneratingModel):
        def validation_step(self, *_: Any) -> None:
            self.log("loss", 1.0)

    trainer = make_trainer(tmp_path, callback, limit_val_batches=batches, max_steps=2)
    trainer.fit(Logging(), ReferenceData())
    said = [warning for warning in recwarn if "this run has none, so that nothing" in str(warning.message)]
    assert bool(said) == (batches == 0)


@pytest.mark.parametrize(
    ("follower", "is_misled"),
    [
        (EarlyStopping("fd_pixels", patience=9), True),
        (ModelCheckpoint(monitor="fd_pixels", save_top_k=3), True),
        (ModelCheckpoint(monitor="fd_pixels", save_top_k=1), False),
    ],
)
@pytest.mark.parametrize("every", [2, 4])
def test_what_takes_an_old_value_for_a_new_one_is_warned_of(
    tmp_path: Path, follower: Any, is_misled: bool, every: int, recwarn: pytest.WarningsRecorder
) -> None:
    make_trainer(tmp_path, make_fid(every_n_steps=every), follower).fit(GeneratingModel(), ReferenceData())
    said = [str(warning.message) for warning in recwarn if "takes the last value for a new one" in str(warning.message)]
    assert bool(said) == (is_misled and every == 4)
    assert all("monitors fd_pixels, which FID measures every 4 steps" in text for text in said)


@pytest.mark.parametrize("ema_first", [True, False])
def test_looks_at_the_averages_wherever_it_stands(tmp_path: Path, ema_first: bool) -> None:
    model, ema, fid = GeneratingModel(), EMA(decay=0.7), make_fid()
    callbacks: list[Callback] = [ema, fid] if ema_first else [fid, ema]
    make_trainer(tmp_path, *callbacks).fit(model, ReferenceData())
    with ema.average_parameters(model):
        average = model.shift()
    assert model.brightness[-1] == average != model.shift()
    assert fid.last_value == pytest.approx(expected_distance(ReferenceData().images, generated(average)), rel=1e-5)


def test_does_not_disturb_the_random_numbers_of_training(tmp_path: Path) -> None:
    def final_weights(*callbacks: Callback) -> Tensor:
        class Noisy(GeneratingModel):
            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return self(torch.randn_like(batch)).square().mean()

        L.seed_everything(7, verbose=False)
        model = Noisy()
        make_trainer(tmp_path, *callbacks).fit(model, ReferenceData())
        return model.layer.weight.detach()

    drawing = make_fid(generate=lambda indices: torch.randint(0, 256, (len(indices), 1, 4, 4)).byte())
    assert torch.equal(final_weights(), final_weights(drawing))


def test_validate_and_fit_may_follow_each_other(tmp_path: Path) -> None:
    model, data, fid = GeneratingModel(), ReferenceData(), make_fid()
    trainer = make_trainer(tmp_path, fid)
    trainer.validate(model, data, verbose=False)  # in inference mode
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    assert fid.history[-1] == fid.history[-2]  # the same weights
    assert fid.history[0][1] != fid.history[-1][1]


def test_can_be_written_in_yaml() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    config = parser.parse_object(
        {
            "callbacks": [
                {
                    "class_path": "lightning_difftune.callbacks.FID",
                    "init_args": {
                        "num_samples": 20,
                        "feature_extractor": {"class_path": "lightning_difftune.metrics.EfficientNetLite0Features"},
                        "generate": "generating.noise_pictures",
                        "cache_dir": "somewhere",
                    },
                },
                {"class_path": "lightning_difftune.callbacks.EMA", "init_args": {"decay": 0.5, "warmup": True}},
                {"class_path": "lightning_difftune.callbacks.SampleGrid", "init_args": {"columns": 3}},
            ]
        }
    )
    fid, ema, grid = parser.instantiate(config).callbacks
    assert (fid.num_samples, fid.monitor, fid.generate) == (20, "fd_efficientnet_lite0", noise_pictures)
    assert (ema.decay, ema.warmup, grid.columns) == (0.5, True, 3)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"batch_size": 0}, {"every_n_steps": 0}])
def test_numbers_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} of FID must be at least 1, found 0"):
        make_fid(**options)


@pytest.mark.slow  # starting processes
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    model, data = GeneratingModel(), ReferenceData()
    alone = make_fid(cache_dir=tmp_path / "alone")
    make_trainer(tmp_path, alone).validate(model, data, verbose=False)

    fid = make_fid(cache_dir=tmp_path / "together")
    trainer = make_trainer(tmp_path, fid, Report(tmp_path, fid), strategy="ddp_spawn", devices=2)
    trainer.validate(GeneratingModel(), data, verbose=False)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["history"] == second["history"]
    assert first["logged"] == second["logged"]
    assert first["history"][0][1] == pytest.approx(alone.last_value, rel=1e-12)
    assert first["asked"] == [list(range(16)), list(range(32, 40))]  # batch k is rank k mod 2's
    assert second["asked"] == [list(range(16, 32))]
    assert first["looked_at"] + second["looked_at"] == 50 + 40

    # What two processes stored serves one.
    (path,) = (tmp_path / "together").iterdir()
    path.rename(tmp_path / "alone" / path.name)
    reused = make_fid(cache_dir=tmp_path / "alone")
    fresh = ReferenceData()
    make_trainer(tmp_path, reused).validate(GeneratingModel(), fresh, verbose=False)
    assert fresh.times_shown == 0
    assert reused.last_value == pytest.approx(alone.last_value, rel=1e-12)
