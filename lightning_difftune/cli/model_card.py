"""The model card of an export: base model, data, training and quality, written from the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning_difftune import __version__
from lightning_difftune.cli.run import Run, class_name
from lightning_difftune.cli.tuned import TunedRun
from lightning_difftune.files import atomic_write
from lightning_difftune.models import hub

BUNDLED_LICENSES = {
    "dit-nano-omniglot": "apache-2.0",
    "dit-nano-omniglot-flow": "apache-2.0",
    "dit-nano-imagenet": "other",
    "sd-nano-flowers": "other",
}


def facts_of(tuned: TunedRun) -> dict[str, str]:
    """The training in words; settings that the config lacks are left out."""
    module, setting = tuned.module, tuned.run.setting
    data, objective, sampler = setting("data", "init_args") or {}, module.objective, module.sampler
    units = {"num_classes": "classes", "image_size": "px"}
    target = [described(data.get("target")), *(f"{data[key]} {unit}" for key, unit in units.items() if data.get(key))]
    source, size = data.get("bank_source"), data.get("bank_size")
    kept = f"{size} samples" if source is None else f"up to {size} of the target's own pictures"
    kept = kept if source in (None, "target") else f"{size} pictures"
    bank = f"{kept}, share {data.get('retention_share')} of a batch"
    facts = {
        "base": f"{base_of(tuned)} (fingerprint `{str(module.base_identity.get('fingerprint'))[:12]}`)",
        "data": ", ".join(filter(None, target)) or None,
        "objective": f"{type(objective).__name__}, {objective.schedule!r}, retention weight "
        f"{objective.retention_weight:g}, reconsolidation weight {objective.reconsolidation_weight:g}",
        "memory bank": bank if data.get("bank") is not None and module.uses_retention else "none",
        "tuner": "none (full fine-tuning)" if module.tuner is None else type(module.tuner).__name__,
        "optimizer": described(setting("model", "init_args", "optimizer")),
        "steps": f"{tuned.run.step} of batch {data['batch_size']}{tuned.run.step_words}" if data else None,
        "seed": described(setting("seed_everything")),
        "sampler": sampler_words(sampler),
    }
    return {key: value for key, value in facts.items() if value is not None}


def sampler_words(sampler: Any) -> str:
    """How the run's samples were drawn."""
    tail = f"{sampler.pretrained_tail:g} of the steps, the last ones, by the pre-trained model"
    words = [
        type(sampler.scheduler).__name__,
        f"{sampler.num_inference_steps} steps",
        f"guidance {sampler.guidance_scale:g}"
        + (" away from the pre-trained model (Domain Guidance)" if sampler.domain_guidance else ""),
        *([tail] if sampler.pretrained_tail else []),
    ]
    return ", ".join(words)


def described(entry: Any) -> str | None:
    """An entry of a config in words: the class and its settings, with only the last part of paths."""
    if not isinstance(entry, dict) or "class_path" not in entry:
        return None if entry is None else str(entry)
    settings = {key: value for key, value in (entry.get("init_args") or {}).items() if value is not None}
    said = [
        f"{key} {Path(value).name if isinstance(value, str) else described(value)}" for key, value in settings.items()
    ]
    return f"{class_name(entry)} ({', '.join(said)})" if said else entry["class_path"]


def base_of(run: TunedRun) -> str:
    """The pre-trained model's name; of a path, the last part."""
    name = str(run.module.base_identity.get("name"))
    return name if hub_name(name) is not None else Path(name).name


def hub_name(base: str) -> str | None:
    """The hub repository of a base's name, without its revision; ``None`` if it is not a hub name."""
    repository = hub.repository_of(base)
    return None if repository is None or Path(base).exists() else repository[0]


def license_of(base: str) -> str | None:
    """The stated licence of a pre-trained model; ``None`` if there is none or the hub cannot be reached."""
    if base in BUNDLED_LICENSES:
        return BUNDLED_LICENSES[base]
    from huggingface_hub import HfApi, ModelCard

    try:
        card = Path(base) / "README.md"
        if card.is_file():
            return ModelCard.load(card, ignore_metadata_errors=True).data.license
        if (repo_id := hub_name(base)) is not None:
            stated = HfApi().model_info(repo_id, timeout=10).card_data
            return None if stated is None else stated.license
    except Exception:  # the hub may raise anything without a connection
        return None
    return None


def model_card(
    tuned: TunedRun, library: str, title: str, usage: str, picture: str, license_name: str | None, done: list[str]
) -> str:
    """A card in the hub's format: YAML front matter, the run, its metrics and the model's usage.

    ``picture`` is a file next to the card, or empty. A ``license_name`` of ``None`` is looked up; ``done`` gets a line
    if it stays unknown.
    """
    license_name = license_name or license_of(str(tuned.module.base_identity.get("name")))
    if license_name is None:
        done.append("licence of the base: unknown; name it with --license before you publish")
        licence = "The licence of the base is not known. It holds for this model, too: look it up before publishing."
    else:
        licence = f"The base is licensed as `{license_name}`, which holds for this model, too."
    metrics = measurements(tuned.run)
    diff_tuning = "Tuned by [Diff-Tuning](https://arxiv.org/abs/2406.00773)"
    how = diff_tuning if tuned.module.uses_retention else "Trained without retention"
    parts = [
        f"---\n{front_matter(tuned, library, title, license_name, metrics)}\n---",
        f"# {title}",
        f"{how} with lightning_difftune {__version__}.",
        f"![samples]({picture})" if picture else "",
        f"## Training\n\n{table_of(facts_of(tuned))}",
        f"## Measurements\n\n{table_of({k: f'{v:.4g}' for k, v in metrics.items()})}" if metrics else "",
        "The samples and measurements are those of the averaged weights, and these are the weights as trained."
        if tuned.leaves_averages and (metrics or picture)
        else "",
        usage.strip(),
        f"## Licence\n\n{licence}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def table_of(rows: dict[str, str]) -> str:
    """A Markdown table without headings."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def front_matter(tuned: TunedRun, library: str, title: str, license_name: str | None, metrics: dict[str, float]) -> str:
    """The card's metadata for the hub, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    module = tuned.module
    task, base = module.pipeline_tag, str(module.base_identity.get("name"))
    data = described(tuned.run.setting("data", "init_args", "target")) or "the target"
    results = [EvalResult(task, "custom", data, name, round(value, 6)) for name, value in metrics.items()]
    card: dict[str, Any] = {
        "base_model": hub_name(base),
        "library_name": library,
        "license": license_name,
        "license_name": "see-base-model" if license_name == "other" else None,
        "pipeline_tag": task,
        "tags": ["diff-tuning", "lightning_difftune", *module.card_tags],
    }
    if results:
        card |= {"model_name": title, "eval_results": results}
    return ModelCardData(**card).to_yaml().strip()


def measurements(run: Run) -> dict[str, float]:
    """The latest value of each metric when the run's checkpoint was saved, which may not be the last one."""
    named = {name: series for name, series in run.metrics.items() if not name.startswith(("train/", "lr-"))}
    until = {name: [value for step, value in series if step <= steps_of(run)] for name, series in named.items()}
    return {name: values[-1] for name, values in until.items() if values}


def steps_of(run: Run) -> float:
    """Optimizer steps of the run's checkpoint; infinite if unknown."""
    return run.step if isinstance(run.step, int) else math.inf


def card_files(output: Path) -> tuple[Path, Path]:
    """The files of an export's card and its picture: in a folder, or next to a single file."""
    if output.suffix == ".safetensors":
        return output.with_suffix(".md"), output.with_suffix(".png")
    return output / "README.md", output / "samples.png"


def write_card(
    output: Path, run: TunedRun, library: str, usage: str, license_name: str | None, done: list[str]
) -> None:
    """Write the card of an export, and the run's latest sample grid if it has one."""
    card, picture = card_files(output)
    every = run.run.grids.get("samples", {})
    grids = {step: file for step, file in every.items() if 0 < step <= steps_of(run.run)}  # 0 is the base's own
    if grids:
        atomic_write(picture, grids[max(grids)].read_bytes())
    text = model_card(run, library, output.stem, usage, picture.name if grids else "", license_name, done)
    atomic_write(card, text.encode())
    done.append(f"model card: {card}\nNext: the card says how to open it")
