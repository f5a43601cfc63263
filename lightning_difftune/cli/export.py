"""``difftune export``: the tuned network of a run as a file or folder for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lightning_difftune import __version__
from lightning_difftune.cli.arguments import CommandParser, check_writable
from lightning_difftune.cli.model_card import base_of, card_files, write_card
from lightning_difftune.cli.tuned import TunedRun
from lightning_difftune.draws import noise_of
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.files import atomic_path
from lightning_difftune.models import hub
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.export import exact_arithmetic, in_float32
from lightning_difftune.models.frozen import Frozen
from lightning_difftune.models.usage import usage_of_adapter
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.protocols import RetentionBatch

DESCRIPTION = """Write the tuned network of a run, for others to open.

  difftune export RUN --output tuned.safetensors   one file, official key names
  difftune export RUN --output tuned               a folder for diffusers
  difftune export RUN --output lora --format diffusers   for load_lora_weights
  difftune export RUN --output adapter --format peft     the same for peft
  difftune export RUN --output tuned --push user/name --license apache-2.0

The averaged weights are taken where the checkpoint has them, and a tuner's layers are merged into the plain network; a
LoRA can also stay an adapter. What was written is read back, and must compute the same as the tuned network before it
takes its place. A model card comes with it: README.md in a folder, tuned.md next to tuned.safetensors.

RUN is a run's folder (its newest checkpoint) or a checkpoint, which holds the run's config. All other options are
--config and overrides of its keys."""

OTHER_FILES = (".bin", ".ckpt", ".gguf", ".gz", ".onnx", ".pt", ".pth", ".tar", ".zip")
TOLERANCE = 1e-4  # of the largest output: float32 rounds differently once factors are multiplied out


def export(argv: Sequence[str]) -> None:
    """Export the network of one checkpoint and report what was done."""
    parser = CommandParser("export", DESCRIPTION)
    parser.add_run()
    parser.add_argument("--output", type=Path, help="file ending in .safetensors, or a folder")
    parser.add_argument("--format", choices=("safetensors", "diffusers", "peft"), help="default: by the output, merged")
    parser.add_argument("--raw", action="store_true", help="the trained weights, not their averages (EMA)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--license", metavar="NAME", help="of the base, for the model card (default: what the base says)"
    )
    parser.add_argument("--push", metavar="USER/NAME", help="also upload it to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    options, rest = parser.parse_known_args(argv)
    if options.output is None:
        raise ConfigError("difftune export needs a place for the result: --output FILE.safetensors or FOLDER.")
    if options.push is not None and not hub.is_repo_id(options.push):
        raise ConfigError(f"--push takes user/name, got {options.push!r}.")
    is_file = options.output.suffix == ".safetensors"
    if options.output.suffix in OTHER_FILES:
        raise ConfigError(f"{options.output}: an export is a file ending in .safetensors or a folder.")
    check_writable(options.output.parent)
    if options.format is not None and (options.format == "safetensors") != is_file:
        raise ConfigError(f"--format {options.format} does not go into {options.output}: only safetensors are a file.")
    card, picture = card_files(options.output)
    for taken in (options.output, *((card, picture) if is_file else ())):
        if taken.exists() and not options.overwrite:
            raise CheckpointError(f"{taken} exists. Choose another path, or pass --overwrite.")
    run = TunedRun(options.run, rest)
    module = run.module
    done = [str(run)]
    with run.weights(options.raw, done):
        if is_adapter(module, options.format):
            library, network = options.format, write_adapter(module, options, done)
            usage = usage_of_adapter(network, base_of(run), options.format)
        else:
            name_classes(run, done)
            library, network = "lightning_difftune" if is_file else "diffusers", plain_network(module, done)
            write(module, network, options.output, done)
            usage = module.usage(network, options.output, base_of(run))
    write_card(options.output, run, library, usage, options.license, done)
    if options.push is not None:
        files = {"": options.output}
        if is_file:
            files = {options.output.name: options.output, "README.md": card}
            files |= {picture.name: picture} if picture.exists() else {}
        done.append(f"pushed to {push(options.push, files, options.private)}")
    print("\n".join(done))


def is_adapter(module: DiffTuningModule, format: str | None) -> bool:
    """Whether a LoRA is exported as an adapter: for peft, or of a diffusers network for diffusers."""
    is_lora = hasattr(module.tuner, "save_lora_weights") and hasattr(module.trainable_modules()[0], "save_pretrained")
    return format == "peft" or (format == "diffusers" and is_lora)


def write_adapter(module: DiffTuningModule, options: argparse.Namespace, done: list[str]) -> Any:
    """Write a LoRA in the format of peft or diffusers, and return its network."""
    (network,) = module.trainable_modules()
    tuner: Any = module.tuner
    if not hasattr(tuner, "save_adapter"):
        kind = "the whole network" if tuner is None else type(tuner).__name__
        raise ConfigError(f"--format peft writes the layers of a LoRA; this run trained {kind}. Leave the option out.")
    base = str(module.base_identity["fingerprint"])
    before = fingerprint(network)
    with atomic_path(options.output) as draft:
        draft.mkdir()
        if options.format == "peft":
            tuner.save_adapter(network, draft, base)
            tuner.load_adapter(network, draft, base)
        else:
            tuner.save_lora_weights(network, draft)
            tuner.load_lora_weights(network, draft)
        if fingerprint(network) != before:
            raise CheckpointError("Not exported: the adapter that was read back differs from the tuned one.")
    done.append(f"tuner: LoRA, kept as an adapter for {options.format}\nwrote {options.output}")
    return network


def name_classes(run: TunedRun, done: list[str]) -> None:
    """Take class names from the run's data, if its files are available and the checkpoint has none."""
    if not run.module.lacks_class_names:
        if run.run.class_names is not None:
            done.append(f"class names: {len(run.run.class_names)} of the checkpoint")
        return
    try:
        names = run.reader.open_data().target.class_names
    except Exception as error:  # data sets without files may raise anything
        done.append(f"class names: none, since the data cannot be opened ({str(error).partition(chr(10))[0]})")
        return
    if names is not None:
        run.module.name_classes(names)
        done.append(f"class names: {len(names)} from the data")


def plain_network(module: DiffTuningModule, done: list[str]) -> Any:
    """The trained network, with its tuner's layers merged."""
    networks = module.trainable_modules()
    if len(networks) != 1:
        raise ConfigError(f"difftune export writes one network; {type(module).__name__} trains {len(networks)}.")
    if module.tuner is None:
        done.append("tuner: none")
        return networks[0]
    name = type(module.tuner).__name__
    merge = getattr(module.tuner, "merge", None)
    if merge is None:
        raise ConfigError(f"{name} has no `merge`, which says what its layers fold into. Give it one, or keep the run.")
    done.append(f"tuner: {name}, merged into the plain network")
    return merge(networks[0])


def write(module: DiffTuningModule, network: Any, output: Path, done: list[str]) -> None:
    """Write the network to a draft, read it back, compare it with the tuned one, and move it into place."""
    with atomic_path(output) as draft:
        reloaded = module.write_export(network, draft)
        coarsest = max(torch.finfo(p.dtype).eps for p in reloaded.parameters() if p.is_floating_point())
        error = difference(module, reloaded)
        if not error <= max(TOLERANCE, 4 * coarsest):
            raise CheckpointError(
                f"Not exported: what was written differs from the tuned network, by {error:.1e} of its largest output. "
                "If the tuner is one of your own, check its merge."
            )
        done.append(f"checked: read back, its outputs differ from the tuned network's by {error:.1e} of the largest")
    size = sum(file.stat().st_size for file in [output, *output.rglob("*")] if file.is_file())
    done.append(f"wrote {output} ({size / 1e6:.1f} MB)")


@torch.inference_mode()
def difference(module: DiffTuningModule, other: nn.Module) -> float:
    """Largest difference of another network's outputs from the trained one's, relative, at three noise levels.

    Both compute in float32: bfloat16 in frozen weights would cause larger differences than a wrong merge.
    """
    indices = torch.arange(3)
    x_t = noise_of(0, indices, module.sample_shape).to(module.device)
    columns = cast("RetentionBatch", {"latents": x_t, **module.bank_columns(indices, x_t)})
    steps = module.objective.diffusion.num_timesteps
    given = x_t, torch.tensor([0, steps // 2, steps - 1]), module.retention_condition(columns)
    trained = module.trainable_modules()[0]
    name = next(name for name, child in module.named_children() if child is trained)
    # The UNet of a ControlNet, whose bfloat16 would round the outputs of both to steps larger than the tolerance.
    called = [part for part in module.denoising_modules() if part is not trained]
    frozen = {c: c.network for c in module.children() if isinstance(c, Frozen) and any(c.network is p for p in called)}
    try:
        with exact_arithmetic(module.device):
            for holder, network in frozen.items():
                vars(holder)["network"] = in_float32(network)
            setattr(module, name, in_float32(trained))
            expected = module.denoise(*given)
            setattr(module, name, other.eval().float())
            output = module.denoise(*given)
    finally:
        setattr(module, name, trained)
        for holder, network in frozen.items():
            vars(holder)["network"] = network
    return ((output - expected).abs().max() / expected.abs().max()).item()


def push(repo_id: str, files: dict[str, Path], private: bool) -> str:
    """Upload files and folders to their paths in a hub repository, ``""`` being its root; returns its address.

    A missing repository is created.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    message = f"Export of lightning_difftune {__version__}"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        for place, path in files.items():
            if path.is_dir():
                api.upload_folder(repo_id=repo_id, folder_path=path, path_in_repo=place or None, commit_message=message)
            else:
                api.upload_file(repo_id=repo_id, path_or_fileobj=path, path_in_repo=place, commit_message=message)
    except Exception as error:  # the hub's HTTP library may raise anything
        raise CheckpointError(
            f"{repo_id} could not be pushed to the hub ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "The export itself is written. Log in with `hf auth login`, and check the name and the connection."
        ) from error
    return f"https://huggingface.co/{repo_id}"
