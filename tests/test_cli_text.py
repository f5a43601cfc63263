"""The command line's messages about mistakes with captions, control maps and pipelines."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image

from lightning_difftune.cli import main

FIT = ("fit", "--config", "run.yaml")
MODEL, DATA = "--model.init_args.", "--data.init_args."
CONTROLNET = (
    *("--model", "lightning_difftune.ControlNetDiffTuningModule", f"{MODEL}model", "pipeline"),
    *(f"{MODEL}annotator", "lightning_difftune.data.annotators.Canny"),
)


@pytest.fixture
def project(tmp_path: Path, pipeline_folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline, captioned pictures and a config, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline").symlink_to(pipeline_folder)
    pictures = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    rows = []
    for number, pixels in enumerate(pictures):
        folder = tmp_path / "captioned" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"file_name": f"{folder.name}/{number}.png", "text": f"a photo of a {folder.name}"})
    write_rows(tmp_path, rows)
    folder = {"class_path": "lightning_difftune.data.CaptionedFolder", "init_args": {"root": "captioned"}}
    config = {
        "model": {
            "class_path": "lightning_difftune.TextToImageDiffTuningModule",
            "init_args": {"model": "pipeline"},
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {"target": folder, "image_size": 16, "bank": None, "batch_size": 4},
        },
        "trainer": {
            "max_steps": 1,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": "run",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def write_rows(project: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (project / "captioned/metadata.jsonl").write_text(lines)


def rows_of(project: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project / "captioned/metadata.jsonl").read_text().splitlines()]


@pytest.fixture
def refused(project: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a command that must fail with a reason."""

    def run(args: list[str], message: str) -> None:
        capsys.readouterr()
        status = main([*FIT, *args])
        captured = capsys.readouterr()
        assert status == 2, captured.out
        assert "Traceback" not in captured.out + captured.err
        said = captured.err[captured.err.index("difftune: ") :]
        assert re.search(message, said, re.DOTALL), said

    return run


def test_annotator_weights_that_cannot_be_reached(
    project: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(project / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(
        [*CONTROLNET[:-1], "lightning_difftune.data.annotators.MidasDepth"],
        r"MidasDepth has no weights for its network from 'Intel/dpt-hybrid-midas'.*cannot be reached.*"
        r"Pass what you have as MidasDepth\(source=\.\.\.\)",
    )


def test_control_maps_of_other_channels_than_the_annotators(project: Path, refused: Callable[..., None]) -> None:
    write_rows(project, [{**row, "conditioning_image": row["file_name"]} for row in rows_of(project)])
    refused([*CONTROLNET], r"The target has control maps torch.uint8 \(4, 3, 16, 16\).*takes uint8 \(B, 1, H, W\)")


def test_a_line_of_metadata_that_cannot_be_used(project: Path, refused: Callable[..., None]) -> None:
    rows = rows_of(project)
    del rows[2]["text"]
    write_rows(project, rows)
    refused([], r"captioned/metadata.jsonl, line 3: text is None, expected a string; keys: \['file_name'\]")
    (project / "captioned/metadata.jsonl").write_text('{"file_name": "cat/0.png", "text": "a cat"\n')
    refused([], r"captioned/metadata.jsonl, line 1: not JSON")


def test_labels_where_captions_belong(refused: Callable[..., None]) -> None:
    labelled = [f"{DATA}target", "lightning_difftune.data.ImageFolder", f"{DATA}target.init_args.root", "captioned"]
    refused(labelled, r"num_classes is not set.*for a model of text, make captions .*ClassCaptions")
    refused(
        [*labelled, f"{DATA}num_classes", "2"],
        r"TextToImageDiffTuningModule needs captions, and the target has none.*ClassCaptions",
    )


def test_a_pipeline_without_its_text_encoder(project: Path, pipeline_folder: str, refused: Callable[..., None]) -> None:
    shutil.copytree(pipeline_folder, project / "lacking", ignore=shutil.ignore_patterns("text_encoder"))
    refused(
        [f"{MODEL}model", "lacking"],
        r"lacking has no tokenizer and text_encoder that .*It must be the folder of a Stable Diffusion pipeline",
    )


def test_a_share_that_leaves_no_sample_of_the_bank(refused: Callable[..., None]) -> None:
    refused(
        [f"{DATA}bank", "bank", f"{DATA}retention_share", "0.2"],
        r"int\(0.2 \* 4\) = 0 bank samples in a batch of 4. Raise one of them, or set bank: null",
    )


def test_a_lora_is_exported_for_diffusers_pipelines(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionPipeline

    config = yaml.safe_load((project / "run.yaml").read_text())
    config["model"]["init_args"]["tuner"] = {
        "class_path": "lightning_difftune.tuners.LoRA",
        "init_args": {"rank": 2, "alpha": 6, "target_modules": ["to_q", "to_v"]},
    }
    config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}
    config["trainer"]["enable_checkpointing"] = True
    (project / "run.yaml").write_text(yaml.safe_dump(config))
    main([*FIT, "--trainer.max_steps", "2"])
    main(["export", "run", "--output", "lora", "--format", "diffusers"])
    assert "kept as an adapter for diffusers" in capsys.readouterr().out
    assert sorted(file.name for file in (project / "lora").iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "pytorch_lora_weights.safetensors",
    ]
    main(["export", "run", "--output", "merged"])
    pipeline: Any = StableDiffusionPipeline.from_pretrained("pipeline")
    pipeline.load_lora_weights("lora")
    merged = type(pipeline.unet).from_pretrained("merged")
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 16), torch.tensor([3, 900])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(x, t, text).sample, merged(x, t, text).sample, rtol=1e-5, atol=1e-5)
