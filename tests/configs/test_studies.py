"""The studies of `difftune compare`; the command itself is tested in tests/test_compare.py."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml
from config_files import CONFIGS, arguments, files_of
from tiny_data import make_small_photos, make_small_source, make_tiny_imagenet

from lightning_difftune.cli import main
from lightning_difftune.cli.compare.jobs import read_jobs
from lightning_difftune.cli.compare.study import read_study
from lightning_difftune.cli.compare.table import comparison
from lightning_difftune.cli.compare.work import evaluators
from lightning_difftune.cli.lightning import ConfigReader, run_lightning
from lightning_difftune.models import export_dit, load_dit
from lightning_difftune.schedules import fit_schedule


@pytest.fixture(scope="module", autouse=True)
def data(workplace: Path) -> None:
    """Small photos, and a source that was trained here; the digits come with a dependency."""
    (workplace / "data").mkdir()
    make_small_photos(workplace / "data", each=20)
    make_small_source(workplace)
    make_tiny_imagenet(workplace / "data", 200)
    (workplace / "runs/pretrain-longer").mkdir(parents=True)
    export_dit(load_dit("dit-nano-imagenet"), workplace / "runs/pretrain-longer/source.safetensors")


def leave_measured_schedule(config: dict[str, Any], output: Path, kept: Path) -> None:
    """What the forgetting meter of a run writes, for the run of its study that trains with it."""
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith(".ForgettingMeter"):
            folder = Path(callback["init_args"]["dirpath"])
            assert folder.is_relative_to(output) or folder.is_relative_to(kept)
            fit_schedule(folder / "schedule.json", [0.25, 0.75], [1.0, 1.0], [1.0, 0.5])


PARTS = [
    (file, document.get("part"))
    for file in files_of("studies")
    for document in yaml.safe_load_all((CONFIGS.parent / file).read_text())
]


def shape(tree: Any) -> Any:
    """A config without its numbers and paths: two of one shape give the same arguments to the same classes."""
    if isinstance(tree, dict):
        return tuple((key, shape(value)) for key, value in sorted(tree.items()))
    if isinstance(tree, list):
        return tuple(map(shape, tree))
    return type(tree) if isinstance(tree, float | int) or "/" in str(tree) else tree


def parts(config: dict[str, Any]) -> set[Any]:
    """The shapes of the model as a whole, and of every argument of the data module and of the trainer."""
    arguments = config["data"]["init_args"] | config["trainer"]
    return {shape(config["model"]), *((name, shape(value)) for name, value in arguments.items())}


instantiated: set[Any] = set()  # the parts of all studies' configs so far


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command and the test compose the same configs."""
    compose, known = ConfigReader.compose, dict[tuple[str, ...], str]()

    def remembered(reader: ConfigReader, args: list[str]) -> str:
        if (key := tuple(args)) not in known:
            known[key] = compose(reader, args)
        return known[key]

    monkeypatch.setattr(ConfigReader, "compose", remembered)


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(("file", "part"), PARTS)
def test_every_study_is_listed_by_its_own_command_and_its_runs_are_instantiated(
    file: str, part: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = arguments(file)
    assert args[:2] == ["compare", file]
    assert main([*args, *([] if part is None else ["--part", part]), "--dry_run"]) == 0
    study = read_study(Path(file), part)
    listed = capsys.readouterr().out.splitlines()
    assert listed == [f"{run}-seed{seed}: to do" for seed in study.seeds for run in study.runs]
    assert len(evaluators(list(study.evaluators))) == len(study.evaluators)
    different = {(run.configs, *run.settings): run for run in study.runs.values()}  # but for values such as a rate
    for job in read_jobs(study, [(run, 0) for run in different.values()], study.output, study.kept):
        config = job.filled(job.settings)
        leave_measured_schedule(config, study.output, study.kept)
        if parts(config) <= instantiated:
            continue
        instantiated.update(parts(config))
        if "bank_source" in config["data"]["init_args"]:
            config["data"]["init_args"]["bank_size"] = 3  # as there are characters here
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        cli = run_lightning(["--config", str(tmp_path / "run.yaml")], run=False)
        cli.model.configure_model()
        if cli.model.lr_scheduler is not None:
            assert cli.model.lr_scheduler.keywords.get("total_steps", -1) in (-1, cli.trainer.max_steps)
        assert cli.trainer.max_steps % cli.trainer.val_check_interval == 0, "the last step is validated"


KEPT = sorted(path.parent.relative_to(CONFIGS.parent) for path in (CONFIGS.parent / "results").rglob("table.csv"))


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_the_kept_table_of_a_study_is_of_all_its_kept_results(kept: Path) -> None:
    name, *part = kept.parts[1:]
    study, folder = read_study(CONFIGS / "studies" / f"{name}.yaml", *part), CONFIGS.parent / kept
    assert study.kept == kept
    with (folder / "table.csv").open() as file:
        listed = {f"{row['run']}-seed{seed}" for row in csv.DictReader(file) for seed in row["seeds"].split()}
    assert listed == {path.stem for path in (folder / "results").glob("*.json")}


def test_the_page_of_the_study_has_the_figures_of_the_kept_results() -> None:
    page = (CONFIGS.parent / "docs/study.md").read_text()
    study = read_study(CONFIGS / "studies/digits_forgetting.yaml")
    files = [CONFIGS.parent / study.kept / f"results/{run}-seed{seed}.json" for run in study.runs for seed in range(4)]
    results = [(study.runs[path.stem[:-6]], json.loads(path.read_text())) for path in files if path.exists()]
    for line in comparison(study, results):
        bins = (0, 100, 200, 300, 500, 700, 800, 900)
        gaps = [100 * fmean(line.values[f"held_out_gap/t{first:03d}"]) for first in bins]
        told = [f"{gap:+.0f} %" if first == 900 else f"{gap:+.1f} %" for first, gap in zip(bins, gaps, strict=True)]
        distances = line.values["fd_digit_classifier"]
        told.append(f"{fmean(distances):.2f}" + (f" ± {stdev(distances):.2f}" if len(distances) > 1 else ""))
        told[-1] += "" if line.change is None else f" ({100 * line.change:+.0f} %)"
        name = f"{line.run.group}: Full" if line.run.method == "Full" else line.run.method
        assert f"| {name} | {' | '.join(told)} |" in page.replace("*", ""), line.run.name


def test_the_page_of_the_study_has_the_kept_results_of_the_larger_source() -> None:
    page = (CONFIGS.parent / "docs/study.md").read_text()
    study = read_study(CONFIGS / "studies/photos32.yaml")
    files = [CONFIGS.parent / study.kept / f"results/{run}-seed{seed}.json" for run in study.runs for seed in range(4)]
    results = [(study.runs[path.stem[:-6]], json.loads(path.read_text())) for path in files if path.exists()]
    for line in comparison(study, results):
        means = {name: fmean(values) for name, values in line.values.items()}
        gaps = {first: 100 * means[f"held_out_gap/t{first:03d}"] for first in (0, 100, 200, 300, 500, 700, 800, 900)}
        told = [f"{gap:+.0f} %" if first == 900 or abs(gap) > 20 else f"{gap:+.1f} %" for first, gap in gaps.items()]
        distances = line.values["fd_efficientnet_lite0"]
        told.append(f"{fmean(distances):.1f}" + (f" ± {stdev(distances):.1f}" if len(distances) > 1 else ""))
        told[-1] += "" if line.change is None else f" ({100 * line.change:+.1f} %)"
        told.append(f"{means['precision']:.2f} / {means['recall']:.3f}")
        assert f" | {' | '.join(told)} |" in page, (line.run.name, told)


GUIDED = {  # rows of the page's table of guidance, and the run that each is compared with
    "102 flowers: Full": ("full-102", "full-102"),
    "102 flowers: Diff-Tuning": ("dt-102", "full-102"),
    "102 flowers: Self-teacher": ("self-teacher-102", "full-102"),
    "510 flowers: Full": ("full-510", "full-510"),
    "2,040 flowers: Full": ("full", "full"),
    "101 of Caltech-101: Full": ("full-caltech", "full-caltech"),
    "101 of Caltech-101: Diff-Tuning": ("dt-caltech", "full-caltech"),
    "101 of Caltech-101: Self-teacher": ("self-teacher-caltech", "full-caltech"),
}


@pytest.mark.parametrize("row", GUIDED)
def test_the_page_of_the_study_has_the_kept_figures_of_guidance(row: str) -> None:
    folder, page = CONFIGS.parent / "results/photos_forgetting", (CONFIGS.parent / "docs/study.md").read_text()
    guided = json.loads((folder / "guidance.json").read_text())["results"]
    run, other = (f"{name}-seed0" for name in GUIDED[row])
    plain = {name: json.loads((folder / f"results/{name}.json").read_text())["values"] for name in (run, other)}
    whole = plain[other]["fd_efficientnet_lite0"]
    cells = []
    for scale in ("1", "1.5", "2", "1.5 domain", "2 domain"):
        distance = (plain[run] if scale == "1.5" else guided[run][scale])["fd_efficientnet_lite0"]
        cells.append(f"{distance:.1f}" + (f" ({100 * (distance / whole - 1):+.1f} %)" if distance != whole else ""))
    assert f"| {row} | {' | '.join(cells)} |" in page.replace("*", "")


def swapped(file: str) -> dict[str, list[float]]:
    """Each model's distances by the share that the pre-trained model does, of a table that ``difftune swap`` wrote."""
    found: dict[str, list[float]] = {}
    with (CONFIGS.parent / "results" / file).open() as rows:
        for row in csv.DictReader(rows):
            found.setdefault(row["model"], []).append(float(row["fd_efficientnet_lite0"]))
    return found


def test_the_page_of_the_study_has_the_kept_distances_of_swaps() -> None:
    page = (CONFIGS.parent / "docs/study.md").read_text()
    kept = swapped("photos_forgetting/swap/102.csv") | swapped("photos_forgetting/swap/102-self-teacher.csv")
    for name, row in (("full", "Full"), ("diff-tuning", "Diff-Tuning"), ("self-teacher", "Self-teacher")):
        cells = [
            f"{ours:.1f}" + ("" if name == "full" else f" ({100 * (ours / full - 1):+.1f} %)")
            for ours, full in zip(kept[name], kept["full"], strict=True)
        ]
        assert f"| {row} | {' | '.join(cells)} |" in page
    cells = [f"{distance:.1f}" for distance in swapped("photos_forgetting/swap/102-tail-full.csv")["diff-tuning"]]
    assert f"| Diff-Tuning, the steps left to Full instead | {' | '.join(cells)} |" in page
    for name, curve in swapped("photos32/swap/102.csv").items():
        first, *rest = curve
        row = name.replace("-seed", ", seed ").replace("full", "Full").replace("diff-tuning", "Diff-Tuning")
        cells = [f"{first:.1f}", *(f"{distance:.1f} ({100 * (distance / first - 1):+.1f} %)" for distance in rest)]
        assert f"| {row} | {' | '.join(cells)} |" in page


@pytest.mark.parametrize(("row", "run"), [("ControlNet", "controlnet"), ("with Diff-Tuning", "controlnet-dt")])
def test_the_page_of_the_study_has_the_kept_steps_of_convergence(row: str, run: str) -> None:
    folder, page = CONFIGS.parent / "results/controlnet_flowers/convergence/results", CONFIGS.parent / "docs/study.md"
    results = [json.loads((folder / f"{run}-seed{seed}.json").read_text()) for seed in range(4)]
    curves = [result["history"]["control/ssim"] for result in results]
    told = []
    for threshold in (0.3, 0.35, 0.38, 0.4):
        steps = [next(step for step, value in curve if value >= threshold) for curve in curves]
        told.append(", ".join(f"{step:,}" for step in steps))
    assert told[-1] == ", ".join(f"{result['sudden_convergence'][0]['step']:,}" for result in results)
    told.append(", ".join(f"{fmean(value for step, value in curve if step <= 1300):.3f}" for curve in curves))
    assert f"| {row} | {' | '.join(told)} |" in page.read_text()


FEW = {  # runs of few parameters, and the row of the page's tables without and with Diff-Tuning
    "difffit-102": "DiffFit, 102 photos",
    "difffit": "DiffFit, 2,040 photos",
    "lora-102": "LoRA, 102 photos",
    "lora": "LoRA, 2,040 photos",
}


@pytest.mark.parametrize("without", FEW)
def test_the_page_of_the_study_has_the_kept_figures_of_few_parameters(without: str) -> None:
    folder, page = CONFIGS.parent / "results/photos_forgetting/few_parameters", CONFIGS.parent / "docs/study.md"
    method, _, photos = without.partition("-")
    runs = {without: FEW[without], "-".join(filter(None, (method, "dt", photos))): "with Diff-Tuning"}
    kept = {
        run: [json.loads(path.read_text())["values"] for path in sorted((folder / "results").glob(f"{run}-seed*.json"))]
        for run in runs
    }
    distance = {run: fmean(values["fd_efficientnet_lite0"] for values in kept[run]) for run in runs}
    guided, text = json.loads((folder / "guidance.json").read_text())["results"], page.read_text().replace("*", "")
    first = kept[without][0]["fd_efficientnet_lite0"]
    for run, name in runs.items():
        bins = (0, 100, 200, 300, 500, 700, 800, 900)
        gaps = [100 * fmean(values[f"held_out_gap/t{first:03d}"] for values in kept[run]) for first in bins]
        told = [f"{gap:+.0f} %" if first == 900 else f"{gap:+.1f} %" for first, gap in zip(bins, gaps, strict=True)]
        spread = stdev(values["fd_efficientnet_lite0"] for values in kept[run])
        change = "" if run == without else f" ({100 * (distance[run] / distance[without] - 1):+.1f} %)"
        told.append(f"{distance[run]:.1f} ± {spread:.1f}{change}")
        precision, recall = (fmean(values[name] for values in kept[run]) for name in ("precision", "recall"))
        told.append(f"{precision:.2f} / {recall:.3f}")
        assert f"| {name} | {' | '.join(told)} |" in text, run
        scales = {"1.5": kept[run][0], **guided[f"{run}-seed0"]}
        cells = []
        for scale in ("1", "1.5", "1.5 domain"):
            value = scales[scale]["fd_efficientnet_lite0"]
            is_first = run == without and scale == "1.5"
            cells.append(f"{value:.1f}" + ("" if is_first else f" ({100 * (value / first - 1):+.1f} %)"))
        assert f"| {name} | {' | '.join(cells)} |" in text, run
