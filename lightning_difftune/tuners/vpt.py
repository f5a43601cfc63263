"""VPT-Deep (Jia et al., 2022): separate prompt tokens in some blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError
from lightning_difftune.tuners.base import ParameterEfficientTuner, find, find_blocks


def prepend_prompt(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a block: prepend its prompt to the tokens (B, N, H)."""
    tokens, *rest = inputs
    prompt = block.get_parameter("prompt")
    return torch.cat([prompt.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1), *rest


def drop_prompt(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a block: remove its prompt's tokens again."""
    return output[:, block.get_parameter("prompt").shape[0] :]


class VPTDeep(ParameterEfficientTuner):
    """Train prompt tokens that exist inside single blocks, the final layer and the label table.

    2,816,672 parameters of DiT-XL/2 with 101 classes at one token in each of five blocks (Table 1).

    The other methods start as the pre-trained function; this one cannot. Every token attends to the prompt with
    weight p > 0, so attention heads start at (1 - p) times their pre-trained output plus p times the prompt's value.
    No initial prompt makes p zero, not even zeros: the block norms and modulates the prompt like any token. With one
    prompt among N tokens with similar keys, p is about 1 / (N + 1).

    Args:
        blocks: Blocks with prompts. Table 1 has five; which ones is not public, the default is the first five.
        num_tokens: Prompt tokens in each of them.
        std: Standard deviation of the initial prompts; not public, the default is that of DiT's embeddings.

    Raises:
        ConfigError: If there is no block, a block is given twice, or there is no token.
    """

    not_merged = (
        "its prompts are further tokens in attention, which no layer of the plain model can take up. Keep the run's "
        "checkpoint and the pre-trained model"
    )

    def __init__(self, blocks: tuple[int, ...] = (0, 1, 2, 3, 4), num_tokens: int = 1, std: float = 0.02) -> None:
        if not blocks or len(set(blocks)) < len(blocks) or num_tokens < 1:
            raise ConfigError(
                f"VPTDeep needs distinct blocks and a token, got {list(blocks)} with {num_tokens} tokens."
            )
        self.blocks = tuple(blocks)
        self.num_tokens = num_tokens
        self.std = std

    def insert(self, model: nn.Module) -> list[nn.Parameter]:
        """Add prompts to the blocks."""
        blocks = find_blocks(model, "VPTDeep")
        beyond = [index for index in self.blocks if not 0 <= index < len(blocks)]
        if beyond:
            raise ConfigError(
                f"VPTDeep cannot put prompts in blocks {beyond}; {type(model).__name__} has blocks 0 to "
                f"{len(blocks) - 1}."
            )
        trained = list(find(model, "final_layer", nn.Module, "VPTDeep").parameters())
        outputs = [find(blocks[index], "attn.proj", nn.Linear, "VPTDeep") for index in self.blocks]
        for index, layer in zip(self.blocks, outputs, strict=True):
            prompt = nn.Parameter(layer.weight.new_empty(self.num_tokens, layer.out_features))
            nn.init.normal_(prompt, std=self.std)
            blocks[index].register_parameter("prompt", prompt)
            blocks[index].register_forward_pre_hook(prepend_prompt)
            blocks[index].register_forward_hook(drop_prompt)
            trained.append(prompt)
        return trained
