from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import FSDPStrategy
from tiny import quiet_trainer, tiny_dit
from torch import nn

from lightning_difftune.callbacks import EMA, EWC
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.protocols import Tuner
from lightning_difftune.tuners import DiffFit, LoRA


class Blocks(BoringModel):
    """Two blocks and a head; a part of the first block is frozen."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.blocks[0].bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.layer(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


class DenoisesNoise(L.LightningModule):
    """A tiny DiT in a module from outside the package."""

    def __init__(self, tuner: Tuner) -> None:
        super().__init__()
        self.model = tiny_dit(input_size=4, patch_size=2, depth=2)
        self.before = weights(self.model)
        tuner.apply(self.model)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        t = torch.full((len(batch),), 500)
        return self.model(batch, t, t % 6).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(24, 1, 4, 4), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class History(Logger, Callback):
    """Logged values of EWC, and the weights, by optimizer step."""

    name = "history"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}
        self.weights: dict[int, dict[str, np.ndarray]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        measured = {name: value for name, value in metrics.items() if name.startswith("ewc/")}
        if measured:
            assert step not in self.logged
            self.logged[step] = measured

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.weights[trainer.global_step] = weights(pl_module)


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy().copy() for name, p in module.named_parameters()}


def distance(before: dict[str, np.ndarray], after: dict[str, np.ndarray], part: str = "") -> float:
    """The formula in plain numpy, float64, over the parameters whose names contain ``part``."""
    return sum(float(((after[name] - before[name]) ** 2).sum()) for name in before if part in name)


def fit(
    folder: Path, model: L.LightningModule, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any
) -> History:
    history = History()
    settings: dict[str, Any] = {"logger": history, "limit_val_batches": 0, "log_every_n_steps": 1, **options}
    trainer = quiet_trainer(folder, settings.pop("max_steps", 6), *callbacks, history, **settings)
    trainer.fit(model, ckpt_path=ckpt_path)
    return history


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_the_formula_in_numpy(tmp_path: Path, offload: bool, accumulate: int) -> None:
    model = Blocks()
    before = weights(model)
    history = fit(tmp_path, model, EWC(every_n_steps=4, offload=offload), accumulate_grad_batches=accumulate)
    assert sorted(history.logged) == [4, 6]  # every fourth optimizer step, and the last
    for step in (4, 6):
        logged, after = history.logged[step], history.weights[step]
        assert logged.keys() == {"ewc/total", "ewc/mean", "ewc/blocks.0", "ewc/blocks.1", "ewc/rest"}
        total = distance(before, after)
        assert total > 0
        assert logged["ewc/total"] == pytest.approx(total, rel=1e-5)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert logged["ewc/mean"] == pytest.approx(total / trained, rel=1e-5)
        for part in ("blocks.0", "blocks.1"):
            assert logged[f"ewc/{part}"] == pytest.approx(distance(before, after, part), rel=1e-5)
        assert logged["ewc/rest"] == pytest.approx(distance(before, after, "layer."), rel=1e-5)
    assert history.logged[4]["ewc/total"] != history.logged[6]["ewc/total"]


def test_measures_only_when_it_is_time(tmp_path: Path) -> None:
    model = Blocks()
    history = fit(tmp_path, model, EWC(every_n_steps=2), max_steps=5, log_every_n_steps=3)
    assert sorted(history.logged) == [2, 4, 5]
    assert model.trainer.callback_metrics["ewc/total"].item() == pytest.approx(history.logged[5]["ewc/total"])


class Ends(Callback):
    """Ends a run in step 5, as ``max_time`` does."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 5


def test_the_last_step_is_measured_however_the_run_ends(tmp_path: Path) -> None:
    model = Blocks()
    before = weights(model)
    history = fit(tmp_path, model, EWC(every_n_steps=2), Ends(), max_steps=20)
    assert sorted(history.logged) == [2, 4, 5]
    assert history.logged[5]["ewc/total"] == pytest.approx(distance(before, weights(model)), rel=1e-5)
    assert len(fit(tmp_path, Blocks(), EWC(every_n_steps=5), Ends(), max_steps=20).logged) == 1, "and only once"


def test_leaves_the_training_alone(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [EWC(every_n_steps=1)]):
        model = Blocks()
        L.seed_everything(0)
        fit(tmp_path, model, *callbacks)
        runs.append(weights(model))
    for name, expected in runs[0].items():
        np.testing.assert_array_equal(runs[1][name], expected)


def test_frozen_parameters_are_neither_kept_nor_measured(tmp_path: Path) -> None:
    model, ewc = Blocks(), EWC()
    fit(tmp_path, model, ewc)
    assert ewc.state_dict()["reference"].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    total = ewc.measure(model)["ewc/total"].item()
    with torch.no_grad():
        model.blocks[0].bias.add_(10)
    assert ewc.measure(model)["ewc/total"].item() == total


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (None, set()),
        (r"blocks\.\d+\.(weight|bias)", {"blocks.0.weight", "blocks.1.weight", "blocks.1.bias", "rest"}),
        (r"^\w+", {"blocks", "layer"}),
    ],
)
def test_blocks_are_what_the_pattern_matches(tmp_path: Path, blocks: str | None, expected: set[str]) -> None:
    model, ewc = Blocks(), EWC(blocks=blocks)
    fit(tmp_path, model, ewc)
    measured = {name: value.item() for name, value in ewc.measure(model).items()}
    total = measured.pop("ewc/total")
    measured.pop("ewc/mean")
    assert measured.keys() == {f"ewc/{name}" for name in expected}
    assert not measured or sum(measured.values()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.blocks.13.attn.qkv.weight", "blocks.13"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.norm1.weight", "down_blocks.1"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.norm1.weight", "mid_block"),
        ("unet.conv_in.weight", "rest"),
    ],
)
def test_default_blocks_are_those_of_transformers_and_unets(tmp_path: Path, name: str, block: str) -> None:
    model, ewc = BoringModel(), EWC(every_n_steps=1)
    path, leaf = name.rpartition(".")[::2]
    parent: nn.Module = model
    for part in path.split("."):
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.register_parameter(leaf, nn.Parameter(torch.zeros(3)))
    fit(tmp_path, model, ewc, max_steps=1)
    with torch.no_grad():
        model.get_parameter(name).fill_(2)
        model.layer.load_state_dict(
            {n.removeprefix("layer."): v for n, v in ewc.state_dict()["reference"].items() if n.startswith("layer.")}
        )
    assert ewc.measure(model)[f"ewc/{block}"].item() == 12


@pytest.mark.parametrize("offload", [False, True])
def test_a_resumed_run_measures_from_the_first_start(tmp_path: Path, offload: bool) -> None:
    model = Blocks()
    before = weights(model)
    L.seed_everything(0)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    whole = fit(tmp_path, model, EWC(every_n_steps=1), checkpoint)
    content = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    np.testing.assert_array_equal(content["callbacks"]["EWC"]["reference"]["layer.weight"], before["layer.weight"])

    other = Blocks()
    nn.init.zeros_(other.layer.weight)  # replaced by the checkpoint's, as the pre-trained values must be
    resumed = fit(tmp_path, other, EWC(every_n_steps=1, offload=offload), ckpt_path=tmp_path / "step=3.ckpt")
    assert sorted(resumed.logged) == [4, 5, 6]
    for step, logged in resumed.logged.items():
        after = resumed.weights[step]
        assert logged["ewc/total"] == pytest.approx(distance(before, after), rel=1e-5)
        assert logged["ewc/total"] > whole.logged[1]["ewc/total"]


def test_a_second_fit_of_the_module_measures_from_the_first_start(tmp_path: Path) -> None:
    model, ewc = Blocks(), EWC(every_n_steps=1)
    before = weights(model)
    fit(tmp_path, model, ewc, max_steps=2)
    fit(tmp_path, model, ewc, max_steps=2)
    assert ewc.measure(model)["ewc/total"].item() == pytest.approx(distance(before, weights(model)), rel=1e-5)
    other = Blocks()
    fit(tmp_path, other, ewc, max_steps=2)
    assert ewc.measure(other)["ewc/total"].item() == pytest.approx(distance(before, weights(other)), rel=1e-5)
    with pytest.raises(ConfigError, match="same module"):
        ewc.measure(model)


def test_without_saved_values_a_run_is_not_resumed(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path, Blocks(), EWC(save_reference=False), checkpoint)
    assert "EWC" not in torch.load(tmp_path / "step=3.ckpt", weights_only=True)["callbacks"]
    with pytest.raises(CheckpointError, match=r"step=3.*Resume without EWC"):
        fit(tmp_path, Blocks(), EWC(), ckpt_path=tmp_path / "step=3.ckpt")


class Monitors(Callback):
    """What EarlyStopping would find at each validation."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found.append(trainer.callback_metrics["ewc/total"].item())


def test_a_resumed_run_is_monitored_before_the_next_measurement(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    measured = fit(tmp_path, Blocks(), EWC(every_n_steps=2), checkpoint, max_steps=4).logged[2]["ewc/total"]
    often: dict[str, Any] = {"val_check_interval": 1, "limit_val_batches": 1, "ckpt_path": tmp_path / "step=3.ckpt"}
    monitors = Monitors()
    fit(tmp_path, Blocks(), EWC(every_n_steps=9), monitors, max_steps=5, **often)
    assert monitors.found[0] == pytest.approx(measured)


def test_loaded_values_of_other_parameters_are_refused(tmp_path: Path) -> None:
    ewc, unfrozen = EWC(), Blocks()
    fit(tmp_path, Blocks(), ewc, max_steps=1)
    unfrozen.blocks[0].bias.requires_grad_(True)
    loaded = EWC()
    loaded.load_state_dict(ewc.state_dict())
    with pytest.raises(CheckpointError, match=r"1 \w+ \(blocks\.0\.bias"):
        fit(tmp_path, unfrozen, loaded, max_steps=1)
    with pytest.raises(CheckpointError, match=r"expected 'reference'"):
        EWC().load_state_dict({"averages": {}})


def test_lora_counts_by_the_merged_weights(tmp_path: Path) -> None:
    tuner, ewc = LoRA(rank=2, alpha=6), EWC()
    module = DenoisesNoise(tuner)
    fit(tmp_path, module, ewc)
    assert ewc.state_dict()["reference"].keys() == {"model.y_embedder.embedding_table.weight"}
    after = weights(tuner.merge(module.model))
    assert after.keys() == module.before.keys()
    measured = {name: value.item() for name, value in ewc.measure(module).items()}
    assert measured["ewc/total"] == pytest.approx(distance(module.before, after), rel=1e-4)
    for part in ("blocks.0", "blocks.1"):
        expected = distance(module.before, after, part)
        assert expected > 0
        assert measured[f"ewc/{part}"] == pytest.approx(expected, rel=1e-4)
    assert measured["ewc/rest"] == pytest.approx(distance(module.before, after, "y_embedder"), rel=1e-4)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert measured["ewc/mean"] == pytest.approx(measured["ewc/total"] / trained, rel=1e-6)


def test_lora_is_resumed(tmp_path: Path) -> None:
    tuner = LoRA(rank=2)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path, DenoisesNoise(tuner), EWC(), checkpoint)
    module, ewc = DenoisesNoise(tuner), EWC()
    fit(tmp_path, module, ewc, ckpt_path=tmp_path / "step=3.ckpt")
    expected = distance(module.before, weights(tuner.merge(module.model)))
    assert ewc.measure(module)["ewc/total"].item() == pytest.approx(expected, rel=1e-4)


def test_an_adapter_that_is_frozen_does_not_count(tmp_path: Path) -> None:
    module, ewc = DenoisesNoise(LoRA(rank=2)), EWC()
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter).requires_grad_(False)
    fit(tmp_path, module, ewc, max_steps=1)
    assert ewc.measure(module).keys() == {"ewc/total", "ewc/mean", "ewc/rest"}  # the label table


def test_inserted_factors_count_from_their_initial_value(tmp_path: Path) -> None:
    module, ewc = DenoisesNoise(DiffFit()), EWC()
    before = weights(module)
    fit(tmp_path, module, ewc)
    assert any("gamma" in name for name in ewc.state_dict()["reference"])
    assert ewc.measure(module)["ewc/total"].item() == pytest.approx(distance(before, weights(module)), rel=1e-4)


@pytest.mark.parametrize("first", ["EMA", "EWC"])
def test_beside_ema_the_raw_weights_are_logged_and_the_averages_can_be_measured(tmp_path: Path, first: str) -> None:
    model, ema, ewc = Blocks(), EMA(decay=0.9), EWC(every_n_steps=1)
    before = weights(model)
    order = (ema, ewc) if first == "EMA" else (ewc, ema)
    history = fit(tmp_path, model, *order, limit_val_batches=1, val_check_interval=2)
    for step in (5, 6):
        expected = distance(before, history.weights[step])
        assert history.logged[step]["ewc/total"] == pytest.approx(expected, rel=1e-5)
    with ema.average_parameters(model):
        averaged, expected = ewc.measure(model)["ewc/total"].item(), distance(before, weights(model))
    assert averaged == pytest.approx(expected, rel=1e-5)
    assert 0 < averaged < history.logged[6]["ewc/total"]


def test_half_precision_weights_are_subtracted_in_float32(tmp_path: Path) -> None:
    model, ewc = Blocks(), EWC()
    fit(tmp_path, model, ewc, precision="bf16-true")
    before = {name: tensor.double().numpy() for name, tensor in ewc.state_dict()["reference"].items()}
    measured = ewc.measure(model)["ewc/total"]
    assert measured.dtype == torch.float32
    assert measured.item() == pytest.approx(distance(before, weights(model)), rel=1e-5)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="every_n_steps of EWC must be at least 1, found 0"):
        EWC(every_n_steps=0)
    with pytest.raises(ConfigError, match="regular expression"):
        EWC(blocks="(")
    with pytest.raises(ConfigError, match=r"trainer\.fit"):
        EWC().measure(Blocks())
    with pytest.raises(ConfigError, match="FSDPStrategy shards"):
        EWC().setup(type("Sharded", (), {"strategy": FSDPStrategy()})(), Blocks(), "fit")
    model = Blocks().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the module requires a gradient"):
        EWC().on_fit_start(type("Trainer", (), {"ckpt_path": None})(), model)
