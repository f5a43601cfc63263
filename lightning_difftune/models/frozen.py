"""Networks that are never trained, and the frozen text encoder of text-to-image models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import text_digest
from lightning_difftune.models.casts import takes_its_own_type
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.hub import folder_of, without_bars

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

DEFAULT_PROMPT = "a high-quality, detailed, and professional image"  # ControlNet's authors', and the paper's (App. C)
NAMED_PROMPTS = 3  # that warnings about their length name


class Frozen(nn.Module):
    """Holds a network that is never trained, and whose weights are not in any checkpoint.

    It follows its parent module to any device, but its weights are not parameters of the parent: they enter neither its
    state dict nor its optimizer, EMA or gradient synchronisation. The network is always in eval mode; gradients flow
    through it, not into it.

    Args:
        network: The network; it is frozen.

    Example:
        >>> parent = nn.Sequential(nn.Linear(2, 2), Frozen(nn.Linear(2, 2)))
        >>> list(parent.state_dict()), parent.double()[1].network.weight.dtype
        (['0.weight', '0.bias'], torch.float64)
    """

    network: Any
    keeps_type = False
    """Whether the weights keep their type where the parent module is cast."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        takes_its_own_type(network)
        self.__dict__["network"] = network.requires_grad_(False).eval()  # bypasses nn.Module's registration

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the network along with the parent module."""
        move = (lambda tensor: tensor.to(fn(tensor).device)) if self.keeps_type else fn
        self.network._apply(move, recurse)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output."""
        return self.network(*args, **kwargs)


class FrozenTextEncoder(Frozen):
    """CLIP's tokenizer and text model of a Stable Diffusion pipeline; never trained, never in a checkpoint.

    Args:
        source: A pipeline's hub repository or local folder, with ``tokenizer`` and ``text_encoder`` in it.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        CheckpointError: If the source is not found or cannot be opened.
    """

    keeps_type = True

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        tokenizer, network = open_text_encoder(source, revision)
        super().__init__(network)
        self.tokenizer: Any = tokenizer
        self._truncated: set[str] = set()

    @property
    def shape(self) -> tuple[int, int]:
        """(L, D): tokens of a prompt and width of an embedding; (77, 768) for Stable Diffusion 1.5."""
        return self.tokenizer.model_max_length, self.network.config.hidden_size

    def fingerprint(self) -> str:
        """Identity of weights and vocabulary."""
        vocabulary = json.dumps([self.tokenizer.get_vocab(), self.shape[0]], sort_keys=True)
        return text_digest(f"{fingerprint(self.network)} {vocabulary}")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds`` (B, L, D) float32 of B prompts, padded to L tokens.

        A prompt of more than L tokens is truncated; a warning names the first three.
        """
        length = self.shape[0]
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        device = self.network.device
        for prompt in dict.fromkeys(prompts):
            self._warn_of_length(prompt)
        with torch.autocast(device.type, enabled=False):
            return {"prompt_embeds": self.network(tokens.to(device))[0].float()}

    def _warn_of_length(self, prompt: str) -> None:
        if prompt in self._truncated or len(self._truncated) > NAMED_PROMPTS:
            return
        count, length = len(self.tokenizer(prompt, verbose=False).input_ids), self.shape[0]
        if count <= length:
            return
        self._truncated.add(prompt)
        if len(self._truncated) <= NAMED_PROMPTS:
            rank_zero_warn(
                f"This prompt is truncated: it has {count} tokens, and the text encoder reads {length}: {prompt!r}"
            )
        else:
            rank_zero_warn(f"Further prompts have more than {length} tokens and are truncated, without being named.")

    def null(self) -> dict[str, Tensor]:
        """The condition of a dropped prompt, in one row: the empty prompt."""
        return self.encode([""])


def open_text_encoder(source: str | Path, revision: str | None) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Open the tokenizer and, in float32, the text model of a pipeline."""
    folder = folder_of(source, "text_encoder", revision)
    import transformers  # slow to import

    text_model: Any = transformers.CLIPTextModel
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        with without_bars("transformers"):
            network, info = text_model.from_pretrained(
                folder / "text_encoder", local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer and text_encoder that transformers' CLIP classes can open: {error}. It must be "
            "the folder of a Stable Diffusion pipeline."
        ) from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{folder / 'text_encoder'}: the weights do not fit config.json; {len(info['missing_keys'])} are missing, "
            f"the first is {sorted(map(str, info['missing_keys']))[0]}."
        )
    return tokenizer, network
