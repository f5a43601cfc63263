from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_difftune.errors import CheckpointError
from lightning_difftune.models import DiT, load_dit
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.diffusers_layout import (
    from_diffusers,
    load_exact_transformer,
    make_exact,
    to_config,
    to_diffusers,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official_dit_tiny.safetensors"


@pytest.fixture(scope="module")
def model() -> DiT:
    state = {k.removeprefix("model."): v for k, v in load_file(FIXTURE).items() if k.startswith("model.")}
    model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4)
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture
def transformer(model: DiT) -> DiTTransformer2DModel:
    """diffusers' class with the weights of ``model``, as it comes."""
    transformer = DiTTransformer2DModel(**{**to_config(model.architecture), "norm_eps": 1e-5})
    transformer.load_state_dict(to_diffusers(model.state_dict(), 3))
    return transformer.eval()


@pytest.fixture
def folder(tmp_path: Path, transformer: DiTTransformer2DModel) -> Path:
    """A folder that diffusers itself wrote."""
    transformer.save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def rewrite_config(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@torch.no_grad()
def outputs(model: DiT, transformer: DiTTransformer2DModel, t: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps, y = torch.full((4,), t), torch.tensor([0, 42, 999, 1000])
    return model(x, steps, y), transformer(x, timestep=steps, class_labels=y).sample


@pytest.mark.parametrize(("t", "least", "most"), [(0, 0.0, 1e-3), (100, 0.01, 0.05), (999, 0.05, 0.5)])
def test_diffusers_class_as_it_comes_computes_something_else(
    model: DiT, transformer: DiTTransformer2DModel, t: int, least: float, most: float
) -> None:
    ours, theirs = outputs(model, transformer, t)
    assert least <= ((theirs - ours).norm() / ours.norm()).item() <= most


@pytest.mark.parametrize("t", [0, 1, 100, 500, 999])
def test_diffusers_class_made_exact_is_bit_equal(model: DiT, transformer: DiTTransformer2DModel, t: int) -> None:
    ours, theirs = outputs(model, make_exact(transformer), t)
    assert torch.equal(ours, theirs)


def test_position_embedding_needs_no_tensor(model: DiT, transformer: DiTTransformer2DModel) -> None:
    assert torch.equal(transformer.pos_embed.pos_embed, model.pos_embed)


def test_folder_from_diffusers_loads_without_loss(folder: Path, model: DiT) -> None:
    loaded = load_dit(folder)
    assert loaded.architecture == model.architecture
    assert fingerprint(loaded) == fingerprint(model)
    ours, theirs = outputs(loaded, load_exact_transformer(folder), 999)
    assert torch.equal(ours, theirs)


def test_folder_with_a_pickled_bin_and_the_old_class_name_loads(folder: Path, model: DiT) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), folder / "diffusion_pytorch_model.bin")
    file.unlink()
    rewrite_config(folder, {"_class_name": "Transformer2DModel"})
    assert fingerprint(load_dit(folder)) == fingerprint(model)


def test_pipeline_folder_gives_the_names_of_the_first_classes_or_of_all(folder: Path) -> None:
    index = folder.parent / "model_index.json"
    index.write_text(json.dumps({"id2label": {str(i): f"class {i}" for i in range(1000)}}))
    assert load_dit(folder.parent).class_names == [f"class {i}" for i in range(1000)]
    index.write_text(json.dumps({"id2label": {"0": "tench"}}))
    assert load_dit(folder.parent).class_names == ["tench"]
    index.write_text(json.dumps({"id2label": {"1": "goldfish"}}))
    assert load_dit(folder.parent).class_names is None


def test_there_and_back_is_the_identity(model: DiT) -> None:
    state = model.state_dict()
    back = from_diffusers(to_diffusers(state, 3), model.architecture, Path("x"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_chunks_of_qkv_go_to_query_key_value_in_order(model: DiT) -> None:
    qkv = model.blocks[1].attn.qkv.weight
    parts = to_diffusers(model.state_dict(), 3)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        assert torch.equal(parts[f"transformer_blocks.1.attn1.{name}.weight"], qkv[48 * i : 48 * (i + 1)])


@pytest.mark.parametrize("name", ["timestep_embedder.linear_1.bias", "class_embedder.embedding_table.weight"])
def test_embedders_that_differ_between_blocks_are_refused(folder: Path, name: str) -> None:
    full = f"transformer_blocks.2.norm1.emb.{name}"
    rewrite(folder, lambda state: state[full].add_(1e-3))
    with pytest.raises(CheckpointError, match=rf"safetensors: {full} differs from transformer_blocks\.0"):
        load_dit(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformer_blocks.1.attn1.to_k.bias"), r"1 missing \(transformer_blocks\.1\.attn1\.to_k"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda s: s.update({"proj_out_1.bias": torch.zeros(3)}),
            r"1 of another shape \(proj_out_1\.bias \(3,\) instead of \(96,\)\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_dit(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, "unexpected"),
        ({"num_layers": 4}, "missing"),
        ({"norm_type": "ada_norm_single"}, "describes no DiT.*ada_norm_single"),
        ({"activation_fn": "geglu"}, "describes no DiT.*geglu"),
        ({"sample_size": None}, "does not configure diffusers' DiTTransformer2DModel|cannot be built"),
        ({"patch_size": 3}, "cannot be built: patch_size 3 does not divide"),
    ],
)
def test_configuration_of_another_model(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite_config(folder, changes)
    with pytest.raises(CheckpointError, match=message):
        load_dit(folder)


def test_configuration_that_lacks_a_key(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(CheckpointError, match=r"config\.json does not configure diffusers' DiTTransformer2DModel"):
        load_dit(folder)


def test_mlp_ratio_that_diffusers_lacks() -> None:
    model = DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, mlp_ratio=2.0)
    with pytest.raises(CheckpointError, match=r"mlp_ratio of 4 only, this model has 2\.0"):
        to_config(model.architecture)


def test_exact_transformer_of_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened as diffusers' DiTTransformer2DModel"):
        load_exact_transformer(tmp_path)
