"""Common uses of any Lightning module work with these modules."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from tiny import quiet_trainer, tiny_pictures, tiny_weights, write_pictures
from torch.utils.data import DataLoader

from lightning_difftune import (
    DiffTuningModule,
    DiffTuningObjective,
    DiTDiffTuningModule,
    MemoryBankDataModule,
    PowerSchedule,
)
from lightning_difftune.callbacks import EMA
from lightning_difftune.callbacks.ema import averages_in
from lightning_difftune.cli import main
from lightning_difftune.cli.lightning import run_lightning
from lightning_difftune.diffusion import RectifiedFlow
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.losses import velocity_mse_loss
from lightning_difftune.models import export_dit, load_dit
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import LoRA


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_weights(tmp_path_factory.mktemp("weights"))


def data_module(**settings):
    options = {"num_classes": 3, "image_size": 8, "channels": 1, "batch_size": 4, "val_target": tiny_pictures()}
    return MemoryBankDataModule(tiny_pictures(), **{**options, **settings})


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a config, as the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_weights(tmp_path)
    write_pictures(tmp_path / "pictures")
    pictures = {"class_path": "lightning_difftune.data.ImageFolder", "init_args": {"root": "pictures"}}
    checkpoints = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    config = {
        "seed_everything": 7,
        "model": {
            "class_path": "lightning_difftune.DiTDiffTuningModule",
            "init_args": {"model": "tiny.safetensors", "sampler": {"num_inference_steps": 2}, "label_dropout": 0.3},
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {"target": pictures, "val_target": pictures, "num_classes": 3, "image_size": 8, "channels": 1}
            | {"batch_size": 4},
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "default_root_dir": "run", "enable_progress_bar": False}
        | {"val_check_interval": 1, "check_val_every_n_epoch": None, "enable_model_summary": False}
        | {"callbacks": [checkpoints | {"init_args": {"dirpath": "run", "filename": "done", "save_last": False}}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


# -- load_from_checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DiTDiffTuningModule, DiffTuningModule])
def test_a_run_of_the_command_line_is_loaded_without_arguments(project, kind):
    assert main(["fit", "--config", "run.yaml"]) == 0
    module = kind.load_from_checkpoint("run/done.ckpt")
    saved = torch.load("run/done.ckpt", weights_only=True)["state_dict"]
    assert (type(module), module.num_classes, module.label_dropout, module.seed) == (DiTDiffTuningModule, 3, 0.3, 7)
    assert module.sampler.num_inference_steps == 2
    assert all(torch.equal(module.state_dict()[name], value) for name, value in saved.items())
    other = kind.load_from_checkpoint("run/done.ckpt", label_dropout=0.5, objective=DiffTuningObjective())
    assert other.label_dropout == 0.5


def test_a_run_from_python_is_loaded_by_its_plain_values(weights, tmp_path):
    module = DiTDiffTuningModule(str(weights), num_classes=3, label_dropout=0.3)
    trainer = quiet_trainer(tmp_path, 1)
    trainer.fit(module, data_module())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = DiTDiffTuningModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert (again.label_dropout, again.num_classes) == (0.3, 3)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_checkpoint_with_averages_says_that_the_raw_weights_are_loaded(weights, tmp_path, caplog):
    module, ema = DiTDiffTuningModule(str(weights), num_classes=3), EMA(decay=0.5)
    trainer = quiet_trainer(tmp_path, 2, ema)
    trainer.fit(module, data_module())
    trainer.save_checkpoint(path := tmp_path / "run.ckpt")
    with caplog.at_level("INFO"):
        again = DiTDiffTuningModule.load_from_checkpoint(path)
    assert f"averages_in(torch.load({str(path)!r})).average_parameters(module)" in caplog.text
    assert torch.equal(again.dit.blocks[0].mlp.fc1.weight, module.dit.blocks[0].mlp.fc1.weight)
    with averages_in(torch.load(path)).average_parameters(again), ema.average_parameters(module):
        assert torch.equal(again.dit.blocks[0].mlp.fc1.weight, module.dit.blocks[0].mlp.fc1.weight)


def test_objects_that_a_module_was_made_with_are_asked_for_by_name(weights, tmp_path):
    options = {"sampler": Sampler(num_inference_steps=3), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    trainer = quiet_trainer(tmp_path, 1)
    trainer.fit(DiTDiffTuningModule(weights, num_classes=3, **options), data_module())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ConfigError, match=r"load_from_checkpoint\(path, optimizer=..., sampler=...\)"):
        DiTDiffTuningModule.load_from_checkpoint(tmp_path / "run.ckpt")
    again = DiTDiffTuningModule.load_from_checkpoint(tmp_path / "run.ckpt", **options)
    assert again.sampler.num_inference_steps == 3
    with pytest.warns(UserWarning, match="was made with optimizer=... as objects, which are left at their defaults"):
        DiTDiffTuningModule.load_from_checkpoint(tmp_path / "run.ckpt", sampler=Sampler())


class WithHyperparameters(DiTDiffTuningModule):
    """A module of one's own as Lightning's pages write one."""

    def __init__(self, extra: float = 1.0, *rest, **options):
        super().__init__(*rest, **options)
        self.save_hyperparameters()


class DataWithHyperparameters(MemoryBankDataModule):
    def __init__(self, *rest, **options):
        super().__init__(*rest, **options)
        self.save_hyperparameters()


def test_hyperparameters_leave_a_checkpoint_that_opens(weights, tmp_path):
    made = {"label_dropout": 0.3, "objective": DiffTuningObjective(PowerSchedule(0.5))}
    module = WithHyperparameters(2.0, str(weights), 3, optimizer=partial(torch.optim.SGD, lr=0.1), **made)
    data = DataWithHyperparameters(tiny_pictures(), 3, 8, 1, batch_size=4)
    trainer = quiet_trainer(tmp_path, 1)
    trainer.fit(module, data)
    trainer.save_checkpoint(path := tmp_path / "run.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"]["extra"] == 2.0
    assert saved["datamodule_hyper_parameters"]["batch_size"] == 4
    assert {"objective", "optimizer"}.isdisjoint(saved["hyper_parameters"])
    again = WithHyperparameters.load_from_checkpoint(path, objective=made["objective"])
    assert (again.num_classes, again.label_dropout, again.hparams["extra"]) == (3, 0.3, 2.0)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in again.state_dict().items())
    quiet_trainer(tmp_path, 2).fit(module, data, ckpt_path=path)


def test_numbers_of_numpy_are_those_of_python(weights, tmp_path):
    """As ``labels.max() + 1`` is one: in checkpoints, stores, identities and seeds."""

    def run(folder, whole, real):
        torch.manual_seed(0)  # of the first factors of LoRA
        options = {"num_classes": whole(3), "seed": whole(3), "label_dropout": real(0.25), "tuner": LoRA(whole(2))}
        module = DiTDiffTuningModule(str(weights), **options)
        sizes = {"bank_size": whole(6), "batch_size": whole(4), "retention_share": real(0.25), "seed": whole(1)}
        data = data_module(bank=folder / "bank", num_classes=whole(3), image_size=whole(8), **sizes)
        trainer = quiet_trainer(folder, 2, EMA(decay=real(0.5)))
        trainer.fit(module, data)
        trainer.save_checkpoint(folder / "run.ckpt")
        return torch.load(folder / "run.ckpt", weights_only=True), (folder / "bank/manifest.json").read_bytes()

    (plain, bank), (numpy, other) = run(tmp_path / "a", int, float), run(tmp_path / "b", np.int64, np.float64)
    assert bank == other
    for key in ("arguments", "tuner", "MemoryBankDataModule"):
        assert plain[key] == numpy[key]
    assert all(torch.equal(value, numpy["state_dict"][name]) for name, value in plain["state_dict"].items())


class Keeps(L.Callback):
    """A callback whose state is an array."""

    state = None

    def state_dict(self):
        return {"seen": np.arange(3)}

    def load_state_dict(self, state_dict):
        self.state = state_dict


def test_a_state_that_only_trusted_code_opens_is_said_when_it_is_saved(weights, tmp_path):
    def fit(steps, *callbacks, **settings):
        trainer = quiet_trainer(tmp_path, steps, *callbacks)
        trainer.fit(DiTDiffTuningModule(str(weights), num_classes=3), data_module(), **settings)
        return trainer

    path = tmp_path / "run.ckpt"
    trainer = fit(1, Keeps())
    with pytest.warns(UserWarning, match=r"Checkpoints of this run hold numpy.*resuming needs weights_only=False"):
        trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"holds numpy.*may run code. If you trust the file, pass weights_only"):
        fit(2, Keeps(), ckpt_path=path)
    fit(2, again := Keeps(), ckpt_path=path, weights_only=False)
    assert again.state["seen"].tolist() == [0, 1, 2]


def test_a_checkpoint_from_elsewhere_runs_no_code(project):
    assert main(["fit", "--config", "run.yaml"]) == 0
    content = torch.load("run/done.ckpt", weights_only=True)
    settings = yaml.safe_load(content["config"])
    settings["model"]["init_args"]["optimizer"] = {"class_path": "os.system", "init_args": {"command": "touch ran"}}
    torch.save({**content, "config": yaml.safe_dump(settings)}, "sent.ckpt")
    with pytest.raises(ConfigError, match=r"sent.ckpt names os\.system"):
        DiTDiffTuningModule.load_from_checkpoint("sent.ckpt")
    assert not Path("ran").exists()
    data = bytearray(Path("run/done.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    Path("damaged.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged\.ckpt"):
        DiTDiffTuningModule.load_from_checkpoint("damaged.ckpt")


# -- the trainer ------------------------------------------------------------------------------------------------------


def test_the_trainer_tests(weights, tmp_path):
    module, data = DiTDiffTuningModule(str(weights), num_classes=3), data_module()
    trainer = quiet_trainer(tmp_path, 1)
    (tested,) = trainer.test(module, data, verbose=False)
    (validated,) = trainer.validate(module, data, verbose=False)
    assert tested["test/loss"] == pytest.approx(validated["val/loss"])


def test_a_fit_may_follow_a_validation_and_one_that_was_interrupted(weights, tmp_path):
    """They leave tensors of inference mode, and sums of a part of the data."""
    module, data = DiTDiffTuningModule(str(weights), num_classes=3), data_module()
    trainer = quiet_trainer(tmp_path, 1, val_check_interval=1, check_val_every_n_epoch=None)
    (before,) = trainer.validate(module, data, verbose=False)
    with torch.inference_mode():
        module.val_loss.update(100.0)
    (again,) = trainer.validate(module, data, verbose=False)
    assert again == before
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/loss"].isfinite()


def test_a_module_that_was_built_in_inference_mode_is_trained(weights, tmp_path):
    module = DiTDiffTuningModule(str(weights), num_classes=3, sampler=Sampler(num_inference_steps=2))
    with torch.inference_mode():
        module.generate(torch.arange(1))
    assert not any(p.is_inference() for p in module.parameters())


def test_a_bank_is_made_before_a_fit(weights):
    module = DiTDiffTuningModule(str(weights), num_classes=3, bank_sampler=Sampler(num_inference_steps=2))
    assert module.bank_generator().generate_bank(torch.arange(2))["latents"].shape == (2, 1, 8, 8)


def test_what_was_loaded_is_exported_with_its_sampler(weights, tmp_path):
    """Without it, a velocity model would be read as a noise model."""
    objective = DiffTuningObjective(loss=velocity_mse_loss, diffusion=RectifiedFlow())
    trainer, module = quiet_trainer(tmp_path, 1), DiTDiffTuningModule(str(weights), num_classes=3, objective=objective)
    trainer.fit(module, data_module())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = DiTDiffTuningModule.load_from_checkpoint(tmp_path / "run.ckpt", objective=objective)
    export_dit(again.dit, tmp_path / "again.safetensors")
    assert load_dit(tmp_path / "again.safetensors").sampling["scheduler"] == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"ckpt_path": "run.ckpt"}])
def test_a_loader_that_was_made_outside_of_the_trainer_is_refused_where_it_would_be_wrong(weights, tmp_path, settings):
    module, data = DiTDiffTuningModule(str(weights), num_classes=3), data_module()
    trainer = quiet_trainer(tmp_path, 1)
    trainer.fit(module, data.train_dataloader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    path = tmp_path / settings.pop("ckpt_path") if "ckpt_path" in settings else None
    with pytest.raises(ConfigError, match=r"made outside of this trainer.*fit\(module, datamodule=data\)"):
        quiet_trainer(tmp_path, 2, **settings).fit(module, data_module().train_dataloader(), ckpt_path=path)


def test_two_validation_loaders(weights, tmp_path):
    module, data = DiTDiffTuningModule(str(weights), num_classes=3), data_module()
    loaders = [data.val_dataloader(), data_module(val_target=tiny_pictures(5)).val_dataloader()]
    trainer = quiet_trainer(tmp_path, 2, val_check_interval=1, check_val_every_n_epoch=None)
    trainer.fit(module, data.train_dataloader(), loaders)
    assert {"val/loss", "val/loss/1"} <= trainer.callback_metrics.keys()
    both = trainer.validate(module, loaders, verbose=False)
    (first,) = quiet_trainer(tmp_path, 1).validate(module, loaders[0], verbose=False)
    (second,) = quiet_trainer(tmp_path, 1).validate(module, loaders[1], verbose=False)
    assert {k: v for one in both for k, v in one.items()} == pytest.approx(
        {"val/loss": first["val/loss"], "val/loss/1": second["val/loss"]}
    )


class Weights(L.Callback):
    """The number of samples in the mean, after each batch."""

    def on_validation_epoch_start(self, trainer, pl_module):
        self.seen = []

    def on_validation_batch_end(self, trainer, pl_module, *rest):
        self.seen.append(float(pl_module.val_loss.weight))


def test_the_validation_loss_counts_samples_of_the_target_alone(weights, tmp_path):
    module, counted = DiTDiffTuningModule(str(weights), num_classes=3), Weights()
    batch = next(iter(data_module().train_dataloader()))
    few = {"target": {name: column[:1] for name, column in batch["target"].items()}}
    retained = {"retention": {"latents": torch.zeros(12, 1, 8, 8)}}
    quiet_trainer(tmp_path, 1, counted).validate(module, DataLoader([{**batch, **retained}, few], None), verbose=False)
    assert counted.seen == [4, 5]


def test_lr_find_with_its_defaults(weights, tmp_path):
    module, data = DiTDiffTuningModule(str(weights), num_classes=3), data_module()
    trainer = quiet_trainer(tmp_path, 200)
    found = Tuner(trainer).lr_find(module, data)
    assert len(found.results["lr"]) == 100
    assert module.learning_rate == pytest.approx(found.suggestion())
    trainer = quiet_trainer(tmp_path, 1)
    trainer.fit(module, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.learning_rate


def test_training_step_under_fabric(weights):
    fabric = L.Fabric(accelerator="cpu", devices=1)
    module = DiTDiffTuningModule(str(weights), num_classes=3)
    module.configure_model()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.trainable_parameters(), lr=1e-3))
    model.mark_forward_method("training_step")
    before = [p.detach().clone() for p in module.trainable_parameters()]
    for number, batch in zip(range(3), data_module().train_dataloader(), strict=False):
        loss = model.training_step(batch, number)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, module.trainable_parameters(), strict=True))


def test_plain_lightning_cli_with_an_optimizer(project, monkeypatch):
    config = yaml.safe_load((project / "run.yaml").read_text())
    del config["seed_everything"]
    config["model"]["init_args"]["num_classes"] = 3
    (project / "plain.yaml").write_text(yaml.safe_dump(config))
    args = ["fit", "--config", "plain.yaml", "--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.01"]
    monkeypatch.setattr(sys, "argv", ["plain.py", *args])
    with pytest.warns(UserWarning, match="will be overridden"):
        cli = LightningCLI(L.LightningModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert cli.trainer.global_step == 2


def test_plateaus_in_yaml_step_by_the_metric(project):
    (project / "plateau.yaml").write_text(
        "model: {init_args: {lr_scheduler: {class_path: lightning.pytorch.cli.ReduceLROnPlateau, "
        "init_args: {monitor: val/loss, patience: 0, threshold: 0.999, factor: 0.5}}}}\n"
    )
    cli = run_lightning(["fit", "--config", "run.yaml", "--config", "plateau.yaml", "--trainer.max_steps", "4"])
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4 / 2**3)  # the first one is the best
    monitor = "--model.init_args.lr_scheduler.init_args.monitor"
    with pytest.raises(ConfigError, match="monitors val/nothing, which the validation did not log; it logged train/"):
        run_lightning(["fit", "--config", "run.yaml", "--config", "plateau.yaml", monitor, "val/nothing"])


# -- the command line -------------------------------------------------------------------------------------------------


def test_barebones(project):
    checkpoints = "trainer: {callbacks: {class_path: lightning.pytorch.callbacks.ModelCheckpoint}}"  # not in a list
    cli = run_lightning(["fit", "--config", "run.yaml", "--config", checkpoints, "--trainer.barebones", "true"])
    assert cli.trainer.global_step == 2
    assert not any(isinstance(callback, ModelCheckpoint) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("name", ["diffusers.DDPMScheduler", "DDPMScheduler"])
def test_a_scheduler_by_its_short_form(project, name):
    cli = run_lightning(["--config", "run.yaml", "--model.init_args.sampler.scheduler", name], run=False)
    cli.model.configure_model()
    assert type(cli.model.sampler.scheduler).__name__ == "DDPMScheduler"
    assert cli.model.sampler.scheduler.config.clip_sample is False


def test_an_option_whose_package_is_missing_names_it(project, capsys):
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("transformer_engine is installed")
    assert main(["fit", "--config", "run.yaml", "--trainer.precision", "transformer-engine"]) == 2
    assert "transformer_engine" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_strategies_of_notebooks_are_refused(project, capsys, strategy):
    assert main(["fit", "--config", "run.yaml", "--trainer.devices", "2", "--trainer.strategy", strategy]) == 2
    assert f"trainer.strategy {strategy} starts its processes as a notebook needs it" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_seeds_out_of_range_are_refused(project, capsys, seed):
    assert main(["fit", "--config", "run.yaml", "--seed_everything", seed]) == 2
    assert f"seed_everything must be from 0 to 4294967295, got {seed}" in capsys.readouterr().err


def test_a_seed_that_is_drawn_is_the_same_for_all(project):
    seeds = set()
    for _ in range(2):
        cli = run_lightning(["--config", "run.yaml", "--seed_everything", "true"], run=False)
        seeds.add(cli.config["seed_everything"])
        assert cli.model.seed == cli.datamodule.seed == cli.config["seed_everything"]
    assert len(seeds) == 2


def test_a_key_that_is_there_twice_is_said(project, capsys):
    (project / "twice.yaml").write_text("trainer:\n  max_steps: 3\n  devices: 1\n  max_steps: 4\n")
    assert main(["fit", "--config", "run.yaml", "--config", "twice.yaml"]) == 2
    assert "the key 'max_steps' is there twice, in lines 2 and 4" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["{}", "={}"])
@pytest.mark.parametrize(
    ("name", "key"), [("CosineAnnealingLR", "T_max"), ("OneCycleLR", "total_steps"), ("PolynomialLR", "total_iters")]
)
def test_a_scheduler_of_the_command_line_follows_the_run(project, name, key, written):
    """jsonargparse wants `T_max` and `max_lr`, and has 5 for `total_iters`."""
    path = f"torch.optim.lr_scheduler.{name}"
    option = ["--model.lr_scheduler", path] if written == "{}" else [f"--model.lr_scheduler={path}"]
    cli = run_lightning(["fit", "--config", "run.yaml", *option])
    (config,) = cli.trainer.lr_scheduler_configs
    assert (type(config.scheduler).__name__, getattr(config.scheduler, key)) == (name, 2)
    with pytest.raises(ConfigError, match=rf"ends at step 9 \({key}\), but the run has 2 steps"):
        run_lightning(["fit", "--config", "run.yaml", *option, f"--model.lr_scheduler.{key}", "9"])


@pytest.mark.parametrize("fused", [True, False])
def test_clipping_of_a_fused_optimizer_under_fp16_is_refused(weights, tmp_path, fused):
    module = DiTDiffTuningModule(
        str(weights), num_classes=3, optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=fused)
    )
    data = MemoryBankDataModule(tiny_pictures(), num_classes=3, image_size=8, channels=1, batch_size=4)
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    trainer = quiet_trainer(tmp_path, 2, gradient_clip_val=1.0, plugins=[scaled])
    if fused:
        with pytest.raises(ConfigError, match=r"clip_val is 1\.0.*Set fused: false of the optimizer, or .*bf16-m"):
            trainer.fit(module, data)
    else:
        trainer.fit(module, data)
        assert trainer.global_step == 2
