"""Classes of target and held-out pictures agree: matched by name, and checked when the data is created."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from lightning_difftune.data import ArrayImages, HubImages, ImageFolder, ImageSource, ListedImages, MemoryBankDataModule
from lightning_difftune.data.digests import content_digest_of
from lightning_difftune.data.source_facts import class_names_of
from lightning_difftune.errors import ConfigError, DataError

TARGET, HELD_OUT = ["daisy", "rose", "tulip"], ["daisy", "tulip"]


def source_of(kind: str, folder: Path, names: list[str]) -> Any:
    """Two pictures of each class; a picture's level is the first letter of its class."""
    pictures = [np.full((8, 8), ord(name[0]), np.uint8) for name in names for _ in range(2)]
    labels = [number for number in range(len(names)) for _ in range(2)]
    if kind == "arrays":
        return ArrayImages(np.stack(pictures), labels, class_names=names)
    files = []
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        path = folder / names[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        files.append(str(path))
    if kind == "folders":
        return ImageFolder(folder)
    if kind == "a list":
        rows = [f"{file},{names[label]}" for file, label in zip(files, labels, strict=True)]
        (folder / "list.csv").write_text("\n".join(["image_path,class_id", *rows]))
        return ListedImages(folder, folder / "list.csv")
    column = [names[label] for label in labels] if kind == "hub, strings" else labels
    made = datasets.Dataset.from_dict({"image": files, "label": column}).cast_column("image", datasets.Image())
    return HubImages(made if kind == "hub, strings" else made.cast_column("label", datasets.ClassLabel(names=names)),
                     label_column="label")  # fmt: skip


def data_of(target: Any, held_out: Any, **settings: Any) -> MemoryBankDataModule:
    given = {"num_classes": 3, "image_size": 8, "channels": 1, "batch_size": 4, "val_target": held_out}
    return MemoryBankDataModule(target, **{**given, **settings})


def shown(data: MemoryBankDataModule) -> list[str]:
    """The class that each held-out picture has been given."""
    assert data.val_target is not None
    names = data.class_names
    assert names is not None
    items = [data.val_target.read(index) for index in range(len(data.val_target))]
    assert all(names[int(item.label)][0] == chr(int(item.pixels[0, 0, 0])) for item in items)
    known = data.val_target.labels()
    assert known is not None
    assert known.tolist() == [item.label for item in items]
    return [names[int(item.label)] for item in items]


KINDS = ["folders", "a list", "arrays", "hub", "hub, strings"]


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_joined_by_name(tmp_path: Path, kind: str) -> None:
    target, held_out = source_of(kind, tmp_path / "a", TARGET), source_of(kind, tmp_path / "b", HELD_OUT)
    data = data_of(target, held_out)
    assert shown(data) == ["daisy", "daisy", "tulip", "tulip"]
    assert data.val_target is not None
    assert data.val_target.class_names == TARGET


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_the_target_does_not_have_is_named(tmp_path: Path, kind: str) -> None:
    target, held_out = source_of(kind, tmp_path / "a", TARGET), source_of(kind, tmp_path / "b", ["daisy", "lily"])
    with pytest.raises(DataError, match=r"val_target has classes that the target does not have: lily\. The target's"):
        data_of(target, held_out)


def test_two_kinds_of_source_are_joined(tmp_path: Path) -> None:
    target = source_of("folders", tmp_path / "a", [unicodedata.normalize("NFD", name) for name in ("élan", "rose")])
    held_out = source_of("arrays", tmp_path, ["rose", "élan"])
    data = MemoryBankDataModule(target, num_classes=2, image_size=8, channels=1, batch_size=4, val_target=held_out)
    assert data.val_target is not None
    assert data.val_target.labels().tolist() == [1, 1, 0, 0]  # type: ignore[union-attr]
    one, other = (MemoryBankDataModule(target, 2, 8, 1, val_target=source).val_target for source in
                  (held_out, source_of("arrays", tmp_path, ["élan", "rose"])))  # fmt: skip
    assert one is not None
    assert other is not None
    assert one.identity() != other.identity()


def test_parts_of_one_source_stay_as_they_are(tmp_path: Path) -> None:
    source = source_of("folders", tmp_path, TARGET)
    held_out = Subset(source, [0, 5])
    data = data_of(Subset(source, [1, 2, 3, 4]), held_out)
    assert data.val_target is not None
    assert data.val_target.source is held_out
    assert shown(data) == ["daisy", "tulip"]


def test_pictures_of_an_unknown_class_that_are_not_used_do_not_matter(tmp_path: Path) -> None:
    held_out = source_of("arrays", tmp_path, ["daisy", "lily"])
    assert shown(data_of(source_of("arrays", tmp_path, TARGET), Subset(held_out, [0, 1]))) == ["daisy", "daisy"]


def test_held_out_labels_that_a_transform_changes_are_those_of_the_target(tmp_path: Path) -> None:
    """Joined by the names of the labels before it, each tulip (1 here, 2 of the target) would be moved twice."""
    source_of("folders", tmp_path, HELD_OUT)
    held_out = torchvision.datasets.ImageFolder(tmp_path, target_transform=lambda label: 2 * label)
    for wrapped in (held_out, Subset(Subset(held_out, [1, 2]), [0, 1]), ConcatDataset([held_out])):
        data = data_of(source_of("arrays", tmp_path, TARGET), wrapped)
        assert data.val_target is not None
        items = [data.val_target.read(index) for index in (0, len(wrapped) - 1)]
        assert [(item.label, chr(int(item.pixels[0, 0, 0]))) for item in items] == [(0, "d"), (2, "t")]


@pytest.mark.parametrize("label", [3, -1])
def test_labels_of_held_out_pictures_are_checked_at_once(label: int) -> None:
    target, held_out = (ArrayImages(np.zeros((3, 8, 8), np.uint8), [0, 1, last]) for last in (2, label))
    with pytest.raises(DataError, match=rf"label {label} of image 2 is outside the label table"):
        data_of(target, held_out)


def test_a_chain_of_sources_that_number_differently_is_refused(tmp_path: Path) -> None:
    first, second = (source_of("folders", tmp_path / name, names) for name, names in (("a", TARGET), ("b", HELD_OUT)))
    with pytest.raises(DataError, match="the parts of a ConcatDataset number their classes differently"):
        data_of(ConcatDataset([first, second]), None)
    with pytest.raises(DataError, match="the parts of a ConcatDataset number their classes differently"):
        data_of(first, ConcatDataset([first, second]))
    assert class_names_of(ConcatDataset([first, first])) == TARGET


class Walked(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


class Lengthless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return np.zeros((8, 8), np.uint8), 0


@pytest.mark.parametrize("wrong", [Walked(), Lengthless(), iter([1]), DataLoader([(1, 2)])])
@pytest.mark.parametrize("role", ["target", "val_target", "bank_source"])
def test_sources_without_numbers_get_a_sentence(wrong: Any, role: str) -> None:
    good = ArrayImages(np.zeros((3, 8, 8), np.uint8))
    given = {"target": good, "num_classes": 1, "image_size": 8, "channels": 1, "bank_size": 1}
    with pytest.raises(DataError, match=r"Expected a map-style data set of \(image, label\)"):
        MemoryBankDataModule(**{**given, role: wrong})


def deep(bits: int, count: int = 5) -> list[tuple[Any, int]]:
    values = np.random.default_rng(0).integers(0, 2**bits, (count, 8, 8)).astype(np.uint16)
    values[:, 0, 0] = 2**bits - 1
    return [(picture if number % 2 else Image.fromarray(picture), 0) for number, picture in enumerate(values)]


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_pictures_of_fewer_than_16_bits_are_refused(bits: int) -> None:
    data = MemoryBankDataModule(deep(bits), num_classes=1, image_size=8, channels=1)  # type: ignore[arg-type]
    largest = f"{2**bits - 1:,}"
    with pytest.raises(DataError, match=rf"up to {largest} of 65,535: they hold {bits} bits.*by {2 ** (16 - bits)}"):
        data.setup("fit")


def test_colour_of_12_bits_is_refused_too(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")  # Pillow writes no colour of 16 bits
    for bits in (12, 16):
        values = np.random.default_rng(0).integers(0, 2**bits, (20, 20, 3)).astype(np.uint16)
        cv2.imwrite(str(tmp_path / f"{bits}.png"), values)

    class Opened(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            return Image.open(super().__getitem__(index)), 0

    good, bad = (MemoryBankDataModule(Opened([tmp_path / f"{bits}.png"]), 1, 8, 3) for bits in (16, 12))  # type: ignore[arg-type]
    good.setup("fit")
    with pytest.raises(DataError, match="they hold 12 bits"):
        bad.setup("fit")


def test_pictures_of_16_bits_are_fine_and_one_dark_one_too() -> None:
    for source in (deep(16), [*deep(12, 2), *deep(16, 1)], [(np.zeros((8, 8), np.uint8), 0)]):
        MemoryBankDataModule(source, num_classes=1, image_size=8, channels=1).setup("fit")  # type: ignore[arg-type]


def test_a_source_of_your_own_offers_what_it_has(tmp_path: Path) -> None:
    class Own:
        class_names = ("tulip", "rose")
        labels = (0, 1)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Any, ...]:
            return np.full((8, 8), ord(self.class_names[index][0]), np.uint8), self.labels[index]

        def content_digest(self) -> str:
            return "version 1"

    own: ImageSource = Own()
    data = data_of(source_of("arrays", tmp_path, TARGET), own)
    assert shown(data) == ["tulip", "rose"]
    assert content_digest_of(data.val_target.source) is not None  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="num_classes is not set"):
        data_of(own, None, num_classes=None)
