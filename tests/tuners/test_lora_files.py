"""LoRA's adapters as peft's own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_dit
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError
from lightning_difftune.models import DiT
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.tuners import LoRA
from lightning_difftune.tuners.lora import fuse_qkv, split_qkv


def small_dit(num_classes: int = 6) -> DiT:
    return tiny_dit(input_size=4, patch_size=2, depth=2, num_classes=num_classes)


def tuned_dit(tuner: LoRA) -> DiT:
    model = small_dit()
    tuner.apply(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def output_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return model(torch.randn(3, 1, 4, 4, generator=generator), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 6]))


def test_adapters_are_read_back(tmp_path: Path) -> None:
    tuner = LoRA(rank=2, alpha=6)
    model = tuned_dit(tuner)
    tuner.save_adapter(model, tmp_path / "adapter", base="abc")
    other = small_dit()
    tuner.apply(other)
    tuner.load_adapter(other, tmp_path / "adapter", base="abc")
    assert torch.equal(output_of(other), output_of(model))
    assert fingerprint(other) == fingerprint(model)


def test_peft_opens_our_adapters_and_we_open_those_of_peft(tmp_path: Path) -> None:
    tuner = LoRA(rank=2, alpha=6)
    model = tuned_dit(tuner)
    tuner.save_adapter(model, tmp_path / "ours", base="abc")
    plain = small_dit()
    split_qkv(plain)
    opened = PeftModel.from_pretrained(plain, str(tmp_path / "ours"))
    assert torch.equal(output_of(opened), output_of(model))

    opened.save_pretrained(str(tmp_path / "theirs"))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    assert [configs[0][key] for key in ("r", "lora_alpha", "modules_to_save")] == [2, 6, ["y_embedder.embedding_table"]]
    assert {key for key in configs[0] if configs[0][key] != configs[1][key]} <= {"auto_mapping", "target_modules"}
    other = small_dit()
    tuner.apply(other)
    tuner.load_adapter(other, tmp_path / "theirs", base="abc")
    assert torch.equal(output_of(other), output_of(model))


def test_adapters_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    tuner = LoRA(rank=2)
    tuner.save_adapter(tuned_dit(tuner), tmp_path / "adapter", base="abc")
    model = small_dit()
    tuner.apply(model)
    state = fingerprint(model)
    with pytest.raises(CheckpointError, match="trained from the base abc, but the model here starts from def"):
        tuner.load_adapter(model, tmp_path / "adapter", base="def")
    with pytest.raises(CheckpointError, match="not a LoRA adapter"):
        tuner.load_adapter(model, tmp_path, base="abc")
    with pytest.raises(CheckpointError, match=r"rank 2, alpha 2.*this tuner has 3"):
        LoRA(rank=3).load_adapter(model, tmp_path / "adapter", base="abc")
    assert fingerprint(model) == state

    wider = small_dit(num_classes=7)
    tuner.apply(wider)
    state = fingerprint(wider)
    with pytest.raises(CheckpointError, match=r"1 tensors.*y_embedder"):
        tuner.load_adapter(wider, tmp_path / "adapter", base="abc")
    assert fingerprint(wider) == state

    file = tmp_path / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="was altered"):
        tuner.load_adapter(wider, tmp_path / "adapter", base="abc")


def test_split_projections_fuse_back_to_the_same_weights() -> None:
    model = small_dit()
    before, state = output_of(model), fingerprint(model)
    split_qkv(model)
    torch.testing.assert_close(output_of(model), before, rtol=0, atol=1e-6)
    assert "blocks.1.attn.qkv.k.weight" in model.state_dict()
    fuse_qkv(model)
    assert fingerprint(model) == state
    assert torch.equal(output_of(model), before)
