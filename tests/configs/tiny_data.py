"""The data sets that configs read, in their real layouts, with a dozen flat pictures each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_difftune.models import DiT, export_dit

Save = Callable[[Path], None]  # makes a picture of that name


class Pictures:
    """Flat grey pictures, a new level each, so that a picture is recognised wherever it turns up."""

    def __init__(self) -> None:
        self.level = 0

    def __call__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.level += 3
        # PNG in a file that says .jpg: readers go by the content, and the levels stay exact.
        Image.new("RGB", (12, 9), (self.level,) * 3).save(path, format="PNG")


class Scenes:
    """Pictures of a few coloured blocks, so that there is something to annotate."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = self.generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(path, format="PNG")


def make_food101(data: Path, save: Save) -> None:
    folder = data / "food101/food-101"
    for split, numbers in {"train": range(3), "test": range(3, 5)}.items():
        names = {dish: [f"{dish}/{number}" for number in numbers] for dish in ("apple_pie", "baby_back_ribs")}
        for path in chain(*names.values()):
            save(folder / "images" / f"{path}.jpg")
        (folder / "meta").mkdir(exist_ok=True)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(names))


def make_sun397(data: Path, save: Save) -> None:
    folder = data / "sun397/SUN397"
    for number in range(16):
        save(folder / ("a/abbey", "b/bow_window/indoor")[number % 2] / f"sun_{number:04d}.jpg")
    (folder / "ClassName.txt").write_text("/a/abbey\n/b/bow_window/indoor\n")


def make_df20_mini(data: Path, save: Save) -> None:
    folder = data / "df20_mini"
    for split, numbers in {"train": range(6), "public_test": range(6, 10)}.items():
        rows = ["observationID,image_path,scientificName"]
        for number in numbers:
            save(folder / "DF20M" / f"{number}-1.JPG")
            species = ("Boletus edulis Bull.", '"Amanita muscaria (L.) Lam., 1783"')[number % 2]
            rows.append(f"{number},{number}-1.JPG,{species}")
        (folder / f"DF20M-{split}_metadata_PROD.csv").write_text("\n".join(rows))


def make_caltech101(data: Path, save: Save) -> None:
    for category in ("BACKGROUND_Google", "Faces", "accordion"):
        for number in range(1, 11):
            save(data / "caltech101/101_ObjectCategories" / category / f"image_{number:04d}.jpg")


def make_cub200(data: Path, save: Save) -> None:
    folder = data / "cub200/CUB_200_2011"
    birds = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross"}
    files = {number: f"{birds[number % 2 + 1]}/{number}.jpg" for number in range(1, 11)}
    for file in files.values():
        save(folder / "images" / file)
    for name, lines in {
        "images": files,
        "image_class_labels": {number: number % 2 + 1 for number in files},
        "train_test_split": {number: int(number <= 6) for number in files},
        "classes": birds,
    }.items():
        (folder / f"{name}.txt").write_text("".join(f"{key} {value}\n" for key, value in lines.items()))


def make_artbench10(data: Path, save: Save) -> None:
    for split, count in {"train": 3, "test": 2}.items():
        for style in ("art_nouveau", "baroque"):
            for number in range(count):
                save(data / "artbench-10-imagefolder-split" / split / style / f"{number}.jpg")


def make_flowers(data: Path, save: Save) -> None:
    from scipy.io import savemat

    folder = data / "flowers/flowers-102"
    for number in range(1, 13):
        save(folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.arange(12) % 2 + 1})
    savemat(folder / "setid.mat", {"trnid": np.arange(1, 4), "valid": np.arange(4, 7), "tstid": np.arange(7, 13)})


def accept_flowers(data: Path, patch: pytest.MonkeyPatch) -> None:
    """Have torchvision, which checks the sums of the real files, take those of :func:`make_flowers`."""
    from torchvision.datasets import Flowers102

    folder = data / "flowers/flowers-102"
    known = dict(Flowers102._file_dict)
    for name in ("label", "setid"):
        file = known[name][0]
        known[name] = (file, hashlib.md5((folder / file).read_bytes()).hexdigest())
    patch.setattr(Flowers102, "_file_dict", known)


def make_cars(data: Path, save: Save) -> None:
    from scipy.io import savemat

    folder = data / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    for split, list_file in {
        "train": "devkit/cars_train_annos.mat",
        "test": "cars_test_annos_withlabels.mat",
    }.items():
        rows = [(f"{number:05d}.jpg", number % 2 + 1) for number in range(1, 5)]
        for file, _ in rows:
            save(folder / f"cars_{split}" / file)
        savemat(folder / list_file, {"annotations": np.array(rows, dtype=[("fname", "O"), ("class", "O")])})
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["AM General Hummer", "Acura RL"], dtype=object)})


def make_folder(data: Path, save: Save) -> None:
    for number in range(20):
        save(data / "pictures" / ("daisy", "rose")[number % 2] / f"{number}.jpg")


def make_omniglot(data: Path) -> None:
    ink = np.full((105, 105), 255, np.uint8)
    ink[30:70, 50:54] = 0
    for character in ("character01", "character02"):
        folder = data / "omniglot/omniglot-py/images_background/Latin" / character
        folder.mkdir(parents=True)
        Image.fromarray(ink).convert("1").save(folder / "0001_01.png")


def make_tiny_imagenet(data: Path, count: int = 2) -> None:
    labels = np.arange(count) % 200
    np.savez(data / "tiny_imagenet_32.npz", images=np.zeros((count, 32, 32, 3), np.uint8), labels=labels)


def make_small_photos(data: Path, each: int = 1) -> None:
    """So many pictures of each class in both splits, of the two targets of configs/photos."""
    for name, classes in {"oxford_flowers102_64": 102, "caltech101_64": 101}.items():
        labels = np.arange(classes).repeat(2 * each)
        images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
        split, names = ["train", "test"] * classes * each, [f"class {label}" for label in range(classes)]
        np.savez(data / f"{name}.npz", images=images, labels=labels, split=split, class_names=names)


def make_small_source(folder: Path) -> None:
    """A small pixel DiT of Tiny ImageNet's 200 classes under the name that configs/photos32 opens."""
    sizes = {"patch_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2}
    (folder / "weights").mkdir()
    dit = DiT(input_size=32, in_channels=3, num_classes=200, **sizes)
    export_dit(dit, folder / "weights/dit-small-imagenet.safetensors")


def make_coco(data: Path, save: Save) -> None:
    for split in ("train2017", "val2017"):
        names = {key: f"{key:012d}.jpg" for key in range(139, 143)}
        for name in names.values():
            save(data / "coco" / split / name)
        captions = [{"image_id": key, "caption": f"a photo of a {pet}"} for key in names for pet in ("cat", "dog")]
        file = data / "coco/annotations" / f"captions_{split}.json"
        file.parent.mkdir(exist_ok=True)
        images = [{"id": key, "file_name": name} for key, name in names.items()]
        file.write_text(json.dumps({"images": images, "annotations": captions}))


def make_ade20k(data: Path, save: Save) -> None:
    for split, prefix in {"training": "train", "validation": "val"}.items():
        for number in range(1, 5):
            save(data / "ADEChallengeData2016/images" / split / f"ADE_{prefix}_{number:08d}.jpg")


def make_captioned_folder(data: Path) -> None:
    save, rows = Scenes(), []
    for number in range(20):
        save(data / "captioned" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"a photo of a {('cat', 'dog')[number % 2]}"})
    (data / "captioned/metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
