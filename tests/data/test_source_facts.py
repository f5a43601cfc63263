from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from lightning_difftune.data import ClassCaptions, ImageFolder
from lightning_difftune.data.captioned_files import CaptionedFiles
from lightning_difftune.data.image_arrays import ArrayImages
from lightning_difftune.data.source_facts import (
    array_digest,
    class_names_of,
    content_digest_of,
    labels_of,
    location_of,
    may_change_on_reading,
    paths_of,
    picture_digests_of,
)


class Source:
    """Two items, with the attributes that a test gives it."""

    def __init__(self, **attributes) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    "attributes",
    [
        {"labels": np.array([3, 1])},
        {"targets": [3, 1]},
        {"targets": torch.tensor([3, 1])},
        {"_labels": [3, 1]},
        {"y": [3, 1]},
        {"_samples": [("a.jpg", 3), ("b.jpg", 1)]},
        {"samples": [("a.jpg", 3), ("b.jpg", 1)]},
        {"labels": np.array(["x", "y"]), "targets": [3, 1]},
    ],
)
def test_labels_under_any_of_torchvision_s_names(attributes):
    labels = labels_of(Source(**attributes))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [3, 1]


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"labels": np.zeros((2, 40), int)},  # several attributes a picture, as in CelebA
        {"targets": [0.5, 1.5]},
        {"targets": [3, 1, 2]},
        {"targets": [3, 1], "target_transform": abs},
    ],
)
def test_labels_that_are_unknown(attributes):
    assert labels_of(Source(**attributes)) is None


@pytest.mark.parametrize(
    "attributes",
    [
        {"paths": ["a.jpg", "b.jpg"]},
        {"_image_files": [Path("a.jpg"), Path("b.jpg")]},
        {"_images": ["a.jpg", "b.jpg"]},
        {"_samples": [("a.jpg", 3), ("b.jpg", 1)]},
    ],
)
def test_paths_under_any_of_torchvision_s_names(attributes):
    assert paths_of(Source(**attributes)) == ["a.jpg", "b.jpg"]
    assert location_of(Source(**attributes), 1) == "b.jpg"


def test_unknown_paths():
    assert paths_of(Source(_images=[np.zeros(3), np.zeros(3)])) is None
    assert location_of(Source(), 0) is None


def test_class_names():
    assert class_names_of(Source(classes=["a", "b"])) == ["a", "b"]
    assert class_names_of(Source(categories=("a",))) == ["a"]
    assert class_names_of(Source(classes=[])) is None


def test_subsets_and_concatenations_are_looked_through():
    a = Source(paths=["a.jpg", "b.jpg"], labels=[0, 1], classes=["x", "y"])
    b = Source(paths=["c.jpg", "d.jpg"], labels=[2, 3])
    both = ConcatDataset([a, b])
    chosen = Subset(both, [3, 0])
    assert labels_of(chosen).tolist() == [3, 0]
    assert paths_of(chosen) == ["d.jpg", "a.jpg"]
    assert location_of(chosen, 0) == "d.jpg"
    assert class_names_of(Subset(a, [1])) == ["x", "y"]
    assert labels_of(ConcatDataset([a, Source()])) is None


def test_pictures_may_change_on_reading_by_a_transform_or_by_code_of_one_s_own(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    ours, own, tells = ImageFolder(tmp_path), Source(paths=["a", "b"]), Source(content_digest=lambda: "1")
    for source in (ours, tells, Subset(ours, [0]), ConcatDataset([ours, tells])):
        assert not may_change_on_reading(source)
    transformed = ImageFolder(tmp_path)
    transformed.transform = abs
    for source in (own, transformed, Subset(own, [0]), ConcatDataset([ours, own]), ClassCaptions(transformed)):
        assert may_change_on_reading(source)
    assert picture_digests_of(own) is picture_digests_of(tells) is picture_digests_of(transformed) is None
    assert picture_digests_of(Source(paths=["a", "b"], picture_digests=lambda: ["1", "2"])) == ["1", "2"]


def test_what_a_class_of_one_s_own_inherits_does_not_know_how_it_reads():
    class Reads:
        def __getitem__(self, index):
            return np.zeros((4, 4), np.uint8), 0

        __getitems__ = None  # PyTorch asks it of a Subset

    class Inverted(Reads, ArrayImages):
        pass

    class Told(Inverted):
        def content_digest(self) -> str:
            return "inverted"

    class Renamed(ArrayImages):
        """Reads as its base does."""

    class Part(Reads, Subset):
        pass

    images = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    for own in (Inverted(images), Subset(Inverted(images), [0]), Part(ArrayImages(images), [0])):
        assert may_change_on_reading(own)
        assert picture_digests_of(own) is None
    assert not may_change_on_reading(Told(images))
    assert picture_digests_of(Told(images)) is None
    for same in (Renamed(images), Subset(Renamed(images), [0, 1])):
        assert not may_change_on_reading(same)
        assert picture_digests_of(same) == picture_digests_of(ArrayImages(images))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Subset(s, [1, 0]), lambda s: ConcatDataset([s, s])])
def test_digests_of_whatever_wraps_a_source_know_all_that_it_knows(tmp_path, wrap):
    files = [str(tmp_path / name) for name in ("1.png", "2.png", "map-1.png", "map-2.png")]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    facts = {"paths": files[:2], "control_paths": files[2:]}
    digests = {content_digest_of(wrap(Source(**facts))), content_digest_of(wrap(CaptionedFiles(files[:2], "ab")))}
    mapped = CaptionedFiles(files[:2], "ab", files[2:])
    before = picture_digests_of(wrap(mapped))
    assert content_digest_of(wrap(mapped)) in digests
    os.utime(files[2], (1, 1))  # a control map is drawn again
    digests |= {content_digest_of(wrap(mapped)), content_digest_of(wrap(Source(**facts, content_digest=lambda: "1")))}
    digests.add(content_digest_of(wrap(Source(**facts, content_digest=lambda: "2"))))
    assert len(digests) == 5
    changed = [a != b for a, b in zip(before, picture_digests_of(wrap(mapped)), strict=True)]
    assert sum(changed) == len(changed) // 2


def test_content_digest_of_subsets_of_arrays():
    source = ArrayImages(np.arange(32, dtype=np.uint8).reshape(2, 4, 4))
    digests = {content_digest_of(Subset(source, indices)) for indices in ([0], [1], [0, 1], [1, 0])}
    assert len(digests) == 4
    assert None not in digests
    assert content_digest_of(Source()) is None
    torchvision_style = Source(data=np.zeros((2, 4, 4), np.uint8))
    assert content_digest_of(torchvision_style) != content_digest_of(Source(data=np.ones((2, 4, 4), np.uint8)))


def test_missing_files_have_a_digest(tmp_path):
    source = Source(paths=[str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")])
    before = content_digest_of(source)
    (tmp_path / "a.jpg").write_bytes(b"now there")
    assert content_digest_of(source) != before


def test_digest_tells_shapes_types_and_boundaries_apart():
    zeros = np.zeros(4, np.uint8)
    parts = [(zeros,), (zeros.reshape(2, 2),), (zeros.view(np.int8),), (zeros[:2], zeros[2:]), ("ab", "c"), ("a", "bc")]
    assert len({array_digest(*part) for part in parts}) == len(parts)
