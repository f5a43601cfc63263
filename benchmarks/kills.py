"""SIGKILL at random moments while files are written: is the next run's result the same to the byte?

    python benchmarks/kills.py                      # 250 kills, a few minutes on one core
    python benchmarks/kills.py --kills 20 --seed 7 --only bank

Each job runs in a child process that is killed after a random time. After each kill its files are opened: they must be
complete, or refused. Then the job is run and killed again until it finishes; its files must then equal those of an
undisturbed run. Trial k of a job depends only on the seed and k, and finished trials in the JSON file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor

from lightning_difftune import DiTDiffTuningModule, MemoryBank, MemoryBankDataModule
from lightning_difftune.callbacks import EMA
from lightning_difftune.cli.compare.jobs import Job
from lightning_difftune.cli.compare.study import StudyRun
from lightning_difftune.cli.compare.table import Line, write_tables
from lightning_difftune.cli.run_files import check_checkpoint
from lightning_difftune.data import ArrayImages
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.latent_cache import LatentCache
from lightning_difftune.errors import DiffTuneError
from lightning_difftune.files import atomic_file, atomic_write, discard_temporaries
from lightning_difftune.models import DiT, export_dit, export_network, load_dit
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.diffusers_layout import open_network
from lightning_difftune.modules.checkpoint_io import AtomicCheckpointIO
from lightning_difftune.sampling import Sampler
from lightning_difftune.tuners import LoRA

CHECKPOINTS = 4  # a run writes each over the one before


class Numbers:
    """A tiny pre-trained model: sample i is a function of i."""

    def bank_spec(self) -> dict[str, Any]:
        """What it is."""
        return {"model": "numbers"}

    def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
        """Latents (B, 4, 16, 16)."""
        return {"latents": (indices.view(-1, 1, 1, 1) * 7919 + torch.arange(1024).view(4, 16, 16)).float()}


def write_bank(folder: Path) -> None:
    """Build a bank of 20 shards."""
    MemoryBank.build(folder / "bank", Numbers(), 400, batch_size=10, shard_size=20)


def read_bank(folder: Path) -> None:
    """Open it and compare its hashes."""
    MemoryBank(folder / "bank").verify()


def write_cache(folder: Path) -> None:
    """Build a cache of 10 shards, of pictures and their mirror images."""
    pictures = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    targets = ImageTargets(ArrayImages(pictures, np.arange(200) % 5), image_size=16)

    def encode(batch: Any) -> Any:
        mean = batch["pixel_values"][:, :, ::2, ::2]
        return {"latent_mean": mean, "latent_std": mean.abs(), "class_labels": batch["class_labels"]}

    LatentCache.build(folder / "cache", targets, encode, {"autoencoder": "every second pixel"}, shard_size=20)


def read_cache(folder: Path) -> None:
    """Open it and compare its hashes."""
    LatentCache(folder / "cache").verify()


def checkpoint(number: int) -> dict[str, Any]:
    """A run's checkpoint at one of its steps."""
    return {"state_dict": {"weight": torch.full((200_000,), float(number))}, "global_step": number}


def write_checkpoint(folder: Path) -> None:
    """Write the checkpoints of a run, each over the one before."""
    for number in range(CHECKPOINTS):
        AtomicCheckpointIO().save_checkpoint(checkpoint(number), folder / "last.ckpt")


def read_checkpoint(folder: Path) -> None:
    """Open the last one; it must be one of them, whole."""
    content = check_checkpoint(folder / "last.ckpt")
    if not torch.equal(content["state_dict"]["weight"], checkpoint(content["global_step"])["state_dict"]["weight"]):
        raise AssertionError("the checkpoint is a mixture of two")


def small_dit() -> DiT:
    """A model of a few megabytes."""
    torch.manual_seed(0)
    return DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=96, depth=3, num_heads=2, num_classes=10)


def write_export(folder: Path) -> None:
    """Export a model as a file, over what is there, and as a folder."""
    export_dit(small_dit(), folder / "tuned.safetensors", overwrite=True)
    export_dit(small_dit(), folder / "tuned", "diffusers", overwrite=True)


def read_export(folder: Path) -> None:
    """Open both; they must hold the model."""
    for name in ("tuned.safetensors", "tuned"):
        state = load_dit(folder / name).state_dict()
        if not all(torch.equal(tensor, state[key]) for key, tensor in small_dit().state_dict().items()):
            raise AssertionError(f"{name} holds another model")


ADAPTER = LoRA(rank=2)


def tuned_dit() -> DiT:
    """A model with a LoRA's layers, whose updates are not zero."""
    model = small_dit()
    ADAPTER.apply(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(parameter, 0.5)
    return model


def write_adapter(folder: Path) -> None:
    """Write a LoRA adapter twice, the second time over the first."""
    for _ in range(2):
        ADAPTER.save_adapter(tuned_dit(), folder / "adapter", "base")


def read_adapter(folder: Path) -> None:
    """Open it; it must be the one that was written."""
    model, expected = tuned_dit(), tuned_dit().state_dict()
    ADAPTER.load_adapter(model, folder / "adapter", "base")
    if not all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items()):
        raise AssertionError("another adapter")


def small_unet() -> Any:
    """A UNet of diffusers."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    return UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=8, **blocks)


def write_network(folder: Path) -> None:
    """Export it twice, the second time over the first."""
    for _ in range(2):
        export_network(small_unet(), folder / "network", overwrite=True)


def read_network(folder: Path) -> None:
    """Open it; it must be the one that was written."""
    network = open_network(type(small_unet()), folder / "network")
    if fingerprint(network) != fingerprint(small_unet()):
        raise AssertionError("another network")


STEPS = 6


def fit(folder: Path, base: Path, ckpt_path: Path | None, steps: int = STEPS) -> Any:
    """Diff-Tune a small DiT through the Python API, with a bank and a checkpoint after each step."""
    module = DiTDiffTuningModule(str(base), num_classes=4, sampler=Sampler(num_inference_steps=2))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    pictures, bank = ArrayImages(pixels, np.arange(20) % 4), folder / "run-bank"
    data = MemoryBankDataModule(pictures, 4, 8, channels=1, batch_size=10, bank=bank, bank_size=40, build_batch_size=20)
    saving = ModelCheckpoint(folder / "run", every_n_train_steps=1, save_last=True, save_top_k=0)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    averages: Any = EMA(0.9)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=steps, callbacks=[averages, saving], **quiet)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


def write_base(folder: Path) -> Path:
    """The pre-trained model of the run."""
    base = folder / "base.safetensors"
    if not base.exists():
        torch.manual_seed(0)
        model = DiT(8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=6)
        export_dit(model, base)
    return base


def write_run(folder: Path) -> None:
    """Train through the Python API from the last checkpoint, if there is one; keeps what the run has learned."""
    last = folder / "run" / "last.ckpt"
    trainer, module = fit(folder, write_base(folder), last if last.exists() else None)
    learned = {**module.state_dict(), "step": torch.tensor(trainer.global_step)}
    for number, state in trainer.optimizers[0].state_dict()["state"].items():
        learned |= {f"{number}.{name}": value for name, value in state.items()}
    with atomic_file(folder / "learned.safetensors") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in learned.items()}))
    shutil.rmtree(folder / "run")  # a checkpoint holds the folder's name, which differs between trials


def read_run(folder: Path) -> None:
    """Open its bank and, while it is unfinished, its checkpoint."""
    if (folder / "learned.safetensors").exists():
        return
    DiTDiffTuningModule.load_from_checkpoint(folder / "run" / "last.ckpt", sampler=Sampler())
    MemoryBank(folder / "run-bank").verify()


def job_of(folder: Path) -> Job:
    """A run of a study."""
    return Job(StudyRun("run", (), {}, "", "", {}, None), 0, {"trainer": {}}, (), folder, folder)


def write_result(folder: Path) -> None:
    """Write a run's result and its tables, several times."""
    job = job_of(folder)
    job.discard_leftovers()  # as `difftune compare` does
    discard_temporaries(folder)
    content = {"digest": job.digest, "identity": job.identity, "values": [i / 7 for i in range(2_000)]}
    for _ in range(4):
        atomic_write(job.result_path, (json.dumps(content) + "\n").encode())
        lines = [Line(job.run, (0, 1), {"fid": (1.0, i / 7)}, {}, i, (1.0, 2.0), {}) for i in range(200)]
        study: Any = SimpleNamespace(title="a study", metrics={"fid": "lower"})
        write_tables(study, lines, folder, Console(file=open(os.devnull, "w")))  # noqa: SIM115


def read_result(folder: Path) -> None:
    """Read them; the result must be whole, and so must the tables."""
    if (result := job_of(folder).result()) is not None and len(result["values"]) != 2_000:
        raise AssertionError("the result lacks values")
    for path in folder.glob("table.*"):
        if len(path.read_text().splitlines()) not in (201, 202):
            raise AssertionError(f"{path} lacks rows")


class Target(NamedTuple):
    """How something is written, and how it is opened."""

    write: Callable[[Path], None]
    read: Callable[[Path], None]


TARGETS = {
    "bank": Target(write_bank, read_bank),
    "cache": Target(write_cache, read_cache),
    "checkpoint": Target(write_checkpoint, read_checkpoint),
    "export": Target(write_export, read_export),
    "adapter": Target(write_adapter, read_adapter),
    "network": Target(write_network, read_network),
    "run": Target(write_run, read_run),
    "result": Target(write_result, read_result),
}


def started(write: Callable[[Path], None], folder: Path) -> int:
    """The process id of a child that writes."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            write(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def killed_after(pid: int, seconds: float) -> bool:
    """Whether SIGKILL reached a child before it finished; it must not fail otherwise."""
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    if status:
        raise AssertionError("the run that went on ended with an error")
    return False


def contents(folder: Path) -> dict[str, bytes]:
    """Visible files by name; hidden ones are not results."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    visible = {name: path for name, path in paths.items() if not any(part.startswith(".") for part in name.parts)}
    return {str(name): path.read_bytes() for name, path in visible.items()}


def leftovers(folder: Path) -> int:
    """Hidden files and folders that are left next to the results."""
    return sum(path.name.startswith(".") for path in folder.rglob("*"))


def trial(target: Target, folder: Path, rng: random.Random, duration: float) -> tuple[int, int]:
    """Kill a job at random until it finishes; returns how often it was killed, and found complete in between."""
    kills = whole = 0
    while killed_after(started(target.write, folder), rng.uniform(0, 1.3 * duration)):
        kills += 1
        try:
            target.read(folder)
            whole += 1
        except DiffTuneError:  # refused, since it is not complete yet
            pass
        if kills % 6 == 0:  # let it finish
            duration *= 1.5
    target.read(folder)
    return kills, whole


def stress(names: list[str], kills: int, seed: int, done: dict[str, Any]) -> Iterator[tuple[str, dict[str, int]]]:
    """Trials of each job until it has been killed often enough; yields the name and the counts after each trial."""
    for name in names:
        target = TARGETS[name]
        with tempfile.TemporaryDirectory() as workspace:
            warm, reference = Path(workspace) / "warm", Path(workspace) / "reference"
            warm.mkdir()
            reference.mkdir()
            target.write(warm)  # so that children have imported what they need
            start = time.perf_counter()
            os.waitpid(started(target.write, reference), 0)
            duration, expected = time.perf_counter() - start, contents(reference)
            count = done.get(name, {"trials": 0, "kills": 0, "opened_whole": 0, "different": 0, "leftovers": 0})
            while count["kills"] < kills:
                folder = Path(workspace) / "trial"
                folder.mkdir()
                rng = random.Random(f"{seed} {name} {count['trials']}")
                killed, whole = trial(target, folder, rng, duration)
                count["trials"] += 1
                count["kills"] += killed
                count["opened_whole"] += whole
                count["different"] += contents(folder) != expected
                count["leftovers"] += leftovers(folder)
                shutil.rmtree(folder)
                yield name, count


def main() -> None:
    """Run the stress test, print a table and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=250, help="kills in all, over the jobs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--output", type=Path, default=Path("runs/kills.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # before the first fork: a pool of threads does not survive one
    saved = json.loads(options.output.read_text()) if options.output.exists() else {}
    done = saved["jobs"] if saved.get("seed") == options.seed else {}
    for name, count in stress(options.only, -(-options.kills // len(options.only)), options.seed, done):
        done[name] = count
        atomic_write(options.output, json.dumps({"seed": options.seed, "jobs": done}, indent=1).encode())
    table = Table("job", "trials", "kills", "opened whole after one", "different at the end", "hidden leftovers")
    for name, count in done.items():
        table.add_row(name, *(str(value) for value in count.values()))
    Console().print(table)
    sys.exit(any(count["different"] for count in done.values()))


if __name__ == "__main__":
    main()
