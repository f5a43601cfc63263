from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_difftune.data import image_arrays
from lightning_difftune.data.image_arrays import ArrayImages, NpzImages
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.errors import DataError

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 2, 0])
SPLITS = np.array(["train", "test", "train", "train", "test"])


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def encoded_layout() -> dict[str, np.ndarray]:
    files = [png(picture) for picture in PICTURES]
    return {
        "image_bytes": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": LABELS,
        "class_names": np.array(["a", "b", "c"]),
        "split": SPLITS,
    }


def test_array_images():
    source = ArrayImages(PICTURES, LABELS, ["a", "b", "c"])
    assert len(source) == 5
    assert np.array_equal(source[3][0], PICTURES[3])
    assert [source[i][1] for i in range(5)] == LABELS.tolist()
    assert ArrayImages(PICTURES)[4][1] == 0
    as_tensor = ArrayImages(torch.from_numpy(PICTURES).permute(0, 3, 1, 2))
    assert torch.equal(ImageTargets(as_tensor, 8).uint8([1]), ImageTargets(source, 8).uint8([1]))


def test_array_images_refuse_what_does_not_fit():
    with pytest.raises(DataError, match=r"shape \(5, 8, 8, 3\) and type float32"):
        ArrayImages(PICTURES.astype(np.float32))
    with pytest.raises(DataError, match="at least one"):
        ArrayImages(PICTURES[:0])
    with pytest.raises(DataError, match="5 images, but 2 labels"):
        ArrayImages(PICTURES, [0, 1])
    with pytest.raises(DataError, match="expected one integer per entry"):
        ArrayImages(PICTURES, LABELS / 2)


@pytest.mark.parametrize("layout", ["raw", "encoded"])
def test_npz_layouts_agree(tmp_path, layout):
    arrays = encoded_layout()
    if layout == "raw":
        arrays["images"] = PICTURES
        del arrays["image_bytes"], arrays["offsets"]
    np.savez(tmp_path / "set.npz", **arrays)
    everything, test = NpzImages(tmp_path / "set.npz"), NpzImages(tmp_path / "set.npz", "test")
    assert (len(everything), len(test)) == (5, 2)
    assert test.labels.tolist() == [0, 0]
    assert test.class_names == ["a", "b", "c"]
    expected = torch.from_numpy(PICTURES).permute(0, 3, 1, 2)
    assert torch.equal(ImageTargets(everything, 8).uint8(range(5)), expected)
    assert torch.equal(ImageTargets(test, 8).uint8([0, 1]), expected[[1, 4]])
    assert "entry 4" in test.describe(1)


def test_grey_npz_without_labels(tmp_path):
    np.savez(tmp_path / "set.npz", images=PICTURES[..., 0])
    source = NpzImages(tmp_path / "set.npz")
    assert source.labels.tolist() == [0] * 5
    assert torch.equal(ImageTargets(source, 8, channels=1).uint8([2])[0, 0], torch.from_numpy(PICTURES[2, ..., 0]))


def test_damaged_entry_of_an_npz_is_named(tmp_path):
    arrays = encoded_layout()
    arrays["image_bytes"] = arrays["image_bytes"].copy()
    arrays["image_bytes"][arrays["offsets"][3] :][:20] = 0
    np.savez(tmp_path / "set.npz", **arrays)
    targets = ImageTargets(NpzImages(tmp_path / "set.npz", "train"), 8)
    with pytest.raises(DataError, match=r"image 2 \(entry 3 of .*set\.npz\) cannot be read"):
        targets.uint8([2])
    targets.uint8([0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_bytes": None}, r"holds the arrays class_names, labels, offsets, split; expected `images`"),
        ({"offsets": np.array([0, 9, 3, 4, 5, 6])}, "6 `offsets` do not divide `image_bytes`"),
        ({"offsets": np.array([0, 1, 2, 3, 4, 10**9])}, "do not divide"),
        ({"offsets": np.zeros(0, np.int64)}, "do not divide"),
        ({"labels": LABELS[:3]}, "5 images, but 3 labels"),
        ({"labels": np.array(["x"] * 5)}, "expected one integer per entry"),
        ({"split": SPLITS[:2]}, "2 entries in `split` for 5 images"),
        ({"split": None}, "has no array `split`"),
        ({"split": np.array(["val"] * 5)}, "has no split 'test'; found val"),
        ({"images": PICTURES.astype(np.float32)}, r"`images` has shape \(5, 8, 8, 3\) and type float32"),
        ({"labels": np.array([object()] * 5)}, "never unpickled"),
    ],
)
def test_npz_with_wrong_arrays(tmp_path, change, message):
    arrays = {name: array for name, array in (encoded_layout() | change).items() if array is not None}
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message):
        NpzImages(tmp_path / "set.npz", "test")


def test_npz_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        NpzImages(tmp_path / "set.npz")
    np.savez(tmp_path / "set.npz", **encoded_layout())
    whole = (tmp_path / "set.npz").read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"set\.npz cannot be read as an \.npz file"):
            NpzImages(tmp_path / "set.npz")
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, PICTURES)
    with pytest.raises(DataError, match="single array"):
        NpzImages(tmp_path / "one.npz")


def test_an_archive_that_unpacks_to_far_more_than_pictures_would_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "set.npz", images=np.zeros((4000, 32, 32), np.uint8), labels=np.zeros(4000, int))
    assert len(NpzImages(tmp_path / "set.npz")) == 4000
    monkeypatch.setattr(image_arrays, "_MOST_UNPACKED", 2**20)
    with pytest.raises(DataError, match=r"set\.npz would grow to 0\.0 GB when it is unpacked, \d{3} times its size"):
        NpzImages(tmp_path / "set.npz")
