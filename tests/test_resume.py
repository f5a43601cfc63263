"""Runs that are killed, stopped or requeued, and resumed from the command line."""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny import tiny_config, tiny_weights, write_pictures

from lightning_difftune.callbacks import EMA, preemption
from lightning_difftune.cli import compare, main
from lightning_difftune.cli.compare import work
from lightning_difftune.cli.lightning import DiffTuneCLI, run_lightning
from lightning_difftune.cli.quickstart import methods
from lightning_difftune.data import shards

STEPS = 150
CHECKPOINT_EVERY = 10
ENTRY = [sys.executable, "-m", "lightning_difftune"]
CALLBACKS = [
    {"class_path": "lightning_difftune.callbacks.EMA", "init_args": {"decay": 0.9}},
    {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_last": True, "save_top_k": 0, "every_n_train_steps": CHECKPOINT_EVERY},
    },
]


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory):
    """Weights, pictures and a config."""
    folder = tmp_path_factory.mktemp("ingredients")
    tiny_weights(folder)
    write_pictures(folder / "pictures", 30, ("class0", "class1", "class2"))
    config = tiny_config(
        model={
            "sampler": {"num_inference_steps": 2},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.OneCycleLR",
                "init_args": {"max_lr": -1.0, "total_steps": -1},
            },
        },
        data={"bank": "bank", "bank_size": 40, "batch_size": 5, "horizontal_flip": True},
        trainer={
            "max_steps": STEPS,
            "default_root_dir": "run",
            "val_check_interval": 25,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 5,
            "callbacks": CALLBACKS,
        },
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def fresh(ingredients, folder):
    return Path(shutil.copytree(ingredients, folder, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def undisturbed(ingredients, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = fresh(ingredients, tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "run.yaml"]) == 0
    return folder


@pytest.fixture
def project(ingredients, tmp_path, monkeypatch):
    """A folder to start a run in, as the working directory."""
    monkeypatch.chdir(fresh(ingredients, tmp_path))
    return tmp_path


def start(*args, **environment):
    """A command in a process of its own."""
    return subprocess.Popen(
        [*ENTRY, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def signalled(process, number, at_step):
    """Send a signal when the log says that the step is done; returns exit status and output."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] for row in rows(Path()) if int(row["step"]) >= at_step):
            process.send_signal(number)
            break
        time.sleep(0.002)
    output = process.communicate(timeout=100)[0]
    return process.returncode, output


def rows(folder):
    """The rows of all runs' logs, the later runs last."""
    found = []
    for path in sorted(folder.glob("run/lightning_logs/version_*/metrics.csv")):
        with open(path) as file:
            found += [row for row in csv.DictReader(file) if row.get("step")]
    return found


def logged(folder):
    """Logged values by step and name; those that a killed run got before it was killed are overwritten."""
    return {
        (int(row["step"]), name): value
        for row in rows(folder)
        for name, value in row.items()
        if value and name not in ("step", "epoch")
    }


def last_checkpoint(folder):
    newest = max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(newest, weights_only=True)


def assert_same(one, two, where=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for number, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    else:
        assert one == two, where


def assert_as_undisturbed(folder, undisturbed, killed=False):
    """Weights, averages, optimizer, schedule, position and log are those of the undisturbed run, to the bit.

    A run that was killed between a checkpoint and what is logged of the same step has lost that row.
    """
    ours, theirs = last_checkpoint(folder), last_checkpoint(undisturbed)
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(ours[name], theirs[name], name)
    averages = [
        next(state for key, state in found["callbacks"].items() if key.startswith("EMA")) for found in (ours, theirs)
    ]
    assert_same(*averages)
    values, expected = logged(folder), logged(undisturbed)
    lost = {key for key in expected.keys() - values.keys() if killed and (key[0] + 1) % CHECKPOINT_EVERY == 0}
    assert values == {key: value for key, value in expected.items() if key not in lost}
    files = sorted(path.name for path in (undisturbed / "bank").iterdir())
    assert sorted(path.name for path in (folder / "bank").iterdir()) == files
    assert all((folder / "bank" / name).read_bytes() == (undisturbed / "bank" / name).read_bytes() for name in files)


class Signals:
    """Lets a run send itself a signal in a training step, or in the validation after one."""

    def __init__(self, patch, number, step, validating=False):
        self.sent = 0
        original = getattr(EMA, "on_validation_start" if validating else "on_train_batch_end")

        def hook(callback, trainer, *args):
            original(callback, trainer, *args)
            if trainer.global_step == step and not self.sent:
                self.sent += 1
                os.kill(os.getpid(), number)

        patch.setattr(EMA, original.__name__, hook)


# -- kills and SIGTERM ------------------------------------------------------------------------------------------------


def test_killed_and_gone_on_with_by_one_option(project, undisturbed):
    status, _ = signalled(start("fit", "--config", "run.yaml"), signal.SIGKILL, at_step=60)
    assert status == -signal.SIGKILL
    again = subprocess.run([*ENTRY, "fit", "--ckpt_path", "last"], capture_output=True, text=True, check=False)
    output = again.stdout + again.stderr
    assert again.returncode == 0, output
    step = re.search("Resuming from run/lightning_logs/version_0/checkpoints/last.ckpt, step ([0-9]+) of 150", output)
    assert step is not None, output
    assert 60 <= int(step[1]) <= STEPS
    assert_as_undisturbed(project, undisturbed, killed=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_again_and_again(project, undisturbed, seed):
    rng, kills = random.Random(seed), 0
    process = start("fit", "--config", "run.yaml")
    for _ in range(8):
        time.sleep(rng.uniform(4, 9))  # importing takes about four seconds
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        begun = any(project.rglob("*.ckpt"))
        process = start("fit", *(["--ckpt_path", "last"] if begun else ["--config", "run.yaml"]))
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert kills
    assert_as_undisturbed(project, undisturbed, killed=True)


@pytest.mark.slow
def test_sigterm_has_an_exit_status_of_its_own(project):
    status, output = signalled(start("fit", "--config", "run.yaml"), signal.SIGTERM, at_step=40)
    assert status == 143, output
    assert "Traceback" not in output
    stopped = last_checkpoint(project)["global_step"]
    path = "run/lightning_logs/version_0/checkpoints/last.ckpt"
    assert f"Stopped by a signal after step {stopped}; saved {path}." in output


@pytest.mark.parametrize(("step", "validating"), [(2, False), (25, False), (28, False), (30, False), (25, True)])
def test_sigterm_saves_the_step_that_was_reached(project, undisturbed, monkeypatch, step, validating):
    with monkeypatch.context() as patch:
        sent = Signals(patch, signal.SIGTERM, step, validating)
        before = signal.getsignal(signal.SIGTERM)
        assert main(["fit", "--config", "run.yaml"]) == 143
    assert sent.sent
    assert signal.getsignal(signal.SIGTERM) == before
    assert last_checkpoint(project)["global_step"] == (29 if step == 28 else step)  # 28 ends an epoch
    assert main(["fit", "--ckpt_path", "last"]) == 0
    assert_as_undisturbed(project, undisturbed)


def test_sigterm_in_the_last_step_changes_nothing(project, undisturbed, monkeypatch):
    sent = Signals(monkeypatch, signal.SIGTERM, STEPS)
    assert main(["fit", "--config", "run.yaml"]) == 0
    assert sent.sent
    assert_as_undisturbed(project, undisturbed)


def test_sigterm_in_the_last_step_ends_a_study_before_it_measures(project, monkeypatch):
    Path("study.yaml").write_text("output: out\nbase: [run.yaml]\nmetrics: {fid: lower}\nruns: {plain: {}}\n")
    monkeypatch.setattr(compare, "start_process", lambda folder: (folder / "log.txt").touch())
    assert main(["compare", "study.yaml", "--run"]) == 2
    sent = Signals(monkeypatch, signal.SIGTERM, STEPS, validating=True)
    with pytest.raises(SIGTERMException):
        work.work(Path("out/runs/plain-seed0"))
    assert sent.sent
    assert not list(project.glob("out/**/plain-seed0.json"))


def test_sigterm_in_the_last_step_ends_a_quickstart_before_its_next_method(tmp_path, monkeypatch):
    signalled = preemption.Preemption()
    signalled._notice(signal.SIGTERM, None)
    cli = SimpleNamespace(trainer=SimpleNamespace(callbacks=[signalled]))
    monkeypatch.setattr(methods, "run_lightning", lambda args: cli)
    with pytest.raises(SIGTERMException):
        methods.tune("Diff-Tuning", "quickstart.yaml", tmp_path, 0, [])


def test_sigterm_while_the_bank_is_built_keeps_its_finished_shards(project, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        original = shards.ShardWriter.check

        def check(writer, *args):
            original(writer, *args)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(shards.ShardWriter, "check", check)
        assert main(["fit", "--config", "run.yaml"]) == 143
    assert (project / "bank/shard-00000.safetensors").exists()
    assert not (project / "bank/manifest.json").exists()
    assert not list(project.rglob("*.ckpt"))
    assert main(["fit", "--config", "run.yaml"]) == 0
    assert_as_undisturbed(project, undisturbed)


# -- SLURM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [False, True])
def test_a_slurm_job_is_requeued_and_goes_on_by_its_own_command(project, undisturbed, monkeypatch, array):
    (project / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {project}/scontrol.log\n')
    (project / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "tune", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "node1"}
    job |= {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"} if array else {}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{project}:{os.environ['PATH']}")
    with monkeypatch.context() as patch:
        sent = Signals(patch, signal.SIGUSR1, 33)
        assert main(["fit", "--config", "run.yaml"]) == 143
    assert sent.sent
    assert (project / "scontrol.log").read_text() == f"requeue {'4700_11' if array else '4711'}\n"
    assert last_checkpoint(project)["global_step"] == 33
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(["fit", "--config", "run.yaml"]) == 0  # what the job's script says, once more
    assert_as_undisturbed(project, undisturbed)


def test_without_scontrol_the_checkpoint_is_saved_all_the_same(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with pytest.warns(UserWarning, match="SLURM job 4711 could not be requeued .*the checkpoint is saved"):
        preemption.requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "4711; rm -rf /")
    with pytest.warns(UserWarning, match="is not a SLURM job id"):
        preemption.requeue()


# -- which run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(project, monkeypatch):
    """Two short runs that share one folder, without a logger that would give each its own."""
    config = yaml.safe_load((project / "run.yaml").read_text())
    config["trainer"] |= {"max_steps": 4, "logger": False, "val_check_interval": 4}
    config["trainer"]["callbacks"][1]["init_args"] = {"save_last": True, "dirpath": "shared"}
    (project / "short.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "short.yaml", "--trainer.max_steps", "2"]) == 0
    assert main(["fit", "--config", "short.yaml", "--model.init_args.label_dropout", "0.4"]) == 0
    return project


def resumed(args, monkeypatch):
    """The command line object of a run that is not started."""
    monkeypatch.setattr(DiffTuneCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = run_lightning(args)
    return cli, cli.config["fit"]["ckpt_path"]


def test_several_runs_in_one_folder_of_checkpoints(several, monkeypatch):
    names = sorted(path.name for path in (several / "shared").iterdir())
    assert {"last.ckpt", "last-v1.ckpt"} <= set(names)
    (several / ".hidden").mkdir()
    shutil.copy(several / "shared/last.ckpt", several / ".hidden/later.ckpt")
    torch.save({"state_dict": {}}, several / "of-another-trainer.ckpt")
    cli, path = resumed(["fit", "--ckpt_path", "last"], monkeypatch)
    assert path == "shared/last-v1.ckpt"
    assert (cli.trainer.max_steps, cli.model.label_dropout) == (4, 0.4)
    cli, path = resumed(["fit", "--ckpt_path=shared/last.ckpt", "--trainer.max_steps", "9"], monkeypatch)
    assert path == "shared/last.ckpt"
    assert (cli.trainer.max_steps, cli.model.label_dropout) == (9, 0.1)


def test_last_with_a_config_is_looked_for_in_its_folder(several, monkeypatch):
    elsewhere = ["fit", "--config", "short.yaml", "--trainer.default_root_dir"]
    assert resumed([*elsewhere, ".", "--ckpt_path", "last"], monkeypatch)[1] == "shared/last-v1.ckpt"
    assert resumed([*elsewhere, "new", "--ckpt_path", "last"], monkeypatch)[1] == "last"  # Lightning begins anew


def test_nothing_to_go_on_with(several, capsys):
    assert main(["fit", "--ckpt_path", "last", "--trainer.default_root_dir", "pictures"]) == 2
    assert "There is no checkpoint of a run under" in capsys.readouterr().err
    content = torch.load("shared/last.ckpt", weights_only=True)
    for config, message in (
        ("a: [", "is not YAML"),
        ("just words", "is not a mapping of settings"),
        ("!!python/object/apply:os.system [touch ran]", "is not YAML"),
        (None, "does not hold the config of its run, and there is none next to it"),
    ):
        torch.save({**content, "config": config}, "other.ckpt")
        if config is None:
            torch.save({key: value for key, value in content.items() if key != "config"}, "other.ckpt")
        assert main(["fit", "--ckpt_path", "other.ckpt"]) == 2
        assert message in capsys.readouterr().err
    assert not Path("ran").exists()
