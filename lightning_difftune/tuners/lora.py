"""LoRA (Hu et al., 2022) with ``peft``; reads and writes the files of ``peft`` and of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError, ConfigError, check_counts, check_lists
from lightning_difftune.files import check_sums, read_safetensors, write_safetensors
from lightning_difftune.tuners import lora_files
from lightning_difftune.tuners.base import Model, ParameterEfficientTuner

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."  # of every name in peft's files
TABLE = "y_embedder.embedding_table"
PROJECTIONS = ("q", "v"), ("to_q", "to_v")  # names in timm's split attention, and in diffusers'


class LoRA(ParameterEfficientTuner):
    """Train low-rank updates of the query and value projections, and the label table.

    timm's attention fuses query, key and value; they are split into three equivalent layers, and :meth:`merge` fuses
    them again. 1,149,696 parameters of DiT-XL/2 with 101 classes at rank 8 (Table 1).

    Args:
        rank: Rank r of the updates.
        alpha: Updates are scaled by alpha / r. The value behind Table 1 is not public; the default, r, scales by 1.
        target_modules: Names, or last parts of names, of the updated linear layers, as in ``peft``. By default the
            network's query and value projections: ``q`` and ``v`` of a DiT, ``to_q`` and ``to_v`` of diffusers'
            networks.

    Raises:
        ConfigError: If the rank or alpha is not positive.
    """

    def __init__(self, rank: int = 8, alpha: int | None = None, target_modules: tuple[str, ...] | None = None) -> None:
        check_counts("LoRA", rank=rank)
        check_lists("LoRA", target_modules=target_modules)
        if alpha is not None and alpha <= 0:
            raise ConfigError(f"alpha of LoRA must be above 0, found {alpha}: nothing would be trained.")
        self.rank = rank
        self.alpha = rank if alpha is None else alpha
        self._follows_model = target_modules is None
        self.target_modules = PROJECTIONS[0] if target_modules is None else tuple(target_modules)

    def insert(self, model: nn.Module) -> list[nn.Parameter]:
        """Split the fused layers if a target is part of one, and let ``peft`` insert its layers."""
        from peft import inject_adapter_in_model

        layers = model.named_modules()
        widths = {name: min(layer.weight.shape) for name, layer in layers if isinstance(layer, nn.Linear)}
        parts = {f"{name}.{part}": widths[name] for name in fused_layers(model) for part in "qkv"}
        widths |= parts
        known = {name.rpartition(".")[2] for name in widths}
        if self._follows_model:
            self.target_modules = next((names for names in PROJECTIONS if known.issuperset(names)), PROJECTIONS[0])
        targets = [name for name in widths if any(f".{name}".endswith(f".{end}") for end in self.target_modules)]
        missing = [end for end in self.target_modules if not any(f".{name}".endswith(f".{end}") for name in targets)]
        if missing or not targets:
            raise ConfigError(
                f"LoRA looks for linear layers whose names end in {missing or list(self.target_modules)}; "
                f"{type(model).__name__} has none. It has layers called {', '.join(sorted(known))}."
            )
        narrow = min(targets, key=widths.__getitem__)
        if self.rank > widths[narrow]:
            raise ConfigError(
                f"LoRA's rank {self.rank} is larger than the layer {narrow}, which is {widths[narrow]} wide."
            )
        if parts.keys() & targets:
            split_qkv(model)
        inject_adapter_in_model(self._config(), model)
        updates = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        for parameter in updates:  # peft gives them the frozen weights' type, too coarse for training
            parameter.data = parameter.data.float()
        return updates

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """A ``with`` block with the updates off: a diffusers network is as before tuning, to the bit.

        Example:
            >>> tuner, model = LoRA(1, 1, ("0",)), nn.Sequential(nn.Linear(2, 2))
            >>> x, before = torch.ones(1, 2), model(torch.ones(1, 2))
            >>> tuner.apply(model)
            >>> _ = nn.init.ones_(model[0].lora_B["default"].weight)
            >>> with tuner.disabled(model):
            ...     torch.equal(model(x), before)
            True
            >>> torch.equal(model(x), before)
            False
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        try:
            for layer in layers:  # `enable_adapters` would also freeze them
                layer._disable_adapters = True
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def merge(self, model: Model) -> Model:
        """A frozen copy with the updates merged into its linear layers, and query, key and value fused again."""
        from peft.tuners.lora import LoraLayer

        merged = self._untuned_copy(model).float()  # float32, since bfloat16 would round the updates away
        for name, layer in list(merged.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge(safe_merge=True)
                merged.set_submodule(name, layer.get_base_layer())
        fuse_qkv(merged)
        del merged.peft_config
        return merged.requires_grad_(False)

    def save_adapter(self, model: nn.Module, folder: str | Path, base: str) -> None:
        """Write the updates and the label table in ``peft``'s format, for ``PeftModel.from_pretrained``.

        Args:
            model: A network that this tuner was applied to.
            folder: For ``adapter_config.json``, ``adapter_model.safetensors`` and their ``SHA256SUMS``, written
                atomically; an existing adapter is replaced. The same updates give the same bytes.
            base: Identity of the pre-trained weights, such as a module's ``base_identity["fingerprint"]``.

        Raises:
            CheckpointError: If the folder contains other files or cannot be written.
        """
        state, config = self._state(model), self._config()
        config.modules_to_save = [TABLE] if f"{TABLE}.weight" in state else None
        config.inference_mode = True  # as peft writes it
        with lora_files.folder_for(folder) as draft:
            lora_files.write_config(config, draft / lora_files.CONFIG)
            tensors = {PREFIX + name: tensor for name, tensor in state.items()}
            write_safetensors(tensors, draft / lora_files.ADAPTER, {"format": "pt", "base": base})

    def load_adapter(self, model: nn.Module, folder: str | Path, base: str) -> None:
        """Read an adapter written by :meth:`save_adapter` or ``peft``.

        Args:
            model: A network that this tuner was applied to; unchanged if the files do not fit.
            folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            base: Identity of the pre-trained weights; files of ``peft`` itself have none and are accepted.

        Raises:
            CheckpointError: If the files are missing or damaged, or have another base or other settings.
        """
        from peft import LoraConfig

        file = Path(folder) / lora_files.ADAPTER
        check_sums(Path(folder))
        try:
            config = LoraConfig.from_pretrained(str(folder))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} is not a LoRA adapter of peft: {error}.") from error
        found, metadata = read_safetensors(file)
        saved = metadata.get("base", base)
        if saved != base:
            raise CheckpointError(
                f"{file} was trained from the base {saved[:12]}, but the model here starts from {base[:12]}. "
                "Pass the pre-trained model that the adapter belongs to."
            )
        wanted = (self.rank, self.alpha, sorted(self.target_modules))
        if (config.r, config.lora_alpha, sorted(config.target_modules or ())) != wanted:
            raise CheckpointError(
                f"{folder} has rank {config.r}, alpha {config.lora_alpha} and targets "
                f"{sorted(config.target_modules or ())}; this tuner has {wanted[0]}, {wanted[1]} and {wanted[2]}."
            )
        self._fill(model, {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}, file)

    def save_lora_weights(self, model: nn.Module, folder: str | Path) -> None:
        """Write the updates for diffusers' ``pipeline.load_lora_weights(folder)``, with any alpha.

        Args:
            model: A network of diffusers that this tuner was applied to, such as a pipeline's UNet or transformer.
            folder: For ``pytorch_lora_weights.safetensors`` and ``SHA256SUMS``; an existing LoRA is replaced.

        Raises:
            ConfigError: If the network is not of diffusers.
            CheckpointError: If the folder has other files or cannot be written.
        """
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self._state(model).items()}
        with lora_files.folder_for(folder) as draft:
            lora_files.write_diffusers(model, state, self._config(), draft)

    def load_lora_weights(self, model: nn.Module, source: str | Path, *, network_only: bool = False) -> None:
        """Read a LoRA of diffusers' or kohya's trainers (``lora_unet_...``), with any alpha.

        Args:
            model: A network of diffusers that this tuner was applied to; unchanged if the file does not fit.
            source: A safetensors file, or a folder with ``pytorch_lora_weights.safetensors``.
            network_only: Ignore the file's updates of text encoders, which this tuner does not train.

        Raises:
            ConfigError: If the network is not of diffusers.
            CheckpointError: If the file is missing, damaged, or has updates that this tuner lacks.
        """
        file, factors = lora_files.read_diffusers(model, source, self.alpha / self.rank, network_only)
        ranks = sorted({len(tensor) for name, tensor in factors.items() if ".lora_A." in name})
        if ranks != [self.rank]:
            raise CheckpointError(
                f"{file} has updates of rank {ranks}, this tuner of {self.rank}. Give it the file's rank; a file of "
                "several ranks is not supported."
            )
        self._fill(model, factors, file)

    def _config(self) -> LoraConfig:
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.target_modules))

    def _state(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained tensors, named as in peft's files, sharing the model's memory."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {name.replace(".default.", "."): parameter for name, parameter in trained.items()}

    def _fill(self, model: nn.Module, found: dict[str, Tensor], file: Path) -> None:
        """Copy tensors into the model if all of them fit and none is missing."""
        expected = self._state(model)
        differing = sorted(
            name
            for name in found.keys() | expected.keys()
            if name not in found or name not in expected or found[name].shape != expected[name].shape
        )
        if differing:
            targets = sorted({name.partition(".lora_")[0] for name in found if ".lora_" in name})
            raise CheckpointError(
                f"{file} does not fit the model: {len(differing)} tensors are missing, unknown or of another shape, "
                f"the first is {differing[0]}. The file updates {len(targets)} layers, such as {targets[:2]}; the "
                f"tuner's target_modules are {list(self.target_modules)}."
            )
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(found[name])


class SplitQKV(nn.Module):
    """A fused linear layer H => 3H as three layers ``q``, ``k`` and ``v``, for adapters to find by name.

    The function is the same; :meth:`fuse` restores the layer with the official key names.

    Example:
        >>> fused, x = nn.Linear(4, 12), torch.randn(2, 4)
        >>> split = SplitQKV(fused)
        >>> torch.allclose(split(x), fused(x)), torch.equal(split.fuse().weight, fused.weight)
        (True, True)
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        weights = fused.weight.detach().chunk(3)
        biases = fused.bias.detach().chunk(3) if fused.bias is not None else (None, None, None)
        self.q, self.k, self.v = (linear_of(weight, bias) for weight, bias in zip(weights, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., H) => queries, keys and values side by side (..., 3H)."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def fuse(self) -> nn.Linear:
        """The three layers as one."""
        parts = (self.q, self.k, self.v)
        weight = torch.cat([part.weight.detach() for part in parts])
        return linear_of(weight, None if self.q.bias is None else torch.cat([part.bias.detach() for part in parts]))


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of the given values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def fused_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """A model's fused layers by name: linear layers named ``qkv`` with three outputs per input."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {
        name: layer
        for name, layer in linears.items()
        if name.rpartition(".")[2] == "qkv" and layer.out_features == 3 * layer.in_features
    }


def split_qkv(model: nn.Module) -> None:
    """Split the fused layers of a model in place, so that ``peft`` can open adapters of :class:`LoRA` on it."""
    for name, fused in fused_layers(model).items():
        model.set_submodule(name, SplitQKV(fused))


def fuse_qkv(model: nn.Module) -> None:
    """Undo :func:`split_qkv` in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SplitQKV):
            model.set_submodule(name, layer.fuse())
