"""Every tuner in a real fit of DiTDiffTuningModule, and in the YAML of the command line."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import tiny_weights

from lightning_difftune import DiTDiffTuningModule, MemoryBankDataModule
from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import CheckpointError
from lightning_difftune.protocols import Tuner
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import AdaptFormer, BitFit, DiffFit, LoRA, VPTDeep

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
TUNERS = [BitFit(), DiffFit(), LoRA(rank=2), AdaptFormer(bottleneck=4), VPTDeep(blocks=(0,))]
IDS = [type(tuner).__name__ for tuner in TUNERS]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("weights"), depth=2)


def fit(folder: Path, weights: Path, tuner: Tuner, steps: int, ckpt_path: Path | None = None) -> DiTDiffTuningModule:
    rng = np.random.default_rng(0)
    pictures = ArrayImages(rng.integers(0, 256, (12, 8, 8), dtype=np.uint8), np.arange(12) % 3)
    data = MemoryBankDataModule(
        pictures, 3, image_size=8, channels=1, bank=folder.parent / "bank", bank_size=6, batch_size=5
    )
    L.seed_everything(0)  # LoRA's and the adapters' first layers start at random
    module = DiTDiffTuningModule(
        str(weights), num_classes=3, label_table="resize", tuner=tuner, sampler=Sampler(num_inference_steps=2)
    )
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    return module


@pytest.mark.parametrize("tuner", TUNERS, ids=IDS)
def test_fit_changes_the_trained_parameters_alone_and_resumes(tuner: Tuner, weights: Path, tmp_path: Path) -> None:
    L.seed_everything(0)
    start = DiTDiffTuningModule(str(weights), num_classes=3, label_table="resize", tuner=tuner)
    start.configure_model()
    before = start.state_dict()
    module = fit(tmp_path / "run", weights, tuner, 3)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained

    content = torch.load(tmp_path / "run/step=2.ckpt", weights_only=True)
    assert set(content["state_dict"]) == trained
    resumed = fit(tmp_path / "resumed", weights, tuner, 3, ckpt_path=tmp_path / "run/step=2.ckpt")
    for name, tensor in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        (BitFit(), DiffFit(), r"tuner BitFit\(\), and the tuner here is DiffFit\("),
        (LoRA(2, alpha=2), LoRA(2, alpha=8), r"LoRA\(alpha=2, .*LoRA\(alpha=8, "),
        (AdaptFormer(4), AdaptFormer(4, scale=1.0), r"scale=0\.1\).*scale=1\.0\)"),
    ],
)
def test_a_checkpoint_of_another_tuner_is_refused(
    saved: Tuner, other: Tuner, message: str, weights: Path, tmp_path: Path
) -> None:
    fit(tmp_path / "run", weights, saved, 1)
    with pytest.raises(CheckpointError, match=message):
        fit(tmp_path / "other", weights, other, 2, ckpt_path=tmp_path / "run/step=1.ckpt")
    with pytest.raises(CheckpointError, match=message):
        DiTDiffTuningModule.load_from_checkpoint(tmp_path / "run/step=1.ckpt", tuner=other)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("BitFit", {}),
        ("DiffFit --model.init_args.tuner.init_args.num_blocks 2", {"num_blocks": 2}),
        ("DiffFit --model.init_args.tuner.init_args.sites [attn,mlp]", {"sites": ("attn", "mlp"), "num_blocks": None}),
        ("LoRA --model.init_args.tuner.init_args.rank 4", {"rank": 4, "alpha": 4, "target_modules": ("q", "v")}),
        ("AdaptFormer --model.init_args.tuner.init_args.scale 0.5", {"bottleneck": 64, "scale": 0.5}),
        ("VPTDeep --model.init_args.tuner.init_args.blocks [0,2]", {"blocks": (0, 2), "num_tokens": 1}),
    ],
)
def test_tuners_are_chosen_on_the_command_line(arguments: str, expected: dict[str, object]) -> None:
    name, *rest = arguments.split()
    options = ["--config", str(QUICKSTART), "--model.init_args.tuner", f"lightning_difftune.tuners.{name}", *rest]
    module = run_lightning([*options, "--trainer.accelerator", "cpu", "--trainer.logger", "false"], run=False).model
    assert type(module.tuner).__name__ == name
    assert {key: getattr(module.tuner, key) for key in expected} == expected
