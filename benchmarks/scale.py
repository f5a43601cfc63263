"""Memory and communication of a training step on several devices, computed from model sizes.

    python benchmarks/scale.py                # eight devices
    python benchmarks/scale.py --devices 32

Nothing is measured: the numbers are those of lightning_difftune.cli.plan.speed, and hold without activations, which
depend on the batch and the size of the pictures (`difftune plan` counts them).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_difftune.cli.plan.speed import Setup
from lightning_difftune.models import DiT
from lightning_difftune.tuners import LoRA


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
