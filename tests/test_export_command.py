"""``difftune export``: from a run's checkpoint to files that others open, with every tuner that can be merged."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
import yaml
from tiny import tiny_config, tiny_weights, write_pictures

from lightning_difftune.cli import main
from lightning_difftune.cli.export import difference, plain_network, write
from lightning_difftune.models import DiT, export_dit, load_dit
from lightning_difftune.models.diffusers_layout import load_exact_transformer
from lightning_difftune.sampling import Sampler

T, Y = torch.tensor([0, 500, 999]), torch.tensor([0, 2, 6])


def output_of(model):
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(x, T, Y)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    tiny_weights(folder)
    write_pictures(folder / "pictures", 6)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}}
    config = tiny_config({"optimizer": optimizer}, {"val_target": None, "batch_size": 4}, {"max_steps": 3})
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(autouse=True)
def in_the_project(project, monkeypatch):
    monkeypatch.chdir(project)


RUNS = {}


def checkpoint_of(project, tuner=None, ema=False):
    """The checkpoint of a finished run, in a folder as the logger leaves it."""
    if (tuner, ema) not in RUNS:
        place = project / f"run/{tuner}-{ema}"
        args = ["fit", "--config", "run.yaml", "--trainer.logger.init_args.save_dir", str(place)]
        if tuner is not None:
            args += ["--model.init_args.tuner", f"lightning_difftune.tuners.{tuner}"]
        if tuner == "LoRA":
            args += ["--model.init_args.tuner.init_args.rank", "2"]
        if tuner == "AdaptFormer":
            args += ["--model.init_args.tuner.init_args.bottleneck", "4"]
        if tuner == "VPTDeep":
            args += ["--model.init_args.tuner.init_args.blocks", "[0]"]
        if ema:
            args += ["--trainer.callbacks+", "lightning_difftune.callbacks.EMA", "--trainer.callbacks.decay", "0.5"]
        assert main(args) == 0
        (RUNS[tuner, ema],) = place.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    return RUNS[tuner, ema]


def exported(checkpoint, output, capsys, *more):
    capsys.readouterr()
    status = main(["export", "--ckpt_path", str(checkpoint), "--output", str(output), *more])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def tuned_state(checkpoint):
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name.removeprefix("dit."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(("option", "said"), [([], "weights: averaged by Lightning\n"), (["--raw"], "as trained\n")])
def test_averages_of_lightning_are_told_from_the_trained_weights(project, tmp_path, capsys, option, said):
    """Its WeightAveraging saves them as the state of the module, and that as trained under another key."""
    content = torch.load(checkpoint_of(project, None), weights_only=True)
    trained = {name: torch.full_like(tensor, 0.5) for name, tensor in content["state_dict"].items()}
    trained["dit.pos_embed"] = load_dit("tiny.safetensors").pos_embed.data  # Lightning saves all of it
    torch.save({**content, "current_model_state": trained}, tmp_path / "averaged.ckpt")
    status, printed = exported(tmp_path / "averaged.ckpt", tmp_path / "tuned.safetensors", capsys, *option)
    assert status == 0, printed
    assert said in printed
    expected = trained if option else content["state_dict"]
    assert (
        load_dit(tmp_path / "tuned.safetensors")
        .state_dict()["x_embedder.proj.bias"]
        .equal(expected["dit.x_embedder.proj.bias"])
    )


@pytest.mark.parametrize("suffix", [".safetensors", ""])
@pytest.mark.parametrize("tuner", [None, "BitFit", "DiffFit", "LoRA"])
def test_what_is_exported_is_the_tuned_network(project, tuner, suffix, tmp_path, capsys):
    from lightning_difftune import tuners

    checkpoint, output = checkpoint_of(project, tuner), tmp_path / f"tuned{suffix}"
    status, said = exported(checkpoint, output, capsys)
    assert status == 0, said
    expected = load_dit("tiny.safetensors")
    if tuner is not None:
        (tuners.LoRA(rank=2) if tuner == "LoRA" else getattr(tuners, tuner)()).apply(expected)
    before = output_of(expected)
    expected.load_state_dict({**expected.state_dict(), **tuned_state(checkpoint)})
    again = load_dit(output)
    torch.testing.assert_close(output_of(again), output_of(expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output_of(again), before, atol=1e-2)
    assert again.class_names[:3] == ["ant", "bee", "cat"]
    if not suffix:  # diffusers opens it
        x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            theirs = load_exact_transformer(output)(x, timestep=T, class_labels=Y).sample
        torch.testing.assert_close(theirs, output_of(expected), rtol=1e-4, atol=1e-4)
        from diffusers import DiTTransformer2DModel

        DiTTransformer2DModel.from_pretrained(output / "transformer")
    assert f"tuner: {f'{tuner}, merged' if tuner else 'none'}" in said
    assert "weights: as trained; the checkpoint has no averages" in said
    assert re.search(r"tuned from tiny\.safetensors", said)
    assert re.search(r"checked: read back, .* differ .* by \d\.\de[-+]\d+", said)
    assert f"wrote {output} (" in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16 frozen", "bfloat16"])
@pytest.mark.parametrize("family", ["TextToImageDiffTuningModule", "ControlNetDiffTuningModule"])
def test_networks_of_diffusers_are_merged_and_written_as_folders(family, dtype, pipeline_folder, tmp_path):
    import lightning_difftune
    from lightning_difftune.tuners import LoRA

    tuner = LoRA(rank=2, target_modules=("to_q", "to_v"))
    more = {"annotator": Whole()} if family.startswith("Control") else {}
    if dtype == "bfloat16 frozen" and family.startswith("Text"):
        more["frozen_dtype"] = "bfloat16"
    module = getattr(lightning_difftune, family)(model=pipeline_folder, tuner=tuner, **more)
    module.configure_model()
    module.eval()
    torch.manual_seed(3)  # with which a UNet in bfloat16 rounded the outputs of equal ControlNets differently
    for parameter in module.trainable_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if dtype == "bfloat16":  # as trained with bf16-true
        module.bfloat16()
    done = []
    write(module, plain_network(module, done), tmp_path / "tuned", done)
    (network,) = module.trainable_modules()
    again = type(network).from_pretrained(tmp_path / "tuned")
    assert not any("lora" in name for name in again.state_dict())
    assert done[0] == "tuner: LoRA, merged into the plain network"
    assert float(re.search(r"by (\S+) of the largest", done[1]).group(1)) < 1e-5
    assert difference(module, again) < 1e-5
    with torch.no_grad():
        next(again.parameters()).add_(0.5)
    assert difference(module, again) > 1e-3


class Whole:
    channels = 1

    def __call__(self, pictures):
        return pictures[:, :1]

    def identity(self):
        return "whole"


def test_averages_are_taken_unless_told_otherwise(project, tmp_path, capsys):
    checkpoint = checkpoint_of(project, ema=True)
    status, said = exported(checkpoint, tmp_path / "average.safetensors", capsys)
    assert status == 0, said
    assert "weights: averaged over 3 updates" in said
    averages = torch.load(checkpoint, weights_only=True)["callbacks"]["EMA"]["averages"]
    found = load_dit(tmp_path / "average.safetensors").state_dict()
    for name, tensor in averages.items():
        assert torch.equal(found[name.removeprefix("dit.")], tensor)
    status, said = exported(checkpoint, tmp_path / "raw.safetensors", capsys, "--raw")
    assert status == 0, said
    raw = load_dit(tmp_path / "raw.safetensors").state_dict()
    assert all(torch.equal(raw[name], tensor) for name, tensor in tuned_state(checkpoint).items())
    assert not torch.equal(raw["blocks.0.mlp.fc1.weight"], found["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(("tuner", "reason"), [("AdaptFormer", "ReLU"), ("VPTDeep", "attention")])
def test_what_cannot_be_merged_says_what_to_do(project, tuner, reason, tmp_path, capsys):
    status, said = exported(checkpoint_of(project, tuner), tmp_path / "tuned.safetensors", capsys)
    assert status == 2
    assert re.search(rf"{tuner} cannot be merged.*{reason}.*Keep the run's checkpoint", said, re.DOTALL)
    assert not list(tmp_path.iterdir())


def test_the_config_is_in_the_checkpoint_or_next_to_it_or_given(project, tmp_path, capsys):
    content = torch.load(checkpoint_of(project), weights_only=True)
    config = content.pop("config")
    alone, with_config = tmp_path / "alone" / "run.ckpt", tmp_path / "with_config" / "run.ckpt"
    for folder in (alone.parent, with_config.parent):
        folder.mkdir()
        torch.save(content, folder / "run.ckpt")
    (with_config.parent / "config.yaml").write_text(config)
    status, said = exported(alone, tmp_path / "tuned.safetensors", capsys)
    assert status == 2
    assert re.search(r"run\.ckpt does not hold the config of its run.*none next to it.*--config BASE", said, re.DOTALL)
    moved = shutil.copy(checkpoint_of(project), tmp_path / "moved.ckpt")
    for number, (path, options) in enumerate(((alone, ("--config=run.yaml",)), (with_config, ()), (moved, ()))):
        status, said = exported(path, tmp_path / f"tuned{number}.safetensors", capsys, *options)
        assert status == 0, said


def test_data_that_is_elsewhere_is_not_needed(project, tmp_path, capsys):
    elsewhere = ["--data.init_args.target.init_args.root", "nowhere"]
    status, said = exported(checkpoint_of(project), tmp_path / "tuned.safetensors", capsys, *elsewhere)
    assert status == 0, said
    assert "class names: 3 of the checkpoint" in said
    expected = ["ant", "bee", "cat"]
    assert load_dit(tmp_path / "tuned.safetensors").class_names == expected
    content = torch.load(checkpoint_of(project), weights_only=True)
    assert content["class_names"] == expected
    content["class_names"] = None  # as checkpoints were before they kept the names
    old = tmp_path / "version_0" / "old.ckpt"
    old.parent.mkdir()
    torch.save(content, old)
    shutil.copy(checkpoint_of(project).parents[1] / "config.yaml", old.parent)
    status, said = exported(old, tmp_path / "old.safetensors", capsys, *elsewhere)
    assert status == 0, said
    assert "class names: none, since the data cannot be opened" in said
    assert load_dit(tmp_path / "old.safetensors").class_names is None
    assert exported(old, tmp_path / "named.safetensors", capsys)[0] == 0
    assert load_dit(tmp_path / "named.safetensors").class_names == expected


@pytest.mark.parametrize("suffix", [".safetensors", ""])
def test_how_pictures_are_drawn_travels_with_the_model(project, suffix, tmp_path, capsys):
    solver = ["--model.init_args.sampler.num_inference_steps", "7", "--model.init_args.sampler.scheduler"]
    solver += ['{"class_path": "diffusers.DPMSolverMultistepScheduler"}']
    status, said = exported(checkpoint_of(project), tmp_path / f"tuned{suffix}", capsys, *solver)
    assert status == 0, said
    again = Sampler.from_settings(load_dit(tmp_path / f"tuned{suffix}").sampling)
    assert (type(again.scheduler).__name__, again.num_inference_steps) == ("DPMSolverMultistepScheduler", 7)
    assert again.scheduler.config.lambda_min_clipped == -float("inf")
    if not suffix:
        from diffusers import DPMSolverMultistepScheduler

        theirs = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "tuned" / "scheduler")
        assert theirs.config.lambda_min_clipped == -float("inf")


def test_mistakes_are_refused_and_change_nothing(project, tmp_path, capsys):
    checkpoint = checkpoint_of(project)
    assert main(["export", "--ckpt_path", str(checkpoint)]) == 2
    assert "needs a place for the result: --output" in capsys.readouterr().err
    (tmp_path / "taken.safetensors").write_text("mine")
    status, said = exported(checkpoint, tmp_path / "taken.safetensors", capsys)
    assert (status, (tmp_path / "taken.safetensors").read_text()) == (2, "mine")
    assert "exists. Choose another path, or pass --overwrite" in said
    assert exported(checkpoint, tmp_path / "taken.safetensors", capsys, "--overwrite")[0] == 0
    load_dit(tmp_path / "taken.safetensors")
    for output, reason in [
        ("tuned.zip", "an export is a file ending in .safetensors or a folder"),
        ("taken.safetensors/tuned", "cannot be written, since .*taken.safetensors is a file. Choose another --output"),
    ]:
        status, said = exported(checkpoint, tmp_path / output, capsys)
        assert status == 2
        assert re.search(reason, said)
    assert exported(tmp_path / "none.ckpt", tmp_path / "x.safetensors", capsys)[0] == 2
    model = DiT(8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=6)
    export_dit(model, tmp_path / "other.safetensors")
    other = ["--model.init_args.model", str(tmp_path / "other.safetensors")]
    status, said = exported(checkpoint, tmp_path / "x.safetensors", capsys, *other)
    assert status == 2
    assert "trained from tiny.safetensors" in said


def test_a_merge_that_computes_something_else_is_not_exported(project, tmp_path, capsys, monkeypatch):
    from lightning_difftune.tuners import LoRA

    def forgets(self, model):
        return load_dit("tiny.safetensors").requires_grad_(False)

    checkpoint = checkpoint_of(project, "LoRA")
    monkeypatch.setattr(LoRA, "merge", forgets)
    status, said = exported(checkpoint, tmp_path / "tuned.safetensors", capsys)
    assert status == 2
    assert re.search(r"Not exported: .*differs from the tuned network.*check its merge", said, re.DOTALL)
    assert not list(tmp_path.iterdir())
