"""Shards written by the webdataset library, read by position."""

import gzip
import os
import tarfile
from io import BytesIO

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from lightning_difftune.data import ImageTargets, WebDatasetShards
from lightning_difftune.errors import DataError


def png_of(pixels):
    content = BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def pixels_of(count=7):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def write_shards(folder, extra, per_shard=3):
    """Shards train-000.tar and on, as ShardWriter names and fills them."""
    pattern = str(folder / "train-%03d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as sink:
        for number, pixels in enumerate(pixels_of()):
            sink.write({"__key__": f"birds/{number:04d}", "png": png_of(pixels), **extra(number)})
    return folder


def test_labelled_shards(tmp_path):
    source = WebDatasetShards(write_shards(tmp_path, lambda i: {"cls": i % 2}), class_names=["auk", "wren"])
    targets = ImageTargets(source, image_size=8)
    assert (len(source.shards), len(targets), targets.class_names) == (3, 7, ["auk", "wren"])
    assert targets.labels().tolist() == [0, 1, 0, 1, 0, 1, 0]
    for index, pixels in enumerate(pixels_of()):
        item = targets.read(index)
        assert torch.equal(item.pixels, torch.from_numpy(pixels).permute(2, 0, 1))
        assert item.label == index % 2
    assert targets.describe(4) == f"image 4 (birds/0004.png in {tmp_path / 'train-001.tar'})"


def test_they_are_read_as_the_library_reads_them(tmp_path):
    write_shards(tmp_path, lambda i: {"txt": f"bird number {i}", "json": {"i": i}})
    source = WebDatasetShards(tmp_path)
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "txt"))
    assert len(theirs) == len(source)
    for (pixels, caption), (image, ours) in zip(theirs, source, strict=True):
        assert (np.asarray(image) == pixels).all()
        assert ours == caption


@pytest.mark.parametrize("pattern", ["train-{000..002}.tar", "train-*.tar"])
def test_patterns_and_lists_name_the_same_shards(tmp_path, pattern):
    write_shards(tmp_path, lambda i: {"cls": 0})
    whole = WebDatasetShards(tmp_path)
    assert WebDatasetShards(str(tmp_path / pattern)).shards == whole.shards
    assert WebDatasetShards(whole.shards[1:]).names == whole.names[3:]
    assert len(WebDatasetShards(whole.shards[2])) == 1


def test_content_counts(tmp_path):
    source = WebDatasetShards(write_shards(tmp_path, lambda i: {"txt": str(i)}))
    before = source.content_digest()
    assert WebDatasetShards(tmp_path).content_digest() == before
    os.utime(source.shards[0], (1, 1))
    assert WebDatasetShards(tmp_path).content_digest() != before


def test_pictures_alone_are_of_one_class(tmp_path):
    assert WebDatasetShards(write_shards(tmp_path, lambda i: {})).labels.tolist() == [0] * 7


@pytest.mark.parametrize("extension", ["json", "caption.txt", "label"])
def test_pictures_are_not_of_one_class_in_silence_where_other_files_say_more(tmp_path, extension):
    write_shards(tmp_path, lambda i: {extension: b"1"})
    with pytest.warns(UserWarning, match=rf"all are of class 0; files that are not read: 7 \.{extension}\."):
        assert WebDatasetShards(tmp_path).labels.tolist() == [0] * 7


def test_shards_of_several_splits_are_refused(tmp_path):
    first = write_tar(tmp_path / "train-000.tar", {"1.png": png_of(pixels_of()[0])})
    (tmp_path / "val-000.tar").write_bytes(first.read_bytes())
    with pytest.raises(DataError, match=r"shards of the splits train, val: .* such as .*train-\*\.tar"):
        WebDatasetShards(tmp_path)
    assert len(WebDatasetShards(tmp_path / "train-*.tar")) == 1


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no \.tar files at"):
        WebDatasetShards(tmp_path)
    with pytest.raises(DataError, match=r"is not a local file.*download them first"):
        WebDatasetShards("https://example.org/{000..009}.tar")
    with pytest.raises(DataError, match="do not exist"):
        WebDatasetShards(str(tmp_path / "none.tar"))
    write_shards(tmp_path, lambda i: {"cls": 1} if i != 4 else {})
    with pytest.raises(DataError, match=r"1 of 7 pictures have no \.cls: birds/0004\.png"):
        WebDatasetShards(tmp_path)
    first = tmp_path / "train-000.tar"
    with gzip.open(tmp_path / "zipped.tar", "wb") as file:
        file.write(first.read_bytes())
    with pytest.raises(DataError, match="not a whole, uncompressed tar file"):
        WebDatasetShards(tmp_path / "zipped.tar")
    cut = tmp_path / "cut.tar"
    with tarfile.open(first) as archive:
        last = [entry for entry in archive if entry.name.endswith(".png")][-1]
    cut.write_bytes(first.read_bytes()[: last.offset_data + 10])
    with pytest.raises(DataError, match=r"cut\.tar is not a whole"):
        WebDatasetShards(cut)
    (tmp_path / "words").mkdir()
    with webdataset.TarWriter(str(tmp_path / "words" / "0.tar")) as sink:
        sink.write({"__key__": "a", "jpg": b"x", "cls": b"seven"})
    with pytest.raises(DataError, match=r"a.jpg in .*0.tar: its .cls says 'seven', expected a number"):
        WebDatasetShards(tmp_path / "words")
    (tmp_path / "empty").mkdir()
    with webdataset.TarWriter(str(tmp_path / "empty" / "0.tar")) as sink:
        sink.write({"__key__": "a", "txt": "x"})
    with pytest.raises(DataError, match="no pictures in 1 shards"):
        WebDatasetShards(tmp_path / "empty")


def write_tar(file, members):
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    return file


@pytest.mark.parametrize("extension", ["txt", "TXT", "caption"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_all_spellings_and_encodings(tmp_path, extension, encoding):
    members = {"1.png": png_of(pixels_of()[0]), f"1.{extension}": "Gérard".encode(encoding)}
    assert WebDatasetShards(write_tar(tmp_path / "a.tar", members)).captions == ["Gérard"]


def test_a_caption_that_is_not_utf8_is_named(tmp_path):
    file = write_tar(tmp_path / "a.tar", {"b/1.png": png_of(pixels_of()[0]), "b/1.txt": "ab\nGér".encode("latin-1")})
    with pytest.raises(DataError, match=r"b/1\.txt in .*a\.tar, line 2: not UTF-8 \(the byte 0xe9 after 'G'\)"):
        WebDatasetShards(file)


def test_what_systems_leave_is_left_out_and_counted(tmp_path):
    picture = png_of(pixels_of()[0])
    others = {"__MACOSX/1.png": picture, "@eaDir/1.png": picture, "._1.png": b"?", "2.heic": b"?", "3.DNG": b"?"}
    source = WebDatasetShards(write_tar(tmp_path / "a.tar", {"1.png": picture, **others}))
    (tmp_path / "._a.tar").write_bytes(b"Mac OS X")
    for shards in (tmp_path, tmp_path / "*.tar"):
        assert WebDatasetShards(shards).shards == source.shards
    assert source.names == ["1.png"]
    assert source.left_out == {"hidden or system files": 2, ".heic": 1, ".dng": 1}
