from __future__ import annotations

import json
import os
import sys
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from tiny import finish, start
from torch import Tensor
from torchmetrics import Metric

from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.metrics import BlurredSSIM, ControlMSE, PixelAccuracy
from lightning_difftune.metrics.control_similarity import ade20k_palette, nearest_classes, paint

PALETTE = [[0, 0, 0], [255, 0, 0], [0, 200, 0], [10, 10, 240]]


def maps(count: int = 5, channels: int = 1, size: tuple[int, int] = (24, 30), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, *size), generator=generator).byte()


def gaussian(sigma: float, radius: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    return np.outer(weights, weights)


def filtered(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    radius = len(kernel) // 2
    padded = np.pad(image, radius, mode="reflect")
    height, width = image.shape
    size = len(kernel)
    return np.array(
        [[(padded[r : r + size, c : c + size] * kernel).sum() for c in range(width)] for r in range(height)]
    )


def plain_ssim(a: np.ndarray, b: np.ndarray, sigma: float, kernel_size: int | None, data_range: float) -> float:
    """The formula of the docstring with loops, for maps (c, H, W)."""
    blur = gaussian(sigma, ceil(3 * sigma) if kernel_size is None else kernel_size // 2)
    window, values = gaussian(1.5, 5), []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        x, y = filtered(x, blur), filtered(y, blur)  # noqa: PLW2901
        mean_x, mean_y = filtered(x, window), filtered(y, window)
        var_x, var_y = filtered(x * x, window) - mean_x**2, filtered(y * y, window) - mean_y**2
        cov = filtered(x * y, window) - mean_x * mean_y
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        values.append(
            (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        )
    return float(np.mean(values))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("sigma", "kernel_size", "data_range"), [(1.0, None, 255.0), (2.5, 7, 100.0)])
def test_ssim_equals_the_formula(channels: int, sigma: float, kernel_size: int | None, data_range: float) -> None:
    a, b = maps(2, channels), maps(2, channels, seed=1)
    b[:, :, :, :15] = a[:, :, :, :15]
    metric = BlurredSSIM(sigma, kernel_size, data_range)
    metric.update(a, b)
    pairs = zip(a.numpy(), b.numpy(), strict=True)
    expected = np.mean([plain_ssim(x, y, sigma, kernel_size, data_range) for x, y in pairs])
    assert 0.1 < expected < 0.95
    assert metric.compute().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (255, 255), (0, 255), (7, 90)])
def test_ssim_of_constant_maps_is_a_number(first: int, second: int) -> None:
    a, b = (torch.full((1, 1, 16, 16), level, dtype=torch.uint8) for level in (first, second))
    value = BlurredSSIM(sigma=1)(a, b).item()
    c1 = (0.01 * 255) ** 2  # with no variance, only the luminance term is left
    assert value == pytest.approx((2 * first * second + c1) / (first**2 + second**2 + c1), rel=1e-6)
    edges = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    edges[..., 8] = 255
    assert -1 < BlurredSSIM(sigma=1)(edges, a).item() < 1


def test_blur_forgives_a_small_shift() -> None:
    edges = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    edges[..., 10] = edges[..., 20, :] = 255
    shifted = edges.roll((1, 1), (2, 3))
    values = [BlurredSSIM(sigma)(edges, shifted).item() for sigma in (0.1, 1, 3)]
    assert values == sorted(values)
    assert values[0] < 0.6 < 0.9 < values[2]


def test_mse_equals_the_formula() -> None:
    a, b = maps(channels=3), maps(channels=3, seed=1)
    expected = np.mean((a.numpy() / 255 - b.numpy() / 255) ** 2)
    assert ControlMSE()(a, b).item() == pytest.approx(expected, rel=1e-12)
    assert ControlMSE()(a, a).item() == 0


def plain_classes(image: np.ndarray, palette: list[list[int]]) -> np.ndarray:
    """(3, H, W) => (H, W)."""
    _, height, width = image.shape
    classes = np.zeros((height, width), int)
    for r in range(height):
        for c in range(width):
            distances = [
                sum((int(v) - p) ** 2 for v, p in zip(image[:, r, c], colour, strict=True)) for colour in palette
            ]
            classes[r, c] = distances.index(min(distances))
    return classes


def test_nearest_colour_equals_the_plain_search() -> None:
    image = maps(2, 3, (8, 9))
    image[0, :, 0, 0] = torch.tensor([0, 100, 0])  # as far from black as from green
    for palette in (PALETTE, ade20k_palette().tolist()):
        found = nearest_classes(image, torch.tensor(palette, dtype=torch.uint8))
        np.testing.assert_array_equal(found.numpy(), [plain_classes(one, palette) for one in image.numpy()])


def test_painted_classes_are_found_again() -> None:
    palette = ade20k_palette()
    classes = torch.arange(150).view(1, 10, 15)
    decoded = nearest_classes(paint(classes, palette), palette)
    classes[classes == 48] = 6  # of one colour
    assert torch.equal(decoded, classes)


def test_accuracy_counts_pixels_of_equal_class_and_forgives_noise() -> None:
    classes = torch.randint(0, 4, (3, 10, 10), generator=torch.Generator().manual_seed(0))
    other = classes.clone()
    other[:, :2] = (other[:, :2] + 1) % 4
    control = paint(classes, torch.tensor(PALETTE, dtype=torch.uint8))
    noisy = (paint(other, torch.tensor(PALETTE, dtype=torch.uint8)).int() + maps(3, 3, (10, 10)).int() // 10).clamp(
        0, 255
    )
    assert PixelAccuracy(PALETTE)(noisy.byte(), control).item() == pytest.approx(0.8)
    assert PixelAccuracy()(control, control).item() == 1


@pytest.mark.parametrize("make", [lambda: BlurredSSIM(1), ControlMSE, lambda: PixelAccuracy(PALETTE)])
def test_batches_do_not_matter_and_examples_of_any_size_weigh_the_same(make: Any) -> None:
    a, b = maps(5, 3), maps(5, 3, seed=1)
    b[:2] = a[:2]
    whole, parts = make(), make()
    whole.update(a, b)
    for x, y in zip(a.split(2), b.split(2), strict=True):
        parts.update(x, y)
    assert parts.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)
    before = parts.compute().item()
    large = maps(1, 3, (40, 60))
    parts.update(large, large)
    best = 1.0 if parts.higher_is_better else 0.0
    assert parts.compute().item() == pytest.approx((5 * before + best) / 6, rel=1e-9)
    parts.reset()
    with pytest.raises(DataError, match="has seen no maps"), pytest.warns(UserWarning, match="before"):
        parts.compute()


def test_directions_and_keys() -> None:
    metrics = (BlurredSSIM(), ControlMSE(), PixelAccuracy())
    assert [metric.higher_is_better for metric in metrics] == [True, False, True]
    assert [metric.key for metric in metrics] == ["ssim", "mse", "pixel_accuracy"]


@pytest.mark.parametrize(
    ("generated", "control", "message"),
    [
        (torch.zeros(1, 1, 16, 16), maps(1), r"float32 \(1, 1, 16, 16\)"),
        (maps(1), maps(1)[0], r"uint8 \(1, 24, 30\)"),
        (maps(1, 2), maps(1, 2), r"\(1, 2, 24, 30\)"),
        (maps(2), maps(1), r"one shape, found \(2, 1, 24, 30\) of generated pictures and \(1, 1, 24, 30\)"),
        (maps(1, 3), maps(1, 1), "one shape"),
    ],
)
def test_maps_that_cannot_be_compared(generated: Tensor, control: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ControlMSE().update(generated, control)


def test_maps_too_small_for_the_blur_and_grey_segmentations() -> None:
    with pytest.raises(DataError, match=r"kernel of 19 needs maps of at least 10 pixels per side, found \(8, 30\)"):
        BlurredSSIM().update(maps(size=(8, 30)), maps(size=(8, 30)))
    with pytest.raises(DataError, match=r"needs maps of at least 6 pixels"):
        BlurredSSIM(0.5).update(maps(size=(5, 5)), maps(size=(5, 5)))
    BlurredSSIM().update(maps(size=(10, 10)), maps(size=(10, 10)))
    with pytest.raises(DataError, match="coloured maps"):
        PixelAccuracy().update(maps(), maps())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlurredSSIM(sigma=0), "sigma of BlurredSSIM must be positive, found 0"),
        (lambda: BlurredSSIM(kernel_size=4), "odd and positive, found 4"),
        (lambda: BlurredSSIM(data_range=0), "data_range of BlurredSSIM must be positive"),
        (lambda: PixelAccuracy([]), "at least one colour"),
        (lambda: PixelAccuracy([[0, 0, 256]]), r"entry 0 is \[0, 0, 256\]"),
    ],
)
def test_arguments_that_cannot_work(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_can_be_written_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--metric", type=Metric)
    settings = {"class_path": "lightning_difftune.metrics.PixelAccuracy", "init_args": {"palette": PALETTE}}
    assert parser.instantiate(parser.parse_object({"metric": settings})).metric.palette.tolist() == PALETTE


def measure_one_half(folder: Path, rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    values = []
    for metric in (BlurredSSIM(1), ControlMSE(), PixelAccuracy(PALETTE)):
        metric.update(maps(5, 3)[rank::2], maps(5, 3, seed=1)[rank::2])  # three examples and two
        values.append(metric.compute().item())
    torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(values))


@pytest.mark.slow  # starting processes
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    finish(start(__file__, 2, tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for value, metric in zip(first, (BlurredSSIM(1), ControlMSE(), PixelAccuracy(PALETTE)), strict=True):
        assert value == pytest.approx(metric(maps(5, 3), maps(5, 3, seed=1)).item(), rel=1e-12)


if __name__ == "__main__":
    measure_one_half(Path(sys.argv[1]), int(os.environ["RANK"]))
