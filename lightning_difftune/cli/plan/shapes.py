"""Published models by their shapes only, so that a plan needs neither weights nor a connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor
from torch.utils import swap_tensors

from lightning_difftune.cli.plan.probe import without_values
from lightning_difftune.models import checkpoints, hub
from lightning_difftune.models.dit import DiT

WEIGHTS = "DiT.safetensors"  # a stand-in for a DiT's file, with its architecture


def published(name: str) -> dict[str, dict[str, Any]] | None:
    """JSON files of a published model by path in its repository; ``None`` if its shapes are unknown.

    Example:
        >>> sorted(published("stabilityai/sd-vae-ft-ema")), published("somebody/else")
        (['config.json'], None)
    """
    known = yaml.safe_load((files(__package__) / "published.yaml").read_text(encoding="utf-8"))
    parts = known.get(name)
    if parts is None or "model_index.json" not in parts:
        return parts
    index = dict(parts.pop("model_index.json"))
    scheduler = parts.pop("scheduler")
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    content = {"model_index.json": index, "scheduler/scheduler_config.json": scheduler}
    for part, config in parts.items():
        content[f"{part}/config.json"] = config
        if part.startswith("text_encoder"):
            index[part] = ["transformers", config["architectures"][0]]
            tokenizer = part.replace("text_encoder", "tokenizer")
            index[tokenizer] = ["transformers", "CLIPTokenizer"]  # any tokenizer costs the same
            content[f"{tokenizer}/tokenizer_config.json"] = {"model_max_length": 77}
        else:
            index[part] = ["diffusers", config["_class_name"]]
    return content


@contextmanager
def published_shapes(with_values: bool) -> Iterator[AbstractContextManager[Any]]:
    """A ``with`` block in which published models are created from their shapes, without downloads.

    Their weights have random values, for timing, or none, so that even the largest takes no memory. Yields the mode for
    tensors without values.
    """
    shapes = without_values()
    mode: Any = nullcontext() if with_values else shapes
    from diffusers.models.modeling_utils import ModelMixin
    from transformers import PreTrainedModel

    fetch, fetch_file, read = hub.fetch, hub.fetch_file, checkpoints.read_safetensors
    opened, opened_text = (vars(kind)["from_pretrained"].__func__ for kind in (ModelMixin, PreTrainedModel))
    with TemporaryDirectory() as folder:
        root = Path(folder)

        def stand_in(repo_id: str, subfolders: tuple[str, ...], revision: str | None = None) -> Path:
            content = published(repo_id)
            if content is None:
                return fetch(repo_id, subfolders, revision)
            folder = write(root / repo_id, content)
            return folder / WEIGHTS if WEIGHTS in content else folder

        def stand_in_file(repo_id: str, name: str, revision: str | None = None) -> Path:
            content = published(repo_id)
            return fetch_file(repo_id, name, revision) if content is None else write(root / repo_id, content) / name

        def dit_state(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
            if root not in Path(file).parents:
                return read(file)
            with mode:
                return DiT(**json.loads(file.read_text())).state_dict(), {}

        def opener(original: Any, build: Any) -> Any:
            def from_pretrained(cls: Any, path: Any, *args: Any, **options: Any) -> Any:
                if root not in Path(path).parents:
                    return original(cls, path, *args, **options)
                with mode, default_dtype(options.get("dtype")):
                    made = build(cls, path).eval()
                whole: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
                return (made, whole) if options.get("output_loading_info") else made

            return classmethod(from_pretrained)

        network = opener(opened, lambda cls, path: cls.from_config(cls.load_config(path)))
        text_network = opener(opened_text, lambda cls, path: cls(cls.config_class.from_pretrained(path)))
        with (
            mock.patch.object(hub, "fetch", stand_in),
            mock.patch.object(hub, "fetch_file", stand_in_file),
            mock.patch.object(checkpoints, "read_safetensors", dit_state),
            mock.patch.object(ModelMixin, "from_pretrained", network),
            mock.patch.object(PreTrainedModel, "from_pretrained", text_network),
            mock.patch.object(torch.utils, "swap_tensors", swap_what_differs),
        ):
            yield shapes


def swap_what_differs(ours: Tensor, theirs: Tensor) -> None:
    """Replacement in ``module.to`` for parameters without values: does nothing if type and device are the same.

    Some parameters without values cannot be swapped.
    """
    if (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
        swap_tensors(ours, theirs)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """A ``with`` block in which weights are created in a given type, float32 by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype is not None else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def write(folder: Path, content: dict[str, dict[str, Any]]) -> Path:
    """Write a model's JSON files, and the other files that its loaders look for."""
    for name, settings in content.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
        for weights in ("diffusion_pytorch_model.safetensors", "model.safetensors"):  # never read
            file.with_name(weights).touch()
        if file.name == "tokenizer_config.json":  # the vocabulary does not change the costs
            bundled = hub.BUNDLED / "sd-nano-flowers" / "tokenizer"
            (file.parent / "tokenizer.json").write_bytes((bundled / "tokenizer.json").read_bytes())
            file.write_text(json.dumps({**json.loads((bundled / file.name).read_text()), **settings}))
    return folder
