"""ControlNetDiffTuningModule on a small Stable Diffusion pipeline: control in the target, the bank and pictures."""

from __future__ import annotations

import mapped
import numpy as np
import pytest
import torch
import yaml
from tiny import quiet_trainer
from torchmetrics import Metric

from lightning_difftune import ControlNetDiffTuningModule, DiffTuningObjective, MemoryBank, MemoryBankDataModule
from lightning_difftune.callbacks import EMA, ControlSimilarity, ForgettingMeter
from lightning_difftune.cli.swap import generator
from lightning_difftune.data import ImageTargets, LatentCache
from lightning_difftune.draws import Draws, noise_of
from lightning_difftune.errors import CheckpointError, ConfigError, StoreError
from lightning_difftune.models import export_network
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.modules.checkpoints import rebuild
from lightning_difftune.pictures import to_uint8
from lightning_difftune.retention_targets import OnlineTeacher, StoredPredictions
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import LoRA


class Bright:
    """Control maps that are white where a picture is bright."""

    def __init__(self, threshold: int = 127, channels: int = 1) -> None:
        self.threshold, self.channels = threshold, channels

    def __call__(self, pictures):
        bright = pictures.float().mean(1, keepdim=True) > self.threshold
        return bright.expand(-1, self.channels, -1, -1).to(torch.uint8) * 255

    def identity(self) -> str:
        return f"bright {self.threshold} {self.channels}"


def module_of(pipeline_folder, **settings):
    settings = {"annotator": Bright(), "model": pipeline_folder, "sampler": Sampler(None, 2, 3.0, None)} | settings
    return ControlNetDiffTuningModule(**settings)


def built(pipeline_folder, **settings):
    module = module_of(pipeline_folder, **settings)
    module.configure_model()
    return module.eval()


def awake(module):
    """Give the zero convolutions values, as training would."""
    torch.manual_seed(1)
    net = module.controlnet
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(block.weight, std=0.5)
    return module


def pictures_of(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(count)]


def data_of(tmp_path, source=None, **settings):
    source = source if source is not None else [(picture, "a photo of a cat") for picture in pictures_of(12)]
    settings = {"bank": tmp_path / "bank", "bank_size": 5, "batch_size": 5, "image_size": 16} | settings
    return MemoryBankDataModule(source, **settings)


@pytest.mark.parametrize("latent_cache", [True, False])
def test_it_trains_on_both_streams_with_control(tmp_path, pipeline_folder, latent_cache):
    module = module_of(pipeline_folder)
    trainer = quiet_trainer(tmp_path, 3, EMA(decay=0.5))
    trainer.fit(module, data_of(tmp_path, latent_cache=tmp_path / "latents" if latent_cache else None))
    assert {"train/loss", "train/retention"} <= trainer.callback_metrics.keys()
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    if latent_cache:
        maps = LatentCache(tmp_path / "latents").read([3], [False])["conditioning_pixel_values"]
        assert torch.equal(maps, Bright()(torch.from_numpy(pictures_of(4)[3]).permute(2, 0, 1)[None]))

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert all(name.startswith("controlnet.") for name in saved["state_dict"]), "the ControlNet alone"
    again = module_of(pipeline_folder)
    quiet_trainer(tmp_path, 4).fit(again, data_of(tmp_path), ckpt_path=tmp_path / "run.ckpt")
    assert again.global_step == 4


def test_the_bank_has_the_pictures_own_maps(tmp_path, pipeline_folder):
    module = built(pipeline_folder)
    bank = MemoryBank.build(tmp_path / "bank", module.bank_generator(), 4, batch_size=3)
    batch = bank.read(torch.arange(4))
    expected = Bright()(to_uint8(module.decode(batch["latents"])))
    assert torch.equal(batch["conditioning_pixel_values"], expected)
    assert 0 < expected.float().mean() < 255
    other = built(pipeline_folder, annotator=Bright(100))
    with pytest.raises(StoreError, match="annotator"):
        MemoryBank.build(tmp_path / "bank", other.bank_generator(), 4)


def test_a_bank_of_pictures_has_their_latents_and_maps(tmp_path, pipeline_folder):
    module, source = built(pipeline_folder), ImageTargets([(picture, 0) for picture in pictures_of(4)], 16)
    bank = MemoryBank.build(tmp_path / "bank", module.bank_generator(source), 4, batch_size=3).read(torch.arange(4))
    latents = module.posterior(source.pixels(range(4), [False] * 4)["pixel_values"])[0]
    nearest = torch.cdist(bank["latents"].flatten(1), latents.flatten(1))
    assert torch.allclose(nearest.min(1).values, torch.zeros(4), atol=1e-4)
    assert sorted(nearest.argmin(1).tolist()) == [0, 1, 2, 3]
    assert torch.equal(bank["conditioning_pixel_values"], Bright()(to_uint8(module.decode(bank["latents"]))))


def test_it_starts_as_the_pipeline(pipeline_folder):
    module = built(pipeline_folder)
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    maps = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    condition, null = module.controlled(["a photo of a dog"] * 3, maps)
    assert torch.equal(null["conditioning_pixel_values"], condition["conditioning_pixel_values"])
    pretrained = module.pretrained()(x_t, t, module.source_condition(condition))
    assert torch.equal(module.denoise(x_t, t, condition), pretrained)
    awake(module)
    changed = module.denoise(x_t, t, condition)
    assert not torch.allclose(changed, pretrained)
    condition["conditioning_pixel_values"] = 1 - condition["conditioning_pixel_values"]
    assert not torch.allclose(module.denoise(x_t, t, condition), changed)
    assert torch.equal(module.pretrained()(x_t, t, module.source_condition(condition)), pretrained)


def test_the_export_draws_the_same_pictures_in_diffusers_pipeline(tmp_path, pipeline_folder):
    from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
    from PIL import Image

    scheduler = DDIMScheduler.from_pretrained(pipeline_folder, subfolder="scheduler")
    module = awake(built(pipeline_folder, sampler=Sampler(scheduler, 3, 4.0, None), annotator=Bright(channels=3)))
    folder = export_network(module.controlnet, tmp_path / "control")
    maps = torch.randint(0, 2, (2, 3, 16, 16), dtype=torch.uint8) * 255
    captions = ["a photo of a cat", "grey"]
    ours = module.generate_controlled(torch.tensor([5, 0]), maps, captions)

    controlnet = ControlNetModel.from_pretrained(folder)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        pipeline_folder, controlnet=controlnet, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        captions,
        image=[Image.fromarray(map_.permute(1, 2, 0).numpy()) for map_ in maps],
        latents=noise_of(0, torch.tensor([5, 0]), (4, 8, 8)),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="np",
    ).images
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy() / 255, theirs, atol=0.51 / 255 + 1e-4)

    with pytest.raises(CheckpointError, match="exists"):
        export_network(module.controlnet, folder)
    again = built(pipeline_folder, controlnet=folder, annotator=Bright(channels=3))
    assert fingerprint(again.controlnet) == fingerprint(module.controlnet)
    with pytest.raises(ConfigError, match="takes control maps of 3 channels, but Bright makes 1"):
        built(pipeline_folder, controlnet=folder)


def test_lora_trains_the_layers_without_pretrained_weights_too(tmp_path, pipeline_folder):
    tuner = LoRA(rank=2, alpha=2, target_modules=("to_q", "to_v"))
    module = module_of(pipeline_folder, tuner=tuner, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer = quiet_trainer(tmp_path, 3)
    trainer.fit(module, data_of(tmp_path))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    kinds = ("lora_", "controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")
    assert all(any(kind in name for kind in kinds) for name in trained)
    assert all(any(kind in name for name in trained) for kind in kinds)
    moved = [p for n, p in module.named_parameters() if "lora_B" in n]
    assert any(p.abs().max() > 0 for p in moved), "LoRA gets gradients once the zero convolutions have moved"
    with pytest.raises(CheckpointError, match="layers of LoRA"):
        export_network(module.controlnet, tmp_path / "lora")
    merged = tuner.merge(module.controlnet)
    export_network(merged, tmp_path / "lora")


def test_own_control_maps_of_the_target_are_used(tmp_path, pipeline_folder):
    own = np.zeros((16, 16), np.uint8)
    own[4:8] = 200
    source = [(picture, "a photo of a cat", own) for picture in pictures_of(6)]
    module = built(pipeline_folder)
    (batch, *_) = data_of(tmp_path, source, bank=None).train_dataloader()
    _, condition, _ = module.prepare(batch, Draws(0, 0))
    assert torch.equal(condition["conditioning_pixel_values"][0, 0], torch.from_numpy(own).float() / 255)
    colour = [(picture, "a photo of a cat", picture) for picture in pictures_of(6)]
    with pytest.raises(
        ConfigError, match=r"The target has control maps .*\(5, 3, 16, 16\).*takes uint8 \(B, 1, H, W\)"
    ):
        quiet_trainer(tmp_path, 1).fit(module_of(pipeline_folder), data_of(tmp_path, colour, bank=None))


def test_maps_of_the_hub_and_of_shards_train_it_as_those_of_files(tmp_path, pipeline_folder):
    """Through the batch and the latent cache to the condition: grey maps that are saved in colour."""
    module, found = built(pipeline_folder), {}
    for name, source in mapped.sources(tmp_path).items():
        data = data_of(tmp_path, source, bank=None, val_target=source)
        batch = next(iter(data.train_dataloader()))
        _, condition, _ = module.prepare(batch, Draws(0, 0))
        cache = LatentCache.build(tmp_path / name, data.target, module.encode, {})
        pictures, _, maps = data.control_examples([1, 4])
        cached = cache.read([0, 3], [False, True])
        found[name] = [batch["target"]["pixel_values"], *condition.values(), *cached.values(), pictures, maps]
        assert condition["conditioning_pixel_values"].shape == (5, 1, 16, 16)
        assert condition["conditioning_pixel_values"].std() > 0.1, "not the annotator's"
    for name in ("hub", "shards"):
        assert all(torch.equal(a, b) for a, b in zip(found["files"], found[name], strict=True))


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3)])
def test_pictures_follow_the_own_maps_and_captions_of_held_out_examples(tmp_path, pipeline_folder, shape):
    """They are validated by those maps, and their rows are named after those captions, not the prompts."""
    own = [np.full(shape, 50 * number, np.uint8) for number in range(3)]
    captions = ["a cat", "a dog", "a fox"]
    data = data_of(tmp_path, bank=None, val_target=list(zip(pictures_of(3), captions, own, strict=True)))
    module, seen = module_of(pipeline_folder), []
    callback = ControlSimilarity(Means(), num_samples=3, batch_size=2)
    module.annotate = lambda pictures: seen.append(len(pictures)) or torch.zeros(len(pictures), 1, 16, 16).byte()
    quiet_trainer(tmp_path, 1, callback).validate(module, data, verbose=False)
    assert callback.history[0][1] == 50, "the mean of the maps 0, 50 and 100; those of the generated ones are black"
    assert seen[-2:] == [2, 1], "of the generated pictures alone"
    condition, _ = module.conditions(torch.tensor([4, 2]))
    assert (condition["conditioning_pixel_values"][:, 0, 0, 0] * 255).tolist() == pytest.approx([50, 100])
    data.control_examples = pytest.fail  # nothing is read again
    assert module.names_of([4, 2]) == ["a dog", "a fox"]


def test_another_controlnet_does_the_last_steps_from_the_same_controls(tmp_path, pipeline_folder):
    data = data_of(tmp_path, bank=None, val_target=list(zip(pictures_of(3), ["a cat", "a dog", "a fox"], strict=True)))
    module, tail, indices = awake(built(pipeline_folder)), built(pipeline_folder), torch.arange(2)
    quiet_trainer(tmp_path, 1).validate(module, data, verbose=False)
    with pytest.raises(ConfigError, match="there are none: the module has no trainer with data"):
        module.generate_swapped(indices, [1.0], tail)
    swapped = generator(module, tail)(indices, [0.0, 1.0])
    assert torch.equal(swapped[0], module.generate(indices))
    assert torch.equal(swapped[1], tail.generate(indices))
    assert not torch.equal(swapped[0], swapped[1])


class Means(Metric):
    """The mean value of the control maps."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("count", torch.tensor(0), "sum")

    def update(self, maps, controls):
        assert maps.shape == controls.shape
        self.total += (controls.float() - maps.float()).mean((1, 2, 3)).sum()
        self.count += len(controls)

    def compute(self):
        return self.total / self.count


def test_fresh_weights_depend_on_the_seed_alone(pipeline_folder):
    one = fingerprint(built(pipeline_folder).controlnet)
    torch.manual_seed(77)
    assert fingerprint(built(pipeline_folder).controlnet) == one
    assert fingerprint(built(pipeline_folder, seed=1).controlnet) != one


def test_gradient_checkpointing_and_channels_last_change_nothing_but_memory(tmp_path, pipeline_folder):
    losses = []
    for settings in ({}, {"gradient_checkpointing": True, "channels_last": True}):
        trainer = quiet_trainer(tmp_path, 2)
        trainer.fit(module_of(pipeline_folder, **settings), data_of(tmp_path))
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("target", [OnlineTeacher(), StoredPredictions()], ids=repr)
def test_a_controlnet_starts_without_anything_to_retain(tmp_path, pipeline_folder, target):
    objective = DiffTuningObjective()
    objective.retention_target = target
    trainer = quiet_trainer(tmp_path, 1)
    trainer.fit(module_of(pipeline_folder, objective=objective), data_of(tmp_path))
    assert trainer.callback_metrics["train/retention"] < 1e-8
    assert trainer.callback_metrics["train/reconsolidation"] > 0.1


def test_mistakes_are_refused(pipeline_folder):
    with pytest.raises(ConfigError, match=r"by a factor of 8, but the autoencoder's is 2: give 2 widths"):
        built(pipeline_folder, conditioning_embedding_out_channels=(16, 32, 96, 256))
    with pytest.raises(ConfigError, match="there are none: the module has no trainer with data"):
        built(pipeline_folder).generate(torch.arange(2))
    with pytest.raises(ConfigError, match=r"control maps torch.uint8 \(2, 3, 16, 16\)"):
        built(pipeline_folder).generate_controlled(
            torch.arange(2), torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8), ["", ""]
        )


def test_the_forgetting_meter_compares_it_with_the_network_without_control(tmp_path, pipeline_folder):
    module, meter = module_of(pipeline_folder), ForgettingMeter(2, num_bins=2, num_samples=2)
    source = [(picture, "a photo of a cat") for picture in pictures_of(12)]
    quiet_trainer(tmp_path, 3, meter, limit_val_batches=0).fit(module, data_of(tmp_path, val_target=source))
    assert [step for step, _ in meter.history] == [1, 2, 3]  # a batch has one sample of the bank
    for kind in ("target", "bank"):
        assert meter.history[-1][1][kind] == pytest.approx(meter.pretrained[kind], rel=0.05)  # three small steps away
        assert meter.history[-1][1][kind] != meter.pretrained[kind]


def test_the_ends_of_a_swap_are_with_control_and_without(pipeline_folder):
    module, indices = awake(built(pipeline_folder)), torch.arange(2)
    conditions = module.controlled(["a cat", "a dog"], Bright()(torch.full((2, 3, 16, 16), 200, dtype=torch.uint8)))
    module.conditions = lambda indices: conditions
    both = module.generate_swapped(indices, [0.0, 1.0])
    assert torch.equal(both[0], module.generate(indices))
    assert not torch.equal(both[0], both[1])


def test_the_scale_of_control_is_of_pictures_and_not_of_losses(pipeline_folder):
    x_t, t, maps = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.full((2, 1, 16, 16), 200, dtype=torch.uint8)
    outputs = {}
    for scale in (1.0, 0.25):
        module = awake(built(pipeline_folder, conditioning_scale=scale))
        generator = torch.Generator().manual_seed(0)
        condition = {
            "prompt_embeds": torch.randn(2, 8, 16, generator=generator),
            "conditioning_pixel_values": torch.rand(2, 1, 16, 16, generator=generator),
        }
        drawn, _ = module.controlled(["a cat", "a dog"], maps)
        for training in (True, False):
            module.train(training)
            with torch.no_grad():
                outputs[scale, training] = module.denoise(x_t, t, condition), module.denoise(x_t, t, drawn)
    losses, pictures = zip(*outputs.values(), strict=True)  # as in a training or validation step, and in sampling
    assert all(torch.equal(output, losses[0]) for output in losses)
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[2], pictures[3])
    assert not torch.equal(pictures[0], pictures[2])


def test_a_checkpoint_of_the_command_line_knows_what_the_data_say():
    settings = {
        "seed_everything": 3,
        "model": {
            "class_path": "lightning_difftune.ControlNetDiffTuningModule",
            "init_args": {
                "annotator": {"class_path": "lightning_difftune.data.annotators.Canny"},
                "prompt_dropout": 0.5,
            },
        },
        "data": {"class_path": "lightning_difftune.MemoryBankDataModule", "init_args": {"image_size": 16}},
    }
    again = rebuild(ControlNetDiffTuningModule, {"config": yaml.safe_dump(settings)}, "run.ckpt", [], {})
    assert (again.image_size, again.seed, again.prompt_dropout) == (16, 3, 0.5)


@pytest.mark.parametrize("name", ["frozen_dtype", "distilled_guidance", "nonsense"])
def test_an_argument_that_it_would_not_use_is_refused(name):
    with pytest.raises(TypeError, match=name):
        ControlNetDiffTuningModule(Bright(), **{name: None})
