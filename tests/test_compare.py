"""``difftune compare``: a small study, whole, interrupted, changed and misspelt."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import tiny_weights

from lightning_difftune.cli import compare, main
from lightning_difftune.cli.compare import work
from lightning_difftune.cli.compare.figures import bars_figure, by_step, curves_figure, gains_figure, sweep_figure
from lightning_difftune.cli.compare.jobs import read_jobs
from lightning_difftune.cli.compare.study import read_study
from lightning_difftune.cli.compare.table import comparison, line_of, machines, other_pictures, shown
from lightning_difftune.cli.tuned import averaged_weights
from lightning_difftune.errors import ConfigError
from lightning_difftune.locks import FolderLock

STEPS = 4
STUDY = {
    "output": "out",
    "seeds": [0, 1],
    "base": ["base.yaml"],
    "set": {
        "data.init_args.bank": "{output}/bank-seed{seed}",
        "trainer.callbacks+": [
            {"class_path": "lightning_difftune.callbacks.EWC", "init_args": {"every_n_steps": 2}},
            {
                "class_path": "lightning_difftune.callbacks.SuddenConvergence",
                "init_args": {"monitor": "val/loss", "threshold": 0.0},
            },
        ],
    },
    "evaluate": [{"class_path": "lightning_difftune.metrics.RecognisedDigits", "init_args": {"per_digit": 1}}],
    "metrics": {"fd_digit_classifier": "lower", "recognised": "higher"},
    "runs": {
        "plain": {"configs": ["presets/full.yaml"], "method": "Full", "group": "standard", "at": {"tau": 0}},
        "tuned": {
            "set": {"model.init_args.optimizer.init_args.lr": 0.002},
            "method": "Full",
            "group": "Diff-Tuning",
            "at": {"tau": 1},
            "against": "plain",
        },
    },
}


def write_study(folder, **changes):
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory):
    """Weights, pictures and a base config."""
    folder = tmp_path_factory.mktemp("ingredients")
    tiny_weights(folder, input_size=20, patch_size=10, num_classes=10)
    pictures = np.random.default_rng(0).integers(0, 256, (20, 20, 20), dtype=np.uint8)
    for number, pixels in enumerate(pictures):
        path = folder / "pictures" / f"class{number % 10}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    target = {"class_path": "lightning_difftune.data.ImageFolder", "init_args": {"root": str(folder / "pictures")}}
    features = {"class_path": "lightning_difftune.metrics.DigitClassifier"}
    base = {
        "model": {
            "class_path": "lightning_difftune.DiTDiffTuningModule",
            "init_args": {
                "model": str(folder / "tiny.safetensors"),
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
                "sampler": {"num_inference_steps": 2},
            },
        },
        "data": {
            "class_path": "lightning_difftune.MemoryBankDataModule",
            "init_args": {
                "target": target,
                "val_target": target,
                "num_classes": 10,
                "image_size": 20,
                "channels": 1,
                "bank_size": 10,
                "batch_size": 5,
            },
        },
        "trainer": {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "devices": 1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "elsewhere"}},
            "callbacks": [
                {"class_path": "lightning_difftune.callbacks.EMA", "init_args": {"decay": 0.9}},
                {
                    "class_path": "lightning_difftune.callbacks.FID",
                    "init_args": {"num_samples": 20, "feature_extractor": features},
                },
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
            ],
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    return folder


def start_here(folder):
    """Do a run in this process, to be quick; returns an exit status."""
    (folder / "log.txt").touch()
    try:
        work.work(folder)
    except Killed:
        return -9
    return 0


@pytest.fixture(scope="module")
def undisturbed(ingredients, tmp_path_factory):
    """The output of the whole study."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "base.yaml").write_bytes((ingredients / "base.yaml").read_bytes())
    write_study(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(compare, "start_process", start_here)
        assert main(["compare", "study.yaml", "--run"]) == 0
    return folder / "out"


@pytest.fixture
def project(ingredients, tmp_path, monkeypatch):
    """A folder with the study, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_bytes((ingredients / "base.yaml").read_bytes())
    write_study(tmp_path)
    monkeypatch.setattr(compare, "start_process", start_here)
    return tmp_path


@pytest.fixture
def finished(project, undisturbed):
    """The same with the whole study done."""
    shutil.copytree(undisturbed, project / "out")
    return project


def undo(*names):
    """Remove runs of a finished study, with their results."""
    for name in names:
        Path(f"out/results/{name}.json").unlink()
        shutil.rmtree(f"out/runs/{name}")


class Killed(BaseException):
    """In place of a signal."""


def result(name):
    return json.loads(Path(f"out/results/{name}.json").read_text())


def table(path="out/table.csv"):
    """The rows of a table without the times."""
    with open(path) as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.012345], "0.01235"),
        ([2056.4], "2,056"),
        ([9999.7], "10,000"),
        ([18_499.2], "18,499"),
        ([1000.0, 1300.0], "1,150 ± 212"),
        ([1.0, 1.1], "1.050 ± 0.071"),
        ([90.0], "90.00"),
        ([0.0], "0.000"),
    ],
)
def test_large_numbers_are_not_in_powers_of_ten(values, text):
    assert shown(values) == text


def test_a_study_interrupted_and_resumed_is_the_undisturbed_one(finished, undisturbed, monkeypatch, capsys):
    undo("tuned-seed0", "tuned-seed1")
    before = Path("out/results/plain-seed0.json").read_bytes()
    with monkeypatch.context() as patch:

        def die(self, trainer, pl_module, *args):
            if trainer.global_step == 3 and "tuned-seed0" in trainer.default_root_dir:
                raise Killed

        patch.setattr(work.RunRecord, "on_train_batch_end", die)
        capsys.readouterr()
        assert main(["compare", "study.yaml", "--run"]) == 2
    told = capsys.readouterr()
    assert "2/4 tuned-seed0: failed with exit status -9" in told.out
    assert "4/4 tuned-seed1: 4 steps" in told.out, "one failure does not end the study"
    assert "1 of 4 runs failed: tuned-seed0." in told.err
    assert not Path("out/results/tuned-seed0.json").exists()

    assert main(["compare", "study.yaml", "--dry_run"]) == 0
    assert re.search(r"plain-seed0: finished\ntuned-seed0: resumes from .*last\.ckpt\n", capsys.readouterr().out)
    assert main(["compare", "study.yaml", "--run"]) == 0
    assert "1/4 plain-seed0: finished before" in capsys.readouterr().out
    assert Path("out/results/plain-seed0.json").read_bytes() == before
    assert table() == table(undisturbed / "table.csv")
    whole = json.loads((undisturbed / "results/tuned-seed0.json").read_text())
    assert result("tuned-seed0")["history"] == whole["history"]
    assert not Path("elsewhere").exists(), "loggers write into the folders of the runs"


@pytest.mark.parametrize(
    "command",
    [
        "report {run}",
        "export {run} --output {out}/model",
        "sample {run} --classes class3 --output {out}/samples",
        "swap {run} --percents 0 50 --num_samples 4 --output {out}/swap",
    ],
)
def test_a_run_of_a_study_is_a_run_for_other_commands(undisturbed, tmp_path, monkeypatch, command):
    monkeypatch.chdir(undisturbed.parent)
    words = command.format(run=undisturbed / "runs" / "plain-seed0", out=tmp_path).split()
    assert main(words) == 0


def test_nothing_is_started_without_being_asked(project, capsys):
    assert main(["compare", "study.yaml"]) == 0
    said = capsys.readouterr().out
    assert "plain-seed0: to do" in said
    assert "Nothing was started. Add --run to start 4 runs, one after the other, in out." in said
    assert not Path("out").exists()


def test_a_part_of_a_study_has_the_keys_of_its_first_document_and_folders_of_its_own(project, capsys):
    text = Path("study.yaml").read_text()
    Path("parts.yaml").write_text(f"{text}\n---\npart: seven\nseeds: [7]\n---\npart: two\n---\npart: two\n")
    assert main(["compare", "parts.yaml", "--part", "seven", "--dry_run"]) == 0
    assert capsys.readouterr().out == "plain-seed7: to do\ntuned-seed7: to do\n"
    first, part = read_study(Path("parts.yaml")), read_study(Path("parts.yaml"), "seven")
    assert first == replace(read_study(Path("study.yaml")), path=Path("parts.yaml"), title="Parts")
    assert (part.output, part.kept) == (first.output / "seven", first.kept / "seven")
    assert main(["compare", "parts.yaml", "--part", "lr", "--dry_run"]) == 2
    assert "parts.yaml has 0 parts 'lr'; its parts are seven, two, two." in capsys.readouterr().err
    assert main(["compare", "parts.yaml", "--part", "two", "--dry_run"]) == 2
    assert "parts.yaml has 2 parts 'two'" in capsys.readouterr().err
    Path("parts.yaml").write_text(f"{text}\n---\nseeds: [7]\n")
    assert main(["compare", "parts.yaml", "--part", "seven", "--dry_run"]) == 2
    assert "parts.yaml: part is missing. Give a name such as lr" in capsys.readouterr().err


def test_two_processes_divide_the_runs(finished, undisturbed, capsys):
    undo("plain-seed0", "tuned-seed0")
    Path("out/runs/tuned-seed0").mkdir()
    at_work = FolderLock(Path("out/runs/tuned-seed0"))  # of another process
    at_work.acquire(waits=False)
    left = Path("out/runs/tuned-seed0/.metrics.csv.7-ab.tmp")  # that it is writing
    left.touch()
    assert main(["compare", "study.yaml", "--run"]) == 0
    told = capsys.readouterr().out
    assert "2/4 tuned-seed0: another process is doing it" in told
    assert "3 of 4 results in" in told
    assert left.exists()
    assert main(["compare", "study.yaml", "--only", "tuned", "--seeds", "0", "--run"]) == 0
    assert capsys.readouterr().out == "1/1 tuned-seed0: another process is doing it\n", "and there is nothing to report"
    at_work.release()
    assert main(["compare", "study.yaml", "--run"]) == 0
    assert table() == table(undisturbed / "table.csv")
    assert not left.exists()


def test_what_a_result_holds(project, ingredients):
    assert main(["compare", "study.yaml", "--seeds", "1", "--only", "tuned", "--run"]) == 0
    found = result("tuned-seed1")
    steps = [[step for step, _ in points] for points in found["history"].values()]
    assert steps == [[2, 4]] * len(steps)
    assert {"val/loss", "fd_digit_classifier", "ewc/total", "ewc/mean"} <= found["history"].keys()
    assert found["values"]["fd_digit_classifier"] == found["history"]["fd_digit_classifier"][-1][1]
    assert 0 <= found["values"]["recognised"] <= 1
    assert found["sudden_convergence"][0]["monitor"] == "val/loss"
    assert found["trainable_parameters"] == 14_968
    assert (found["seed"], found["steps"]) == (1, STEPS)
    assert found["fit_seconds"] > 0
    assert {"torch", "lightning_difftune"} <= found["versions"].keys()
    assert (found["pictures"]["pictures"], found["pictures"]["held_out"][0]) == (20, 20)
    weights = ingredients / "tiny.safetensors"
    assert found["files"] == {str(weights): sha256(weights.read_bytes()).hexdigest()}
    assert found["threads"] == torch.get_num_threads()
    with Image.open("out/runs/tuned-seed1/samples.png") as grid:
        assert grid.size == (10 * 22 + 2, 10 * 22 + 2)
        first_row = np.asarray(grid.convert("RGB"))[:24]
    with Image.open("out/samples.png") as sheet:  # one row for each run, behind its name
        assert sheet.height == 24
        assert (np.asarray(sheet)[:, -222:] == first_row).all()
    assert [path.name for path in Path("out").glob("bank*")] == ["bank-seed1"]
    (row,) = table()
    assert (row["run"], row["seeds"], row["fd_digit_classifier std"], row["change"]) == ("tuned", "1", "", "")


def test_a_part_of_a_study_is_run_and_all_of_it_is_reported(project, capsys):
    assert main(["compare", "study.yaml", "--only", "plain", "--seeds", "0", "7", "--run"]) == 0
    assert "2 of 6 results in out/results" in capsys.readouterr().out, "of two runs, seeds 0, 1 and 7"
    assert [(row["run"], row["seeds"]) for row in table()] == [("plain", "0 7")]
    assert [path.name for path in sorted(Path("out/figures").iterdir())] == ["curves.png", "curves.svg"]
    assert main(["compare", "study.yaml", "--only", "tuned", "--seeds", "0", "--run"]) == 0
    rows = table()
    assert [(row["run"], row["seeds"]) for row in rows] == [("plain", "0 7"), ("tuned", "0")]
    plain, tuned = (result(f"{run}-seed0")["values"]["fd_digit_classifier"] for run in ("plain", "tuned"))
    assert float(rows[1]["change"]) == pytest.approx(tuned / plain - 1), "over the seed that both have"


def test_report_draws_again_from_the_results_alone(finished, monkeypatch, capsys):
    figures = ["curves.png", "curves.svg", "ewc.png", "ewc.svg", "final.png", "final.svg", "sweep.png", "sweep.svg"]
    assert sorted(path.name for path in Path("out/figures").iterdir()) == figures
    assert "<svg" in Path("out/figures/sweep.svg").read_text()
    with Image.open("out/figures/curves.png") as picture:
        assert np.asarray(picture).std() > 5, "something is drawn"
    sheet = Path("out/samples.png").read_bytes()
    outputs = [Path("out/table.csv"), Path("out/table.md"), *Path("out/figures").iterdir()]
    written = {path: path.read_bytes() for path in outputs}
    for path in outputs:
        path.unlink()
    shutil.rmtree("out/runs")
    monkeypatch.delattr(compare, "start_process")
    capsys.readouterr()
    assert main(["compare", "study.yaml", "--report"]) == 0
    assert {path: path.read_bytes() for path in outputs} == written
    assert Path("out/samples.png").read_bytes() == sheet, "the samples were deleted with the runs"
    assert "4 of 4 results in out/results" in capsys.readouterr().out


def test_results_may_be_kept_apart_from_the_runs(finished, monkeypatch, capsys):
    write_study(finished, results="kept")
    shutil.copytree("out/results", "kept/results")
    shutil.rmtree("out")
    monkeypatch.delattr(compare, "start_process")
    assert main(["compare", "study.yaml", "--run"]) == 0, "all runs are finished"
    assert "4 of 4 results in kept/results" in capsys.readouterr().out
    assert sorted(path.name for path in Path("kept").iterdir()) == ["results", "table.csv", "table.md"]  # no sheet
    assert [path.name for path in Path("out").glob("[!.]*")] == ["figures"]
    assert main(["compare", "study.yaml", "--output", "elsewhere", "--dry_run"]) == 0
    assert "plain-seed0: to do" in capsys.readouterr().out


def test_placeholders_stand_for_folders_and_the_seed(project):
    bank = {"data.init_args.bank": "{results}/{output}/{run}/{seed}"}
    write_study(project, results="kept", set={**STUDY["set"], **bank})
    study = read_study(Path("study.yaml"))
    (job,) = read_jobs(study, [(study.runs["tuned"], 1)], study.output, study.kept)
    assert job.filled(job.settings)["data"]["init_args"]["bank"] == "kept/out/out/runs/tuned-seed1/1"


def test_placeholders_in_an_evaluator_stand_for_the_same(project, monkeypatch):
    entry = {"class_path": "my.Evaluator", "init_args": {"file": "{run}/samples.npz"}}
    write_study(project, evaluate=[entry], seeds=[0])
    monkeypatch.setattr(compare, "start_process", lambda folder: (folder / "log.txt").touch())
    assert main(["compare", "study.yaml", "--only", "tuned", "--run"]) == 2
    order = json.loads(Path("out/runs/tuned-seed0/job.json").read_text())
    assert order["evaluate"][0]["init_args"]["file"] == "out/runs/tuned-seed0/samples.npz"
    assert order["identity"]["evaluate"] == [entry], "which stays the same where the study is moved"


class Sharpness:
    """An evaluator."""


class Colour:
    """Another one."""


def test_values_of_one_name_are_kept_apart_by_what_measured_them():
    measured = [{"fid": 7.0, "precision": 0.1}, {"precision": 0.2, "recall": torch.tensor(0.3)}, {"hue": np.float32(1)}]
    values = work.final_values(
        {"fid": [(2, 9.0)], "loss": [(2, 3.0), (4, 2.0)]}, [Sharpness(), Sharpness(), Colour()], measured
    )
    assert values == {
        "loss": 2.0,
        "fid": 7.0,  # not the curve's, of fewer samples
        "Sharpness-1/precision": 0.1,
        "Sharpness-2/precision": 0.2,
        "recall": pytest.approx(0.3),
        "hue": 1.0,
    }
    assert json.loads(json.dumps(values)) == values


def test_bars_leave_out_runs_that_measured_none_of_it(project):
    study = read_study(Path("study.yaml"))
    rest = {"seed": 0, "history": {}, "sudden_convergence": [], "trainable_parameters": 1, "fit_seconds": 1.0}
    results = {
        run: {**rest, "values": values}
        for run, values in {"plain": {"recognised": 0.2}, "tuned": {"recognised": 0.5, "ewc/total": 3.0}}.items()
    }
    lines = [line_of(study.runs[run], [result]) for run, result in results.items()]
    distances, shares = (bars_figure(study, lines, {metric: metric}).axes[0] for metric in ("ewc/total", "recognised"))
    assert [text.get_text() for text in distances.texts] == ["3.00"]
    assert [text.get_text() for text in shares.texts] == ["0.200", "0.500"]
    assert [text.get_text() for text in distances.get_legend().get_texts()] == ["Diff-Tuning"]


def lines_of(study, **values):
    """The lines of a study whose runs measured values of its main metric, one per seed."""
    main_metric = next(iter(study.metrics))
    rest = {"sudden_convergence": [], "trainable_parameters": 1, "fit_seconds": 1.0}
    results = [
        (
            study.runs[run],
            {
                "name": run,
                "seed": seed,
                "values": dict.fromkeys(study.metrics, value),
                "history": {main_metric: [(1, value)]},
                **rest,
            },
        )
        for run, found in values.items()
        for seed, value in enumerate(found)
    ]
    return comparison(study, results)


def test_a_rise_of_a_negative_value_is_a_rise(project):
    _, tuned = lines_of(read_study(Path("study.yaml")), plain=[-0.06, -0.02], tuned=[-0.03, -0.03])
    assert tuned.change == pytest.approx(0.25)


def test_a_value_that_is_no_number_is_not_the_best(project):
    study = read_study(Path("study.yaml"))
    history = {"fd_digit_classifier": [(1, float("nan")), (2, 5.0), (3, 4.0)]}
    values = {"fd_digit_classifier": 4.0, "recognised": 0.5}
    rest = {"sudden_convergence": [], "trainable_parameters": 1, "fit_seconds": 1.0, "name": "plain", "seed": 0}
    (line,) = comparison(study, [(study.runs["plain"], {"values": values, "history": history, **rest})])
    assert line.best == (4.0,)


def test_a_gain_over_nothing_is_left_out_of_its_figure(project):
    write_study(project, gain_over=["recognised"])
    study = read_study(Path("study.yaml"))
    (axes,) = gains_figure(study, lines_of(study, plain=[0.0, 2.0], tuned=[1.0, 3.0]), "fd_digit_classifier").axes
    assert axes.lines[0].get_ydata().tolist() == [0.5]


@pytest.mark.parametrize("at", [{}, {"tau": 1}])
def test_runs_of_one_method_and_group_have_curves_of_their_own(project, at):
    write_study(project, runs={name: {"method": "LoRA", "at": at} for name in ("small", "large", "huge")})
    study = read_study(Path("study.yaml"))
    (axes,) = curves_figure(study, lines_of(study, small=[1.0], large=[2.0], huge=[3.0]), "fd_digit_classifier").axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1.0], [2.0], [3.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()][1:] == ["large", "huge"]


@pytest.mark.parametrize(
    ("runs", "titles", "labels"),
    [
        ({"a": ("LoRA", "alone", ""), "b": ("LoRA", "with", "a")}, ["LoRA"], [["alone", "with"]]),
        ({"a": ("Full", "9", ""), "b": ("DT", "9", "a"), "c": ("Own", "9", "a")}, ["9"], [["Full", "DT", "Own"]]),
        ({"a": ("Full", "100", ""), "b": ("DT", "200", "a")}, ["a"], [["Full", "DT"]]),
        ({"a": ("a", "9", ""), "b": ("b", "9", "a"), "c": ("c", "9", "b")}, ["9", "b"], [["a", "b"], ["b", "c"]]),
        ({"a": ("Full", "100", ""), "b": ("Full", "200", "")}, ["Full"], [["100", "200"]]),
        ({"a": ("Full", "", "b"), "b": ("DT", "", "a")}, ["a", "b"], [["Full", "DT"], ["Full", "DT"]]),
    ],
    ids=["one method", "one group", "neither", "a chain", "compared with nothing", "with each other"],
)
def test_runs_that_are_compared_have_one_panel(project, runs, titles, labels):
    keys = ("method", "group", "against")
    write_study(project, runs={name: dict(zip(keys, values, strict=True)) for name, values in runs.items()})
    study = read_study(Path("study.yaml"))
    lines = lines_of(study, **{name: [1.0] for name in runs})
    axes = [axis for axis in curves_figure(study, lines, "fd_digit_classifier").axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in axes] == titles
    assert [[text.get_text() for text in axis.get_legend().get_texts()] for axis in axes] == labels


def test_runs_that_differ_in_a_second_quantity_are_no_zigzag_over_the_first(project):
    runs = {"small": {"at": {"rank": 1}}, "large": {"at": {"rank": 2}}, "alpha": {"at": {"rank": 2}}}
    write_study(project, runs={name: {**run, "method": "LoRA"} for name, run in runs.items()}, metrics={"fd": "lower"})
    study = read_study(Path("study.yaml"))
    (axes,) = sweep_figure(study, lines_of(study, small=[1.0], large=[2.0], alpha=[3.0]), ["rank"]).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[1.0, 1.0], [2.0, 2.0]], [[2.0, 3.0]]]


def test_results_of_different_machines_are_said():
    gpu = {"hardware": "NVIDIA H200", "versions": {"torch": "2.9.0", "lightning_difftune": "0.1.0"}}
    cpu = {**gpu, "hardware": "x86_64 CPU"}
    assert machines([{"name": "plain-seed0", **gpu}, {"name": "tuned-seed0", **gpu}]) == ""
    note = machines([{"name": "plain-seed0", **gpu}, {"name": "tuned-seed0", **cpu}])
    assert "NVIDIA H200, torch 2.9.0, lightning_difftune 0.1.0 (plain-seed0); x86_64 CPU, torch" in note


def test_pictures_that_changed_between_runs_are_said():
    def made(name, root="flowers", **pictures):
        data = {"init_args": {"target": {"init_args": {"root": root}}}}
        return {"name": name, "seed": 0, "identity": {"settings": {"data": data}}, "pictures": pictures}

    first = made("plain-seed0", pictures=20, content="a")
    assert other_pictures([first, {**first, "name": "tuned-seed0"}, made("others-seed0", "birds", pictures=7)]) == ""
    note = other_pictures([first, made("tuned-seed0", pictures=24, content="b")])
    assert note.endswith("is not of the settings alone: 20 (plain-seed0), 24 (tuned-seed0).")


def test_runs_are_done_in_the_order_in_which_they_are_asked_for(project, capsys):
    assert main(["compare", "study.yaml", "--only", "tuned", "plain", "--seeds", "0", "--dry_run"]) == 0
    assert re.findall(r"\w+-seed0", capsys.readouterr().out) == ["tuned-seed0", "plain-seed0"]


def test_callbacks_of_two_runs_that_write_to_one_folder_are_refused(project, capsys):
    grid = {"class_path": "lightning_difftune.callbacks.SampleGrid", "init_args": {"dirpath": "{output}/grids"}}
    write_study(project, set={"trainer.callbacks+": [grid]})
    assert main(["compare", "study.yaml", "--dry_run"]) == 2
    said = capsys.readouterr().err
    assert "plain-seed0 and tuned-seed0 would write to one folder, out/grids" in said
    grid["init_args"]["dirpath"] = "{run}/grids"
    write_study(project, set={"trainer.callbacks+": [grid]})
    assert main(["compare", "study.yaml", "--dry_run"]) == 0


def test_two_runs_of_one_name_are_refused(project):
    text = Path("study.yaml").read_text()
    Path("study.yaml").write_text(text.replace("  plain:\n", "  tuned:\n"))
    with pytest.raises(ConfigError, match="the key 'tuned' is there twice, in lines"):
        read_study(Path("study.yaml"))


def test_curves_have_the_steps_that_all_seeds_have():
    ended, longer, not_begun = [(10, 1.0), (20, 2.0)], [(10, 3.0), (20, 4.0), (30, 9.0)], []
    assert by_step([ended, longer, not_begun]) == [(10.0, [1.0, 3.0]), (20.0, [2.0, 4.0])]
    assert by_step([not_begun]) == []


def test_the_table_has_means_spreads_and_changes(finished):
    plain, tuned = table()
    values = {run: [result(f"{run}-seed{seed}")["values"]["ewc/total"] for seed in (0, 1)] for run in STUDY["runs"]}
    distances = {
        run: [result(f"{run}-seed{seed}")["values"]["fd_digit_classifier"] for seed in (0, 1)] for run in STUDY["runs"]
    }
    for row in (plain, tuned):
        assert float(row["ewc/total mean"]) == pytest.approx(np.mean(values[row["run"]]))
        assert float(row["ewc/total std"]) == pytest.approx(np.std(values[row["run"]], ddof=1))
    change = np.mean(distances["tuned"]) / np.mean(distances["plain"]) - 1
    assert (plain["change"], float(tuned["change"])) == ("", pytest.approx(change))
    markdown = Path("out/table.md").read_text().splitlines()
    assert markdown[0].startswith(
        "| run | method | group | fd_digit_classifier ↓ | recognised ↑ | change | best over the steps | "
        "change of the best | val/loss at 0: step | ewc/total |"
    )
    assert f"| tuned | Full | Diff-Tuning | {np.mean(distances['tuned']):.4g} ± " in markdown[3]
    assert f"| {change:+.1%} |" in markdown[3]


def test_the_table_has_each_run_at_its_best_over_the_steps(finished, capsys):
    curves = {
        "plain": ([[2, 5.0], [4, 6.0]], [[2, 9.0], [4, 7.0]]),
        "tuned": ([[2, 3.0], [4, 4.0]], [[2, 8.0], [4, 6.0]]),
    }
    for run, by_seed in curves.items():
        for seed, history in enumerate(by_seed):
            found = result(f"{run}-seed{seed}")
            found["history"]["fd_digit_classifier"] = history
            Path(f"out/results/{run}-seed{seed}.json").write_text(json.dumps(found))
    assert main(["compare", "study.yaml", "--report"]) == 0
    assert [float(row["best mean"]) for row in table()] == [6.0, 4.5]
    assert float(table()[1]["best change"]) == pytest.approx(9 / 12 - 1)
    assert "| 4.500 ± 2.1 | -25.0% |" in Path("out/table.md").read_text()


def test_a_figure_shows_the_gain_over_a_metric_of_the_run_without(finished):
    write_study(finished, gain_over=["recognised"])
    for run in STUDY["runs"]:
        for seed in (0, 1):
            found = result(f"{run}-seed{seed}")
            found["values"] |= {"fd_digit_classifier": 4.0 if run == "plain" else 3.0 + seed, "recognised": seed / 2}
            Path(f"out/results/{run}-seed{seed}.json").write_text(json.dumps(found))
    study = read_study(Path("study.yaml"))
    results = [(study.runs[run], result(f"{run}-seed{seed}")) for run in STUDY["runs"] for seed in (0, 1)]
    lines = comparison(study, results)
    (axes,) = gains_figure(study, lines, "fd_digit_classifier").axes
    by_seed, mean = (line.get_xydata().tolist() for line in axes.lines[:2])
    assert (by_seed, mean) == ([[0.0, -0.25], [0.5, 0.0]], [[0.25, -0.125]])
    assert main(["compare", "study.yaml", "--report"]) == 0
    assert Path("out/figures/gains.png").exists()
    write_study(finished)
    assert main(["compare", "study.yaml", "--report"]) == 0
    assert not list(Path("out/figures").glob("gains.*")), "it is of the study as it was"


def test_the_table_has_the_steps_of_convergence(finished, capsys):
    assert [row["val/loss at 0 steps"] for row in table()] == ["2 2", "2 2"]
    for seed, step in enumerate((None, 1500)):
        found = result(f"tuned-seed{seed}")
        found["sudden_convergence"][0]["step"] = step
        Path(f"out/results/tuned-seed{seed}.json").write_text(json.dumps(found))
    assert main(["compare", "study.yaml", "--report"]) == 0
    heads, _, plain, tuned = (row.split(" | ") for row in Path("out/table.md").read_text().splitlines())
    column = heads.index("val/loss at 0: step")
    assert (plain[column], tuned[column]) == ("2 / 2", "not reached / 1,500")
    assert "not reached / 1,500" in capsys.readouterr().out


def test_results_that_could_not_be_kept_are_refused_before_the_runs(project, capsys):
    Path("kept").touch()
    write_study(project, results="kept/results")
    assert main(["compare", "study.yaml", "--run"]) == 2
    assert "kept/results cannot be written, since" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_changed_config_is_refused_or_repeated(finished, capsys):
    only = ["compare", "study.yaml", "--seeds", "0", "--only", "plain"]
    before = Path("out/results/plain-seed0.json").read_bytes()
    write_study(finished, set={**STUDY["set"], "model.init_args.label_dropout": 0.5})
    capsys.readouterr()
    assert main(only) == 2
    said = capsys.readouterr().err
    assert "plain-seed0 in out was made with another config: model.init_args.label_dropout was None, is 0.5." in said
    assert "--rerun_changed" in said
    assert Path("out/results/plain-seed0.json").read_bytes() == before
    assert main([*only, "--dry_run"]) == 0
    assert "plain-seed0: changed: model.init_args.label_dropout was None, is 0.5" in capsys.readouterr().out
    assert main([*only, "--rerun_changed"]) == 0
    assert result("plain-seed0")["identity"]["settings"]["model"]["init_args"]["label_dropout"] == 0.5
    assert main(only) == 0


def test_results_of_a_file_that_was_replaced_are_not_added_to(finished, ingredients, capsys):
    path, weights = Path("out/results/plain-seed0.json"), str(ingredients / "tiny.safetensors")
    path.write_text(json.dumps(result("plain-seed0") | {"files": {weights: "of others", "not/here.npz": "0"}}))
    assert main(["compare", "study.yaml", "--run"]) == 2
    assert f"plain-seed0 in out was made with another config: {weights} has another content." in capsys.readouterr().err


def test_results_of_other_random_streams_are_not_added_to(finished, capsys):
    path = Path("out/results/plain-seed0.json")
    before = {key: value for key, value in result("plain-seed0").items() if key != "draws"}  # as of version 1
    path.write_text(json.dumps(before))
    assert main(["compare", "study.yaml", "--run"]) == 2
    assert "plain-seed0 in out was made with another config: version of the random streams was 1, is 2." in (
        capsys.readouterr().err
    )
    assert json.loads(path.read_text()) == before
    assert main(["compare", "study.yaml", "--report"]) == 0, "what is kept can be read"
    assert main(["compare", "study.yaml", "--rerun_changed"]) == 0
    assert result("plain-seed0")["draws"] == 2


def test_labels_and_output_are_not_part_of_what_is_run(finished, capsys):
    runs = {"plain": {**STUDY["runs"]["plain"], "method": "Everything", "at": {}}}
    write_study(finished, title="Another title", runs=runs, output="moved")
    Path("out").rename("moved")
    capsys.readouterr()
    assert main(["compare", "study.yaml", "--seeds", "0", "--run"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert table("moved/table.csv")[0]["method"] == "Everything"


def test_a_run_in_a_process_of_its_own_that_fails_says_why(project, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(project)
    runs = {"broken": {"set": {"data.init_args.target.init_args.root": "nowhere"}}, "whole": {}}
    write_study(project, runs=runs, seeds=[0])
    assert main(["compare", "study.yaml", "--run"]) == 2
    told = capsys.readouterr()
    assert "1/2 broken-seed0: failed with exit status 2; difftune: the image folder nowhere does not exist" in told.out
    assert "2/2 whole-seed0: 4 steps" in told.out
    assert "1 of 2 runs failed: broken-seed0. The reason is at the end of out/runs/broken-seed0/log.txt" in told.err
    assert [row["run"] for row in table()] == ["whole"]


def test_what_an_evaluator_could_not_measure_is_said_before_the_training(project, capsys):
    held_out = [{"class_path": "lightning_difftune.metrics.HeldOutLoss", "init_args": {"num_samples": 4}}]
    alone = {"data.init_args.val_target": None, "trainer.callbacks": None}
    write_study(project, evaluate=held_out, runs={"alone": {"set": alone}}, seeds=[0])
    assert main(["compare", "study.yaml", "--run"]) == 2
    assert "There are no held-out pictures to compare generated ones with" in capsys.readouterr().err
    assert not list(Path("out/runs/alone-seed0").rglob("*.ckpt"))
    assert not list(Path("out/runs/alone-seed0").rglob("metrics.csv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": "x"}, r"study.yaml: outputs is not a key of a study file. Did you mean output\?"),
        ({"output": None}, "study.yaml: output is missing. Give a folder"),
        ({"seeds": [0, 0]}, r"seeds is \[0, 0\]. Give different whole numbers"),
        ({"seeds": "0"}, "seeds is '0'. Give a list of numbers"),
        ({"base": ["nowhere.yaml"]}, "base names nowhere.yaml, which is not a file. Give a list of config files"),
        ({"metrics": {"fid": "small"}}, "metrics.fid is 'small'. Say which is better: lower or higher"),
        ({"metrics": {}}, "metrics is empty"),
        ({"runs": {}}, "runs names no run"),
        ({"runs": {"a/b": {}}}, "runs.a/b has the name 'a/b'. Names become file names"),
        ({"runs": {"a": {"config": []}}}, r"runs.a.config is not a key of a study file. Did you mean configs\?"),
        ({"runs": {"a": {"configs": ["x.yaml"]}}}, "runs.a.configs names x.yaml, which is not a file"),
        ({"runs": {"a": {"at": {"tau": "one"}}}}, "runs.a.at gives tau the value 'one'. Give a number"),
        (
            {"gain_over": ["fd"]},
            "gain_over names 'fd', which metrics does not. Choose from fd_digit_classifier, recognised",
        ),
        ({"runs": {"a": {"against": "b"}}}, "runs.a.against is 'b', which is not a run of this study. Choose from a"),
        ({"runs": {"a": ["x.yaml"]}}, r"runs.a is \['x.yaml'\]. Give a mapping with configs"),
        ({"evaluate": ["RecognisedDigits"]}, "evaluate is .*class_path"),
        ({"runs": {"a": {"set": {"trainer.maximum": 5}}}}, "study.yaml: runs.a cannot be run. .*trainer.maximum"),
        ({"runs": {"a": {"set": {"trainer.max_steps": "x"}}}}, "study.yaml: runs.a cannot be run. .*max_steps"),
    ],
)
def test_mistakes_in_a_study_file(project, capsys, changes, message):
    write_study(project, **changes)
    assert main(["compare", "study.yaml", "--run"]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said, re.DOTALL), said
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none.yaml"], "There is no study file none.yaml"),
        (["base.yaml"], "base.yaml: data is not a key of a study file"),
        (["study.yaml", "--only", "full"], "study.yaml has no run 'full'; its runs are plain, tuned"),
        (["study.yaml", "--seeds", "0", "0"], "--seeds is [0, 0]. Give different whole numbers from 0"),
        (["study.yaml", "--report", "--only", "plain"], "--report shows all results. Leave out --only and --seeds."),
        (["study.yaml", "--report"], "out/results has no result of study.yaml to report"),
    ],
)
def test_mistakes_in_the_command(project, capsys, args, message):
    assert main(["compare", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_finished_run_is_measured_in_eval_mode():
    """Dropout of a network of one's own would be in its samples."""
    model = torch.nn.Sequential(torch.nn.Dropout())
    with averaged_weights(SimpleNamespace(model=model.train(), trainer=SimpleNamespace(callbacks=[]))):
        assert not any(part.training for part in model.modules())
