"""Quality of a class-conditional model's samples, compared with the real pictures of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError, check_counts
from lightning_difftune.metrics.extractors import torch_fidelity
from lightning_difftune.metrics.frechet import FrechetDistance, ReferenceCache, frechet_distance, reference_key
from lightning_difftune.protocols import Split, SupportsLabelledImages


class LabelledFeatures(NamedTuple):
    """Features and classes of pictures."""

    features: Tensor  # (N, D) float32
    labels: Tensor  # (N,) int64


def check_labelled(module: Any, name: str) -> None:
    """Check that the data of a module's trainer have training and held-out pictures with classes.

    Raises:
        ConfigError: If they have not; ``name`` is what needs them.
        DataError: If the pictures have captions instead of classes.
    """
    data = module.trainer.datamodule
    if not isinstance(data, SupportsLabelledImages):
        raise ConfigError(f"{name} needs labelled_images() of the data module; {type(data).__name__} has none.")
    for split in get_args(Split):
        next(iter(data.labelled_images(split)))


class SampleQuality:
    """Fréchet distances, precision and recall, and the share of samples whose class a classifier recognises.

    An evaluator of ``difftune compare``, for class-conditional modules whose data module has training and held-out
    pictures with classes. All four use the same samples and the same features:

    - the Fréchet distance to the held-out pictures, ``fid`` with Inception-v3 and ``fd_...`` with other extractors,
      and to the training pictures, with the suffix ``_train``;
    - ``precision`` and ``recall``, the shares of samples within the manifold of the held-out pictures and the reverse,
      by the k-th nearest neighbour (Kynkäänniemi et al., 2019), as torch-fidelity computes them;
    - ``recognised``, the share of samples that a linear probe, fitted to features of the training pictures, recognises
      as the requested class, and ``recognised_real``, the probe's accuracy on the held-out pictures.

    Args:
        feature_extractor: Maps pictures uint8 (B, 1 or 3, H, W) to features (B, D); has ``num_features``.
        num_samples: Generated pictures; sample i has class i mod K.
        batch_size: Pictures per batch.
        neighbourhood: k of precision and recall.
        cache_dir: Folder that caches features of the real pictures between runs.

    Raises:
        ConfigError: If a number is not positive, or torch-fidelity is not installed.
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        num_samples: int = 2000,
        batch_size: int = 100,
        neighbourhood: int = 3,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_counts("SampleQuality", num_samples=num_samples, batch_size=batch_size, neighbourhood=neighbourhood)
        self._prc: Any = torch_fidelity("metric_prc", "Precision and recall")
        self.key = FrechetDistance(feature_extractor).key
        self.feature_extractor = feature_extractor
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.neighbourhood = neighbourhood
        self.cache = ReferenceCache(cache_dir) if cache_dir is not None else None

    def check(self, module: Any) -> None:
        """See :class:`~lightning_difftune.protocols.ChecksModule`.

        Raises:
            ConfigError: If the module has no classes, or its data no labelled or no held-out pictures.
            DataError: If the pictures have captions instead of classes.
        """
        if not hasattr(module, "class_conditions"):
            raise ConfigError(
                f"SampleQuality draws samples of each class, which {type(module).__name__} does not have."
            )
        check_labelled(module, "SampleQuality")

    def evaluate(self, module: Any) -> dict[str, float]:
        """The metrics, for the module's current weights. Raises what :meth:`check` does."""
        self.check(module)
        data, prc = module.trainer.datamodule, self._prc
        with torch.no_grad():
            train, held_out = self.real(data, "train"), self.real(data, "val")
            samples = self.generated(module)
            manifolds = prc.prc_features_to_metric(
                samples.features,
                held_out.features,
                prc_neighborhood=self.neighbourhood,
                prc_batch_size=10_000,
                save_cpu_ram=False,
                verbose=False,
            )
        probe = fit_linear_probe(train.features, train.labels, module.num_classes)
        return {
            self.key: frechet_distance(held_out.features, samples.features).item(),
            f"{self.key}_train": frechet_distance(train.features, samples.features).item(),
            "precision": manifolds[prc.KEY_METRIC_PRECISION],
            "recall": manifolds[prc.KEY_METRIC_RECALL],
            "recognised": accuracy(probe, samples),
            "recognised_real": accuracy(probe, held_out),
        }

    def generated(self, module: Any) -> LabelledFeatures:
        """Samples of all classes in turn, at the trainer's precision."""
        labels = torch.arange(self.num_samples) % module.num_classes
        batches = torch.arange(self.num_samples).split(self.batch_size)
        features = []
        for batch in batches:
            with module.trainer.precision_plugin.forward_context():
                pictures = module.generate(batch, module.class_conditions(labels[batch]))
            features.append(self._features_of(pictures))
        return LabelledFeatures(torch.cat(features), labels)

    def real(self, data: SupportsLabelledImages, split: Split) -> LabelledFeatures:
        """The real pictures, from the cache if possible."""
        key = f"features {reference_key(data.images_identity(split), self.feature_extractor)}"
        stored = self.cache.load(key) if self.cache is not None else None
        if stored is None:
            batches = [(self._features_of(pictures), labels) for pictures, labels in data.labelled_images(split)]
            features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            stored = {"features": features, "labels": labels}
            if self.cache is not None:
                self.cache.store(key, stored)
        return LabelledFeatures(**stored)

    def _features_of(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 1 or 3, H, W) uint8 => features (B, D) float32 on the CPU."""
        self.feature_extractor.to(pictures.device).eval()
        return self.feature_extractor(pictures).float().cpu()


class LinearProbe(NamedTuple):
    """A linear classifier of features normalised to mean 0 and variance 1."""

    mean: Tensor  # (D,)
    std: Tensor  # (D,)
    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)

    def classify(self, features: Tensor) -> Tensor:
        """Features (N, D) => classes (N,) int64."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias).argmax(1)


def fit_linear_probe(features: Tensor, labels: Tensor, num_classes: int, weight_decay: float = 1e-2) -> LinearProbe:
    """Multinomial logistic regression on features (N, D) of classes (N,), by L-BFGS from zero.

    The loss is the mean cross-entropy plus ``weight_decay / 2`` times the squared norm of the weights; it is convex, so
    the result depends only on the arguments.

    Example:
        >>> features = torch.tensor([[-1.0, 3.0], [-2.0, 3.0], [2.0, 3.0], [1.0, 3.0]])
        >>> fit_linear_probe(features, torch.tensor([0, 0, 1, 1]), num_classes=2).classify(features).tolist()
        [0, 0, 1, 1]
    """
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs, labels = ((features - mean) / std).clone(), labels.clone()  # autograd refuses tensors of inference mode
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), labels) + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return LinearProbe(mean, std, weight.detach(), bias.detach())


def accuracy(probe: LinearProbe, pictures: LabelledFeatures) -> float:
    """The share of pictures whose label a probe predicts, between 0 and 1."""
    return (probe.classify(pictures.features) == pictures.labels).float().mean().item()
