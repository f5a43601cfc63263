"""Digests of sources, also of those that wrap others."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from lightning_difftune.data import ClassCaptions, ImageFolder
from lightning_difftune.data.captioned_files import CaptionedFiles
from lightning_difftune.data.digests import content_digest_of, may_change_on_reading, picture_digests_of
from lightning_difftune.data.image_arrays import ArrayImages
from lightning_difftune.files import array_digest


class Source:
    """Two items, with the attributes that a test gives it."""

    def __init__(self, **attributes) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 2


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
