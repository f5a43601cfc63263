from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generating import GeneratingModel, ReferenceData, make_trainer, noise_pictures
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image
from torch import Tensor

from lightning_difftune.callbacks import EMA, SampleGrid
from lightning_difftune.callbacks.sample_grid import arranged, real_pictures
from lightning_difftune.errors import ConfigError
from lightning_difftune.pictures import pictures_of


def test_the_png_shows_every_sample_in_its_place(tmp_path: Path) -> None:
    grid = SampleGrid(
        num_samples=7, columns=3, batch_size=2, generate=lambda indices: noise_pictures(indices, 5, channels=3)
    )
    make_trainer(tmp_path, grid, max_steps=2).fit(BoringModel())
    assert {file.name for file in (tmp_path / "samples").iterdir()} == {"step-0000000.png", "step-0000002.png"}
    path = tmp_path / "samples" / "step-0000002.png"
    with Image.open(path) as file:
        assert file.format == "PNG"
    shown = pictures_of(path, 3, 3).flatten(0, 1)
    samples = noise_pictures(torch.arange(7), 5, channels=3)
    factor = 96 // samples.shape[-1]  # small pictures are shown with larger pixels
    assert torch.equal(shown[:7], samples.repeat_interleave(factor, -1).repeat_interleave(factor, -2))
    assert not shown[7:].any()  # the other places are empty


def test_grey_samples_and_the_same_indices_every_time(tmp_path: Path) -> None:
    model = GeneratingModel()
    grid = SampleGrid(num_samples=4, columns=2, at_start=False)
    make_trainer(tmp_path, grid, max_steps=4).fit(model, ReferenceData())
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    assert model.asked == [[0, 1, 2, 3], [0, 1, 2, 3]]
    picture = np.asarray(Image.open(tmp_path / "samples" / "step-0000002.png"))
    np.testing.assert_array_equal(picture[..., 0], picture[..., 1])


@pytest.mark.parametrize("ema_first", [True, False])
def test_shows_the_averages(tmp_path: Path, ema_first: bool) -> None:
    model, ema, grid = GeneratingModel(), EMA(decay=0.7), SampleGrid(num_samples=4)
    callbacks: list[Callback] = [ema, grid] if ema_first else [grid, ema]
    make_trainer(tmp_path, *callbacks).fit(model, ReferenceData())
    with ema.average_parameters(model):
        assert model.brightness[-1] == model.shift()
    assert model.brightness[-1] != model.shift()


def test_goes_where_it_is_told_or_to_the_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run")
    trainer = make_trainer(tmp_path, SampleGrid(num_samples=2, at_start=False), max_steps=2, logger=logger)
    trainer.fit(GeneratingModel(), ReferenceData())
    assert (tmp_path / "run" / "version_0" / "samples" / "step-0000002.png").exists()
    told = SampleGrid(num_samples=2, dirpath=tmp_path / "here", at_start=False)
    make_trainer(tmp_path, told, max_steps=2).fit(GeneratingModel(), ReferenceData())
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["step-0000002.png"]


class QuietLogger(Logger):
    """Takes nothing."""

    name = "quiet"
    version = 0

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class BoardLogger(QuietLogger):
    """Takes images the way TensorBoard does, through its experiment."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[str, Tensor, int]] = []

    @property
    def experiment(self) -> Any:
        return self

    def add_image(self, tag: str, image: Tensor, global_step: int) -> None:
        self.shown.append((tag, image, global_step))


class ImageLogger(QuietLogger):
    """Takes images the way Weights & Biases does, by its own method."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[str, list[Any], int]] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.shown.append((key, images, step))


class ServerLogger(QuietLogger):
    """Takes images the way MLflow does, through a client and the run's number."""

    run_id = "run 7"

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[str, Any, str, int]] = []

    @property
    def experiment(self) -> Any:
        return type("Client", (), {"log_image": self._log_image})

    def _log_image(self, run_id: str, image: Any, *, key: str, step: int) -> None:
        self.shown.append((run_id, image, key, step))


def test_loggers_that_take_images_get_them(tmp_path: Path) -> None:
    board, images, server = BoardLogger(), ImageLogger(), ServerLogger()
    loggers = [board, images, server, CSVLogger(tmp_path), QuietLogger()]
    grid = SampleGrid(num_samples=4, columns=2, dirpath=tmp_path / "few", at_start=False)
    make_trainer(tmp_path, grid, max_steps=2, logger=loggers).fit(GeneratingModel(), ReferenceData())
    picture = np.asarray(Image.open(tmp_path / "few" / "step-0000002.png"))
    ((tag, image, board_step),) = board.shown
    ((key, (logged,), image_step),) = images.shown
    assert (tag, board_step, key, image_step) == ("few", 2, "few", 2)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), picture)
    np.testing.assert_array_equal(np.asarray(logged), picture)
    ((run_id, stored, stored_key, stored_step),) = server.shown
    assert (run_id, stored_key, stored_step) == ("run 7", "few", 2)
    np.testing.assert_array_equal(stored, picture)


def test_only_the_first_process_generates(tmp_path: Path) -> None:
    class Second:
        is_global_zero = False

    model = GeneratingModel()
    SampleGrid(num_samples=4).evaluate(Second(), model, 0)
    assert model.asked == []


def test_every_n_steps_and_the_step_of_a_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, SampleGrid(num_samples=2, every_n_steps=4, at_start=False), max_steps=6)
    trainer.fit(GeneratingModel(), ReferenceData())
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-0000002.png", "step-0000006.png"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    told = SampleGrid(num_samples=2, dirpath=tmp_path / "here", at_start=False)
    make_trainer(tmp_path, told).validate(
        GeneratingModel(), ReferenceData(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["step-0000006.png"]


def test_a_picture_that_cannot_be_saved_does_not_stop_the_training(tmp_path: Path) -> None:
    (tmp_path / "samples").touch()
    trainer = make_trainer(tmp_path, SampleGrid(num_samples=2))
    with pytest.warns(UserWarning, match="could not be saved"):
        trainer.fit(GeneratingModel(), ReferenceData())
    assert trainer.global_step == 6


def test_a_model_that_cannot_generate_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SampleGrid needs pictures"):
        make_trainer(tmp_path, SampleGrid()).fit(BoringModel())


class NamedModel(GeneratingModel):
    """A module with names for its samples."""

    def names_of(self, indices):
        return [("rose", "oxeye daisy")[index % 2] for index in indices]


def test_rows_are_of_one_name_and_the_base_and_real_pictures_are_there(tmp_path: Path) -> None:
    model = NamedModel()
    make_trainer(tmp_path, SampleGrid(num_samples=4, columns=2), max_steps=2).fit(model, ReferenceData())
    assert model.training, "as it was before the first grid"
    folder = tmp_path / "samples"
    assert {file.name for file in folder.iterdir()} == {"real.png", "step-0000000.png", "step-0000002.png"}
    for name, rows in (("step-0000000", "rose, oxeye daisy"), ("step-0000002", "rose, oxeye daisy")):
        with Image.open(folder / f"{name}.png") as file:
            assert file.info["rows"] == rows
            assert np.asarray(file)[:, :130].max() > 200, "the names are written"
    before, after = (pictures_of(folder / f"step-000000{step}.png", 2, 2) for step in (0, 2))
    assert not torch.equal(before, after), "the base model's are those of step 0"
    real = torch.cat(list(ReferenceData().reference_images()))
    shown = pictures_of(folder / "real.png", 2, 2)[..., :: 96 // real.shape[-1], :: 96 // real.shape[-1]]
    assert torch.equal(shown.flatten(0, 1), real[:4].expand(-1, 3, -1, -1))


class NamedData(ReferenceData):
    """A data module that finds real pictures of a class: only three roses."""

    def examples_of(self, subject, count, skip=0):
        return torch.full((3 if subject == "rose" else 0, 1, 8, 8), 200, dtype=torch.uint8)[skip : skip + count]


def test_real_pictures_are_in_the_rows_of_the_samples() -> None:
    pictures, rows = real_pictures(NamedData(), ["rose", "rose", "lily"], 2, 6)
    assert rows == ["real: rose", "real: rose", "real: lily"]
    assert pictures[:, 0, 0, 0].tolist() == [200, 200, 200, 0, 0, 0], "what is not there is black"
    pictures, rows = real_pictures(NamedData(), ["daisy"], 2, 2)
    assert (len(pictures), rows) == (2, ["real pictures"])


def test_samples_that_fill_no_row_of_their_name_are_left_out() -> None:
    order, rows = arranged(["a", "b", "c"] * 3, 2, 9)
    assert (order, rows) == ([0, 3, 1, 4, 2, 5], ["a", "b", "c"])
