"""``difftune plan``: its counts, the phases of a config, and its output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_autoencoder

from lightning_difftune import DiTDiffTuningModule
from lightning_difftune.cli import main
from lightning_difftune.cli.lightning import ModelReader
from lightning_difftune.cli.plan.phases import PEAKS, Speed
from lightning_difftune.cli.plan.probe import PARTS, Probe, all_parameters, count, saved_tensors, without_values
from lightning_difftune.cli.plan.shapes import published_shapes
from lightning_difftune.models import DiT, FrozenAutoencoder, load_dit
from lightning_difftune.tuners import LoRA

HIDDEN, DEPTH, SIDE, CHANNELS = 32, 2, 8, 4
TARGETS = "lightning_difftune.retention_targets"


def module_of(**settings) -> DiTDiffTuningModule:
    torch.manual_seed(0)
    autoencoder = tiny_autoencoder(8, 8, norm_num_groups=2)
    model = DiT(SIDE, 2, CHANNELS, HIDDEN, DEPTH, 2, num_classes=6)
    module = DiTDiffTuningModule(model, num_classes=3, autoencoder=FrozenAutoencoder(autoencoder), **settings)
    module.configure_model()
    return module.train()


def costs_of(**settings):
    return count(module_of(**settings), (3, 16, 16), "32-true", without_values())


def test_a_forward_pass_is_the_sum_of_its_matrix_products() -> None:
    tokens, patch = (SIDE // 2) ** 2, 2 * 2 * CHANNELS
    block = tokens * 12 * HIDDEN**2 + 2 * tokens**2 * HIDDEN + 6 * HIDDEN**2  # projections and MLP, attention, adaLN
    ends = tokens * patch * HIDDEN + tokens * HIDDEN * 2 * patch + 2 * HIDDEN**2  # patches in, out; last modulation
    timestep = 256 * HIDDEN + HIDDEN**2
    costs = costs_of()
    assert costs.flops["denoise"] == 2 * (DEPTH * block + ends + timestep)
    assert costs.flops["denoise_source"] == costs.flops["denoise"]
    # Backward is twice the forward pass, but for gradients of the input.
    assert 2.8 * costs.flops["denoise"] < costs.flops["train"] <= 3 * costs.flops["denoise"]
    assert costs.flops["decode"] > costs.flops["encode"] > 0


def test_parameters_and_bytes() -> None:
    costs, module = costs_of(), module_of()
    assert costs.trained == sum(p.numel() for p in module.dit.parameters() if p.requires_grad)
    autoencoder = sum(p.nbytes for p in module.autoencoder.network.parameters())
    assert costs.frozen_bytes == autoencoder + module.dit.pos_embed.nbytes
    assert costs.bank_bytes == CHANNELS * SIDE * SIDE * 4 + 8, "float32 latents and a label"
    assert costs.cache_bytes == 2 * CHANNELS * SIDE * SIDE * 2 + 8, "mean and std in float16, and a label"


def test_shapes_alone_tell_what_a_step_keeps() -> None:
    one, two = (Probe(module_of(), (3, 16, 16), size, "32-true") for size in (1, 2))

    def really_kept(probe: Probe) -> int:
        storages: dict[int, int] = {}
        keep = lambda x: storages.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = probe.loss()
        del loss
        return sum(storages.values())

    def told_to_be_kept(probe: Probe) -> float:
        with without_values(), saved_tensors() as saved_bytes:
            loss = probe.loss()
        nbytes = saved_bytes()
        del loss
        return nbytes

    told = told_to_be_kept(two) - told_to_be_kept(one)
    assert told == pytest.approx(really_kept(two) - really_kept(one), rel=0.02)


def test_less_is_trained_and_kept_with_lora() -> None:
    full, lora = costs_of(), costs_of(tuner=LoRA(rank=2))
    assert lora.trained < full.trained / 4
    assert lora.frozen_bytes > full.frozen_bytes
    assert lora.flops["train"] < full.flops["train"]


def test_bf16_keeps_less_than_float32() -> None:
    costs = [count(module_of(), (3, 16, 16), precision, without_values()) for precision in ("32-true", "bf16-mixed")]
    assert costs[1].activation_bytes < 0.9 * costs[0].activation_bytes


def test_counting_leaves_no_values_behind() -> None:
    module = module_of()
    before = {name: p.clone() for name, p in module.named_parameters()}
    probe = Probe(module, (3, 16, 16), 1, "32-true")
    with without_values():
        probe.train()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())


def test_hours_by_a_data_sheet() -> None:
    costs = costs_of()
    speeds = [Speed.of_data_sheet("a100", part, "bf16-mixed", costs).seconds["train"] for part in (0.25, 0.5)]
    assert speeds[0] == 2 * speeds[1] == costs.flops["train"] / (0.25 * 312e12)
    slower = Speed.of_data_sheet("a100", 0.25, "32-true", costs)
    assert slower.seconds["train"] == 2 * speeds[0]
    assert slower.seconds["encode"] == Speed.of_data_sheet("a100", 0.25, "bf16-mixed", costs).seconds["encode"]
    assert all(peaks["bf16"] > peaks["tf32"] for peaks in PEAKS.values())


def test_every_part_is_timed_here() -> None:
    module = module_of()
    before = module.dit.pos_embed.clone()
    of_training, of_building = (Probe(module, (3, 16, 16), size, "32-true") for size in (4, 8))
    speed = Speed.measured(of_training, of_building, least=0.0)
    assert all(speed.seconds[part] > 0 for part in PARTS)
    assert speed.seconds["train"] > speed.seconds["denoise"]
    assert torch.equal(module.dit.pos_embed, before)


def plan_of(tmp_path: Path, *args: str) -> dict:
    assert main(["plan", "--config", "configs/quickstart.yaml", *args, "--json", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


def test_a_bank_of_pictures_draws_no_samples(tmp_path: Path) -> None:
    source = ["--data.init_args.bank_source", "lightning_difftune.data.NpzImages"]
    plan = plan_of(tmp_path, *source, "--data.init_args.bank_source.init_args.path", "photos.npz")
    bank = plan["phases"]["memory bank"]
    assert (bank["what"], bank["flops"], bank["disk_bytes"]) == ("1,000 pictures", 0, 1000 * (20 * 20 * 4 + 8))
    for size, pictures in ((1000, "1,000"), (50_000, "4,000")):
        own = plan_of(tmp_path, "--data.init_args.bank_source", "target", "--data.init_args.bank_size", str(size))
        assert own["phases"]["memory bank"]["what"] == f"{pictures} pictures"


def test_data_that_cannot_be_opened_is_said_and_wrong_settings_are_refused(tmp_path, capsys) -> None:
    plan_of(tmp_path, "--data.init_args.target", "lightning_difftune.data.ImageFolder", "--data.target.root", "nowhere")
    said = capsys.readouterr().out
    assert "pictures is unknown, since they could not be opened" in said
    assert "nowhere does not exist" in said
    assert main(["plan", "--config", "configs/quickstart.yaml", "--data.retention_share", "20"]) == 2
    assert "retention_share must be in [0, 1), got 20.0" in capsys.readouterr().err


def test_the_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    phases = plan["phases"]
    assert list(phases) == ["memory bank", "training", "evaluation"]
    assert phases["memory bank"]["what"] == "1,000 samples, 10 steps, guided"
    assert phases["training"]["what"] == "700 steps of 64 samples"
    assert phases["evaluation"]["what"] == "4 validations, 1,600 pictures generated in all"
    # 20 passes a sample of the bank, and 3 passes' worth a training sample.
    ratio = phases["training"]["flops"] / phases["memory bank"]["flops"]
    assert ratio == pytest.approx(700 * 64 * 3 / (1000 * 20), rel=0.02)
    assert phases["memory bank"]["disk_bytes"] == 1000 * (20 * 20 * 4 + 8)
    assert "Memory of a training step" in printed
    assert "A100 at 20% of its tf32 peak, 1 device" in printed


@pytest.mark.parametrize(
    ("callbacks", "copies", "said"),
    [([], 0, "weights, gradients and Adam,"), (["EMA"], 1, "Adam and EMA,"), (["EMA", "EWC"], 2, "Adam, EMA and EWC,")],
)
def test_copies_of_the_weights_count_where_a_callback_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], callbacks: list[str], copies: int, said: str
) -> None:
    paths = [f"lightning_difftune.callbacks.{name}" for name in callbacks]
    plan = plan_of(tmp_path, "--trainer.callbacks", json.dumps([{"class_path": path} for path in paths]))
    assert said in " ".join(capsys.readouterr().out.split())
    without = plan_of(tmp_path, "--trainer.callbacks", "[]")
    assert plan["memory_bytes"] - without["memory_bytes"] == copies * 4 * 2_176_562  # dit-nano-omniglot's parameters


def test_devices_guidance_and_retention_count(tmp_path: Path) -> None:
    one = plan_of(tmp_path)["phases"]
    settings = ["--trainer.devices", "4", "--model.init_args.bank_sampler.guidance_scale", "1"]
    four = plan_of(tmp_path, *settings)["phases"]
    assert four["training"]["flops"] == 4 * one["training"]["flops"], "batch_size is a device's"
    assert four["training"]["seconds"] == pytest.approx(one["training"]["seconds"])
    assert four["memory bank"]["flops"] == one["memory bank"]["flops"] / 2
    assert four["memory bank"]["seconds"] == pytest.approx(one["memory bank"]["seconds"] / 8)
    assert "memory bank" not in plan_of(tmp_path, "--config", "configs/presets/full.yaml")["phases"]


def test_files_that_are_not_here_are_unknown_and_not_an_error(tmp_path: Path) -> None:
    args = ["--config", "configs/controlnet/flowers.yaml", "--json", str(tmp_path / "plan.json")]
    assert main(["plan", *args, "--device", "h100"]) == 0
    phases = json.loads((tmp_path / "plan.json").read_text())["phases"]
    assert phases["latent cache"]["what"] == "unknown: the target's files are not here"
    assert phases["memory bank"]["disk_bytes"] == 1000 * (4 * 16 * 16 * 4 + 8 + 32 * 32), "control maps are kept, too"
    assert phases["training"]["flops"] > 0


def test_mistakes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "configs/quickstart.yaml", "--utilisation", "35"]) == 2
    assert "--utilisation is a share of the peak" in capsys.readouterr().err
    assert main(["plan", "--config", "nothing.yaml"]) == 2


@pytest.mark.parametrize(
    ("configs", "trained", "frozen"),
    [
        # DiT-XL/2: Table 3 of its paper has 675 M, with the fixed positions (256 x 1152) and 1,001 label rows.
        (["dit/base", "dit/flowers"], 675_129_632 - 256 * 1152, 83_653_863),
        # Stable Diffusion 1.5: UNet 859.5 M, text encoder 123.1 M, autoencoder 83.7 M; LoRA of 3.2 M.
        (["text_to_image/base", "text_to_image/folder"], 3_188_736, 859_520_964 + 123_060_480 + 83_653_863),
    ],
)
def test_published_models_are_counted_without_their_weights(configs, trained, frozen, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lightning_difftune.models.hub.fetch", lambda *args: pytest.fail("nothing is fetched"))
    args = [arg for name in configs for arg in ("--config", f"configs/{name}.yaml")]
    with published_shapes(with_values=False):
        module = ModelReader(args).model
        module.channels_last = False
        module.configure_model()
    parameters = {id(p): p.numel() for p in module.trainable_parameters()}
    assert sum(parameters.values()) == trained
    assert sum(p.numel() for p in all_parameters(module) if id(p) not in parameters) - frozen in (0, 256 * 1152)


def test_a_teacher_costs_a_pass_of_each_retained_sample_and_a_copy_of_the_weights(tmp_path: Path) -> None:
    preset = ["--config", "configs/presets/self_teacher.yaml"]
    plain, taught = (plan_of(tmp_path, "--data.init_args.bank_source", "target", *more) for more in ([], preset))
    costs = [plan["phases"]["training"]["flops"] for plan in (plain, taught)]
    # A training sample costs about three forward passes; 12 of 64 samples are retained, and cost another one.
    assert costs[1] / costs[0] == pytest.approx(1 + 12 / 64 / 3, rel=0.01)
    weights = sum(p.nbytes for p in load_dit("dit-nano-omniglot").parameters())
    assert taught["memory_bytes"] - plain["memory_bytes"] == weights
    assert taught["phases"]["memory bank"] == plain["phases"]["memory bank"]

    stored = ["--model.init_args.objective.init_args.retention_target", f"{TARGETS}.StoredPredictions"]
    bank = plan_of(tmp_path, *preset, *stored)["phases"]["memory bank"]
    assert bank["disk_bytes"] == 1000 * (3 * 20 * 20 * 4 + 8 + 8), "latents, noise, predictions, timestep and label"
    assert bank["flops"] > taught["phases"]["memory bank"]["flops"]


def test_the_checkpoints_that_a_run_keeps_and_what_is_in_them(tmp_path: Path) -> None:
    trained = sum(p.numel() for p in load_dit("dit-nano-omniglot").parameters() if p.requires_grad)
    quickstart = plan_of(tmp_path)["phases"]["training"]["disk_bytes"]
    assert quickstart == pytest.approx(trained * 4 * 4, rel=0.03), "last.ckpt: weights, averages, two moments"
    kinds = "lightning_difftune.callbacks.EWC", "lightning.pytorch.callbacks.ModelCheckpoint"
    entries = [{"class_path": kinds[0]}, {"class_path": kinds[1], "init_args": {"save_last": True, "save_top_k": 2}}]
    others = plan_of(tmp_path, "--trainer.callbacks", json.dumps(entries))["phases"]["training"]["disk_bytes"]
    assert others == pytest.approx(3 * trained * 4 * 4, rel=0.03), "three files, without averages, with EWC's start"
