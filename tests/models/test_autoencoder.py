from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from tiny import tiny_autoencoder
from torch import nn

from lightning_difftune.errors import CheckpointError, ConfigError, DataError
from lightning_difftune.models import FrozenAutoencoder


def tiny() -> AutoencoderKL:
    return tiny_autoencoder(8, 8, 8, sample_size=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


class Parent(nn.Module):
    def __init__(self, autoencoder: FrozenAutoencoder) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.autoencoder = autoencoder


@pytest.mark.parametrize("factor", [0.18215, 1.0])
def test_latents_are_the_posterior_scaled(factor: float) -> None:
    vae = tiny()
    frozen = FrozenAutoencoder(vae, scaling_factor=factor)
    pictures = torch.rand(2, 3, 16, 32) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
    mean, std = frozen.encode(pictures)
    assert mean.shape == (2, 4, 4, 8)
    torch.testing.assert_close(mean, posterior.mean * factor)
    torch.testing.assert_close(std, posterior.std * factor)


def test_decode_undoes_the_scale_and_clamps() -> None:
    vae = tiny()
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(30)
    frozen = FrozenAutoencoder(vae)
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        raw = vae.decode(latents / 0.18215).sample
    assert raw.abs().max() > 1
    torch.testing.assert_close(frozen.decode(latents), raw.clamp(-1, 1))


def test_shapes() -> None:
    frozen = FrozenAutoencoder(tiny())
    assert frozen.downsample == 4
    assert frozen.latent_shape(64) == (4, 16, 16)
    for size in (62, 0, -4):
        with pytest.raises(ConfigError, match=f"image_size {size} must be a positive multiple of 4"):
            frozen.latent_shape(size)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(2, 1, 16, 16), r"\(B, 3, H, W\).*got \(2, 1, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"got \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 18), "multiples of 4"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "must be floats.*uint8"),
    ],
)
def test_pictures_it_cannot_take(pictures: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FrozenAutoencoder(tiny()).encode(pictures)


def test_nothing_about_it_trains() -> None:
    parent = Parent(FrozenAutoencoder(tiny())).train()
    inner = parent.autoencoder.network
    assert parent.training
    assert not any(module.training for module in inner.modules())
    assert not any(parameter.requires_grad for parameter in inner.parameters())
    assert {name for name, _ in parent.named_parameters()} == {"head.weight", "head.bias"}
    pictures = torch.zeros(1, 3, 16, 16, requires_grad=True)
    mean, _ = parent.autoencoder.encode(pictures)
    assert not mean.requires_grad
    assert not mean.is_inference()  # it must be usable in a graph


def test_parents_state_dict_has_none_of_it_and_loads_strictly() -> None:
    first, second = Parent(FrozenAutoencoder(tiny())), Parent(FrozenAutoencoder(tiny()))
    before = second.autoencoder.fingerprint()
    state = first.state_dict()
    assert set(state) == {"head.weight", "head.bias"}
    second.load_state_dict(state, strict=True)
    assert torch.equal(second.head.weight, first.head.weight)
    assert second.autoencoder.fingerprint() == before


def test_it_follows_its_parent_to_a_device_and_through_copies() -> None:
    parent = Parent(FrozenAutoencoder(tiny()))
    twin = copy.deepcopy(parent)
    parent.to("meta")
    assert {p.device.type for p in parent.autoencoder.network.parameters()} == {"meta"}
    assert {p.device.type for p in twin.autoencoder.network.parameters()} == {"cpu"}


def test_precision_is_its_own_whatever_autocast_is_active() -> None:
    pictures = torch.rand(1, 3, 16, 16)
    frozen = FrozenAutoencoder(tiny())
    mean, std = frozen.encode(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = frozen.encode(pictures)
        pictures_again = frozen.decode(mean)
    torch.testing.assert_close(again, mean)
    torch.testing.assert_close(pictures_again, frozen.decode(mean))
    half = FrozenAutoencoder(copy.deepcopy(frozen.network), dtype="bfloat16")
    rough, _ = half.encode(pictures)
    assert half.network.dtype == torch.bfloat16
    assert rough.dtype == half.decode(rough).dtype == torch.float32
    assert not torch.equal(rough, mean)
    assert (rough - mean).abs().max() < 0.1 * std.max()


def test_folder_and_subfolder_open_the_same_weights(folder: Path) -> None:
    first = FrozenAutoencoder(folder)
    second = FrozenAutoencoder(str(folder.parent), subfolder="vae")
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != FrozenAutoencoder(tiny()).fingerprint()


def test_names_of_older_attention_layers_are_understood(folder: Path) -> None:
    """Stable Diffusion's published autoencoders still have them."""
    expected = FrozenAutoencoder(folder).fingerprint()
    file, state = folder / "diffusion_pytorch_model.safetensors", {}
    for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items():
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(new, old)  # noqa: PLW2901
        state[name] = tensor
    assert any("proj_attn" in name for name in state)
    save_file(state, file, {"format": "pt"})
    assert FrozenAutoencoder(folder).fingerprint() == expected


def test_weights_that_do_not_fill_it_are_refused(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("decoder.conv_in.bias")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: \['decoder.conv_in.bias'\]"):
        FrozenAutoencoder(folder)


def test_truncated_weights(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot be opened as diffusers' AutoencoderKL.*safetensors"):
        FrozenAutoencoder(folder)


def test_folders_that_hold_no_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be opened.*needs config.json"):
        FrozenAutoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="holds a UNet2DModel, expected AutoencoderKL"):
        FrozenAutoencoder(tmp_path)
    with pytest.raises(CheckpointError, match="is not a local folder"):
        FrozenAutoencoder(tmp_path / "nowhere")


def test_scaling_factor_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="scaling_factor must be positive, got 0"):
        FrozenAutoencoder(tiny(), scaling_factor=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_configuration_file_can_name_it(folder: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--autoencoder", type=FrozenAutoencoder | None)
    config = parser.parse_object(
        {
            "autoencoder": {
                "class_path": "lightning_difftune.models.FrozenAutoencoder",
                "init_args": {"source": str(folder), "scaling_factor": 0.5, "dtype": "bfloat16"},
            }
        }
    )
    frozen = parser.instantiate_classes(config).autoencoder
    assert frozen.scaling_factor == 0.5
    assert frozen.network.dtype == torch.bfloat16


# -- shifts and statistics --------------------------------------------------------------------------------------------

NORMALISATIONS = [
    {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 3.0]},
]


@pytest.mark.parametrize("stated", NORMALISATIONS, ids=["shift", "statistics"])
@pytest.mark.parametrize("by", ["folder", "object"])
def test_the_normalisation_that_the_configuration_states_is_used(stated, by, tmp_path):
    torch.manual_seed(0)
    vae = tiny()
    vae.register_to_config(**stated)
    vae.save_pretrained(tmp_path / "vae")
    frozen = FrozenAutoencoder(vae if by == "object" else tmp_path / "vae")
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
    mean, std = frozen.encode(pictures)
    shift, scale = stated.get("shift_factor", 0.0), stated["scaling_factor"]
    if "latents_mean" in stated:
        shift = torch.tensor(stated["latents_mean"]).view(1, 4, 1, 1)
        scale = scale / torch.tensor(stated["latents_std"]).view(1, 4, 1, 1)
    torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
    torch.testing.assert_close(std, posterior.std * scale)
    with torch.no_grad():
        torch.testing.assert_close(frozen.decode(mean), vae.decode(posterior.mean).sample.clamp(-1, 1))


def test_another_shift_is_another_identity():
    vae = tiny()
    plain = FrozenAutoencoder(vae)
    assert plain.identity() == f"{plain.fingerprint()} x 0.18215"
    identities = {plain.identity()}
    for stated in NORMALISATIONS:
        other = copy.deepcopy(vae)
        other.register_to_config(**stated)
        identities.add(FrozenAutoencoder(other, 0.18215).identity())
    assert len(identities) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_norm_eps": 1e-4}, "states batch_norm_eps for its latents, a normalisation that is not known"),
        ({"latents_mean": [0.0] * 4}, "latents_mean and latents_std go together"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "3 latents_mean for 4 channels"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}, "both shift_factor = 0.1"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std must be positive"),
    ],
)
def test_normalisations_that_are_not_known_are_refused(folder, changes, message):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        FrozenAutoencoder(folder)
