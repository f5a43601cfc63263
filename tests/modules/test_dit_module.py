"""DiTDiffTuningModule with its data module under a real Trainer, on a tiny DiT in pixel space."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import quiet_trainer, tiny_dit, tiny_pictures, tiny_weights
from torch.utils.data import DataLoader

from lightning_difftune import (
    DiffTuningObjective,
    DiTDiffTuningModule,
    MemoryBank,
    MemoryBankDataModule,
    MirroredPowerSchedule,
    PowerSchedule,
)
from lightning_difftune.callbacks import EMA
from lightning_difftune.data import ArrayImages
from lightning_difftune.draws import Draws
from lightning_difftune.errors import CheckpointError, ConfigError, DataError, StoreError
from lightning_difftune.losses import eps_mse_loss
from lightning_difftune.models import export_dit
from lightning_difftune.modules.presets import describe_preset
from lightning_difftune.sampling import Sampler

SAMPLER = Sampler(num_inference_steps=2)


@pytest.fixture
def weights(tmp_path):
    return tiny_weights(tmp_path)


def pictures(count=22, classes=3):
    rng = np.random.default_rng(0)
    return ArrayImages(rng.integers(0, 256, (count, 8, 8), dtype=np.uint8), np.arange(count) % classes)


def data_of(tmp_path, **settings):
    settings = {"bank": tmp_path / "bank", "bank_size": 10, "batch_size": 5, "build_batch_size": 4} | settings
    return MemoryBankDataModule(pictures(), 3, image_size=8, channels=1, val_target=pictures(7), **settings)


def trainer_of(tmp_path, steps, *callbacks, **settings):
    logged = {"logger": CSVLogger(tmp_path / "logs"), "log_every_n_steps": 1}
    validated = {"check_val_every_n_epoch": None, "val_check_interval": 4}
    return quiet_trainer(tmp_path, steps, *callbacks, **{**logged, **validated, **settings})


def module_of(weights, **settings):
    return DiTDiffTuningModule(str(weights), num_classes=3, sampler=SAMPLER, **settings)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_fit_builds_the_bank_and_opens_it_again(tmp_path, weights):
    trainer_of(tmp_path, 3).fit(module_of(weights), data_of(tmp_path))
    shard = tmp_path / "bank" / "shard-00000.safetensors"
    written = shard.stat().st_mtime_ns
    bank = MemoryBank(tmp_path / "bank")
    assert len(bank) == 10
    assert bank.latent_shape == (1, 8, 8)
    trainer_of(tmp_path, 1).fit(module_of(weights), data_of(tmp_path))
    assert shard.stat().st_mtime_ns == written


def test_a_bank_is_built_in_the_largest_batch_that_fits(tmp_path, weights):
    trainer_of(tmp_path, 1).fit(module_of(weights), data_of(tmp_path, build_batch_size="auto"))
    assert len(MemoryBank(tmp_path / "bank")) == 10
    trainer_of(tmp_path, 1).predict(
        module_of(weights),
        data_of(tmp_path, build_batch_size="auto", bank=tmp_path / "other"),
        return_predictions=False,
    )
    assert len(MemoryBank(tmp_path / "other")) == 10


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_predict_builds_the_same_bank_as_fit_at_one_precision(tmp_path, weights, precision):
    trainer_of(tmp_path, 1, precision=precision).fit(module_of(weights), data_of(tmp_path))
    trainer = trainer_of(tmp_path, 1, precision=precision)
    trainer.predict(module_of(weights), data_of(tmp_path, bank=tmp_path / "other"))
    for name in ("manifest.json", "shard-00000.safetensors"):
        assert (tmp_path / "bank" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    trainer_of(tmp_path, 1).predict(module_of(weights), data_of(tmp_path, bank=tmp_path / "exact"))
    exact, made = (MemoryBank(tmp_path / name).read(torch.arange(10))["latents"] for name in ("exact", "bank"))
    same = torch.equal(exact, made)
    assert same == (precision == "32-true")


def test_a_bank_grows_and_a_larger_one_serves(tmp_path, weights):
    trainer_of(tmp_path, 1).fit(module_of(weights), data_of(tmp_path))
    trainer_of(tmp_path, 1).predict(module_of(weights), data_of(tmp_path, bank_size=25))
    assert len(MemoryBank(tmp_path / "bank")) == 25
    module, data = module_of(weights), data_of(tmp_path)
    trainer_of(tmp_path, 1).fit(module, data)
    assert len(data.open_bank()) == 10


def test_the_bank_is_of_the_pretrained_model_even_after_tuning(tmp_path, weights):
    module = module_of(weights)
    trainer_of(tmp_path, 3).fit(module, data_of(tmp_path, bank=None))
    trainer_of(tmp_path, 3).fit(module, data_of(tmp_path))
    trainer_of(tmp_path, 1).fit(module_of(weights), data_of(tmp_path, bank=tmp_path / "fresh"))
    one, other = (MemoryBank(tmp_path / name).read(torch.arange(10))["latents"] for name in ("bank", "fresh"))
    assert torch.equal(one, other)


def test_a_bank_of_another_model_or_sampler_is_refused(tmp_path, weights):
    trainer_of(tmp_path, 1).fit(module_of(weights), data_of(tmp_path))
    other = export_dit(tiny_dit(seed=1), tmp_path / "other.safetensors")
    with pytest.raises(StoreError, match="model"):
        trainer_of(tmp_path, 1).fit(module_of(other), data_of(tmp_path))
    with pytest.raises(StoreError, match="sampler"):
        trainer_of(tmp_path, 1).fit(module_of(weights, bank_sampler=Sampler(num_inference_steps=3)), data_of(tmp_path))


def test_a_bank_of_pictures_has_each_of_them_once(tmp_path, weights):
    source, settings = pictures(12), {"bank_size": 11, "retention_share": 0.4}
    data = data_of(tmp_path, bank_source=source, **settings)
    trainer = trainer_of(tmp_path, 1)
    trainer.fit(module_of(weights), data)
    assert "train/retention" in trainer.callback_metrics
    bank = MemoryBank(tmp_path / "bank").read(torch.arange(11))["latents"]
    same = (bank[:, None] == data.bank_source.pixels(range(12), [False] * 12)["pixel_values"]).flatten(2).all(2)
    assert same.sum(1).tolist() == [1] * 11
    assert same.sum(0).max() == 1
    assert same[:, :-1].diagonal().sum() < 11  # in a random order

    other = data_of(tmp_path, bank_source=source, **settings | {"bank": tmp_path / "other"})
    trainer_of(tmp_path, 1).predict(module_of(weights), other, return_predictions=False)
    assert torch.equal(MemoryBank(tmp_path / "other").read(torch.arange(11))["latents"], bank)
    for unlike in ({}, {"bank_source": pictures(13)}):
        with pytest.raises(StoreError, match="pictures"):
            trainer_of(tmp_path, 1).fit(module_of(weights), data_of(tmp_path, **settings, **unlike))
    with pytest.raises(ConfigError, match="12 pictures, too few for a bank of 13"):
        data_of(tmp_path, bank_source=source, bank_size=13)


def test_a_bank_of_the_targets_own_pictures_has_all_of_them(tmp_path, weights):
    data = data_of(tmp_path, bank_source="target", bank_size=1000)
    trainer_of(tmp_path, 1).fit(module_of(weights), data)
    bank, count = MemoryBank(tmp_path / "bank"), len(data.target)
    assert len(bank) == data.bank_size == count
    own = data.target.pixels(range(count), [False] * count)["pixel_values"]
    same = (bank.read(torch.arange(count))["latents"][:, None] == own).flatten(2).all(2)
    assert same.sum(0).tolist() == same.sum(1).tolist() == [1] * count
    assert data_of(tmp_path, bank_source="target", bank_size=5).bank_size == 5
    named = data_of(tmp_path, bank_source=pictures(), bank_size=count)
    trainer_of(tmp_path, 1).fit(module_of(weights), named)  # the same bank


@pytest.mark.parametrize("steps_before", [3, 5, 7])  # an epoch has 5: in the first, at its end, in the second
def test_resume_is_exact(tmp_path, weights, steps_before):
    def run(folder, steps, ckpt_path=None):
        saver = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        module = module_of(weights, lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9))
        trainer = trainer_of(tmp_path, steps, EMA(decay=0.5), saver)
        trainer.fit(module, datamodule=data_of(tmp_path, horizontal_flip=True), ckpt_path=ckpt_path)
        checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
        return state_of(module), checkpoint["callbacks"]

    whole, callbacks = run(tmp_path / "whole", 13)
    run(tmp_path / "parts", steps_before)
    resumed, callbacks_resumed = run(tmp_path / "parts", 13, tmp_path / "parts" / "last.ckpt")
    assert_same(whole, resumed)
    (averages,), (averages_resumed,) = (
        [state["averages"] for key, state in c.items() if key.startswith("EMA")] for c in (callbacks, callbacks_resumed)
    )
    assert_same(averages, averages_resumed)


def test_tau_zero_is_plain_fine_tuning_to_the_bit(tmp_path, weights):
    objective = DiffTuningObjective(MirroredPowerSchedule(0.0), eps_mse_loss)
    module, data = module_of(weights, objective=objective, label_dropout=0.0), data_of(tmp_path)
    trainer_of(tmp_path, 4).fit(module, data)
    assert not (tmp_path / "bank").exists()

    plain = module_of(weights)
    plain.configure_model()
    network, process = plain.dit, objective.diffusion
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    loader = iter(data_of(tmp_path, bank=None).train_dataloader())
    for step in range(4):
        target = next(loader)["target"]
        x0, labels = target["pixel_values"], target["class_labels"]
        assert len(x0) == 5
        draws = Draws(0, step)
        draws.uniform(5)  # the label dropout, which drops none
        t = objective.timesteps(draws.uniform(5), torch.zeros(5, dtype=torch.bool))
        noise = draws.normal(5, 1, 8, 8)
        output = network(process.add_noise(x0, noise, t), t, labels)
        loss = (output[:, :1] - noise).square().flatten(1).mean(1).sum() / 5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same(state_of(module.dit), state_of(network))


def test_retention_is_unconditional_and_target_labels_are_dropped_at_the_rate(tmp_path, weights):
    module = module_of(weights, label_dropout=0.25)
    module.configure_model()
    batch = {
        "target": {"pixel_values": torch.rand(4000, 1, 8, 8), "class_labels": torch.arange(4000) % 3},
        "retention": {"latents": torch.rand(100, 1, 8, 8), "class_labels": torch.zeros(100, dtype=torch.int64)},
    }
    x0, labels, is_retention = module.prepare(batch, Draws(0, 0))
    assert torch.equal(x0[:4000], batch["target"]["pixel_values"])
    assert torch.equal(x0[4000:], batch["retention"]["latents"])
    assert is_retention.tolist() == [False] * 4000 + [True] * 100
    assert (labels[4000:] == module.dit.null_class).all()
    dropped = labels[:4000] == module.dit.null_class
    assert 0.21 < dropped.float().mean() < 0.29
    assert torch.equal(labels[:4000][~dropped], batch["target"]["class_labels"][~dropped])
    module.eval()
    assert torch.equal(module.prepare(batch, Draws(0, 0))[1][:4000], batch["target"]["class_labels"])


@pytest.mark.parametrize(("label_table", "rows", "null"), [("keep", 7, 6), ("resize", 4, 3)])
def test_label_tables(weights, label_table, rows, null):
    module = module_of(weights, label_table=label_table)
    module.configure_model()
    assert module.dit.y_embedder.embedding_table.weight.shape[0] == rows
    assert module.dit.null_class == null
    original = tiny_dit().y_embedder.embedding_table.weight[-1]
    assert torch.equal(module.dit.y_embedder.embedding_table.weight[-1], original)
    assert module.pretrained().null_class == 6


def test_generation_depends_on_the_index_alone(weights):
    module = module_of(weights)
    module.configure_model()
    together = module.generate(torch.arange(6))
    alone = torch.cat([module.generate(torch.tensor([i])) for i in range(6)])
    assert together.dtype == torch.uint8
    assert (together.int() - alone.int()).abs().max() <= 1  # batch size changes float rounding only
    assert not torch.equal(together[0], together[3])  # same class, other noise


def test_a_module_that_was_not_built_yet_is_built_when_it_is_asked(weights):
    built = module_of(weights)
    built.configure_model()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1)
    names = [name for name, _ in built.named_parameters()]
    assert [name for name, _ in module_of(weights).named_parameters()] == names
    assert len(list(module_of(weights).parameters())) == len(names)
    assert module_of(weights).state_dict().keys() == built.state_dict().keys()
    loaded = module_of(weights)
    loaded.load_state_dict(built.state_dict(), strict=False)
    assert torch.equal(loaded.generate(torch.arange(2)), built.generate(torch.arange(2)))
    module_of(weights).generate(torch.arange(2))


def test_a_solver_that_adds_noise_draws_the_same_batch_again(weights):
    module = DiTDiffTuningModule(str(weights), num_classes=3, sampler=Sampler("DDPM", num_inference_steps=3))
    module.configure_model()
    first = module.generate(torch.arange(4))
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    assert torch.equal(module.generate(torch.arange(4)), first)
    assert torch.equal(module.generate_swapped(torch.arange(4), [0.0])[0], first)
    assert torch.equal(torch.randn(2), expected)  # other draws are as if nothing had been drawn
    assert not torch.equal(module.generate(torch.arange(4, 8)), first)


def test_checkpoints_hold_what_is_trained_and_refuse_another_base(tmp_path, weights):
    class HeadOnly:
        def apply(self, model):
            model.requires_grad_(False)
            model.final_layer.requires_grad_(True)

    trainer = trainer_of(tmp_path, 2)
    module = module_of(weights, tuner=HeadOnly())
    trainer.fit(module, data_of(tmp_path))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert all(name.startswith("dit.final_layer.") for name in saved["state_dict"])
    assert len(saved["state_dict"]) == 4

    again = module_of(weights, tuner=HeadOnly())
    trainer_of(tmp_path, 2).validate(again, data_of(tmp_path), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert_same(state_of(module), state_of(again))

    other = module_of(export_dit(tiny_dit(seed=1), tmp_path / "other.safetensors"), tuner=HeadOnly())
    with pytest.raises(CheckpointError, match=r"trained from .*tiny\.safetensors"):
        trainer_of(tmp_path, 2).validate(other, data_of(tmp_path), ckpt_path=tmp_path / "run.ckpt")


def test_a_model_object_is_tuned_in_place_and_remembered(tmp_path):
    model = tiny_dit()
    before = copy.deepcopy(model.state_dict())
    module = DiTDiffTuningModule(model, num_classes=3, sampler=SAMPLER)
    trainer_of(tmp_path, 3).fit(module, data_of(tmp_path))
    assert module.dit is model
    assert not torch.equal(model.final_layer.linear.weight, before["final_layer.linear.weight"])
    assert_same(before, module.pretrained().state_dict())


def test_validation_loss_does_not_change_between_identical_models(tmp_path, weights):
    values = [
        trainer_of(tmp_path, 1).validate(module_of(weights), data_of(tmp_path), verbose=False)[0]["val/loss"]
        for _ in range(2)
    ]
    assert values[0] == values[1]


def test_active_preset_is_named(tmp_path, weights, caplog):
    caplog.set_level("INFO")
    trainer_of(tmp_path, 1).fit(module_of(weights), data_of(tmp_path, retention_share=0.2))
    assert "Preset: official code." in caplog.text
    caplog.clear()
    objective = DiffTuningObjective(PowerSchedule(1.0), eps_mse_loss, 1.0)
    sampler = Sampler(num_inference_steps=2, guidance_channels=None)
    module = DiTDiffTuningModule(str(weights), 3, None, "resize", objective=objective, sampler=sampler)
    trainer_of(tmp_path, 1).fit(module, data_of(tmp_path, retention_share=0.5, bank=tmp_path / "paper"))
    assert "Preset: paper-literal." in caplog.text
    caplog.clear()
    trainer_of(tmp_path, 1).fit(module_of(weights), data_of(tmp_path, retention_share=0.4))
    assert "Preset: custom; nearest is official code, with retention share = int(0.4 B)" in caplog.text


@pytest.mark.parametrize(
    ("precision", "capability", "warned"),
    [("bf16-mixed", "AVX2", True), ("bf16-mixed", "AVX512", False), ("32-true", "AVX2", False)],
)
def test_bf16_that_the_cpu_emulates_is_warned_of(tmp_path, weights, monkeypatch, precision, capability, warned):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(tmp_path, 1, precision=precision).fit(module_of(weights), data_of(tmp_path))
    assert any("emulates bf16-mixed" in str(warning.message) for warning in caught) == warned


def test_mistakes_are_refused(tmp_path, weights):
    with pytest.raises(ConfigError, match="label_dropout"):
        module_of(weights, label_dropout=1.0)
    with pytest.raises(ConfigError, match="label_table: resize"):
        DiTDiffTuningModule(str(weights), num_classes=7).configure_model()

    only = DiffTuningObjective(reconsolidation_weight=0.0)
    with pytest.raises(ConfigError, match=r"Nothing is learned.*no memory bank"):
        trainer_of(tmp_path, 1).fit(module_of(weights, objective=only), data_of(tmp_path, bank=None))

    class Everything:
        def apply(self, model):
            model.requires_grad_(False)

    with pytest.raises(ConfigError, match="froze every parameter"):
        trainer_of(tmp_path, 1).fit(module_of(weights, tuner=Everything()), data_of(tmp_path))


def test_a_network_that_is_asked_for_too_soon_says_how_it_is_built(weights):
    module = DiTDiffTuningModule(str(weights))
    with pytest.raises(AttributeError) as error:
        module.dit  # noqa: B018
    assert "configure_model()" in error.value.__notes__[0]
    module.configure_model()
    with pytest.raises(AttributeError) as error:
        module.did  # noqa: B018
    assert not hasattr(error.value, "__notes__")


def test_class_names_are_the_given_ones_or_the_datas_and_never_those_of_reused_rows(weights, tmp_path):
    base = tiny_dit()
    base.class_names = list("abcdef")
    export_dit(base, tmp_path / "named.safetensors")
    names = ["ant", "bee", "cat"]

    def built(**settings):
        module = DiTDiffTuningModule(model=str(tmp_path / "named.safetensors"), **settings)
        module.configure_model()
        return module

    assert built().dit.class_names == list("abcdef")  # a run with the same classes can be resumed
    assert built(num_classes=3).dit.class_names is None
    assert built(num_classes=3, class_names=["ant", "bee", "cat"]).dit.class_names == names
    with pytest.raises(ConfigError, match="7 class names were given for a label table of 6 rows"):
        built(class_names=list("abcdefg"))


def test_class_names_travel_in_the_checkpoint(weights, tmp_path):
    named = ArrayImages(pictures().images, pictures().labels, class_names=["ant", "bee", "cat"])
    data = MemoryBankDataModule(named, 3, image_size=8, channels=1, batch_size=5)
    module = DiTDiffTuningModule(model=str(weights), num_classes=3, sampler=SAMPLER)
    trainer = trainer_of(tmp_path, 2)
    trainer.fit(module, datamodule=data)
    names = ["ant", "bee", "cat"]
    assert module.dit.class_names == names
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = DiTDiffTuningModule.load_from_checkpoint(
        tmp_path / "run.ckpt", model=str(weights), num_classes=3, weights_only=True
    )
    assert again.dit.class_names == names
    given = DiTDiffTuningModule(model=str(weights), num_classes=3, class_names=["x", "y", "z"])
    given.on_load_checkpoint(torch.load(tmp_path / "run.ckpt", weights_only=True))
    assert given.dit.class_names[:3] == ["x", "y", "z"]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_under_bf16_with_a_fused_step(tmp_path, algorithm):
    """Lightning refuses it, for a reason that concerns fp16."""
    limit, seen = 1e-4, []

    def look(module):
        seen.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))

    before = LambdaCallback(on_before_optimizer_step=lambda trainer, module, optimizer: look(module))
    after = LambdaCallback(on_train_batch_end=lambda trainer, module, *_: look(module))
    module = DiTDiffTuningModule(tiny_dit(num_classes=3), optimizer=partial(torch.optim.AdamW, lr=0.0, fused=True))
    data = MemoryBankDataModule(tiny_pictures(), 3, 8, 1, batch_size=4)
    settings = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm, "precision": "bf16-mixed"}
    quiet_trainer(tmp_path, 1, before, after, **settings).fit(module, data)
    measure = torch.linalg.vector_norm if algorithm == "norm" else lambda x: x.abs().max()
    assert measure(seen[0]) > limit
    assert measure(seen[1]) == pytest.approx(limit, rel=1e-3)


def test_samples_may_be_retained_under_source_classes_whose_rows_are_free():
    module = DiTDiffTuningModule(tiny_dit(), num_classes=3, retention_labels="source")
    module.configure_model()
    retention = {"latents": torch.zeros(4, 1, 8, 8), "class_labels": torch.tensor([0, 2, 3, 5])}
    assert module.retention_condition(retention).tolist() == [6, 6, 3, 5]
    with pytest.raises(ConfigError, match="pictures without source classes"):
        module.retention_condition({"latents": torch.zeros(4, 1, 8, 8)})
    with pytest.raises(ConfigError, match="the pictures of bank_source have none"):
        module.bank_generator(tiny_pictures())
    with pytest.raises(ConfigError, match="retention_labels: source needs the rows"):
        DiTDiffTuningModule(tiny_dit(), num_classes=3, retention_labels="source", label_table="resize")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_trains_as_the_plain_one(tmp_path, backend):
    found = []
    for compiled in (False, True):
        module = DiTDiffTuningModule(tiny_dit(num_classes=3), sampler=Sampler(num_inference_steps=2))
        data = MemoryBankDataModule(tiny_pictures(), 3, 8, 1, bank=tmp_path / "bank", bank_size=6, batch_size=5)
        trainer = quiet_trainer(tmp_path, 3)
        trainer.fit(torch.compile(module, backend=backend) if compiled else module, data)
        found.append(module.dit.final_layer.linear.weight.detach())
    torch.testing.assert_close(found[1], found[0])


def test_a_loader_of_ones_own_is_not_said_to_have_no_retention():
    module = DiTDiffTuningModule(tiny_dit(num_classes=3))
    module.configure_model()
    assert "retention share that of the data" in describe_preset(module, None)
    data = MemoryBankDataModule(tiny_pictures(), 3, 8, 1, batch_size=5)
    assert "retention share no retention" in describe_preset(module, data)
    data = MemoryBankDataModule(tiny_pictures(), 3, 8, 1, batch_size=5, bank="bank")
    assert "retention share int(0.2 B)" in describe_preset(module, data)
    module.objective = DiffTuningObjective(MirroredPowerSchedule(0.0))
    assert "retention share no retention" in describe_preset(module, data)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((torch.zeros(2, 1, 8, 8), torch.zeros(2).long()), "a list"),
        (torch.zeros(2, 1, 8, 8), "a Tensor"),
        ({"pixel_values": torch.zeros(2, 1, 8, 8)}, r"the keys \['pixel_values'\]"),
        ({"target": (torch.zeros(2, 1, 8, 8), torch.zeros(2).long())}, r"the keys \['target'\]"),
    ],
)
def test_a_loader_of_something_else_gets_a_sentence(tmp_path, weights, batch, found):
    loader = DataLoader([batch], batch_size=None, collate_fn=lambda item: list(item) if type(item) is tuple else item)
    with pytest.raises(DataError, match=f'A batch is {{"target": .*found {found}. Pass your data set to'):
        trainer_of(tmp_path, 1).fit(module_of(weights), loader)
