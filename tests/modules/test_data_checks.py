"""Classes of the data have the numbers of the module and the checkpoint, and batches the values that it takes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import noise_pixels, quiet_trainer, tiny_dit, tiny_pictures, tiny_weights
from torch.utils.data import DataLoader

from lightning_difftune import DiTDiffTuningModule, MemoryBankDataModule
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.modules.data_checks import check_classes
from lightning_difftune.pictures import to_pixel_values

PIXELS = torch.from_numpy(noise_pixels(4, 1, 8, 8))


def named(*names):
    return ArrayImages(noise_pixels(12, 8, 8), np.arange(12) % len(names), names)


def data_of(pictures, classes):
    return MemoryBankDataModule(pictures, classes, 8, 1, batch_size=4, val_target=pictures)


def fit(folder, data, module=None, run="fit", ckpt_path=None, **settings):
    module = module or DiTDiffTuningModule(tiny_dit(), **settings)
    trainer = quiet_trainer(folder, 1)
    getattr(trainer, run)(module, data, ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
@pytest.mark.parametrize("classes", [None, 2, 5])
def test_another_number_of_classes_than_the_data_is_refused(tmp_path, run, classes):
    with pytest.raises(ConfigError, match=rf"data have num_classes = 3 and the module {classes or 6}: .*module to 3"):
        fit(tmp_path, data_of(tiny_pictures(), 3), run=run, num_classes=classes)


def test_names_in_another_order_than_the_data_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'bee' has the number 0 in the data and 1 in the module's class_names"):
        fit(tmp_path, data_of(named("bee", "cat"), 2), num_classes=2, class_names=["cat", "bee"])
    fit(tmp_path, data_of(named("bee", "cat"), 2), num_classes=2, class_names=["Biene", "cat"])


@pytest.mark.parametrize("run", ["fit", "validate"])
def test_a_class_that_moves_the_others_is_refused(tmp_path, run):
    weights = tiny_weights(tmp_path)
    trainer, _ = fit(tmp_path, data_of(named("bee", "cat"), 2), DiTDiffTuningModule(weights, 2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ConfigError, match=r"'bee' has the number 1 in the data and 0 in the checkpoint.*2 of 3"):
        fit(
            tmp_path,
            data_of(named("ant", "bee", "cat"), 3),
            DiTDiffTuningModule(weights, 3),
            run,
            tmp_path / "run.ckpt",
        )
    _, module = fit(
        tmp_path, data_of(named("bee", "cat", "dog"), 3), DiTDiffTuningModule(weights, 3), run, tmp_path / "run.ckpt"
    )
    assert module.dit.class_names == (["bee", "cat", "dog"] if run == "fit" else ["bee", "cat"])


def test_names_given_in_another_order_than_the_checkpoint_are_refused():
    module = SimpleNamespace(class_names=["Katze", "Biene"])
    with pytest.raises(ConfigError, match="'Katze' has the number 0 in class_names and 1 in the checkpoint"):
        check_classes(module, None, ["Biene", "Katze"])
    check_classes(module, None, ["cat", "bee"])


def test_a_number_with_another_name_than_in_the_checkpoint_is_warned_of(recwarn):
    data = SimpleNamespace(num_classes=2, class_names=["bee", "wolf"])
    check_classes(None, data, ["bee", "wolf"])
    check_classes(SimpleNamespace(class_names=["Biene", "Wolf"]), data, ["bee", "cat"])
    assert not recwarn.list
    check_classes(None, data, ["bee", "cat"])
    assert "1 is 'wolf' and was 'cat' (1 in all)" in str(recwarn.pop().message)


@pytest.mark.parametrize(
    "labels", [[1, 2, 3, 3], [-1, 0, 1, 2], [[0], [1], [2], [0]], [0.0, 1.0, 2.0, 0.0], [True, True, False, False]]
)
def test_labels_of_a_loader_that_are_not_class_numbers_are_refused(tmp_path, labels):
    batch = {"target": {"pixel_values": to_pixel_values(PIXELS), "class_labels": torch.tensor(labels)}}
    with pytest.raises(DataError, match=r"class_labels torch\..* from 0 to 2"):
        fit(tmp_path, DataLoader([batch], None), num_classes=3)


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS.float(), 2 * to_pixel_values(PIXELS)])
def test_pixels_of_a_loader_in_another_range_are_refused(tmp_path, pixels):
    batch = {"target": {"pixel_values": pixels, "class_labels": torch.tensor([0, 1, 2, 0])}}
    with pytest.raises(DataError, match=r"pixel_values torch\..*in \[-1, 1\]"):
        fit(tmp_path, DataLoader([batch], None), num_classes=3)


def test_the_pixels_of_a_second_fit_are_looked_at_too(tmp_path):
    pixels, labels = to_pixel_values(PIXELS), torch.tensor([0, 1, 2, 0])
    _, module = fit(tmp_path, DataLoader([{"target": {"pixel_values": pixels, "class_labels": labels}}], None))
    wrong = DataLoader([{"target": {"pixel_values": PIXELS.float(), "class_labels": labels}}], None)
    with pytest.raises(DataError, match=r"pixel_values torch\..*in \[-1, 1\]"):
        fit(tmp_path, wrong, module)


def test_pixels_from_0_to_1_are_warned_of(tmp_path, recwarn):
    for pixels in (to_pixel_values(PIXELS), PIXELS / 255):
        batch = {"target": {"pixel_values": pixels, "class_labels": torch.tensor([0, 1, 2, 0])}}
        recwarn.clear()
        fit(tmp_path, DataLoader([batch], None), num_classes=3)
        warned = [warning for warning in recwarn if "as torchvision's ToTensor makes them" in str(warning.message)]
        assert len(warned) == (pixels.min() >= 0)
