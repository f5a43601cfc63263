from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lightning_difftune.data.image_arrays import ArrayImages
from lightning_difftune.data.image_files import ImageFolder
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.real_pictures import check_labels
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.pictures import to_pixels

PICTURES = np.random.default_rng(0).integers(0, 256, (12, 20, 28, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3


def jpeg(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        path = tmp_path / "set" / f"class{label}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(picture))
    return tmp_path / "set"


def test_batch_is_the_cropped_pictures_scaled_and_labelled():
    targets = ImageTargets(ArrayImages(PICTURES, LABELS), 8)
    batch = targets.pixels([5, 2, 5], flips=[False, True, False])
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["class_labels"].dtype == torch.int64
    assert batch["class_labels"].tolist() == [2, 2, 2]
    for row, (index, flip) in enumerate([(5, False), (2, True), (5, False)]):
        plain = to_pixels(PICTURES[index], 8, 3).astype(float)
        plain = plain[:, :, ::-1] if flip else plain
        np.testing.assert_allclose(batch["pixel_values"][row].numpy(), plain / 127.5 - 1, atol=1e-6)
    assert torch.equal(targets.uint8([2]).flip(-1).float() / 127.5 - 1, batch["pixel_values"][1:2])


def test_grey_targets_have_one_channel():
    targets = ImageTargets(ArrayImages(PICTURES, LABELS), 8, channels=1)
    assert targets.uint8([0, 1]).shape == (2, 1, 8, 8)
    black_and_white = ImageTargets(
        ArrayImages(np.stack([np.zeros((9, 9)), np.full((9, 9), 255)]).astype(np.uint8)), 9, 1
    )
    values = black_and_white.pixels([0, 1], [False, False])["pixel_values"]
    assert values[0].unique().tolist() == [-1.0]
    assert values[1].unique().tolist() == [1.0]


def test_flips_must_match_the_indices():
    with pytest.raises(ValueError, match="zip"):
        ImageTargets(ArrayImages(PICTURES), 8).pixels([0, 1], [True])


def test_index_outside_is_refused():
    targets = ImageTargets(ArrayImages(PICTURES), 8)
    for index in (-1, 12):
        with pytest.raises(IndexError, match="of 12 images"):
            targets.read(index)


def test_labels_and_class_names_come_from_the_source(folder):
    targets = ImageTargets(ImageFolder(folder), 8)
    assert targets.labels().tolist() == sorted(LABELS.tolist())
    assert targets.class_names == ["class0", "class1", "class2"]
    pairs = ImageTargets([(PICTURES[0], 4)], 8)
    assert pairs.labels() is None
    assert pairs.class_names is None
    assert pairs.pixels([0], [False])["class_labels"].tolist() == [4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"channels": 2}, "channels is 2; expected 1"),
        ({"on_corrupt": "ignore"}, "'error' or 'skip'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        ImageTargets(ArrayImages(PICTURES), **{"image_size": 8, **settings})


def test_empty_source():
    with pytest.raises(DataError, match=r"\(list\) is empty"):
        ImageTargets([], 8)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(b"<html>404</html>" * 30)


DAMAGES = {
    "truncated": (truncate, "truncated"),
    "empty": (empty, "cannot identify image file"),
    "no picture": (scramble, "cannot identify image file"),
    "missing": (Path.unlink, "No such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_named_and_refused(folder, damage):
    source = ImageFolder(folder)
    spoil, reason = DAMAGES[damage]
    spoil(Path(source.paths[3]))
    targets = ImageTargets(source, 8)
    with pytest.raises(DataError, match=rf"image 3 \({re.escape(source.paths[3])}\).*{reason}.*on_corrupt='skip'"):
        targets.pixels([1, 2, 3], [False] * 3)
    targets.pixels([0, 1, 2, 4], [False] * 4)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_skipped_for_the_next_readable_one(folder, damage):
    source = ImageFolder(folder)
    spoil, reason = DAMAGES[damage]
    for index in (3, 4, 11):
        spoil(Path(source.paths[index]))
    targets = ImageTargets(source, 8, on_corrupt="skip")
    with pytest.warns(UserWarning, match=rf"image (3|4|11) .*{reason}") as caught:
        items = [targets.read(index) for index in (3, 4, 11, 5)]
    assert [item.source_index for item in items] == [5, 5, 0, 5]
    assert [item.label for item in items] == [1, 1, 0, 1]
    assert torch.equal(items[0].pixels, items[3].pixels)
    assert len(caught) == 3
    assert str(caught[0].message).startswith(f"image 3 ({source.paths[3]})")
    assert "3 skipped so far" in str(caught[2].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert targets.read(4).source_index == 5
    assert set(targets.skipped) == {3, 4, 11}


def test_skipping_does_not_depend_on_the_order_of_reading(folder):
    source = ImageFolder(folder)
    for index in (3, 4):
        empty(Path(source.paths[index]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward = ImageTargets(source, 8, on_corrupt="skip").uint8(range(12))
        backward = ImageTargets(source, 8, on_corrupt="skip").uint8(range(11, -1, -1)).flip(0)
    assert torch.equal(forward, backward)


def test_a_whole_damaged_set_is_an_error_even_when_skipping(folder):
    source = ImageFolder(folder)
    for path in source.paths:
        empty(Path(path))
    targets = ImageTargets(source, 8, on_corrupt="skip")
    with pytest.warns(UserWarning, match="cannot be read"):  # noqa: SIM117, the error must not hide the warnings
        with pytest.raises(DataError, match=r"none of 12 pictures in a row from image 7 .*because"):
            targets.read(7)


def test_decompression_bomb_is_a_damaged_picture(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"image 0 .*DecompressionBombError"):
        ImageTargets(ImageFolder(folder), 8).read(0)


class Raising(Dataset):
    """A source whose second picture meets an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == 1:
            raise self.error
        return PICTURES[index], 0


def test_errors_of_the_machine_are_not_the_picture_s():
    for error in (OSError(24, "Too many open files"), MemoryError()):
        with pytest.raises(type(error)):
            ImageTargets(Raising(error), 8, on_corrupt="skip").read(1)


@pytest.mark.parametrize(
    "error", [SyntaxError("broken PNG file"), RuntimeError("jpeg decode"), PermissionError(13, "no")]
)
def test_whatever_decoders_raise_is_a_damaged_picture(error):
    with pytest.raises(DataError, match=f"image 1 cannot be read .{type(error).__name__}"):
        ImageTargets(Raising(error), 8).read(1)


def test_torchvision_folders_are_read_as_they_are(folder):
    from torchvision.datasets import ImageFolder as TorchvisionFolder

    theirs, ours = TorchvisionFolder(str(folder)), ImageFolder(folder)
    targets = ImageTargets(theirs, 8)
    assert targets.labels().tolist() == ours.labels.tolist()
    assert targets.class_names == ours.class_names
    assert torch.equal(targets.uint8(range(12)), ImageTargets(ours, 8).uint8(range(12)))
    truncate(Path(ours.paths[6]))
    with pytest.raises(DataError, match=re.escape(ours.paths[6])):
        targets.read(6)


def test_caltech101_names_its_damaged_file(tmp_path):
    from torchvision.datasets import Caltech101

    names = ["BACKGROUND_Google", "accordion", "airplanes"]
    for name in names:
        path = tmp_path / "caltech101" / "101_ObjectCategories" / name / "image_0001.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(PICTURES[0, ..., 0]))  # some of its pictures are grey
    truncate(tmp_path / "caltech101" / "101_ObjectCategories" / "airplanes" / "image_0001.jpg")
    targets = ImageTargets(Caltech101(str(tmp_path)), 8)
    assert targets.labels().tolist() == [0, 1]
    assert targets.class_names == ["accordion", "airplanes"]
    assert targets.uint8([0]).shape == (1, 3, 8, 8)
    with pytest.raises(DataError, match=r"image 1 .*airplanes/image_0001\.jpg.* cannot be read"):
        targets.read(1)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (PICTURES[0], r"image 0: the data set yields ndarray; expected \(image, label\)"),
        ((PICTURES[0], 1.5), r"image 0: the label is 1\.5 \(float\); expected an integer"),
        ((torch.zeros(3, 8, 8), 0), r"image 0: the data set yields an array of shape \(8, 8, 3\) and type float32"),
    ],
)
def test_wrong_items_are_refused_even_when_skipping(item, message):
    with pytest.raises(DataError, match=message):
        ImageTargets([item], 8, on_corrupt="skip").read(0)


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2), True + True])
def test_labels_of_any_integer_type(label):
    assert ImageTargets([(PICTURES[0], label)], 8).read(0).label == 2


def test_identity_of_a_folder_changes_with_what_the_pictures_are(folder):
    def identity(**settings) -> str:
        return ImageTargets(ImageFolder(folder), **{"image_size": 8, **settings}).identity()

    first = identity()
    assert identity() == first
    assert len({first, identity(image_size=9), identity(channels=1)}) == 3
    path = folder / "class1" / "04.jpg"
    content, time = path.read_bytes(), path.stat().st_mtime
    path.write_bytes(content + b"x")
    os.utime(path, (time, time))
    longer = identity()
    path.write_bytes(content)
    os.utime(path, (time + 60, time + 60))
    newer = identity()
    os.utime(path, (time, time))
    assert identity() == first
    path.rename(folder / "class1" / "05.jpg")
    renamed = identity()
    (folder / "class1" / "05.jpg").rename(folder / "class2" / "04.jpg")
    assert len({first, longer, newer, renamed, identity()}) == 5


def test_identity_does_not_depend_on_where_the_folder_is(folder):
    first = ImageTargets(ImageFolder(folder), 8).identity()
    folder.rename(folder.parent / "elsewhere")
    assert ImageTargets(ImageFolder(folder.parent / "elsewhere"), 8).identity() == first


def test_identity_of_arrays_is_that_of_their_bytes_and_labels():
    def identity(pictures=PICTURES, labels=LABELS) -> str:
        return ImageTargets(ArrayImages(pictures, labels), 8).identity()

    altered = PICTURES.copy()
    altered[7, 3, 3, 0] ^= 1
    other = LABELS.copy()
    other[0] = 2
    assert identity(PICTURES.copy()) == identity()
    assert len({identity(), identity(altered), identity(labels=other), identity(PICTURES[:11], LABELS[:11])}) == 4


def test_identity_of_any_other_source_looks_at_its_pictures():
    pairs = list(zip(PICTURES, LABELS.tolist(), strict=True))
    mirrored = [(picture[:, ::-1], label) for picture, label in pairs]
    assert ImageTargets(pairs, 8).identity() == ImageTargets(list(pairs), 8).identity()
    assert ImageTargets(pairs, 8).identity() != ImageTargets(mirrored, 8).identity()


def test_identity_notices_a_transform(folder):
    from torchvision.datasets import ImageFolder as TorchvisionFolder
    from torchvision.transforms import RandomHorizontalFlip

    plain = ImageTargets(TorchvisionFolder(str(folder)), 8).identity()
    transformed = TorchvisionFolder(str(folder), transform=RandomHorizontalFlip(p=1.0))
    assert ImageTargets(transformed, 8).identity() != plain


def test_targets_travel_to_worker_processes(folder):
    targets = ImageTargets(ImageFolder(folder), 8)
    assert torch.equal(pickle.loads(pickle.dumps(targets)).uint8([1]), targets.uint8([1]))

    class Reads(Dataset):
        def __len__(self) -> int:
            return len(targets)

        def __getitem__(self, index: int) -> torch.Tensor:
            return targets.uint8([index])

    read = list(DataLoader(Reads(), batch_size=None, num_workers=1))
    assert torch.equal(torch.cat(read), targets.uint8(range(12)))


def test_check_labels():
    check_labels(torch.tensor([0, 101]), 102, str)
    with pytest.raises(DataError, match=r"label 102 of image 1 is outside .* 102 classes are 0\.\.101 .*at least 104"):
        check_labels(torch.tensor([0, 102, 103]), 102, "image {}".format)
    with pytest.raises(DataError, match=r"label -1 of image 2 .*\(1 of 3 labels are outside\); give every"):
        check_labels([0, 1, -1], 2, "image {}".format)


class Labelled:
    """A data set of one's own that tells its labels only with the pictures."""

    def __init__(self, labels, **facts):
        self.own = labels
        vars(self).update(facts)

    def __len__(self):
        return len(self.own)

    def __getitem__(self, index):
        return PICTURES[index], self.own[index]


@pytest.mark.parametrize("facts", [{}, {"content_digest": lambda: "version 1"}])
def test_identity_knows_labels_that_only_the_pictures_tell(facts):
    """A latent cache stores labels: under an identity without them, corrected ones would have no effect."""
    first, same, corrected = (
        ImageTargets(Labelled(labels, **facts), 8).identity() for labels in ([0, 1], [0, 1], [0, 2])
    )
    assert first == same != corrected
