from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_difftune.data import CUB200, ImageFolder, ListedImages
from lightning_difftune.data.source_facts import class_names_of
from lightning_difftune.errors import DataError


def save(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (level, level, level)).save(path)


def levels(source) -> list[tuple[int, int]]:
    """(grey level, label) of each picture."""
    return [(np.asarray(image)[0, 0, 0].item(), label) for image, label in (source[i] for i in range(len(source)))]


def test_folder_sorts_classes_and_nested_files(tmp_path):
    save(tmp_path / "rose" / "b.png", 1)
    save(tmp_path / "rose" / "a" / "deep.PNG", 2)
    save(tmp_path / "daisy" / "x.bmp", 3)
    save(tmp_path / ".hidden" / "x.png", 9)
    save(tmp_path / "rose" / "._b.png", 9)
    (tmp_path / "rose" / "notes.txt").write_text("no picture")
    source = ImageFolder(tmp_path)
    assert source.class_names == ["daisy", "rose"]
    assert levels(source) == [(3, 0), (2, 1), (1, 1)]
    assert source.labels.tolist() == [0, 1, 1]


def test_folder_without_classes_is_one_class(tmp_path):
    save(tmp_path / "2.png", 2)
    save(tmp_path / "1.png", 1)
    assert levels(ImageFolder(tmp_path)) == [(1, 0), (2, 0)]


def test_missing_root_and_file_as_root(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist; expected one sub-folder per class"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        ImageFolder(tmp_path / "file")


def test_empty_folder_says_what_was_found(tmp_path):
    with pytest.raises(DataError, match=r"no pictures under .*found no files; expected"):
        ImageFolder(tmp_path)
    (tmp_path / "train.csv").touch()
    (tmp_path / "rose").mkdir()
    with pytest.raises(DataError, match=r"found 1 sub-folders and files of other types: 1 \.csv"):
        ImageFolder(tmp_path)


def test_empty_class_folders_are_named(tmp_path):
    save(tmp_path / "rose" / "a.png")
    (tmp_path / "daisy").mkdir()
    with pytest.raises(DataError, match=r"1 of the 2 class folders .* hold no pictures: daisy"):
        ImageFolder(tmp_path)


def test_pictures_beside_class_folders_are_refused(tmp_path):
    save(tmp_path / "rose" / "a.png")
    save(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"1 pictures \(such as stray\.png\) next to its 1 class folders"):
        ImageFolder(tmp_path)


def test_parent_of_splits_is_refused(tmp_path):
    save(tmp_path / "train" / "rose" / "a.png")
    save(tmp_path / "test" / "rose" / "a.png")
    with pytest.raises(DataError, match="splits test, train, not classes; give one of them"):
        ImageFolder(tmp_path)
    assert len(ImageFolder(tmp_path / "train")) == 1


@pytest.fixture
def fungi(tmp_path) -> Path:
    for name, level in (("a.png", 1), ("b.png", 2), ("c.png", 3)):
        save(tmp_path / "DF20M" / name, level)
    (tmp_path / "list.csv").write_text(
        "image_path,class_id,species,split\na.png,7,Boletus,train\nb.png,0,Amanita,test\nc.png,7.0,Boletus,train\n",
        encoding="utf-8-sig",
    )
    return tmp_path


def test_a_class_whose_name_is_in_another_encoding_is_refused(tmp_path):
    """It could be written into no picture and no table."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/G\xe9r")
    try:
        os.mkdir(folder)
    except OSError:  # macOS takes only UTF-8
        pytest.skip("this file system has only names in UTF-8")
    save(Path(folder) / "1.png", 1)
    with pytest.raises(DataError, match=r"folder b'G\\xe9r' in .* is not UTF-8"):
        ImageFolder(tmp_path)


def test_listed_images_by_index_and_by_name(fungi):
    assert levels(ListedImages(fungi / "DF20M", fungi / "list.csv")) == [(1, 7), (2, 0), (3, 7)]
    by_name = ListedImages(fungi / "DF20M", fungi / "list.csv", label_column="species")
    assert levels(by_name) == [(1, 1), (2, 0), (3, 1)]
    assert class_names_of(by_name) == ["Amanita", "Boletus"]
    names = ["Russula", "Boletus", "Amanita"]
    given = ListedImages(fungi / "DF20M", fungi / "list.csv", label_column="species", class_names=names)
    assert levels(given) == [(1, 1), (2, 2), (3, 1)]


def test_numbers_that_are_names_of_classes_are_names(fungi):
    """Class 7 would be out of range, and 0 another class than the one of this name."""
    given = ListedImages(fungi / "DF20M", fungi / "list.csv", where={"split": "test"}, class_names=["7", "0"])
    assert levels(given) == [(2, 1)]
    numbered = ListedImages(fungi / "DF20M", fungi / "list.csv", class_names=list("abcdefgh"))
    assert levels(numbered) == [(1, 7), (2, 0), (3, 7)]


def test_listed_images_of_a_split(fungi):
    split = ListedImages(fungi / "DF20M", fungi / "list.csv", where={"split": "train"})
    assert levels(split) == [(1, 7), (3, 7)]
    with pytest.raises(DataError, match=r"no pictures with \{'split': 'val'\}; found .*'train': 2, 'test': 1"):
        ListedImages(fungi / "DF20M", fungi / "list.csv", where={"split": "val"})


def test_listed_images_name_what_is_wrong(fungi):
    with pytest.raises(DataError, match=r"none\.csv does not exist"):
        ListedImages(fungi, fungi / "none.csv")
    with pytest.raises(DataError, match=r"no column \['label'\]; found \['image_path', 'class_id'"):
        ListedImages(fungi, fungi / "list.csv", label_column="label")
    with pytest.raises(DataError, match=r"not below .*a\.png does not exist.*Set root"):
        ListedImages(fungi, fungi / "list.csv")
    with pytest.raises(DataError, match="Boletus not among the 1 class_names"):
        ListedImages(fungi / "DF20M", fungi / "list.csv", label_column="species", class_names=["Amanita"])
    (fungi / "gap.csv").write_text("image_path,class_id\na.png,1\nb.png,\n")
    with pytest.raises(DataError, match=r"gap\.csv, line 3: class_id is empty"):
        ListedImages(fungi / "DF20M", fungi / "gap.csv")


@pytest.fixture
def birds(tmp_path) -> Path:
    for number in (1, 2, 3):
        save(tmp_path / "images" / "001.Albatross" / f"{number}.png", number)
    (tmp_path / "images.txt").write_text("".join(f"{i} 001.Albatross/{i}.png\n" for i in (1, 2, 3)))
    (tmp_path / "image_class_labels.txt").write_text("1 1\n2 2\n3 1\n")
    (tmp_path / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n")
    (tmp_path / "classes.txt").write_text("1 001.Albatross\n2 002.Auk\n")
    return tmp_path


def test_cub_parts(birds):
    assert levels(CUB200(birds)) == [(1, 0), (3, 0)]
    assert levels(CUB200(birds, train=False)) == [(2, 1)]
    assert CUB200(birds).class_names == ["001.Albatross", "002.Auk"]


def test_cub_with_lists_that_do_not_fit(birds):
    (birds / "train_test_split.txt").write_text("1 1\n2 0\n")
    with pytest.raises(DataError, match="do not fit together: 3 images, 3 labels, 2 split entries"):
        CUB200(birds)
    (birds / "classes.txt").write_text("1\n")
    with pytest.raises(DataError, match=r"classes\.txt, line 1: expected an identifier and a value"):
        CUB200(birds)
    (birds / "images.txt").unlink()
    with pytest.raises(DataError, match=r"images\.txt does not exist; expected the unpacked folder"):
        CUB200(birds)
