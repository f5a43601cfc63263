"""The annotators' processing of network outputs, against slow twins in plain numpy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_difftune.data import HEDSketch, MidasDepth, MidasNormal, UperNetSegmentation
from lightning_difftune.data.annotators.networks import normalised, normals
from lightning_difftune.errors import ConfigError
from lightning_difftune.metrics.control_similarity import ade20k_palette


def gaussian(sigma: float, radius: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def blurred(image: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Rows, then columns; the border is mirrored without repeating the edge."""
    kernel = gaussian(sigma, radius)
    for _ in range(2):
        padded = np.pad(image, ((0, 0), (radius, radius)), mode="reflect")
        width = image.shape[1]
        image = np.stack([(padded[:, c : c + len(kernel)] * kernel).sum(1) for c in range(width)])  # transposed
    return image


def plain_thinning(edges: np.ndarray, threshold: float, sigma: float) -> np.ndarray:
    """Pixels that are above the threshold and no smaller than both neighbours in one of four directions."""
    smooth = blurred(edges.astype(float), sigma, radius=int(np.round(4 * sigma)))
    height, width = edges.shape
    kept = np.zeros(edges.shape, bool)
    for r in range(height):
        for c in range(width):
            for dr, dc in ((0, 1), (1, 0), (1, 1), (1, -1)):
                around = [(r + dr, c + dc), (r - dr, c - dc)]
                values = [smooth[i, j] for i, j in around if 0 <= i < height and 0 <= j < width]
                kept[r, c] |= smooth[r, c] > threshold and all(smooth[r, c] >= value for value in values)
    return kept


def soft_edges(size: int = 64, seed: int = 0) -> np.ndarray:
    """A ring and a line with soft flanks, as HED draws them, (H, W) uint8."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size].astype(float)
    ring = np.abs(np.hypot(rows - 30.3, columns - 25.7) - 17)
    line = np.abs(columns - 0.6 * rows - 20.2) / 1.17
    noise = generator.uniform(0, 12, (size, size))
    return (250 * np.exp(-(np.minimum(ring, line) ** 2) / 18) + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("threshold", "sigma", "pen"), [(127, 3.0, 3.0), (60, 1.0, 2.0)])
def test_sketch_equals_the_plain_thinning_and_pen(threshold: float, sigma: float, pen: float) -> None:
    edges = soft_edges()
    ink = HEDSketch(nn.Identity(), threshold=threshold, sigma=sigma, pen=pen).sketch(edges)
    thin = plain_thinning(edges, threshold, sigma)
    assert 0 < thin.mean() < 0.2
    drawn = blurred(255.0 * thin, pen, radius=int(np.round(3 * pen)))
    assert set(np.unique(ink)) == {0, 255}
    certain = np.abs(drawn - 4.5) > 1  # of 8-bit pictures, OpenCV rounds the kernel and the result to 1 / 256
    assert certain.mean() > 0.95
    np.testing.assert_array_equal((ink == 255)[certain], (drawn > 4.5)[certain])


class Edges(nn.Module):
    """Gives the same edges for every picture."""

    def __init__(self, edges: np.ndarray) -> None:
        super().__init__()
        self.edges = torch.from_numpy(edges).float() / 255

    def forward(self, pixels: Tensor) -> Tensor:
        return self.edges.expand(len(pixels), 1, -1, -1) + 1e-4  # so that 8 bits are met again


def test_a_sketch_is_drawn_from_8_bit_edges_and_nothing_from_nothing() -> None:
    edges = soft_edges()
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    annotator = HEDSketch(Edges(edges))
    np.testing.assert_array_equal(annotator(pictures)[1, 0].numpy(), annotator.sketch(edges))
    assert not HEDSketch(Edges(np.zeros((64, 64), np.uint8)))(pictures).any()


def depths(count: int = 2, size: int = 14) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, size + 3, generator=generator) * 5 + 20


def plain_normalised(depth: np.ndarray) -> np.ndarray:
    return (depth - depth.min()) / (depth.max() - depth.min())


def plain_normals(depth: np.ndarray, background: float, z: float) -> np.ndarray:
    """(H, W) => (3, H, W)."""
    height, width = depth.shape
    padded = np.pad(depth, 1, mode="reflect")
    near = plain_normalised(depth) >= background
    result = np.zeros((3, height, width), np.uint8)
    for r in range(height):
        for c in range(width):
            around = padded[r : r + 3, c : c + 3]
            x = (around[:, 2] - around[:, 0]) @ [1, 2, 1] * near[r, c]
            y = (around[2] - around[0]) @ [1, 2, 1] * near[r, c]
            vector = np.array([x, y, z]) / np.sqrt(x * x + y * y + z * z)
            result[:, r, c] = np.clip(vector * 127.5 + 127.5, 0, 255).astype(np.uint8)
    return result


@pytest.mark.parametrize(("background", "z"), [(0.1, 2 * np.pi), (0.5, 20.0)])
def test_normals_equal_the_plain_ones(background: float, z: float) -> None:
    depth = depths().double()
    expected = np.stack([plain_normals(one, background, z) for one in depth.numpy()])
    found = normals(depth, background, z).numpy()
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found[:, 0])) > 20


def test_a_slope_to_the_right_is_red_and_a_flat_picture_blue() -> None:
    ramp = torch.arange(8.0).expand(1, 8, 8) + 10
    right = normals(ramp, 0.0, 1.0)[0, :, 4, 4].tolist()
    down = normals(ramp.mT, 0.0, 1.0)[0, :, 4, 4].tolist()
    assert right[0] > 240
    assert right[1] == 127
    assert down[:2] == [right[1], right[0]]
    assert normals(torch.full((1, 8, 8), 3.0), 0.1, 1.0)[0, :, 4, 4].tolist() == [127, 127, 255]


class Depth(nn.Module):
    """A stand-in for DPT: its depth is the mean colour, at half the size of its input."""

    def __init__(self, size: Any = 32) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=size)
        layer = SimpleNamespace(residual_layer1=None)
        self.neck = SimpleNamespace(fusion_stage=SimpleNamespace(layers=[layer]))
        self.seen: list[Tensor] = []

    def forward(self, pixel_values: Tensor) -> Any:
        self.seen.append(pixel_values)
        return SimpleNamespace(predicted_depth=nn.functional.avg_pool2d(pixel_values.mean(1), 2) * 40 + 100)


def test_depth_is_scaled_to_each_picture_and_constants_give_zeros() -> None:
    pictures = torch.full((2, 3, 20, 20), 130, dtype=torch.uint8)
    pictures[0, :, :, :10] = 30
    network = Depth()
    maps = MidasDepth(network)(pictures)
    assert network.seen[0].shape == (2, 3, 32, 32)
    torch.testing.assert_close(network.seen[0][1], torch.full((3, 32, 32), 130 / 127.5 - 1))
    assert (maps[0].min(), maps[0].max(), maps[1].max()) == (0, 255, 0)
    assert (maps[0, 0, :, 2] < maps[0, 0, :, 17]).all()
    depth = depths()
    expected = [plain_normalised(one) for one in depth.double().numpy()]
    np.testing.assert_allclose(normalised(depth).numpy(), expected, atol=1e-6)


def test_depth_of_pictures_that_are_not_square() -> None:
    network = Depth((24, 32))
    assert MidasNormal(network)(torch.zeros(1, 3, 10, 20, dtype=torch.uint8)).shape == (1, 3, 10, 20)
    assert network.seen[0].shape == (1, 3, 24, 32)


class Logits(nn.Module):
    """A stand-in for UperNet: class k where the red channel says k, at half the size."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, pixel_values: Tensor) -> Any:
        red = (pixel_values[:, 0] * 0.229 + 0.485) * 255  # undoes ImageNet's normalisation
        codes = torch.arange(self.classes).view(1, -1, 1, 1)
        return SimpleNamespace(logits=nn.functional.avg_pool2d(-(red[:, None] - codes).abs(), 2))


def test_classes_are_painted_in_the_palette() -> None:
    pictures = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    pictures[:, 0, :, :8], pictures[:, 0, :, 8:] = 149, 2
    painted = UperNetSegmentation(Logits(150))(pictures)
    palette = ade20k_palette()
    assert torch.equal(painted[0, :, 3, 3], palette[149])
    assert torch.equal(painted[0, :, 3, 12], palette[2])
    own = UperNetSegmentation(Logits(3), palette=[[1, 1, 1], [2, 2, 2], [3, 4, 5]])(pictures)
    assert own[0, :, 3, 3].tolist() == [3, 4, 5]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="distinguishes 151 classes, but the palette has 150 colours"):
        UperNetSegmentation(Logits(151))(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"background_threshold of MidasNormal must be in \[0, 1\], found 2"):
        MidasNormal(background_threshold=2)
    with pytest.raises(ConfigError, match="z of MidasNormal must be positive, found 0"):
        MidasNormal(z=0)
