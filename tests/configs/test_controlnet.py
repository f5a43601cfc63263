"""The ControlNet configs, with and without Diff-Tuning, on tiny data, a tiny pipeline and tiny annotators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from config_files import arguments, composition, files_of, header, leaves, settings, smaller_callbacks
from PIL import Image
from tiny_data import Scenes, accept_flowers, make_ade20k, make_captioned_folder, make_coco, make_flowers
from torch import nn

from lightning_difftune import ControlNetDiffTuningModule, MemoryBank, PowerSchedule
from lightning_difftune.callbacks import ControlSimilarity, SuddenConvergence
from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.data.annotators import HED
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.losses import eps_mse_loss

BASE = "configs/controlnet/base.yaml"
FLOWERS = "configs/controlnet/flowers.yaml"
FOLDER = "configs/controlnet/folder.yaml"
FULL = ["--config", "configs/presets/full.yaml"]


class Task(NamedTuple):
    """A row of Tables 2 to 4, and the annotator's channels."""

    controlnet: str  # steps until sudden convergence
    diff_tuning: str
    metric: str  # in base.yaml's table
    monitor: str
    mode: str
    threshold: float
    steps: int
    channels: int
    annotator: str = ""  # the tiny network on disk


TASKS = {
    "edge": Task("6,700", "5,300", "SSIM", "control/ssim", "max", 0.55, 15_000, 1),
    "sketch": Task("3,800", "3,200", "SSIM", "control/ssim", "max", 0.75, 5_000, 1, "hed"),
    "depth": Task("9,900", "8,800", "MSE", "control/mse", "min", 0.04, 15_000, 1, "dpt"),
    "normal": Task("10,300", "7,800", "MSE", "control/mse", "min", 0.06, 15_000, 3, "dpt"),
    "seg_coco": Task("9,200", "6,300", "accuracy", "control/pixel_accuracy", "max", 0.5, 15_000, 3, "upernet"),
    "seg_ade20k": Task("13,900", "8,300", "accuracy", "control/pixel_accuracy", "max", 0.4, 20_000, 3, "upernet"),
}
FILES = {f"configs/controlnet/{name}.yaml": task for name, task in TASKS.items()}
RUNS = [*FILES, FLOWERS]


def make_annotators(folder: Path) -> None:
    """Networks of the published classes, random and small (HED has one size), as files and folders."""
    torch.manual_seed(0)
    (folder / "hed").mkdir()
    torch.save(HED().state_dict(), folder / "hed/ControlNetHED.pth")
    dpt = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    transformers.DPTForDepthEstimation(dpt).save_pretrained(folder / "dpt")
    stages = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": [f"stage{i}" for i in range(1, 5)]}
    upernet = transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(**stages),
        hidden_size=8,
        num_labels=150,
        auxiliary_in_channels=8,
        auxiliary_channels=8,
    )
    transformers.UperNetForSemanticSegmentation(upernet).save_pretrained(folder / "upernet")


@pytest.fixture(scope="module", autouse=True)
def ingredients(workplace: Path, pipeline_folder: str) -> Iterator[None]:
    """Every data set where its config looks for it, the pipeline and the annotators' networks."""
    for make in (make_coco, make_ade20k, make_flowers):
        make(workplace / "data", Scenes())
    make_captioned_folder(workplace / "data")
    make_annotators(workplace)
    (workplace / "pipeline").symlink_to(pipeline_folder)
    with pytest.MonkeyPatch.context() as patch:
        accept_flowers(workplace / "data", patch)
        yield


def tiny(file: str) -> list[str]:
    """Command-line settings that put the tiny networks into a run of ``file``'s command, at 32 px."""
    task = FILES.get(file)
    source = [f"--model.init_args.annotator.init_args.source={task.annotator}"] if task and task.annotator else []
    return ["--model.init_args.model=pipeline", "--trainer.accelerator=cpu", *source]


def test_base_lists_tables_2_and_4() -> None:
    lines = header(BASE).splitlines()
    start = next(number for number, line in enumerate(lines) if line.split() == list(TASKS))
    rows = [line.replace("> ", ">").replace("< ", "<").split()[-len(TASKS) :] for line in lines[start + 1 : start + 5]]
    expected = [
        (task.controlnet, task.diff_tuning, task.metric, f"{'>' if task.mode == 'max' else '<'}{task.threshold:g}")
        for task in TASKS.values()
    ]
    assert list(zip(*rows, strict=True)) == expected


@pytest.mark.parametrize("file", FILES)
def test_header_quotes_tables_2_to_4(file: str) -> None:
    task, text = FILES[file], " ".join(header(file).split())
    assert f"{'above' if task.mode == 'max' else 'below'} {task.threshold:g}" in text
    assert f": ControlNet {task.controlnet}, Diff-Tuning {task.diff_tuning}." in text
    assert (f"trains this task for {task.steps:,} steps" in text) == (task.steps != 15_000)


@pytest.mark.parametrize("file", FILES)
def test_tasks_set_only_what_differs(file: str) -> None:
    base, overlay = leaves(settings(BASE)), leaves(settings(file))
    assert not {path for path, value in overlay.items() if path in base and base[path] == value}
    # Banks and caches hold control maps, so no two tasks can share one.
    folder = f"runs/controlnet/{Path(file).stem}"
    assert overlay[".trainer.default_root_dir"] == folder
    assert (overlay[".data.init_args.bank"], overlay[".data.init_args.latent_cache"]) == (
        f"{folder}/bank",
        f"{folder}/cache",
    )


@pytest.mark.parametrize("file", files_of("controlnet"))
def test_every_file_is_instantiated_by_its_own_command(file: str) -> None:
    cli = run_lightning([*composition(file), *tiny(file)], run=False)
    trainer, data, module = cli.trainer, cli.datamodule, cli.model
    assert isinstance(module, ControlNetDiffTuningModule)
    assert module.image_size == data.target.image_size == (32 if file == FLOWERS else 512), "set once, for both"
    assert module.seed == data.seed == 0
    assert data.retention_batch_size >= 1
    (similarity,) = [callback for callback in trainer.callbacks if isinstance(callback, ControlSimilarity)]
    (sudden,) = [callback for callback in trainer.callbacks if isinstance(callback, SuddenConvergence)]
    assert sudden.monitor == similarity.monitor
    assert trainer.max_steps % trainer.val_check_interval == 0, "the last step is validated"
    if file == FLOWERS:
        assert sudden.threshold == 0.4, "one of its own: the paper's are for 512 px"
        return
    task = FILES.get(file, TASKS["edge"])  # base.yaml's command has the edge task, and so has folder.yaml's
    if file == FOLDER:
        held_out = set(data.val_target.source.indices)
        assert not held_out & set(data.target.source.indices), "nothing of COCO is left"
    assert (sudden.monitor, sudden.threshold, sudden.mode) == (task.monitor, task.threshold, task.mode)
    assert module.annotator.channels == task.channels
    assert (trainer.max_steps, trainer.val_check_interval, data.batch_size) == (task.steps, 100, 4)
    optimizer = module.optimizer([nn.Parameter(torch.zeros(1))])
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.Adam, 1e-5)
    assert (module.sampler.num_inference_steps, module.sampler.guidance_scale) == (20, 7.5)


@pytest.mark.parametrize("overlay", [[], FULL], ids=["diff-tuning", "full"])
@pytest.mark.parametrize("file", RUNS)
def test_two_steps_of_training(file: str, overlay: list[str], tmp_path: Path) -> None:
    similarity = {"num_samples": 2, "batch_size": 2}
    smaller = smaller_callbacks(file, tmp_path, ControlSimilarity=similarity)
    few = f"""
        --config {smaller} --trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.num_sanity_val_steps 0
        --trainer.default_root_dir {tmp_path} --trainer.logger true --trainer.log_every_n_steps 1
        --trainer.enable_progress_bar false --trainer.enable_model_summary false
        --data.init_args.image_size 32 --data.init_args.num_workers 0
        --data.init_args.bank_size 4 --data.init_args.build_batch_size 4
        --model.init_args.sampler.num_inference_steps 2 --model.init_args.bank_sampler.num_inference_steps 2
    """
    if not overlay:
        few += f"--data.init_args.bank {tmp_path / 'bank'}"
    cli = run_lightning([*arguments(file), *overlay, *tiny(file), *few.split()])

    assert cli.trainer.global_step == 2
    logged = cli.trainer.callback_metrics
    monitor = FILES[file].monitor if file in FILES else "control/ssim"
    assert {"train/loss", "val/loss", monitor, "control/time_share"} <= logged.keys()
    assert ("train/retention" in logged) == (not overlay)
    assert all(value.isfinite() for value in logged.values())
    (sudden,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, SuddenConvergence)]
    assert [step for step, _ in sudden.history] == [2]

    objective = cli.model.objective
    assert objective.loss is eps_mse_loss, "an overlay keeps what it does not name"
    betas = GaussianDiffusion(1000, 0.00085, 0.012, "scaled_linear").sqrt_alphas_cumprod
    assert torch.equal(objective.diffusion.sqrt_alphas_cumprod.cpu(), betas)
    if overlay:
        assert objective.schedule.tau == 0
        assert isinstance(objective.schedule, PowerSchedule)
        assert cli.datamodule.bank_path is None
    else:
        assert len(MemoryBank(tmp_path / "bank")) == 4
    moved = cli.model.controlnet.controlnet_mid_block.weight
    assert moved.abs().max() > 0, "zero at first"

    (run,) = (tmp_path / "lightning_logs").iterdir()
    with Image.open(run / "control/step-0000002.png") as grid:
        assert grid.size == (130 + 2 * 98 + 2, 3 * 98 + 2), "control, picture and its own map, of two examples"
    assert (run / "config.yaml").is_file()
