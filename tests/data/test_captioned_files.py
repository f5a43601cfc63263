from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_difftune.data import ADE20k, CaptionedFolder, CocoCaptions, ImageFolder, ImageTargets
from lightning_difftune.data.source_facts import location_of, paths_of
from lightning_difftune.errors import DataError


def save(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (level, level, level)).save(path)


def level(image: Image.Image) -> int:
    return np.asarray(image)[0, 0, 0].item()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Twelve pictures with three captions each, the annotations shuffled."""
    images = [{"id": 100 + i, "file_name": f"{i:012d}.png"} for i in range(12)]
    for i in range(12):
        save(tmp_path / "val2017" / f"{i:012d}.png", i)
    annotations = [
        {"id": 7 * i + k, "image_id": 100 + i, "caption": f" picture {i},\n caption {k} "}
        for k in range(3)
        for i in reversed(range(12))
    ]
    write_coco(tmp_path, {"images": images, "annotations": annotations})
    return tmp_path


def write_coco(root: Path, content: object) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(content))


def test_coco_draws_one_caption_a_picture(coco: Path) -> None:
    source = CocoCaptions(coco, "val2017")
    assert len(source) == len(source.captions) == len(source.paths) == 12
    for index in range(12):
        image, caption = source[index]
        assert level(image) == index
        assert caption == source.captions[index]
        assert caption.startswith(f"picture {index}, caption ")
    assert {caption[-1] for caption in source.captions} == {"0", "1", "2"}
    assert CocoCaptions(coco, "val2017").captions == source.captions
    assert CocoCaptions(coco, "val2017", seed=1).captions != source.captions


def test_a_caption_depends_on_seed_and_index_alone(coco: Path) -> None:
    whole = CocoCaptions(coco, "val2017").captions
    file = coco / "annotations" / "captions_val2017.json"
    content = json.loads(file.read_text())
    content["images"] = content["images"][:7]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] < 107]
    write_coco(coco, content)
    assert CocoCaptions(coco, "val2017").captions == whole[:7]


def test_coco_says_what_is_wrong(coco: Path) -> None:
    with pytest.raises(DataError, match=r"captions_train2017\.json does not exist; expected"):
        CocoCaptions(coco)
    images = [{"id": 1, "file_name": "000000000001.png"}, {"id": 2, "file_name": "000000000002.png"}]
    write_coco(coco, {"images": images, "annotations": [{"image_id": 1, "caption": "a"}]})
    with pytest.raises(DataError, match=r"1 pictures without a caption: 000000000002\.png"):
        CocoCaptions(coco, "val2017")
    write_coco(coco, {"images": images, "annotations": [{"image_id": 3, "caption": "a"}]})
    with pytest.raises(DataError, match="not a file of COCO captions"):
        CocoCaptions(coco, "val2017")
    for content in ([], {"images": images}, {"images": [{"id": 1}], "annotations": []}):
        write_coco(coco, content)
        with pytest.raises(DataError, match="not a file of COCO captions"):
            CocoCaptions(coco, "val2017")
    write_coco(coco, {"images": [], "annotations": []})
    with pytest.raises(DataError, match="lists no pictures"):
        CocoCaptions(coco, "val2017")
    write_coco(coco, {"images": [{"id": 1, "file_name": "x.png"}], "annotations": [{"image_id": 1, "caption": "a"}]})
    with pytest.raises(DataError, match=r"not below .*val2017: .*x\.png does not exist"):
        CocoCaptions(coco, "val2017")


def test_ade20k_has_one_prompt(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "images" / "training" / f"ADE_train_{i}.png", i)
    save(tmp_path / "images" / "validation" / "ADE_val_0.png", 9)
    source = ADE20k(tmp_path)
    prompt = "a high-quality, detailed, and professional image"
    assert [(level(image), caption) for image, caption in (source[i] for i in range(3))] == [
        (i, prompt) for i in range(3)
    ]
    held_out = ADE20k(tmp_path, "validation", prompt="a room")
    assert [(level(image), caption) for image, caption in (held_out[0],)] == [(9, "a room")]
    with pytest.raises(DataError, match=r"no pictures in .*testing; found no files.*ADEChallengeData2016"):
        ADE20k(tmp_path, "testing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        save(tmp_path / "images" / f"{i}.png", i)
        save(tmp_path / "controls" / f"{i}.png", 100 + i)
    write_rows(tmp_path, [{"file_name": f"images/{i}.png", "text": f"number {i}"} for i in (2, 0, 1)])
    return tmp_path


def write_rows(root: Path, rows: list) -> None:
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8-sig")


def test_folder_with_metadata(folder: Path) -> None:
    source = CaptionedFolder(folder)
    assert [(level(image), caption) for image, caption in (source[i] for i in range(3))] == [
        (2, "number 2"),
        (0, "number 0"),
        (1, "number 1"),
    ]
    assert source.captions == ["number 2", "number 0", "number 1"]
    assert source.control_paths is None


def test_folder_with_controls(folder: Path) -> None:
    rows = [{"file_name": f"images/{i}.png", "text": "", "conditioning_image": f"controls/{i}.png"} for i in range(3)]
    write_rows(folder, rows)
    source = CaptionedFolder(folder)
    assert [(level(image), caption, level(control)) for image, caption, control in (source[i] for i in range(3))] == [
        (i, "", 100 + i) for i in range(3)
    ]
    del rows[1]["conditioning_image"]
    write_rows(folder, rows)
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 2: no conditioning_image, as in 1 of 3 lines"):
        CaptionedFolder(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON"),
        ("[1]", "line 3: expected an object"),
        ('{"text": "x"}', r"line 3: file_name is None, expected a string; keys: \['text'\]"),
        ('{"file_name": "", "text": "x"}', "line 3: file_name is ''"),
        ('{"file_name": "a.png"}', "line 3: text is None"),
        ('{"file_name": "a.png", "text": ["x"]}', r"line 3: text is \['x'\]"),
        ('{"file_name": "a.png", "text": "x", "conditioning_image": 1}', "line 3: conditioning_image is 1"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(folder: Path, line: str, message: str) -> None:
    good = '{"file_name": "images/0.png", "text": "zero"}'
    (folder / "metadata.jsonl").write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(DataError, match=message):
        CaptionedFolder(folder)


def test_a_line_separator_inside_a_caption_does_not_end_the_line(folder: Path) -> None:
    line = '{"file_name": "images/0.png", "text": "two\u2028lines"}'
    (folder / "metadata.jsonl").write_text(line, encoding="utf-8")
    assert CaptionedFolder(folder).captions == ["two\u2028lines"]


def test_folder_with_text_files(tmp_path: Path) -> None:
    for name, number in (("b/1.png", 1), ("a.jpg", 2)):
        save(tmp_path / name, number)
        (tmp_path / name).with_suffix(".txt").write_text(f" number {number}\n", encoding="utf-8-sig")
    source = CaptionedFolder(tmp_path)
    assert [(level(image), caption) for image, caption in (source[i] for i in range(2))] == [
        (2, "number 2"),
        (1, "number 1"),
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 2 pictures under .* have no caption: .*a\.jpg"):
        CaptionedFolder(tmp_path)


def test_folders_without_pictures(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(DataError, match="lists no pictures"):
        CaptionedFolder(folder)
    write_rows(folder, [{"file_name": "9.png", "text": "nine"}])
    with pytest.raises(DataError, match=r"not below .*9\.png does not exist"):
        CaptionedFolder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no pictures under .*found no files; expected metadata\.jsonl"):
        CaptionedFolder(tmp_path / "empty")
    with pytest.raises(DataError, match=r"nowhere does not exist; expected metadata\.jsonl"):
        CaptionedFolder(tmp_path / "nowhere")


def content_of(source: Any) -> str | None:
    return ImageTargets(source, 8).unread_identity


def test_what_is_known_without_reading_a_picture(folder: Path) -> None:
    source = CaptionedFolder(folder)
    digest = content_of(source)
    assert digest == content_of(CaptionedFolder(folder))
    assert paths_of(source) == source.paths
    assert location_of(source, 1) == str(folder / "images" / "0.png")
    write_rows(folder, [{"file_name": f"images/{i}.png", "text": f"number {i}"} for i in (2, 0)] * 2)
    assert content_of(CaptionedFolder(folder)) != digest
    write_rows(folder, [{"file_name": f"images/{i}.png", "text": f"number {i}"} for i in (2, 0, 1)])
    assert content_of(CaptionedFolder(folder)) == digest
    os.utime(folder / "images" / "0.png", (1, 1))
    assert content_of(CaptionedFolder(folder)) != digest
    assert digest != content_of(ImageFolder(folder))


def test_another_caption_or_control_changes_the_digest(folder: Path) -> None:
    rows = [{"file_name": f"images/{i}.png", "text": "x", "conditioning_image": f"controls/{i}.png"} for i in range(3)]
    digests = set()
    for change in ({}, {"text": "y"}, {"conditioning_image": "controls/0.png"}):
        write_rows(folder, [*rows[:2], rows[2] | change])
        digests.add(content_of(CaptionedFolder(folder)))
    assert len(digests) == 3


def test_a_parent_of_splits_is_refused_as_for_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save(tmp_path / split / "1.png")
        (tmp_path / split / "1.txt").write_text("a rose")
    with pytest.raises(DataError, match="are the splits train, val: one would be trained on with the others"):
        CaptionedFolder(tmp_path)
    assert len(CaptionedFolder(tmp_path / "train")) == 1
    save(tmp_path / "more" / "1.png")
    (tmp_path / "more" / "1.txt").write_text("a rose")
    assert len(CaptionedFolder(tmp_path)) == 3
