from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from lightning_difftune.errors import ConfigError, DataError
from pretraining import omniglot
from pretraining.omniglot import RenderedOmniglot

CLASS_NAMES = ["Runes/character01", "Runes/character02", "Shapes/character01"]
LABELS = np.array([0, 0, 1, 2])


def ring(ink_width: int = 3) -> np.ndarray:
    image = Image.new("1", (105, 105))
    ImageDraw.Draw(image).ellipse((20, 25, 84, 89), outline=1, width=ink_width)
    return np.asarray(image)


def lines(*strokes: tuple[int, ...], ink_width: int = 3) -> np.ndarray:
    image = Image.new("1", (105, 105))
    for stroke in strokes:
        ImageDraw.Draw(image).line(stroke, fill=1, width=ink_width)
    return np.asarray(image)


def bar() -> np.ndarray:
    return lines((50, 10, 50, 95))


def write_npz(path: Path, drawings: list[np.ndarray], **replaced: np.ndarray) -> Path:
    ink = np.packbits(np.stack(drawings).reshape(len(drawings), -1), axis=1)
    arrays = {"ink": ink, "labels": np.zeros(len(drawings), dtype=np.int16), "class_names": np.array(CLASS_NAMES)}
    np.savez(path, **{**arrays, **replaced})
    return path


@pytest.fixture(scope="module")
def drawings() -> list[np.ndarray]:
    zigzag = lines((20, 20, 85, 30), (85, 30, 25, 75), (25, 75, 80, 90))
    cross = lines((15, 50, 90, 55), (50, 15, 55, 90))
    return [ring(), zigzag, cross, bar()]


@pytest.fixture(scope="module")
def archive(drawings: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("omniglot") / "drawings.npz", drawings, labels=LABELS)


@pytest.fixture(scope="module")
def dataset(archive: Path) -> RenderedOmniglot:
    return RenderedOmniglot(archive, variants=6)


def test_items_are_pictures_with_labels_in_the_promised_order(dataset: RenderedOmniglot) -> None:
    assert len(dataset) == 4 * 6
    assert (dataset.num_classes, dataset.class_names) == (3, CLASS_NAMES)
    for index, label in enumerate(np.tile(LABELS, 6)):
        picture, found = dataset[index]
        assert picture.shape == (1, 28, 28)
        assert picture.dtype == torch.uint8
        assert found == dataset.labels[index] == label
        assert isinstance(found, int)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_works_in_a_data_loader(dataset: RenderedOmniglot) -> None:
    pictures, labels = next(iter(DataLoader(dataset, batch_size=5)))
    assert pictures.shape == (5, 1, 28, 28)
    assert labels.tolist() == [0, 0, 1, 2, 0]


def test_item_depends_on_seed_and_index_alone(archive: Path, dataset: RenderedOmniglot) -> None:
    fewer = RenderedOmniglot(archive, variants=2)
    torch.manual_seed(123)
    assert torch.equal(fewer.images, dataset.images[: len(fewer)])
    other_seed = RenderedOmniglot(archive, variants=2, seed=1)
    assert all((mine != theirs).any() for mine, theirs in zip(fewer.images, other_seed.images, strict=True))


def test_variants_of_a_drawing_differ(dataset: RenderedOmniglot) -> None:
    assert len(dataset.images.view(6, 4, -1)[:, 1].unique(dim=0)) == 6


def test_grey_levels_are_those_of_a_pen_on_black(dataset: RenderedOmniglot) -> None:
    pictures = dataset.images
    assert (pictures.amax((1, 2, 3)) == 254).all()
    assert (pictures == 0).float().mean() > 0.5
    soft = ((pictures > 0) & (pictures < 250)).sum((1, 2, 3)) / (pictures > 0).sum((1, 2, 3))
    assert ((soft > 0.25) & (soft < 0.9)).all()  # an antialiased rim around a saturated core


@pytest.mark.parametrize(("image_size", "box"), [(28, 20), (32, 24), (16, 16)])
def test_longer_side_fills_the_box(archive: Path, image_size: int, box: int) -> None:
    pictures = RenderedOmniglot(archive, variants=4, image_size=image_size, box=box).images.squeeze(1)
    assert pictures.shape[1:] == (image_size, image_size)
    sides = [int((pictures > 0).any(dim).sum(1)[i]) for i in range(len(pictures)) for dim in (1, 2)]
    longer = np.reshape(sides, (-1, 2)).max(1)
    assert longer.max() <= box
    assert longer.min() >= box - 1


def test_centre_of_mass_is_in_the_middle(dataset: RenderedOmniglot) -> None:
    pictures = dataset.images.squeeze(1).double()
    position = torch.arange(28.0, dtype=torch.float64)
    for dim in (1, 2):
        centre = (pictures.sum(dim) * position).sum(1) / pictures.sum((1, 2))
        # Shifts are whole pixels, and an item's jitter may not be shifted out of the picture.
        assert (centre - 14).abs().max() <= 0.51


@pytest.mark.parametrize("ink_width", [3, 5, 7])
def test_pen_is_as_wide_as_mnists_whatever_the_ink(tmp_path: Path, ink_width: int) -> None:
    level = lines((10, 50, 95, 50), ink_width=ink_width)
    pictures = RenderedOmniglot(write_npz(tmp_path / "level.npz", [level]), variants=60).images.squeeze(1).double()
    thickness = pictures[:, :, 14].sum(1) / 254
    assert thickness.mean().item() == pytest.approx(2.6, abs=0.3)
    assert 0.4 < thickness.std() < 1.0


def test_curves_get_the_same_pen_as_straight_strokes(tmp_path: Path) -> None:
    # Distances on the pixel lattice are uneven around a curve, which must not be taken for crowding.
    drawings = np.stack([ring(), lines((10, 50, 95, 50)), lines((15, 20, 90, 85))])
    strokes = omniglot._measure(torch.from_numpy(np.pad(drawings, ((0, 0), (18, 18), (18, 18)))))
    assert strokes.widest.min() > 12


def test_strokes_lean_right_on_average(tmp_path: Path) -> None:
    pictures = RenderedOmniglot(write_npz(tmp_path / "bar.npz", [bar()]), variants=60).images.squeeze(1).double()
    centred = torch.arange(28.0, dtype=torch.float64) - 14
    slopes = (pictures * centred * centred.view(-1, 1)).sum((1, 2)) / (pictures * centred.view(-1, 1) ** 2).sum((1, 2))
    assert slopes.mean().item() == pytest.approx(-0.25, abs=0.12)  # y points down
    assert slopes.std() > 0.1


def test_crowded_strokes_stay_apart(tmp_path: Path) -> None:
    comb = lines(*[(10, y, 95, y) for y in range(10, 95, 14)], (10, 10, 10, 94), ink_width=3)
    pictures = RenderedOmniglot(write_npz(tmp_path / "comb.npz", [comb]), variants=10).images.squeeze(1).float()
    columns = pictures[:, 6:22, 14]
    gaps = (columns[:, 1:-1] < columns[:, :-2]) & (columns[:, 1:-1] <= columns[:, 2:]) & (columns[:, 1:-1] < 170)
    assert (gaps.sum(1) >= 3).all()


def test_distance_equals_its_slow_twin() -> None:
    mask = np.random.default_rng(0).random((2, 17, 13)) < 0.03
    ys, xs = np.mgrid[:17, :13]
    for batch, found in zip(mask, omniglot._distance_to(torch.from_numpy(mask), reach=6).numpy(), strict=True):
        squared = np.min([(ys - y) ** 2 + (xs - x) ** 2 for y, x in np.argwhere(batch)], axis=0)
        np.testing.assert_allclose(found, np.sqrt(np.minimum(squared, 7**2)) - 0.5, rtol=1e-6)


def test_torchvision_folder_equals_npz(tmp_path: Path, drawings: list[np.ndarray], dataset: RenderedOmniglot) -> None:
    for number, (drawing, label) in enumerate(zip(drawings, LABELS, strict=True)):
        path = tmp_path / "omniglot-py" / "images_background" / CLASS_NAMES[label] / f"{number:04d}_01.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(~drawing).save(path)
    folder = RenderedOmniglot(tmp_path, variants=2)
    assert folder.class_names == CLASS_NAMES
    assert torch.equal(folder.images, dataset.images[: len(folder)])
    assert folder.labels.tolist() == dataset.labels[: len(folder)].tolist()

    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=rf"{path.name} cannot be read"):
        RenderedOmniglot(tmp_path)
    Image.new("1", (105, 105), 1).save(path)
    with pytest.raises(DataError, match=rf"{path.name}.* 105 x 105 with 0 black"):
        RenderedOmniglot(tmp_path)
    Image.new("1", (28, 30)).save(path)
    with pytest.raises(DataError, match=rf"{path.name}.* found 28 x 30"):
        RenderedOmniglot(tmp_path)


def test_missing_data_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.npz does not exist.*download=True"):
        RenderedOmniglot(tmp_path / "nowhere.npz")
    with pytest.raises(DataError, match=r"images_background holds no drawings.*download=True"):
        RenderedOmniglot(tmp_path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    text, array, empty = tmp_path / "text.npz", tmp_path / "array.npy", tmp_path / "empty.npz"
    text.write_text("not an archive")
    np.save(array, np.zeros(3))
    empty.touch()
    no_names = tmp_path / "no_names.npz"
    np.savez(no_names, ink=np.zeros((1, 1379), np.uint8), labels=np.zeros(1, int))
    truncated = write_npz(tmp_path / "truncated.npz", [bar()])
    truncated.write_bytes(truncated.read_bytes()[:-200])
    for path in (text, array, empty, no_names, truncated):
        with pytest.raises(
            DataError, match=rf"{path.name} is not an \.npz with the arrays ink, labels and class_names"
        ):
            RenderedOmniglot(path)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"ink": np.zeros((2, 28, 28), np.uint8)},
            r"ink must be uint8 of shape \(N, 1379\).*found uint8 \(2, 28, 28\)",
        ),
        ({"ink": np.zeros((2, 1379), np.float32)}, "found float32"),
        ({"ink": np.zeros((0, 1379), np.uint8)}, r"found uint8 \(0, 1379\)"),
        ({"labels": np.array([0, 3])}, r"integers in 0\.\.2.*3"),
        ({"labels": np.array([-1, 0])}, r"integers in 0\.\.2.*-1"),
        ({"labels": np.array([0])}, r"labels must be 2"),
        ({"labels": np.array([], np.int64)}, r"labels must be 2"),
        ({"labels": np.array([0.0, 1.0])}, "found float64"),
    ],
)
def test_malformed_arrays_are_refused(tmp_path: Path, replaced: dict[str, np.ndarray], message: str) -> None:
    path = write_npz(tmp_path / "bad.npz", [bar(), ring()], **replaced)
    with pytest.raises(DataError, match=rf"bad\.npz.*{message}"):
        RenderedOmniglot(path)


def test_blank_drawing_is_refused_by_number(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "blank.npz", [bar(), np.zeros((105, 105), bool)])
    with pytest.raises(DataError, match=r"1 drawings have no ink, the first is 1"):
        RenderedOmniglot(path)


def test_impossible_settings_are_refused(archive: Path) -> None:
    with pytest.raises(ConfigError, match="variants must be 1 or more, found 0"):
        RenderedOmniglot(archive, variants=0)
    with pytest.raises(ConfigError, match=r"box must lie in 1\.\.image_size \(28\), found 29"):
        RenderedOmniglot(archive, box=29)
