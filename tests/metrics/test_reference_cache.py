from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from lightning_difftune.metrics.frechet import ReferenceCache, reference_key, tensor_digest


def statistics() -> dict[str, torch.Tensor]:
    return {
        "features_sum": torch.arange(3, dtype=torch.float64),
        "features_outer_sum": torch.eye(3, dtype=torch.float64),
        "num_samples": torch.tensor(7),
    }


def test_what_was_stored_is_loaded(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "new" / "folder")
    assert cache.load("flowers") is None
    cache.store("flowers", statistics())
    loaded = cache.load("flowers")
    assert loaded is not None
    assert tensor_digest(loaded) == tensor_digest(statistics())
    assert cache.load("birds") is None
    assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]  # nothing half-written stays


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "of another key"])
def test_a_damaged_file_is_not_loaded(tmp_path: Path, damage: str) -> None:
    cache = ReferenceCache(tmp_path)
    cache.store("flowers", statistics())
    path = cache.path("flowers")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-9])
    elif damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "foreign":
        path.write_bytes(save(statistics()))
    else:
        cache.store("birds", statistics())
        cache.path("birds").replace(path)
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.load("flowers") is None


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = ReferenceCache(tmp_path / "file")
    with pytest.warns(UserWarning, match="Training continues"):
        cache.store("flowers", statistics())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    cache.store("flowers", statistics())
    cache.path("birds").mkdir()  # a folder in the way: os.replace fails after the write
    with pytest.warns(UserWarning, match="could not be stored"):
        cache.store("birds", statistics())
    assert not list(tmp_path.glob("*.partial"))
    assert cache.load("flowers") is not None


def test_the_key_knows_pictures_kind_of_extractor_and_weights() -> None:
    torch.manual_seed(0)
    extractor, other = nn.Linear(2, 2), nn.Linear(2, 2)
    keys = {
        reference_key("flowers", extractor),
        reference_key("birds", extractor),
        reference_key("flowers", other),
        reference_key("flowers", nn.Identity()),
        reference_key("flowers", nn.Flatten()),
    }
    assert len(keys) == 5
    assert reference_key("flowers", extractor) in keys


def test_the_digest_covers_names_types_shapes_and_values() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(())}
    variants = [
        {"a": torch.zeros(4), "c": torch.ones(())},
        {"a": torch.zeros(4).int(), "b": torch.ones(())},
        {"a": torch.zeros(2, 2), "b": torch.ones(())},
        {"a": torch.zeros(4), "b": torch.zeros(())},
    ]
    assert len({tensor_digest(v) for v in [base, *variants]}) == 5
    assert tensor_digest(dict(reversed(base.items()))) == tensor_digest(base)


def test_the_key_knows_an_extractor_s_settings() -> None:
    class Resizing(nn.Module):
        def __init__(self, size: object) -> None:
            super().__init__()
            self.size, self.seen = size, 0

    class Whole(nn.Module):
        def __init__(self, size: object) -> None:
            super().__init__()
            self.first = Resizing(size)

    sizes = (224, 336, (224, 336), None, "large")
    assert len({reference_key("flowers", Whole(size)) for size in sizes}) == len(sizes)
    used = Whole(224).train()
    used.first.seen = 7  # a count of its own is no setting
    assert reference_key("flowers", used) == reference_key("flowers", Whole(224).eval())
