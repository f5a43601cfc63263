from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset, Subset

from lightning_difftune.data import ArrayImages, ClassCaptions, ControlExamples, ImageFolder, ImageTargets
from lightning_difftune.data.digests import content_digest_of
from lightning_difftune.data.source_facts import labels_of, location_of, paths_of
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.protocols import SupportsControlExamples

TEMPLATES = ("a photo of a {}", "a drawing of a {}", "{} on a table")


def flowers(count: int = 30) -> ArrayImages:
    images = np.repeat(np.arange(count, dtype=np.uint8), 64).reshape(count, 8, 8)
    return ArrayImages(images, np.arange(count) % 2, class_names=["rose", "oxeye_daisy"])


def test_captions_name_the_class_and_templates_depend_on_seed_and_index() -> None:
    source = ClassCaptions(flowers(), TEMPLATES)
    assert len(source) == 30
    for index, caption in enumerate(source.captions):
        name = ["rose", "oxeye daisy"][index % 2]
        assert caption in [template.format(name) for template in TEMPLATES]
        image, found = source[index]
        assert (image[0, 0], found) == (index, caption)
    assert len({caption.replace("oxeye daisy", "rose") for caption in source.captions}) == 3
    assert ClassCaptions(flowers(), TEMPLATES).captions == source.captions
    assert ClassCaptions(flowers(20), TEMPLATES).captions == source.captions[:20]
    assert ClassCaptions(flowers(), TEMPLATES, seed=1).captions != source.captions


def test_names_may_be_given_and_subsets_looked_through() -> None:
    subset = Subset(flowers(), [3, 4])
    assert ClassCaptions(subset).captions == ["a photo of a oxeye daisy", "a photo of a rose"]
    assert ClassCaptions(subset, class_names=["tulip", "lily"]).captions == ["a photo of a lily", "a photo of a tulip"]


class Unlabelled(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        raise AssertionError("pictures are not read")


def test_what_is_unknown_is_said() -> None:
    with pytest.raises(DataError, match=r"labels of Unlabelled are unknown"):
        ClassCaptions(Unlabelled(), class_names=["rose"])
    with pytest.raises(DataError, match=r"names of the classes of ArrayImages .* Pass `class_names`"):
        ClassCaptions(ArrayImages(np.zeros((2, 8, 8), np.uint8)))
    with pytest.raises(DataError, match=r"labels of ArrayImages are 0\.\.1, but there are 1 class names"):
        ClassCaptions(flowers(), class_names=["rose"])


@pytest.mark.parametrize("templates", [[], ["a photo"], "a photo of a {}"])
def test_templates_without_a_place_are_refused(templates: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"a list of texts with \{\} for the name"):
        ClassCaptions(flowers(), templates)


def test_what_is_known_without_reading_a_picture(tmp_path: Path) -> None:
    digests = {
        content_digest_of(ClassCaptions(flowers(), *options))
        for options in ((), (["a {}"],), (TEMPLATES, ["a", "b"]), (TEMPLATES, ["a", "b"], 1))
    } | {content_digest_of(flowers())}
    assert len(digests) == 5
    assert location_of(ClassCaptions(flowers()), 0) == "'a photo of a rose'"
    assert labels_of(ClassCaptions(flowers())) is None
    (tmp_path / "rose").mkdir()
    Image.new("RGB", (6, 5)).save(tmp_path / "rose" / "1.png")
    files = ClassCaptions(ImageFolder(tmp_path))
    assert paths_of(files) == [str(tmp_path / "rose" / "1.png")] == [location_of(files, 0)]


def test_a_transform_is_noticed() -> None:
    def identity(transform: Any) -> str:
        source = flowers()
        source.transform = transform  # type: ignore[attr-defined]
        return ImageTargets(ClassCaptions(source), 8).identity()

    assert identity(None) != identity(abs)


def test_examples_are_pictures_of_one_size_with_their_captions() -> None:
    examples = ControlExamples(ClassCaptions(flowers()), image_size=4)
    assert isinstance(examples, SupportsControlExamples)
    assert examples.num_control_examples == 30
    pictures, captions = examples.control_examples([5, 2])
    assert (pictures.shape, str(pictures.dtype)) == ((2, 3, 4, 4), "torch.uint8")
    assert pictures[:, 1, 0, 0].tolist() == [5, 2]
    assert captions == ["a photo of a oxeye daisy", "a photo of a rose"]
    with pytest.raises(DataError, match="image 0 has no caption"):
        ControlExamples(flowers(), image_size=4)


def test_a_damaged_example_is_named_or_replaced_together_with_its_caption(tmp_path: Path) -> None:
    for name in ("aster", "rose"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (6, 5), (9, 9, 9)).save(tmp_path / name / "1.png")
    (tmp_path / "aster" / "1.png").write_bytes(b"no picture")
    source = ClassCaptions(ImageFolder(tmp_path))
    with pytest.raises(DataError, match=r"image 0 \(.*aster/1\.png\) cannot be read"):
        ControlExamples(source, image_size=4).control_examples([0])
    with pytest.warns(UserWarning, match="the next readable picture takes its place"):
        pictures, captions = ControlExamples(source, image_size=4, on_corrupt="skip").control_examples([0])
    assert captions == ["a photo of a rose"]
    assert int(pictures[0, 0, 0, 0]) == 9
