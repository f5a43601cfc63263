from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_difftune.errors import ConfigError
from lightning_difftune.models import DiT
from lightning_difftune.models.dit import SIZES, TimestepEmbedder, sincos_2d

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official_dit_tiny.safetensors"


def tiny(**changes: object) -> DiT:
    """A small DiT whose every weight matters."""
    sizes = {"input_size": 6, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3}
    model = DiT(**{**sizes, "num_classes": 5, **changes})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(model: DiT, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *model.sample_shape, generator=generator)
    return x, torch.tensor([0, 17, 500, 999][:batch]), torch.tensor([0, 1, model.null_class, 3][:batch])


def test_keys_and_shapes_are_the_authors() -> None:
    model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4)
    with safe_open(FIXTURE, "pt") as file:
        official = {n.removeprefix("model."): file.get_slice(n).get_shape() for n in file.keys() if n[:6] == "model."}  # noqa: SIM118
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == official


def test_xl_2_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = DiT.from_size("DiT-XL/2")
    assert sum(parameter.numel() for parameter in model.parameters()) == 675_129_632
    assert model.state_dict()["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert model.sample_shape == (4, 32, 32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_published_sizes(size: str, patch: int) -> None:
    with torch.device("meta"):
        model = DiT.from_size(f"DiT-{size}/{patch}", num_classes=7)
    assert model.architecture["patch_size"] == patch
    assert (model.architecture["hidden_size"], len(model.blocks), model.blocks[0].attn.num_heads) == SIZES[size]
    assert model.pos_embed.shape == (1, (32 // patch) ** 2, SIZES[size][0])
    assert model.num_classes == model.null_class == 7


@pytest.mark.parametrize("name", ["DiT-XXL/2", "DiT-XL/3", "XL", ""])
def test_unknown_size_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not a DiT size.*DiT-XL/2"):
        DiT.from_size(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 4}, "patch_size 4 does not divide input_size 6"),
        ({"num_heads": 5}, "hidden_size 24 must be a multiple of num_heads"),
        ({"hidden_size": 30}, "hidden_size 30 must be a multiple"),
        ({"class_names": list("abcdef")}, "6 class_names were given for num_classes 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_output_has_the_input_shape_and_twice_the_channels_with_a_variance(learn_sigma: bool) -> None:
    model = tiny(learn_sigma=learn_sigma)
    assert model(*inputs(model)).shape == (4, 6 if learn_sigma else 3, 6, 6)


def test_fresh_model_is_zero_and_only_positions_are_fixed() -> None:
    model = DiT(input_size=6, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=3)
    assert not model(*inputs(model)).any()
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["pos_embed"]


@torch.no_grad()
def test_every_input_matters_and_samples_do_not_mix() -> None:
    model = tiny()
    x, t, y = inputs(model)
    output = model(x, t, y)
    for changed in ((x + 1, t, y), (x, t + 1, y), (x, t, (y + 1) % 6)):
        assert (model(*changed) - output).flatten(1).abs().max(1).values.min() > 1e-4
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], y[i : i + 1]), output[i : i + 1])


def test_unpatchify_agrees_with_a_plain_loop() -> None:
    model = tiny()
    side, p, channels = 3, 2, model.out_channels
    patches = torch.randn(2, side * side, p * p * channels)
    picture = np.empty((2, channels, side * p, side * p), dtype=np.float32)
    for b in range(2):
        for token in range(side * side):
            patch = patches[b, token].numpy().reshape(p, p, channels)
            top, left = (token // side) * p, (token % side) * p
            for row in range(p):
                for column in range(p):
                    picture[b, :, top + row, left + column] = patch[row, column]
    assert np.array_equal(model.unpatchify(patches).numpy(), picture)


def test_patches_are_numbered_as_unpatchify_places_them() -> None:
    model = tiny(in_channels=3, hidden_size=12, num_heads=3, learn_sigma=False)
    with torch.no_grad():  # an embedder that copies a patch's pixels in unpatchify's order: row, column, channel
        weight = torch.zeros(12, 3, 2, 2)
        for row in range(2):
            for column in range(2):
                for channel in range(3):
                    weight[(row * 2 + column) * 3 + channel, channel, row, column] = 1
        model.x_embedder.proj.weight.copy_(weight)
        model.x_embedder.proj.bias.zero_()
        x = torch.randn(2, 3, 6, 6)
        torch.testing.assert_close(model.unpatchify(model.x_embedder(x)), x)


def test_positions_agree_with_a_plain_loop() -> None:
    side, hidden = 3, 8
    expected = np.empty((side * side, hidden))
    for row in range(side):
        for column in range(side):
            half = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / (hidden / 4)) for i in range(hidden // 4)]
                half += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            expected[row * side + column] = half
    np.testing.assert_allclose(sincos_2d(side, hidden)[0].numpy(), expected, atol=1e-6)


def test_sinusoid_agrees_with_a_plain_loop() -> None:
    embedder = TimestepEmbedder(hidden_size=8, frequency_embedding_size=6)
    t = torch.tensor([0, 1, 999])
    expected = [[f(step * 10_000 ** (-i / 3)) for f in (math.cos, math.sin) for i in range(3)] for step in t.tolist()]
    np.testing.assert_allclose(embedder.sinusoid(t).numpy(), expected, atol=1e-4)


def test_all_timesteps_stay_distinct_under_bfloat16_autocast() -> None:
    t = torch.arange(1000)
    assert len(t.bfloat16().unique()) == 507  # what a cast of t itself would leave
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        sinusoid = model.t_embedder.sinusoid(t)
        embedding = model.t_embedder(t)
    assert sinusoid.dtype == torch.float32
    assert len(sinusoid.unique(dim=0)) == 1000
    assert embedding.dtype == torch.bfloat16
    assert len(embedding.unique(dim=0)) == 1000


def test_train_mode_draws_nothing_and_the_embedders_are_shared() -> None:
    """diffusers' class draws label dropout in every block, from as many copies of the embedders; ours must not."""
    model = tiny()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    trained = model.train()(*inputs(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.eval()(*inputs(model)), trained)
    assert [name for name, layer in model.named_modules() if isinstance(layer, nn.Embedding)] == [
        "y_embedder.embedding_table"
    ]
    assert sum(isinstance(layer, TimestepEmbedder) for layer in model.modules()) == 1


def test_resized_label_table_keeps_the_null_row_alone() -> None:
    model = tiny(class_names=list("abcde"))
    old = model.y_embedder.embedding_table.weight.detach().clone()
    x, t, _ = inputs(model)
    before = model(x, t, torch.full((4,), model.null_class))

    model.resize_label_table(2, ["cat", "dog"])
    new = model.y_embedder.embedding_table.weight
    assert new.shape == (3, 24)
    assert new.requires_grad
    assert model.num_classes == model.null_class == model.architecture["num_classes"] == 2
    assert model.class_names == ["cat", "dog"]
    assert torch.equal(new[-1], old[-1])
    assert not any(torch.equal(fresh, row) for fresh in new[:-1] for row in old)
    assert torch.equal(model(x, t, torch.full((4,), model.null_class)), before)


def test_labels_outside_the_table_are_an_error_of_the_lookup() -> None:
    model = tiny()
    x, t, y = inputs(model)
    with pytest.raises(IndexError):
        model(x, t, torch.full_like(y, model.null_class + 1))


def test_torchvision_was_built_for_the_torch_that_is_installed() -> None:
    """A wheel of torchvision for another build of torch does not import its operators, and so timm fails."""
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
    assert nms(boxes, torch.tensor([0.9, 0.5]), 0.5).tolist() == [0]
