"""Training steps: ours under a Trainer, in turns with a bare PyTorch loop and with the authors' loop.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --hidden-size 1152 --depth 28 --batch-size 32 --image-size 256    # on a GPU

The bare loop has the same network, cached latents, memory bank, loss and optimizer (fused AdamW, fp32) and nothing
else; the Trainer logs to a CSV file. The authors' loop decodes and crops PNGs, encodes them with the autoencoder in
each step, averages the weights in a Python loop and steps AdamW without fusing, in fp32; ours reads cached latents,
averages by one foreach call and trains in bf16 autocast. Data are read in the training process, in all loops. All loops
run in one process, in blocks of a few steps that take turns; the table shows the medians of the blocks' ratios.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from harness import now, parser_of, quiet_trainer, report
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_difftune import DiffTuningObjective, DiTDiffTuningModule, MemoryBankDataModule
from lightning_difftune.callbacks import EMA
from lightning_difftune.data import ImageFolder, LatentCache, MemoryBank
from lightning_difftune.losses import eps_mse_loss
from lightning_difftune.models import DiT, FrozenAutoencoder
from lightning_difftune.protocols import DiffTuningBatch
from lightning_difftune.sampling import Sampler

Step = Callable[[], None]


class Turns(Callback):
    """Blocks of the Trainer's steps and of other loops, one after the other.

    Args:
        others: One step of each of the other loops.
        block: Steps in a block.
        warm_up: Blocks that do not count.
    """

    def __init__(self, others: dict[str, Step], block: int, warm_up: int = 1) -> None:
        self.others, self.block, self.warm_up = others, block, warm_up
        self.seconds: dict[str, list[float]] = {"trainer": [], **{name: [] for name in others}}
        self.began: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """At a block's end, run the other loops."""
        if trainer.global_step % self.block:
            return
        if self.began is not None:
            self.seconds["trainer"].append((now() - self.began) / self.block)
            for name, step in self.others.items():
                start = now()
                for _turn in range(self.block):
                    step()
                self.seconds[name].append((now() - start) / self.block)
        self.began = now()

    def ratio(self, name: str) -> float:
        """Seconds of another loop over those of the Trainer, the median over the blocks."""
        pairs = zip(self.seconds[name], self.seconds["trainer"], strict=True)
        return statistics.median([other / ours for other, ours in pairs][self.warm_up :])

    def milliseconds(self, name: str) -> float:
        """Seconds of a step, the median over the blocks."""
        return 1e3 * statistics.median(self.seconds[name][self.warm_up :])


def network(options: argparse.Namespace, classes: int = 10) -> DiT:
    """The trained network."""
    size, heads = options.image_size // 8, max(1, options.hidden_size // 48)
    return DiT(size, 2, 4, options.hidden_size, options.depth, heads, num_classes=classes)


def autoencoder_folder(folder: Path) -> Path:
    """An AutoencoderKL of Stable Diffusion's layout with a tenth of its width, and random weights."""
    from diffusers import AutoencoderKL

    autoencoder: Any = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 64, 64, 64],
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
    )
    autoencoder.save_pretrained(folder / "autoencoder")
    return folder / "autoencoder"


def write_pictures(folder: Path, count: int, size: int) -> Path:
    """PNGs of smooth random colours in ten classes, an eighth larger than the training size and not square."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.rand(1, 3, 8, 8, generator=generator)
        picture = interpolate(coarse, (size * 9 // 8, size * 5 // 4), mode="bicubic").clamp(0, 1)
        path = folder / "pictures" / f"class{i % 10}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture[0].permute(1, 2, 0) * 255).byte().numpy()).save(path)
    return folder / "pictures"


def data_of(options: argparse.Namespace, folder: Path, pictures: Path) -> MemoryBankDataModule:
    """Cached latents and a memory bank."""
    return MemoryBankDataModule(
        ImageFolder(pictures),
        num_classes=10,
        image_size=options.image_size,
        bank=folder / "bank",
        bank_size=64,
        latent_cache=folder / "latents",
        horizontal_flip=True,
        batch_size=options.batch_size,
    )


def module_of(model: DiT, autoencoder: Path) -> DiTDiffTuningModule:
    """The module, with the simple loss of the bare loop."""
    return DiTDiffTuningModule(
        model,
        autoencoder=FrozenAutoencoder(str(autoencoder)),
        objective=DiffTuningObjective(loss=eps_mse_loss),
        optimizer=partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=True),
        bank_sampler=Sampler(num_inference_steps=2, guidance_scale=1.0),
    )


def noised(x0: Tensor, t: Tensor, alphas: Tensor, noise: Tensor) -> Tensor:
    """Samples (B, c, h, w) at timesteps t (B,)."""
    a = alphas[t].view(-1, 1, 1, 1)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def loss_of(model: DiT, x0: Tensor, labels: Tensor, retained: int, alphas: Tensor) -> Tensor:
    """Eq. 5 with tau = 1, the last ``retained`` samples being the bank's."""
    uniform = torch.rand(len(x0), device=x0.device)
    high, low = uniform.sqrt(), 1 - (1 - uniform).sqrt()  # densities rising and falling in t
    is_bank = torch.arange(len(x0), device=x0.device) >= len(x0) - retained
    t = (torch.where(is_bank, low, high) * len(alphas)).long().clamp(max=len(alphas) - 1)
    noise = torch.randn_like(x0)
    error = (model(noised(x0, t, alphas, noise), t, labels)[:, :4] - noise).square().mean((1, 2, 3))
    return error[~is_bank].mean() + 0.1 * error[is_bank].mean()


def bare_loop(model: DiT, batches: Iterator[DiffTuningBatch]) -> Step:
    """A hand-written loop for these data."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    device = next(model.parameters()).device
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).to(device)

    def step() -> None:
        batch = next(batches)
        target, bank = batch["target"], batch["retention"]["latents"].to(device)
        mean = target["latent_mean"].to(device)
        x0 = mean + target["latent_std"].to(device) * torch.randn_like(mean)
        labels = target["class_labels"].to(device)
        labels = torch.where(torch.rand(len(labels), device=device) < 0.1, model.null_class, labels)
        labels = torch.cat([labels, labels.new_full((len(bank),), model.null_class)])
        loss = loss_of(model, torch.cat([x0, bank]), labels, len(bank), alphas)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def decoded(path: Path, size: int) -> Tensor:
    """A PNG as ADM crops it, mirrored by chance, (3, size, size) in [-1, 1]."""
    picture = Image.open(path).convert("RGB")
    while min(*picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    shape = round(picture.width * scale), round(picture.height * scale)
    pixels = np.asarray(picture.resize(shape, resample=Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    tensor = torch.from_numpy(pixels[top : top + size, left : left + size].copy()).permute(2, 0, 1).float() / 127.5 - 1
    return tensor.flip(2) if torch.rand(()) < 0.5 else tensor


def authors_loop(model: DiT, folder: Path, pictures: Path, options: argparse.Namespace) -> Step:
    """Decode, crop and encode in every step, both streams from PNGs; unfused AdamW; averages in a Python loop."""
    device = next(model.parameters()).device
    autoencoder = FrozenAutoencoder(str(folder / "autoencoder")).to(device)
    averages = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, foreach=False, fused=False)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0).to(device)
    files = sorted(pictures.rglob("*.png"))
    retained = int(0.2 * options.batch_size)

    def step() -> None:
        chosen = torch.randint(len(files), (options.batch_size,)).tolist()
        pixels = torch.stack([decoded(files[i], options.image_size) for i in chosen]).to(device)
        labels = torch.tensor([i % 10 for i in chosen], device=device)
        labels = torch.where(torch.rand(len(labels), device=device) < 0.1, model.null_class, labels)
        labels[len(labels) - retained :] = model.null_class
        with torch.no_grad():
            mean, std = autoencoder.encode(pixels)
            x0 = mean + std * torch.randn_like(mean)
        loss = loss_of(model, x0, labels, retained, alphas)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            named = dict(averages.named_parameters())
            for name, parameter in model.named_parameters():
                named[name].mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)

    return step


def batches_of(options: argparse.Namespace, folder: Path) -> Iterator[DiffTuningBatch]:
    """Shuffled batches of the finished cache and bank."""
    cache, bank = LatentCache(folder / "latents"), MemoryBank(folder / "bank")
    retained = int(0.2 * options.batch_size)
    while True:
        for chosen in torch.randperm(len(cache)).split(options.batch_size - retained):
            flips = (torch.rand(len(chosen)) < 0.5).tolist()
            yield {
                "target": cache.read(chosen.tolist(), flips),
                "retention": bank.read(torch.randint(len(bank), (retained,))),
            }


def main(options: argparse.Namespace) -> None:
    """Run both comparisons."""
    L.seed_everything(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = options.blocks * options.block + 1
    results, rows = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures, autoencoder = write_pictures(folder, options.pictures, options.image_size), autoencoder_folder(folder)
        model = network(options)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        quiet_trainer(1).fit(module_of(copy.deepcopy(model), autoencoder), data_of(options, folder, pictures))
        for other, make, callbacks, precision in (
            ("bare loop", lambda m: bare_loop(m, batches_of(options, folder)), [], "32-true"),
            ("authors' way", lambda m: authors_loop(m, folder, pictures, options), [EMA()], "bf16-mixed"),
        ):
            turns = Turns({other: make(copy.deepcopy(model).to(device).train())}, options.block)
            module, data = module_of(copy.deepcopy(model), autoencoder), data_of(options, folder, pictures)
            logger = CSVLogger(folder / "logs")
            quiet_trainer(steps, turns, *callbacks, logger=logger, precision=precision).fit(module, data)
            ours, theirs = turns.milliseconds("trainer"), turns.milliseconds(other)
            results[other] = {"ours_ms": ours, "theirs_ms": theirs, "ratio": turns.ratio(other)}
            rate = options.batch_size * 1e3
            figures = f"{rate / ours:.0f}", f"{rate / theirs:.0f}", f"{turns.ratio(other):.3f}"
            rows.append((f"Trainer, {precision}, against the {other}", *figures))
    title = f"DiT of {trained:,} parameters, {options.image_size} px, batch {options.batch_size}"
    columns = ("training", "our pictures/s", "their pictures/s", "their seconds / ours")
    report(options, title, columns, rows, results)


if __name__ == "__main__":
    parser = parser_of(__doc__, "training_step")
    parser.add_argument("--hidden-size", type=int, default=288)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=64, help="pixels; latents are an eighth of it")
    parser.add_argument("--pictures", type=int, default=2000, help="of an epoch, which costs more to begin than a step")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--block", type=int, default=5, help="steps of each loop before it is the other's turn")
    parser.add_argument("--blocks", type=int, default=21)
    main(parser.parse_args())
