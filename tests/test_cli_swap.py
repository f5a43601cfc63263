"""``difftune swap`` on a tiny project: its files for one checkpoint and for two, and its errors."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny import tiny_config, tiny_weights, write_pictures

from lightning_difftune.cli import main
from lightning_difftune.cli.swap import names_of, refuse_other_measures
from lightning_difftune.errors import ConfigError

FEATURES = """
import torch
class Means(torch.nn.Module):
    num_features = 2
    def forward(self, images):
        return images.float().flatten(1).unfold(1, 32, 32).mean(2)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two finished runs in a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "swap_features.py").write_text(FEATURES)
    tiny_weights(tmp_path)
    write_pictures(tmp_path / "pictures", 12, "abc")
    fid = {"num_samples": 6, "batch_size": 4, "feature_extractor": {"class_path": "swap_features.Means"}}
    saving = {"save_last": True, "save_top_k": 0}
    callbacks = [
        {"class_path": "lightning_difftune.callbacks.EMA", "init_args": {"decay": 0.5}},
        {"class_path": "lightning_difftune.callbacks.FID", "init_args": fid},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving},
    ]
    config = tiny_config(
        model={"sampler": {"num_inference_steps": 4}},
        data={"bank": "bank", "bank_size": 4, "batch_size": 5},
        trainer={"max_steps": 2, "default_root_dir": "run", "logger": False, "callbacks": callbacks},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    for name, lr in (("one", "0.001"), ("two", "0.1")):
        optimizer = ["--model.init_args.optimizer", "torch.optim.AdamW", "--model.init_args.optimizer.lr", lr]
        where = ["--trainer.callbacks.init_args.dirpath", name]  # of the last callback
        assert main(["fit", "--config", "run.yaml", *optimizer, *where]) == 0
    return tmp_path


def table(folder):
    with (folder / "swap.csv").open() as file:
        return list(csv.DictReader(file))


def test_two_models_side_by_side(project, capsys, recwarn):
    args = ["swap", "--config", "run.yaml", "--percents", "0", "50", "100", "--output", "both"]
    assert main([*args, "--ckpt_path", "one/last.ckpt", "--ckpt_path", "two/last.ckpt"]) == 0
    said = capsys.readouterr().out
    assert "one: fd_means is least" in said
    assert "Look at both/swap.png" in said
    assert not [str(w.message) for w in recwarn if "callbacks used to create the checkpoint" in str(w.message)]
    rows = table(project / "both")
    assert [(row["model"], row["swapped_percent"]) for row in rows] == [
        (name, percent) for name in ("one", "two") for percent in ("0", "50", "100")
    ]
    by_key = {(row["model"], row["swapped_percent"]): float(row["fd_means"]) for row in rows}
    assert by_key["one", "0"] != by_key["two", "0"]
    assert by_key["one", "100"] == by_key["two", "100"]  # the pre-trained model, whatever was tuned
    assert {path.name for path in (project / "both").iterdir()} >= {"swap.csv", "swap.svg", "swap.png", "one", "two"}
    assert not (project / "run" / "lightning_logs").exists()

    # Without a swap it is what `difftune validate` measures, with the averaged weights.
    assert main(["validate", "--config", "run.yaml", "--ckpt_path", "one/last.ckpt"]) == 0
    logged = next(line for line in capsys.readouterr().out.splitlines() if "fd_means" in line)
    assert float(logged.split()[-2]) == pytest.approx(by_key["one", "0"], rel=1e-4)

    alone = ["swap", "--config", "run.yaml", "--ckpt_path", "two/last.ckpt", "--num_samples", "3"]
    assert main([*alone, "--percents", "0", "--name", "my model", "--output", "alone"]) == 0
    assert [row["model"] for row in table(project / "alone")] == ["my model"]


def test_another_run_does_the_last_steps(project, capsys):
    args = ["swap", "--config", "run.yaml", "--percents", "0", "50", "100", "--ckpt_path", "one/last.ckpt"]
    assert main([*args, "--output", "plain", "--ckpt_path", "two/last.ckpt"]) == 0
    assert main([*args, "--output", "other", "--tail", "two/last.ckpt"]) == 0
    said = capsys.readouterr().out
    assert "The last steps are done by two/last.ckpt, weights: averaged over 2 updates." in said
    plain = {(row["model"], row["swapped_percent"]): float(row["fd_means"]) for row in table(project / "plain")}
    other = {row["swapped_percent"]: float(row["fd_means"]) for row in table(project / "other")}
    assert other["0"] == plain["one", "0"]
    assert other["100"] == plain["two", "0"]  # all of them: it is that run's model
    assert other["50"] not in plain.values()
    assert "last steps done by two (%)" in (project / "other" / "swap.svg").read_text()

    assert main([*args, "--tail", "none.ckpt"]) == 2
    assert "none.ckpt does not exist" in capsys.readouterr().err


def test_mistakes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.ckpt").touch()
    for args, message in (
        ([], "Name a run first: its folder or one of its checkpoints"),
        (["--ckpt_path", "none.ckpt"], "none.ckpt does not exist"),
        (["--ckpt_path", "a", "--ckpt_path", "b", "c"], "3 runs are more than 2: c, a, b"),
        (["a.ckpt", "--name", "a", "--name", "b"], "Give each of the 1 runs its own --name"),
        (["a.ckpt", "--percents", "50", "150"], "--percents are numbers from 0 to 100, got 50.0 150.0"),
        (["a.ckpt", "--num_samples", "0"], "num_samples of difftune swap must be at least 1"),
        (["a.ckpt", "--output", "a.ckpt/swap"], "a.ckpt/swap cannot be written, since"),
    ):
        assert main(["swap", *args]) == 2
        assert message in capsys.readouterr().err


def test_distances_that_do_not_compare_are_refused():
    measure = SimpleNamespace(monitor="fid", num_samples=2000)
    refuse_other_measures({"one": measure, "two": SimpleNamespace(monitor="fid", num_samples=2000)})
    for other in ({"num_samples": 500}, {"monitor": "fd_means"}):
        with pytest.raises(ConfigError, match="one by fid of 2,000 pictures, two by f"):
            refuse_other_measures({"one": measure, "two": SimpleNamespace(**{**vars(measure), **other})})


def test_names_are_what_the_paths_differ_in():
    assert names_of(["runs/full/v0/last.ckpt", "runs/difftune/v0/last.ckpt"]) == ["full", "difftune"]
    assert names_of(["a.ckpt", "b.ckpt"]) == ["a", "b"]
    assert names_of(["a.ckpt"]) == ["tuned"]
