"""What retention compares with: the noise, an online teacher, or stored predictions; alone and in a real fit."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import tiny_dit, tiny_weights

from lightning_difftune import (
    DiffTuningObjective,
    DiTDiffTuningModule,
    MemoryBank,
    MemoryBankDataModule,
    PowerSchedule,
    WeightedDiffTuningObjective,
)
from lightning_difftune.callbacks import EMA
from lightning_difftune.data import ArrayImages
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.draws import Draws, noise_of
from lightning_difftune.errors import ConfigError, StoreError
from lightning_difftune.losses import eps_mse_loss, hybrid_loss, v_mse_loss, variational_loss
from lightning_difftune.models import DiT
from lightning_difftune.retention_targets import OnlineTeacher, RetentionTarget, StoredPredictions
from lightning_difftune.sampling import Sampler
from lightning_difftune.weightings import MinSNRWeighting

TARGETS = [OnlineTeacher(), StoredPredictions()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


def stored_for(objective, teacher, x0, condition, seed=0):
    """The retained samples as a bank of stored predictions would give them."""
    target = StoredPredictions(seed)
    return {"latents": x0, **target.bank_columns(objective, torch.arange(len(x0)), x0, condition, teacher)}


def batch(retained=3):
    x0 = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x0, torch.tensor([0, 1, 2, 3, 6, 6, 6]), torch.arange(7) >= 7 - retained


# -- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("loss", [eps_mse_loss, v_mse_loss, hybrid_loss])
@torch.no_grad()
def test_a_network_that_is_its_own_teacher_has_nothing_to_retain(target, loss):
    model, objective = tiny_dit(), DiffTuningObjective(loss=loss, retention_target=target)
    x0, condition, is_retention = batch()
    retained = stored_for(objective, model, x0[4:], condition[4:])
    out = objective(model, x0, condition, is_retention, Draws(0, 0), retained, model)
    if loss is not hybrid_loss:
        assert out.retention < 1e-10
        return
    t = out.timesteps[4:]
    noise = retained["noise"] if isinstance(target, StoredPredictions) else Draws(0, 0)
    if isinstance(noise, Draws):
        noise.uniform(7)
        noise = noise.normal(7, 1, 8, 8)[4:]
    x_t = objective.diffusion.add_noise(x0[4:], noise, t)
    expected = variational_loss(model(x_t, t, condition[4:]), x0[4:], x_t, t, objective.diffusion)
    torch.testing.assert_close(out.per_sample[4:], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", [[6, 0, 5, 1, 2, 4, 3], [4, 5, 6, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
@pytest.mark.parametrize("target", TARGETS, ids=repr)
@torch.no_grad()
def test_retained_is_what_the_mask_says_wherever_it_stands(target, order):
    teacher, student = tiny_dit(), tiny_dit(seed=1)
    objective = DiffTuningObjective(loss=eps_mse_loss, retention_target=target)
    x0, labels, is_retention = batch()
    retained = stored_for(objective, teacher, x0[4:], labels[4:])
    t, noise = torch.tensor([5, 900, 30, 400, 600, 700, 800]), torch.randn(7, 1, 8, 8)
    if isinstance(target, StoredPredictions):
        t[4:], noise[4:] = retained["timesteps"], retained["noise"]
    asked = []

    def ask(x_t, t, condition):
        asked.append((t.tolist(), condition["labels"].tolist()))
        return teacher(x_t, t, condition["labels"])

    def denoise(x_t, t, condition):
        return student(x_t, t, condition["labels"])

    straight = objective.at(denoise, x0, {"labels": labels}, is_retention, t, noise, retained, ask)
    rows = torch.tensor(order)
    mixed = {name: column[torch.tensor([i - 4 for i in order if i >= 4])] for name, column in retained.items()}
    moved = objective.at(
        denoise, x0[rows], {"labels": labels[rows]}, is_retention[rows], t[rows], noise[rows], mixed, ask
    )
    torch.testing.assert_close(moved.per_sample, straight.per_sample[rows], rtol=1e-5, atol=1e-6)
    assert all(set(times) <= set(t[4:].tolist()) and set(asked_for) == {6} for times, asked_for in asked)
    drawn = objective(denoise, x0[rows], {"labels": labels[rows]}, is_retention[rows], Draws(0, 0), mixed, ask)
    if isinstance(target, StoredPredictions):
        assert drawn.timesteps[is_retention[rows]].tolist() == mixed["timesteps"].tolist()


def test_a_mask_of_another_number_than_the_banks_batch_is_refused():
    objective = DiffTuningObjective(loss=eps_mse_loss, retention_target=OnlineTeacher())
    x0, labels, is_retention = batch()
    with pytest.raises(ConfigError, match="The mask has 3 retained samples and the bank's batch 2"):
        objective(tiny_dit(), x0, labels, is_retention, Draws(0, 0), {"latents": x0[5:]}, tiny_dit())


@pytest.mark.parametrize("kind", [DiffTuningObjective, WeightedDiffTuningObjective])
@torch.no_grad()
def test_stored_and_online_are_the_same_at_the_same_noise(kind):
    teacher, student = tiny_dit(), tiny_dit(seed=1)
    x0, condition, is_retention = batch()
    outputs = []
    stored = stored_for(kind(), teacher, x0[4:], condition[4:])
    for target in TARGETS:
        objective = kind(loss=eps_mse_loss, weighting=MinSNRWeighting(), retention_target=target)
        t, noise = torch.full((7,), 9), torch.zeros(7, 1, 8, 8)
        t[4:], noise[4:] = stored["timesteps"], stored["noise"]
        outputs.append(objective.at(student, x0, condition, is_retention, t, noise, stored, teacher).per_sample)
    torch.testing.assert_close(*outputs)
    x_t = GaussianDiffusion().add_noise(x0[4:], stored["noise"], stored["timesteps"])
    difference = student(x_t, stored["timesteps"], condition[4:]) - teacher(x_t, stored["timesteps"], condition[4:])
    expected = difference[:, :1].square().flatten(1).mean(1)  # by hand, less the weights
    snr = objective.diffusion.snr(stored["timesteps"])
    weights = objective.weights(stored["timesteps"], torch.ones(3, dtype=torch.bool)) * snr.clamp(max=5) / snr
    torch.testing.assert_close(outputs[0][4:], expected * weights)


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_only_retention_changes_and_only_the_student_learns(target):
    teacher, student = tiny_dit(), tiny_dit(seed=1)
    x0, condition, is_retention = batch()
    retained = stored_for(DiffTuningObjective(), teacher, x0[4:], condition[4:])
    replay = DiffTuningObjective()(student, x0, condition, is_retention, Draws(0, 0))
    objective = DiffTuningObjective(retention_target=target)
    out = objective(student, x0, condition, is_retention, Draws(0, 0), retained, teacher)
    assert isinstance(target, RetentionTarget)
    torch.testing.assert_close(out.reconsolidation, replay.reconsolidation)
    assert torch.equal(out.timesteps[:4], replay.timesteps[:4])
    assert not torch.allclose(out.retention, replay.retention, rtol=0.01)
    out.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.final_layer.linear.weight.grad is not None


def test_the_teacher_is_asked_about_the_retained_samples_alone():
    seen = []

    def teacher(x_t, t, condition):
        seen.append((len(x_t), t, condition))
        return torch.zeros_like(x_t)

    x0, labels, is_retention = batch()
    condition = {"labels": labels, "nested": {"controls": torch.arange(14).view(7, 2)}, "absent": None}
    objective = DiffTuningObjective(loss=eps_mse_loss, retention_target=OnlineTeacher())
    retained = {"latents": x0[4:]}
    out = objective(lambda x_t, t, c: x_t, x0, condition, is_retention, Draws(0, 0), retained, teacher)
    ((count, t, part),) = seen
    assert count == 3
    assert torch.equal(t, out.timesteps[4:])
    assert torch.equal(part["labels"], labels[4:])
    assert torch.equal(part["nested"]["controls"], condition["nested"]["controls"][4:])
    assert part["absent"] is None


def test_timesteps_of_the_bank_follow_the_schedule_and_noise_is_not_that_of_the_sample():
    indices, x0 = torch.arange(2000), torch.zeros(2000, 1, 1, 1)
    zero = lambda x_t, t, condition: torch.zeros_like(x_t)  # noqa: E731
    uniform = WeightedDiffTuningObjective(PowerSchedule(1.0))
    falling = DiffTuningObjective(PowerSchedule(1.0))
    for objective, mean in ((uniform, 499.5), (falling, 333)):
        columns = StoredPredictions().bank_columns(objective, indices, x0, None, zero)
        assert abs(columns["timesteps"].float().mean() - mean) < 4 * 290 / 2000**0.5
    noise = columns["noise"].flatten()
    assert abs(noise.mean()) < 0.1
    assert abs(torch.corrcoef(torch.stack([noise, noise_of(0, indices, (1, 1, 1)).flatten()]))[0, 1]) < 0.1
    one = StoredPredictions().bank_columns(falling, torch.tensor([1234]), x0[:1], None, zero)
    assert all(torch.equal(one[name][0], columns[name][1234]) for name in columns)


def test_what_is_missing_is_said():
    x0, condition, is_retention = batch()
    model, retained = tiny_dit(), {"latents": x0[4:]}
    with pytest.raises(ConfigError, match="OnlineTeacher needs the pre-trained network"):
        DiffTuningObjective(retention_target=OnlineTeacher())(model, x0, condition, is_retention, None, retained)
    with pytest.raises(StoreError, match=r"no noise, predictions, timesteps.*another folder"):
        DiffTuningObjective(retention_target=StoredPredictions())(model, x0, condition, is_retention, None, retained)


# -- in a fit ---------------------------------------------------------------------------------------------------------


def module_of(weights, target, schedule=None, **settings):
    objective = DiffTuningObjective(schedule, retention_target=target)
    sampler = Sampler(num_inference_steps=2)
    return DiTDiffTuningModule(str(weights), num_classes=3, objective=objective, sampler=sampler, **settings)


def data_of(bank):
    pictures = np.random.default_rng(0).integers(0, 256, (22, 8, 8), dtype=np.uint8)
    target = ArrayImages(pictures, np.arange(22) % 3)
    return MemoryBankDataModule(target, 3, image_size=8, channels=1, bank=bank, bank_size=10, batch_size=5)


def fit(folder, module, bank, steps, *callbacks, ckpt_path=None):
    saver = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[*callbacks, saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data_of(bank), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@pytest.mark.parametrize("label_table", ["keep", "resize"])  # resized, the null class has another number
def test_the_first_step_retains_without_error(target, label_table, tmp_path, weights):
    module = module_of(weights, target, label_table=label_table)
    module.objective.loss = eps_mse_loss
    trainer = fit(tmp_path, module, tmp_path / "bank", 1)
    assert trainer.callback_metrics["train/retention"] < 1e-10
    trainer = fit(tmp_path, module, tmp_path / "bank", 3)
    assert trainer.callback_metrics["train/retention"] > 1e-8, "the teacher stays as it was"


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_resume_is_exact_and_the_teacher_in_no_checkpoint(target, tmp_path, weights):
    whole = module_of(weights, target)
    fit(tmp_path / "whole", whole, tmp_path / "bank", 7, EMA(decay=0.5))
    fit(tmp_path / "parts", module_of(weights, target), tmp_path / "bank", 3, EMA(decay=0.5))
    resumed = module_of(weights, target)
    fit(tmp_path / "parts", resumed, tmp_path / "bank", 7, EMA(decay=0.5), ckpt_path=tmp_path / "parts/last.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

    plain = module_of(weights, None)
    plain.configure_model()
    saved = torch.load(tmp_path / "parts/last.ckpt", weights_only=True)
    trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert set(saved["state_dict"]) == trained
    assert set(saved["callbacks"]["EMA"]["averages"]) == trained
    assert set(resumed.state_dict()) == set(plain.state_dict())


class TeacherIsHidden(L.Callback):
    """During a fit with an online teacher, the teacher is not part of the module."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        assert not pl_module.frozen_denoiser().training
        assert sum(isinstance(module, DiT) for module in pl_module.modules()) == 1


def test_the_teacher_is_not_part_of_the_module(tmp_path, weights):
    module = module_of(weights, OnlineTeacher())
    fit(tmp_path, module, tmp_path / "bank", 2, TeacherIsHidden())


def test_the_bank_of_stored_predictions_is_one_whatever_builds_it(tmp_path, weights):
    fit(tmp_path, module_of(weights, StoredPredictions()), tmp_path / "fit", 1)
    module = module_of(weights, StoredPredictions())
    module.configure_model()
    for rank in (1, 0):
        settings = {"batch_size": 64, "rank": rank, "world_size": 2}
        if rank:
            with pytest.raises(StoreError, match="unfinished"):
                MemoryBank.build(tmp_path / "two", module.bank_generator(), 10, **settings)
        else:
            MemoryBank.build(tmp_path / "two", module.bank_generator(), 10, **settings)
    for name in ("manifest.json", "shard-00000.safetensors"):
        assert (tmp_path / "fit" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    bank = MemoryBank(tmp_path / "fit").read(torch.tensor([4, 9]))
    x_t = module.objective.diffusion.add_noise(bank["latents"], bank["noise"], bank["timesteps"])
    with torch.no_grad():
        expected = tiny_dit()(x_t, bank["timesteps"], torch.tensor([6, 6]))[:, :1]
    torch.testing.assert_close(bank["predictions"], expected)


def test_a_bank_of_another_target_schedule_or_seed_is_refused(tmp_path, weights):
    fit(tmp_path, module_of(weights, None), tmp_path / "replay", 1)
    fit(tmp_path, module_of(weights, OnlineTeacher()), tmp_path / "replay", 1)  # it is the same bank
    with pytest.raises(StoreError, match=r"replay/manifest.json belongs to another.*stored_predictions"):
        fit(tmp_path, module_of(weights, StoredPredictions()), tmp_path / "replay", 1)
    fit(tmp_path, module_of(weights, StoredPredictions()), tmp_path / "stored", 1)
    for other in (
        module_of(weights, StoredPredictions(), PowerSchedule(0.5)),
        module_of(weights, StoredPredictions(seed=1)),
        module_of(weights, None),
    ):
        with pytest.raises(StoreError, match=r"stored/manifest.json belongs to another.*stored_predictions"):
            fit(tmp_path, other, tmp_path / "stored", 1)
