"""The object of a run: found by any of its paths, and its facts."""

from __future__ import annotations

import os

import pytest
import torch
import yaml

from lightning_difftune.cli import main, run_files
from lightning_difftune.cli.arguments import CommandParser
from lightning_difftune.cli.record import completed
from lightning_difftune.cli.run import Run
from lightning_difftune.cli.run_files import newest
from lightning_difftune.errors import CheckpointError, ConfigError, DataError


def launch(folder, time, *, steps=0, saved=False, max_steps=10):
    """The folder of a launch that was last written to at a time."""
    folder.mkdir(parents=True)
    config = yaml.safe_dump({"trainer": {"max_steps": max_steps}})
    (folder / "config.yaml").write_text(config)
    lines = [f"{step},{1 / (step + 1)}" for step in range(steps)]
    (folder / "metrics.csv").write_text("\n".join(["step,train/loss", *lines, ""]))
    if saved:
        (folder / "checkpoints").mkdir()
        content = {"state_dict": {}, "pytorch-lightning_version": "2.5", "global_step": steps, "config": config}
        torch.save(content, folder / "checkpoints" / "last.ckpt")
    for file in folder.rglob("*.*"):
        os.utime(file, (time, time))
    return folder


@pytest.fixture
def root(tmp_path):
    """A run of three launches: two that trained, and one that was refused at the start."""
    logs = tmp_path / "run" / "lightning_logs"
    launch(logs / "version_0", 100, steps=4, saved=True)
    launch(logs / "version_1", 200, steps=8, saved=True)
    launch(logs / "version_2", 300)
    return tmp_path / "run"


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    "place", [".", "lightning_logs", "lightning_logs/version_1", "lightning_logs/version_1/checkpoints"]
)
def test_any_place_of_a_run_is_its_newest_launch_that_trained(root, place, saved):
    run = Run.find(root / place, saved)
    assert run.path == root / "lightning_logs/version_1"
    assert run.checkpoint == root / "lightning_logs/version_1/checkpoints/last.ckpt"
    assert (run.step, run.last_step, run.max_steps) == (8, 8, 10)


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_was_copied_is_taken_at_its_last_step(root, saved):
    """``scp -r`` writes the files of a run in any order, with new times."""
    checkpoints = root / "lightning_logs/version_1/checkpoints"
    content = torch.load(checkpoints / "last.ckpt")
    torch.save(content | {"global_step": 6}, checkpoints / "step=6.ckpt")
    for time, place in enumerate(("version_1/checkpoints/last.ckpt", "version_1/checkpoints/step=6.ckpt")):
        os.utime(root / "lightning_logs" / place, (500 + time, 500 + time))
    for file in (root / "lightning_logs/version_0").rglob("*.*"):
        os.utime(file, (600, 600))
    assert Run.find(root, saved).checkpoint == checkpoints / "last.ckpt"


def test_a_checkpoint_whose_name_tells_fewer_steps_is_not_opened(root, monkeypatch):
    """A folder may have hundreds; ``epoch=0-step=40-v1.ckpt`` has more steps, and is damaged."""
    checkpoints = root / "lightning_logs/version_1/checkpoints"
    for name in ("epoch=0-step=2", "epoch=0-step=8-v1", "epoch=0-step=40-v1", "best-val_step=40"):
        (checkpoints / f"{name}.ckpt").write_bytes(b"")
        os.utime(checkpoints / f"{name}.ckpt", (100, 100))
    opened = []
    read = run_files.read_checkpoint
    monkeypatch.setattr(run_files, "read_checkpoint", lambda path: opened.append(path.stem) or read(path))
    assert newest(checkpoints.iterdir()) == checkpoints / "last.ckpt"
    assert opened == ["last", "best-val_step=40", "epoch=0-step=40-v1"]


def test_hidden_files_are_not_of_the_run(root):
    """``._last.ckpt`` holds attributes that a Mac writes on disks which it shares with other systems."""
    checkpoints = root / "lightning_logs/version_1/checkpoints"
    (checkpoints / "._last.ckpt").write_bytes(b"Mac OS X")
    figures = {name: checkpoints.with_name(name) / "total.png" for name in ("ewc", ".ipynb_checkpoints")}
    for figure in (*figures.values(), figures["ewc"].with_name("._total.png")):
        figure.parent.mkdir(exist_ok=True)
        figure.touch()
    run = Run(root / "lightning_logs/version_1")
    assert (run.checkpoint, run.figures) == (checkpoints / "last.ckpt", [figures["ewc"]])


def test_of_other_runs_in_one_folder_the_later_one_is_taken(root):
    checkpoints = root / "lightning_logs/version_1/checkpoints"
    torch.save({**torch.load(checkpoints / "last.ckpt"), "global_step": 2, "config": "{}"}, checkpoints / "new.ckpt")
    assert Run.find(root, saved=True).checkpoint == checkpoints / "new.ckpt"


def test_a_callback_that_is_not_in_a_list_is_found(tmp_path):
    callback = {"class_path": "lightning_difftune.callbacks.SampleGrid", "init_args": {"columns": 4}}
    for number, callbacks in enumerate((callback, [callback])):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        assert Run(tmp_path / str(number)).callback("SampleGrid") == {"columns": 4}


def test_a_checkpoint_is_itself(root):
    checkpoint = root / "lightning_logs/version_0/checkpoints/last.ckpt"
    run = Run.find(checkpoint)
    assert (run.path, run.checkpoint, run.step) == (root / "lightning_logs/version_0", checkpoint, 4)


def test_without_a_logger_the_root_is_the_launch(tmp_path):
    launch(tmp_path / "run", 100, steps=3, saved=True)
    assert Run.find(tmp_path / "run", saved=True).path == Run.find(tmp_path / "run").path == tmp_path / "run"


def test_a_launch_without_a_checkpoint_can_be_reported_and_not_sampled(tmp_path):
    launch(tmp_path / "run/lightning_logs/version_0", 100, steps=3)
    assert Run.find(tmp_path / "run").last_step == 3
    with pytest.raises(CheckpointError, match="no checkpoint of a run in"):
        Run.find(tmp_path / "run", saved=True)


@pytest.mark.parametrize("saved", [True, False])
def test_a_folder_of_several_runs_is_refused(root, tmp_path, saved):
    launch(tmp_path / "other/lightning_logs/version_0", 400, steps=3, saved=True)
    with pytest.raises(DataError, match=r"There are 2 runs in .*/other, .*/run\. Name one"):
        Run.find(tmp_path, saved)
    assert Run.find(root, saved).step == 8


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("nowhere", DataError, "nowhere does not exist"),
        ("none.ckpt", CheckpointError, "none.ckpt does not exist"),
        ("my.yaml", DataError, "my.yaml is a config, not a run. Start a run by `difftune fit --config .*my.yaml`"),
        ("empty", DataError, "empty is not the folder of a run"),
    ],
)
def test_what_is_not_a_run_is_refused(tmp_path, place, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "my.yaml").write_text("trainer: {max_steps: 10}\n")
    with pytest.raises(error, match=message):
        Run.find(tmp_path / place)


@pytest.mark.parametrize("place", [["--ckpt_path", "run"], ["run"]])
def test_a_run_is_resumed_by_its_folder(root, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    command = completed(["fit", *place, "--trainer.max_steps", "20"])
    assert command[:2] == ["fit", "--config"]
    assert yaml.safe_load(command[2]) == {"trainer": {"max_steps": 10}}
    assert command[command.index("--trainer.max_steps") + 1] == "20"
    assert command[-2:] == ["--ckpt_path", "run/lightning_logs/version_1/checkpoints/last.ckpt"]


@pytest.mark.parametrize(
    "args",
    [
        ["RUN", "--output", "here", "--model.x", "3"],
        ["--model.x", "3", "--output", "here", "RUN"],
        ["--model.x", "3", "RUN", "--output=here"],
        ["--output", "here", "--ckpt_path", "RUN", "--model.x", "3"],
        ["--ckpt-path=RUN", "--output", "here", "--model.x", "3"],
    ],
)
def test_the_run_is_told_from_the_values_of_other_options(args):
    parser = CommandParser("export", "")
    parser.add_run()
    parser.add_argument("--output")
    options, rest = parser.parse_known_args(args)
    assert (options.run, options.output, rest) == ("RUN", "here", ["--model.x", "3"])


@pytest.mark.parametrize("args", [["a", "b"], ["a", "--ckpt_path", "b"], []])
def test_one_run_is_one(args):
    parser = CommandParser("export", "")
    parser.add_run()
    with pytest.raises(ConfigError, match=r"(2 runs are more than 1: a, b|Name a run first)"):
        parser.parse_args(args)


@pytest.mark.parametrize("command", ["sample", "report", "export", "swap", "compare", "plan", "quickstart"])
def test_a_mistake_is_one_line_in_every_command(command, capsys):
    assert main([command, "--seed", "few", "--num_samples", "few", "--utilisation", "few", "--nonsense"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("difftune: ")
    assert said.count("\n") == 1
    assert "usage:" not in said
