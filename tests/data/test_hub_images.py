"""Data sets of Hugging Face's library, written by it and read as an image source."""

import os
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_difftune.data import HubImages, ImageTargets
from lightning_difftune.errors import ConfigError, DataError

NAMES = ["daisy", "rose"]


def pictures(count=6):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]


def dataset_of(count=6, **columns):
    features = {"image": datasets.Image()}
    if "label" in columns:
        features["label"] = datasets.ClassLabel(names=NAMES)
    made = {"image": pictures(count), **columns}
    features |= {name: datasets.Value("string") for name in columns if name not in features}
    return datasets.Dataset.from_dict(made, features=datasets.Features(features))


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def test_a_saved_data_set_gives_its_pictures_labels_and_names(tmp_path):
    dataset_of(label=[0, 1, 1, 0, 1, 0]).save_to_disk(tmp_path / "flowers")
    source = HubImages(tmp_path / "flowers")
    targets = ImageTargets(source, image_size=8)
    assert (len(targets), targets.class_names) == (6, NAMES)
    assert targets.labels().tolist() == [0, 1, 1, 0, 1, 0]
    for index, picture in enumerate(pictures()):
        assert torch.equal(targets.read(index).pixels, torch.from_numpy(np.asarray(picture)).permute(2, 0, 1))
        assert targets.read(index).label == [0, 1, 1, 0, 1, 0][index]
    assert targets.describe(3) == f"image 3 (example 3 of {tmp_path / 'flowers'})"


def test_splits_and_strings_as_labels(tmp_path):
    parts = {"train": dataset_of(text=list("abbaba")), "test": dataset_of(2, text=["b", "a"])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "flowers")
    source = HubImages(tmp_path / "flowers", split="test", label_column="text")
    assert (len(source), source.class_names, source.labels.tolist()) == (2, ["a", "b"], [1, 0])
    captioned = HubImages(tmp_path / "flowers")
    assert captioned.captions == list("abbaba")
    assert captioned[2][1] == "b"
    with pytest.raises(DataError, match="split 'val': KeyError"):
        HubImages(tmp_path / "flowers", split="val")


@pytest.fixture
def image_folder(tmp_path):
    for number, picture in enumerate(pictures()):
        path = tmp_path / "folder" / "train" / NAMES[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return tmp_path / "folder"


def test_load_dataset_opens_the_rest(image_folder):
    source = HubImages(str(image_folder))
    assert (len(source), source.class_names) == (6, NAMES)
    assert sorted(source.labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_the_first_examples_of_a_stream_are_kept_and_numbered(image_folder, tmp_path, monkeypatch):
    source = HubImages(str(image_folder), keep=tmp_path / "kept", limit=4)
    targets = ImageTargets(source, image_size=8)
    assert (len(source), source.class_names) == (4, NAMES)
    found = {targets.read(index).pixels.numpy().tobytes() for index in range(4)}
    stored = {np.asarray(picture).transpose(2, 0, 1).tobytes() for picture in pictures()}
    assert found < stored
    for file in image_folder.rglob("*.png"):  # the stream is gone, and not missed
        file.unlink()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("streamed again"))
    again = ImageTargets(HubImages(str(image_folder), keep=tmp_path / "kept", limit=4), image_size=8)
    assert again.identity() == targets.identity()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"limit": 3}, "limit was 4, is 3"),
        ({"limit": 5}, "limit was 4, is 5"),
        ({"revision": "v2"}, "revision was None"),
    ],
)
def test_a_folder_that_keeps_another_stream_is_refused(image_folder, tmp_path, change, told):
    wanted = {"path": str(image_folder), "keep": tmp_path / "kept", "limit": 4}
    HubImages(**wanted)
    with pytest.raises(DataError, match=f"another stream: {told}.*Choose another folder"):
        HubImages(**wanted | change)
    (tmp_path / "kept" / "kept.json").unlink()  # a folder that was made elsewhere
    if change == {"limit": 3}:  # all that its own length tells
        with pytest.raises(DataError, match=told):
            HubImages(**wanted | change)


def test_all_of_its_pictures_are_compared_without_reading_them(image_folder, tmp_path, monkeypatch):
    """A change of one that is not among the 64 which are compared of other sources."""
    made = dataset_of(label=[0] * 6)
    before = ImageTargets(HubImages(made), image_size=8).unread_identity
    assert ImageTargets(HubImages(dataset_of(label=[0] * 6)), image_size=8).unread_identity == before
    assert ImageTargets(HubImages(made.select([1, 0, 2, 3, 4, 5])), image_size=8).unread_identity != before
    file = tmp_path / "1.png"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(file)
    named = datasets.Dataset.from_dict({"image": [str(file)] * 2}).cast_column("image", datasets.Image())
    before = ImageTargets(HubImages(named), image_size=8).unread_identity
    os.utime(file, (1, 1))
    assert before != ImageTargets(HubImages(named), image_size=8).unread_identity


def test_a_damaged_picture_is_named(tmp_path):
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"\x89PNG no picture", "path": None}]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    broken.save_to_disk(tmp_path / "broken")
    with pytest.raises(DataError, match=r"image 0 \(example 0 of .*broken\) cannot be read"):
        ImageTargets(HubImages(tmp_path / "broken"), image_size=8).read(0)


def test_what_is_wrong_with_columns_and_arguments(tmp_path):
    plain = dataset_of(label=[0] * 6)
    with pytest.raises(DataError, match="no column 'species'; found image, label"):
        HubImages(plain, label_column="species")
    with pytest.raises(DataError, match=r"no column of pictures \(type Image\); found {'label': 'ClassLabel'}"):
        HubImages(plain.remove_columns("image"))
    with pytest.raises(DataError, match="'price' has labels of type float64"):
        HubImages(plain.add_column("price", [0.5] * 6), label_column="price")
    with pytest.raises(ConfigError, match="keep and limit go together"):
        HubImages("owner/flowers", keep=tmp_path / "kept")
    with pytest.raises(ConfigError, match="labels or captions"):
        HubImages(plain, label_column="label", caption_column="label")
    with pytest.raises(DataError, match="cannot be opened as a data set"):
        HubImages(tmp_path / "nowhere")


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="Run `pip install datasets`"):
        HubImages(tmp_path)


def test_missing_values_are_empty_captions_and_no_labels(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "1.png")
    files = [str(tmp_path / "1.png")] * 3
    for column, values in (("text", ["a", None, "b"]), ("kind", ["a", None, "b"]), ("number", [1, None, 2])):
        made = datasets.Dataset.from_dict({"image": files, column: values}).cast_column("image", datasets.Image())
        if column == "text":
            assert HubImages(made).captions == ["a", "", "b"]
            continue
        with pytest.raises(
            DataError, match=f"'{column}' has no value in 1 of 3 examples, the first of which is example 1"
        ):
            HubImages(made, label_column=column)


@pytest.mark.parametrize("captions", [[["a cat", "one cat"], ["a dog", "one dog"]], [0, 1]])
def test_captions_that_are_not_texts_are_refused(captions):
    """As text, a list of captions would be trained on with its brackets and quotes."""
    made = datasets.Dataset.from_dict({"image": pictures(2), "caption": captions})
    with pytest.raises(
        DataError, match=f"a caption in 'caption' is a {type(captions[0]).__name__}, .*; expected a text"
    ):
        HubImages(made.cast_column("image", datasets.Image()))
