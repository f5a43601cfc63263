from __future__ import annotations

import warnings

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from PIL import Image
from tiny import write_pictures
from torch.utils.data import Dataset

from lightning_difftune.data import ImageFolder, MemoryBankDataModule
from lightning_difftune.data.derived import Partition
from lightning_difftune.data.image_arrays import ArrayImages
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.source_facts import labels_of
from lightning_difftune.errors import ConfigError

SOURCE = ArrayImages(np.arange(100, dtype=np.uint8).reshape(100, 1, 1), labels=np.arange(100))


def part(name: str, seed: int = 0, sizes: dict | None = None) -> list[int]:
    partition = Partition(SOURCE, sizes or {"train": 60, "val": 10, "test": 20}, name, seed)
    return [int(image.item()) for image, _ in (partition[i] for i in range(len(partition)))]


def test_parts_are_disjoint_and_of_their_sizes():
    parts = [part(name) for name in ("train", "val", "test")]
    assert [len(p) for p in parts] == [60, 10, 20]
    assert len(set().union(*parts)) == 90


def test_held_out_files_that_are_trained_on_are_said(tmp_path):
    write_pictures(tmp_path, 20)

    def fit_with(sizes, part="val"):
        whole = ImageFolder(tmp_path)
        target = Partition(whole, {"train": 0.8, "val": 0.2}, "train")
        data = MemoryBankDataModule(target, 3, 8, 1, val_target=Partition(whole, sizes, part))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data.setup("fit")
        return [said for warning in caught if "held-out" in (said := str(warning.message))]

    (said,) = fit_with({"val": 0.2, "train": 0.8})
    assert said.startswith(f"4 of 4 held-out pictures are training pictures, too, such as {tmp_path}/")
    assert said.endswith("the same sizes, in the same order, and the same seed.")
    assert fit_with({"train": 0.8, "val": 0.2}) == []
    assert fit_with({"train": 0.8, "val": 0.2}, "train") == []  # the same pictures on purpose


@pytest.mark.parametrize(("kind", "sizes", "found"), [(np.int64, (20, 9), [20, 9]), (np.float32, (0.5, 0.2), [50, 20])])
def test_sizes_of_numpy_are_those_of_python(kind, sizes, found):
    parts = dict(zip(("train", "test"), map(kind, sizes), strict=True))
    assert [len(Partition(SOURCE, parts, name)) for name in parts] == found


def test_partition_depends_on_the_seed_alone():
    assert part("val") == part("val")
    assert part("val") != part("val", seed=1)
    # Golden: a partition must be the same in years to come, on any machine.
    assert part("val") == [10, 14, 31, 32, 57, 66, 79, 84, 85, 89]


def test_shares_cover_everything():
    parts = [part(name, sizes={"a": 0.7, "b": 0.1, "c": 0.2}) for name in "abc"]
    assert [len(p) for p in parts] == [70, 10, 20]
    assert set().union(*parts) == set(range(100))


THREE_CLASSES = ArrayImages(np.arange(60, dtype=np.uint8).reshape(60, 1, 1), labels=np.repeat([0, 1, 7], [10, 20, 30]))


def test_counts_of_each_class_are_a_few_shot_target():
    few, more = (Partition(THREE_CLASSES, {"train": n, "test": 2}, "train", per_class=True) for n in (3, 8))
    assert labels_of(few).tolist() == [0] * 3 + [1] * 3 + [7] * 3
    assert set(few.indices) < set(more.indices)
    held_out = Partition(THREE_CLASSES, {"train": 8, "test": 2}, "test", per_class=True)
    assert labels_of(held_out).tolist() == [0] * 2 + [1] * 2 + [7] * 2
    assert not set(held_out.indices) & set(more.indices)
    # Golden: a partition must be the same in years to come, on any machine.
    assert few.indices == [2, 4, 7, 11, 26, 28, 34, 35, 59]


def test_shares_of_each_class_are_a_stratified_partition():
    parts = [Partition(THREE_CLASSES, {"train": 0.8, "test": 0.2}, name, per_class=True) for name in ("train", "test")]
    assert [np.bincount(labels_of(part))[[0, 1, 7]].tolist() for part in parts] == [[8, 16, 24], [2, 4, 6]]
    assert sorted([*parts[0].indices, *parts[1].indices]) == list(range(60))


def test_a_share_of_a_small_class_can_be_none():
    source = ArrayImages(np.zeros((11, 1, 1), np.uint8), labels=[0] * 10 + [1])
    assert labels_of(Partition(source, {"train": 0.9, "test": 0.1}, "test", per_class=True)).tolist() == [0]


def test_per_class_says_what_it_lacks():
    with pytest.raises(ConfigError, match="need 11 pictures, but class 0 has 10"):
        Partition(THREE_CLASSES, {"train": 11}, "train", per_class=True)
    with pytest.raises(ConfigError, match="knows its labels without reading its pictures"):
        Partition(Listed(["a", "b"]), {"train": 1}, "train", per_class=True)


def test_labels_and_identity_go_through():
    partition = Partition(SOURCE, {"a": 5, "b": 95}, "a")
    assert labels_of(partition).tolist() == [label for _, label in (partition[i] for i in range(5))]
    other = Partition(SOURCE, {"a": 5, "b": 95}, "a", seed=1)
    assert ImageTargets(partition, 4).identity() != ImageTargets(other, 4).identity()


class Listed(Dataset):
    def __init__(self, names: list[str]) -> None:
        self.paths = names

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.paths[index], 0


class ListedClasses(Listed):
    """Five classes that the last digit of a name tells apart."""

    @property
    def labels(self) -> list[int]:
        return [int(path[-5]) % 5 for path in self.paths]


@pytest.mark.parametrize("per_class", [False, True])
def test_order_of_the_file_system_does_not_matter(per_class):
    names = [f"/data/{number:03d}.jpg" for number in range(50)]
    shuffled = np.random.default_rng(3).permutation(names).tolist()
    sources = [ListedClasses(listed) for listed in (names, shuffled)]
    a, b = (Partition(source, {"train": 0.5, "test": 0.5}, "test", per_class=per_class) for source in sources)
    assert [a[i][0] for i in range(25)] == [b[i][0] for i in range(25)]


@pytest.mark.parametrize("sizes", [{"a": 4, "b": 1}, {"a": 0.8, "b": 0.2}])
def test_partition_in_a_configuration_file(tmp_path, sizes):
    for number in range(5):
        Image.new("L", (4, 4)).save(tmp_path / f"{number}.png")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--target", type=Dataset)
    source = {"class_path": "lightning_difftune.data.image_files.ImageFolder", "init_args": {"root": str(tmp_path)}}
    arguments = {"source": source, "sizes": sizes, "part": "a"}
    path = "lightning_difftune.data.derived.Partition"
    config = parser.parse_object({"target": {"class_path": path, "init_args": arguments}})
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # renamed in jsonargparse 4.49
    assert len(instantiate(config).target) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 10}, r"no part 'test' in the partition; found 'train'"),
        ({"train": 90, "test": 20}, "need 110 pictures, but the source has 100"),
        ({"train": 0.9, "test": 0.2}, "shares that sum to at most 1"),
        ({"train": 5, "test": 0.2}, "expected counts, or shares"),
        ({"train": 5, "test": -1}, "above 0"),
        ({"train": 0.5, "test": 0.001}, "'test' of 100 pictures is empty"),
    ],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        Partition(SOURCE, sizes, "test")
