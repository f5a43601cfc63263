"""The final messages of commands."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lightning_difftune.cli.facts import after_fit, export_command, name_of, sample_command, summary
from lightning_difftune.cli.run import Run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A finished run in my photos/lightning_logs/version_1, after a first launch that never trained."""
    monkeypatch.chdir(tmp_path)
    for version in (0, 1):
        folder = Path("my photos", "lightning_logs", f"version_{version}")
        (folder / "samples").mkdir(parents=True)
        config = {"trainer": {"default_root_dir": "my photos", "max_steps": 4}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.csv").write_text("step,train/loss,val/loss,fid,lr-AdamW\n1,0.5,,,0.1\n3,0.4,0.25,31.5,0.1\n")
    scores = {"fid": {"higher_is_better": False, "label": "FID"}}
    (folder / "environment.json").write_text(json.dumps({"scores": scores}))
    for step in (2, 4):
        (folder / "samples" / f"step-000000{step}.png").touch()
    (folder / "checkpoints").mkdir()
    content = {"global_step": 4, "class_names": ["oxeye daisy"], "pytorch-lightning_version": "2", "state_dict": {}}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    return Run(folder)


def test_a_run_goes_by_its_root_as_long_as_that_means_this_launch(run) -> None:
    assert name_of(run) == "'my photos'"
    later = Path("my photos", "lightning_logs", "version_2")
    later.mkdir()
    (later / "config.yaml").write_text(run.config_text)
    (later / "metrics.csv").write_text("step,train/loss\n3,0.4\n")
    assert name_of(run) == f"'{run.path}'"


def test_the_summary_says_what_is_where_and_what_comes_next(run) -> None:
    said = after_fit(
        SimpleNamespace(log_dir=str(run.path), default_root_dir=None, global_step=4, ckpt_path=None)
    ).splitlines()
    assert said == [
        f"Run         {run.path}, 4 steps",
        f"Checkpoint  {run.path}/checkpoints/last.ckpt",
        f"Metrics     {run.path}/metrics.csv: val/loss 0.25, fid 31.5",
        f"Pictures    {run.path}/samples/step-0000004.png",
        "Next        difftune report 'my photos'",
        "            difftune sample 'my photos' --classes 'oxeye daisy'",
        "            difftune export 'my photos' --output my-model",
    ]
    assert export_command(run) == said[-1].strip()


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        ([], "none: the config has no ModelCheckpoint"),
        ([SimpleNamespace(last_model_path="", best_model_path="")], "no new one"),
        ([SimpleNamespace(last_model_path="saved/last.ckpt", best_model_path="")], "saved/last.ckpt"),
    ],
)
def test_the_summary_does_not_deny_a_checkpoint_callback(run, callbacks, said) -> None:
    (run.path / "checkpoints" / "last.ckpt").unlink()
    trainer = SimpleNamespace(
        log_dir=str(run.path), default_root_dir=None, global_step=4, checkpoint_callbacks=callbacks, ckpt_path=None
    )
    assert after_fit(trainer).splitlines()[1] == f"Checkpoint  {said}"


def test_a_finished_run_that_is_resumed_says_that_nothing_was_left(run, tmp_path) -> None:
    checkpoint = str(run.path / "checkpoints" / "last.ckpt")
    trainer = SimpleNamespace(log_dir=str(tmp_path), default_root_dir=None, global_step=4, ckpt_path=checkpoint)
    assert after_fit(trainer) == (
        f"Nothing was left to train: {checkpoint} is of the last step. To train more: difftune fit 'my photos' "
        "--trainer.max_steps 8"
    )


def changed(run: Run, metrics: str, **trainer: int) -> Run:
    data = {"init_args": {"batch_size": 10, "bank": "bank", "retention_share": 0.2}}
    config = {"data": data, "trainer": {"max_steps": 400, "log_every_n_steps": 10, **trainer}}
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    (run.path / "metrics.csv").write_text(metrics)
    counts = {"scores": {}, "processes": 2, "class_counts": {"ant": 3, "bee": 0, "cat": 4}}
    (run.path / "environment.json").write_text(json.dumps(counts))
    return Run(run.path)


def test_what_a_step_and_a_class_are(run) -> None:
    said = summary(changed(run, "step,train/loss,train/retention\n9,1,1\n399,1,1\n", accumulate_grad_batches=4))
    assert "on 7 pictures of 2 classes, in batches of 10, 2 of them from the memory bank" in said
    assert "memory bank, on each of 2 processes, 4 batches per step." in said
    assert "It ran all of its 400 steps." in said


def test_a_bank_that_was_not_used_is_not_told(run) -> None:
    said = summary(changed(run, "step,train/loss\n9,1\n399,1\n"))
    assert said.startswith("Full fine-tuning on 7 pictures")
    assert "memory bank" not in said


def test_the_logs_of_a_resumed_run_begin_where_it_was_resumed(run) -> None:
    assert "resumed" not in summary(changed(run, "step,train/loss\n9,1\n399,1\n"))
    assert "begin at step 210" in summary(changed(run, "step,train/loss\n209,1\n399,1\n"))


def test_epochs_may_have_ended_a_run(run) -> None:
    ended = changed(run, "step,train/loss\n9,1\n199,1\n", max_epochs=3)
    assert "The logs go to step 200." in summary(ended)
    assert not ended.stopped_early
    assert "It stopped at step 200 of 400" in summary(changed(run, "step,train/loss\n9,1\n199,1\n", max_epochs=-1))


def test_a_controlnet_needs_a_picture(run) -> None:
    run.content.pop("class_names")
    run.config["model"] = {"init_args": {"annotator": {"class_path": "Canny"}}}
    assert sample_command(run) == "difftune sample 'my photos' --controls PICTURE.jpg"
