from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_autoencoder
from torch import Tensor, nn

from lightning_difftune import __version__
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.models import DiT, FrozenAutoencoder, export_dit, load_dit
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.diffusers_layout import load_exact_transformer, make_exact
from lightning_difftune.sampling import Sampler, ddim, sample, scheduler_named

FORMATS = {"safetensors": "model.safetensors", "diffusers": "model"}


def random_dit(cls: type[DiT] = DiT, num_classes: int = 10, **changes: object) -> DiT:
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "depth": 2, "num_heads": 2}
    model = cls(**{**sizes, "num_classes": num_classes, **changes})  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.eval()


def contents(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize(("format", "name"), FORMATS.items())
@pytest.mark.parametrize(
    "changes", [{}, {"learn_sigma": False, "in_channels": 1}, {"class_names": [f"{i}, {i}th" for i in range(10)]}]
)
def test_export_reads_back_as_the_same_model(tmp_path: Path, format, name: str, changes: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    model = random_dit(**changes)
    path = export_dit(model, tmp_path / "new" / name, format)
    loaded = load_dit(path)
    assert fingerprint(loaded) == fingerprint(model)
    assert loaded.architecture == model.architecture
    assert loaded.class_names == model.class_names
    assert contents(path.parent) == {name}


def test_safetensors_describe_themselves(tmp_path: Path) -> None:
    model = random_dit(num_classes=2, class_names=["cat", "dog"])
    with safe_open(export_dit(model, tmp_path / "model.safetensors"), "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(model.state_dict())
    assert json.loads(metadata["architecture"]) == model.architecture
    assert json.loads(metadata["class_names"]) == ["cat", "dog"]
    assert (metadata["format_version"], metadata["library_version"]) == ("1", __version__)


def test_resized_model_reads_back(tmp_path: Path) -> None:
    model = random_dit()
    model.resize_label_table(3, ["a", "b", "c"])
    loaded = load_dit(export_dit(model, tmp_path / "model.safetensors"))
    assert (loaded.null_class, loaded.class_names) == (3, ["a", "b", "c"])


@pytest.mark.parametrize(("format", "name"), FORMATS.items())
def test_half_precision_model_is_written_in_float32(tmp_path: Path, format, name: str) -> None:  # type: ignore[no-untyped-def]
    model = random_dit().bfloat16()
    model.pos_embed.data = random_dit().pos_embed.data  # diffusers computes it and cannot store a rounded one
    loaded = load_dit(export_dit(model, tmp_path / name, format))
    assert fingerprint(loaded) == fingerprint(model.float())


@pytest.mark.parametrize(("format", "name"), FORMATS.items())
def test_nothing_is_overwritten_unasked(tmp_path: Path, format, name: str) -> None:  # type: ignore[no-untyped-def]
    first, second = random_dit(), random_dit()
    path = export_dit(first, tmp_path / name, format)
    with pytest.raises(CheckpointError, match=rf"{name} exists.*overwrite=True"):
        export_dit(second, path, format)
    assert fingerprint(load_dit(path)) == fingerprint(first)
    export_dit(second, path, format, overwrite=True)
    assert fingerprint(load_dit(path)) == fingerprint(second)
    assert contents(tmp_path) == {name}


class Shifted(DiT):
    """Computes something that its weights do not determine."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) + 1e-4


def with_nan() -> DiT:
    model = random_dit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    return model


def with_infinite_output() -> DiT:
    model = random_dit()
    with torch.no_grad():
        model.final_layer.linear.weight.fill_(3e38)
    return model


def with_adapter() -> DiT:
    model = random_dit()
    model.blocks[0].adapter = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(("format", "name"), FORMATS.items())
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: random_dit(Shifted), "the model that was read back computes a different output"),
        (with_nan, "NaN or infinity in 1 tensors.*fc1.weight"),
        (with_infinite_output, "outputs are not finite"),
        (with_adapter, r"The model to export does not hold.*unexpected \(blocks\.0\.adapter"),
    ],
)
def test_model_that_does_not_read_back_leaves_everything_as_it_was(tmp_path, format, name, build, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CheckpointError, match=message):
        export_dit(build(), tmp_path / name, format)
    assert contents(tmp_path) == set()

    good = random_dit()
    path = export_dit(good, tmp_path / name, format)
    with pytest.raises(CheckpointError, match=message):
        export_dit(build(), path, format, overwrite=True)
    assert contents(tmp_path) == {name}
    assert fingerprint(load_dit(path)) == fingerprint(good)


def test_other_positions_cannot_go_to_diffusers(tmp_path: Path) -> None:
    model = random_dit()
    model.pos_embed.data += 0.1
    assert torch.equal(load_dit(export_dit(model, tmp_path / "model.safetensors")).pos_embed, model.pos_embed)
    with pytest.raises(CheckpointError, match=r"pos_embed.*no position embeddings other than the fixed ones"):
        export_dit(model, tmp_path / "model", "diffusers")
    assert contents(tmp_path) == {"model.safetensors"}


@pytest.mark.parametrize(("format", "name"), FORMATS.items())
def test_full_disk_leaves_nothing(tmp_path: Path, format, name: str) -> None:  # type: ignore[no-untyped-def]
    model = random_dit()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"Cannot write .*Is the disk full"):
            export_dit(model, tmp_path / name, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == set()


def test_paths_and_arguments_that_do_not_fit_the_format(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        export_dit(random_dit(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="autoencoder goes into a diffusers folder"):
        export_dit(random_dit(), tmp_path / "model.safetensors", autoencoder=frozen_autoencoder())
    with pytest.raises(ConfigError, match="format of export_dit must be 'safetensors' or 'diffusers', found 'onnx'"):
        export_dit(random_dit(), tmp_path / "model.onnx", "onnx")  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Cannot write"):
        export_dit(random_dit(), tmp_path / "file" / "model.safetensors")


def test_export_leaves_the_random_numbers_and_the_mode_alone(tmp_path: Path) -> None:
    model = random_dit().train()
    state = torch.get_rng_state()
    export_dit(model, tmp_path / "model.safetensors")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def frozen_autoencoder() -> FrozenAutoencoder:
    return FrozenAutoencoder(tiny_autoencoder(8, 8, sample_size=16), scaling_factor=0.5)


class TestPipeline:
    def test_draws_what_our_loop_draws_once_made_exact(self, tmp_path: Path) -> None:
        from diffusers import DiTPipeline

        model = random_dit(num_classes=1000, class_names=[f"class {i}, number {i}" for i in range(1000)])
        autoencoder = frozen_autoencoder()
        pipeline = DiTPipeline.from_pretrained(
            export_dit(model, tmp_path / "model", "diffusers", autoencoder=autoencoder)
        )
        pipeline.set_progress_bar_config(disable=True)
        labels = pipeline.get_label_ids(["class 3", "number 999"])
        assert labels == [3, 999]

        def draw() -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return pipeline(labels, 1.5, generator, num_inference_steps=10, output_type="pt").images * 2 - 1

        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        y = torch.tensor(labels)
        ours = autoencoder.decode(sample(model, noise, ddim(), 10, y, torch.full_like(y, model.null_class), 1.5))
        assert not torch.allclose(draw(), ours, atol=1e-3)
        make_exact(pipeline.transformer)
        torch.testing.assert_close(draw(), ours, atol=1e-5, rtol=0)

    def test_scheduler_is_the_one_we_sample_with(self, tmp_path: Path) -> None:
        from diffusers import DDIMScheduler

        path = export_dit(random_dit(), tmp_path / "model", "diffusers")
        theirs, ours = DDIMScheduler.from_pretrained(path / "scheduler").config, ddim().config
        assert {k: v for k, v in theirs.items() if k[0] != "_"} == {k: v for k, v in ours.items() if k[0] != "_"}

    def test_opens_without_an_autoencoder(self, tmp_path: Path) -> None:
        from diffusers import DiTPipeline

        model = random_dit()
        path = export_dit(model, tmp_path / "model", "diffusers")
        transformer = make_exact(DiTPipeline.from_pretrained(path, vae=None).transformer)
        x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 999]), torch.tensor([1, model.null_class])
        with torch.no_grad():
            expected = model(x, t, y)
            assert torch.equal(transformer(x, timestep=t, class_labels=y).sample, expected)
            assert torch.equal(load_exact_transformer(path)(x, timestep=t, class_labels=y).sample, expected)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_classes": 10}, "Pass the autoencoder that the latents come from as `vae=`. Its class 1000"),
            ({"num_classes": 1000}, "draws with it, guidance included"),
            ({"num_classes": 10, "in_channels": 1}, "cannot draw with it"),
        ],
    )
    def test_readme_says_what_differs(self, tmp_path: Path, changes: dict, words: str) -> None:
        readme = (export_dit(random_dit(**changes), tmp_path / "m", "diffusers") / "README.md").read_text()
        assert "make_exact" in readme
        assert "downscale_freq_shift" in readme
        assert words in readme

    def test_a_velocity_model_is_not_offered_to_the_pipeline(self, tmp_path: Path) -> None:
        model = random_dit()
        model.sampling = {"scheduler": "FlowMatchEulerDiscreteScheduler", "scheduler_config": {"shift": 1.0}}
        readme = (export_dit(model, tmp_path / "m", "diffusers") / "README.md").read_text()
        assert "which diffusers' `DiTPipeline` does not integrate" in readme

    @pytest.mark.parametrize("guided", [None, 3])
    @pytest.mark.parametrize("solver", ["DDIM", "DPMSolverMultistep", "EulerDiscrete"])
    def test_the_readmes_code_draws_what_we_draw(self, tmp_path: Path, solver: str, guided: int | None) -> None:
        model = random_dit(num_classes=10)
        sampler = Sampler(scheduler_named(solver, ddim().config), 5, guidance_scale=2.0, guidance_channels=guided)
        model.sampling = sampler.settings()
        autoencoder = frozen_autoencoder()
        code = code_of(export_dit(model, tmp_path / "m", "diffusers", autoencoder=autoencoder))
        found: dict[str, Tensor] = {}
        exec(code, found)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        y = torch.tensor([0, 1])
        ours = autoencoder.decode(sampler(model, noise, y, torch.full_like(y, 10)))
        torch.testing.assert_close(found["pictures"], ours, atol=1e-5, rtol=0)

    def test_the_readmes_code_does_without_this_package(self, tmp_path: Path) -> None:
        code = code_of(export_dit(random_dit(in_channels=1), tmp_path / "m", "diffusers"))
        code += "\nimport sys\nassert pictures.shape == (2, 1, 8, 8)\nassert 'lightning_difftune' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)


def code_of(folder: Path) -> str:
    """The Python of an export's README, for that folder."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    return code.replace("path/to/this/folder", str(folder))
