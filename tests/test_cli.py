"""The command line from a new user's view: its files and messages, and its errors on bad input."""

from __future__ import annotations

import errno
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from huggingface_hub import constants
from jsonargparse import dict_to_namespace
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_dit, write_pictures

import lightning_difftune
from lightning_difftune import MemoryBank, MemoryBankDataModule, TextToImageDiffTuningModule, __version__
from lightning_difftune.cli import COMMANDS, HELP, KEYS, OWN, export, main, sample
from lightning_difftune.cli.arguments import CommandParser
from lightning_difftune.cli.lightning import ConfigReader, expand_home
from lightning_difftune.data import folders
from lightning_difftune.errors import DataError
from lightning_difftune.models import export_dit

CONFIGS = Path(__file__).parents[1] / "configs"

FIT = ("fit", "--config", "run.yaml")
VALIDATE = ("validate", "--config", "run.yaml")
PREDICT = ("predict", "--config", "run.yaml")
MODEL, DATA, TRAINER = "--model.init_args.", "--data.init_args.", "--trainer."
TAU = (f"{MODEL}objective.schedule", "lightning_difftune.PowerSchedule", f"{MODEL}objective.schedule.init_args.tau")


def write_weights(path, seed=0, input_size=8):
    return export_dit(tiny_dit(seed, input_size=input_size), path)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with weights, pictures and a config, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_weights(tmp_path / "tiny.safetensors")
    write_pictures(tmp_path / "pictures", 12, shape=(10, 9))
    objective = {"class_path": "lightning_difftune.DiffTuningObjective"}
    config = tiny_config(
        model={"objective": objective, "sampler": {"num_inference_steps": 2}},
        data={"bank": "bank", "bank_size": 10, "batch_size": 5},
        trainer={"max_steps": 4, "default_root_dir": "run", "log_every_n_steps": 1},
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def checkpoint(project):
    """The checkpoint of a finished run."""
    assert main(FIT) == 0
    return only(project.glob("run/lightning_logs/version_0/checkpoints/*.ckpt"))


def only(paths):
    (path,) = paths
    return path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(project, capsys):
    """Runs a command that must fail with a reason; no existing file may change."""

    def run(args, message):
        before = contents(project)
        capsys.readouterr()
        status = main(args)
        captured = capsys.readouterr()
        after = contents(project)
        assert status == 2
        assert "Traceback" not in captured.out + captured.err
        assert "usage:" not in captured.err
        assert {path: after.get(path) for path in before} == before
        said = captured.err[captured.err.index("difftune: ") :]
        assert re.search(message, said, re.DOTALL), said
        return said

    return run


# -- what a new user sees first ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data.bank_sise", "3"], "no argument 'bank_sise'. Did you mean bank_size"),
        (["--model.objective.schedule.taw", "1"], "model.objective.schedule.taw is not a key: .*Did you mean tau"),
        (["--model.sampler.stepz", "1"], "model.sampler.stepz is not a key: .*it takes .*num_inference_steps"),
        (["--trainer.max_stebs", "3"], "Did you mean trainer.max_steps"),
        (["--data.target", "lightning_difftune.data.ImageFoldr"], "has no class ImageFoldr. Did you mean ImageFolder"),
        (["--model", "lightning_difftune.DitDiffTuningModule"], "Did you mean DiTDiffTuningModule"),
        (
            ["--model.optimizer", "torch.optim.AdamV"],
            "model.optimizer: torch.optim has no class AdamV. Did you mean Adam",
        ),
        (["--trainer.max_step", "3"], "--trainer.max_step is not an option. Did you mean trainer.max_steps"),
        (["--data.batch", "3"], "no argument 'batch'. Did you mean batch_size"),
        (["--model.optimizer.learning_rate", "3"], "AdamW has no argument 'learning_rate'; it takes .*lr"),
        (["--modle.init_args.seed", "3"], "--modle.init_args.seed is not an option. Did you mean model"),
        (["--config", "empty.yaml"], "The config empty.yaml is empty"),
        (["--config", "."], r"\. is a folder, not a config"),
        (["--config", "open.yaml"], r"The config open\.yaml cannot be read: line 2, column 2: expected ',' or ']'"),
        (["--config", "twice.yaml"], r"The config twice\.yaml cannot be read: the key 'a' is there twice, in lines 1 "),
        (["--config", "binary.yaml"], r"The config binary\.yaml cannot be read: 'utf-8' codec"),
        (["--config", "list.yaml"], r"The config list\.yaml is a list, not a mapping of keys to values"),
        (["wrong.yaml"], "wrong.yaml is a config: write --config wrong.yaml"),
        (["--config", "wrong.yaml"], r"trainer.max_step is not a key. Did you mean trainer.max_steps"),
        (["--trainer.max_steps", "many"], "trainer.max_steps takes a whole number, found 'many'"),
        (["--model.sampler.guidance_scale", "x"], "model.sampler.guidance_scale takes a number, found 'x'"),
        (["--model.label_table", "own"], "model.label_table takes one of keep, resize, found 'own'"),
        (["--model.tuner", "LoRA"], "model.tuner takes the path of a class.* Write lightning_difftune.tuners.LoRA"),
        (["--data.val_target", "nosuch.Images"], "data.val_target: No module named 'nosuch'"),
        (
            ["--data.target", "lightning_difftune.data.NpzImages"],
            r"data.target.path has no value.* or set --data.target.p",
        ),
        (
            ["--model.optimizer", "torch.optim.lr_scheduler.StepLR"],
            "model.optimizer takes a class of the kind Optimizer, which torch.optim.lr_scheduler.StepLR is not",
        ),
        (
            ["--model.lr_scheduler", "torch.optim.Adam"],
            "LRScheduler or ReduceLROnPlateau, which torch.optim.Adam is not",
        ),
        (
            ["--data", "torch.nn.Linear"],
            "data takes a class of the kind LightningDataModule, which the given one is not",
        ),
    ],
)
def test_a_wrong_key_or_value_is_one_line_with_what_was_meant(args, said, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("trainer: {max_step: 3}")
    Path("empty.yaml").write_text(" ")
    Path("open.yaml").write_text("a: [1, 2\nb: {\n")
    Path("twice.yaml").write_text("a: 1\na: 2\n")
    Path("list.yaml").write_text("- 1\n")
    Path("binary.yaml").write_bytes(b"\x89PNG\x00")
    refused(["fit", "--config", str(CONFIGS / "quickstart.yaml"), *args], rf"^difftune: [^\n]*{said}[^\n]*\n$")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: {class_path: lightning_difftune.DiTDiffTuningModule}", "modle is not a key. Did you mean model"),
        (
            "model: {clas_path: lightning_difftune.DiTDiffTuningModule}",
            "clas_path is not a key of a class",
        ),
        ("model: {init_arg: {label_table: keep}}", "init_arg is not a key of a class. Did you mean init_args"),
        (
            "model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {learning_rate: 1.0}}}}",
            "model.optimizer.learning_rate is not a key: torch.optim.AdamW has no argument .*; it takes .*lr",
        ),
        (
            "trainer: {callbacks: [{class_path: lightning_difftune.callbacks.EMA, init_args: {decy: 0.9}}]}",
            "trainer.callbacks.decy is not a key: .*EMA has no argument 'decy'. Did you mean decay",
        ),
    ],
)
def test_a_typo_at_each_level_of_a_config(text, said, tmp_path, refused):
    (tmp_path / "typo.yaml").write_text(text)
    args = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(tmp_path / "typo.yaml")]
    refused(args, rf"^difftune: [^\n]*{said}[^\n]*\n$")


@pytest.mark.parametrize("is_lightning", [False, True])
def test_control_c_is_one_line(is_lightning, monkeypatch, capsys):
    def interrupted(args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if is_lightning:
                sys.exit(1)
            raise

    monkeypatch.setattr("lightning_difftune.cli.start", interrupted)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err.strip() == "difftune: stopped by Ctrl-C"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["fit", "--debug"])


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_help_of_a_run_fits_a_screen_and_shows_what_people_set(command, capsys):
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    for key in ("--data.bank_size", "--data.target", "--model.tuner", "--model.objective", "--trainer.max_steps"):
        (line,) = [line for line in lines if f"{key} " in line]
        assert len(line.split()) > 3


def test_help_names_commands_that_list_all_keys(capsys):
    assert main(["fit", "--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if ".help " in line]
    for (_, *args), key in zip(lines, ("--model.label_table", "--data.retention_share"), strict=True):
        with pytest.raises(SystemExit) as left:
            main(args)
        assert left.value.code == 0
        assert key in capsys.readouterr().out


def test_help_of_a_class_by_its_name_alone(capsys):
    with pytest.raises(SystemExit) as left:
        main(["fit", "--model.help", "DiTDiffTuningModule"])
    assert left.value.code == 0
    assert "--model.label_table" in capsys.readouterr().out


def test_short_keys(capsys):
    config = str(CONFIGS / "quickstart.yaml")
    keys = ["--data.bank_size", "20", "--model.objective.schedule.tau", "0.5", "--data.target.split", "test"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, *keys, "--print_config"])
    composed = yaml.safe_load(capsys.readouterr().out)
    data, model = composed["data"]["init_args"], composed["model"]["init_args"]
    assert (data["bank_size"], data["target"]["init_args"]["split"]) == (20, "test")
    assert model["objective"]["init_args"]["schedule"]["init_args"]["tau"] == 0.5


def test_the_package_shows_its_names():
    shown = [name for name in dir(lightning_difftune) if not name.startswith("__")]
    assert shown == lightning_difftune.__all__


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_names_every_command(args, capsys):
    assert main(args) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ") and " difftune " not in line] == [
        *COMMANDS
    ]
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 80


class Parsed(Exception):
    """Instead of a command: the arguments that its parser does not know."""


def test_the_examples_of_the_help_can_be_run(monkeypatch):
    """Each is a command that is there, with options that it has; the configs compose."""
    original = CommandParser.parse_known_args

    def parse(parser, args, namespace=None):
        raise Parsed(*original(parser, args)[1])

    monkeypatch.setattr(CommandParser, "parse_known_args", parse)
    monkeypatch.chdir(Path(__file__).parents[1])
    examples = [shlex.split(line)[1:] for line in HELP.splitlines() if line.startswith("  difftune ")]
    assert len(examples) == 7
    for command, *args in examples:
        assert command in COMMANDS
        if command == "fit":
            if args != ["RUN"]:  # whose settings are in the checkpoint
                ConfigReader().compose([arg for arg in args if arg != "--print_config"])
        elif command in ("sample", "export"):
            with pytest.raises(Parsed) as parsed:
                {"sample": sample.sample, "export": export.export}[command](args)
            assert parsed.value.args == ()


def test_the_keys_that_help_shows_are_there():
    known = {
        "model": {*inspect.signature(TextToImageDiffTuningModule).parameters},
        "data": {*inspect.signature(MemoryBankDataModule).parameters},
        "trainer": {*inspect.signature(L.Trainer).parameters},
    }
    for part, keys in KEYS.items():
        assert {*keys} <= known[part]


@pytest.mark.parametrize("command", [*OWN])
def test_descriptions_fit_eighty_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["sample", "export", "data"])
def test_help_of_our_commands_has_examples(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert out.count(f"  difftune {command} ") >= 3
    assert len(out.splitlines()) <= 60


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_of_a_command_has_its_name(capsys):
    with pytest.raises(SystemExit) as left:
        main(["fit", "--help_all"])
    assert left.value.code == 0
    assert "difftune [options] fit" in capsys.readouterr().out


def test_print_config_shows_what_would_run_and_runs_nothing(project, capsys):
    before = contents(project)
    with pytest.raises(SystemExit) as left:
        main([*FIT, f"{TRAINER}max_steps", "7", "--print_config"])
    assert left.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["max_steps"] == 7
    assert shown["model"]["init_args"]["sampler"]["num_inference_steps"] == 2
    assert shown["data"]["init_args"]["retention_share"] == 0.2  # a default
    assert contents(project) == before


# -- the main job -----------------------------------------------------------------------------------------------------


def test_fit_validate_predict(project, checkpoint, capsys):
    log = project / "run/lightning_logs/version_0"
    assert {"config.yaml", "metrics.csv"} <= {path.name for path in log.iterdir()}
    assert "train/retention" in (log / "metrics.csv").read_text()
    assert len(MemoryBank("bank")) == 10
    before = contents(project)

    capsys.readouterr()
    assert main([*VALIDATE, "--ckpt_path", str(checkpoint)]) == 0
    assert "val/loss" in capsys.readouterr().out
    assert main([*PREDICT, f"{DATA}bank", "other"]) == 0
    assert main([*PREDICT, f"{DATA}bank", "other"]) == 0  # it is complete
    assert {path.name: path.read_bytes() for path in Path("other").iterdir()} == {
        path.name: path.read_bytes() for path in Path("bank").iterdir()
    }
    assert main(FIT) == 0  # opens the bank
    assert main(["fit", "--config", str(log / "config.yaml")]) == 0
    after = contents(project)
    assert {path: after[path] for path in before} == before
    assert len(list(project.glob("run/lightning_logs/version_*/checkpoints/*.ckpt"))) == 3


def test_fit_resumes(project, checkpoint):
    assert main([*FIT, "--ckpt_path", str(checkpoint), f"{TRAINER}max_steps", "6"]) == 0
    assert only(project.glob("run/lightning_logs/version_1/checkpoints/*.ckpt")).name.endswith("step=6.ckpt")


def test_what_a_run_prints(project):
    """In a separate process, since Lightning prints through handlers created on import."""
    entry = [sys.executable, "-m", "lightning_difftune"]
    bars = (f"{TRAINER}enable_progress_bar", "true", f"{DATA}val_target", "null")
    done = subprocess.run([*entry, *FIT, *bars], capture_output=True, text=True, timeout=120, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "Preset: official code." in printed
    assert "Memory bank bank: 10 samples of shape (1, 8, 8)." in printed
    lines = [line for line in done.stdout.splitlines() if line.startswith("Training ")]  # nobody watches a bar here
    assert [line.split()[1] for line in lines if "images/s" in line] == ["1/4", "2/4", "3/4", "4/4"]
    assert re.search(r"4/4  \d+ images/s  0:00:00 left  loss \S+  reconsolidation \S+  retention \S+", lines[-1])
    assert "3 of 3 classes have fewer than 10 pictures" in printed
    for noise in ("Warning", "deprecated", "Tip:", "Epoch", "v_num", "many workers", "is zero", "/lightning/"):
        assert noise not in printed, printed
    wrong = subprocess.run([*entry, "train"], capture_output=True, text=True, timeout=60, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("difftune: 'train' is not a command. Choose from quickstart, init, data, plan, fit,")


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "'train' is not a command. Choose from quickstart, init, data, plan, fit"),
        (
            [*FIT, "--modle", "x"],
            r"--modle is not an option. Did you mean model.*`difftune fit --help` lists the",
        ),
        (["fit", "--config", "none.yaml"], "The config .*none.yaml does not exist"),
        ([*FIT, f"{DATA}batch_size", "five"], "data.batch_size takes a whole number, found 'five'"),
        (
            [*FIT, f"{DATA}batch", "5"],
            r"^difftune: data.batch is not a key: .*MemoryBankDataModule has no argument 'batch'\. Did",
        ),
        ([*FIT, f"{TRAINER}devices", "0"], "not a valid input using cpu accelerator"),
        ([*FIT, f"{TRAINER}accelerator", "abacus"], "invalid accelerator name.*'abacus'.*--debug shows where"),
        (
            [*FIT, f"{DATA}target.init_args.root", "nowhere"],
            "nowhere does not exist; expected one sub-folder per class",
        ),
        ([*FIT, f"{DATA}target.init_args.root", "run.yaml"], "run.yaml is a file"),
        ([*FIT, f"{DATA}target.init_args.root", "empty"], "no pictures under empty; found no files; expected"),
        ([*FIT, f"{DATA}num_classes", "2"], r"label 2 of image 8 \(pictures/cat/02.png\).*at least 3"),
        ([*FIT, *TAU, "-0.5"], "tau must be .* at least 0, got -0.5"),
        ([*FIT, f"{DATA}retention_share", "0.1"], r"int\(0.1 \* 5\) = 0 bank samples.*Raise one"),
        ([*FIT, f"{DATA}image_size", "16"], r"\(1, 16, 16\), but the model denoises \(1, 8, 8\). Set image_size"),
        ([*FIT, f"{MODEL}model", "none.safetensors"], "'none.safetensors' is not a file.*Check the path"),
        ([*FIT, f"{DATA}bank_size", "0"], "bank_size of MemoryBankDataModule must be at least 1, found 0"),
        ([*VALIDATE, "--ckpt_path", "none.ckpt"], "none.ckpt does not exist. Check the path"),
        ([*VALIDATE, "--ckpt_path", "best"], "best does not exist"),
        (
            [*VALIDATE, "--ckpt_path", "tiny.safetensors"],
            "tiny.safetensors is not a checkpoint.*args.model",
        ),
        ([*PREDICT, f"{DATA}bank", "null"], "set bank: to a folder"),
    ],
)
def test_mistakes_in_the_settings(project, refused, args, message):
    (project / "empty").mkdir()
    refused(args, message)


def test_a_folder_that_cannot_be_written_is_named(project, refused):
    (project / "taken").touch()
    root = [f"{TRAINER}default_root_dir", "taken", f"{TRAINER}logger", "true"]
    refused([*FIT, *root], r"difftune: .*taken.*: (Not a directory|File exists)\. --debug shows where")


def test_the_saved_config_repeats_the_run(project, checkpoint):
    first = project / "run/lightning_logs/version_0"
    assert main(["fit", "--config", str(first / "config.yaml")]) == 0
    second = project / "run/lightning_logs/version_1"
    assert (second / "metrics.csv").read_text() == (first / "metrics.csv").read_text()
    states = [torch.load(only(f.glob("checkpoints/*.ckpt")), weights_only=True)["state_dict"] for f in (first, second)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_debug_shows_where_an_error_came_from(project):
    with pytest.raises(DataError, match="nowhere does not exist") as raised:
        main([*FIT, f"{DATA}target.init_args.root", "nowhere", "--debug"])
    assert raised.traceback[-1].path == Path(folders.__file__)


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_a_corrupt_picture_is_named_and_refused(project, refused, num_workers):
    damage(project / "pictures/bee/04.png")
    said = refused(
        [*FIT, f"{DATA}num_workers", num_workers, f"{DATA}val_target", "null"],
        r"image 5 \(pictures/bee/04.png\) cannot be read.*Repair or remove it, or set on_corrupt='skip'",
    )
    assert said.count("\n") == 1  # without the traceback of the worker


def test_a_corrupt_picture_is_skipped_by_choice(project):
    damage(project / "pictures/bee/04.png")
    with pytest.warns(UserWarning, match=r"bee/04\.png\) cannot be read"):
        assert main([*FIT, f"{DATA}on_corrupt", "skip"]) == 0


def damage(path):
    path.write_bytes(path.read_bytes()[:50])


LAYER = "final_layer.linear.weight"
BROKEN = [
    (lambda state: state.pop(LAYER), rf"1 missing \((dit\.)?{LAYER}\)"),
    (lambda state: state.update({LAYER: state[LAYER][:3].clone()}), rf"{LAYER} \(3, 16\) instead of \(32, 16\)"),
]


@pytest.mark.parametrize(("breaks", "message"), BROKEN)
def test_weights_with_missing_or_misshaped_tensors(project, refused, breaks, message):
    with safe_open("tiny.safetensors", "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "sha256"}
    state = load_file("tiny.safetensors")
    breaks(state)
    save_file(state, "broken.safetensors", metadata)
    refused([*FIT, f"{MODEL}model", "broken.safetensors"], rf"broken.safetensors does not hold .*{message}")


@pytest.mark.parametrize(("breaks", "message"), BROKEN)
def test_a_checkpoint_with_missing_or_misshaped_tensors(checkpoint, refused, breaks, message):
    saved = torch.load(checkpoint, weights_only=True)
    state = {name.removeprefix("dit."): tensor for name, tensor in saved["state_dict"].items()}
    breaks(state)
    saved["state_dict"] = {f"dit.{name}": tensor for name, tensor in state.items()}
    torch.save(saved, "broken.ckpt")
    refused([*VALIDATE, "--ckpt_path", "broken.ckpt"], rf"broken.ckpt does not hold .*{message}")


def test_a_checkpoint_that_is_cut_off_or_of_another_base(project, checkpoint, refused):
    Path("cut.ckpt").write_bytes(checkpoint.read_bytes()[:3000])
    refused([*VALIDATE, "--ckpt_path", "cut.ckpt"], r"cut.ckpt is not a whole checkpoint of a run \(.*Take another one")
    write_weights(project / "other.safetensors", seed=1)
    refused(
        [*VALIDATE, "--ckpt_path", str(checkpoint), f"{MODEL}model", "other.safetensors"],
        r"trained from tiny\.safetensors .* starts from other\.safetensors .*Pass the pre-trained model",
    )


def test_a_bank_of_another_model_or_shape_or_damaged(project, checkpoint, refused):
    write_weights(project / "other.safetensors", seed=1)
    refused(
        [*FIT, f"{MODEL}model", "other.safetensors"], r"bank/manifest.json belongs to another.*model.*another folder"
    )
    write_weights(project / "small.safetensors", input_size=4)
    smaller = [f"{MODEL}model", "small.safetensors", f"{DATA}image_size", "4"]
    refused([*FIT, *smaller], r"bank/manifest.json belongs to another.*latent_shape.*another folder")
    refused([*PREDICT, *smaller], r"bank/manifest.json belongs to another")
    os.truncate("bank/shard-00000.safetensors", 1000)
    refused(FIT, "bank/shard-00000.safetensors has 1000 bytes, .*Delete it and bank/manifest.json, then build again")


def test_a_full_disk_keeps_the_finished_shards(project, refused, monkeypatch):
    two_shards = [f"{DATA}bank_size", "1030"]
    synced = []

    def sync(descriptor, original=os.fsync):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if "shard-00001" in synced[-1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", sync)
        refused([*FIT, *two_shards], r"No space left on the disk for bank/shard-00001.*1 of 2 shards .*free some space")
    first = project / "bank/shard-00000.safetensors"
    assert [path.name for path in project.glob("bank/*shard*")] == [first.name]
    written = first.stat().st_mtime_ns
    assert main([*FIT, *two_shards]) == 0
    assert first.stat().st_mtime_ns == written
    assert len(MemoryBank("bank")) == 1030


def test_no_internet_where_a_hub_name_is_given(project, refused, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(project / "cache"))
    remedy = "hub cannot be reached .*Pass a local folder"
    refused(
        [*FIT, f"{MODEL}model", "facebook/DiT-XL-2-256"], rf"'facebook/DiT-XL-2-256' is not a local folder .*{remedy}"
    )
    autoencoder = [f"{MODEL}autoencoder", "FrozenAutoencoder", f"{MODEL}autoencoder.init_args.source", "owner/vae"]
    refused([*FIT, *autoencoder], rf"'owner/vae' is not a local folder .*{remedy}")


def test_home_is_understood_in_every_path_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    init = {"bank": "~/bank", "shards": ["~/a.tar", "b~/c"], "prompt": "a ~/ in the middle", "seed": 3, "none": None}
    expanded = expand_home(dict_to_namespace({"data": {"init_args": init}, "dirpath": "~/out"}))
    assert expanded.dirpath == f"{tmp_path}/out"
    found = expanded.data.init_args
    assert (found.bank, found.shards) == (f"{tmp_path}/bank", [f"{tmp_path}/a.tar", "b~/c"])
    assert (found.prompt, found.seed, found.none) == ("a ~/ in the middle", 3, None)
