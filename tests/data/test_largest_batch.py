"""The largest batch is found by doubling, on a pretended device that holds so many samples."""

from __future__ import annotations

import pytest
import torch

from lightning_difftune.data.largest_batch import largest_batch


class Device:
    """Computes ``capacity`` samples at most, and notes what was asked of it."""

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
