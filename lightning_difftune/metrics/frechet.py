"""The Fréchet distance between real and generated pictures, and a cache of the real pictures' statistics."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_difftune.errors import ConfigError, DataError, StoreError
from lightning_difftune.files import atomic_write, tensor_digest, text_digest
from lightning_difftune.metrics.extractors import InceptionV3Features

_CACHE_FORMAT = "difftune-reference-1"


class FrechetDistance(FrechetInceptionDistance):
    r"""Fréchet distance of two Gaussians with the means and covariances of real and generated features.

    .. math:: d^2 = \|\mu_r - \mu_g\|^2 + \mathrm{tr}\bigl(\Sigma_r + \Sigma_g - 2 (\Sigma_r \Sigma_g)^{1/2}\bigr)

    It is FID only with :class:`~lightning_difftune.metrics.InceptionV3Features`; otherwise see :attr:`name` and
    :attr:`key`. torchmetrics' class supplies the states: sums in float64, which add up over processes, so the distance
    does not depend on their number. Unlike there, the extractor always runs in eval mode without autocast, the real
    sums survive :meth:`reset` and can be saved and restored, and the trace is computed from factors of the covariances
    instead of eigenvalues of their product, which is several times faster and stays exact with fewer pictures than
    features. The real factor is kept between calls of :meth:`compute`.

    Args:
        feature_extractor: Maps pictures uint8 to features (B, D); has ``num_features`` = D and, optionally, ``name``.

    Raises:
        ConfigError: If the extractor has no ``num_features``.

    Example:
        >>> from torch import nn
        >>> class Means(nn.Module):
        ...     num_features = 3
        ...     def forward(self, images):
        ...         return images.float().mean((2, 3))
        >>> distance = FrechetDistance(Means())
        >>> distance.key
        'fd_means'
        >>> pictures = torch.arange(8 * 3 * 2 * 2, dtype=torch.uint8).view(8, 3, 2, 2)
        >>> distance.update(pictures, real=True)
        >>> distance.update(pictures + 5, real=False)  # three means, each moved by 5
        >>> round(distance.compute().item(), 6)
        75.0
    """

    def __init__(self, feature_extractor: nn.Module) -> None:
        if not isinstance(getattr(feature_extractor, "num_features", None), int):
            raise ConfigError(
                f"The feature extractor {type(feature_extractor).__name__} has no integer attribute `num_features`. "
                "Set it to the length D of the features (B, D) that its forward returns."
            )
        super().__init__(feature=feature_extractor, reset_real_features=False)
        self._real_factor: tuple[Tensor, Tensor] | None = None  # a covariance (D, D) and its factor (D, rank)

    @property
    def feature_extractor(self) -> nn.Module:
        """The network that computes the features."""
        return self.inception

    @property
    def num_features(self) -> int:
        """Length D of a picture's features."""
        return len(self.real_features_sum)

    @property
    def name(self) -> str:
        """The name of the metric in prose: the extractor's own ``name``, or FD and its class."""
        return getattr(self.inception, "name", f"FD-{type(self.inception).__name__}")

    @property
    def key(self) -> str:
        """The logged name: ``fid`` with Inception-v3, ``fd_...`` with any other extractor."""
        if isinstance(self.inception, InceptionV3Features):
            return "fid"
        slug = re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")
        return slug if slug.startswith("fd_") else f"fd_{slug}"

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add real or generated pictures (B, 1 or 3, H, W) uint8.

        Raises:
            ConfigError: If the extractor returns features of another shape than (B, ``num_features``).
            DataError: If the pictures are not uint8: floats in [0, 1] would become black.
        """
        if imgs.dtype != torch.uint8 or imgs.ndim != 4:
            raise DataError(
                f"A Fréchet distance takes pictures uint8 (B, 1 or 3, H, W), got {imgs.dtype} {tuple(imgs.shape)}. "
                "Scale [-1, 1] by (x + 1) * 127.5, round, clamp to 0..255 and cast to uint8."
            )
        self.inception.eval()
        with torch.autocast(imgs.device.type, enabled=False):
            features = self.inception(imgs)
        if features.shape != (len(imgs), self.num_features):
            raise ConfigError(
                f"The feature extractor {self.name} returned features {tuple(features.shape)} for {len(imgs)} pictures,"
                f" expected {(len(imgs), self.num_features)}. Set its num_features and flatten what it returns."
            )
        features = features.to(self.real_features_sum)
        if real:
            self.real_features_sum += features.sum(0)
            self.real_features_cov_sum += features.T @ features
            self.real_features_num_samples += len(imgs)
        else:
            self.fake_features_sum += features.sum(0)
            self.fake_features_cov_sum += features.T @ features
            self.fake_features_num_samples += len(imgs)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            DataError: If there are fewer than two real or two generated pictures, or features that are not finite.
        """
        for kind, total in (("real", self.real_features_cov_sum), ("generated", self.fake_features_cov_sum)):
            if not total.isfinite().all():
                raise DataError(
                    f"{self.name} returned features of {kind} pictures that are not finite, so there is no distance. "
                    "Run the extractor in float32, and check the pictures that it is given."
                )
        if self.real_features_num_samples < 2 or self.fake_features_num_samples < 2:
            raise DataError(
                "A Fréchet distance needs at least two real and two generated pictures, found "
                f"{int(self.real_features_num_samples)} real and {int(self.fake_features_num_samples)} generated. "
                "Check the reference pictures and num_samples."
            )
        mean_real, cov_real = _moments(
            self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples
        )
        mean_fake, cov_fake = _moments(
            self.fake_features_sum, self.fake_features_cov_sum, self.fake_features_num_samples
        )
        return _distance(mean_real, cov_real, self._factor_of(cov_real), mean_fake, cov_fake)

    def _factor_of(self, cov_real: Tensor) -> Tensor:
        """The factor of the real covariance, recomputed only if that has changed."""
        known = self._real_factor
        if known is None or known[0].device != cov_real.device or not torch.equal(known[0], cov_real):
            known = self._real_factor = (cov_real, _factor(cov_real))
        return known[1]

    def real_state(self) -> dict[str, Tensor]:
        """The sums over the real pictures on the CPU, for :meth:`load_real_state`."""
        return {
            "features_sum": self.real_features_sum.cpu().clone(),
            "features_outer_sum": self.real_features_cov_sum.cpu().clone(),
            "num_samples": self.real_features_num_samples.cpu().clone(),
        }

    def load_real_state(self, state: dict[str, Tensor]) -> None:
        """Replace the sums over the real pictures.

        Raises:
            StoreError: If the state belongs to an extractor with another number of features.
        """
        found = {key: tuple(value.shape) for key, value in state.items()}
        wanted = {key: tuple(value.shape) for key, value in self.real_state().items()}
        if found != wanted:
            raise StoreError(f"The statistics of real pictures hold {found}, {self.name} needs {wanted}.")
        self.real_features_sum = state["features_sum"].to(self.real_features_sum)
        self.real_features_cov_sum = state["features_outer_sum"].to(self.real_features_cov_sum)
        self.real_features_num_samples = state["num_samples"].to(self.real_features_num_samples)

    def reset_real(self) -> None:
        """Reset the sums over the real pictures, which :meth:`reset` keeps."""
        self.load_real_state({key: torch.zeros_like(value) for key, value in self.real_state().items()})


def frechet_distance(real_features: Tensor, generated_features: Tensor) -> Tensor:
    """The Fréchet distance of two sets of features, as :class:`FrechetDistance` computes it for pictures.

    Args:
        real_features: (N, D), N at least 2.
        generated_features: (M, D), M at least 2.

    Returns:
        The distance, a float64 scalar.

    Example:
        >>> features = torch.arange(12.0).view(4, 3)
        >>> round(frechet_distance(features, features + 5).item(), 6)
        75.0
    """
    (mean_real, cov_real), (mean_fake, cov_fake) = (
        _moments(features.sum(0), features.T @ features, torch.tensor(len(features)))
        for features in (real_features.double(), generated_features.double())
    )
    return _distance(mean_real, cov_real, _factor(cov_real), mean_fake, cov_fake)


def _distance(mean_real: Tensor, cov_real: Tensor, factor_real: Tensor, mean_fake: Tensor, cov_fake: Tensor) -> Tensor:
    """Means (D,), covariances (D, D) and a factor of the real one => the distance, a scalar."""
    distance = (mean_real - mean_fake).square().sum() + cov_real.trace() + cov_fake.trace()
    return (distance - 2 * _trace_of_root(factor_real, cov_fake)).clamp(min=0)  # rounding may leave -1e-12


def _moments(total: Tensor, outer: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of features (D,), of their outer products (D, D) and their count => mean (D,), covariance (D, D)."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def _trace_of_root(factor: Tensor, cov: Tensor) -> Tensor:
    """F (D, r) and a covariance S (D, D) => tr (F F^T S)^(1/2), a scalar."""
    triangle = _cholesky(cov)
    if triangle is not None:  # with S = L L^T, they are the singular values of F^T L
        return torch.linalg.svdvals(factor.T @ triangle).sum()
    # S is singular, and the roots of the eigenvalues of F^T S F are much faster to compute. Zero eigenvalues that
    # # rounding has changed would each add their root.
    product = factor.T @ cov @ factor
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    return values[values > product.trace() * len(cov) * torch.finfo(cov.dtype).eps].sqrt().sum()


def _factor(cov: Tensor) -> Tensor:
    """A covariance (D, D) => F (D, rank) with F F^T = cov; directions of pure rounding error are left out."""
    triangle = _cholesky(cov)
    if triangle is not None:
        return triangle
    variances, directions = torch.linalg.eigh(cov)
    significant = variances > variances[-1] * len(cov) * torch.finfo(cov.dtype).eps
    return directions[:, significant] * variances[significant].sqrt()


def _cholesky(cov: Tensor) -> Tensor | None:
    """A covariance (D, D) => L (D, D), lower, with L L^T = cov; ``None`` if it is singular up to rounding."""
    triangle, failed = torch.linalg.cholesky_ex(cov)
    least = len(cov) * torch.finfo(cov.dtype).eps * cov.diagonal().max()
    return None if failed or triangle.diagonal().min() ** 2 <= least else triangle


# -- statistics of real pictures on disk, so that they are not computed in every run ----------------------------------


class ReferenceCache:
    """A folder of safetensors files, one per pair of reference pictures and feature extractor.

    Args:
        folder: The folder, created when the first file is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"reference-{text_digest(key)[:16]}.safetensors"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The statistics of a key; ``None`` if there are none or, with a warning, if they are damaged."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                intact = file.metadata() == {"format": _CACHE_FORMAT, "key": key, "sha256": tensor_digest(state)}
        except (OSError, SafetensorError):
            intact = False
        if not intact:
            rank_zero_warn(f"The reference statistics in {path} are damaged; they are computed again.")
            return None
        return state

    def store(self, key: str, state: dict[str, Tensor]) -> None:
        """Write statistics atomically; only warn on failure, since they can be computed again."""
        path = self.path(key)
        try:
            atomic_write(path, save(state, {"format": _CACHE_FORMAT, "key": key, "sha256": tensor_digest(state)}))
        except OSError as error:
            rank_zero_warn(f"The reference statistics could not be stored in {path}: {error}. Training continues.")


def reference_key(identity: str, feature_extractor: nn.Module) -> str:
    """What determines reference statistics: the identity of the pictures, and the extractor, its weights and settings.

    Its settings are the attributes of its modules that are numbers or texts and named as an argument of their class,
    such as the size that it takes.
    """
    kind = type(feature_extractor)
    settings = [
        (name, key, vars(module)[key])
        for name, module in feature_extractor.named_modules()
        for key in sorted(signature(type(module).__init__).parameters)
        if _plain(vars(module).get(key))
    ]
    weights = tensor_digest(feature_extractor.state_dict())
    return f"{identity} {kind.__module__}.{kind.__qualname__} {weights} {text_digest(repr(settings))}"


def _plain(value: Any) -> bool:
    """Whether a value is a number, a text, or a list of such."""
    return all(map(_plain, value)) if isinstance(value, tuple | list) else isinstance(value, bool | int | float | str)
