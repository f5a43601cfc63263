"""TextToImageDiffTuningModule on a small Stable Diffusion pipeline: text, latents, bank, pictures, tuners."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import quiet_trainer

from lightning_difftune import DiffTuningObjective, MemoryBank, MemoryBankDataModule, TextToImageDiffTuningModule
from lightning_difftune.callbacks import EMA
from lightning_difftune.data import LatentCache
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.draws import Draws
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.losses import eps_mse_loss, v_mse_loss
from lightning_difftune.pictures import to_uint8
from lightning_difftune.retention_targets import OnlineTeacher, StoredPredictions
from lightning_difftune.sampling import Sampler, ddim, sample
from lightning_difftune.tuners import LoRA

CAPTIONS = ["a photo of a cat", "a photo of a dog", "grey"]


def module_of(pipeline_folder, **settings):
    settings = {"sampler": Sampler(None, 2, 3.0, None), "prompts": CAPTIONS} | settings
    return TextToImageDiffTuningModule(pipeline_folder, **settings)


def built(pipeline_folder, **settings):
    module = module_of(pipeline_folder, **settings)
    module.configure_model()
    return module.eval()


def data_of(tmp_path, **settings):
    rng = np.random.default_rng(0)
    source = [(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), CAPTIONS[i % 3]) for i in range(12)]
    settings = {"bank": tmp_path / "bank", "bank_size": 5, "batch_size": 5, "image_size": 16} | settings
    return MemoryBankDataModule(source, **settings)


@pytest.mark.filterwarnings("error:Found .* in eval mode at the start of training")  # the frozen networks are no such
@pytest.mark.parametrize("latent_cache", [True, False])
def test_it_trains_on_captions_and_a_bank_of_its_own_samples(tmp_path, pipeline_folder, latent_cache):
    module = module_of(pipeline_folder, bank_prompts=["", "grey"])
    trainer = quiet_trainer(tmp_path, 3, EMA(decay=0.5))
    trainer.fit(module, data_of(tmp_path, latent_cache=tmp_path / "latents" if latent_cache else None))
    assert {"train/loss", "train/retention"} <= trainer.callback_metrics.keys()
    assert all(value.isfinite() for value in trainer.callback_metrics.values())

    bank = MemoryBank(tmp_path / "bank")
    assert (len(bank), bank.latent_shape, bank.spec["prompts"]) == (5, (4, 8, 8), ["", "grey"])
    assert bank.read(torch.arange(5))["class_labels"].tolist() == [0, 1, 0, 1, 0]
    if latent_cache:
        batch = LatentCache(tmp_path / "latents").read([2], [False])
        expected = module.text_encoder.encode(["grey"])["prompt_embeds"]
        torch.testing.assert_close(batch["prompt_embeds"], expected, rtol=1e-2, atol=1e-2)  # bfloat16
        assert len(list((tmp_path / "latents").glob("captions*/*.safetensors"))) == 3, "each distinct caption once"

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert all(name.startswith("unet.") for name in saved["state_dict"]), "no frozen network in a checkpoint"


def test_pictures_are_those_of_the_pipeline(pipeline_folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler.from_pretrained(pipeline_folder, subfolder="scheduler")
    module = built(pipeline_folder, sampler=Sampler(scheduler, 3, 4.0, None))
    ours = module.generate(torch.tensor([0, 1]))
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    from lightning_difftune.draws import noise_of

    theirs = pipeline(
        CAPTIONS[:2],
        latents=noise_of(0, torch.tensor([0, 1]), (4, 8, 8)),
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="np",
    ).images
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy() / 255, theirs, atol=0.51 / 255 + 1e-4)


def test_sample_i_depends_on_its_index_alone(pipeline_folder):
    module = built(pipeline_folder)
    together = module.generate(torch.arange(4))
    torch.testing.assert_close(together[3:], module.generate(torch.tensor([3])), rtol=0, atol=1)


def test_captions_are_dropped_once_a_sample_and_retained_samples_have_their_bank_prompts(pipeline_folder):
    module = built(pipeline_folder, bank_prompts=["grey", ""], prompt_dropout=0.25).train()
    count = 2000
    embeddings = module.text_encoder.encode(["a photo of a cat"])["prompt_embeds"].expand(count, -1, -1)
    latents = torch.zeros(count, 4, 8, 8)
    target = {"latent_mean": latents, "latent_std": latents, "prompt_embeds": embeddings}
    retention = {"latents": torch.ones(3, 4, 8, 8), "class_labels": torch.tensor([1, 0, 0])}
    x0, condition, is_retention = module.prepare({"target": target, "retention": retention}, Draws(0, 0))
    assert is_retention.sum() == 3
    assert is_retention[count:].all()
    assert (x0[count:] == 1).all()
    null, condition = module.null_text()["prompt_embeds"], condition["prompt_embeds"]
    dropped = (condition[:count] == null).flatten(1).all(1)
    assert torch.equal(condition[:count][~dropped], embeddings[~dropped])
    assert 0.2 < dropped.float().mean() < 0.3
    assert torch.equal(condition[count:], module.text_encoder.encode(["", "grey", "grey"])["prompt_embeds"])
    module.eval()
    assert torch.equal(module.prepare({"target": target}, Draws(0, 0))[1]["prompt_embeds"], embeddings)


@pytest.mark.parametrize("prompt", ["", "grey"])
def test_pictures_of_a_bank_source_are_retained_under_the_only_prompt(tmp_path, pipeline_folder, prompt):
    module, data = built(pipeline_folder, bank_prompts=[prompt]), data_of(tmp_path, bank_source="target")
    quiet_trainer(tmp_path, 1).fit(module, data)
    retained = MemoryBank(tmp_path / "bank").read(torch.arange(5))
    expected = module.text_encoder.encode([prompt])["prompt_embeds"].expand(5, -1, -1)
    assert torch.equal(module.retention_condition(retained)["prompt_embeds"], expected)


def test_domain_guidance_takes_the_empty_prompt_of_the_pipeline_before_tuning(pipeline_folder):
    plain, domain = Sampler(None, 2, 3.0, None), Sampler(None, 2, 3.0, None)
    domain.domain_guidance = True
    module, indices = built(pipeline_folder), torch.arange(2)
    pipeline = copy.deepcopy(module.unet)
    condition, null = module.conditions(indices)

    def guided(x_t, t, _):
        text, empty = module.denoise(x_t, t, condition), pipeline(x_t, t, null["prompt_embeds"]).sample
        return empty + 3.0 * (text - empty)

    module.sampler = plain
    before = module.generate(indices).int()
    module.sampler = domain
    assert (module.generate(indices).int() - before).abs().max() <= 1, "both networks are the pipeline's"
    with torch.no_grad():
        for parameter in module.unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    expected = sample(guided, module.start_noise(indices), module.sampler.scheduler, 2)
    assert (module.generate(indices).int() - to_uint8(module.decode(expected)).int()).abs().max() <= 1
    module.sampler = plain
    assert (module.generate(indices).int() - to_uint8(module.decode(expected)).int()).abs().max() > 1


def test_the_ends_of_a_swap_are_the_tuned_pipeline_and_the_pipeline(pipeline_folder):
    module, indices = built(pipeline_folder), torch.arange(2)
    before = module.generate(indices)
    with torch.no_grad():
        for parameter in module.unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    swapped = module.generate_swapped(indices, [0.0, 1.0])
    assert torch.equal(swapped[0], module.generate(indices))
    assert torch.equal(swapped[1], before)
    assert not torch.equal(swapped[0], swapped[1])


def test_the_bank_is_of_the_pipeline_even_after_tuning(tmp_path, pipeline_folder):
    tuned = module_of(pipeline_folder, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    quiet_trainer(tmp_path, 2).fit(tuned, data_of(tmp_path, bank=None))
    one = MemoryBank.build(tmp_path / "tuned", tuned.bank_generator(), 3)
    other = MemoryBank.build(tmp_path / "fresh", built(pipeline_folder).bank_generator(), 3)
    everything = torch.arange(3)
    assert torch.equal(one.read(everything)["latents"], other.read(everything)["latents"])


def test_lora_starts_as_the_pipeline_and_trains_alone(tmp_path, pipeline_folder):
    tuner = LoRA(rank=2, alpha=2, target_modules=("to_q", "to_v"))
    plain, module = built(pipeline_folder), built(pipeline_folder, tuner=tuner)
    assert torch.equal(plain.generate(torch.arange(2)), module.generate(torch.arange(2)))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    trainer = quiet_trainer(tmp_path, 2)
    trainer.fit(module, data_of(tmp_path))
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    assert {*torch.load(tmp_path / "lora.ckpt", weights_only=True)["state_dict"]} == trained


def test_gradient_checkpointing_and_channels_last_change_nothing_but_memory(tmp_path, pipeline_folder):
    losses = []
    for settings in ({}, {"gradient_checkpointing": True, "channels_last": True}):
        trainer = quiet_trainer(tmp_path, 2)
        trainer.fit(module_of(pipeline_folder, **settings), data_of(tmp_path))
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_long_prompt_is_truncated_and_said_once(pipeline_folder, capfd):
    encoder = built(pipeline_folder).text_encoder
    long = "a photo of a cat and a photo of a dog"
    with pytest.warns(UserWarning, match=r"is truncated: it has \d+ tokens, and the text encoder reads 8: 'a photo"):
        embedding = encoder.encode([long])["prompt_embeds"]
    assert embedding.shape == (1, 8, 16)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode([long])
    with warnings.catch_warnings(record=True) as said:  # not one for each of a data set's captions
        warnings.simplefilter("always")
        encoder.encode([f"{long} and {i} birds" for i in range(50)])
    said = [str(warning.message) for warning in said if "truncated" in str(warning.message)]
    assert len(said) == 3
    assert said[-1] == "Further prompts have more than 8 tokens and are truncated, without being named."
    assert "indexing errors" not in capfd.readouterr().err  # the tokenizer's own warning, which is mistaken here


@pytest.mark.parametrize("target", [OnlineTeacher(), StoredPredictions()], ids=repr)
def test_a_model_starts_without_anything_to_retain(tmp_path, pipeline_folder, target):
    objective = DiffTuningObjective()
    objective.retention_target = target
    trainer = quiet_trainer(tmp_path, 1)
    trainer.fit(module_of(pipeline_folder, objective=objective), data_of(tmp_path))
    assert trainer.callback_metrics["train/retention"] < 1e-8
    assert trainer.callback_metrics["train/reconsolidation"] > 0.1


def test_mistakes_are_refused(tmp_path, pipeline_folder):
    with pytest.raises(ConfigError, match="prompt_dropout"):
        module_of(pipeline_folder, prompt_dropout=1.0)
    for wrong in ([], "a photo of a cat", [None], [7]):  # a text is a sequence of letters
        for name in ("prompts", "bank_prompts"):
            with pytest.raises(ConfigError, match=f"^{name} is a list of one prompt or more"):
                module_of(pipeline_folder, **{name: wrong})
    prompted = module_of(pipeline_folder, bank_prompts=["grey", ""])
    with pytest.raises(ConfigError, match="has 2 prompts, and which of them fits a picture of bank_source"):
        quiet_trainer(tmp_path, 1).fit(prompted, data_of(tmp_path, bank_source="target"))
    labelled = MemoryBankDataModule([(np.zeros((16, 16, 3), np.uint8), 0)] * 5, 1, 16, batch_size=2)
    with pytest.raises(ConfigError, match=r"needs captions.*ClassCaptions"):
        quiet_trainer(tmp_path, 1).fit(module_of(pipeline_folder), labelled)
    with pytest.raises(ConfigError, match="another noise schedule than the objective's diffusion"):
        built(pipeline_folder, objective=DiffTuningObjective(diffusion=GaussianDiffusion()))
    with pytest.raises(ConfigError, match="the sampler: DDIMScheduler reverses another noise schedule"):
        built(pipeline_folder, sampler=Sampler(ddim()))
    with pytest.raises(ConfigError, match="Set the model's image_size"):
        quiet_trainer(tmp_path, 1).fit(module_of(pipeline_folder), data_of(tmp_path, image_size=32, bank=None))
    with pytest.raises(CheckpointError, match="is not a local folder"):
        built(str(tmp_path / "nothing"))
    broken = tmp_path / "broken"
    shutil.copytree(pipeline_folder, broken)
    (broken / "tokenizer").rename(broken / "elsewhere")
    with pytest.raises(CheckpointError, match="has no tokenizer and text_encoder"):
        built(str(broken))


def test_a_v_prediction_pipeline_brings_its_loss_and_sampler(tmp_path, pipeline_folder):
    folder = tmp_path / "v"
    shutil.copytree(pipeline_folder, folder)
    file = Path(folder) / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    module = built(str(folder))
    assert module.objective.loss is v_mse_loss
    assert module.sampler.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match="predicts 'v_prediction', but the sampler integrates with DDIMScheduler"):
        built(str(folder), sampler=Sampler(ddim()))
    with pytest.raises(ConfigError, match="predicts 'v_prediction', but the objective's loss is eps_mse_loss"):
        built(str(folder), objective=DiffTuningObjective(loss=eps_mse_loss))


def test_image_size_of_another_resolution(tmp_path, pipeline_folder):
    module = module_of(pipeline_folder, image_size=32)
    quiet_trainer(tmp_path, 1).fit(module, data_of(tmp_path, image_size=32))
    assert MemoryBank(tmp_path / "bank").latent_shape == (4, 16, 16)
    assert module.eval().generate(torch.arange(1)).shape == (1, 3, 32, 32)
