"""What a path is opened as."""

import json
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from lightning_difftune.data import ArrayImages
from lightning_difftune.data.inspection import inspect, open_images
from lightning_difftune.errors import DataError


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    return path


def opened(path, **settings):
    return type(open_images(str(path), **settings)).__name__


def test_each_layout_is_recognised(tmp_path):
    save(tmp_path / "classes" / "rose" / "1.png")
    assert opened(tmp_path / "classes") == "ImageFolder"
    save(tmp_path / "text_files" / "1.png").with_suffix(".txt").write_text("a rose")
    assert opened(tmp_path / "text_files") == "CaptionedFolder"
    save(tmp_path / "listed" / "1.png")
    (tmp_path / "listed" / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "a rose"}))
    assert opened(tmp_path / "listed") == "CaptionedFolder"
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 4), np.uint8), split=["train", "test", "train"])
    assert opened(tmp_path / "a.npz") == "NpzImages"
    assert len(open_images(str(tmp_path / "a.npz"), "train")) == 2
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as archive:
        archive.add(tmp_path / "listed" / "1.png", "1.png")
    for path in (tmp_path / "shards", tmp_path / "shards/0.tar", tmp_path / "shards/{0..0}.tar"):
        assert opened(path) == "WebDatasetShards"
    hub = datasets.Dataset.from_dict({"image": [str(tmp_path / "listed/1.png")]}).cast_column("image", datasets.Image())
    hub.save_to_disk(tmp_path / "hub")
    assert opened(tmp_path / "hub") == "HubImages"


def test_a_name_goes_to_the_hub_and_a_missing_folder_does_not(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *_, **more: asked.append((path, more["split"])) or 1 / 0)
    with pytest.raises(DataError, match="owner/flowers cannot be opened as a data set"):
        open_images("owner/flowers", "test")
    assert asked == [("owner/flowers", "test")]
    for path in ("nowhere", "./owner/flowers", str(tmp_path / "owner"), "a/b/c"):
        with pytest.raises(DataError, match="does not exist"):
            open_images(path)
    assert len(asked) == 1


def test_two_classes_of_one_name_are_counted_apart():
    source = ArrayImages(np.zeros((5, 8, 8), np.uint8), [0, 1, 2, 2, 2], class_names=["rose", "tulip", "rose"])
    assert inspect(source).counts() == {"rose (class 0)": 1, "tulip": 1, "rose (class 2)": 3}
