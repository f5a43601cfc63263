"""The advice of `difftune report`: each rule where it applies, and close to where it does."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_difftune.cli.facts import summary
from lightning_difftune.cli.lightning import ConfigReader
from lightning_difftune.cli.report import page, panels
from lightning_difftune.cli.report.advice import RULES, advise
from lightning_difftune.cli.run import Run


def make_run(folder, metrics, *, trainer=None, model=None, data=None, callbacks=(), environment=None):
    """A run's folder with these logs, {name: values at steps 0, 10, 20, ..}."""
    length = max(map(len, metrics.values()))
    lines = [",".join(["step", *metrics])]
    for i in range(length):
        cells = (repr(values[i]) if i < len(values) else "" for values in metrics.values())
        lines.append(",".join([str(10 * i), *cells]))
    (folder / "metrics.csv").write_text("\n".join([*lines, ""]))
    steps = {"max_steps": 10 * (length - 1) + 1, "log_every_n_steps": 10}
    config = {
        "trainer": {**steps, "callbacks": list(callbacks), **(trainer or {})},
        "model": {"init_args": model or {}},
        "data": {"init_args": data or {}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"scores": SCORES, **(environment or {})}))
    return Run(folder)


FLAT = {"train/loss": [1.0] * 12, "train/retention": [1.0, 1.1] * 6, "fid": [9.0, 5.0, 4.0, 4.0, 4.0]}
SCORES = {
    "fid": {"higher_is_better": False, "label": "FID", "num_samples": 10_000, "num_features": 2048},
    "control/ssim": {"higher_is_better": True, "label": "How well controls are followed (BlurredSSIM)"},
}


def test_nothing_to_say(tmp_path):
    run = make_run(tmp_path, FLAT)
    assert advise(run) == []
    assert f"{len(RULES)} rules looked at them" in page(run)


def test_a_controlnets_convergence_is_a_sentence_not_a_curve(tmp_path):
    logged = {"control/ssim": [0.1, 0.2, 0.5], "sudden_convergence/leap": [0.3]}
    logged |= {"sudden_convergence/leap_start_step": [10.0], "sudden_convergence/leap_end_step": [20.0]}
    run = make_run(tmp_path, logged)
    assert "Its largest leap is 0.3, from step 10 to 20." in summary(run)
    assert [panel.title for panel in panels(run)] == ["control/ssim"]
    converged = make_run(tmp_path, {**logged, "sudden_convergence/step": [1800.0]})
    assert "It converged suddenly at step 1,800." in summary(converged)


@pytest.mark.parametrize(
    ("changes", "said", "evidence"),
    [
        ({"train/loss": [1.0] * 6 + [float("nan")] * 6}, "Lower the learning rate", "6 of 12 steps, first at step 60"),
        (
            {"train/loss": [0.16, 0.14, 0.49, 1.01, 0.94] + [0.2, 0.16] * 6},
            "diverged",
            "to 1.01 at step 30",
        ),
        (
            {"train/loss": [0.16, 0.14, 0.17] + [1.0, 0.98] * 6},
            "Lower the learning rate",
            "until step 20 was 0.16. It ends",
        ),
        ({"fid": [9.0, 8.0, 7.0, 6.0, 5.0]}, "Train longer", "5 at step 40: 17% better"),
        ({"fid": [9.0, 4.0, 4.1, 4.3, 4.5]}, "Stop earlier", "best at step 10, 4, and is 4.5 at step 40"),
        ({"control/ssim": [0.1, 0.4, 0.3]}, "mode='max'", "best at step 10, 0.4, and is 0.3"),
        ({"train/retention": [1.0, 1.1] * 2 + [1.3] * 4 + [1.5, 1.6] * 2}, "Retain more", "from 1.05"),
        (
            {"train/reconsolidation": [float(9 - i / 2) for i in range(12)], "val/loss": [3.0, 2.0, 2.5, 2.9]},
            "memorising",
            "from 2 at step 10 to 2.9 at step 30",
        ),
    ],
)
def test_advice_from_the_curves(tmp_path, changes, said, evidence):
    (advice,) = advise(make_run(tmp_path, {**FLAT, **changes}))
    assert said in advice.what
    assert evidence in advice.evidence


@pytest.mark.parametrize(("limit", "count"), [(1, 0), (0.5, 0), (1.0, 1), (None, 1)])
def test_the_loss_of_a_few_held_out_pictures_shows_no_memorising(tmp_path, limit, count):
    curves = {"train/reconsolidation": [float(9 - i / 2) for i in range(12)], "val/loss": [3.0, 2.0, 2.5, 2.9]}
    run = make_run(tmp_path, {**FLAT, **curves}, trainer={"limit_val_batches": limit})
    assert sum("memorising" in advice.what for advice in advise(run)) == count


@pytest.mark.parametrize(
    "losses",
    [
        [0.15, 0.14, 0.9] + [0.15, 0.16] * 6,  # a batch of unlucky timesteps
        [1.1, 0.9, 0.5, 0.3, 0.2] + [0.15, 0.25] * 6,  # training from scratch
        [0.01, 0.2, 0.03, 0.02, 0.3, 0.01, 0.4, 0.5] + [0.02, 0.3] * 6,  # batches of four
    ],
)
def test_noise_is_not_a_leap(tmp_path, losses):
    assert advise(make_run(tmp_path, {**FLAT, "train/loss": losses})) == []


def test_noise_is_not_a_rise(tmp_path):
    """Losses that scatter by more than they rise give no advice."""
    noisy = [1.0, 3.0, 0.2, 2.0, 1.0, 1.0, 1.0, 1.0, 0.3, 3.5, 0.4, 3.0]
    assert advise(make_run(tmp_path, {**FLAT, "train/retention": noisy})) == []


def test_advice_from_what_else_there_is(tmp_path):
    run = make_run(
        tmp_path,
        {"train/loss": [1.0] * 12},
        trainer={"max_steps": 500},
        environment={"class_counts": {"a": 3, "b": 40, "c": 0}},
    )
    unfinished, few, unmeasured = advise(run)
    assert "every_n_train_steps" in unfinished.what
    assert "step 111 of 500" in unfinished.evidence
    assert few.evidence.startswith("1 of 3 classes")
    assert "SampleGrid" in unmeasured.what
    (advice,) = advise(make_run(tmp_path, FLAT, environment={"scores": {"fid": {**SCORES["fid"], "num_samples": 400}}}))
    assert "400 pictures" in advice.evidence


def test_advised_options_are_options(tmp_path):
    """The options that the page suggests can be parsed."""
    base = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
    schedule = tmp_path / "forgetting" / "schedule.json"
    schedule.parent.mkdir()
    schedule.write_text("{}")
    falling = {"fid": [9.0, 8.0, 7.0, 6.0, 5.0], "train/retention": [1.0, 1.1] * 4 + [1.5, 1.6] * 4}
    run = make_run(
        tmp_path,
        {**FLAT, **falling},
        trainer={"max_steps": 151},
        model={"lr_scheduler": {"init_args": {"total_steps": 151}}},
        data={"retention_share": 0.2},
    )
    commands = [advice.command for advice in advise(run)]
    assert len(commands) == 3
    options = shlex.split(" ".join(commands).replace("\\\n", " "))
    composed = yaml.safe_load(ConfigReader().compose(["--config", str(base), *options]))
    assert composed["trainer"]["max_steps"] == 302
    assert composed["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] == 302
    assert composed["data"]["init_args"]["retention_share"] == pytest.approx(0.3)
    assert composed["model"]["init_args"]["objective"]["init_args"]["schedule"] == {
        "class_path": "lightning_difftune.MeasuredSchedule",
        "init_args": {"path": str(schedule)},
    }


CALLBACKS = "lightning_difftune.callbacks."


@pytest.mark.parametrize(
    ("metrics", "settings", "said", "not_said"),
    [
        # nothing looked at pictures, since no validation came: the run has the callback that the advice would name
        (
            {"train/loss": [1.0] * 9},
            {"callbacks": [{"class_path": f"{CALLBACKS}SampleGrid"}], "trainer": {"val_check_interval": 500}},
            "SampleGrid look at pictures then, and did not get to it",
            "callbacks+=",
        ),
        (
            {"train/loss": [1.0] * 20 + [30.0, 40.0] + [1.0] * 9},
            {"trainer": {"gradient_clip_val": 1.0}},
            "Lower the learning rate: the run diverged",
            "clip gradients",
        ),
        ({"train/loss": [1.0, float("nan")]}, {}, "Lower the learning rate.", "16-mixed"),
        (
            {"train/loss": [1.0] * 12, "fid": [9.0, 4.0, 8.0]},
            {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "fid"}}]},
            "Stop earlier, or lower the learning rate.",
            "keeps the best",
        ),
        (
            {"train/reconsolidation": [3.0 - 0.1 * i for i in range(12)], "val/loss": [1.0, 0.9, 1.2, 1.5]},
            {"model": {"tuner": {"class_path": "lightning_difftune.tuners.LoRA"}}},
            "Train fewer steps, or add pictures",
            "such as LoRA",
        ),
        (
            {"train/loss": [1.0] * 12},
            {
                "trainer": {"max_steps": 1000},
                "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 500}}],
            },
            "more often than every 500 steps",
            "ModelCheckpoint",
        ),
    ],
)
def test_what_the_config_has_is_not_proposed(metrics, settings, said, not_said, tmp_path):
    found = advise(make_run(tmp_path, metrics, **settings))
    text = " ".join(f"{advice.what} {advice.evidence} {advice.command}" for advice in found)
    assert said in text
    assert not_said not in text


@pytest.mark.parametrize("values", [1, 2])
def test_two_validations_are_too_few_to_judge(values, tmp_path):
    run = make_run(tmp_path, {"train/loss": [1.0] * 12, "fid": [4.0] * values, "val/loss": [1.0] * values})
    (advice,) = [advice for advice in advise(run) if "too few" in advice.what]
    assert ("twice" if values == 2 else "once") in advice.evidence
    assert advice.command == "--trainer.val_check_interval 13"
    assert "Nothing in the logs asks for a change" not in page(run)
