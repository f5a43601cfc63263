"""``difftune data check``: every kind of problem in one folder, and its report."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import ExifTags, Image

from lightning_difftune.cli import main
from lightning_difftune.cli.data_check import HELD_OUT, split_of
from lightning_difftune.data import ArrayImages, ImageFolder, Partition
from lightning_difftune.data.inspection import Inspection, PictureFacts


def picture(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


@pytest.fixture
def trouble(tmp_path):
    """Twelve roses and three daisies, each with another defect."""
    roses, daisies = tmp_path / "flowers" / "rose", tmp_path / "flowers" / "daisy"
    for folder in (roses, daisies):
        folder.mkdir(parents=True)
    for number in range(8):
        picture(32, 32, seed=number).save(roses / f"{number}.png")
    shutil.copy(roses / "0.png", roses / "copy.png")
    picture(40, 20, "L", seed=20).save(roses / "grey.png")
    picture(32, 32, "RGBA", seed=21).save(roses / "alpha.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(64, 32, seed=22).save(roses / "turned.jpg", exif=exif)
    picture(32, 32, seed=3).save(daisies / "rose.png")  # the pixels of a rose
    (daisies / "cut.png").write_bytes((roses / "1.png").read_bytes()[:200])
    picture(20, 20, seed=24).save(daisies / "small [red].png")
    return tmp_path / "flowers"


def checked(capsys, *args):
    status = main(["data", "check", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_control_maps_are_counted(tmp_path, capsys):
    """A map of another shape is cropped otherwise than its picture."""
    rows = [{"file_name": f"{n}.png", "text": "a", "control": f"map-{n}.png"} for n in range(3)]
    for number, width in enumerate((32, 34, 64)):
        picture(32, 32, seed=number).save(tmp_path / f"{number}.png")
        picture(width, 32, seed=number).save(tmp_path / f"map-{number}.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert json.loads(checked(capsys, tmp_path, "--json")[1])["control_maps"] == {"maps": 3, "of_another_shape": 1}
    assert "3, of another shape than their picture: 1" in checked(capsys, tmp_path)[1]


def test_everything_is_counted(trouble, capsys):
    status, said = checked(capsys, trouble, "--json", "--image_size", "32")
    assert status == 1
    found = json.loads(said)
    assert (found["kind"], found["pictures"], found["labels"]) == ("ImageFolder", 15, "classes")
    assert found["classes"] == {"daisy": 3, "rose": 12}
    assert found["small_classes"] == ["daisy"]
    assert found["width"] == {"min": 20, "median": 32, "max": 40}
    assert found["height"] == {"min": 20, "median": 32, "max": 64}  # the turned one is 32 x 64 upright
    assert found["aspect_ratio"] == {"min": 0.5, "median": 1, "max": 2}
    assert [found[key] for key in ("enlarged", "cropped", "grey", "alpha", "exif_rotated")] == [2, 2, 1, 1, 1]
    (name,) = found["unreadable"]
    assert name == str(trouble / "daisy/cut.png")
    assert "OSError" in found["unreadable"][name]
    names = [
        [str(trouble / one) for one in group]
        for group in (["daisy/rose.png", "rose/3.png"], ["rose/0.png", "rose/copy.png"])
    ]
    assert sorted(found["duplicates"]) == names
    assert found["duplicates_of_two_classes"] == 1
    held = set(Partition(ImageFolder(trouble), {"train": 0.9, "val": 0.1}, "val").indices)
    assert (found["split"]["train"], found["split"]["val"]) == (15 - len(held), len(held)) == (14, 1)


def test_workers_see_the_same(trouble, capsys):
    assert checked(capsys, trouble, "--json", "--num_workers", "2") == checked(capsys, trouble, "--json")


def test_the_tables_name_what_is_wrong(trouble, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    status, said = checked(capsys, trouble)
    assert status == 1
    words = (
        "15 with classes",
        "daisy",
        "few",
        "cannot be read:",
        "cut.png",
        "the same picture:",
        "copy.png",
        "1 held out",
    )
    for word in words:
        assert word in said, said


def test_clean_data_is_fine_and_a_given_split_is_compared(tmp_path, capsys):
    for number in range(20):
        folder = tmp_path / ("train" if number < 15 else "val") / "rose"
        folder.mkdir(parents=True, exist_ok=True)
        picture(32, 32, seed=number).save(folder / f"{number}.png")
    shutil.copy(tmp_path / "train/rose/3.png", tmp_path / "val/rose/3.png")
    status, said = checked(capsys, tmp_path / "train", "--val", tmp_path / "val", "--json")
    assert status == 0
    classes = {"missing_classes": [], "unknown_classes": []}
    assert json.loads(said)["split"] == {"by": "given", "train": 15, "val": 6, "in_both": 1, "unreadable": {}} | classes
    whole = json.loads(checked(capsys, tmp_path, "--json")[1])
    assert whole == json.loads(said) | {"path": str(tmp_path)}, "a folder with both parts is divided as by `init`"
    (tmp_path / "val/rose/16.png").write_bytes(b"")
    assert checked(capsys, tmp_path / "train", "--val", tmp_path / "val", "--json")[0] == 1


def test_held_out_pictures_that_are_trained_on_are_counted_one_by_one():
    source = ArrayImages(np.zeros((40, 8, 8), np.uint8))
    held = Partition(source, HELD_OUT, "val").indices
    trained = next(index for index in range(40) if index not in held)
    twice = {held[0]: "a", held[1]: "a", trained: "a", held[2]: "b", held[3]: "b"}  # the last two are in one part
    facts = Inspection(source, [PictureFacts(0, 8, 8, digest=twice.get(i, str(i))) for i in range(40)])
    assert split_of(facts, None) == {"by": split_of(facts, None)["by"], "train": 36, "val": 4, "in_both": 2}


def test_arrays_and_captions(tmp_path, capsys):
    split = ["train"] * 3 + ["test"]
    np.savez(tmp_path / "a.npz", images=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), split=split)
    status, said = checked(
        capsys, tmp_path / "a.npz", "--split", "train", "--val", f"{tmp_path / 'a.npz'}:test", "--json"
    )
    found = json.loads(said)
    assert (status, found["pictures"], found["grey"], found["classes"]) == (0, 3, 3, {"class 0": 3})
    assert found["split"]["val"] == 1
    (tmp_path / "captions").mkdir()
    picture(8, 8).save(tmp_path / "captions/1.png")
    (tmp_path / "captions/1.txt").write_text("a rose")
    found = json.loads(checked(capsys, tmp_path / "captions", "--json")[1])
    assert (found["labels"], found["classes"], found["split"]["val"]) == ("captions", {}, 0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["data"], "`difftune data check PATH`"),
        (["data", "chekc"], "`difftune data check PATH`"),
        (["data", "check"], "following arguments are required: PATH"),
        (["data", "check", "nowhere"], "the image folder nowhere does not exist"),
    ],
)
def test_mistakes(args, message, capsys):
    assert main(args) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_thirty_oddities_fits_one_screen(tmp_path, capsys, monkeypatch):
    """As a phone, a file server, a Mac and a Windows share leave them."""
    root = tmp_path / "photos"

    def put(place, content=b"?"):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)

    for number in range(12):
        put(f"rose/IMG_{number:04d}.JPG", picture(40, 30, seed=number))
        put(f"tulip/{number}.png", picture(300, 300, seed=50 + number))
    put("rose/@eaDir/IMG_0000.JPG/SYNOPHOTO_THUMB_XL.jpg", picture(16, 12))  # Synology
    put("@eaDir/thumb.jpg", picture(16, 12))
    put("#recycle/old.jpg", picture(16, 12))
    put("$RECYCLE.BIN/S-1-5/$R1.jpg", picture(16, 12))  # Windows
    put("System Volume Information/IndexerVolumeGuid")
    put("lost+found/0001")  # Linux
    put("tulip/.thumbnails/1.jpg", picture(16, 12))  # Android
    put("tulip/Thumbnails/2.jpg", picture(16, 12))
    put("__MACOSX/rose/._IMG_0000.JPG")
    put("rose/._IMG_0001.JPG", b"\0\5\x16\7")  # AppleDouble
    for place in (".DS_Store", "rose/.DS_Store", "rose/Thumbs.db", "tulip/desktop.ini", ".Trashes/a.png"):
        put(place)
    put("rose/IMG_0100.HEIC"), put("rose/IMG_0101.heic"), put("tulip/raw.DNG"), put("tulip/clip.MOV")  # iPhone
    put("rose/IMG_0102.avif", picture(64, 64, seed=90))
    put("rose/readme.txt", "Gérard".encode("latin-1"))
    put("tulip/noextension", b"?")
    put("tulip/empty.jpg", b"")
    put("tulip/copy.png", picture(300, 300, seed=51))
    twelve = Image.fromarray(np.random.default_rng(3).integers(0, 4096, (40, 40)).astype(np.uint16))
    put("tulip/microscope.png", twelve)
    turned = picture(60, 30, seed=91)
    exif = turned.getexif()
    exif[274] = 6
    (root / "rose").mkdir(exist_ok=True)
    turned.save(root / "rose" / "turned.jpg", exif=exif)
    put("tulip/clear.png", picture(30, 30, "RGBA", seed=92)), put("tulip/grey.png", picture(30, 30, "L", seed=93))
    (root / "rose" / "all").symlink_to(root)  # to a parent
    (root / "tulip" / "a").mkdir(), (root / "tulip" / "b").mkdir()
    (root / "tulip" / "a" / "b").symlink_to(root / "tulip" / "b")  # two that never end
    (root / "tulip" / "b" / "a").symlink_to(root / "tulip" / "a")
    for number in range(3):
        (tmp_path / "held" / "lily").mkdir(parents=True, exist_ok=True)
        picture(40, 30, seed=200 + number).save(tmp_path / "held" / "lily" / f"{number}.png")
        (tmp_path / "held" / "rose").mkdir(exist_ok=True)
        picture(40, 30, seed=300 + number).save(tmp_path / "held" / "rose" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    status, said = checked(capsys, "photos", "--val", "held")
    assert status == 1
    assert len(said.splitlines()) < 50
    for word in (
        "pictures in @eaDir folders",
        "pictures in #recycle folders",
        "pictures in $RECYCLE.BIN folders",
        "pictures in Thumbnails folders",
        "pictures in __MACOSX folders",
        "pictures in hidden folders",
        "hidden or system files",
        "3 links to folders that are here anyway",
        "2 .heic",
        "1 .dng",
        "1 .mov",
        "1 without an extension",
        "tulip/empty.jpg",
        "1 pictures, largest value 4,09",
        "(12 bits)",
        "tulip/1.png = photos/tulip/copy.png",
        "no held-out pictures of: tulip",
        "held-out classes that the training pictures do not have, which a run refuses: lily",
        "31 with classes",
        "Convert them to JPEG or PNG",
    ):
        assert word in " ".join(said.replace("│", " ").split()), word


def test_captions_are_looked_at(tmp_path, capsys):
    for number, caption in enumerate(["", "a", "bb", "c" * 500, "a red house", "  "]):
        picture(32, 32, seed=number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}{['.txt', '.TXT', '.caption'][number % 3]}").write_text(caption)
    status, said = checked(capsys, tmp_path, "--json")
    captions = json.loads(said)["captions"]
    assert status == 0
    assert [name[-5:] for name in captions["empty"]] == ["0.png", "5.png"]
    assert captions["shortest"] == ["a", "bb", "a red house", "c" * 500]
    assert captions["longest"][0] == "c" * 500
    (tmp_path / "3.png").rename(tmp_path / "33.png")
    status, said = checked(capsys, tmp_path)
    assert status == 2
    assert "1 of 6 pictures" in said
    assert "have no caption" in said


def test_pictures_without_a_label_are_counted_as_a_run_refuses_them(tmp_path, capsys):
    """Test splits of the hub often have -1 in place of labels."""
    np.savez(tmp_path / "a.npz", images=np.zeros((12, 8, 8), np.uint8), labels=[0] * 11 + [-1])
    status, said = checked(capsys, tmp_path / "a.npz")
    assert status == 1
    assert "its label is -1, and classes have numbers from 0" in said
