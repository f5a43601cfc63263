from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from lightning_difftune.data import ArrayImages, ImageFolder, ImageTargets, source_facts
from lightning_difftune.data.derived import joined_by_name
from lightning_difftune.data.source_facts import (
    class_names_of,
    labels_of,
    location_of,
    paths_of,
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


def test_a_picture_of_a_file_is_named_without_looking_at_all_files(tmp_path, monkeypatch):
    """As for each of ten thousand duplicates among a hundred thousand pictures."""
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name)
    source = ImageFolder(tmp_path)
    monkeypatch.setattr(source_facts, "paths_of", None)
    assert location_of(source, 1) == str(tmp_path / "b/1.png")


def test_a_picture_without_a_file_is_named_once():
    held_out = joined_by_name(ArrayImages(np.zeros((2, 8, 8), np.uint8), [0, 1], ["b", "a"]), ["a", "b"])
    assert ImageTargets(held_out, 8).describe(1) == "image 1"


def test_class_names():
    assert class_names_of(Source(classes=["a", "b"])) == ["a", "b"]
    assert class_names_of(Source(categories=("a",))) == ["a"]
    assert class_names_of(Source(classes=[])) is None
    assert class_names_of(Source(classes=[("tench", "Tinca tinca"), ("goldfish",)])) == [
        "tench, Tinca tinca",
        "goldfish",
    ]


def test_names_of_classes_that_a_transform_changes_are_unknown():
    """The names are those of the labels before it."""
    changed = {"classes": ["a", "b"], "target_transform": abs}
    assert class_names_of(Source(**changed)) is None
    assert class_names_of(Subset(ConcatDataset([Source(**changed)]), [0])) is None
    assert class_names_of(Source(**changed, class_names=["both"])) == ["both"]


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
