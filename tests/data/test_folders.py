"""Contents of a folder: texts in their encodings, system files, links, captions and lists."""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_difftune.data import CUB200, CaptionedFolder, ImageFolder, ListedImages
from lightning_difftune.data.folders import Folder, decode
from lightning_difftune.errors import DataError

WORD = "Gérard's Gèr, 猫"


def save(path: Path, level: int = 0) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), level, np.uint8)).save(path)
    return str(path)


ENCODED = {
    "utf-8": WORD.encode(),
    "utf-8 with a mark": WORD.encode("utf-8-sig"),
    "utf-16 little": codecs.BOM_UTF16_LE + WORD.encode("utf-16-le"),
    "utf-16 big": codecs.BOM_UTF16_BE + WORD.encode("utf-16-be"),
    "utf-32 little": codecs.BOM_UTF32_LE + WORD.encode("utf-32-le"),
    "utf-32 big": codecs.BOM_UTF32_BE + WORD.encode("utf-32-be"),
}
WRONG = {
    "latin-1": ("a cat\nGérard".encode("latin-1"), r"line 2: not UTF-8 \(the byte 0xe9 after 'G'\). Save it as UTF-8"),
    "cp1252": (b"\x93a cat\x94", r"line 1: not UTF-8 \(the byte 0x93"),
    "utf-16 without a mark": ("a\ncat".encode("utf-16-le"), "line 1: zero bytes, as in UTF-16 without a byte-order"),
    "half of utf-16": (codecs.BOM_UTF16_LE + b"a\0b", "line 1: not UTF-16, as its byte-order mark says"),
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_texts_are_decoded_by_their_mark(tmp_path: Path, encoding: str) -> None:
    save(tmp_path / "folder" / "1.png")
    (tmp_path / "folder" / "1.txt").write_bytes(ENCODED[encoding])
    assert CaptionedFolder(tmp_path / "folder").captions == [WORD]


@pytest.mark.parametrize("encoding", WRONG)
@pytest.mark.parametrize("place", ["a text file", "metadata.jsonl", "metadata.csv", "a list", "CUB"])
def test_other_encodings_are_refused_with_their_line(tmp_path: Path, encoding: str, place: str) -> None:
    data, message = WRONG[encoding]
    save(tmp_path / "1.png")
    file = tmp_path / {"a text file": "1.txt", "a list": "list.csv", "CUB": "images.txt"}.get(place, place)
    file.write_bytes(data)
    opened = {"a list": lambda root: ListedImages(root, file), "CUB": CUB200}.get(place, CaptionedFolder)
    with pytest.raises(DataError, match=f"{file.name}, {message}"):
        opened(tmp_path)


def test_lines_are_counted_in_a_long_text() -> None:
    with pytest.raises(DataError, match="x, line 1001: not UTF-8"):
        decode(b"fine\n" * 1000 + b"\xff\n", "x")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_all_programs_are_read(tmp_path: Path, delimiter: str) -> None:
    save(tmp_path / "a" / "1.png"), save(tmp_path / "a" / "2.png")
    rows = [("image_path", "class_id"), ("a/1.png", "rose"), ("a\\2.png", "tulip")]
    text = "\r\n".join(delimiter.join(row) for row in rows)
    (tmp_path / "list.csv").write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
    source = ListedImages(tmp_path, tmp_path / "list.csv")
    assert source.class_names == ["rose", "tulip"]
    assert [image.size for image, _ in (source[0], source[1])] == [(4, 4)] * 2


def test_names_of_a_mac_are_found(tmp_path: Path) -> None:
    save(tmp_path / unicodedata.normalize("NFD", "é") / "1.png")
    (tmp_path / "list.csv").write_text(f"image_path,class_id\n{unicodedata.normalize('NFC', 'é/1.png')},0\n")
    assert ListedImages(tmp_path, tmp_path / "list.csv")[0][1] == 0
    assert ImageFolder(tmp_path).class_names == [unicodedata.normalize("NFC", "é")]


SYSTEM = ["@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information", "Thumbnails", ".thumbnails",
          "@Recycle", "__MACOSX", "LOST.DIR"]  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_systems_are_neither_classes_nor_pictures(tmp_path: Path, name: str) -> None:
    kept = [save(tmp_path / "rose" / "1.png"), save(tmp_path / "tulip" / "1.png")]
    save(tmp_path / name / "a.png"), save(tmp_path / "rose" / name / "b.png")
    source = ImageFolder(tmp_path)
    assert (source.class_names, source.paths) == (["rose", "tulip"], kept)
    assert sum(source.left_out.values()) == 2
    for picture in kept:
        Path(picture).with_suffix(".txt").write_text("a")
    assert CaptionedFolder(tmp_path).paths == kept


@pytest.mark.parametrize("name", ["._1.png", ".hidden.png", "Thumbs.db", "desktop.ini", ".DS_Store"])
def test_files_of_systems_are_not_pictures(tmp_path: Path, name: str) -> None:
    kept = save(tmp_path / "rose" / "1.png")
    (tmp_path / "rose" / name).write_bytes(b"?"), (tmp_path / name).write_bytes(b"?")
    source = ImageFolder(tmp_path)
    assert (source.paths, dict(source.left_out)) == ([kept], {"hidden or system files": 2})


def test_types_that_are_not_read_are_said(tmp_path: Path) -> None:
    save(tmp_path / "rose" / "1.png"), save(tmp_path / "rose" / "2.avif")
    for name in ("3.heic", "4.HEIC", "5.dng", "6.mov"):
        (tmp_path / "rose" / name).write_bytes(b"?")
    with pytest.warns(UserWarning, match=r"2 \.heic, 1 \.dng are left out, since Pillow does not read"):
        source = ImageFolder(tmp_path)
    assert [image.size for image, _ in (source[0], source[1])] == [(4, 4)] * 2
    assert source.left_out == {".heic": 2, ".dng": 1, ".mov": 1}


@pytest.mark.parametrize("target", [".", "..", "../tulip", "rose", "../rose"])
def test_links_that_lead_back_are_not_followed(tmp_path: Path, target: str) -> None:
    kept = [save(tmp_path / "pictures" / "rose" / "1.png"), save(tmp_path / "pictures" / "tulip" / "1.png")]
    (tmp_path / "pictures" / "rose" / "link").symlink_to(target)
    source = ImageFolder(tmp_path / "pictures")
    assert source.paths == kept
    assert sum(source.left_out.values()) == 1


def test_links_that_never_end_and_links_to_elsewhere(tmp_path: Path) -> None:
    kept = save(tmp_path / "pictures" / "rose" / "1.png")
    save(tmp_path / "disk" / "more" / "2.png")
    (tmp_path / "pictures" / "rose" / "disk").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "more" / "up").symlink_to(tmp_path / "disk")  # inside where the first link leads
    for here, there in (("a", "b"), ("b", "a")):
        (tmp_path / "pictures" / "rose" / here).mkdir()
        (tmp_path / "pictures" / "rose" / here / there).symlink_to(tmp_path / "pictures" / "rose" / there)
    folder = Folder(tmp_path / "pictures")
    pictures, _ = folder.files(recursive=True)
    assert pictures == sorted([kept, str(tmp_path / "pictures" / "rose" / "disk" / "more" / "2.png")])
    assert folder.left_out == {"links to folders that are here anyway": 3}


@pytest.mark.parametrize("name", ["1.txt", "1.TXT", "1.caption", "1.png.txt", "1.PNG.txt"])
def test_captions_in_all_spellings(tmp_path: Path, name: str) -> None:
    save(tmp_path / "1.png")
    (tmp_path / name).write_text("a rose")
    assert CaptionedFolder(tmp_path).captions == ["a rose"]


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("text", ["text", "caption", "prompt"])
@pytest.mark.parametrize("control", ["conditioning_image", "conditioning_image_file_name", "control_image"])
def test_metadata_in_all_spellings(tmp_path: Path, kind: str, text: str, control: str) -> None:
    rows = [{"file_name": f"{n}.png", text: f"rose {n}", control: f"control/{n}.png"} for n in range(2)]
    for number in range(2):
        save(tmp_path / f"{number}.png"), save(tmp_path / "control" / f"{number}.png", 9)
    save(tmp_path / "unlisted.png")
    if kind == "metadata.parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / kind)
    elif kind == "metadata.csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (tmp_path / kind).write_text("\n".join(lines))
    else:
        (tmp_path / kind).write_text("\n".join(map(json.dumps, rows)))
    source = CaptionedFolder(tmp_path)
    assert source.captions == ["rose 0", "rose 1"]
    assert source.control_paths == [str(tmp_path / "control" / f"{n}.png") for n in range(2)]
    assert source.left_out == {f"pictures that {kind} does not list": 1}


def test_files_under_other_keys_are_said_and_two_lists_refused(tmp_path: Path) -> None:
    save(tmp_path / "1.png"), save(tmp_path / "mask" / "1.png")
    row = {"file_name": "1.png", "text": "a rose", "mask": "mask/1.png", "url": "https://example.org"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.warns(UserWarning, match=r"names a file under 'mask' \(mask/1.png\), which is not used"):
        CaptionedFolder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,a\n")
    with pytest.raises(DataError, match=r"has metadata\.csv and metadata\.jsonl, which may say different things"):
        CaptionedFolder(tmp_path)


@pytest.mark.parametrize("name", ["1.txt", "1.caption", "metadata.csv", "metadata.parquet"])
def test_a_class_folder_says_that_it_does_not_read_captions(tmp_path: Path, name: str) -> None:
    save(tmp_path / "1.png"), save(tmp_path / "2.png")
    (tmp_path / name).write_text("file_name,text\n1.png,a\n")
    with pytest.warns(UserWarning, match="has captions of .*pictures.*which ImageFolder does not read"):
        ImageFolder(tmp_path)


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HOME", str(tmp_path))
    save(tmp_path / "rose" / "1.png")
    (tmp_path / "list.csv").write_text("image_path,class_id\nrose/1.png,0\n")
    assert len(ImageFolder("~")) == len(ListedImages("~", "~/list.csv")) == 1
