from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch

from lightning_difftune.data.annotators import Canny
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.protocols import Annotator


def scenes(count: int = 4, size: int = 24, seed: int = 0) -> torch.Tensor:
    """Noisy pictures with a disc and a bar, so that edges run in all directions."""
    generator = np.random.default_rng(seed)
    pictures = generator.integers(0, 60, (count, 3, size, size))
    rows, columns = np.mgrid[:size, :size]
    for picture in pictures:
        row, column, radius = [*generator.integers(6, size - 6, 2).tolist(), int(generator.integers(4, 9))]
        picture[:, (rows - row) ** 2 + (columns - column) ** 2 < radius**2] += generator.integers(0, 180, (3, 1))
        picture[:, :, column : column + 3] += 10
    return torch.from_numpy(pictures.clip(0, 255).astype(np.uint8))


def plain_canny(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    """Canny's algorithm with loops: Sobel, the strongest channel, local maxima, hysteresis. (3, H, W) => (H, W)."""
    _, height, width = picture.shape
    padded = np.pad(picture.astype(int), ((0, 0), (1, 1), (1, 1)), mode="edge")
    dx, dy = np.zeros((height, width), int), np.zeros((height, width), int)
    for r in range(height):
        for c in range(width):
            best = -1
            for channel in padded[:, r : r + 3, c : c + 3]:
                x = int((channel[:, 2] - channel[:, 0]) @ [1, 2, 1])
                y = int((channel[2] - channel[0]) @ [1, 2, 1])
                if abs(x) + abs(y) > best:
                    best, dx[r, c], dy[r, c] = abs(x) + abs(y), x, y
    strength = np.pad(np.abs(dx) + np.abs(dy), 1)
    maxima = np.zeros((height, width), bool)
    for r in range(height):
        for c in range(width):
            x, y, here = dx[r, c], dy[r, c], strength[r + 1, c + 1]
            around = strength[r : r + 3, c : c + 3]
            if abs(y) < np.tan(np.pi / 8) * abs(x):
                maxima[r, c] = here > around[1, 0] and here >= around[1, 2]
            elif abs(y) > np.tan(3 * np.pi / 8) * abs(x):
                maxima[r, c] = here > around[0, 1] and here >= around[2, 1]
            else:
                before, after = (around[0, 2], around[2, 0]) if (x < 0) != (y < 0) else (around[0, 0], around[2, 2])
                maxima[r, c] = here > before and here > after
    inner = strength[1:-1, 1:-1]
    edges, candidates = maxima & (inner > high), maxima & (inner > low)
    while True:
        grown = np.pad(edges, 1)
        near = np.logical_or.reduce([grown[r : r + height, c : c + width] for r in range(3) for c in range(3)])
        if (candidates & near == edges).all():
            return edges
        edges = candidates & near


@pytest.mark.parametrize(("low", "high"), [(100, 200), (30, 90)])
def test_equals_the_plain_algorithm(low: float, high: float) -> None:
    pictures = scenes()
    maps = Canny(low, high)(pictures)
    assert (maps.shape, maps.dtype) == ((4, 1, 24, 24), torch.uint8)
    expected = np.stack([plain_canny(picture, low, high) for picture in pictures.numpy()])
    assert 0 < expected.mean() < 0.5
    np.testing.assert_array_equal(maps[:, 0].numpy(), expected * 255)


def test_a_flat_picture_has_no_edges_and_a_weak_step_none_either() -> None:
    pictures = torch.full((2, 3, 16, 16), 90, dtype=torch.uint8)
    pictures[1, :, :, 8:] += 24  # Sobel gives 4 x 24, below 100
    assert not Canny()(pictures).any()


def test_a_map_depends_on_its_picture_alone() -> None:
    pictures = scenes()
    torch.testing.assert_close(Canny()(pictures[2:3]), Canny()(pictures)[2:3])


def test_identity_tells_the_thresholds() -> None:
    assert isinstance(Canny(), Annotator)
    assert Canny().channels == 1
    assert len({Canny().identity(), Canny(50).identity(), Canny(high=250).identity()}) == 3


@pytest.mark.parametrize(
    "pictures",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_pictures_are_refused(pictures: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"Canny was given .*expected pictures uint8 \(B, 3, H, W\)"):
        Canny()(pictures)


@pytest.mark.parametrize(("low", "high"), [(-1, 5), (200, 100)])
def test_thresholds_in_the_wrong_order_are_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="0 <= low <= high"):
        Canny(low, high)


def test_without_opencv_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_import = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "cv2":
            raise ModuleNotFoundError("No module named 'cv2'")
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(ConfigError, match=r"Canny needs OpenCV.*pip install opencv-python-headless"):
        Canny()(scenes(1))
