"""MemoryBankDataModule on its own; with a Trainer it is tested with the modules."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import quiet_trainer

from lightning_difftune import MemoryBank, MemoryBankDataModule
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import ConfigError, DataError


def pictures(count=20, classes=4):
    rng = np.random.default_rng(0)
    return ArrayImages(rng.integers(0, 256, (count, 8, 8), dtype=np.uint8), np.arange(count) % classes)


class Zeros:
    """The generator of a bank of zeros."""

    def bank_spec(self):
        return {"weights": "none"}

    def generate_bank(self, indices):
        return {"latents": torch.zeros(len(indices), 1, 8, 8)}


def data_of(target=None, **settings):
    settings = {"num_classes": 4, "image_size": 8, "channels": 1, "batch_size": 8} | settings
    return MemoryBankDataModule(target if target is not None else pictures(), **settings)


@pytest.mark.parametrize(
    ("batch_size", "share", "retained"), [(32, 0.2, 6), (32, 0.5, 16), (5, 0.2, 1), (4, 0.5, 2), (100, 0.29, 29)]
)
def test_shares_follow_the_official_rounding(tmp_path, batch_size, share, retained):
    data = data_of(bank=tmp_path, batch_size=batch_size, retention_share=share)
    assert data.retention_batch_size == retained


def test_a_batch_size_assigned_later_that_leaves_no_bank_sample_is_said(tmp_path):
    data = data_of(bank=MemoryBank.build(tmp_path / "bank", Zeros(), 6).path)
    data.batch_size = 4
    with pytest.warns(UserWarning, match=r"int\(0.2 \* 4\) = 0 bank samples in a batch of 4"):
        data.train_dataloader()


def test_without_a_bank_the_whole_batch_is_target():
    (batch,) = [batch for batch, _ in zip(data_of().train_dataloader(), range(1), strict=False)]
    assert batch["target"]["pixel_values"].shape == (8, 1, 8, 8)
    assert "retention" not in batch


def test_flips_mirror_about_half_of_the_pictures():
    data, plain = data_of(horizontal_flip=True, batch_size=20), data_of(batch_size=20)
    mirrored = 0
    for step in range(10):
        one = data.train_dataloader().dataset[step]["target"]["pixel_values"]
        other = plain.train_dataloader().dataset[step]["target"]["pixel_values"]
        same = [torch.equal(a, b) for a, b in zip(one, other, strict=True)]
        assert all(s or torch.equal(a.flip(-1), b) for s, a, b in zip(same, one, other, strict=True))
        mirrored += 20 - sum(same)
    assert 70 < mirrored < 130


def test_validation_reads_every_picture_in_order():
    data = data_of(val_target=pictures(11), batch_size=4)
    labels = torch.cat([batch["target"]["class_labels"] for batch in data.val_dataloader()])
    assert labels.tolist() == [i % 4 for i in range(11)]


def test_validation_reads_every_picture_once_over_all_processes():
    found = []
    for rank in range(3):
        data = data_of(val_target=pictures(11, classes=11), num_classes=11)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        found.append([int(label) for batch in data.val_dataloader() for label in batch["target"]["class_labels"]])
    assert found == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_measuring_on_no_held_out_pictures_is_refused(command, tmp_path):
    trainer = quiet_trainer(tmp_path, 1)
    with pytest.raises(ConfigError, match="Set val_target"):
        getattr(trainer, command)(BoringModel(), data_of(), verbose=False)


def test_reference_pictures_are_the_ones_asked_for():
    data = data_of(val_target=pictures(11), build_batch_size=4)
    assert [len(batch) for batch in data.reference_images()] == [4, 4, 3]
    train = data_of(val_target=pictures(11), reference="train")
    assert sum(len(batch) for batch in train.reference_images()) == 20
    assert data.reference_identity() != train.reference_identity()


def test_examples_of_a_class_are_found_by_its_name():
    named = ArrayImages(
        np.arange(12, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2), [i % 3 for i in range(12)]
    )
    data = data_of(named, num_classes=3)
    assert data.examples_of("class 1", 3)[:, 0, 0, 0].tolist() == [1, 4, 7]
    assert data.examples_of("class 1", 3, skip=3)[:, 0, 0, 0].tolist() == [10]
    assert data.examples_of("class 7", 3).shape == (0, data.target.channels, 8, 8)


def test_captions_come_in_the_batch():
    source = [(np.full((8, 8), 10 * i, np.uint8), f"grey {i}") for i in range(8)]
    (batch,) = data_of(source, num_classes=None).train_dataloader()
    levels = ((batch["target"]["pixel_values"][:, 0, 0, 0] + 1) * 127.5).round()
    assert batch["target"]["captions"] == [f"grey {int(level) // 10}" for level in levels]
    assert "class_labels" not in batch["target"]


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"int\(0.1 \* 8\) = 0 bank samples"):
        data_of(bank=tmp_path, retention_share=0.1)
    with pytest.raises(ConfigError, match=r"retention_share must be in \[0, 1\)"):
        data_of(bank=tmp_path, retention_share=1.0)
    with pytest.raises(DataError, match="outside the label table"):
        data_of(num_classes=3)
    with pytest.raises(ConfigError, match="num_classes is not set"):
        data_of(num_classes=None)
    with pytest.raises(DataError, match=r"image \d+ has a caption, but num_classes = 4"):
        next(iter(data_of([(np.zeros((8, 8), np.uint8), "a cat")] * 8).train_dataloader()))
    with pytest.raises(ConfigError, match="no held-out pictures"):
        next(data_of().reference_images())
    with pytest.raises(ConfigError, match="predict builds the memory bank"):
        data_of().predict_dataloader()
    with pytest.raises(ConfigError, match="no bank_generator to encode the pictures of bank_source"):
        data_of(bank=tmp_path, bank_source="target", retention_share=0.5).train_dataloader()
    with pytest.raises(ConfigError, match="no autoencoder"):
        data_of(latent_cache=tmp_path).train_dataloader()


def test_balanced_classes_come_equally_often():
    tail = ArrayImages(np.zeros((43, 8, 8), np.uint8), [0] * 40 + [1, 1] + [3])
    data = data_of(tail, class_balanced=True, batch_size=6)
    labels = torch.cat([data.train_dataloader().dataset[step]["target"]["class_labels"] for step in range(20)])
    assert torch.bincount(labels, minlength=4).tolist() == [40, 40, 0, 40]


def test_balance_needs_labels():
    unknown = [(np.zeros((8, 8), np.uint8), 0)]
    with pytest.raises(ConfigError, match="class_balanced needs the classes"):
        data_of(unknown, class_balanced=True).train_dataloader()


def test_small_classes_are_told_when_a_run_starts(caplog):
    source = ArrayImages(
        np.zeros((23, 8, 8), np.uint8), [0] * 12 + [1] * 3 + [2] * 8, class_names=["ant", "bee", "cat"]
    )
    data = data_of(source)
    with caplog.at_level("INFO"):
        data.setup("validate")
        assert caplog.text == ""
        data.setup("fit")
    assert "3 of 4 classes have fewer than 10 pictures" in caplog.text
    assert "bee 3, cat 8. Samples" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        data_of(ArrayImages(np.zeros((40, 8, 8), np.uint8), np.arange(40) % 4)).setup("fit")
        data_of([(np.zeros((8, 8), np.uint8), "a caption")], num_classes=None).setup("fit")
    assert caplog.text == ""
