"""Runs the README and every page of the documentation as a new user would: all commands, first to last.

Pages that continue each other share a folder with a few small photos, on the CPU with the bundled models. What is put
behind a command so that it takes seconds is in :data:`SHORTER`; what cannot be here, why, and what is run in its place
is in :data:`INSTEAD` and :data:`ELSEWHERE`. The code of the pages runs in the same folders.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
import yaml
from PIL import Image

from lightning_difftune.cli import main
from lightning_difftune.cli.compare.study import read_study
from lightning_difftune.cli.plan import duration
from lightning_difftune.data import NpzImages
from lightning_difftune.schedules import fit_schedule

ROOT = Path(__file__).parents[1]
WALKS = {  # pages that are read one after the other, in one folder
    "readme": ("README.md",),
    "photos": (
        *("docs/tasks/photos.md", "docs/tasks/after-the-run.md", "docs/reliability.md", "docs/migration.md"),
        "docs/tasks/several-gpus.md",  # last: what is resumed after it would be on two processes
    ),
    "captions": ("docs/tasks/captions.md",),
    "controlnet": ("docs/tasks/controlnet.md",),
    "base models": ("docs/tasks/base-models.md",),
    "quickstart": ("docs/index.md", "docs/tasks/look-inside.md", "docs/performance.md"),
    "study": ("docs/study.md",),
    "code": ("docs/api/index.md", "docs/tasks/own-data.md", "docs/tasks/own-family.md", "docs/tasks/own-model.md"),
}
ELSEWHERE = {  # programs that are not run here
    "git": "there is no repository to clone",
    "pip": "installs; tests/test_packaging.py installs the wheel",
    "make": "runs these tests",
    "pre-commit": "installs a hook into the repository",
}
OF_THE_TABLE = "difftune plan --device h100 "  # test_the_readmes_table_is_what_plan_says runs these
SHORT = {  # values in the configs that init writes
    r"max_steps: \d+": "max_steps: 4\n  enable_progress_bar: false",
    r"val_check_interval: \d+": "val_check_interval: 2",
    r"every_n_train_steps: \d+": "every_n_train_steps: 2",
    r"log_every_n_steps: \d+": "log_every_n_steps: 1",
    r"bank_size: \d+": "bank_size: 20",
    r"num_inference_steps: \d+": "num_inference_steps: 2",
    r"num_samples: \d\d+": "num_samples: 8",
    r"batch_size: (20|32) ": "batch_size: 10 ",
}
DIGITS = """
trainer:
  max_steps: 4
  val_check_interval: 4
  log_every_n_steps: 1
  limit_val_batches: 2
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_difftune.callbacks.EMA
      init_args: {decay: 0.98, warmup: true}
    - class_path: lightning_difftune.callbacks.FID
      init_args: {num_samples: 20, feature_extractor: lightning_difftune.metrics.DigitClassifier}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {save_last: true, save_top_k: 0}
data: {init_args: {bank_size: 100, build_batch_size: 100, batch_size: 20}}
model:
  init_args:
    sampler: {init_args: {num_inference_steps: 2}}
    bank_sampler: {init_args: {num_inference_steps: 2}}
"""
TINY = (
    "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.log_every_n_steps 1 --trainer.precision 32-true "
    "--trainer.num_sanity_val_steps 0 --trainer.enable_progress_bar false --trainer.callbacks null "
    "--data.image_size 32 --data.bank_size 4 --data.build_batch_size 4 --data.num_workers 0 "
    "--model.sampler.num_inference_steps 2 --model.bank_sampler.num_inference_steps 2"
)
NANO_DIT = (
    f"--config configs/dit/folder.yaml {TINY} --model.model dit-nano-imagenet --model.autoencoder.source "
    "sd-nano-flowers --model.autoencoder.subfolder vae --model.autoencoder.scaling_factor 0.633"
)
FAMILY = f"{TINY} --model.image_size 32 --model.tuner.rank 4"
SHORTER = {  # commands, and what comes behind them (or in place of a config) here
    r"^difftune quickstart$": ("$", " --steps 4"),
    r"^difftune sample (?!.*(--steps|pretrained_tail))": ("$", " --steps 2"),
    r"^difftune sample .*pretrained_tail": ("$", " --model.sampler.num_inference_steps 10"),  # a tenth is one step
    r"^difftune fit --config configs/quickstart.yaml": (r"(quickstart\.yaml)", r"\1 --config digits.yaml"),
}
INSTEAD = {  # what cannot be here, why, and what is run in its place
    r"^difftune fit --config configs/dit/base.yaml(?!.*--print_config)": (
        *("DiT-XL/2 and data sets: a bundled DiT on the photos", "$", f" {NANO_DIT}"),
    ),
    r"^difftune fit --config configs/controlnet/base.yaml": (
        *("Stable Diffusion: the bundled pipeline", "$", f" {TINY} --model.model sd-nano-flowers"),
    ),
    r"^difftune fit --config configs/sdxl/base.yaml": (
        *("Stable Diffusion XL: a small pipeline of its class with random weights", "$"),
        f" {FAMILY} --model.model sdxl --trainer.default_root_dir runs/captioned --data.latent_cache sdxl-cache",
    ),
    r"^difftune fit --config configs/sd3/base.yaml": (
        *("Stable Diffusion 3.5: a small pipeline of its class with random weights", "$"),
        f" {FAMILY} --model.model sd3 --trainer.default_root_dir runs/sd3 --data.latent_cache sd3-cache",
    ),
    r"^difftune fit --config configs/flux/base.yaml": (
        *("FLUX.1: a small pipeline of its class with random weights", "$"),
        f" {FAMILY} --model.model flux --trainer.default_root_dir runs/flux --data.latent_cache flux-cache",
    ),
    r"^python benchmarks/": ("minutes to hours, or a GPU: its help", "$", " --help"),
    r"--trainer.devices 8 ": (
        "eight GPUs: two processes on the CPU",
        "devices 8",
        "devices 2 --trainer.accelerator cpu",
    ),
    r"^difftune swap runs/photos": ("runs of the study: its help", "$", " --help"),
    r"^difftune compare configs/studies/": (
        *("hours, and results of the repository: one of its runs is composed", r"--(run|report)\b", "--dry_run"),
    ),
}
HUB = {  # names on the hub in the pages' code, and settings of theirs: what is here in their place
    "stable-diffusion-v1-5/stable-diffusion-v1-5": str(ROOT / "lightning_difftune/models/weights/sd-nano-flowers"),
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "facebook/DiT-XL-2-256": "dit-nano-imagenet",
    "FrozenAutoencoder()": 'FrozenAutoencoder("sd-nano-flowers", subfolder="vae", scaling_factor=0.633)',
    "num_classes=12,\n": "num_classes=12, image_size=32, bank_size=10, batch_size=10,\n",
    "max_steps=24_000": "max_steps=2",
    'precision="bf16-mixed"': 'precision="32-true"',
    "SampleGrid()": "SampleGrid(8, at_start=False)",
}


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of a page."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(text) for _, text in found]


def commands(page: str) -> list[str]:
    """The lines of the page's bash blocks."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [re.sub(r" +", " ", line.partition(" #")[0].strip()) for line in lines if line and not line.startswith("#")]


def make_pictures() -> None:
    """Three classes of twelve JPEGs, the same divided, and twenty pictures with captions."""
    random = np.random.RandomState(0)
    names = ("lily", "oxeye_daisy", "rose")
    for number in range(36 + 20):
        colours = random.randint(256, size=(4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(colours).resize((50, 40), Image.Resampling.BICUBIC)
        file = (
            Path("photos", names[number % 3], f"{number // 3:03d}.jpg")
            if number < 36
            else Path("captioned", f"{number}.jpg")
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
        if number >= 36:
            file.with_suffix(".txt").write_text(f"a photo of a {names[number % 3]}")
    Path("data").mkdir()
    for place, target in (("pictures", "photos"), ("captioned", "captioned")):
        Path("data", place).symlink_to(Path(target).resolve())


def shorten(file: Path) -> None:
    text = file.read_text()
    for pattern, short in SHORT.items():
        text = re.sub(pattern, short, text)
    assert "max_steps: 4\n" in text, "the run would take minutes"
    file.write_text(text)


def here(line: str) -> str:
    """A command in its shortened form."""
    for pattern, (_, place, instead) in INSTEAD.items():
        if re.search(pattern, line):
            line = re.sub(place, instead, line, count=1)
    for pattern, (place, longer) in SHORTER.items():
        if re.search(pattern, line):
            line = re.sub(place, longer, line, count=1)
    if " --dry_run" in line and "--only" not in line:
        part = re.search(r" --part (\w+)", line)
        study = read_study(Path(line.split()[2]), part[1] if part else None)
        line += f" --only {next(iter(study.runs))} --seeds 0"
    return line


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command of a page."""
    program, *args = shlex.split(here(line))
    if program in ELSEWHERE or line.startswith(OF_THE_TABLE):
        return
    if program == "cp":
        shutil.copy(*args)
        return
    if program == "python":
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", args)
            patch.syspath_prepend(str(ROOT / "benchmarks"))
            if args[0] == "-c":
                exec(args[1], {})
                return
            with pytest.raises(SystemExit) as left:
                runpy.run_path(str(ROOT / args[0]), run_name="__main__")
            assert left.value.code == 0, line
        return
    assert program == "difftune", line
    if "--trainer.devices" in args:  # Lightning starts the second process by this one's command line
        entry = [sys.executable, "-m", "lightning_difftune", *args]
        done = subprocess.run(entry, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return
    try:
        status = main(args)
    except SystemExit as done:  # of --print_config
        status = done.code
    assert status == 0, line
    if args[0] == "init":
        output = args[args.index("--output") + 1] if "--output" in args else "my.yaml"
        if "dit-nano" in (text := Path(output).read_text()) or "sd-nano" in text:
            shorten(Path(output))


def run_code(code: str) -> dict[str, Any]:
    """A block of Python, with what is here in place of what is on the hub; gives its names."""
    for section in re.findall(r'^--8<-- "(.*)"$', code, re.MULTILINE):
        file, _, part = section.rpartition(":")
        inside = re.search(
            rf"^# --8<-- \[start:{part}\]\n(.*?)^# --8<-- \[end:{part}\]", (ROOT / file).read_text(), re.M | re.S
        )
        code = code.replace(f'--8<-- "{section}"', inside[1])
    for name, instead in HUB.items():
        code = code.replace(name, instead)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "page", "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def walk(tmp_path, monkeypatch, capsys):
    """Runs the commands and the code of pages in order, and gives what each command printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", None)  # nothing asks
    monkeypatch.setattr("lightning_difftune.cli.plan.phases.timed", lambda run, device, least: 0.01)
    for folder in ("configs", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    make_pictures()

    def through(*pages: str) -> dict[str, str]:
        printed = {}
        for page in pages:
            for line in commands(page):
                run(line, monkeypatch)
                said = capsys.readouterr()
                printed[line] = said.out + said.err
        return printed

    return through


def test_no_page_is_left_out() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    told = {str(page.relative_to(ROOT)) for page in pages if re.search(r"^ *```(bash|python)", page.read_text(), re.M)}
    assert told == {page for pages in WALKS.values() for page in pages}
    lines = [line for pages in WALKS.values() for page in pages for line in commands(page)]
    for pattern in (*INSTEAD, *SHORTER):
        assert any(re.search(pattern, line) for line in lines), f"{pattern} is on no page"


def test_the_readme(walk) -> None:
    assert walk(*WALKS["readme"])


def test_captions(walk) -> None:
    walk(*WALKS["captions"])
    (code,) = blocks("docs/tasks/captions.md", "python")
    names = run_code(code)
    assert names["pipeline"].unet is names["unet"]


def test_a_controlnet(walk) -> None:
    walk(*WALKS["controlnet"])
    (code,) = blocks("docs/tasks/controlnet.md", "python")
    names = run_code(code)
    assert names["pipeline"].controlnet is names["controlnet"]


def test_base_models(walk, tmp_path) -> None:
    for family in ("sdxl", "flux", "sd3"):
        getattr(pipelines, family)(tmp_path / family)
    walk(*WALKS["base models"])
    (code,) = blocks("docs/tasks/base-models.md", "python")
    assert run_code(code)["pipeline"].get_active_adapters()


def test_the_quickstart_and_a_look_inside(walk, monkeypatch) -> None:
    from lightning_difftune.cli.quickstart import digits, methods

    Path("digits.yaml").write_text(DIGITS)
    monkeypatch.setattr(digits, "COLUMNS", 10)
    whole = methods.run_lightning

    def shorter(args):
        config = args.index("--config") + 2
        return whole([*args[:config], "--config", "digits.yaml", *args[config:]])

    monkeypatch.setattr(methods, "run_lightning", shorter)
    Path("runs/forgetting").mkdir(parents=True)  # four steps improve nothing: the meter proposes no schedule
    fit_schedule("runs/forgetting/schedule.json", [0.25, 0.5, 1.0], [1.0, 1.0, 1.0], [1.0, 0.9, 0.5])
    walk(*WALKS["quickstart"])
    assert Path("runs/quickstart/report.png").is_file()
    assert Path("runs/swap/swap.png").is_file()
    (code,) = blocks("docs/tasks/look-inside.md", "python")
    assert torch.isfinite(run_code(code)["near_data"]).all()


def test_the_study(walk) -> None:
    """Its code packs other pictures than those of the downloads."""
    (code,) = [code for code in blocks("docs/study.md", "python") if "def pack" in code]
    pack = run_code(code.partition("flowers = ")[0])["pack"]  # the rest downloads both data sets
    photos = [(Image.new("RGB", (9, 8), (2 * label, 0, 90)), label) for label in range(102)]
    pack("data/oxford_flowers102_64.npz", photos, photos[:40], [str(label) for label in range(102)])
    assert len(NpzImages("data/oxford_flowers102_64.npz", "test")) == 40
    walk(*WALKS["study"])


def test_the_code_of_the_other_pages(walk, tmp_path) -> None:
    walk(*WALKS["code"])
    for page in WALKS["code"]:
        for code in blocks(page, "python"):
            run_code(code)


def test_my_photos_from_a_folder_to_a_page_in_a_browser(walk, tmp_path) -> None:
    printed = walk(*WALKS["photos"])
    said = printed
    assert "Next: difftune fit --config my.yaml" in said["difftune init photos"]
    last = said["difftune fit --config my.yaml"].strip().splitlines()
    assert [line.split()[0] for line in last[-7:-3]] == ["Run", "Checkpoint", "Metrics", "Pictures"]
    assert "difftune report runs/photos" in last[-3]
    assert "difftune export runs/photos" in said["difftune sample runs/photos --classes rose --num_samples 8"]
    (report,) = Path("runs/photos").rglob("report.html")
    assert {"model_index.json", "README.md"} <= {file.name for file in Path("my-dit").iterdir()}
    grid = Image.open("runs/samples/grid.png")
    assert grid.width > 8 * 96
    run_code(blocks("docs/tasks/after-the-run.md", "python")[0])
    for part in ("train", "val"):
        shutil.copytree("photos", f"whole/{part}")
    (code,) = blocks("docs/tasks/photos.md", "python")
    run_code(code.replace("photos/", "whole/"))
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium here (apt-get install chromium); all but the look at the page was tested")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    shot = [*options, "--screenshot=page.png", "--window-size=1200,1600", report.resolve().as_uri()]
    subprocess.run([browser, *shot], check=True, timeout=120, capture_output=True)
    pixels = np.asarray(Image.open("page.png").convert("L"))
    assert pixels.std() > 10, "the page is not blank"
    seen = [browser, *options, "--dump-dom", report.resolve().as_uri()]
    assert "What to try next" in subprocess.run(seen, check=True, timeout=120, capture_output=True, text=True).stdout


def test_the_ten_lines_run_as_they_stand(tmp_path) -> None:
    (code,) = blocks("README.md", "python")
    assert len([line for line in code.splitlines() if line]) <= 12
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits.safetensors").is_file()


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert text.count(b"\n") <= 180
    assert len(text) <= 12_000


def test_the_readmes_table_is_what_plan_says(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    pages = "docs/tasks/photos.md", "docs/tasks/base-models.md"
    lines = [line for page in pages for line in commands(page) if line.startswith(OF_THE_TABLE)]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("|") and " GB |" in line
    ]
    assert len(rows) == len(lines) == 7
    for line, (name, trained, config, memory, bank, training) in zip(lines, rows, strict=True):
        assert set(re.findall(r"\((configs/[^)]*)\)", config)) <= set(shlex.split(line))
        assert main([*shlex.split(line)[1:], "--json", str(tmp_path / "plan.json")]) == 0
        plan = json.loads((tmp_path / "plan.json").read_text())
        shown = duration(plan["phases"]["training"]["seconds"])
        assert f"{plan['memory_bytes'] / 1e9:.3g} GB" == memory, (name, trained)
        assert training.endswith(f", {shown}"), (name, trained)
        shown = duration(plan["phases"]["memory bank"]["seconds"])
        assert bank.endswith((f", {shown}", "the same")), (name, trained)


def test_what_init_writes_for_a_gpu_is_what_its_module_takes(tmp_path, monkeypatch) -> None:
    """All values have a meaning: nothing is left that only the short runs above would have hidden."""
    monkeypatch.chdir(tmp_path)
    make_pictures()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3))
    for task in ([], ["--captions"], ["--control", "canny"]):
        assert main(["init", "photos", *task, "--overwrite", "--no_plan"]) == 0
        config = yaml.safe_load(Path("my.yaml").read_text())
        assert config["trainer"]["precision"] == "bf16-mixed"
        assert config["data"]["init_args"]["num_workers"] == 2  # of three cores, as Lightning suggests
