"""Exports from a user's view: the card, the hub, and the target libraries."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_difftune import TextToImageDiffTuningModule
from lightning_difftune.cli import main, model_card
from lightning_difftune.cli.export import plain_network, write_adapter
from lightning_difftune.cli.model_card import described, license_of
from lightning_difftune.models import export_network
from lightning_difftune.models.usage import usage_of_dit
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import LoRA


def exported(run, output, *args):
    return main(["export", "--ckpt_path", str(run.checkpoint), "--output", str(output), *args])


def alone(code, *args):
    """Run code in a separate process, which must not need this package."""
    code = f"import sys\n{code}\nassert 'lightning_difftune' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *map(str, args)], check=True, timeout=120)


@pytest.fixture
def measured_run(tiny_run, tmp_path):
    """The run with a measurement and a sample grid in its folder, as FID and SampleGrid leave them."""
    folder = tmp_path / "version_7"
    shutil.copytree(tiny_run.folder, folder)
    (folder / "metrics.csv").write_text(
        "epoch,step,train/loss,val/loss,val/fd_inception\n0,1,0.5,,\n0,2,,0.25,31.5\n0,2,0.4,,\n0,3,,0.125,\n"
    )
    (folder / "environment.json").write_text('{"processes": 2}')
    (folder / "samples").mkdir(exist_ok=True)
    for step, shade in ((2, 50), (3, 200)):
        Image.new("L", (4, 4), shade).save(folder / "samples" / f"step-{step:07d}.png")
    return tiny_run._replace(folder=folder, checkpoint=folder / "checkpoints" / tiny_run.checkpoint.name)


def test_a_damaged_environment_record_leaves_the_card_without_processes(measured_run, tmp_path):
    (measured_run.folder / "environment.json").write_text('{"processes": ')
    assert exported(measured_run, tmp_path / "flowers") == 0
    assert "| steps | 3 of batch 4 |" in (tmp_path / "flowers" / "README.md").read_text()


def test_a_folder_has_a_card_from_the_run(measured_run, tmp_path, capsys):
    assert exported(measured_run, tmp_path / "flowers", "--license", "mit") == 0
    card = ModelCard.load(tmp_path / "flowers" / "README.md")
    data = yaml.safe_load(card.content.split("---")[1])
    assert (data["license"], data["library_name"]) == ("mit", "diffusers")
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert "base_model" not in data  # tiny.safetensors is nothing on the hub
    (result,) = data["model-index"][0]["results"]
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found == {"val/loss": 0.125, "val/fd_inception": 31.5}
    for words in (
        "| base | tiny.safetensors (fingerprint",
        "| data | ImageFolder (root pictures), 3 classes, 8 px |",
        "| objective | DiffTuningObjective, MirroredPowerSchedule(tau=1), retention weight 0.1",
        "| memory bank | none |",
        "| optimizer | AdamW (lr 0.05",
        "Tuned by [Diff-Tuning](https://arxiv.org/abs/2406.00773) with lightning_difftune",
        "| steps | 3 of batch 4 on each of 2 processes |",
        "| val/fd_inception | 31.5 |",
        "![samples](samples.png)",
        "The base is licensed as `mit`",
        "import DiTTransformer2DModel, DDIMScheduler",
    ):
        assert words in card.text, card.text
    assert str(tmp_path.parent) not in card.content  # no paths of this machine
    assert Image.open(tmp_path / "flowers" / "samples.png").getpixel((0, 0)) == 200
    assert json.loads((tmp_path / "flowers" / "model_index.json").read_text())["id2label"]["2"] == "sunflower"


def test_what_was_measured_later_is_not_of_an_earlier_checkpoint(measured_run, tmp_path):
    with (measured_run.folder / "metrics.csv").open("a") as file:
        file.write("0,6,,9.5,99.5\n")
    Image.new("L", (4, 4), 10).save(measured_run.folder / "samples" / "step-0000007.png")
    config = yaml.safe_load((measured_run.folder / "config.yaml").read_text())
    config["trainer"]["accumulate_grad_batches"] = 4
    (measured_run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert exported(measured_run, tmp_path / "flowers") == 0
    card = (tmp_path / "flowers" / "README.md").read_text()
    assert "| val/loss | 0.125 |" in card
    assert "| val/fd_inception | 31.5 |" in card
    assert "9.5" not in card
    assert Image.open(tmp_path / "flowers" / "samples.png").getpixel((0, 0)) == 200
    assert "| steps | 3 of batch 4 on each of 2 processes, 4 batches per step |" in card


def test_a_card_says_that_the_sampler_needs_the_pretrained_model():
    guided = Sampler(None, 20, 1.5, None, domain_guidance=True, pretrained_tail=0.1)
    assert model_card.sampler_words(guided).endswith(
        "20 steps, guidance 1.5 away from the pre-trained model (Domain Guidance), 0.1 of the steps, the last ones, by "
        "the pre-trained model"
    )
    architecture = {"num_classes": 3, "in_channels": 1, "input_size": 8}
    stated = guided.settings()
    assert "which the loop above does not do" in usage_of_dit(architecture, stated, has_autoencoder=False)
    plain = usage_of_dit(architecture, Sampler().settings(), has_autoencoder=False)
    assert "which the loop above does not do" not in plain


def test_the_pictures_of_the_base_are_not_shown_as_the_tuned_models(tmp_path, monkeypatch):
    """``step-0000000.png``, where the checkpoint is of a step before the first grid."""
    monkeypatch.setattr(model_card, "model_card", lambda *arguments: f"picture: {arguments[4]!r}")
    Image.new("L", (4, 4)).save(tmp_path / "step-0000000.png")
    (tmp_path / "flowers").mkdir()
    run = SimpleNamespace(grids={"samples": {0: tmp_path / "step-0000000.png"}}, step=3)
    model_card.write_card(tmp_path / "flowers", SimpleNamespace(run=run), "diffusers", "", None, [])
    assert (tmp_path / "flowers" / "README.md").read_text() == "picture: ''"
    assert not (tmp_path / "flowers" / "samples.png").exists()


def test_a_file_has_its_card_beside(measured_run, tmp_path, capsys):
    assert exported(measured_run, tmp_path / "flowers.safetensors") == 0
    said = capsys.readouterr().out
    assert "licence of the base: unknown; name it with --license" in said
    card = ModelCard.load(tmp_path / "flowers.md")
    assert "![samples](flowers.png)" in card.text
    assert 'load_dit("flowers.safetensors")' in card.text
    assert card.data.license is None
    alone(
        """
import argparse
import json
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as file:
    assert json.loads(file.metadata()["class_names"])[:3] == ["oxeye_daisy", "rose", "sunflower"]
    assert file.get_tensor("y_embedder.embedding_table.weight").shape == (7, 16)
""",
        tmp_path / "flowers.safetensors",
    )
    (tmp_path / "mine.md").write_text("mine")
    assert exported(measured_run, tmp_path / "mine.safetensors") == 2
    assert (tmp_path / "mine.md").read_text() == "mine"
    assert not (tmp_path / "mine.safetensors").exists()


class Hub:
    """A stand-in for HfApi that records its calls."""

    asked: list = []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.asked.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, path_in_repo, commit_message):
        files = sorted(str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file())
        self.asked.append(("folder", repo_id, path_in_repo, files))

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, commit_message):
        self.asked.append(("file", repo_id, path_in_repo, Path(path_or_fileobj).name))


def test_nothing_is_pushed_unless_asked_for(measured_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    assert exported(measured_run, tmp_path / "a") == 0
    assert Hub.asked == []
    assert exported(measured_run, tmp_path / "b", "--push", "ada/flowers") == 0
    create, upload = Hub.asked
    assert create == ("create", "ada/flowers", False, True)
    assert upload[:3] == ("folder", "ada/flowers", None)
    assert {"README.md", "model_index.json", "samples.png", "transformer/config.json"} <= set(upload[3])
    assert "pushed to https://huggingface.co/ada/flowers" in capsys.readouterr().out
    Hub.asked.clear()
    assert exported(measured_run, tmp_path / "c.safetensors", "--push", "ada/one", "--private") == 0
    uploads = [("README.md", "c.md"), ("c.png", "c.png"), ("c.safetensors", "c.safetensors")]
    assert Hub.asked[0] == ("create", "ada/one", True, True)
    assert sorted(entry[2:] for entry in Hub.asked[1:]) == uploads


def test_a_hub_that_refuses_leaves_the_export(measured_run, tmp_path, monkeypatch, capsys):
    class Refusing(Hub):
        def create_repo(self, repo_id, **_):
            raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refusing)
    assert exported(measured_run, tmp_path / "a", "--push", "ada/flowers") == 2
    assert "could not be pushed to the hub (OSError: 401 Unauthorized). The export itself" in capsys.readouterr().err
    assert (tmp_path / "a" / "model_index.json").exists()
    assert exported(measured_run, tmp_path / "b", "--push", "flowers") == 2
    assert "--push takes user/name" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_networks_and_adapters_open_with_their_libraries_alone(pipeline_folder, tmp_path):
    module = TextToImageDiffTuningModule(pipeline_folder, tuner=LoRA(rank=2, target_modules=("to_q", "to_v")))
    module.configure_model()
    for parameter in module.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    export_network(plain_network(module, []), tmp_path / "unet")
    write_adapter(module, argparse.Namespace(output=tmp_path / "adapter", format="peft"), [])
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 8, 16)
    with torch.no_grad():
        save_file(
            {"x": x, "words": words, "y": module.denoise(x, t, {"prompt_embeds": words}).contiguous()},
            tmp_path / "io.safetensors",
        )
    code = """
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file
base, tuned, adapter, io = sys.argv[1:]
io = load_file(io)
given = io["x"], torch.tensor([5, 900])
merged = StableDiffusionPipeline.from_pretrained(base, unet=UNet2DConditionModel.from_pretrained(tuned)).unet
unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
before = unet(*given, encoder_hidden_states=io["words"]).sample
assert not torch.allclose(before, io["y"], atol=1e-2)
for network in (merged, PeftModel.from_pretrained(unet, adapter)):
    after = network(*given, encoder_hidden_states=io["words"]).sample
    torch.testing.assert_close(after, io["y"], rtol=1e-4, atol=1e-5)
"""
    alone(code, pipeline_folder, tmp_path / "unet", tmp_path / "adapter", tmp_path / "io.safetensors")


def test_adapters_come_from_a_lora_only(tiny_run, tmp_path, capsys):
    assert exported(tiny_run, tmp_path / "a", "--format", "peft") == 2
    assert "this run trained the whole network" in capsys.readouterr().err
    assert exported(tiny_run, tmp_path / "a.safetensors", "--format", "peft") == 2
    assert "only safetensors are a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_runs_adapter_and_its_card(tiny_run, tmp_path, monkeypatch, capsys):
    lora = ["--model.init_args.tuner", "lightning_difftune.tuners.LoRA", "--model.init_args.tuner.init_args.rank", "2"]
    logs = ["--trainer.logger.init_args.save_dir", str(tmp_path / "run")]
    assert main(["fit", "--config", str(tiny_run.config), *lora, *logs]) == 0
    (checkpoint,) = tmp_path.glob("run/lightning_logs/version_0/checkpoints/*.ckpt")
    assert exported(tiny_run._replace(checkpoint=checkpoint), tmp_path / "adapter", "--format", "peft") == 0
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert "PeftModel.from_pretrained" in card.text
    averages = torch.load(checkpoint, weights_only=True)["callbacks"]["EMA"]["averages"]
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(
        stored["base_model.model.blocks.0.attn.qkv.q.lora_A.weight"],
        averages["dit.blocks.0.attn.qkv.q.lora_A.default.weight"],
    )


@pytest.mark.parametrize(
    ("output", "library"), [("flowers-adapter", "diffusers"), ("adapter.safetensors", "lightning_difftune")]
)
def test_the_library_does_not_depend_on_the_name(measured_run, tmp_path, output, library):
    assert exported(measured_run, tmp_path / output) == 0
    card = (tmp_path / output).with_suffix(".md") if "." in output else tmp_path / output / "README.md"
    assert ModelCard.load(card).data.library_name == library


def test_a_row_whose_text_has_a_none_in_it_stays(measured_run, tmp_path):
    config = measured_run.folder / "config.yaml"
    config.write_text(config.read_text().replace("/pictures", "/None-such"))
    checkpoint = torch.load(measured_run.checkpoint, weights_only=True)
    torch.save(checkpoint | {"config": config.read_text()}, measured_run.checkpoint)
    assert exported(measured_run, tmp_path / "flowers") == 0
    assert "| data | ImageFolder (root None-such), 3 classes, 8 px |" in (tmp_path / "flowers/README.md").read_text()


def test_licences_of_bases(tmp_path, monkeypatch):
    assert license_of("dit-nano-omniglot") == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model")
    assert license_of(str(tmp_path)) == "cc-by-nc-4.0"
    assert license_of(str(tmp_path / "none.safetensors")) is None

    class Hub:
        def model_info(self, name, timeout):
            return type("Info", (), {"card_data": huggingface_hub.ModelCardData(license="openrail")})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert license_of("owner/model") == "openrail"
    monkeypatch.setattr(Hub, "model_info", lambda *_, **__: 1 / 0)
    assert license_of("owner/model") is None


def test_configs_in_words():
    inner = {"class_path": "a.ImageFolder", "init_args": {"root": "/home/ada/flowers", "extra": None}}
    outer = {"class_path": "b.Partition", "init_args": {"source": inner, "part": "train"}}
    assert described(outer) == "Partition (source ImageFolder (root flowers), part train)"
    assert described({"class_path": "b.Digits"}) == "b.Digits"
    assert described(None) is None
