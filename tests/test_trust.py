"""A config that came inside a file names only what can run no other code, unless the user trusts it by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_difftune.cli import main
from lightning_difftune.cli.run import Run
from lightning_difftune.errors import ConfigError
from lightning_difftune.trust import check_trust, split_trusted

CONFIGS = sorted(  # what a checkpoint may hold: a study's file is not the config of a run
    path for path in Path(__file__).parents[1].glob("configs/**/*.yaml") if path.parent.name != "studies"
)

REFUSED = [
    "os.system",
    "posix.system",
    "builtins.eval",
    "subprocess.run",
    "functools.partial",
    "torch.os.system",
    "torch.load",
    "torch.serialization.load",
    "torch.hub.load",
    "torch.jit.ScriptModule",
    "torch.fx.GraphModule",
    "torch.multiprocessing.spawn",
    "torch.utils.collect_env.run",
    "torchvision.datasets.LSUN",
    "lightning.pytorch.cli.instantiate_class",
    "lightning.pytorch.cli.LightningCLI",
    "datasets.load_dataset",
    "datasets.Dataset.from_generator",
    "diffusers.DiffusionPipeline.from_pretrained",
    "transformers.AutoModel.from_pretrained",
    "lightning_difftune.cli.main",
    "lightning_difftune.cli.sample.sample",
    "lightning_difftune.callbacks.preemption.requeue",
    "lightning_difftune.callbacks.preemption.subprocess.run",
]


@pytest.mark.parametrize("name", REFUSED)
def test_what_runs_other_code_is_refused_as_a_class_and_as_a_function(name):
    for settings in ({"model": {"class_path": name}}, {"model": {"init_args": {"loss": name}}}, [[name]]):
        with pytest.raises(ConfigError, match=rf"config in a\.ckpt names {name.replace('.', '[.]')} \(.*--trust"):
            check_trust(settings, "a.ckpt")


@pytest.mark.parametrize("setting", [{"trust_remote_code": True}, {"weights_only": "False"}, {"allow_pickle": True}])
def test_arguments_that_allow_code_are_refused(setting):
    with pytest.raises(ConfigError, match="code in a file would be run"):
        check_trust({"data": {"init_args": {"dict_kwargs": setting}}}, "a.ckpt")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_own_configs_are_trusted(path):
    check_trust(yaml.safe_load(path.read_text()), str(path))


@pytest.mark.parametrize(
    "name",
    [
        "lightning_difftune.losses.eps_mse_loss",
        "lightning_difftune.callbacks.EMA",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.CosineAnnealingLR",
        "lightning.pytorch.cli.ReduceLROnPlateau",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.strategies.DDPStrategy",
        "diffusers.DDIMScheduler",
        "torchvision.datasets.Flowers102",
        "torchvision.transforms.Compose",
        "torch.nn.functional.mse_loss",
        "datetime.timedelta",
    ],
)
def test_what_configs_are_made_of_is_trusted(name):
    check_trust({"class_path": name}, "a.ckpt")


def test_names_of_files_are_not_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test.npz").touch()  # `test` is a package of Python
    (tmp_path / "pictures").mkdir()
    check_trust({"root": "pictures.npz", "file": "test.npz", "model": "nowhere.safetensors", "monitor": "val.fid"}, "a")


def test_a_part_of_the_config_in_another_file_is_looked_at_too(tmp_path):
    (tmp_path / "part.txt").write_text("class_path: my_package.Model\n")
    with pytest.raises(ConfigError, match="my_package"):
        check_trust({"model": str(tmp_path / "part.txt")}, "a.ckpt")


def test_repeated_parts_of_yaml_are_looked_at_once():
    lines = ["a0: &a0 [os.system]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))]
    with pytest.raises(ConfigError, match=r"os\.system"):
        check_trust(yaml.safe_load("\n".join(lines)), "a.ckpt")


def test_trust_is_by_package_module_or_name(tmp_path, monkeypatch):
    (tmp_path / "my_package.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"class_path": "my_package.Model", "init_args": {"loss": "my_package.losses.mine"}}
    with pytest.raises(ConfigError, match=r"my_package.Model .*my_package.losses.mine .*--trust my_package"):
        check_trust(settings, "a.ckpt")
    check_trust(settings, "a.ckpt", ["my_package"])
    check_trust({"loss": "torch.hub.load"}, "a.ckpt", ["torch.hub.load"])
    with pytest.raises(ConfigError, match=r"my_package\.Model"):
        check_trust(settings, "a.ckpt", ["my_pack", "my_package.losses"])
    assert "my_package" not in sys.modules


def test_the_option():
    args = ["fit", "--trust", "one", "--ckpt_path", "last", "--trust=two,three"]
    assert split_trusted(args) == (["fit", "--ckpt_path", "last"], ["one", "two", "three"])
    with pytest.raises(ConfigError, match="--trust takes the name of a package"):
        split_trusted(["fit", "--trust", "--ckpt_path", "last"])


def sent(path, config):
    """A checkpoint as a colleague might send it."""
    torch.save({"state_dict": {}, "config": yaml.safe_dump(config), "pytorch-lightning_version": "2.6"}, path)


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--ckpt_path", "sent.ckpt"],
        ["validate", "--ckpt_path", "sent.ckpt"],
        ["sample", "sent.ckpt", "--output", "pictures"],
        ["export", "--ckpt_path", "sent.ckpt", "--output", "out"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("where", ["class", "function", "tuner"])
def test_no_command_runs_what_a_checkpoint_names(tmp_path, monkeypatch, capsys, command, where):
    monkeypatch.chdir(tmp_path)
    called = []
    monkeypatch.setattr(os, "system", lambda *args, **options: called.append(args))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = {"class_path": "lightning_difftune.DiTDiffTuningModule", "init_args": {"model": "dit-nano-omniglot"}}
    trainer = {"max_steps": 1}
    if where == "class":
        model["class_path"] = "evil.Model"
    elif where == "function":
        model["init_args"]["optimizer"] = {"class_path": "os.system", "init_args": {"command": "touch ran"}}
    else:
        model["init_args"]["tuner"] = {"class_path": "evil.Model"}
    sent(tmp_path / "sent.ckpt", {"model": model, "trainer": trainer})
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "sent.ckpt names " in error
    assert not called
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_does_not_say_how_it_is_opened(tmp_path):
    sent(tmp_path / "sent.ckpt", {"ckpt_path": "other.ckpt", "weights_only": False, "trainer": {}})
    assert Run(tmp_path, tmp_path / "sent.ckpt").settings() == {"trainer": {}}
