"""Memory and communication of a training step on several devices, computed from model sizes.

    python benchmarks/scale.py                # eight devices
    python benchmarks/scale.py --devices 32

Nothing is measured. Activations, which depend on the batch and the size of the pictures, are extra; `difftune plan`
counts them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_difftune.models import DiT
from lightning_difftune.tuners import LoRA

FLOAT = 4  # bytes of float32, in which weights, gradients and Adam's moments are kept, also under autocast
HALF = 2  # bytes of bfloat16, in which fully sharded training sends weights and gradients under bf16-mixed


@dataclass(frozen=True)
class Setup:
    """A network on some devices.

    Attributes:
        trained: Parameters that are trained.
        frozen: Parameters that are not, which every device holds in float32.
        devices: N.
        sharded: Whether weights, gradients and moments are sharded over the devices (FSDP) or replicated (DDP).
        averages: Whether averages of the weights (EMA) are kept, which sharded training cannot.

    Example:
        >>> xl = Setup(trained=673_799_072, devices=8)
        >>> f"{xl.memory / 1e9:.1f} GB, {xl.communication / 1e9:.1f} GB per step"
        '13.5 GB, 4.7 GB per step'
    """

    trained: int
    frozen: int = 0
    devices: int = 1
    sharded: bool = False
    averages: bool = True

    @property
    def memory(self) -> float:
        """Bytes on each device: weights, gradients, two moments of Adam and averages.

        Activations, and autocast's half-precision copies of weights, are extra.
        """
        copies = 4 + (self.averages and not self.sharded)
        return self.trained * FLOAT * copies / (self.devices if self.sharded else 1) + self.frozen * FLOAT

    @property
    def communication(self) -> float:
        """Bytes that each device sends in a step.

        A ring sends (N - 1) / N of what is gathered or scattered, and twice that to reduce it for all. DDP reduces the
        gradients in float32. FSDP gathers the weights in the forward and in the backward pass and scatters the
        gradients, in bfloat16 under bf16-mixed.
        """
        passes = 3 * HALF if self.sharded else 2 * FLOAT
        return self.trained * passes * (self.devices - 1) / self.devices


def trained_and_frozen(*networks: nn.Module) -> tuple[int, int]:
    """Parameters that are trained, and that are not."""
    parameters = [p for network in networks for p in network.parameters()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters) - trained


def models() -> Iterator[tuple[str, int, int]]:
    """Names and parameters of the networks of the paper's two parts, without values."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    with torch.device("meta"):
        for size in ("S", "B", "L", "XL"):
            yield f"DiT-{size}/2", *trained_and_frozen(DiT.from_size(f"DiT-{size}/2"))
        xl = DiT.from_size("DiT-XL/2", num_classes=101)
        LoRA().apply(xl)
        yield "DiT-XL/2, LoRA", *trained_and_frozen(xl)
        unet: Any = UNet2DConditionModel(cross_attention_dim=768)
        yield "SD 1.5, whole UNet", *trained_and_frozen(unet)
        control: Any = ControlNetModel(cross_attention_dim=768)
        yield "SD 1.5, ControlNet", *trained_and_frozen(control, unet.requires_grad_(False))


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    devices = parser.parse_args().devices
    print(f"| network | trained | frozen | DDP: GB a GPU | sent a step | FSDP on {devices}: GB a GPU | sent a step |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, trained, frozen in models():
        setups = [Setup(trained, frozen, devices, sharded) for sharded in (False, True)]
        cells = [f"{bytes_ / 1e9:.2f}" for setup in setups for bytes_ in (setup.memory, setup.communication)]
        if "LoRA" in name:  # sharding would send the frozen weights of the same network in every step
            cells[2:] = ["", ""]
        print(f"| {name} | {trained / 1e6:,.1f} M | {frozen / 1e6:,.1f} M | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
