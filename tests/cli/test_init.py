"""``difftune init``: its findings and decisions, and that it writes a valid config."""

from __future__ import annotations

import re
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import mapped
import numpy as np
import pipelines
import pytest
import torch
import yaml
from PIL import Image

from lightning_difftune.cli import main
from lightning_difftune.cli.init import rounded
from lightning_difftune.cli.init.bases import CAPTIONS, CLASSES
from lightning_difftune.cli.lightning import ConfigReader, run_lightning


def picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(256, size=(12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three classes of twelve pictures."""
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("rose", "oxeye_daisy", "lily")):
        for index in range(12):
            picture(Path("photos", name, f"{index}.png"), 100 * label + index)
    return Path("photos")


@pytest.fixture
def captioned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index in range(20):
        picture(Path("pairs", f"{index}.png"), index)
        Path("pairs", f"{index}.txt").write_text(f'a "red" house, number {index}: new')
    return Path("pairs")


def written(*args: str) -> dict:
    """The config, which the command line accepts."""
    assert main(["init", *args, "--no_plan"]) == 0
    return yaml.safe_load(ConfigReader().compose(["--config", "my.yaml"]))


def test_folders_for_classes_become_a_dit(folder, capsys) -> None:
    config = written("photos")
    data, model, trainer = config["data"]["init_args"], config["model"]["init_args"], config["trainer"]
    assert config["model"]["class_path"] == "lightning_difftune.DiTDiffTuningModule"
    assert (model["model"], data["num_classes"], data["image_size"]) == ("dit-nano-imagenet", 3, 32)
    assert data["target"]["init_args"]["source"]["init_args"] == {"root": "photos"}
    assert data["val_target"]["init_args"]["part"] == "val"
    assert (model["lr_scheduler"]["init_args"]["total_steps"], trainer["max_steps"]) == (-1, 400), "the run's length"
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0, "the last step is validated"
    assert data["bank_size"] <= int(data["retention_share"] * data["batch_size"]) * trainer["max_steps"]
    said = capsys.readouterr().out
    assert "36 pictures of 3 classes in photos, 4 of them held out" in said
    assert "fewer" not in said
    assert "Next: difftune fit --config my.yaml" in said


@pytest.mark.parametrize("flags", [[], ["--no_plan"]])
@pytest.mark.parametrize(
    ("kind", "model", "said"),
    [
        ([], "dit-nano-imagnet", "'dit-nano-imagnet' is not a file or folder. Did you mean dit-nano-imagenet"),
        ([], "nosuch", "Known are dit-nano-imagenet, .*owner/name"),
        (["--captions"], "my/models/sd", "Known are sd-nano-flowers, .*owner/name"),
    ],
)
def test_a_wrong_model_leaves_no_config(folder, capsys, flags, kind, model, said) -> None:
    assert main(["init", "photos", "--model", model, *kind, *flags]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert [file.name for file in Path().iterdir()] == ["photos"]


def test_a_wrong_option_is_answered_with_the_one_that_was_meant(folder, capsys) -> None:
    assert main(["init", "photos", "--mdoel", "x"]) == 2
    assert "--mdoel is not an option. Did you mean --model?" in capsys.readouterr().err


def test_a_model_that_cannot_be_opened_leaves_no_config(folder, capsys) -> None:
    Path("damaged.safetensors").write_bytes(b"not one")
    assert main(["init", "photos", "--model", "damaged.safetensors"]) == 2
    assert re.search("damaged.safetensors .*my.yaml was not written; --no_plan writes", capsys.readouterr().err)
    assert not Path("my.yaml").exists()


def test_shards_and_saved_data_sets(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for index in range(20):
        picture(Path("loose", f"{index}.png"), index)
    Path("shards").mkdir()
    with tarfile.open("shards/0.tar", "w") as archive:
        for index in range(20):
            Path("loose", f"{index}.cls").write_text(str(index % 2))
            for suffix in ("png", "cls"):
                archive.add(f"loose/{index}.{suffix}", f"{index}.{suffix}")
    columns = {"image": [f"loose/{index}.png" for index in range(20)], "label": [index % 3 for index in range(20)]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "fly"])}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).save_to_disk("hub")
    for path, key, name, classes in (("shards", "shards", "WebDatasetShards", 2), ("hub", "path", "HubImages", 3)):
        data = written(path, "--overwrite")["data"]["init_args"]
        source = data["target"]["init_args"]["source"]
        assert source["class_path"] == f"lightning_difftune.data.{name}"
        assert (source["init_args"][key], data["num_classes"]) == (path, classes)


def test_what_is_not_read_is_said_once(folder, monkeypatch, capsys) -> None:
    monkeypatch.setattr("lightning_difftune.cli.plan.phases.timed", lambda run, device, least: 0.01)
    (folder / "prompt.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is not read")  # would say it once more
        assert main(["init", "photos"]) == 0
    assert capsys.readouterr().out.count("prompt.json is not read") == 1


def test_a_saved_data_set_with_maps_becomes_a_controlnet(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = mapped.hub_data(conditioning_image=mapped.maps(), image=mapped.pictures(), text=list("abcdef"))
    made.save_to_disk("circles")
    source = written("circles", "--control", "canny")["data"]["init_args"]["target"]["init_args"]["source"]
    assert source["class_path"] == "lightning_difftune.data.HubImages"
    assert source["init_args"]["path"] == "circles"


def test_names_of_classes_become_captions(folder) -> None:
    config = written("photos", "--captions")
    assert config["model"]["class_path"] == "lightning_difftune.TextToImageDiffTuningModule"
    prompts = config["model"]["init_args"]["prompts"]
    assert prompts == ["a photo of a lily", "a photo of a oxeye daisy", "a photo of a rose"]
    source = config["data"]["init_args"]["target"]["init_args"]["source"]
    assert source["class_path"] == "lightning_difftune.data.ClassCaptions"
    assert "num_classes" not in config["data"]["init_args"]


def test_captions_are_seen_without_being_asked_for(captioned) -> None:
    config = written("pairs")
    assert config["model"]["class_path"] == "lightning_difftune.TextToImageDiffTuningModule"
    assert 'a "red" house, number 0: new' in config["model"]["init_args"]["prompts"]


@pytest.mark.parametrize("data", ["folder", "captioned"])
def test_a_controlnet_needs_pictures_alone(data, request) -> None:
    path = str(request.getfixturevalue(data))
    config = written(path, "--control", "canny")
    assert config["model"]["init_args"]["annotator"]["class_path"] == "lightning_difftune.data.annotators.Canny"
    assert config["model"]["init_args"]["bank_sampler"]["guidance_scale"] == 1.0, "else the run warns of it"
    watched = {
        entry["class_path"].rpartition(".")[2]: entry.get("init_args") for entry in config["trainer"]["callbacks"]
    }
    assert watched["ControlSimilarity"]["num_samples"] == {"folder": 4, "captioned": 2}[data], "all that are held out"
    assert watched["SuddenConvergence"]["threshold"] == 0.4


@pytest.mark.parametrize("model", ["stabilityai/stable-diffusion-xl-base-1.0", "somebody/my-sdxl"])
def test_a_controlnet_for_sdxl_has_its_size_and_no_arguments_of_the_text_to_image_module(model, folder) -> None:
    config = written("photos", "--control", "canny", "--model", model)
    assert config["data"]["init_args"]["image_size"] == 1024


@pytest.mark.parametrize(
    ("args", "model"),
    [
        ([], "facebook/DiT-XL-2-256"),
        (["--captions"], "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (["--control", "depth"], "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (["--model", "dit-nano-imagenet"], "dit-nano-imagenet"),
    ],
)
def test_a_gpu_gets_a_large_model(args, model, folder, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    config = written("photos", *args)
    assert config["model"]["init_args"]["model"] == model
    assert config["trainer"]["precision"] == "bf16-mixed"


def test_grey_pictures_for_a_model_of_grey_ones(folder) -> None:
    config = written("photos", "--model", "dit-nano-omniglot")
    assert (config["data"]["init_args"]["channels"], config["data"]["init_args"]["image_size"]) == (1, 20)
    assert config["model"]["init_args"].get("autoencoder") is None


def test_what_is_wrong_with_the_pictures_is_taken_into_account(folder, capsys) -> None:
    Path("photos", "rose", "0.png").write_bytes(b"not a picture")
    for index in range(60):
        picture(Path("photos", "lily", f"more-{index}.png"), 1000 + index)
    data = written("photos")["data"]["init_args"]
    assert data["on_corrupt"] == "skip"
    assert data["class_balanced"] is True
    assert "1 cannot be read, such as photos/rose/0.png" in capsys.readouterr().out


@pytest.mark.parametrize(("count", "said"), [(1, "1 class has fewer"), (2, "2 classes have fewer")])
def test_small_classes_are_counted(folder, capsys, count, said) -> None:
    for name in ("rose", "lily")[:count]:
        for index in range(9):
            Path("photos", name, f"{index}.png").unlink()
    written("photos")
    assert f"{said} than 10 pictures" in capsys.readouterr().out


def test_too_few_to_hold_some_out(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        picture(Path("few", f"{index}.png"), index)
    assert written("few")["data"]["init_args"].get("val_target") is None
    assert main(["init", "few", "--control", "canny", "--overwrite"]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "does not exist"),
        (["photos", "--model", "sd-nano-flowers"], "takes captions: pass --captions"),
        (["photos", "--captions", "--model", "dit-nano-imagenet"], "takes classes"),
        (["photos", "--control", "smell"], "invalid choice"),
        (["photos", "--control", "canny", "--model", "somebody/my-flux"], "Use a Stable Diffusion 1.x, 2.x or XL."),
        (["photos", "--output", "taken.yaml"], "taken.yaml exists"),
    ],
)
def test_mistakes(args, message, folder, capsys) -> None:
    Path("taken.yaml").touch()
    assert main(["init", *args]) == 2
    assert message in capsys.readouterr().err


def test_the_cost_and_the_next_command_are_printed(folder, capsys) -> None:
    assert main(["init", "photos"]) == 0
    said = capsys.readouterr().out
    assert said.index("this CPU, 1 device") < said.index("Next: difftune fit")


def test_sizes_lie_within_what_the_base_allows() -> None:
    for base in [*CLASSES.values(), *CAPTIONS.values()]:
        assert base.steps[0] < base.steps[1]
        assert base.bank[0] < base.bank[1]
        assert 0 < int(base.share * base.batch_size) < base.batch_size
    assert [rounded(count) for count in (1, 404, 4040, 40_400)] == [10, 400, 4000, 40_500]


def test_two_configs_for_one_folder_do_not_share_what_a_run_keeps(folder) -> None:
    places = []
    for args in (["--captions"], ["--control", "canny"], [], ["--output", "other.yaml"]):
        written("photos", *args, "--overwrite")
        config = yaml.safe_load(Path("other.yaml" if "other.yaml" in args else "my.yaml").read_text())
        places.append(config["trainer"]["default_root_dir"])
        assert config["data"]["init_args"]["latent_cache"] == f"{places[-1]}/latents"
    assert places == ["runs/photos-captions", "runs/photos-canny", "runs/photos", "runs/other"]


def test_a_folder_with_train_and_val_holds_out_its_own_part(folder, tmp_path, capsys) -> None:
    for part, count in (("train", 12), ("Val", 2)):
        for name in ("rose", "lily"):
            for index in range(count):
                picture(Path("whole", part, name, f"{index}.png"), 5000 + index)
    data = written("whole")["data"]["init_args"]
    assert data["target"]["init_args"] == {"root": "whole/train"}
    assert data["val_target"]["init_args"] == {"root": "whole/Val"}
    assert "24 pictures of 2 classes in whole, and 4 in its held-out part" in capsys.readouterr().out
    captions = written("whole", "--captions", "--overwrite")["data"]["init_args"]
    assert captions["val_target"]["init_args"]["source"]["init_args"] == {"root": "whole/Val"}
    picture(Path("whole", "Val", "daisy", "0.png"), 1)
    assert main(["init", "whole", "--overwrite"]) == 2
    assert "classes that whole/train does not have: daisy" in capsys.readouterr().err


def test_classes_called_train_and_plane_are_classes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for index in range(12):
        picture(Path("vehicles", ("train", "plane")[index % 2], f"{index}.png"), index)
    assert written("vehicles")["data"]["init_args"]["num_classes"] == 2


@pytest.mark.parametrize(
    ("model", "size", "keys"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", 1024, {"frozen_dtype": "bfloat16"}),
        ("somebody/my-sdxl", 1024, {"frozen_dtype": "bfloat16"}),
        ("black-forest-labs/FLUX.1-dev", 1024, {"distilled_guidance": 3.5, "prompt_dropout": 0.0}),
        ("stabilityai/stable-diffusion-3.5-medium", 1024, {"frozen_dtype": "bfloat16"}),
        ("somebody/a-stable-diffusion", 512, {"gradient_checkpointing": True}),
    ],
)
def test_other_families_by_their_name(model, size, keys, captioned) -> None:
    config = written("pairs", "--model", model)
    module = config["model"]["init_args"]
    assert (module["model"], config["data"]["init_args"]["image_size"]) == (model, size)
    assert {key: module[key] for key in keys} == keys
    assert module["objective"]["init_args"].get("diffusion") is None, "the noise is the pipeline's"


@pytest.mark.parametrize("family", ["sdxl", "flux", "sd3"])
def test_a_pipeline_in_a_folder_is_known_by_its_class_and_is_built(family, captioned, tmp_path) -> None:
    """As far as the network; a run of each family is in tests/configs."""
    folder = getattr(pipelines, family)(tmp_path / "pipeline")
    config = written("pairs", "--model", str(folder))
    assert config["data"]["init_args"]["image_size"] == 1024
    args = "--config my.yaml --data.image_size 32 --model.image_size 32 --model.tuner.rank 4 --trainer.accelerator cpu"
    module = run_lightning([*args.split(), "--trainer.precision", "32-true"], run=False).model
    module.configure_model()
    assert any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(("gigabytes", "tuner"), [(24, "lightning_difftune.tuners.DiffFit"), (80, None)])
def test_a_small_gpu_gets_few_parameters(gigabytes, tuner, folder, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    device = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device_: device)
    model = written("photos")["model"]["init_args"]
    assert (model.get("tuner") or {}).get("class_path") == tuner
    assert model["optimizer"]["init_args"]["lr"] == (1e-3 if tuner else 1e-4)
