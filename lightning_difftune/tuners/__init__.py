"""The parameter-efficient methods of Table 1; ``tuner: null`` is full fine-tuning."""

from lightning_difftune.tuners.adaptformer import AdaptFormer
from lightning_difftune.tuners.difffit import BitFit, DiffFit
from lightning_difftune.tuners.lora import LoRA
from lightning_difftune.tuners.vpt import VPTDeep

__all__ = ["AdaptFormer", "BitFit", "DiffFit", "LoRA", "VPTDeep"]
