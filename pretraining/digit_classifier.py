"""``python -m pretraining.digit_classifier``: train the quickstart's digit classifier."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomAffine

from lightning_difftune.cli.quickstart.digits import digits
from lightning_difftune.metrics.digit_classifier import BUNDLED, DigitClassifier


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 30, seed: int = 0) -> DigitClassifier:
    """Train a classifier on pictures (N, 1, 20, 20) uint8 with labels (N,) int64, with shifts and slants."""
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
    """Train on the training digits, print the accuracy on the others, and write the bundled weights."""
    model = train_classifier(*digits("train"))
    images, labels = digits("test")
    accuracy = (model.classify(images) == labels).float().mean()
    print(f"accuracy on the {len(labels):,} held-out digits: {accuracy:.1%}")
    save_file(model.state_dict(), BUNDLED)


if __name__ == "__main__":
    main()
