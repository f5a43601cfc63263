"""The DiT configs, the presets, the tuners and the ablations, on tiny data in the real layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from config_files import (
    CONFIGS,
    arguments,
    commands,
    composition,
    files_of,
    header,
    leaves,
    settings,
    smaller_callbacks,
)
from tiny import tiny_autoencoder
from tiny_data import (
    Pictures,
    accept_flowers,
    make_artbench10,
    make_caltech101,
    make_cars,
    make_cub200,
    make_df20_mini,
    make_flowers,
    make_folder,
    make_food101,
    make_sun397,
)
from torch import Tensor, nn

from lightning_difftune.callbacks import EMA, FID, ForgettingMeter, SampleGrid
from lightning_difftune.cli.lightning import DiffTuneCLI, run_lightning
from lightning_difftune.data import MemoryBank, MemoryBankDataModule
from lightning_difftune.data.source_facts import labels_of
from lightning_difftune.models import DiT, export_dit
from lightning_difftune.modules import DiTDiffTuningModule
from lightning_difftune.modules.presets import OFFICIAL, PAPER, active_settings, describe_preset
from lightning_difftune.schedules import fit_schedule

FILES = files_of("dit")
BASE = "configs/dit/base.yaml"
MEASURED = "configs/presets/measured.yaml"
SMALL_TAU = "configs/presets/small_tau.yaml"
SELF_TEACHER = "configs/presets/self_teacher.yaml"
DOMAIN_GUIDANCE = "configs/presets/domain_guidance.yaml"
TRANSFERS = {  # Table 1: full fine-tuning, Diff-Tuning; classes
    "configs/dit/food101.yaml": ("10.68", "6.05", 101),
    "configs/dit/sun397.yaml": ("11.01", "7.21", 397),
    "configs/dit/df20_mini.yaml": ("14.74", "12.57", 182),
    "configs/dit/caltech101.yaml": ("29.79", "23.79", 101),
    "configs/dit/cub200.yaml": ("5.32", "3.50", 200),
    "configs/dit/artbench10.yaml": ("20.59", "13.85", 10),
    "configs/dit/flowers.yaml": ("16.67", "12.64", 102),
    "configs/dit/cars.yaml": ("6.04", "5.37", 196),
}
OVERLAYS = [file for file in FILES if file.startswith("configs/dit/") and file != BASE]
ABLATIONS = {  # what a run with each says that it changes
    "snr": "schedule = SNRSchedule(k=1, gamma=1)",
    "retention_only": "reconsolidation weight = 0.0",
    "reconsolidation_only": "retention share = no retention, retention weight = 0.0",
    "online_teacher": "retention target = OnlineTeacher()",
}
# A partition by counts cannot be made of a data set that has twenty pictures, nor the paper's bottleneck of 64 or
# five prompted blocks of a DiT that has one block of width 16.
SMALL_SIZES = json.dumps({"train": 10, "val": 2, "test": 4})
SMALLER = {
    "configs/dit/sun397.yaml": [
        *("--data.init_args.target.init_args.sizes", SMALL_SIZES),
        *("--data.init_args.val_target.init_args.sizes", SMALL_SIZES),
    ],
    "configs/tuners/adaptformer.yaml": ["--model.init_args.tuner.init_args.bottleneck", "4"],
    "configs/tuners/vpt_deep.yaml": ["--model.init_args.tuner.init_args.blocks", "[0]"],
}


DATA_SETS: list[Callable[[Path, Pictures], None]] = [
    *(make_food101, make_sun397, make_df20_mini, make_caltech101, make_cub200, make_artbench10),
    *(make_flowers, make_cars, make_folder),
]


def make_models(folder: Path) -> None:
    """A DiT and an autoencoder that fit each other and the real label table, as checkpoints on disk."""
    torch.manual_seed(0)
    dit = DiT(input_size=8, patch_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=1000)
    export_dit(dit, folder / "dit.safetensors")
    tiny_autoencoder(4, 4, 4, 4, norm_num_groups=2).save_pretrained(folder / "vae")


@pytest.fixture(scope="module", autouse=True)
def ingredients(workplace: Path) -> Iterator[None]:
    """Every data set where its config looks for it, and tiny models."""
    for make in DATA_SETS:
        make(workplace / "data", Pictures())
    make_models(workplace)
    schedule = workplace / "runs" / "forgetting" / "schedule.json"
    schedule.parent.mkdir(parents=True)
    fit_schedule(schedule, [0.25, 0.75], [1.0, 1.0], [0.9, 0.5])
    with pytest.MonkeyPatch.context() as patch:
        accept_flowers(workplace / "data", patch)
        yield


def tiny(file: str) -> list[str]:
    """Command-line settings that put the tiny models into a run of ``file``'s command."""
    return [
        *("--model.init_args.model", "dit.safetensors"),
        *("--model.init_args.autoencoder.init_args.source", "vae"),
        *("--trainer.accelerator", "cpu"),
        *SMALLER.get(file, []),
    ]


@cache
def instantiate(file: str) -> DiffTuneCLI:
    """The objects that a file's command makes, without running it."""
    return run_lightning([*composition(file), *tiny(file)], run=False)


def levels(datamodule: MemoryBankDataModule, which: str) -> list[int]:
    """The grey levels of all pictures of the target or of the held-out target."""
    targets = getattr(datamodule, which)
    pictures = targets.uint8(range(len(targets)))
    assert pictures.shape == (len(targets), 3, 256, 256)
    assert (pictures == pictures[:, :1, :1, :1]).all()
    return pictures[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_instantiated_by_its_own_command(file: str) -> None:
    cli = instantiate(file)
    assert isinstance(cli.model, DiTDiffTuningModule)
    assert isinstance(cli.datamodule, MemoryBankDataModule)
    assert cli.model._num_classes == cli.datamodule.num_classes
    assert cli.model.seed == cli.datamodule.seed == 0
    assert any(isinstance(callback, EMA) for callback in cli.trainer.callbacks)
    assert labels_of(cli.datamodule.target.source) is not None, "labels are checked before the run starts"
    cli.model.configure_model()
    kept = cli.model.label_table == "keep"
    assert cli.model.dit.num_classes == (1000 if kept else cli.datamodule.num_classes)
    assert cli.model.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("file", OVERLAYS)
def test_training_and_held_out_pictures_are_different_ones(file: str) -> None:
    datamodule = instantiate(file).datamodule
    train, held_out = levels(datamodule, "target"), levels(datamodule, "val_target")
    assert len(set(train)) == len(train) > len(held_out) * 0.9
    assert not set(train) & set(held_out)
    assert set(datamodule.target.labels().tolist()) == {0, 1}


def test_flowers_trains_on_both_small_parts_and_caltech101_leaves_the_background_out() -> None:
    flowers = instantiate("configs/dit/flowers.yaml").datamodule
    assert (len(flowers.target), len(flowers.val_target)) == (6, 6)
    caltech = instantiate("configs/dit/caltech101.yaml").datamodule
    assert (len(caltech.target), len(caltech.val_target)) == (16, 4)
    assert caltech.target.class_names == ["Faces", "accordion"]


@pytest.mark.parametrize("file", TRANSFERS)
def test_header_quotes_table_1(file: str) -> None:
    full, diff_tuning, num_classes = TRANSFERS[file]
    text = " ".join(header(file).split())
    assert f"full fine-tuning {full}, Diff-Tuning {diff_tuning}." in text
    assert instantiate(file).datamodule.num_classes == num_classes


def test_base_lists_table_1() -> None:
    names, full, tuned = (line.split()[-8:] for line in header(BASE).splitlines() if re.match(r" {2}(\w.*)? {4}", line))
    assert {f"configs/dit/{name}.yaml": row for name, *row in zip(names, full, tuned, strict=True)} == {
        file: [full_fid, tuned_fid] for file, (full_fid, tuned_fid, _) in TRANSFERS.items()
    }


@pytest.mark.parametrize("file", OVERLAYS)
def test_overlays_set_only_what_differs(file: str) -> None:
    base, overlay = leaves(settings(BASE)), leaves(settings(file))
    assert not {path for path, value in overlay.items() if path in base and base[path] == value}
    assert overlay.keys() - base.keys(), "an overlay adds the target"
    written = [line for line in (CONFIGS.parent / file).read_text().splitlines() if not line.startswith("#")]
    assert len(written) <= 25
    # What a run writes for one target stays apart from another's; the memory bank is shared.
    name = Path(file).stem
    assert overlay[".trainer.default_root_dir"] == f"runs/dit/{name}"
    assert overlay[".data.init_args.latent_cache"] == f"runs/dit/{name}/latents"


def test_base_has_the_settings_of_the_paper() -> None:
    cli = instantiate("configs/dit/flowers.yaml")
    trainer, data, module = cli.trainer, cli.datamodule, cli.model
    module.configure_model()  # the samplers' schedulers are made for the model
    assert (trainer.max_steps, trainer.val_check_interval, trainer.precision) == (24_000, 24_000, "32-true")
    assert (data.batch_size, data.retention_batch_size, data.horizontal_flip) == (32, 6, True)
    assert (data.target.image_size, data.bank_size, data.reference) == (256, 50_000, "val")
    (group,) = module.optimizer([nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0)
    assert module.lr_scheduler is None
    assert settings(BASE)["model"]["init_args"]["model"] == "facebook/DiT-XL-2-256"
    assert module.autoencoder.scaling_factor == 0.18215
    for sampler in (module.sampler, module.bank_sampler):
        sampler.scheduler.set_timesteps(sampler.num_inference_steps)
        assert sampler.scheduler.timesteps.tolist() == list(range(980, -1, -20))
        assert (sampler.guidance_scale, sampler.guidance_channels) == (1.5, 3)
    callbacks = {type(callback): callback for callback in trainer.callbacks}
    assert callbacks[EMA].decay == 0.9999
    assert callbacks[FID].num_samples == 10_000
    assert callbacks[FID].monitor == "fid"
    assert SampleGrid in callbacks


def test_presets_are_what_they_are_called() -> None:
    described = {file: describe_preset(cli.model, cli.datamodule) for file in FILES for cli in [instantiate(file)]}
    assert described.pop("configs/presets/full.yaml").startswith("Preset: standard fine-tuning")
    assert described.pop("configs/presets/paper.yaml").startswith("Preset: paper-literal.")
    assert described.pop(SELF_TEACHER).startswith(
        "Preset: custom; nearest is official code, with retention weight = 1.0, schedule = "
        "MirroredPowerSchedule(tau=0.3), retention target = OnlineTeacher(), bank = the target's own pictures. "
    )
    flow = described.pop("configs/presets/flow_matching.yaml")
    assert "loss = velocity_mse_loss" in flow
    assert "schedule = PowerSchedule(tau=1)" in flow
    assert "schedule = MeasuredSchedule(schedule.json)" in described.pop(MEASURED)
    assert "with schedule = MirroredPowerSchedule(tau=0.3). " in described.pop(SMALL_TAU)
    for name, change in ABLATIONS.items():
        text = described.pop(f"configs/ablations/{name}.yaml")
        assert text.startswith(f"Preset: custom; nearest is official code, with {change}. "), text
    assert all(text.startswith("Preset: official code.") for text in described.values()), described


KEYS = {  # what docs/configs.md has in place of a file, and what a run with each says that it changes
    "weighting lightning_difftune.weightings.P2Weighting": "loss weighting = P2Weighting(k=1, gamma=1)",
    "weighting lightning_difftune.weightings.MinSNRWeighting": "loss weighting = MinSNRWeighting(gamma=5)",
    "retention_target lightning_difftune.retention_targets.StoredPredictions": (
        "retention target = StoredPredictions(seed=0)"
    ),
}


@pytest.mark.parametrize("keys", KEYS)
def test_keys_do_what_a_file_would(keys: str) -> None:
    option = f"--model.objective.{keys}"
    assert option in (CONFIGS.parent / "docs/configs.md").read_text()
    cli = run_lightning([*composition("configs/presets/official.yaml"), *option.split(), *tiny(BASE)], run=False)
    text = describe_preset(cli.model, cli.datamodule)
    assert text.startswith(f"Preset: custom; nearest is official code, with {KEYS[keys]}. "), text


def test_the_measured_preset_reads_what_its_first_command_writes() -> None:
    first, _ = commands(MEASURED)
    cli = run_lightning([*first[1:], *tiny(BASE)], run=False)
    (meter,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, ForgettingMeter))
    assert describe_preset(cli.model, cli.datamodule).startswith("Preset: standard fine-tuning")
    schedule = instantiate(MEASURED).model.objective.schedule  # by the second command
    assert schedule.path == Path(meter.dirpath) / "schedule.json"


def test_a_small_tau_keeps_the_schedule_of_the_preset_before_it() -> None:
    args = [*composition("configs/presets/paper.yaml"), "--config", SMALL_TAU, *tiny(BASE)]
    cli = run_lightning(args, run=False)
    assert active_settings(cli.model, cli.datamodule) == replace(PAPER, schedule="PowerSchedule(tau=0.3)")


def test_domain_guidance_is_of_the_samples_and_not_of_the_bank() -> None:
    base, guided = (
        run_lightning([*composition(file), *tiny(BASE)], run=False).model for file in (BASE, DOMAIN_GUIDANCE)
    )
    assert guided.sampler == replace(base.sampler, domain_guidance=True)
    assert guided.bank_sampler == base.bank_sampler


def test_paper_and_official_preset_undo_each_other() -> None:
    paper = instantiate("configs/presets/paper.yaml")
    assert active_settings(paper.model, paper.datamodule) == PAPER
    assert paper.model.bank_sampler.guidance_channels == 3, "the bank is shared"
    assert type(paper.model.optimizer([nn.Parameter(torch.zeros(1))])) is torch.optim.Adam
    args = [*composition("configs/presets/paper.yaml"), "--config", "configs/presets/official.yaml", *tiny(BASE)]
    official = run_lightning(args, run=False)
    assert active_settings(official.model, official.datamodule) == OFFICIAL
    optimizer = official.model.optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 0)


def test_print_config_shows_the_composed_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_lightning([*arguments("configs/presets/paper.yaml"), "--trainer.max_steps", "5", "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == 5
    assert printed["trainer"]["default_root_dir"] == "runs/dit/flowers"
    assert printed["model"]["init_args"]["label_table"] == "resize"
    assert printed["model"]["init_args"]["autoencoder"]["init_args"]["source"] == "stabilityai/sd-vae-ft-ema"
    assert printed["data"]["init_args"]["retention_share"] == 0.5


class TinyFeatures(nn.Module):
    """In place of Inception-v3, whose weights are on the internet."""

    name = "tiny"
    num_features = 4

    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :4]


@pytest.mark.parametrize(
    "file",
    [
        *("configs/dit/flowers.yaml", "configs/presets/paper.yaml", "configs/presets/flow_matching.yaml"),
        *(MEASURED, SMALL_TAU),
        *(f"configs/ablations/{name}.yaml" for name in ABLATIONS if name != "reconsolidation_only"),  # has no bank
    ],
)
def test_two_steps_of_training(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_difftune.callbacks.fid.InceptionV3Features", TinyFeatures)
    smaller = smaller_callbacks(
        BASE,
        tmp_path,
        FID={"num_samples": 8, "cache_dir": str(tmp_path / "fid")},
        SampleGrid={"num_samples": 4},
        ModelCheckpoint={"every_n_train_steps": 2, "save_last": "link"},
    )
    few = f"""
        --config {smaller} --trainer.max_steps 2 --trainer.val_check_interval 2
        --trainer.default_root_dir {tmp_path / "run"} --trainer.enable_progress_bar false
        --data.init_args.bank {tmp_path / "bank"} --data.init_args.bank_size 8 --data.init_args.num_workers 0
        --data.init_args.latent_cache {tmp_path / "latents"} --data.init_args.image_size 64
        --model.init_args.sampler.num_inference_steps 4 --model.init_args.bank_sampler.num_inference_steps 4
    """
    cli = run_lightning([*arguments(file), *tiny(file), *few.split()])

    assert cli.trainer.global_step == 2
    logged = cli.trainer.callback_metrics
    assert {"train/loss", "train/reconsolidation", "train/retention", "val/loss", "fd_tiny"} <= logged.keys()
    assert all(value.isfinite() for value in logged.values())
    assert len(MemoryBank(tmp_path / "bank")) == 8
    (run,) = (tmp_path / "run/lightning_logs").iterdir()
    assert (run / "checkpoints/last.ckpt").is_file()
    assert (run / "samples/step-0000002.png").is_file()
    assert (run / "config.yaml").is_file()


def test_xl_2_has_the_label_tables_of_both_presets() -> None:
    with torch.device("meta"):
        model = DiT.from_size("DiT-XL/2")
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    assert model.y_embedder.embedding_table.weight.shape == (1001, 1152)
    with torch.device("meta"):
        model.resize_label_table(101)
    assert model.y_embedder.embedding_table.weight.shape == (102, 1152)
    trained = sum(p.numel() for name, p in model.named_parameters() if name != "pos_embed")
    assert trained == 673_799_072  # all but pos_embed, as in Table 1
    with torch.device("meta"):
        output = model(torch.zeros(2, 4, 32, 32), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 101]))
    assert output.shape == (2, 8, 32, 32)
