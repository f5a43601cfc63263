"""Which files of a folder hold a model's weights: one or several shards, of full precision or of a variant."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # as diffusers calls them
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
VARIANTS = ("", "bf16", "fp16")  # full precision first


class WeightFiles(NamedTuple):
    """The weights of one model.

    Attributes:
        tensors: The files that hold tensors, in order.
        index_name: The file that says which shard has which tensor, if there are shards.
        variant: Such as ``"fp16"``; ``None`` for full precision.
    """

    tensors: list[str]
    index_name: str | None = None
    variant: str | None = None

    @property
    def names(self) -> list[str]:
        """All files to have."""
        return self.tensors + ([self.index_name] if self.index_name is not None else [])

    @property
    def is_safe(self) -> bool:
        """Whether they are safetensors."""
        return self.tensors[0].endswith(".safetensors")


def find_weights(names: Collection[str]) -> WeightFiles | None:
    """The weights among the names of a folder's files; ``None`` if there are none, or not all shards.

    Full precision goes before bfloat16 and float16, safetensors before pickles.

    Example:
        >>> find_weights(["config.json", "diffusion_pytorch_model.fp16.safetensors"])
        WeightFiles(tensors=['diffusion_pytorch_model.fp16.safetensors'], index_name=None, variant='fp16')
        >>> shards = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
        >>> find_weights([*shards, "model.safetensors.index.json"]).tensors == shards
        True
        >>> find_weights([shards[0], "model.safetensors.index.json"])
    """
    return next(_candidates(names), None)


def missing_shards(names: Collection[str]) -> list[str]:
    """Shards that a folder lacks, of the first model of which it has some.

    Example:
        >>> missing_shards(["model-00001-of-00002.safetensors"])
        ['model-00002-of-00002.safetensors']
    """
    for name in sorted(names):
        if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(.+)", name):
            start, _, total, end = match.groups()
            return [file for i in range(int(total)) if (file := f"{start}-{i + 1:05}-of-{total}{end}") not in names]
    return []


def _candidates(names: Collection[str]) -> Iterator[WeightFiles]:
    for variant in VARIANTS:
        dotted = f".{variant}" if variant else ""
        for name in DIFFUSERS + TRANSFORMERS:
            stem, _, ending = name.rpartition(".")
            if f"{stem}{dotted}.{ending}" in names:
                yield WeightFiles([f"{stem}{dotted}.{ending}"], None, variant or None)
            index = f"{stem}.{ending}.index{dotted}.json"
            if index not in names:
                continue
            # Older releases of diffusers have the variant behind the number.
            for pattern in (rf"{stem}{dotted}-\d+-of-(\d+)\.{ending}", rf"{stem}-\d+-of-(\d+){dotted}\.{ending}"):
                shards = {found: int(m[1]) for found in sorted(names) if (m := re.fullmatch(pattern, found))}
                if shards and len(shards) == min(shards.values()):
                    yield WeightFiles(list(shards), index, variant or None)
