"""The README and the tasks' pages, walked through as a stranger would: every command, from the first to the last.

Each page's commands run in a folder of their own with a few small photos, on the CPU with the bundled models. After
``difftune init`` the config that it wrote is made short: a few steps, samples and pictures.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_difftune.cli import main
from lightning_difftune.cli.plan import duration

ROOT = Path(__file__).parents[1]
PAGES = {  # what each page's commands find in their folder
    "README.md": "photos",
    "docs/tasks/photos.md": "photos",
    "docs/tasks/captions.md": "captioned",
    "docs/tasks/controlnet.md": "photos",
    "docs/tasks/several-gpus.md": "photos",
    "docs/tasks/after-the-run.md": "photos",
}
NEEDS_A_RUN = {"docs/tasks/several-gpus.md": 1, "docs/tasks/after-the-run.md": 2}  # commands of photos.md before it
ELSEWHERE = {"git", "pip", "make"}  # what installs; CI runs them
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


def commands(page: str) -> list[str]:
    """The lines of the page's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def make_pictures(name: str) -> None:
    """Three classes of twelve JPEGs, or twenty pictures with captions."""
    random = np.random.RandomState(0)
    names = ("lily", "oxeye_daisy", "rose")
    for number in range(36 if name == "photos" else 20):
        folder = Path(name, names[number // 12]) if name == "photos" else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{number % 12 if name == 'photos' else number}.jpg"
        colours = random.randint(256, size=(4, 5, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((50, 40), Image.Resampling.BICUBIC).save(file)
        if name == "captioned":
            file.with_suffix(".txt").write_text(f"a photo of a {names[number % 3]}")


def shorten(file: Path) -> None:
    text = file.read_text()
    for pattern, short in SHORT.items():
        text = re.sub(pattern, short, text)
    assert "max_steps: 4\n" in text, "the run would take minutes"
    file.write_text(text)


def run(line: str) -> None:
    """One command, as it stands on the page."""
    program, *args = shlex.split(line, comments=True)
    if program in ELSEWHERE:
        return
    assert program == "difftune", line
    if args[0] == "sample":
        args += ["--steps", "2"] if "--steps" not in args else []
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


@pytest.fixture
def walk(tmp_path, monkeypatch, capsys):
    """Runs a page's commands in order, and gives what each printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", None)  # nothing asks
    monkeypatch.setattr("lightning_difftune.cli.plan.speed.timed", lambda run, device, least: 0.01)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def through(page: str) -> dict[str, str]:
        make_pictures(PAGES[page])
        printed = {}
        for line in commands("docs/tasks/photos.md")[1 : 1 + NEEDS_A_RUN.get(page, 0)] + commands(page):
            run(line)
            said = capsys.readouterr()
            printed[line] = said.out + said.err
        return printed

    return through


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/tasks/photos.md"])
def test_every_command_of_a_page_runs(page: str, walk) -> None:
    printed = walk(page)
    assert printed


def test_my_photos_from_a_folder_to_a_page_in_a_browser(walk, tmp_path) -> None:
    printed = walk("docs/tasks/photos.md")
    said = {line.split("#")[0].strip(): text for line, text in printed.items()}
    assert "Next: difftune fit --config my.yaml" in said["difftune init photos"]
    last = said["difftune fit --config my.yaml"].strip().splitlines()
    assert [line.split()[0] for line in last[-7:-3]] == ["Run", "Checkpoint", "Metrics", "Pictures"]
    assert "difftune report runs/photos" in last[-3]
    assert "difftune export runs/photos" in said["difftune sample runs/photos --classes rose --num_samples 8"]
    (report,) = Path("runs/photos").rglob("report.html")
    assert {"model_index.json", "README.md"} <= {file.name for file in Path("my-dit").iterdir()}
    grid = Image.open("runs/samples/grid.png")
    assert grid.width > 8 * 96
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
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
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
    lines = [line for page in pages for line in commands(page) if line.startswith("difftune plan --device h100 ")]
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
    make_pictures("photos")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    for task in ([], ["--captions"], ["--control", "canny"]):
        assert main(["init", "photos", *task, "--overwrite", "--no_plan"]) == 0
        config = yaml.safe_load(Path("my.yaml").read_text())
        assert config["trainer"]["precision"] == "bf16-mixed"
        assert config["data"]["init_args"]["num_workers"] == 4
