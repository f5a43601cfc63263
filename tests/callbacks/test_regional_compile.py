"""RegionalCompile: which blocks are compiled, in place, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import quiet_trainer, tiny_dit
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_difftune import DiTDiffTuningModule
from lightning_difftune.callbacks import EMA, RegionalCompile
from lightning_difftune.callbacks.regional_compile import repeated_blocks
from lightning_difftune.errors import ConfigError
from lightning_difftune.models import DiT
from lightning_difftune.models.frozen import Frozen


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = x + layer(x).tanh()
        return x


class Stacked(BoringModel):
    """Three blocks, and a frozen one that is in no checkpoint."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.teacher = Frozen(nn.Sequential(Block()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.teacher(x)
        for block in self.blocks:
            x = block(x)
        return self.layer(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fitted(tmp_path: Path, *callbacks: Any) -> Stacked:
    module = Stacked()
    trainer = L.Trainer(
        max_steps=4,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        default_root_dir=tmp_path,
    )
    L.seed_everything(0, verbose=False)
    trainer.fit(module)
    return module


def is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


def test_a_compiled_training_is_the_training_and_its_names_stay(tmp_path: Path) -> None:
    plain = fitted(tmp_path, EMA(decay=0.5))
    compiled = fitted(tmp_path, EMA(decay=0.5), RegionalCompile(devices=["cpu"], backend="aot_eager"))
    assert all(is_compiled(block) for block in compiled.blocks)
    assert not any(is_compiled(part) for part in compiled.blocks[0].modules() if part is not compiled.blocks[0])
    assert is_compiled(compiled.teacher.network[0])
    expected, found = plain.state_dict(), compiled.state_dict()
    assert list(found) == list(expected)
    assert not torch.equal(found["layer.weight"], Stacked().layer.weight), "it has trained"
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_nothing_is_compiled_on_a_cpu_unless_asked_to(tmp_path: Path) -> None:
    assert not any(is_compiled(part) for part in fitted(tmp_path, RegionalCompile()).modules())


def test_the_blocks_of_a_transformer_and_those_that_diffusers_names() -> None:
    from diffusers import UNet2DConditionModel

    dit = DiT(8, 2, 1, 16, 3, 2, num_classes=2)
    assert list(repeated_blocks(dit)) == list(dit.blocks)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    assert {type(block).__name__ for block in repeated_blocks(unet)} == {"BasicTransformerBlock"}
    assert len(list(repeated_blocks(nn.ModuleDict({"model": unet}), ["DownBlock2D"]))) == 1


def test_a_network_without_such_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finds no Elephant in Stacked"):
        fitted(tmp_path, RegionalCompile(["Elephant"], devices=["cpu"], backend="aot_eager"))


def test_whole_networks_are_compiled_on_demand(tmp_path: Path) -> None:
    plain = fitted(tmp_path)
    compiled = fitted(tmp_path, RegionalCompile(devices=["cpu"], backend="aot_eager", whole=True))
    assert is_compiled(compiled.layer)
    assert not any(is_compiled(block.inner[0]) for block in compiled.blocks)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor)
    with pytest.raises(ConfigError, match="either whole networks or blocks"):
        RegionalCompile(["Block"], whole=True)


def test_a_whole_network_is_one_graph_in_all_steps(tmp_path: Path) -> None:
    """Weights that are cast together included, and the hook that casts its inputs."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module = DiTDiffTuningModule(tiny_dit(depth=2))
    labels = torch.zeros(4, dtype=torch.int64)
    batch = {"target": {"pixel_values": torch.zeros(4, 1, 8, 8), "class_labels": labels}}
    compiled = RegionalCompile(devices=["cpu"], backend=backend, whole=True)
    trainer = quiet_trainer(tmp_path, 4, compiled, precision="bf16-mixed")
    trainer.fit(module, DataLoader([batch] * 4, batch_size=None))
    assert len(graphs) == 1


def test_cuda_graphs_are_told_of_each_step_and_refuse_accumulated_gradients(tmp_path: Path, monkeypatch: Any) -> None:
    """As far as a CPU goes: the mode reaches torch.compile, here with a backend that knows modes and no graphs."""
    begun, modes = [], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr(nn.Module, "compile", lambda module, backend, mode: modes.append((backend, mode)))
    fitted(tmp_path, RegionalCompile(devices=["cpu"], whole=True, mode="reduce-overhead"))
    assert len(begun) == 4
    assert modes == [("inductor", "reduce-overhead")] * len(modes) != []
    fitted(tmp_path, RegionalCompile(devices=["cpu"]))
    assert len(begun) == 4
    accumulated = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    trainer = quiet_trainer(tmp_path, 2, RegionalCompile(devices=["cpu"], mode="reduce-overhead"), **accumulated)
    with pytest.raises(ConfigError, match="accumulate_grad_batches is 2: the next batch would overwrite"):
        trainer.fit(Stacked())
