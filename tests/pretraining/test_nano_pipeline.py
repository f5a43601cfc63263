"""The small text-to-image pipeline: its tokenizer, its autoencoder's training, and its folder as diffusers opens it."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torchvision.datasets import Flowers102

from lightning_difftune.errors import DataError
from pretraining.nano_autoencoder import (
    new_autoencoder,
    peak_signal_to_noise,
    reconstruction_loss,
    train_autoencoder,
    unit_variance_scale,
)
from pretraining.nano_pipeline import (
    CAPTIONS,
    MAX_TOKENS,
    PROMPTS,
    flowers,
    main,
    new_text_encoder,
    new_tokenizer,
)

NAMES = Flowers102.classes
DRAW = {"num_inference_steps": 2, "output_type": "np"}


def discs(count, seed=0):
    """Coloured discs on coloured grounds, (count, 3, 32, 32) uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    centres, radii = random.uniform(8, 24, (count, 2, 1, 1)), random.uniform(4, 10, (count, 1, 1))
    inside = (x - centres[:, 0]) ** 2 + (y - centres[:, 1]) ** 2 < radii**2
    colours = random.integers(0, 256, (2, count, 3, 1, 1))
    return torch.from_numpy(np.where(inside[:, None], colours[0], colours[1]).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the command writes from 48 pictures in two steps."""
    root = tmp_path_factory.mktemp("nano")
    pictures = discs(48).permute(0, 2, 3, 1).numpy()
    split = np.array(["train"] * 40 + ["test"] * 8)
    np.savez(root / "discs.npz", images=pictures, labels=np.arange(48), class_names=NAMES[:48], split=split)
    main(["--npz", str(root / "discs.npz"), "--output", str(root / "pipeline"), "--steps", "2"])
    return root / "pipeline"


@pytest.fixture
def pipeline(folder):
    return quiet(StableDiffusionPipeline.from_pretrained(folder))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(seed=0):
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_flower_names_survive_the_tokenizer():
    tokenizer = new_tokenizer(NAMES)
    for text in [caption.format(name) for caption in CAPTIONS for name in NAMES] + list(PROMPTS):
        tokens = tokenizer(text).input_ids
        assert len(tokens) <= MAX_TOKENS, text
        assert tokenizer.unk_token_id not in tokens[1:-1], text
        words = tokenizer.decode(tokens, skip_special_tokens=True)
        assert words.replace(" ", "") == text.replace(" ", "")  # punctuation is a word of its own


def test_a_word_of_a_caption_is_one_token_and_any_other_word_comes_in_known_pieces():
    tokenizer = new_tokenizer(["tiger lily"])
    assert tokenizer.convert_ids_to_tokens(tokenizer("a photo of a tiger lily").input_ids)[1:-1] == [
        f"{word}</w>" for word in ("a", "photo", "of", "a", "tiger", "lily")
    ]
    other = tokenizer("Zürich-7").input_ids[1:-1]
    assert len(other) > 3
    assert tokenizer.unk_token_id not in other


def test_text_encoder_tells_captions_apart():
    tokenizer = new_tokenizer(NAMES)
    captions = ["", *(CAPTIONS[0].format(name) for name in NAMES)]
    tokens = torch.tensor(tokenizer(captions, padding="max_length").input_ids)
    embeddings = new_text_encoder(tokenizer)(tokens).last_hidden_state
    assert embeddings.shape == (103, MAX_TOKENS, 64)
    distances = torch.pdist(embeddings.flatten(1)) / embeddings[0].norm()
    assert distances.min() > 0.2
    assert torch.equal(embeddings, new_text_encoder(tokenizer)(tokens).last_hidden_state)


@pytest.mark.slow
def test_training_lowers_the_loss_and_is_repeatable():
    images = discs(64)[..., ::2, ::2]
    autoencoder = new_autoencoder()
    before = peak_signal_to_noise(autoencoder, images)
    losses = train_autoencoder(autoencoder, images, steps=12)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert peak_signal_to_noise(autoencoder, images) > before + 1
    assert not autoencoder.training
    assert train_autoencoder(new_autoencoder(), images, steps=12) == pytest.approx(losses, rel=1e-3)
    assert train_autoencoder(new_autoencoder(), images, steps=2, seed=1)[0] != losses[0]


def test_scaling_factor_gives_the_latents_unit_variance():
    autoencoder, images = new_autoencoder(), discs(40)
    steps = []
    train_autoencoder(autoencoder, images, steps=3, checkpoint=steps.append, checkpoint_every=2)
    assert steps == [2, 3]
    with torch.no_grad():
        posterior = autoencoder.encode(images.float() / 127.5 - 1).latent_dist
    torch.manual_seed(0)
    latents = torch.cat([posterior.sample() for _ in range(20)]) * autoencoder.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.01)
    assert unit_variance_scale(autoencoder, images) == pytest.approx(autoencoder.config.scaling_factor)


def test_reconstruction_loss_against_a_slow_twin():
    first, second = np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 4, 5))
    error = first - second
    across = [abs(e[r, c + 1] - e[r, c]) for e in error.reshape(6, 4, 5) for r in range(4) for c in range(4)]
    down = [abs(e[r + 1, c] - e[r, c]) for e in error.reshape(6, 4, 5) for r in range(3) for c in range(5)]
    expected = abs(error).mean() + (error**2).mean() + 0.5 * (np.mean(across) + np.mean(down))
    loss = reconstruction_loss(torch.from_numpy(first), torch.from_numpy(second))
    assert loss.item() == pytest.approx(expected)


def test_psnr_is_of_eight_bit_range():
    class Shifted(torch.nn.Module):  # an autoencoder that is off by a tenth of the range everywhere
        def encode(self, pixels):
            self.pixels = pixels
            return type("Output", (), {"latent_dist": type("Posterior", (), {"mode": lambda _: self.pixels})()})()

        def decode(self, latents):
            return type("Output", (), {"sample": latents + 0.2})()

    assert peak_signal_to_noise(Shifted(), torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)) == pytest.approx(20)


def test_folder_opens_in_single_precision_and_draws(folder, pipeline):
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 20e6
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    picture = pipeline("a photo of a tiger lily", latents=noise(), **DRAW).images
    assert picture.shape == (1, 32, 32, 3)
    assert not np.array_equal(picture, pipeline("a photo of a sweet pea", latents=noise(), **DRAW).images)


def test_controlnet_of_the_unet_draws_from_one_channel(pipeline):
    controlnet = ControlNetModel.from_unet(
        pipeline.unet, conditioning_channels=1, conditioning_embedding_out_channels=(16, 32)
    )
    controlled = quiet(
        StableDiffusionControlNetPipeline(**pipeline.components, controlnet=controlnet, requires_safety_checker=False)
    )
    prompt, control = "a photo of a tiger lily", torch.rand(1, 1, 32, 32)
    plain = pipeline(prompt, latents=noise(), **DRAW).images
    # Zero convolutions: an untrained ControlNet changes nothing.
    assert np.array_equal(plain, controlled(prompt, image=control, latents=noise(), **DRAW).images)
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight, std=0.1)
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
    first, second = (
        controlled(prompt, image=image, latents=noise(), **DRAW).images for image in (control, 1 - control)
    )
    assert first.shape == (1, 32, 32, 3)
    assert not np.array_equal(first, second)


def test_torchvisions_largest_part_is_the_one_to_train_on(monkeypatch):
    parts = {"train": 2, "val": 3, "test": 7}
    monkeypatch.setattr("torchvision.datasets.Flowers102", lambda root, part, download: [part] * parts[part])
    train, held_out = flowers(Namespace(npz=None, torchvision="flowers"))
    assert list(train) == ["test"] * 7
    assert list(held_out) == ["train"] * 2 + ["val"] * 3


def test_pictures_without_class_names_are_refused(tmp_path):
    images, split = discs(4).permute(0, 2, 3, 1).numpy(), ["train", "train", "test", "test"]
    np.savez(tmp_path / "nameless.npz", images=images, split=split)
    with pytest.raises(DataError, match="names of their classes"):
        main(["--npz", str(tmp_path / "nameless.npz"), "--output", str(tmp_path / "pipeline")])
    assert not (tmp_path / "pipeline").exists()


def test_a_source_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["--output", "nowhere"])
    assert "--npz --torchvision" in capsys.readouterr().err
