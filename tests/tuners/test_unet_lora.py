"""Tuners on a UNet of diffusers, as in Stable Diffusion: LoRA and its files, biases, and all of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.models import export_network
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.modules import TextToImageDiffTuningModule
from lightning_difftune.protocols import Tuner
from lightning_difftune.tuners import AdaptFormer, BitFit, DiffFit, LoRA, VPTDeep

ATTENTION = ("to_q", "to_v")


def tiny_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        8,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        cross_attention_dim=8,
    ).eval()


@torch.no_grad()
def output_of(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    return unet(x, torch.tensor([1, 999]), text).sample


def trained(unet: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def tuned_unet(tuner: LoRA) -> Any:
    unet = tiny_unet()
    tuner.apply(unet)
    for parameter in trained(unet).values():
        nn.init.normal_(parameter, std=0.3)
    return unet


@pytest.mark.parametrize("tuner", [LoRA(rank=2, target_modules=ATTENTION), BitFit()], ids=lambda t: type(t).__name__)
def test_starts_as_the_pretrained_function_to_the_bit_and_merges(tuner: Any, tmp_path: Path) -> None:
    unet = tiny_unet()
    before, names = output_of(unet), list(unet.state_dict())
    tuner.apply(unet)
    assert torch.equal(output_of(unet), before)
    kind = "lora_" if isinstance(tuner, LoRA) else "bias"
    assert trained(unet)
    assert all(kind in name for name in trained(unet))
    for parameter in trained(unet).values():
        nn.init.normal_(parameter, std=0.3)
    tuned = output_of(unet)
    assert not torch.allclose(tuned, before, atol=1e-3)

    merged = tuner.merge(unet)
    torch.testing.assert_close(output_of(merged), tuned, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == names
    again = type(unet).from_pretrained(export_network(merged, tmp_path / "unet")).eval()
    assert torch.equal(output_of(again), output_of(merged))


def test_updates_are_where_they_were_asked_for() -> None:
    unet = tiny_unet()
    LoRA(rank=2, target_modules=("attn2.to_k", "to_out.0")).apply(unet)
    layers = {name.rpartition(".lora_")[0] for name in trained(unet)}
    assert layers
    assert all(name.endswith(("attn2.to_k", "attn1.to_out.0", "attn2.to_out.0")) for name in layers)


def test_adapters_are_files_of_peft(tmp_path: Path) -> None:
    tuner = LoRA(rank=2, alpha=6, target_modules=ATTENTION)
    unet = tuned_unet(tuner)
    tuner.save_adapter(unet, tmp_path / "ours", base="abc")
    opened = PeftModel.from_pretrained(tiny_unet(), str(tmp_path / "ours"))
    assert torch.equal(output_of(opened), output_of(unet))

    opened.save_pretrained(str(tmp_path / "theirs"))
    for folder in ("ours", "theirs"):
        other = tiny_unet()
        tuner.apply(other)
        tuner.load_adapter(other, tmp_path / folder, base="abc")
        assert torch.equal(output_of(other), output_of(unet))


def test_an_adapter_of_another_base_or_setting_changes_nothing(tmp_path: Path) -> None:
    tuner = LoRA(rank=2, target_modules=ATTENTION)
    tuner.save_adapter(tuned_unet(tuner), tmp_path, base="abc")
    unet = tiny_unet()
    tuner.apply(unet)
    state = fingerprint(unet)
    with pytest.raises(CheckpointError, match="trained from the base abc, but the model here starts from def"):
        tuner.load_adapter(unet, tmp_path, base="def")
    with pytest.raises(CheckpointError, match=r"targets \['to_q', 'to_v'\]; this tuner has 2, 2 and \['to_k'\]"):
        LoRA(rank=2, target_modules=("to_k",)).load_adapter(unet, tmp_path, base="abc")
    assert fingerprint(unet) == state


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        (
            LoRA(rank=2, target_modules=("q", "v")),
            r"names end in \['q', 'v'\]; UNet2DConditionModel has none.*to_k.*to_q",
        ),
        (LoRA(rank=2, target_modules=("to_q", "to_w")), r"names end in \['to_w'\]"),
        (LoRA(rank=9, target_modules=ATTENTION), r"rank 9 is larger than the layer .*to_[qv], which is 8 wide"),
        (DiffFit(), r"DiffFit looks for 'blocks' in UNet2DConditionModel, .*it has .*down_blocks"),
        (AdaptFormer(), "AdaptFormer looks for 'blocks' in UNet2DConditionModel"),
        (VPTDeep(), "VPTDeep looks for 'blocks' in UNet2DConditionModel"),
    ],
)
def test_what_does_not_fit_says_so_and_changes_nothing(tuner: Tuner, message: str) -> None:
    unet = tiny_unet()
    names, state = set(trained(unet)), fingerprint(unet)
    with pytest.raises(ConfigError, match=message):
        tuner.apply(unet)
    assert set(trained(unet)) == names
    assert fingerprint(unet) == state
    BitFit().apply(unet)


def test_full_fine_tuning_trains_all_of_it(pipeline_folder: str) -> None:
    module = TextToImageDiffTuningModule(pipeline_folder)
    module.configure_model()
    assert {id(p) for p in module.trainable_parameters()} == {id(p) for p in module.unet.parameters()}
    low = TextToImageDiffTuningModule(pipeline_folder, tuner=LoRA(rank=2, target_modules=ATTENTION))
    low.configure_model()
    assert all("lora_" in name for name, p in low.named_parameters() if p.requires_grad)


ALL = ("to_q", "to_v", "to_out.0")


def pipeline_with(unet: Any) -> Any:
    """A pipeline of which only the UNet is used."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(None, None, None, unet, None, None, None, requires_safety_checker=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [2, 6, 3])
def test_diffusers_pipelines_open_our_lora_whatever_its_alpha(tmp_path: Path, alpha: int) -> None:
    tuner = LoRA(rank=2, alpha=alpha, target_modules=ALL)
    unet = tuned_unet(tuner)
    tuner.save_lora_weights(unet, tmp_path / "lora")
    pipeline = pipeline_with(tiny_unet())
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    torch.testing.assert_close(output_of(pipeline.unet), output_of(unet), rtol=0, atol=1e-5)
    other = tiny_unet()
    tuner.apply(other)
    tuner.load_lora_weights(other, tmp_path / "lora")
    assert torch.equal(output_of(other), output_of(unet))


def other_formats(unet: Any, file: Path, format: str, alpha: float) -> None:
    """The updates of a UNet as other trainers write them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = {name: tensor.detach().contiguous() for name, tensor in get_peft_model_state_dict(unet).items()}
    if format == "kohya":
        renamed = {}
        for name, tensor in state.items():
            layer, _, factor = name.partition(".lora_")
            start = "lora_unet_" + layer.replace(".", "_")
            renamed[f"{start}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = tensor
            renamed[f"{start}.alpha"] = torch.tensor(alpha)
    elif format == "diffusers":  # without metadata, as its trainers wrote it until 2025: alpha is the rank
        renamed = {f"unet.{name}": tensor for name, tensor in state.items()}
    else:
        names = {"lora_A": "lora.down", "lora_B": "lora.up"}
        renamed = {f"unet.{name.replace(a, b)}": state[name] for a, b in names.items() for name in state if a in name}
    save_file(renamed, file)


@pytest.mark.parametrize(("format", "alpha"), [("kohya", 6.0), ("kohya", 1.0), ("diffusers", 2.0), ("older", 2.0)])
def test_loras_of_other_trainers_are_read(tmp_path: Path, format: str, alpha: float) -> None:
    unet = tuned_unet(LoRA(rank=2, alpha=int(alpha), target_modules=ALL))
    other_formats(unet, tmp_path / "theirs.safetensors", format, alpha)
    tuner = LoRA(rank=2, alpha=5, target_modules=ALL)
    ours = tiny_unet()
    tuner.apply(ours)
    tuner.load_lora_weights(ours, tmp_path / "theirs.safetensors")
    torch.testing.assert_close(output_of(ours), output_of(unet), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_kohyas_loras_of_flux_are_read(tmp_path: Path, alpha: float) -> None:
    import pipelines
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tuner = LoRA(rank=2, alpha=2, target_modules=("to_out.0",))
    network = pipelines.flux_transformer(guidance_embeds=True)
    tuner.apply(network)
    for parameter in trained(network).values():
        nn.init.normal_(parameter, std=0.3)
    theirs = {}
    for name, tensor in get_peft_model_state_dict(network).items():
        number, factor = name.split(".")[1], "down" if "lora_A" in name else "up"
        start = f"lora_unet_double_blocks_{number}_img_attn_proj"
        theirs[f"{start}.lora_{factor}.weight"] = tensor.detach().contiguous()
        theirs[f"{start}.alpha"] = torch.tensor(alpha)
    save_file(theirs, tmp_path / "kohya.safetensors")
    other = pipelines.flux_transformer(guidance_embeds=True)
    tuner.apply(other)
    tuner.load_lora_weights(other, tmp_path / "kohya.safetensors")
    update = [
        {
            n: (m.lora_B["default"].weight @ m.lora_A["default"].weight)
            for n, m in x.named_modules()
            if hasattr(m, "lora_A")
        }
        for x in (network, other)
    ]
    for name, expected in update[0].items():  # alpha / rank is 1 in ours
        torch.testing.assert_close(update[1][name], expected * alpha / 2, rtol=1e-5, atol=1e-6)


def test_a_lora_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    unet = tuned_unet(LoRA(rank=2, target_modules=ALL))
    file = tmp_path / "theirs.safetensors"
    other_formats(unet, file, "diffusers", 2)
    tuner, ours = LoRA(rank=2, target_modules=ATTENTION), tiny_unet()
    tuner.apply(ours)
    state = fingerprint(ours)
    with pytest.raises(CheckpointError, match=r"the first is .*to_out.*target_modules are \['to_q', 'to_v'\]"):
        tuner.load_lora_weights(ours, file)
    wide, wider = LoRA(rank=3, target_modules=ALL), tiny_unet()
    wide.apply(wider)
    with pytest.raises(CheckpointError, match=r"updates of rank \[2\], this tuner of 3"):
        wide.load_lora_weights(wider, file)
    content = load_file(file)
    encoder = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"
    }
    save_file(content | encoder, file)
    full, fuller = LoRA(rank=2, target_modules=ALL), tiny_unet()
    full.apply(fuller)
    with pytest.raises(CheckpointError, match=r"2 tensors beyond the unet's.*network_only=True"):
        full.load_lora_weights(fuller, file)
    full.load_lora_weights(fuller, file, network_only=True)
    save_file(content | {"unet.conv_in.dora_scale": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=r"not a plain LoRA: it has unet\.conv_in\.dora_scale"):
        tuner.load_lora_weights(ours, file)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        tuner.load_lora_weights(ours, tmp_path / "absent")
    assert fingerprint(ours) == state


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_lora_folders_are_the_same_bytes_each_time_and_say_when_they_are_damaged(tmp_path: Path, format: str) -> None:
    tuner = LoRA(rank=2, alpha=6, target_modules=ALL)
    unet = tuned_unet(tuner)

    def save(folder: Path) -> None:
        if format == "peft":
            tuner.save_adapter(unet, folder, "abc")
        else:
            tuner.save_lora_weights(unet, folder)

    def load(folder: Path) -> None:
        if format == "peft":
            tuner.load_adapter(unet, folder, "abc")
        else:
            tuner.load_lora_weights(unet, folder)

    for name in ("first", "second", "first"):  # also over what is there
        save(tmp_path / name)
    files = {file.name: file.read_bytes() for file in (tmp_path / "first").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "second").iterdir()}
    assert all((tmp_path / "first" / name).stat().st_mode & 0o777 == 0o666 & ~umask() for name in files)
    state = fingerprint(unet)
    for name, content in files.items():
        for position in range(0, len(content), max(1, len(content) // 20)):
            flipped = bytearray(content)
            flipped[position] ^= 64
            (tmp_path / "first" / name).write_bytes(flipped)
            if name != "SHA256SUMS":
                with pytest.raises(CheckpointError, match=f"{name} was altered"):
                    load(tmp_path / "first")
            else:
                with contextlib.suppress(CheckpointError):
                    load(tmp_path / "first")
            assert fingerprint(unet) == state
        (tmp_path / "first" / name).write_bytes(content)
    (tmp_path / "first" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds \['notes\.txt'\], and a LoRA's folder is replaced as a whole"):
        save(tmp_path / "first")
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
