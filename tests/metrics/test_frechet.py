from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_difftune.errors import ConfigError, DataError, StoreError
from lightning_difftune.metrics import FrechetDistance


class RandomFeatures(nn.Module):
    """A fixed random projection of the pixels, with a dropout that would show in training mode."""

    def __init__(self, num_features: int = 12, pixels: int = 48) -> None:
        super().__init__()
        self.num_features = num_features
        self.projection = nn.Linear(pixels, num_features, dtype=torch.float32)
        self.dropout = nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(0)
        self.projection.weight.data = torch.randn(num_features, pixels, generator=generator) / 100

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.projection(images.flatten(1).float()))


def pictures(count: int, seed: int, high: int = 256) -> Tensor:
    return torch.randint(0, high, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def features_of(extractor: nn.Module, images: Tensor) -> np.ndarray:
    with torch.no_grad():
        return extractor.eval()(images).double().numpy()


def measured(extractor: nn.Module, real: Tensor, fake: Tensor, batch_size: int = 16) -> float:
    distance = FrechetDistance(extractor)
    for batch in real.split(batch_size):
        distance.update(batch, real=True)
    for batch in fake.split(batch_size):
        distance.update(batch, real=False)
    value = distance.compute()
    assert value.dtype == torch.float64
    return value.item()


def test_equals_the_formula_in_numpy_and_scipy() -> None:
    extractor, real, fake = RandomFeatures(), pictures(100, 1), pictures(80, 2, high=200)
    a, b = features_of(extractor, real), features_of(extractor, fake)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert measured(extractor, real, fake) == pytest.approx(expected, rel=1e-9)


def test_equals_torchmetrics() -> None:
    extractor, real, fake = RandomFeatures(), pictures(100, 1), pictures(80, 2, high=200)
    theirs = FrechetInceptionDistance(extractor.eval())
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    in_float32 = theirs.compute().item()
    assert measured(extractor, real, fake) == pytest.approx(in_float32, rel=1e-5)


@pytest.mark.parametrize(("n_real", "n_fake"), [(300, 250), (300, 7), (7, 300), (9, 7), (2, 2)])
def test_is_exact_with_more_and_with_fewer_pictures_than_features(n_real: int, n_fake: int) -> None:
    extractor, real, fake = RandomFeatures(num_features=40), pictures(n_real, 1), pictures(n_fake, 2, high=200)
    a, b = features_of(extractor, real), features_of(extractor, fake)
    x, y = a - a.mean(0), b - b.mean(0)
    # With S = X^T X / (n - 1), tr (S_a S_b)^(1/2) is the nuclear norm of X Y^T: no covariance, nothing to cancel.
    root = np.linalg.norm(x @ y.T, "nuc") / np.sqrt((n_real - 1) * (n_fake - 1))
    expected = (
        np.sum((a.mean(0) - b.mean(0)) ** 2) + np.sum(x**2) / (n_real - 1) + np.sum(y**2) / (n_fake - 1) - 2 * root
    )
    assert measured(extractor, real, fake) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_are_at_distance_zero_and_constant_pictures_do_not_break_it() -> None:
    extractor, same = RandomFeatures(num_features=40), pictures(20, 1)
    assert measured(extractor, same, same) == pytest.approx(0, abs=1e-9)
    black = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    assert measured(extractor, black, black) == 0
    assert np.isfinite(measured(extractor, same, black))


def test_does_not_depend_on_how_the_pictures_are_batched() -> None:
    extractor, real, fake = RandomFeatures(), pictures(50, 1), pictures(50, 2)
    assert measured(extractor, real, fake, batch_size=7) == pytest.approx(
        measured(extractor, real, fake, batch_size=50), rel=1e-6
    )


def test_parts_measured_by_several_processes_add_up() -> None:
    extractor, real, fake = RandomFeatures(), pictures(50, 1), pictures(50, 2)
    first, second = FrechetDistance(extractor), FrechetDistance(extractor)
    for number, (some_real, some_fake) in enumerate(zip(real.split(10), fake.split(10), strict=True)):
        part = (first, second)[number % 2]
        part.update(some_real, real=True)
        part.update(some_fake, real=False)
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(measured(extractor, real, fake, batch_size=10), rel=1e-12)


def test_runs_the_extractor_in_evaluation_mode_at_full_precision_without_gradient() -> None:
    extractor, real, fake = RandomFeatures(), pictures(40, 1), pictures(40, 2)
    expected = measured(extractor, real, fake)
    extractor.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measured(extractor, real, fake) == expected
    distance = FrechetDistance(extractor)
    distance.update(real, real=True)
    assert not distance.real_features_sum.requires_grad


def test_other_real_pictures_give_another_distance() -> None:
    extractor, real, other, fake = RandomFeatures(), pictures(40, 1), pictures(40, 4, high=90), pictures(40, 2)
    distance = FrechetDistance(extractor)
    distance.update(real, real=True)
    distance.update(fake, real=False)
    assert distance.compute().item() == measured(extractor, real, fake, batch_size=40)
    distance.reset_real()
    distance.update(other, real=True)
    assert distance.compute().item() == measured(extractor, other, fake, batch_size=40)


def test_real_statistics_outlive_reset_and_can_be_moved_to_another_metric() -> None:
    extractor, real, fake = RandomFeatures(), pictures(40, 1), pictures(40, 2)
    expected = measured(extractor, real, fake)
    first = FrechetDistance(extractor)
    for batch in real.split(16):
        first.update(batch, real=True)
    first.update(pictures(5, 3), real=False)
    first.reset()
    second = FrechetDistance(extractor)
    second.load_real_state(first.real_state())
    for distance in (first, second):
        for batch in fake.split(16):
            distance.update(batch, real=False)
        assert distance.compute().item() == expected
    second.reset_real()
    assert second.real_state()["num_samples"] == 0


def test_loaded_statistics_are_a_copy() -> None:
    distance = FrechetDistance(RandomFeatures())
    distance.update(pictures(4, 1), real=True)
    state = distance.real_state()
    distance.update(pictures(4, 2), real=True)
    assert state["num_samples"] == 4
    assert not torch.equal(state["features_sum"], distance.real_features_sum)


def test_statistics_of_another_extractor_are_refused() -> None:
    small, large = FrechetDistance(RandomFeatures(12)), FrechetDistance(RandomFeatures(20))
    with pytest.raises(StoreError, match="needs"):
        large.load_real_state(small.real_state())
    with pytest.raises(StoreError, match="features_outer_sum"):
        large.load_real_state({})


def test_too_few_pictures_are_an_error_that_says_how_many() -> None:
    distance = FrechetDistance(RandomFeatures())
    distance.update(pictures(5, 1), real=True)
    distance.update(pictures(1, 2), real=False)
    with pytest.raises(DataError, match="5 real and 1 generated"):
        distance.compute()


def test_an_extractor_must_say_how_long_its_features_are_and_keep_to_it() -> None:
    with pytest.raises(ConfigError, match="num_features"):
        FrechetDistance(nn.Flatten())
    liar = RandomFeatures(12)
    liar.num_features = 13
    with pytest.raises(ConfigError, match=r"\(5, 12\).*\(5, 13\)"):
        FrechetDistance(liar).update(pictures(5, 1), real=True)


@pytest.mark.parametrize(
    ("name", "key"),
    [("FD-Digits (v2)", "fd_digits_v2"), ("Digits", "fd_digits"), ("FID", "fd_fid"), (None, "fd_randomfeatures")],
)
def test_only_inception_may_be_logged_as_fid(name: str | None, key: str) -> None:
    extractor = RandomFeatures()
    if name is not None:
        extractor.name = name
    assert FrechetDistance(extractor).key == key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("real", [True, False])
def test_pictures_that_are_not_bytes_are_refused(dtype, real):
    """Through an extractor of one's own, floats in [0, 1] used to give a distance, and a wrong one."""
    distance = FrechetDistance(RandomFeatures())
    with pytest.raises(DataError, match="takes pictures uint8"):
        distance.update(torch.zeros(4, 3, 4, 4, dtype=dtype), real=real)


@pytest.mark.parametrize("kind", ["real", "generated"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named(kind, value):
    class Broken(nn.Module):
        num_features = 2

        def forward(self, images):
            return images.float().flatten(1)[:, :2].where(images[:, 0, :1, 0] > 0, value)

    distance = FrechetDistance(Broken())
    good, bad = torch.ones(3, 3, 2, 2, dtype=torch.uint8), torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    distance.update(bad if kind == "real" else good, real=True)
    distance.update(bad if kind == "generated" else good, real=False)
    with pytest.raises(DataError, match=f"features of {kind} pictures that are not finite"):
        distance.compute()
