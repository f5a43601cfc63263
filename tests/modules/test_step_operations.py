"""Counts the operations of a training step: unlike times, counts are exact and the same on every machine."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from typing import Any

import lightning as L
import torch
from tiny import quiet_trainer, tiny_dit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_difftune import DiTDiffTuningModule
from lightning_difftune.callbacks import EMA
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.losses import hybrid_loss

DEPTH, BATCH, RETAINED = 28, 10, 2
FIRST, LAST = 3, 5  # steps that are counted


class Count(TorchDispatchMode):
    """Counts operations while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.is_counting, self.operations = False, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_counting:
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Steps(L.Callback):
    """Lets two steps be counted, from the start of one to the start of the next."""

    def __init__(self, count: Count) -> None:
        self.count = count

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.count.is_counting = FIRST <= trainer.global_step < LAST

    def on_train_end(self, *_: Any) -> None:
        self.count.is_counting = False


def batch_of() -> dict[str, dict[str, torch.Tensor]]:
    labels = torch.zeros(BATCH - RETAINED, dtype=torch.int64)
    mean = torch.zeros(BATCH - RETAINED, 1, 8, 8)
    return {
        "target": {"latent_mean": mean, "latent_std": torch.ones_like(mean), "class_labels": labels},
        "retention": {"latents": torch.zeros(RETAINED, 1, 8, 8)},
    }


def ours(folder: Any, count: Any) -> Counter[str]:
    """The operations of our step under the Trainer, with EMA."""
    module = DiTDiffTuningModule(tiny_dit(depth=DEPTH), optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True))
    with count:
        trainer = quiet_trainer(folder, LAST + 2, Steps(count), EMA(), precision="bf16-mixed", log_every_n_steps=100)
        trainer.fit(module, DataLoader([batch_of()] * (LAST + 2), batch_size=None))
    return Counter({name: number // (LAST - FIRST) for name, number in count.operations.items()})


def bare(count: Any) -> Counter[str]:
    """The operations of a step in a hand-written loop with the same loss, optimizer and averages."""
    model, process, batch = tiny_dit(depth=DEPTH).train(), GaussianDiffusion(), batch_of()
    trained = [p for p in model.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        target, retained = batch["target"], batch["retention"]["latents"]
        x0 = target["latent_mean"] + target["latent_std"] * torch.randn_like(target["latent_mean"])
        labels = torch.where(torch.rand(len(x0)) < 0.1, model.null_class, target["class_labels"])
        labels = torch.cat([labels, labels.new_full((RETAINED,), model.null_class)])
        t = torch.cat([torch.rand(len(x0)).sqrt(), 1 - torch.rand(RETAINED).sqrt()]) * 1000
        t, x0 = t.long().clamp(max=999), torch.cat([x0, retained])
        noise = torch.randn_like(x0)
        x_t = process.add_noise(x0, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            losses = hybrid_loss(model(x_t, t, labels), x0, x_t, noise, t, process)
        loss = losses[:-RETAINED].mean() + 0.1 * losses[-RETAINED:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, trained, 1e-4)

    step()
    with count:
        count.is_counting = True
        step()
        count.is_counting = False
    return count.operations


VIEWS = (
    "alias as_strided detach empty empty_like expand new_empty permute select slice split squeeze t transpose unbind"
)
VIEWS = {*VIEWS.split(), "unsqueeze", "view", "_unsafe_view"}


def launches(entry: tuple[str, int]) -> int:
    """Filter counts of operations: only those that a GPU computes, without views and allocations."""
    name, number = entry
    return number if name.startswith("aten.") and name.split(".")[1] not in VIEWS else 0


def test_our_step_dispatches_hardly_more_than_a_bare_loop(tmp_path):
    found, expected = ours(tmp_path, Count()), bare(Count())
    surplus = found - expected
    assert found.total() - expected.total() <= 40, surplus.most_common(10)  # not one per block or parameter
    assert found["aten._to_copy.default"] < 0.4 * expected["aten._to_copy.default"], "weights are cast together"
    assert sum(map(launches, found.items())) < 0.85 * sum(map(launches, expected.items()))


class Calls:
    """Counts calls of Python functions and C functions while it is active."""

    def __init__(self) -> None:
        self.is_counting, self.operations = False, Counter()

    def __enter__(self) -> None:
        self.before = sys.getprofile()
        sys.setprofile(self.note)

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(self.before)

    def note(self, frame: Any, event: str, function: Any) -> None:
        if self.is_counting and event == "call":
            self.operations[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1
        elif self.is_counting and event == "c_call":
            self.operations[getattr(function, "__qualname__", "")] += 1


def test_the_host_calls_few_functions_more_than_in_a_bare_loop(tmp_path):
    """The host's own work, which at small batches the device waits for."""
    found, expected = ours(tmp_path, Calls()), bare(Calls())
    assert found.total() - expected.total() <= 3000, (found - expected).most_common(20)


def test_each_step_logs_its_own_loss_over_epochs(tmp_path):
    pairs = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            pairs.append((trainer.callback_metrics["train/loss"], outputs["loss"]))

    module = DiTDiffTuningModule(tiny_dit())
    quiet_trainer(tmp_path, 7, Look()).fit(module, DataLoader([batch_of()] * 3, batch_size=None))
    assert len({float(logged) for logged, _ in pairs}) == 7
    assert all(torch.equal(logged, loss) for logged, loss in pairs)


def test_a_block_of_the_transformer_dispatches_no_more_than_it_did(tmp_path):
    """The bare loop itself: forward and backward of one more block, with its share of optimizer and averages."""
    counts = []
    for depth in (2, 3):
        model = tiny_dit(depth=depth).train()
        with Count() as count:
            count.is_counting = True
            with torch.autocast("cpu", torch.bfloat16):
                output = model(torch.zeros(2, 1, 8, 8), torch.tensor([3, 9]), torch.tensor([0, 1]))
            output.square().mean().backward()
        counts.append(count.operations.total())
    assert counts[1] - counts[0] <= BLOCK


def test_the_bank_casts_frozen_weights_once_and_not_in_each_step(tmp_path):
    module = DiTDiffTuningModule(tiny_dit(depth=4), num_classes=3)
    module.configure_model()
    casts = []
    for steps in (2, 6):
        module.bank_sampler.num_inference_steps = steps
        generator = module.bank_generator()
        with Count() as count, torch.autocast("cpu", torch.bfloat16):
            count.is_counting = True
            generator.generate_bank(torch.arange(3))
        casts.append(count.operations["aten._to_copy.default"])
    assert (casts[1] - casts[0]) / 4 < 20, "of activations alone: there are 47 weights"


BLOCK = 162
