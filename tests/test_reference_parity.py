"""Ours against numbers that the authors' released code computed on a random tiny DiT.

``fixtures/official_dit_tiny.safetensors`` was made in float32 on a CPU, in eval mode, with thuml/Diffusion-Tuning at
commit fb6b90d (``models.py``, ``diffusion/``); its metadata says how.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.losses import eps_mse_loss, hybrid_loss, variational_loss
from lightning_difftune.models import DiT
from lightning_difftune.models.dit import sincos_2d
from lightning_difftune.objective import DiffTuningObjective, ObjectiveOutput
from lightning_difftune.sampling import ddim, sample

FIXTURE = Path(__file__).parent / "fixtures" / "official_dit_tiny.safetensors"
TOLERANCE = 1e-5
GRADIENTS = (
    "blocks.0.attn.qkv.weight",
    "final_layer.linear.weight",
    "t_embedder.mlp.0.weight",
    "y_embedder.embedding_table.weight",
)
GUIDANCE = {"nocfg": 1.0, "cfg1.5": 1.5, "cfg4": 4.0}


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    with safe_open(FIXTURE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def model(reference: dict[str, Tensor]) -> DiT:
    with safe_open(FIXTURE, "pt") as file:
        model = DiT(**json.loads(file.metadata()["config"]))
    model.load_state_dict({k.removeprefix("model."): v for k, v in reference.items() if k.startswith("model.")})
    return model.eval()


@pytest.fixture(scope="module")
def batch(model: DiT, reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """The training batch: eight target samples, then two retained ones, which have no class."""
    batch = {name: reference[f"train.{name}"] for name in ("x0", "noise", "t", "y", "x_t")}
    is_retention = torch.arange(len(batch["t"])) >= 8
    return {**batch, "is_retention": is_retention, "y": batch["y"].masked_fill(is_retention, model.null_class)}


@pytest.fixture(scope="module")
def objective(model: DiT, batch: dict[str, Tensor]) -> ObjectiveOutput:
    """The official preset's loss, with the gradients in ``model``."""
    output = DiffTuningObjective(retention_weight=0.1).at(
        model, batch["x0"], batch["y"], batch["is_retention"], batch["t"], batch["noise"]
    )
    output.loss.backward()
    return output


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
    assert error < TOLERANCE


def test_every_quantity_of_the_reference_has_a_test_here(reference: dict[str, Tensor]) -> None:
    inputs = {"forward.x", "forward.t", "forward.y", "ddim50.z", "ddim50.y"} | {
        f"train.{name}" for name in ("x0", "noise", "t", "y")
    }
    results = {"forward.output"} | {f"train.{name}" for name in ("x_t", "mse", "vb", "loss", "objective")}
    results |= {f"train.grad.{name}" for name in GRADIENTS} | {f"ddim50.{name}.samples" for name in GUIDANCE}
    assert {name for name in reference if not name.startswith("model.")} == inputs | results


def test_state_dict_has_the_official_names(model: DiT, reference: dict[str, Tensor]) -> None:
    assert {f"model.{name}" for name in model.state_dict()} == {n for n in reference if n.startswith("model.")}


def test_position_embedding_is_the_authors(reference: dict[str, Tensor]) -> None:
    assert torch.equal(sincos_2d(4, 48), reference["model.pos_embed"])


@torch.no_grad()
def test_forward_pass(model: DiT, reference: dict[str, Tensor]) -> None:
    output = model(reference["forward.x"], reference["forward.t"], reference["forward.y"])
    assert_close(output, reference["forward.output"])


def test_noisy_samples(batch: dict[str, Tensor]) -> None:
    assert_close(GaussianDiffusion().add_noise(batch["x0"], batch["noise"], batch["t"]), batch["x_t"])


@torch.no_grad()
def test_per_sample_losses(model: DiT, batch: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    x0, x_t, noise, t = (batch[name] for name in ("x0", "x_t", "noise", "t"))
    output, process = model(x_t, t, batch["y"]), GaussianDiffusion()
    assert {0, 1, 500, 999} <= set(t.tolist())  # both branches of the variational term
    assert_close(eps_mse_loss(output, x0, x_t, noise, t, process), reference["train.mse"])
    assert_close(variational_loss(output, x0, x_t, t, process), reference["train.vb"])
    assert_close(hybrid_loss(output, x0, x_t, noise, t, process), reference["train.loss"])


def test_objective_and_its_streams(objective: ObjectiveOutput, reference: dict[str, Tensor]) -> None:
    assert_close(objective.loss.detach().reshape(1), reference["train.objective"])
    assert_close(objective.per_sample.detach(), reference["train.loss"])
    assert_close(objective.reconsolidation.detach(), reference["train.loss"][:8].mean())
    assert_close(objective.retention.detach(), reference["train.loss"][8:].mean())


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.usefixtures("objective")
def test_gradients_of_the_objective(model: DiT, reference: dict[str, Tensor], name: str) -> None:
    theirs = reference[f"train.grad.{name}"]
    ours = model.get_parameter(name).grad
    assert ours is not None
    assert (ours - theirs).abs().max() / theirs.abs().max() < TOLERANCE


def test_ddim_at_50_steps_is_the_authors_ddim50_grid() -> None:
    scheduler = ddim()
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(980, -1, -20))


@pytest.mark.parametrize(("name", "scale"), GUIDANCE.items())
def test_ddim_samples(model: DiT, reference: dict[str, Tensor], name: str, scale: float) -> None:
    y = reference["ddim50.y"]
    samples = sample(
        model,
        reference["ddim50.z"],
        ddim(),
        num_inference_steps=50,
        condition=y,
        null_condition=torch.full_like(y, model.null_class),
        guidance_scale=scale,
        guidance_channels=3,
    )
    assert_close(samples, reference[f"ddim50.{name}.samples"])
