from __future__ import annotations

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import Dataset

from lightning_difftune.data.image_arrays import ArrayImages
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.partition import Partition
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


def test_partition_depends_on_the_seed_alone():
    assert part("val") == part("val")
    assert part("val") != part("val", seed=1)
    # Golden: a partition must be the same in years to come, on any machine.
    assert part("val") == [10, 14, 31, 32, 57, 66, 79, 84, 85, 89]


def test_shares_cover_everything():
    parts = [part(name, sizes={"a": 0.7, "b": 0.1, "c": 0.2}) for name in "abc"]
    assert [len(p) for p in parts] == [70, 10, 20]
    assert set().union(*parts) == set(range(100))


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


def test_order_of_the_file_system_does_not_matter():
    names = [f"/data/{number:03d}.jpg" for number in range(50)]
    shuffled = np.random.default_rng(3).permutation(names).tolist()
    a, b = (Partition(Listed(n), {"train": 0.5, "test": 0.5}, "test") for n in (names, shuffled))
    assert [a[i][0] for i in range(25)] == [b[i][0] for i in range(25)]


@pytest.mark.parametrize("sizes", [{"a": 4, "b": 1}, {"a": 0.8, "b": 0.2}])
def test_partition_in_a_configuration_file(tmp_path, sizes):
    for number in range(5):
        Image.new("L", (4, 4)).save(tmp_path / f"{number}.png")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--target", type=Dataset)
    source = {"class_path": "lightning_difftune.data.image_files.ImageFolder", "init_args": {"root": str(tmp_path)}}
    arguments = {"source": source, "sizes": sizes, "part": "a"}
    path = "lightning_difftune.data.partition.Partition"
    config = parser.parse_object({"target": {"class_path": path, "init_args": arguments}})
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # renamed in jsonargparse 4.49
    assert len(instantiate(config).target) == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": 10}, r"no part 'test' in the partition; found 'train'"),
        ({"train": 90, "test": 20}, "need 110 pictures, but there are 100"),
        ({"train": 0.9, "test": 0.2}, "shares that sum to at most 1"),
        ({"train": 5, "test": 0.2}, "expected counts, or shares"),
        ({"train": 5, "test": -1}, "above 0"),
        ({"train": 0.5, "test": 0.001}, "'test' of 100 pictures is empty"),
    ],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        Partition(SOURCE, sizes, "test")
