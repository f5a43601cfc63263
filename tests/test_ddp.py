"""Several processes do what one does: fit, its bank, validate and predict. Run as a script, it is one of them."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from tiny import finish, quiet_trainer, start, tiny_weights
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_difftune import DiffTuningObjective, DiTDiffTuningModule, MemoryBank, MemoryBankDataModule
from lightning_difftune.callbacks import EMA, FID, Preemption
from lightning_difftune.data import ArrayImages
from lightning_difftune.draws import Draws
from lightning_difftune.errors import ConfigError
from lightning_difftune.models import load_dit
from lightning_difftune.sampling import Sampler

STEPS = 8
BANK_SIZE = 1030  # two shards, one for each process


class Losses(L.Callback):
    """The loss and the shares of every step on this process, and what is logged of it."""

    def __init__(self):
        self.values, self.logged, self.shares = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())
        names = ("train/loss", "train/reconsolidation", "train/retention")
        self.logged.append([trainer.callback_metrics[name].item() for name in names])
        self.shares.append([len(batch["target"]["class_labels"]), len(batch["retention"]["latents"])])


class FirstPixels(torch.nn.Module):
    """Features of a picture that cost nothing."""

    num_features = 4

    def forward(self, pictures):
        return pictures.flatten(1)[:, :4].float()


def measured_fid(folder, weights, world_size):
    """The distance, and a hash of every picture that this process generated for it, by index."""
    hashes, module = {}, module_of(weights)
    original = module.generate

    def generate(indices):
        pictures = original(indices)
        hashes.update(
            {str(i): hashlib.sha256(p.numpy()).hexdigest() for i, p in zip(indices.tolist(), pictures, strict=True)}
        )
        return pictures

    fid = FID(num_samples=30, batch_size=4, feature_extractor=FirstPixels(), generate=generate)
    trainer_of(folder, world_size, fid).validate(module, data_of(None, world_size), verbose=False)
    return {"fid": fid.last_value, "pictures": hashes}


def module_of(folder):
    return DiTDiffTuningModule(
        str(folder / "tiny.safetensors"),
        num_classes=3,
        label_dropout=0.3,
        sampler=Sampler(num_inference_steps=2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),  # Adam would blow rounding up
    )


def data_of(bank, world_size):
    pictures = np.random.default_rng(0).integers(
        0, 256, (30 + 129, 8, 8), dtype=np.uint8
    )  # 129: 64 batches of 2 and one of 1
    train, val = (ArrayImages(part, np.arange(len(part)) % 3) for part in (pictures[:30], pictures[30:]))
    return MemoryBankDataModule(
        train,
        3,
        image_size=8,
        channels=1,
        bank=bank,
        bank_size=BANK_SIZE,
        batch_size=max(5, 10 // world_size),  # 8 target samples an optimizer step and 2 of the bank
        val_target=val,
        horizontal_flip=True,
    )


def trainer_of(folder, world_size, *callbacks):
    strategy = "ddp" if world_size > 1 else "auto"
    validated = {"check_val_every_n_epoch": None, "val_check_interval": 4}
    return quiet_trainer(
        folder, STEPS, *callbacks, devices=world_size, strategy=strategy, enable_checkpointing=False, **validated
    )


def run(weights, folder, world_size):
    """Every command, one after the other, and a report of what this process saw."""
    if world_size == 3:  # no batch of 10 divides by 3
        trainer_of(folder, 3).predict(module_of(weights), data_of(folder / "predicted", 3), return_predictions=False)
        (validated,) = trainer_of(folder, 3).validate(module_of(weights), data_of(None, 3), verbose=False)
        report = {"validated": validated["val/loss"], **measured_fid(folder, weights, 3)}
        (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(report))
        return
    module, losses, average = module_of(weights), Losses(), EMA(decay=0.5)
    trainer = trainer_of(folder, world_size, losses, average)
    trainer.fit(module, data_of(folder / "bank", world_size))
    rank = trainer.global_rank
    fitted = trainer.callback_metrics["val/loss"].item()
    (validated,) = trainer_of(folder, world_size).validate(module, data_of(None, world_size), verbose=False)
    trainer_of(folder, world_size).predict(
        module_of(weights), data_of(folder / "predicted", world_size), return_predictions=False
    )
    (untuned,) = trainer_of(folder, world_size).validate(module_of(weights), data_of(None, world_size), verbose=False)
    report = {"losses": losses.values, "logged": losses.logged, "shares": losses.shares, "fitted": fitted}
    report |= {"validated": validated["val/loss"], "untuned": untuned["val/loss"]}
    report |= measured_fid(folder, weights, world_size)
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))
    if rank == 0:
        with average.average_parameters(module):
            torch.save(dict(module.state_dict()), folder / "average.pt")
        torch.save(dict(module.state_dict()), folder / "weights.pt")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folder of the pre-trained weights."""
    return tiny_weights(tmp_path_factory.mktemp("weights")).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory, weights):
    """The folders of the run on one process and of the same run on two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    processes = start(__file__, 2, weights, two)
    try:
        run(weights, one, 1)
        finish(processes)
    finally:
        for process in processes:
            process.kill()
    return one, two


@pytest.fixture(scope="module")
def three(weights, tmp_path_factory):
    """The folder of what three processes did."""
    folder = tmp_path_factory.mktemp("three")
    finish(start(__file__, 3, weights, folder))
    return folder


def report(folder, rank):
    return json.loads((folder / f"rank-{rank}.json").read_text())


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_losses_and_weights_are_those_of_one_process(runs):
    one, two = runs
    first, second = (np.array(report(two, rank)["losses"]) for rank in range(2))
    expected = np.array(report(one, 0)["losses"])
    assert len(expected) == STEPS
    assert np.abs(first - second).max() > 0.01  # each process has samples of its own
    np.testing.assert_allclose((first + second) / 2, expected, rtol=1e-4)
    for file in ("weights.pt", "average.pt"):
        assert_close(*(torch.load(folder / file, weights_only=True) for folder in (one, two)))


def test_the_bank_is_the_same_to_the_byte(runs):
    one, two = runs
    files = sorted(file.name for file in (one / "bank").iterdir())
    assert files == ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    for folder in (two / "bank", one / "predicted", two / "predicted"):
        assert sorted(file.name for file in folder.iterdir()) == files
        for file in files:
            assert (folder / file).read_bytes() == (one / "bank" / file).read_bytes()
        MemoryBank(folder).verify()


def test_the_validation_loss_counts_every_picture_once(runs):
    one, two = runs
    expected = report(one, 0)
    for rank in range(2):
        assert report(two, rank)["fitted"] == pytest.approx(expected["fitted"], rel=1e-4)
        assert report(two, rank)["validated"] == pytest.approx(expected["validated"], rel=1e-4)


@pytest.mark.slow
def test_three_processes_do_the_same_with_uneven_shares(runs, three):
    one, _ = runs
    for rank in range(3):
        assert report(three, rank)["validated"] == pytest.approx(report(one, 0)["untuned"], rel=1e-5)
    for file in (one / "bank").iterdir():
        assert (three / "predicted" / file.name).read_bytes() == file.read_bytes()
    assert pictures_of(three, 3) == pictures_of(one, 1)


def test_what_is_logged_is_the_mean_of_the_global_batch(runs):
    one, two = runs
    expected = np.array(report(one, 0)["logged"])
    assert np.array_equal(report(two, 0)["logged"], report(two, 1)["logged"])
    np.testing.assert_allclose(report(two, 0)["logged"], expected, rtol=1e-4)
    np.testing.assert_allclose(expected[:, 0], report(one, 0)["losses"])


def test_the_shares_of_both_streams_are_exact_on_every_process(runs):
    one, two = runs
    assert report(one, 0)["shares"] == [[8, 2]] * STEPS
    assert [report(two, rank)["shares"] for rank in range(2)] == [[[4, 1]] * STEPS] * 2


def pictures_of(folder, world_size):
    """Hashes of the pictures that were generated for the distance, by index."""
    found = [report(folder, rank) for rank in range(world_size)]
    assert sum(len(share["pictures"]) for share in found) == 30  # each by one process
    return {index: value for share in found for index, value in share["pictures"].items()}


def test_the_pictures_of_fid_are_the_same_to_the_bit(runs):
    one, two = runs
    assert pictures_of(one, 1) == pictures_of(two, 2)
    distances = [report(one, 0)["fid"], report(two, 0)["fid"], report(two, 1)["fid"]]
    assert distances == pytest.approx(distances[:1] * 3, rel=1e-9)


def run_until_stopped(weights, folder, world_size):
    """A long run that saves when it is stopped; the second process says when it may be."""
    trainer = trainer_of(folder, world_size, Preemption(), EMA(decay=0.5))
    trainer.fit_loop.epoch_loop.max_steps = 1_000_000
    if trainer.global_rank == 1:
        trainer.callbacks.append(Ready(folder / "ready"))
    trainer.fit(module_of(weights), data_of(folder / "bank", world_size))


class Ready(L.Callback):
    """Writes a file after the fifth step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            self.path.touch()


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step_when_one_is_told_to(runs, weights, tmp_path):
    processes = start(__file__, 2, weights, tmp_path, "stop")
    try:
        while not (tmp_path / "ready").exists():
            assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert "Stopped by a signal after step" in outputs[0], outputs[0]
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] >= 5


class SavesAt(L.Callback):
    """Saves after some batches, as ``batches-5.ckpt``."""

    def __init__(self, folder, *batches):
        self.folder, self.batches = folder, batches

    def on_train_batch_end(self, trainer, *args):
        if (done := trainer.fit_loop.total_batch_idx + 1) in self.batches:
            trainer.save_checkpoint(self.folder / f"batches-{done}.ckpt")


def run_resumed(weights, folder, world_size):
    """Four steps of three batches and, without those before it, from one batch and from the end of a step."""

    def fit(name, ckpt_path=None):
        module, average = module_of(weights), EMA(decay=0.5)
        saves = SavesAt(folder, 5, 6) if ckpt_path is None else L.Callback()
        trainer = quiet_trainer(
            folder,
            4,
            average,
            saves,
            devices=world_size,
            strategy="ddp" if world_size > 1 else "auto",
            enable_checkpointing=False,
            accumulate_grad_batches=3,
        )
        trainer.fit(module, data_of(folder / "bank", world_size), ckpt_path=ckpt_path)
        if trainer.global_rank == 0:
            with average.average_parameters(module):
                averages = {f"average.{name}": x.clone() for name, x in module.state_dict().items()}
            torch.save(module.state_dict() | averages, folder / f"{name}-{world_size}.pt")

    if world_size > 1:
        left = folder / f"left-by-{os.environ['RANK']}"
        atexit.register(lambda: distributed.is_initialized() or left.touch())  # after what the fit registers
        fit("whole")
    for batches in (5, 6):
        fit(f"from-{batches}", folder / f"batches-{batches}.ckpt")


def test_a_resumed_run_of_two_processes_is_the_undisturbed_one(weights, tmp_path):
    """Within a window of accumulated gradients and after it, on two processes, and the rest of the steps on one."""
    finish(start(__file__, 2, weights, tmp_path, "resume"))
    assert {path.name for path in tmp_path.glob("left-by-*")} == {"left-by-0", "left-by-1"}, "gloo may abort at exit"
    run_resumed(weights, tmp_path, 1)
    whole, *others = (
        torch.load(tmp_path / f"{name}.pt") for name in ("whole-2", "from-6-2", "from-5-2", "from-6-1", "from-5-1")
    )
    assert all(torch.equal(whole[name], others[0][name]) for name in whole)
    for other in others:
        assert_close(whole, other)
    assert not torch.equal(*(whole[f"{kind}dit.final_layer.linear.weight"] for kind in ("", "average.")))


def run_sharded(weights, folder, world_size):
    """The objective on a DiT whose parameters are shared out, and on whole copies whose gradients are averaged."""
    distributed.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (world_size,)), distributed.get_rank()
    found = []
    for sharded in (False, True):
        dit, objective, losses = load_dit(weights / "tiny.safetensors"), DiffTuningObjective(), []
        if sharded:
            for part in (*dit.blocks, dit):
                fully_shard(part, mesh=mesh)
        optimizer = torch.optim.SGD([p for p in dit.parameters() if p.requires_grad], lr=0.1)
        for step in range(STEPS):
            draws = Draws(0, step, "cpu", rank, world_size)
            is_retention = torch.tensor([False] * 4 + [True])
            loss = objective(dit, draws.normal(5, 1, 8, 8), torch.arange(5) % 3, is_retention, draws).loss
            loss.backward()
            for p in [] if sharded else optimizer.param_groups[0]["params"]:
                distributed.all_reduce(p.grad)
                p.grad /= world_size
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        state = get_model_state_dict(dit, options=StateDictOptions(full_state_dict=sharded, cpu_offload=sharded))
        held = sum(p.to_local().numel() if sharded else p.numel() for p in dit.parameters())
        found.append((losses, state, held))
    whole, shared = found
    assert whole[0] == shared[0]
    assert 1.9 < whole[2] / shared[2] < 2.1
    if rank == 0:
        assert_close(whole[1], shared[1])
    distributed.destroy_process_group()


@pytest.mark.slow
def test_fully_sharded_training_is_that_of_whole_copies(runs, weights, tmp_path):
    finish(start(__file__, 2, weights, tmp_path, "shard"))


def run_forked(weights, folder, world_size):
    """Fit as ``ddp_notebook`` does, in processes that this one starts, and write the weights that the module gets."""
    module = module_of(weights)
    trainer = quiet_trainer(folder, STEPS, devices=world_size, strategy="ddp_fork")
    trainer.fit(module, data_of(folder / "bank", world_size))
    torch.save(dict(module.state_dict()), folder / "weights.pt")


def test_a_module_has_the_weights_that_other_processes_trained(runs, weights, tmp_path):
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    job = [sys.executable, __file__, weights, tmp_path, "fork"]
    subprocess.run(job, env={**os.environ, **environment}, check=True, timeout=200)
    assert_close(*(torch.load(folder / "weights.pt") for folder in (runs[0], tmp_path)))


def validation_batches(pictures, world_size):
    """How many held-out batches each process has."""
    data = MemoryBankDataModule(images(4), 1, image_size=8, channels=1, val_target=images(pictures))
    counts = []
    for rank in range(world_size):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        counts.append(len(list(data.val_dataloader())))
    return counts


def images(count):
    return ArrayImages(np.zeros((count, 8, 8), dtype=np.uint8), np.zeros(count, dtype=np.int64))


@pytest.mark.parametrize(("pictures", "world_size"), [(2, 2), (9, 8), (65, 64), (200, 8), (5000, 8)])
def test_no_process_is_without_a_batch_while_the_others_validate(pictures, world_size):
    counts = validation_batches(pictures, world_size)
    assert min(counts) >= 1
    assert sum(counts) == sum(validation_batches(pictures, 1))


def test_too_few_held_out_pictures_for_the_processes_are_refused():
    with pytest.raises(ConfigError, match="3 pictures in 3 batches, too few for 4 processes"):
        validation_batches(3, 4)


if __name__ == "__main__":
    jobs = {
        (): run,
        ("stop",): run_until_stopped,
        ("shard",): run_sharded,
        ("fork",): run_forked,
        ("resume",): run_resumed,
    }
    job = jobs[tuple(sys.argv[3:])]
    job(Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["WORLD_SIZE"]))
