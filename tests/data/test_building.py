"""The largest batch is found by doubling, on a simulated device with room for a number of samples."""

from __future__ import annotations

import pytest
import torch

from lightning_difftune.data import MemoryBank
from lightning_difftune.data.building import build_batch, largest_batch


class Device:
    """Computes at most ``capacity`` samples, and records the requests."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.asked = capacity, []

    def __call__(self, count: int) -> None:
        self.asked.append(count)
        if count > self.capacity:
            raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize(
    ("capacity", "limit", "expected", "asked"),
    [
        (100, 1000, 64, [16, 32, 64, 128]),
        (10_000, 50, 50, [16, 32, 50]),
        (5, 1000, 4, [16, 8, 4]),
        (16, 1000, 16, [16, 32]),
        (3, 2, 2, [2]),
    ],
)
def test_the_largest_batch_that_fits(capacity: int, limit: int, expected: int, asked: list[int]) -> None:
    device = Device(capacity)
    assert largest_batch(device, limit) == expected
    assert device.asked == asked


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        largest_batch(Device(0), 64)


def test_other_errors_are_not_taken_for_a_full_memory() -> None:
    def broken(count: int) -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_batch(broken, 64)


class Generator:
    """A pre-trained model on a device that holds 40 samples."""

    def __init__(self) -> None:
        self.device = Device(40)

    def bank_spec(self) -> dict[str, str]:
        return {"model": "none"}

    def generate_bank(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        self.device(len(indices))
        return {"latents": indices.float().view(-1, 1, 1, 1)}


def test_a_bank_is_built_with_it_and_a_finished_one_tries_nothing(tmp_path) -> None:
    generator = Generator()
    run = lambda count: generator.generate_bank(torch.arange(count))  # noqa: E731
    assert build_batch(7, tmp_path / "bank", run) == 7
    assert generator.device.asked == []
    size = build_batch(None, tmp_path / "bank", run)
    assert size == 32
    assert torch.equal(
        MemoryBank.build(tmp_path / "bank", generator, 100, batch_size=size).read(torch.arange(100))["latents"],
        torch.arange(100.0).view(-1, 1, 1, 1),
    )
    generator.device.asked.clear()
    assert build_batch(None, tmp_path / "bank", run) == 64
    assert generator.device.asked == []
