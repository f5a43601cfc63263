"""What all classes refuse alike."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_pictures, tiny_weights

from lightning_difftune import DiTDiffTuningModule
from lightning_difftune.callbacks import RegionalCompile
from lightning_difftune.data import ArrayImages, ClassCaptions, ListedImages, WebDatasetShards
from lightning_difftune.errors import ConfigError

PICTURES = np.zeros((4, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda folder: ArrayImages(PICTURES, [0, 1, 2, 3], class_names="rose"), "class_names of ArrayImages"),
        (lambda folder: ClassCaptions(tiny_pictures(), class_names="rose"), "class_names of ClassCaptions"),
        (lambda folder: ListedImages(folder, folder / "a.csv", class_names="rose"), "class_names of ListedImages"),
        (lambda folder: WebDatasetShards(str(folder / "a.tar"), class_names="rose"), "class_names of WebDatasetShards"),
        (
            lambda folder: DiTDiffTuningModule(str(tiny_weights(folder)), num_classes=4, class_names="rose"),
            "class_names of DiTDiffTuningModule",
        ),
        (lambda folder: RegionalCompile(devices="cuda"), "devices of RegionalCompile"),
        (lambda folder: RegionalCompile(blocks="Block"), "blocks of RegionalCompile"),
    ],
)
def test_a_text_is_not_taken_letter_by_letter(make, name, tmp_path) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is a list of texts, got '\w+'\. Write \['"):
        make(tmp_path)
