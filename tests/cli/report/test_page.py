"""`difftune report`: a real short run, whole, killed and unreadable in parts, as a page that browsers take."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import html5lib
import numpy as np
import pytest
from PIL import Image

from lightning_difftune.cli import main
from lightning_difftune.cli.report import POINTS, gathered
from lightning_difftune.cli.run_files import read_metrics

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(finished, tmp_path / "version_0"))


def page_of(path):
    assert main(["report", str(path)]) == 0
    return (path / "report.html").read_text(encoding="utf-8")


def parsed(page):
    """The page as a tree; what an HTML parser calls an error fails."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)


def texts(tree, tag):
    return ["".join(element.itertext()) for element in tree.iter(tag)]


def test_whole_run(run):
    page = page_of(run)
    tree = parsed(page)
    text = " ".join("".join(tree.itertext()).split())
    assert "It ran all of its 8 steps." in text
    assert "15 pictures of 2 classes" in text
    assert "1 of 2 classes has fewer than 10 pictures; the smallest: b<ee> 3." in text
    (config,) = texts(tree, "pre")
    assert config == (run / "config.yaml").read_text()
    captions = texts(tree, "figcaption")
    compared = ["real pictures", "the base model, before the first step"]
    assert captions == [*compared, "step 1", "step 4", "step 7", "step 8"]
    for title in ("Training losses of both streams", "Loss on held-out pictures", "Learning rate"):
        assert title in page
    environment = json.loads((run / "environment.json").read_text())
    for value in (environment["versions"]["torch"], environment["hardware"], environment["started"]):
        assert value in text


def test_one_file_for_every_browser(run):
    page = page_of(run)
    tree = parsed(page)
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    links = [value for element in tree.iter() for name, value in element.attrib.items() if "href" in str(name)]
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe", page)
    sources = [element.get("src") for element in tree.iter("img")]
    assert all(source.startswith("data:image/") for source in sources)
    assert all(element.get("alt") for element in tree.iter("img"))
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_same_run_gives_same_page(run):
    assert page_of(run) == page_of(run)


def test_killed_half_way(run):
    """No environment, half a line of log, half a config and half a picture."""
    (run / "environment.json").unlink()
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    half = len(lines) // 2
    (run / "metrics.csv").write_text("".join(lines[:half]) + lines[half][:-4])
    picture = run / "samples" / "step-0000007.png"
    picture.write_bytes(picture.read_bytes()[:40])
    text = " ".join("".join(parsed(page_of(run)).itertext()).split())
    assert re.search(r"It stopped at step \d of 8, or is still running\.", text)
    assert "Resume the run where it stopped." in text
    assert "step 7: cannot be read" in text
    assert "no environment.json" in text


@pytest.mark.slow
def test_killed_for_real(finished, tmp_path):
    """A process that is killed while it trains leaves enough for a page."""
    root = tmp_path / "killed"
    config = str(finished.parents[2] / "run.yaml")
    saved = ["--trainer.default_root_dir", str(root), "--trainer.logger.init_args.save_dir", str(root)]
    command = [sys.executable, "-m", "lightning_difftune", "fit", "--config", config, *saved]
    process = subprocess.Popen([*command, "--trainer.max_steps", "100000"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(root.glob("lightning_logs/version_0/samples/*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert main(["report", str(root)]) == 0
    page = (root / "lightning_logs" / "version_0" / "report.html").read_text(encoding="utf-8")
    text = " ".join("".join(parsed(page).itertext()).split())
    assert "of 100,000, or is still running." in text
    assert "Resume the run where it stopped." in text


@pytest.mark.parametrize("lost", ["metrics.csv", "config.yaml", "samples", "checkpoints", "environment.json"])
def test_each_part_may_be_missing(run, lost):
    part = run / lost
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink()
    parsed(page_of(run))


def test_config_cut_off(run):
    (run / "config.yaml").write_text("trainer:\n  callbacks: [{\n")
    assert "callbacks: [{" in page_of(run)


def test_trainers_folder_means_its_latest_run(run, tmp_path, capsys):
    logs = tmp_path / "root" / "lightning_logs"
    shutil.copytree(run, logs / "version_0")
    latest = Path(shutil.copytree(run, logs / "version_1", copy_function=shutil.copy))
    shutil.copy(run / "config.yaml", tmp_path / "root")  # as a study leaves it
    assert main(["report", str(tmp_path / "root")]) == 0
    assert (latest / "report.html").is_file()
    assert str(latest) in capsys.readouterr().out


def test_other_folders_are_refused(run, tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["report", str(run), "--output", str(tmp_path / "file" / "r.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_half_a_line_of_the_log_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,a,b\n0,4,1.5,\n0,5,,nan\n,,3,\n0,6,0.1")
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["a"] == [(4, 1.5)]
    assert [step for step, _ in metrics["b"]] == [5]


@pytest.mark.parametrize("length", [1, POINTS, POINTS + 1, 5 * POINTS - 3])
def test_gathered_values_are_all_there(length):
    series = [(step, float(step**2)) for step in range(length)]
    points = gathered(series)
    assert len(points) <= POINTS
    assert [value for _, values in points for value in values] == [value for _, value in series]


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "paper"), [("dark", (20, 23, 27)), ("light", (255, 255, 255))])
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_headless_browser(run, tmp_path, scheme, paper, width):
    """The page needs no network, fits on a phone's screen, and has the system's colours."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed; `apt-get install chromium` brings one")
    page_of(run)
    size = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    probe = tmp_path / "probe.html"
    probe.write_text((run / "report.html").read_text(encoding="utf-8") + size, encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        f"--window-size={width},1500",
    ]

    def browse(what):
        return subprocess.run([browser, *options, what, probe.as_uri()], capture_output=True, timeout=120, check=True)

    page = browse("--dump-dom").stdout.decode()
    needed, there = map(int, re.search(r"<title>(\d+) of (\d+)", page).groups())
    assert needed <= there
    shot = tmp_path / "shot.png"
    browse(f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.array(image.convert("RGB"))
    assert tuple(pixels[2, 2]) == paper
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # something is drawn on it
