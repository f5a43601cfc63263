"""Target pictures, the memory bank, and the data module that interleaves them."""

from lightning_difftune.data.annotators import Canny, HEDSketch, MidasDepth, MidasNormal, UperNetSegmentation
from lightning_difftune.data.captioned_files import ADE20k, CaptionedFolder, CocoCaptions
from lightning_difftune.data.datamodule import MemoryBankDataModule
from lightning_difftune.data.derived import ClassCaptions, ControlExamples, Partition
from lightning_difftune.data.hub_images import HubImages
from lightning_difftune.data.image_arrays import ArrayImages, HandwrittenDigits, NpzImages
from lightning_difftune.data.image_files import CUB200, ImageFolder, ListedImages
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.latent_cache import LatentCache
from lightning_difftune.data.memory_bank import MemoryBank
from lightning_difftune.data.source_facts import ImageSource
from lightning_difftune.data.web_dataset import WebDatasetShards

__all__ = [
    "CUB200",
    "ADE20k",
    "ArrayImages",
    "Canny",
    "CaptionedFolder",
    "ClassCaptions",
    "CocoCaptions",
    "ControlExamples",
    "HEDSketch",
    "HandwrittenDigits",
    "HubImages",
    "ImageFolder",
    "ImageSource",
    "ImageTargets",
    "LatentCache",
    "ListedImages",
    "MemoryBank",
    "MemoryBankDataModule",
    "MidasDepth",
    "MidasNormal",
    "NpzImages",
    "Partition",
    "UperNetSegmentation",
    "WebDatasetShards",
]
