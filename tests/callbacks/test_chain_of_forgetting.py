"""ChainOfForgetting on a module from outside the package with known pictures: distances, files and errors."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from generating import GeneratingModel, PixelFeatures, ReferenceData, expected_distance, make_trainer, noise_pictures
from lightning.pytorch.demos.boring_classes import BoringModel
from PIL import Image
from torch import Tensor

from lightning_difftune.callbacks import EMA, FID, ChainOfForgetting
from lightning_difftune.callbacks.chain_of_forgetting import swap_meter
from lightning_difftune.errors import ConfigError, DataError


class SwappingModel(GeneratingModel):
    """Its pictures get brighter with each swapped step; without a swap they are those of generate."""

    def generate_swapped(self, indices: Tensor, fractions: list[float]) -> Tensor:
        tuned = self.generate(indices).float()
        return torch.stack([(tuned + 90 * (p - 0.25) ** 2 - 90 / 16).clamp(0, 255) for p in fractions]).byte()


def chain(**settings: object) -> ChainOfForgetting:
    settings = {"num_samples": 20, "batch_size": 8, "feature_extractor": PixelFeatures(), "shown": 3} | settings
    return ChainOfForgetting(**settings)


def test_the_distances_are_those_of_the_pictures_for_each_percent(tmp_path: Path) -> None:
    callback, model, data = chain(percents=(100, 0, 25)), SwappingModel(), ReferenceData()
    trainer = make_trainer(tmp_path, callback, FID(20, PixelFeatures(), batch_size=8), max_steps=2)
    trainer.fit(model, data)
    ((step, result),) = callback.history
    assert step == 2
    assert list(result) == [0, 25, 100]
    for percent, value in result.items():
        with torch.no_grad():
            pictures = model.eval().generate_swapped(torch.arange(20), [percent / 100])[0]
        assert value == pytest.approx(expected_distance(data.images, pictures), rel=1e-6)
        assert trainer.callback_metrics[f"fd_pixels/swap_{percent}"].item() == pytest.approx(value)
    assert result[0] == pytest.approx(trainer.callback_metrics["fd_pixels"].item(), rel=1e-6)
    assert data.times_shown == 2  # once for each of the two callbacks


def test_table_figure_and_strip_are_written(tmp_path: Path) -> None:
    callback, model = chain(percents=range(0, 101, 50), dirpath=tmp_path / "here"), SwappingModel()
    make_trainer(tmp_path, callback, max_steps=2).fit(model, ReferenceData())
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == ["step-0000002.csv", "step-0000002.png", "step-0000002.svg"]
    with (tmp_path / "here" / "step-0000002.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["swapped_percent"]) for row in rows] == [0, 50, 100]
    assert [float(row["fd_pixels"]) for row in rows] == pytest.approx(list(callback.history[0][1].values()), rel=1e-4)
    assert np.asarray(Image.open(tmp_path / "here" / "step-0000002.png")).std() > 0
    assert callback.strip.shape == (3, 3, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(callback.strip, model.eval().generate_swapped(torch.arange(3), [0, 0.5, 1]))


def test_it_follows_the_interval_and_resumes(tmp_path: Path) -> None:
    callback = chain(percents=(0, 100), every_n_steps=4)
    make_trainer(tmp_path, callback).fit(SwappingModel(), ReferenceData())
    assert [step for step, _ in callback.history] == [2, 6]
    again = chain(percents=(0, 100))
    again.load_state_dict(callback.state_dict())
    assert again.history == callback.history


def test_a_function_may_swap(tmp_path: Path) -> None:
    asked = []

    def generate(indices: Tensor, fractions: list[float]) -> Tensor:
        asked.append(fractions)
        return torch.stack([noise_pictures(indices, seed=int(10 * p)) for p in fractions])

    callback = chain(percents=(0, 10), generate=generate, reference=[noise_pictures(torch.arange(30), 5)])
    make_trainer(tmp_path, callback, max_steps=2).fit(BoringModel())
    assert asked == [[0, 0.1]] * 3
    assert callback.history[0][1][0] != callback.history[0][1][10]


def test_percents_may_be_an_array() -> None:
    chain = ChainOfForgetting(percents=np.arange(100, -1, -50), feature_extractor=PixelFeatures())
    assert chain.percents == [0, 50, 100]
    assert {type(percent) for percent in chain.percents} == {int}  # checkpoints hold them


def test_mistakes_are_refused(tmp_path: Path) -> None:
    for settings in ({"percents": ()}, {"percents": (0, 101)}, {"shown": 0}):
        with pytest.raises(ConfigError, match=r"percents in \[0, 100\]"):
            chain(**settings)
    with pytest.raises(ConfigError, match="has no method `generate_swapped"):
        make_trainer(tmp_path, chain()).fit(GeneratingModel(), ReferenceData())
    with pytest.raises(ConfigError, match="ChainOfForgetting has no real pictures"):
        make_trainer(tmp_path, chain()).fit(SwappingModel())
    wrong = chain(generate=lambda indices, fractions: noise_pictures(indices))
    with pytest.raises(DataError, match=r"expected pictures \(11, 8, 1 or 3, H, W\)"):
        make_trainer(tmp_path, wrong).fit(SwappingModel(), ReferenceData())


def test_a_config_that_measures_nothing_is_told_what_to_add() -> None:
    with pytest.raises(ConfigError, match=r"--trainer.callbacks\+=lightning_difftune.callbacks.ChainOfForgetting"):
        swap_meter([EMA()])
