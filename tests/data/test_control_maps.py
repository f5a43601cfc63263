"""Control maps of every source: the same batches, and what is refused."""

from __future__ import annotations

import json

import datasets
import mapped
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_difftune import MemoryBankDataModule
from lightning_difftune.data import (
    ArrayImages,
    CaptionedFolder,
    ClassCaptions,
    HubImages,
    ImageFolder,
    ImageTargets,
    NpzImages,
    Partition,
    WebDatasetShards,
)
from lightning_difftune.data.inspection import inspect
from lightning_difftune.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return mapped.sources(tmp_path_factory.mktemp("mapped"))


@pytest.mark.parametrize("kind", ["hub", "shards"])
def test_batches_are_those_of_the_same_files(sources, kind):
    theirs, ours = (ImageTargets(sources[name], 16).pixels(range(6), [True, False] * 3) for name in ("files", kind))
    assert theirs.keys() == ours.keys() == {"pixel_values", "captions", "conditioning_pixel_values"}
    assert theirs["captions"] == ours["captions"]
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs.keys() - {"captions"})


@pytest.mark.parametrize("kind", ["files", "hub", "shards"])
def test_a_part_has_the_maps_of_its_pictures(sources, kind):
    part = ImageTargets(Partition(sources[kind], {"a": 2, "b": 4}, "b"), 16)
    picture, caption, map_ = (column[1] for column in part.captioned([0, 1]))
    whole = ImageTargets(sources[kind], 16).read(int(caption.removeprefix("number ")))
    assert torch.equal(picture, whole.pixels)
    assert torch.equal(map_, whole.control)


def test_captions_of_classes_keep_the_maps():
    source = HubImages(mapped.hub_data(control=mapped.maps(), image=mapped.pictures(), label=[0, 1] * 3))
    assert source[1][1] == 1
    assert ClassCaptions(source)[1][1:] == ("a photo of a bee", source[1][2])


def test_examples_of_which_some_have_no_map_are_refused():
    picture = np.zeros((8, 8), np.uint8)
    targets = ImageTargets([(picture, "a", picture), (picture, "b")], 8)
    with pytest.raises(DataError, match="some pictures of the data set have a control map and others do not"):
        targets.captioned([0, 1])


@pytest.mark.parametrize("mapped_part", ["target", "val_target"])
def test_maps_of_one_part_alone_are_said(mapped_part):
    picture = np.zeros((8, 8), np.uint8)
    parts = {"target": [(picture, "a")], "val_target": [(picture, "b")]}
    parts[mapped_part] = [(picture, "a", picture)]
    data = MemoryBankDataModule(**parts, bank=None, batch_size=1, image_size=8)
    with pytest.warns(UserWarning, match=f"pictures of {mapped_part} have control maps of their own, and those of"):
        data.setup("fit")


def test_grey_maps_join_those_in_colour():
    grey, colour = np.full((8, 8), 7, np.uint8), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    batch = ImageTargets([(colour, "a", grey), (colour, "b", colour)], 8).pixels([0, 1], [False, False])
    assert batch["conditioning_pixel_values"].shape == (2, 3, 8, 8)
    assert (batch["conditioning_pixel_values"][0] == 7).all()


def test_a_damaged_map_is_found_by_an_inspection(tmp_path):
    cut = mapped.png_of(mapped.maps()[1])[:60]
    members = {"0.png": mapped.png_of(mapped.pictures()[0]), "0.control.png": cut, "0.txt": b"a"}
    (picture,) = inspect(WebDatasetShards(mapped.write_tar(tmp_path / "a.tar", members))).pictures
    assert picture.error.startswith("its control map: ")


# -- Hugging Face's data sets -----------------------------------------------------------------------------------------


def hub(**columns):
    return mapped.hub_data(**{"text": list("abcdef"), "image": mapped.pictures(), **columns})


def test_a_named_column_has_the_maps():
    source = HubImages(hub(edges=mapped.maps()), control_column="edges")
    assert np.array_equal(source[2][2], mapped.maps()[2])


def test_a_column_of_maps_that_is_named_as_pictures_is_no_map():
    with pytest.warns(UserWarning, match="read: conditioning_image, text; that are not: image"):
        source = HubImages(hub(conditioning_image=mapped.maps()), image_column="conditioning_image")
    assert len(source[0]) == 2


def test_an_example_without_a_map_is_named():
    made = hub(conditioning_image=[*mapped.maps()[:5], None])
    with pytest.raises(DataError, match=r"'conditioning_image' has no value in 1 of 3 examples, .* is example 1"):
        HubImages(made.select([0, 5, 2]))
    assert len(HubImages(made.select(range(5)))[0]) == 3


def test_a_column_without_any_map_is_none():
    made = hub(conditioning_image=mapped.maps())
    empty = made.map(lambda example: {"conditioning_image": None}, features=made.features)
    with pytest.warns(UserWarning, match="that are not: conditioning_image"):
        assert len(HubImages(empty)[0]) == 2


def test_columns_that_cannot_hold_maps_are_refused():
    with pytest.raises(DataError, match=r"Cast it to datasets\.Image"):
        HubImages(hub(), control_column="text")
    with pytest.raises(ConfigError, match="both 'image'"):
        HubImages(hub(), image_column="image", control_column="image")


def test_a_map_of_the_hub_counts_in_the_digests():
    first, other = (HubImages(hub(control=maps)) for maps in (mapped.maps(), [*mapped.maps()[:5], mapped.maps()[0]]))
    alone = HubImages(hub(control=mapped.maps()).remove_columns("control"))
    pairs = zip(first.picture_digests(), other.picture_digests(), strict=True)
    assert [a == b for a, b in pairs] == [True] * 5 + [False]
    assert len({source.content_digest() for source in (first, other, alone)}) == 3


def test_a_kept_stream_has_its_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    expected = mapped.sources(tmp_path / "folder")["files"]
    (tmp_path / "folder" / "0.tar").unlink()
    lines = (tmp_path / "folder" / "metadata.jsonl").read_text().replace("conditioning_image", "conditioning_file_name")
    (tmp_path / "folder" / "metadata.jsonl").write_text(lines)
    source = HubImages(str(tmp_path / "folder"), keep=tmp_path / "kept", limit=3)
    for _, caption, map_ in source:
        assert np.array_equal(map_, expected[int(caption.removeprefix("number "))][2])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"edges": mapped.maps()}, "read: image, text; that are not: edges"),
        ({"control": mapped.maps(), "edges": mapped.maps()}, "read: image, text, control; that are not: edges"),
        ({"label": [0] * 6}, "read: image, label; that are not: text"),
        ({"label": [0] * 6, "fine_label": [1] * 6}, "read: image, label; that are not: fine_label, text"),
        ({"prompt": list("uvwxyz")}, "read: image, text; that are not: prompt"),
    ],
)
def test_columns_that_may_be_missed_are_named(columns, said):
    with pytest.warns(UserWarning, match=said):
        HubImages(hub(**columns))


def test_all_pictures_are_not_of_one_class_in_silence():
    with pytest.warns(UserWarning, match="read: image; that are not: description, so all pictures are of class 0"):
        HubImages(hub(description=list("abcdef")).remove_columns("text"))


def test_named_columns_are_not_asked_about(recwarn):
    made = hub(edges=mapped.maps(), depth=mapped.maps(), label=[0] * 6)
    HubImages(made, image_column="image", control_column="edges", caption_column="text")
    assert not [warning for warning in recwarn if "that are not" in str(warning.message)]


def test_a_missing_picture_has_a_digest():
    source = HubImages(hub(image=[*mapped.pictures()[:5], None]))
    assert len(set(source.picture_digests())) == 6
    with pytest.raises(DataError, match="there is no picture in 'image'"):
        ImageTargets(source, 8).read(5)


# -- shards -----------------------------------------------------------------------------------------------------------


PICTURE, MAP = mapped.png_of(mapped.pictures()[0]), mapped.png_of(mapped.maps()[0])


def shards(tmp_path, members, **settings):
    return WebDatasetShards(mapped.write_tar(tmp_path / "a.tar", members), **settings)


@pytest.mark.parametrize(
    ("picture", "map_", "settings"),
    [
        ("jpg", "control.png", {}),
        ("png", "Conditioning_Image.PNG", {}),
        ("png", "depth.png", {"control_extension": "depth.png"}),
        ("jpg", "png", {"control_extension": "png"}),
        ("png", "jpg", {"image_extension": "png", "control_extension": "jpg"}),
        ("target.png", "source.png", {"image_extension": "target.png", "control_extension": "source.png"}),
    ],
)
def test_the_map_of_a_key(tmp_path, picture, map_, settings):
    for number, order in enumerate(([picture, map_], [map_, picture])):
        members = {f"k.{name}": PICTURE if name == picture else MAP for name in order}
        image, _, control = shards(tmp_path, {**members, "k.txt": b"a"}, **settings)[0]
        assert np.array_equal(image, mapped.pictures()[0]), number
        assert np.array_equal(control, mapped.maps()[0]), number


def test_two_pictures_of_a_key_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"k in .*a\.tar has several pictures: png, jpg\. Set image_extension"):
        shards(tmp_path, {"k.png": PICTURE, "k.jpg": MAP})


def test_a_picture_that_is_not_read_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"pictures that are not read: 1 \.seg\.png\. Set control_extension"):
        assert len(shards(tmp_path, {"k.png": PICTURE, "k.seg.png": MAP, "k.txt": b"a"})[0]) == 2


def test_pictures_under_other_extensions_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no pictures in 1 shards.*found 1 \.output\.png: set image_extension"):
        shards(tmp_path, {"k.output.png": PICTURE})


def test_pictures_without_a_map_are_named(tmp_path):
    members = {"j.png": PICTURE, "j.control.png": MAP, "k.png": PICTURE}
    with pytest.raises(DataError, match=r"1 of 2 pictures have no .*: k\.png"):
        shards(tmp_path, members)
    with pytest.raises(DataError, match=r"2 of 2 pictures have no \.depth\.png: j\.png, k\.png"):
        shards(tmp_path, members, control_extension="depth.png")


def test_pictures_and_maps_are_not_the_same_files(tmp_path):
    with pytest.raises(ConfigError, match="both 'png'"):
        shards(tmp_path, {"k.png": PICTURE}, image_extension="png", control_extension="png")


def test_a_map_of_a_shard_counts_in_the_digests(tmp_path):
    members = {"k.png": PICTURE, "k.depth.png": MAP, "k.txt": b"a"}
    read = shards(tmp_path, members, control_extension="depth.png")
    with pytest.warns(UserWarning, match="not read"):
        unread = shards(tmp_path, members)
    assert read.content_digest() != unread.content_digest()
    assert read.picture_digests() != unread.picture_digests()


def test_captions_beside_classes_are_said_and_can_be_read(tmp_path):
    members = {"k.png": PICTURE, "k.cls": b"1", "k.txt": b"a"}
    with pytest.warns(UserWarning, match=r"classes in \.cls are read, and the captions in \.txt are not"):
        assert shards(tmp_path, members).labels.tolist() == [1]
    assert shards(tmp_path, members, label_extension=None).captions == ["a"]


def test_captions_in_json(tmp_path):
    members = {"k.png": PICTURE, "k.json": json.dumps({"url": "x", "caption": "a  rose"}).encode()}
    assert shards(tmp_path, members, caption_extension="json").captions == ["a rose"]
    with pytest.raises(DataError, match=r"k\.json in .*a\.tar has no text under text, caption, prompt; found '\[1\]'"):
        shards(tmp_path, members | {"k.json": b"[1]"}, caption_extension="json")
    with pytest.raises(DataError, match=r"k\.json in .*a\.tar is not JSON"):
        shards(tmp_path, members | {"k.json": b"a rose"}, caption_extension="json")


def test_samples_without_a_picture_are_counted(tmp_path):
    source = shards(tmp_path, {"j.png": PICTURE, "j.txt": b"a", "k.txt": b"b", "l.control.png": MAP})
    assert source.left_out == {"samples without a picture": 2}


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_list_beside_class_folders_is_said(tmp_path):
    """The layout of ControlNet's own example: two classes, source and target."""
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    (tmp_path / "prompt.json").write_text('{"source": "source/0.png", "target": "target/0.png", "prompt": "a"}')
    with pytest.warns(UserWarning, match=r"prompt\.json is not read\. CaptionedFolder reads captions and control maps"):
        ImageFolder(tmp_path)


def test_another_name_of_the_maps_in_metadata(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a", "conditioning": "0.png"}')
    assert CaptionedFolder(tmp_path).control_paths == [str(tmp_path / "0.png")]


def test_arrays_that_are_not_read_are_said(tmp_path):
    np.savez(tmp_path / "a.npz", images=ArrayImages(np.zeros((2, 4, 4), np.uint8)).images, label=[0, 1])
    with pytest.warns(UserWarning, match="arrays label are not read, and all pictures are of class 0"):
        NpzImages(tmp_path / "a.npz")
