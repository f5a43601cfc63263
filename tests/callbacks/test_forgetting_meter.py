"""ForgettingMeter on a module from outside the package: measurements, intervals, files and errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from generating import ReferenceData, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_difftune import MeasuredSchedule
from lightning_difftune.callbacks import ForgettingMeter
from lightning_difftune.errors import CheckpointError, ConfigError, DataError

T = 20


class Denoising(L.LightningModule):
    """Its output is x_t times a weight per half of the timesteps; training moves the weight of the noisy half."""

    num_timesteps = T

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(0.5)  # must not be heard
        self.calls = 0
        self.loaded = 0

    def denoise(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls += len(x_t)
        assert (condition >= 0).all()
        return self.dropout(x_t * self.weight[(t >= T // 2).long()].view(-1, 1, 1, 1))

    def pretrained(self):
        self.loaded += 1

        def network(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            assert (condition == -1).all()
            return x_t

        return network

    def source_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, -1)

    def prepare(self, batch, draws) -> tuple[Tensor, Tensor, Tensor]:
        assert not self.training
        x0 = torch.cat([batch[kind]["x"] for kind in ("target", "retention") if kind in batch])
        return x0, torch.zeros(len(x0)), torch.arange(len(x0)) >= len(batch["target"]["x"])

    def denoising_losses(self, denoise, x0: Tensor, condition: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        s = ((t + 1) / T).view(-1, 1, 1, 1)
        x_t = (1 - s) * x0 + s * noise
        return (denoise(x_t, t, condition) - noise).square().flatten(1).mean(1)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        assert self.training
        assert self.dropout.training
        return (self.weight[1] - 1.1).square() + 0 * self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class Data(L.LightningDataModule):
    """Batches of two target samples and, if ``bank``, one of the bank."""

    def __init__(self, bank: bool = True, held_out: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.target, self.bank = (torch.randn(24, 1, 2, 2, generator=generator) for _ in range(2))
        self.with_bank, self.held_out = bank, held_out

    def train_dataloader(self) -> DataLoader:
        batches = [
            {"target": {"x": self.target[2 * i : 2 * i + 2], "names": ["a", "b"]}}
            | ({"retention": {"x": self.bank[i : i + 1], "names": ["c"]}} if self.with_bank else {})
            for i in range(12)
        ]
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        held_out = [{"target": {"x": self.target[i : i + 2]}} for i in range(0, self.held_out, 2)]
        return DataLoader(held_out, batch_size=None)


def losses_by_hand(data: Data, weight: Tensor, bins: int, samples: int) -> dict[str, list[float]]:
    """Each sample at its own timestep of each bin, one at a time."""
    from lightning_difftune.draws import Draws

    evenly = data.target[: data.held_out : data.held_out // samples]  # whatever the order of the held-out data
    x0 = torch.cat([evenly, data.bank[:samples]])
    result: dict[str, list[float]] = {"target": [], "bank": []}
    width = T // bins
    for k in range(bins):
        noise = Draws(0, k + 1).normal(*x0.shape)
        losses = []
        for i in range(2 * samples):
            t = int(k * width + (i % samples + 0.5) / samples * width)
            s = (t + 1) / T
            x_t = (1 - s) * x0[i] + s * noise[i]
            losses.append(float(((x_t * weight[int(t >= T // 2)] - noise[i]) ** 2).mean()))
        for kind, part in (("target", losses[:samples]), ("bank", losses[samples:])):
            result[kind].append(sum(part) / samples)
    return result


def test_losses_by_bin_of_both_kinds_and_both_networks(tmp_path: Path) -> None:
    meter, model, data = ForgettingMeter(2, num_bins=4, num_samples=4, dirpath=tmp_path / "out"), Denoising(), Data()
    make_trainer(tmp_path, meter, max_steps=7, limit_val_batches=0, val_check_interval=None).fit(model, data)
    assert [step for step, _ in meter.history] == [3, 4, 6, 7]  # four samples of the bank were seen by batch 3
    assert model.loaded == 1
    assert model.calls == 4 * 8 * len(meter.history)
    for kind, expected in losses_by_hand(data, model.weight.detach(), 4, 4).items():
        assert meter.history[-1][1][kind] == pytest.approx(expected, rel=1e-5)
    for kind, expected in losses_by_hand(data, torch.ones(2), 4, 4).items():
        assert meter.pretrained[kind] == pytest.approx(expected, rel=1e-5)
    assert model.training
    assert model.dropout.training


@pytest.mark.parametrize("several", [False, True])
def test_held_out_loaders_that_fit_was_given(tmp_path: Path, several: bool) -> None:
    data, meters = Data(), [ForgettingMeter(2, num_bins=4, num_samples=4, dirpath=tmp_path / name) for name in "ab"]
    held_out = [data.val_dataloader()] * 2 if several else data.val_dataloader()
    loaders: dict[str, Any] = {"train_dataloaders": data.train_dataloader(), "val_dataloaders": held_out}
    for meter, given in zip(meters, ({"datamodule": data}, loaders), strict=True):
        make_trainer(tmp_path, meter, max_steps=5, limit_val_batches=0, val_check_interval=None).fit(
            Denoising(), **given
        )
    assert meters[0].history == meters[1].history


def test_scalars_table_heat_map_and_schedule(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    meter = ForgettingMeter(3, num_bins=2, num_samples=4, seed=2)
    logger = CSVLogger(tmp_path)
    make_trainer(tmp_path, meter, max_steps=6, limit_val_batches=0, val_check_interval=None, logger=logger).fit(
        Denoising(), Data(held_out=4)
    )
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        (last,) = [row for row in csv.DictReader(file) if row["step"] == "6" and row["forgetting/target/t00-09"]]
    names = [f"{kind}/t{bin}" for kind in ("target", "bank") for bin in ("00-09", "10-19")]
    assert {f"{prefix}/{name}" for prefix in ("forgetting", "forgetting_gap") for name in names} <= last.keys()
    gap = float(last["forgetting_gap/target/t10-19"])
    assert gap == pytest.approx(meter.history[-1][1]["target"][1] - meter.pretrained["target"][1], rel=1e-4)
    assert float(last["forgetting_gap/bank/t00-09"]) == 0  # the quiet half was not trained

    folder = Path(logger.log_dir) / "forgetting"
    names = {path.name for path in folder.iterdir()}
    assert names == {"losses.csv", "forgetting.svg", "forgetting.png", "schedule.json"}
    with (folder / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(meter.history) * 2 * 2
    assert (rows[-1]["step"], rows[-1]["data"], rows[-1]["first_t"], rows[-1]["last_t"]) == ("6", "bank", "10", "19")
    levels = json.loads((folder / "schedule.json").read_text())["s"]
    assert levels == pytest.approx([5.5 / 20, 15.5 / 20])  # in the middle of s = 1/20 .. 10/20 and 11/20 .. 20/20
    schedule = MeasuredSchedule(folder / "schedule.json")
    assert schedule.reconsolidation(torch.tensor([0.1, 0.9])).tolist() == [0, 1]


def test_the_default_interval_follows_the_cost(tmp_path: Path) -> None:
    meter = ForgettingMeter(num_bins=4, num_samples=2)
    make_trainer(tmp_path, meter, max_steps=3, limit_val_batches=0, val_check_interval=None).fit(Denoising(), Data())
    assert meter.interval == 89  # 4 bins of 2 + 2 samples cost 16 passes, a step of 3 samples 9: 16 / 9 / 2 % = 88.9
    meter = ForgettingMeter(num_bins=4, num_samples=2)
    settings = {"max_steps": 2, "accumulate_grad_batches": 4, "limit_val_batches": 0, "val_check_interval": None}
    make_trainer(tmp_path, meter, **settings).fit(Denoising(), Data())
    assert meter.interval == 23  # a step of four such batches costs 36


def test_the_last_step_is_measured_however_the_run_ends(tmp_path: Path) -> None:
    class Ends(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    meter = ForgettingMeter(4, num_bins=2, num_samples=2)
    make_trainer(tmp_path, meter, Ends(), max_steps=20, limit_val_batches=0, val_check_interval=None).fit(
        Denoising(), Data()
    )
    steps = [step for step, _ in meter.history]
    assert steps[-2:] == [4, 5]
    assert len(set(steps)) == len(steps)


def test_without_a_bank_the_target_is_measured_alone(tmp_path: Path) -> None:
    meter, data = ForgettingMeter(1, num_bins=2, num_samples=4), Data(bank=False)
    make_trainer(tmp_path, meter, max_steps=2, limit_val_batches=0, val_check_interval=None).fit(Denoising(), data)
    assert [list(losses) for _, losses in meter.history] == [["target"]] * 3
    assert [step for step, _ in meter.history] == [0, 1, 2]
    before, after = meter.history[0][1]["target"], meter.history[-1][1]["target"]
    assert before == pytest.approx(meter.pretrained["target"])
    assert after[1] != before[1]


def test_a_resumed_run_measures_the_same_samples(tmp_path: Path) -> None:
    def run(steps: int, folder: str, ckpt_path: str | None = None) -> ForgettingMeter:
        meter = ForgettingMeter(2, num_bins=2, num_samples=3, dirpath=tmp_path / "out")
        saver = ModelCheckpoint(tmp_path / folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        trainer = make_trainer(tmp_path, meter, saver, max_steps=steps, limit_val_batches=0, val_check_interval=None)
        trainer.fit(Denoising(), Data(), ckpt_path=ckpt_path)
        return meter

    whole = run(8, "whole")
    run(5, "parts")
    resumed = run(8, "parts", str(tmp_path / "parts" / "last.ckpt"))
    assert [step for step, _ in resumed.history] == [2, 4, 5, 6, 8]
    expected, found = dict(whole.history), dict(resumed.history)
    for step in (2, 4, 6, 8):
        assert found[step].keys() == {"target", "bank"}
        for kind, losses in found[step].items():
            assert losses == pytest.approx(expected[step][kind])
    again = run(8, "parts", str(tmp_path / "parts" / "last.ckpt"))
    assert again.history == resumed.history, "nothing was left to train"
    with pytest.raises(CheckpointError, match="has 2 bins, this one 10"):
        ForgettingMeter().load_state_dict(whole.state_dict())


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_bins of ForgettingMeter must be at least 1"):
        ForgettingMeter(num_bins=0)
    with pytest.raises(ConfigError, match="BoringModel lacks some of num_timesteps"):
        make_trainer(tmp_path, ForgettingMeter()).fit(BoringModel())
    with pytest.raises(ConfigError, match="needs held-out target data"):
        make_trainer(tmp_path, ForgettingMeter(), limit_val_batches=0, val_check_interval=None).fit(
            Denoising(), Data(held_out=0)
        )
    with pytest.raises(DataError, match=r'takes batches \{"target".* found a Tensor'):
        make_trainer(tmp_path, ForgettingMeter()).fit(Denoising(), ReferenceData())
