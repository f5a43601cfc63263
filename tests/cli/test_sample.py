"""``difftune sample``: the same command gives the same bytes, from any form of a model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_difftune import ControlNetDiffTuningModule
from lightning_difftune.cli import main
from lightning_difftune.cli.sample import save
from lightning_difftune.cli.tuned import TunedRun
from lightning_difftune.data import Canny
from lightning_difftune.errors import ConfigError
from lightning_difftune.models import DiT, FrozenAutoencoder, export_dit
from lightning_difftune.modules.family import Subject, class_number, class_subjects
from lightning_difftune.pictures import pictures_of, to_pixels
from lightning_difftune.sampling import Sampler


def sampled(output, *args):
    assert main(["sample", *map(str, args), "--output", str(output)]) == 0
    return {file.name: file.read_bytes() for file in output.iterdir()}


def pixels_of(output):
    files = [file for file in sorted(output.iterdir()) if file.name != "grid.png"]
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def text_of(file):
    with Image.open(file) as image:
        return json.loads(image.text["parameters"])


def test_the_same_command_gives_the_same_bytes(tiny_run, tmp_path):
    args = [tiny_run.checkpoint, "--classes", "Sunflower", "oxeye-daisy", "1", "--num_samples", "3", "--seed", "5"]
    first = sampled(tmp_path / "a", *args)
    assert sampled(tmp_path / "b", *args) == first
    rows = ("00-sunflower", "01-oxeye-daisy", "02-rose")
    assert first.keys() == {"grid.png", *(f"{row}-{j:03d}.png" for row in rows for j in range(3))}
    another = sampled(tmp_path / "c", *args, "--batch_size", "2")
    assert another.keys() == first.keys()
    assert abs(pixels_of(tmp_path / "a") - pixels_of(tmp_path / "c")).max() <= 1
    assert text_of(tmp_path / "c" / "grid.png") == text_of(tmp_path / "a" / "grid.png")
    sampled(tmp_path / "d", *args[:-1], "6")
    assert (pixels_of(tmp_path / "d") != pixels_of(tmp_path / "a")).mean() > 0.3, "another seed draws other pictures"


def test_pictures_that_were_there_before_are_said(tiny_run, tmp_path, capsys):
    args = [tiny_run.checkpoint, "--classes", "rose", "--num_samples", "1", "--overwrite"]
    sampled(tmp_path, *args)
    assert "from before" not in capsys.readouterr().out
    (tmp_path / "00-rose-001.png").touch()
    sampled(tmp_path, *args)
    assert "files in that folder from before: 1, such as 00-rose-001.png" in capsys.readouterr().out


def test_a_picture_does_not_depend_on_those_beside_it(tiny_run, tmp_path):
    alone = ("--classes", "rose", "--num_samples", "1", "--batch_size", "1")
    in_smaller_batches = ("--classes", "sunflower", "rose", "--num_samples", "2", "--batch_size", "1")
    one = sampled(tmp_path / "one", tiny_run.checkpoint, *alone)
    assert (
        sampled(tmp_path / "two", tiny_run.checkpoint, *in_smaller_batches)["01-rose-000.png"] == one["00-rose-000.png"]
    )


def test_the_text_and_the_grid_say_what_is_shown(tiny_run, tmp_path):
    settings = ["--guidance_scale", "3", "--guidance_channels", "all", "--solver", "UniPCMultistep", "--steps", "5"]
    sampled(
        tmp_path / "a", tiny_run.checkpoint, "--classes", "rose", "2", "--num_samples", "2", "--seed", "7", *settings
    )
    said = text_of(tmp_path / "a" / "01-sunflower-001.png")
    expected = {"shows": "sunflower", "index": 1, "seed": 7, "guidance_scale": 3.0, "guidance_channels": None}
    expected |= {"scheduler": "UniPCMultistepScheduler", "num_inference_steps": 5, "source": str(tiny_run.checkpoint)}
    assert said.items() >= expected.items()
    assert said["scheduler_config"]["beta_end"] == 0.02
    assert text_of(tmp_path / "a" / "grid.png")["rows"] == ["rose", "sunflower"]
    grid = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert grid.shape == (2 + 2 * 98, 130 + 2 + 2 * 98, 3)
    singles = pixels_of(tmp_path / "a")
    for row in range(2):
        for column in range(2):
            cell = grid[2 + 98 * row :, 130 + 2 + 98 * column :, 0][:96:12, :96:12]
            assert (cell == singles[2 * row + column]).all()


def test_an_export_draws_what_its_run_draws(tiny_run, tmp_path, capsys):
    args = ("--classes", "rose", "--num_samples", "2")
    run = sampled(tmp_path / "run", tiny_run.checkpoint, *args)
    for name in ("tuned.safetensors", "tuned"):
        assert main(["export", "--ckpt_path", str(tiny_run.checkpoint), "--output", str(tmp_path / name)]) == 0
        sampled(tmp_path / f"of-{name}", tmp_path / name, *args)
        assert (pixels_of(tmp_path / f"of-{name}") == pixels_of(tmp_path / "run")).all()
        theirs, ours = text_of(tmp_path / f"of-{name}" / "grid.png"), text_of(tmp_path / "run" / "grid.png")
        assert {"precision": "32-true", **theirs, "source": 0} == {**ours, "source": 0}  # the same weights and sampler
    raw = sampled(tmp_path / "raw", tiny_run.checkpoint, *args, "--raw")
    assert raw["00-rose-000.png"] != run["00-rose-000.png"]
    assert text_of(tmp_path / "raw" / "grid.png")["weights"] != ours["weights"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_a_run_draws_at_its_precision(tiny_run, tmp_path, precision):
    run = tmp_path / "run"
    shutil.copytree(tiny_run.folder, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["trainer"]["precision"] = precision
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    sampled(tmp_path / "own", run, "--classes", "rose")
    sampled(tmp_path / "whole", run, "--classes", "rose", "--trainer.precision", "32-true")
    assert [text_of(tmp_path / name / "grid.png")["precision"] for name in ("own", "whole")] == [precision, "32-true"]

    tuned = TunedRun(tiny_run.checkpoint)
    module = tuned.module
    with tuned.weights(False, []):
        for name, kind in (("whole", "32-true"), ("own", precision)):
            if kind.endswith("true"):
                module.to({"b": torch.bfloat16, "6": torch.float64, "3": torch.float32}[kind[0]])
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16-mixed"), torch.inference_mode():
                pictures = module.generate(torch.arange(4), module.class_conditions(torch.ones(4, dtype=torch.int64)))
            assert (pixels_of(tmp_path / name) == pictures[:, 0].numpy()).all()
    differs = (pixels_of(tmp_path / "own") != pixels_of(tmp_path / "whole")).any()
    assert differs == precision.startswith("bf16")


def test_domain_guidance_needs_the_base_and_uses_it(tiny_run, tmp_path, capsys):
    args = ("--classes", "rose", "--guidance_scale", "4")
    plain = sampled(tmp_path / "plain", tiny_run.checkpoint, *args)
    run = sampled(tmp_path / "run", tiny_run.checkpoint, *args, "--domain_guidance")
    assert run["00-rose-000.png"] != plain["00-rose-000.png"]
    tuned = tmp_path / "tuned.safetensors"
    assert main(["export", "--ckpt_path", str(tiny_run.checkpoint), "--output", str(tuned)]) == 0
    sampled(tmp_path / "export", tuned, *args, "--domain_guidance", "--base", tiny_run.base)
    assert (pixels_of(tmp_path / "export") == pixels_of(tmp_path / "run")).all()
    assert main(["sample", str(tuned), *args, "--domain_guidance", "--output", str(tmp_path / "x")]) == 2
    assert "name it with --base" in capsys.readouterr().err


def test_a_pretrained_tail_travels_with_an_export_and_needs_the_base(tiny_run, tmp_path, capsys):
    args, tail = ("--classes", "rose"), ("--model.sampler.pretrained_tail", "0.5")
    plain = sampled(tmp_path / "plain", tiny_run.checkpoint, *args)
    run = sampled(tmp_path / "run", tiny_run.checkpoint, *args, *tail)
    assert run["00-rose-000.png"] != plain["00-rose-000.png"]
    assert text_of(tmp_path / "run" / "grid.png")["pretrained_tail"] == 0.5
    tuned = tmp_path / "tuned.safetensors"
    assert main(["export", str(tiny_run.checkpoint), "--output", str(tuned), *tail]) == 0
    sampled(tmp_path / "export", tuned, *args, "--base", tiny_run.base)
    assert (pixels_of(tmp_path / "export") == pixels_of(tmp_path / "run")).all()
    capsys.readouterr()
    assert main(["sample", str(tuned), *args, "--output", str(tmp_path / "x")]) == 2
    assert "A pretrained_tail of 0.5 needs the model that this one was tuned from" in capsys.readouterr().err


def test_bundled_models_have_a_fitting_sampler(tmp_path, capsys):
    few = ("--num_samples", "1", "--classes", "0", "--steps", "2")
    sampled(tmp_path / "noise", "dit-nano-omniglot", *few)
    assert text_of(tmp_path / "noise" / "grid.png")["scheduler"] == "DDIMScheduler"
    sampled(tmp_path / "flow", "dit-nano-omniglot-flow", *few)
    assert text_of(tmp_path / "flow" / "grid.png")["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert main(["sample", "dit-nano-omniglot-flow", *few, "--solver", "DDIM"]) == 2
    assert "predicts 'flow_prediction'" in capsys.readouterr().err


def test_files_are_named_in_any_script(tmp_path):
    names = ("Gänseblümchen & Co", "a\u0308", "薔薇", "roses_1/2", "?")
    save(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), [Subject(name, 0) for name in names], tmp_path, {})
    slugs = ("00-gänseblümchen-co", "01-ä", "02-薔薇", "03-roses-1-2", "04-unconditional")
    assert {file.name for file in tmp_path.iterdir()} == {"grid.png", *(f"{slug}-000.png" for slug in slugs)}


def test_text_to_image_by_prompt(pipeline_folder, tmp_path, capsys):
    from diffusers import UNet2DConditionModel

    args = ("--prompts", "a photo of a cat", "", "--num_samples", "2", "--steps", "2", "--batch_size", "1")
    first = sampled(tmp_path / "a", pipeline_folder, *args)
    assert set(first) == {"grid.png"} | {
        f"{row}-00{j}.png" for row in ("00-a-photo-of-a-cat", "01-unconditional") for j in (0, 1)
    }
    assert text_of(tmp_path / "a" / "00-a-photo-of-a-cat-001.png")["shows"] == "a photo of a cat"
    assert "Loading weights" not in capsys.readouterr().err
    unet = UNet2DConditionModel.from_pretrained(pipeline_folder, subfolder="unet")
    with torch.no_grad():
        next(unet.parameters()).mul_(3)
    unet.save_pretrained(tmp_path / "unet")
    other = sampled(tmp_path / "b", tmp_path / "unet", "--base", pipeline_folder, *args)
    assert other["01-unconditional-000.png"] != first["01-unconditional-000.png"]
    status = main(["sample", str(tmp_path / "unet"), *args, "--output", str(tmp_path / "c")])
    assert (status, "--base FOLDER" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize("changes", [{"prediction_type": "v_prediction"}, {"prediction_type": "sample"}], ids=str)
def test_a_pipeline_draws_by_what_it_predicts(changes, pipeline_folder, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes | {"rescale_betas_zero_snr": True}))
    args = ("--prompts", "grey", "--num_samples", "1", "--steps", "2")
    own = sampled(tmp_path / "own", folder, *args)
    parameters = text_of(tmp_path / "own" / "grid.png")["scheduler_config"]
    assert (parameters["prediction_type"], parameters["rescale_betas_zero_snr"]) == (changes["prediction_type"], True)
    other = sampled(tmp_path / "ddim", folder, *args, "--solver", "DDIM")
    assert text_of(tmp_path / "ddim" / "grid.png")["scheduler_config"]["rescale_betas_zero_snr"] is True
    assert own["grid.png"] != other["grid.png"]


@pytest.mark.parametrize("name", ["FluxInpaintPipeline", "StableDiffusionUpscalePipeline"])
def test_pipelines_that_are_not_supported_are_refused_by_name(name, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert main(["sample", str(tmp_path), "--prompts", "grey"]) == 2
    said = capsys.readouterr().err
    assert f"is a {name}, which is not supported" in said
    assert "internet" not in said


def test_a_controlnet_follows_pictures(pipeline_folder, tmp_path, monkeypatch, capsys):
    """Opened from its checkpoint, as a run of it would leave it."""
    monkeypatch.chdir(tmp_path)
    annotator = {"class_path": "lightning_difftune.data.Canny"}
    init = {"annotator": annotator, "model": pipeline_folder, "prompts": ["a photo"]}
    model = {"class_path": "lightning_difftune.ControlNetDiffTuningModule", "init_args": init}
    target = {"class_path": "lightning_difftune.data.CaptionedFolder", "init_args": {"root": "elsewhere"}}
    data = {"class_path": "lightning_difftune.MemoryBankDataModule", "init_args": {"target": target, "image_size": 16}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    module = ControlNetDiffTuningModule(Canny(), pipeline_folder)
    module.configure_model()
    for name, parameter in module.controlnet.named_parameters():  # its outputs are zero at the start
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    content = {"state_dict": module.state_dict(), "global_step": 1, "callbacks": {}}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "control.ckpt")
    Image.new("RGB", (20, 30)).save("plain.png")
    Image.fromarray(np.kron(np.eye(4, dtype=np.uint8), np.full((8, 8), 255, np.uint8))).save("steps.png")
    args = ["control.ckpt", "--controls", "plain.png", "steps.png", "--steps", "2", "--num_samples", "1"]
    files = sampled(tmp_path / "out", *args)
    names = {f"{row}-{what}.png" for row in ("00-plain", "01-steps") for what in ("000", "control")}
    assert files.keys() == {"grid.png", *names}
    assert files["00-plain-000.png"] != files["01-steps-000.png"]
    assert text_of(tmp_path / "out/01-steps-000.png").items() >= {"shows": "a photo", "control": "steps"}.items()
    expected = module.annotate(torch.from_numpy(to_pixels(Image.open("steps.png"), 16, 3))[None])[0, 0].numpy()
    assert expected.any()
    assert (np.asarray(Image.open("out/01-steps-control.png")) == expected).all()
    assert not np.asarray(Image.open("out/00-plain-control.png")).any()
    (maps, drawn) = pictures_of(Path("out/grid.png"), 2, 2)[1]
    assert (maps[0, ::6, ::6].numpy() == expected).all(), "a row of the grid begins with its map"
    assert not torch.equal(maps, drawn)
    again = sampled(tmp_path / "maps", "control.ckpt", "--maps", "out/01-steps-control.png", *args[4:])
    assert pictures_of(tmp_path / "maps/grid.png", 1, 2)[0].equal(pictures_of(Path("out/grid.png"), 2, 2)[1])
    assert again.keys() == {"grid.png", "00-01-steps-control-000.png", "00-01-steps-control-control.png"}
    Image.effect_mandelbrot((16, 16), (-2, -1, 1, 1), 20).convert("RGB").point([*range(256)] * 2 + [0] * 256).save(
        "red.png"
    )
    for wrong, message in (
        (["control.ckpt"], "name pictures for them, --controls FILE"),
        (["control.ckpt", "--maps", "red.png"], "red.png has control maps torch.uint8 (1, 3, 16, 16), but this"),
        (["control.ckpt", "--maps", "plain.png", "--controls", "plain.png"], "not allowed with argument"),
        ([*args, "--prompts", "a", "b", "c"], "3 prompts for 2 control pictures"),
        (["control.ckpt", "--controls", "config.yaml"], "control picture config.yaml cannot be read"),
        (["control.ckpt", "--classes", "1"], "does not take --classes: it takes prompts; use --prompts."),
        ([pipeline_folder, "--controls", "plain.png"], "follows no control pictures"),
        (["dit-nano-omniglot", "--maps", "plain.png"], "does not take --maps: it knows classes"),
    ):
        assert main(["sample", *wrong, "--output", "x"]) == 2
        assert message in capsys.readouterr().err


def test_a_run_folder_and_default_places(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = tiny_run.folder.parents[1]
    for run, place in ((root, "samples"), (tiny_run.folder, "samples-1"), (tiny_run.checkpoint.parent, "samples-2")):
        assert main(["sample", str(run), "--num_samples", "1"]) == 0
        assert len(list((tmp_path / "runs" / place).glob("0?-*.png"))) == 3  # the target's classes
        assert str(tiny_run.checkpoint) in capsys.readouterr().out


def test_latents_are_decoded_by_the_autoencoder_that_is_named_or_that_the_export_names(tmp_path):
    model = DiT(16, 8, 4, hidden_size=8, depth=1, num_heads=2, num_classes=3)
    export_dit(model, tmp_path / "plain.safetensors")
    scale = FrozenAutoencoder("sd-nano-flowers", subfolder="vae").scaling_factor
    recipe = FrozenAutoencoder("sd-nano-flowers", scale, "vae").settings()
    model.sampling = {**Sampler(num_inference_steps=2).settings(), "autoencoder": recipe}
    export_dit(model, tmp_path / "named.safetensors")
    few = ("--num_samples", "1", "--steps", "2")
    named = sampled(tmp_path / "named", tmp_path / "named.safetensors", *few)
    given = sampled(tmp_path / "given", tmp_path / "plain.safetensors", *few, "--vae", "sd-nano-flowers")
    assert pixels_of(tmp_path / "named").shape == (3, 32, 32, 3)
    assert named.keys() == given.keys()
    assert (pixels_of(tmp_path / "named") == pixels_of(tmp_path / "given")).all()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Name a run first"),
        (["RUN", "--classes", "rosse"], "no class 'rosse' among the 3. Did you mean rose"),
        (["RUN", "--classes", "3"], "no class '3' among the 3. Its classes are oxeye_daisy, rose, sunflower."),
        (["RUN", "--prompts", "a rose"], "does not take --prompts: it knows classes and no words; use --classes."),
        (["RUN", "--solver", "UniPC"], "diffusers has no UniPCScheduler. Did you mean UniPCMultistep"),
        (["RUN", "--solver", "EulerAncestralDiscrete"], "adds noise at each step"),
        (
            ["RUN", "--solver", "FlowMatchEulerDiscrete"],
            "predicts 'epsilon', but the sampler integrates with FlowMatchEuler",
        ),
        (["RUN", "--steps", "0"], "num_inference_steps of Sampler must be at least 1"),
        (["RUN", "--guidance_channels", "three"], "expected a number, or `all`"),
        (["RUN", "--num_samples", "0"], "must be at least 1"),
        (
            ["RUN", "--num_samples", "few"],
            r"invalid int value: 'few'\. `difftune sample --help` lists the options\.",
        ),
        (["RUN", "--device", "abacus"], "--device abacus cannot be used"),
        (["RUN", "--modle", "x"], "--modle is not an option. Did you mean model"),
        (["RUN", "--clases", "rose"], r"--clases is not an option. Did you mean --classes\? `difftune sample --help`"),
        (["tiny.safetensors", "--modle", "x"], "Unknown options: --modle x. Only a checkpoint takes keys"),
        (["none.ckpt"], "none.ckpt does not exist"),
        (["none"], "'none' is not a file, a folder or a bundled model"),
        (["latent.safetensors"], "latents of 4 channels and comes without the autoencoder.*--vae"),
        (["RUN", "--output", "."], "is not empty. Choose another --output, or pass --overwrite"),
        (["RUN", "--output", "latent.safetensors/x"], "x cannot be written, since .*latent.safetensors is a file"),
    ],
)
def test_mistakes_say_what_to_do(tiny_run, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.safetensors").symlink_to(tiny_run.base)
    export_dit(DiT(4, 2, 4, hidden_size=8, depth=1, num_heads=2, num_classes=3), tmp_path / "latent.safetensors")
    before = sorted(tmp_path.rglob("*"))
    assert main(["sample", *(str(tiny_run.checkpoint) if arg == "RUN" else arg for arg in args)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said, re.DOTALL), said
    assert "usage:" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_names_go_before_numbers():
    digits = ["zero", "2", "1"]
    assert [class_number(one, digits, 3) for one in ("zero", "1", "2", "0")] == [0, 2, 1, 0]
    with pytest.raises(ConfigError, match="no names, and the numbers 0 to 4"):
        class_number("rose", None, 5)


def test_of_classes_named_by_numbers_a_number_is_a_name():
    """In folders 1 to 3, the numbers 0, 1 and 2 would be the classes 1, 1 and 2."""
    folders = ["1", "2", "3"]
    assert [class_number(one, folders, 5) for one in ("1", "3", "4")] == [0, 2, 4]
    with pytest.raises(ConfigError, match=r"There is no class .0. among the 3\. Its classes are 1, 2, 3"):
        class_number("0", folders, 5)


@pytest.mark.parametrize(
    ("asked", "number"),
    [("UPPER", 1), ("upper", 0), ("Upper", None), ("a-b", 2), ("a b", None), ("a_b", 3), ("4", 4), ("shark", 5)],
)
def test_an_exact_name_wins_and_a_loose_one_must_be_of_one_class(asked, number):
    names = ["upper", "UPPER", "a-b", "a_b", "shark, great white", "shark"]
    if number is not None:
        assert class_number(asked, names, 6) == number
    else:
        with pytest.raises(ConfigError, match=r"is the name of 2 classes. Select one by its number: \d \(.*\), \d"):
            class_number(asked, names, 6)


def test_two_classes_of_one_name_are_asked_for_by_number():
    with pytest.raises(ConfigError, match=r"'rose' is the name of 2 classes.*: 0 \(rose\), 2 \(rose\)"):
        class_number("rose", ["rose", "lily", "rose"], 3)
    assert class_number("2", ["rose", "lily", "rose"], 3) == 2


def test_rows_behind_the_named_classes_are_not_shown():
    shown = class_subjects(None, ["ant", "bee"], 6)
    assert [subject.name for subject in shown] == ["ant", "bee"]
    assert class_subjects(["4"], ["ant", "bee"], 6)[0].name == "class 4"
    assert len(class_subjects(None, None, 600)) == 10
