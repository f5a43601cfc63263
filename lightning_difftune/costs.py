"""What training on several devices costs in memory and communication, from the number of parameters alone."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4  # bytes of float32, in which weights, gradients and Adam's moments are kept, also under autocast
HALF = 2  # bytes of bfloat16, in which fully sharded training sends weights and gradients under bf16-mixed


@dataclass(frozen=True)
class Setup:
    """A network on some devices.

    Attributes:
        trained: Parameters that are trained.
        frozen: Parameters that are not, which every device holds in float32.
        devices: N.
        sharded: Whether the devices share out weights, gradients and moments (FSDP) or hold them whole (DDP).
        averages: Whether averages of the weights (EMA) are kept, which sharded training cannot.

    Example:
        >>> xl = Setup(trained=673_799_072, devices=8)
        >>> f"{xl.memory / 1e9:.1f} GB, {xl.communication / 1e9:.1f} GB a step"
        '13.5 GB, 4.7 GB a step'
    """

    trained: int
    frozen: int = 0
    devices: int = 1
    sharded: bool = False
    averages: bool = True

    @property
    def memory(self) -> float:
        """Bytes on each device: weights, gradients, two moments of Adam and averages.

        Activations, and the half-precision copies that autocast makes of weights, come on top.
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
