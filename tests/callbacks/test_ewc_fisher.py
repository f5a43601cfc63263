"""Fisher-weighted distances and the penalty, against plain twins, in modules that know nothing of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import tiny_dit
from torch import Tensor, nn

from lightning_difftune import DiTDiffTuningModule, MemoryBank, MemoryBankDataModule
from lightning_difftune.callbacks import EWC
from lightning_difftune.callbacks.fisher import DiagonalFisher
from lightning_difftune.data import ArrayImages
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import LoRA

SAMPLES = torch.randn(12, 1, 32, generator=torch.Generator().manual_seed(5)).unbind()


def boring_loss(module: L.LightningModule, batch: Tensor) -> Tensor:
    return module(batch).square().mean()


def fisher_of_boring(count: int = 12) -> DiagonalFisher:
    return DiagonalFisher(count, batches=SAMPLES, loss=boring_loss)


class Boring(BoringModel):
    """Lightning's own example with dropout, and with an explicit penalty as the twin of the callback's."""

    def __init__(self, penalty: float = 0.0, weights: dict[str, Tensor] | None = None, lr: float = 0.1) -> None:
        torch.manual_seed(1)
        super().__init__()
        self.explicit, self.weights, self.lr = penalty, weights, lr
        self.dropout = nn.Dropout(0.3)
        self.start = {name: p.detach().clone() for name, p in self.named_parameters()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self(self.dropout(batch)).square().mean()
        for name, parameter in self.named_parameters():
            weight = 1.0 if self.weights is None else self.weights[name]
            loss = loss + self.explicit / 2 * (weight * (parameter - self.start[name].to(parameter)).square()).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


class Manual(Boring):
    """The same by hand, with one optimizer for each parameter."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=self.lr, momentum=0.5) for p in self.parameters()]


def fit(folder: Path, model: L.LightningModule, *callbacks: L.Callback, data: Any = None, **options: Any) -> L.Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    L.seed_everything(0)
    settings = {
        "max_steps": 5,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "default_root_dir": folder,
    }
    trainer = L.Trainer(**settings | options, callbacks=list(callbacks))
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


def assert_same(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def twin_of_fisher(model: Boring, count: int) -> dict[str, np.ndarray]:
    """For y = W x + b and the loss mean(y^2): dW = 2/K y x^T and db = 2/K y, squared and averaged, in float64."""
    weight, bias = (model.start[f"layer.{name}"].double().numpy() for name in ("weight", "bias"))
    of_weight, of_bias = np.zeros_like(weight), np.zeros_like(bias)
    for sample in SAMPLES[:count]:
        x = sample[0].double().numpy()
        y = weight @ x + bias
        of_weight += np.outer(2 / len(y) * y, x) ** 2 / count
        of_bias += (2 / len(y) * y) ** 2 / count
    return {"layer.weight": of_weight, "layer.bias": of_bias}


@pytest.mark.parametrize("count", [5, 12, 100])
def test_information_and_distance_against_the_twin(tmp_path: Path, count: int) -> None:
    model, ewc = Boring(), EWC(every_n_steps=1, fisher=fisher_of_boring(count), blocks=r"layer\.\w+")
    fit(tmp_path, model, ewc)
    expected = twin_of_fisher(model, min(count, 12))
    found = ewc.state_dict()["fisher"]
    total = 0.0
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-5, atol=1e-12)
        move = (model.get_parameter(name).detach() - model.start[name]).double().numpy()
        total += (part := float((values * move**2).sum()))
        assert ewc.measure(model)[f"ewc_fisher/{name}"].item() == pytest.approx(part, rel=1e-4)
    measured = ewc.measure(model)
    assert measured["ewc_fisher/total"].item() == pytest.approx(total, rel=1e-4)
    assert model.trainer.callback_metrics["ewc_fisher/total"] == measured["ewc_fisher/total"]
    assert torch.equal(ewc.measure(model)["ewc_fisher/total"], measured["ewc_fisher/total"]), (
        "measuring changes nothing"
    )


def test_measuring_leaves_training_alone(tmp_path: Path) -> None:
    class Draws(DiagonalFisher):
        def estimate(self, trainer: L.Trainer, module: Any, weights: Any) -> dict[str, Tensor]:
            def loss(module: Any, batch: Tensor) -> Tensor:
                assert not module.dropout.training
                return boring_loss(module, batch + torch.randn_like(batch))

            self.batches, self.loss = SAMPLES, loss
            return super().estimate(trainer, module, weights)

    plain, measured = Boring(), Boring()
    fit(tmp_path, plain)
    fit(tmp_path, measured, EWC(every_n_steps=1, fisher=Draws()))
    assert_same(plain, measured, rtol=0, atol=0)
    assert measured.dropout.training


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.2}], ids=["plain", "accumulate", "clip"]
)
def test_the_penalty_is_that_of_the_loss(tmp_path: Path, weighted: bool, options: dict[str, Any]) -> None:
    reference = Boring()
    weights = {name: torch.tensor(value).float() for name, value in twin_of_fisher(reference, 12).items()}
    strength = 800.0 if weighted else 8.0
    explicit, ours, none = Boring(strength, weights if weighted else None), Boring(), Boring()
    fit(tmp_path, explicit, **options)
    ewc = EWC(every_n_steps=1, fisher=fisher_of_boring() if weighted else None, penalty=strength)
    trainer = fit(tmp_path, ours, ewc, **options)
    fit(tmp_path, none, **options)
    assert_same(ours, explicit, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours.layer.weight, none.layer.weight, atol=1e-4), "it matters here"
    distance = ewc.measure(ours)["ewc_fisher/total" if weighted else "ewc/total"]
    assert trainer.callback_metrics["ewc/penalty"].item() == pytest.approx(strength / 2 * distance.item(), rel=1e-5)


def test_the_penalty_in_manual_optimization_reaches_each_optimizers_parameters_once(tmp_path: Path) -> None:
    explicit, ours = Manual(3.0), Manual()
    fit(tmp_path, explicit)
    fit(tmp_path, ours, EWC(penalty=3.0))
    assert_same(ours, explicit, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_the_penalty_is_not_scaled_by_amp(tmp_path: Path, fused: bool) -> None:
    """The scale of fp16 is 2^16: a penalty that took part in it, or missed it, would be off by that factor."""

    class Adam(Boring):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

    explicit, ours = Adam(3.0), Adam()
    for model, callbacks in ((explicit, []), (ours, [EWC(penalty=3.0)])):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        fit(tmp_path, model, *callbacks, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert_same(ours, explicit, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_keeps_the_information(tmp_path: Path) -> None:
    def ewc() -> EWC:
        return EWC(fisher=fisher_of_boring(), penalty=100.0)

    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    whole, whole_ewc = Boring(), ewc()
    fit(tmp_path, whole, whole_ewc, saver)
    resumed, resumed_ewc = Boring(), ewc()
    fit(tmp_path, resumed, resumed_ewc, ckpt_path=tmp_path / "step=2.ckpt")
    for name, values in whole_ewc.state_dict()["fisher"].items():
        assert torch.equal(resumed_ewc.state_dict()["fisher"][name], values)

    fit(tmp_path, Boring(), EWC(), ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="p{step}"))
    with pytest.raises(CheckpointError, match=r"pstep=2\.ckpt has no Fisher information.*Resume without `fisher`"):
        fit(tmp_path, Boring(), ewc(), ckpt_path=tmp_path / "pstep=2.ckpt")


# -- LoRA, and the memory bank ----------------------------------------------------------------------------------------


class DenoisesNoise(L.LightningModule):
    """A tiny DiT in somebody's own module."""

    def __init__(self, tuner: LoRA | None) -> None:
        super().__init__()
        self.model = tiny_dit(input_size=4, patch_size=2, depth=2)
        self.before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if tuner is not None:
            tuner.apply(self.model)

    def loss(self, batch: Tensor) -> Tensor:
        t = torch.full((len(batch),), 500)
        return self.model(batch, t, t % 6).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(2)
        return torch.utils.data.DataLoader(torch.randn(24, 1, 4, 4, generator=generator), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def dit_fisher() -> DiagonalFisher:
    samples = torch.randn(6, 1, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    return DiagonalFisher(batches=samples, loss=lambda module, batch: module.loss(batch))


def test_lora_has_the_information_of_its_merged_weights(tmp_path: Path) -> None:
    whole, low = EWC(fisher=dit_fisher()), EWC(fisher=dit_fisher())
    fit(tmp_path, DenoisesNoise(None), whole, max_steps=1)
    tuner = LoRA(rank=2, alpha=6)
    module = DenoisesNoise(tuner)
    fit(tmp_path, module, low, max_steps=3)
    of_whole, of_low = whole.state_dict()["fisher"], low.state_dict()["fisher"]
    merged, expected = tuner.merge(module.model), 0.0
    for block in range(2):
        name = f"model.blocks.{block}.attn.qkv"
        information = of_whole[f"{name}.weight"].chunk(3)
        for part, values in (("q", information[0]), ("v", information[2])):
            torch.testing.assert_close(of_low[f"{name}.{part}"], values, rtol=1e-3, atol=1e-8)
        key = f"blocks.{block}.attn.qkv.weight"
        move = merged.get_parameter(key) - module.before[key]
        expected += (of_whole[f"{name}.weight"] * move.square()).sum().item()
    table = "y_embedder.embedding_table.weight"
    move = merged.get_parameter(table) - module.before[table]
    expected += (of_whole[f"model.{table}"] * move.square()).sum().item()
    assert low.measure(module)["ewc_fisher/total"].item() == pytest.approx(expected, rel=1e-3)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert any("base_layer.weight" in name for name in frozen), "frozen again"


@pytest.mark.parametrize("fisher", [None, dit_fisher()], ids=["plain", "fisher"])
def test_loras_penalty_is_that_of_its_merged_weights(tmp_path: Path, fisher: DiagonalFisher | None) -> None:
    ewc = EWC(every_n_steps=1, fisher=fisher, penalty=2.0)
    module = DenoisesNoise(LoRA(rank=2, alpha=6))
    fit(tmp_path, module, ewc, max_steps=2)
    name = "model.blocks.0.attn.qkv.v"
    layer = module.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    information = ewc.state_dict().get("fisher", {}).get(name, torch.ones(16, 16))
    value = 2.0 / 2 * (information * (6 / 2 * b @ a).square()).sum()
    expected = torch.autograd.grad(value, (a, b))
    module.zero_grad()
    ewc.on_before_optimizer_step(module.trainer, module, module.optimizers().optimizer)
    for parameter, gradient in zip((a, b), expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-9)


def test_the_memory_bank_and_the_retention_loss_are_the_default(tmp_path: Path) -> None:
    model = tiny_dit()
    module = DiTDiffTuningModule(model, num_classes=3, sampler=Sampler(num_inference_steps=2))
    pictures = ArrayImages(np.random.default_rng(0).integers(0, 256, (10, 8, 8), np.uint8), np.arange(10) % 3)
    data = MemoryBankDataModule(pictures, 3, 8, 1, bank=tmp_path / "bank", bank_size=6, batch_size=5)
    ewc = EWC(fisher=DiagonalFisher(num_samples=4))
    fit(tmp_path, module, ewc, data=data, max_steps=2)
    fresh, bank = module.pretrained().requires_grad_(True), MemoryBank(tmp_path / "bank")
    module.dit = fresh.eval()
    expected = torch.zeros_like(fresh.final_layer.linear.weight)
    for index in range(4):
        loss = module.retention_loss(bank.read(torch.tensor([index])), index)
        (gradient,) = torch.autograd.grad(loss, fresh.final_layer.linear.weight)
        expected += gradient**2 / 4
    torch.testing.assert_close(ewc.state_dict()["fisher"]["dit.final_layer.linear.weight"], expected)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no memory bank\. Pass batches and a loss"):
        fit(tmp_path, Boring(), EWC(fisher=DiagonalFisher()))
    with pytest.raises(ConfigError, match="Boring does not say what its loss on a sample of the bank is"):
        fit(tmp_path, Boring(), EWC(fisher=DiagonalFisher(batches=SAMPLES)))
    with pytest.raises(ConfigError, match="are empty"):
        fit(tmp_path, Boring(), EWC(fisher=DiagonalFisher(batches=[], loss=boring_loss)))
    with pytest.raises(ConfigError, match="does not depend on the weights"):
        fit(tmp_path, Boring(), EWC(fisher=DiagonalFisher(batches=SAMPLES, loss=lambda module, batch: batch.sum())))
    with pytest.raises(ConfigError, match="num_samples of DiagonalFisher must be at least 1, found 0"):
        DiagonalFisher(num_samples=0)
    with pytest.raises(ConfigError, match=r"penalty of EWC must be at least 0, found -1\.0"):
        EWC(penalty=-1.0)


# -- two processes ----------------------------------------------------------------------------------------------------


class Report(L.Callback):
    """Writes what a process has at the end of its run, since forked processes do not return."""

    def __init__(self, ewc: EWC, folder: Path) -> None:
        self.ewc, self.folder = ewc, folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(
            {
                "fisher": self.ewc.state_dict()["fisher"],
                "weights": {name: p.detach() for name, p in pl_module.named_parameters()},
                "logged": trainer.callback_metrics["ewc_fisher/total"],
                "measured": self.ewc.measure(pl_module)["ewc_fisher/total"],
            },
            self.folder / f"rank-{trainer.global_rank}-of-{trainer.world_size}.pt",
        )


def test_two_processes_share_the_samples_and_stay_in_step(tmp_path: Path) -> None:
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        ewc = EWC(every_n_steps=1, fisher=fisher_of_boring(11), penalty=100.0)
        fit(tmp_path, Boring(), ewc, Report(ewc, tmp_path), devices=devices, strategy=strategy, max_steps=3)
    alone, first, second = (
        torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in ("0-of-1", "0-of-2", "1-of-2")
    )
    for name, values in alone["fisher"].items():
        torch.testing.assert_close(first["fisher"][name], values)
        assert torch.equal(first["fisher"][name], second["fisher"][name])
        assert torch.equal(first["weights"][name], second["weights"][name]), "the penalty is the same on both"
    assert first["logged"] == second["logged"] == first["measured"]
    assert first["logged"] > 0
