"""The loss by noise level on held-out pictures, next to that of the pre-trained model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_dit, tiny_pictures

from lightning_difftune import DiTDiffTuningModule, MemoryBankDataModule
from lightning_difftune.errors import ConfigError
from lightning_difftune.metrics import HeldOutLoss


def module_of():
    data = MemoryBankDataModule(tiny_pictures(), num_classes=3, val_target=tiny_pictures(11), image_size=8, channels=1)
    module = DiTDiffTuningModule(tiny_dit(), num_classes=3)
    module.configure_model()
    precision = SimpleNamespace(forward_context=torch.no_grad)
    state = SimpleNamespace(stage=None)
    module._trainer = SimpleNamespace(datamodule=data, precision_plugin=precision, state=state)
    return module.train()


def test_an_untouched_model_under_the_null_class_has_no_gap(monkeypatch):
    module = module_of()
    monkeypatch.setattr(type(module), "trainer", property(lambda self: self._trainer))
    with torch.no_grad():  # all classes are the null class
        table = module.dit.y_embedder.embedding_table.weight
        table.copy_(table[-1].expand_as(table))
    module._given = (module.dit, module._given[1])
    found = HeldOutLoss(num_samples=5, num_bins=4, batch_size=2).evaluate(module)
    assert list(found) == [f"held_out_{kind}/t{t}" for kind in ("loss", "gap") for t in ("000", "250", "500", "750")]
    assert all(abs(found[f"held_out_gap/t{t}"]) < 1e-5 for t in ("000", "250", "500", "750"))
    assert module.training


def test_a_gap_is_the_change_of_the_mean_loss(monkeypatch):
    module = module_of()
    monkeypatch.setattr(type(module), "trainer", property(lambda self: self._trainer))
    monkeypatch.setattr(module, "denoise", lambda x_t, t, condition: 2 * x_t)
    monkeypatch.setattr(module, "pretrained", lambda: lambda x_t, t, condition: x_t)
    monkeypatch.setattr(
        module, "denoising_losses", lambda denoise, x0, c, t, noise: denoise(torch.ones_like(x0), t, c).mean((1, 2, 3))
    )
    found = HeldOutLoss(num_samples=100, num_bins=2, batch_size=4).evaluate(module)
    assert found == {f"held_out_loss/t{t}": 2.0 for t in ("000", "500")} | {
        f"held_out_gap/t{t}": 1.0 for t in ("000", "500")
    }


def test_a_module_that_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="HeldOutLoss needs a module with what"):
        HeldOutLoss().evaluate(SimpleNamespace(trainer=SimpleNamespace(datamodule=None)))
    with pytest.raises(ConfigError, match="num_bins of HeldOutLoss must be at least 1, found 0"):
        HeldOutLoss(num_bins=0)
