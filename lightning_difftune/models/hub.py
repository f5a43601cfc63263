"""Folders of the Hugging Face hub: downloaded once, cached, or refused with an error that names the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_difftune.errors import CheckpointError, did_you_mean
from lightning_difftune.models.checkpoint_files import DIFFUSERS, TRANSFORMERS, find_weights

if TYPE_CHECKING:
    from huggingface_hub import HfApi

BUNDLED = Path(__file__).parent / "weights"
COMPANIONS = {  # small folders of a pipeline that a part needs
    "text_encoder": "tokenizer/",
    "text_encoder_2": "tokenizer_2/",
    "text_encoder_3": "tokenizer_3/",
    "unet": "scheduler/",
    "transformer": "scheduler/",
}


def is_repo_id(name: str) -> bool:
    """Whether a string could be ``owner/repository``.

    Example:
        >>> is_repo_id("facebook/DiT-XL-2-256"), is_repo_id("runs/tuned/model.safetensors")
        (True, False)
    """
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def repository_of(source: str, revision: str | None = None) -> tuple[str, str | None] | None:
    """The repository and revision that ``owner/repository`` or ``owner/repository@revision`` names; None for a path.

    Example:
        >>> repository_of("facebook/DiT-XL-2-256@refs/pr/1"), repository_of("facebook/DiT-XL-2-256", "main")
        (('facebook/DiT-XL-2-256', 'refs/pr/1'), ('facebook/DiT-XL-2-256', 'main'))
    """
    repo_id, at, stated = source.partition("@")
    if not is_repo_id(repo_id) or (at and not stated):
        return None
    if at and revision not in (None, stated):
        raise CheckpointError(f"{source!r} and revision={revision!r} name two revisions. Leave one of them out.")
    return repo_id, stated or revision


def local_folder(source: str | Path) -> Path:
    """The folder of a bundled pipeline by its name, else the given path, which need not exist."""
    bundled = BUNDLED / source
    return bundled if bundled.is_dir() else Path(source).expanduser()


def folder_of(source: str | Path, subfolder: str, revision: str | None = None) -> Path:
    """The local folder of a pipeline or network: bundled, given, or downloaded from the hub."""
    folder = local_folder(source)
    if folder.exists():
        return folder
    repository = repository_of(source, revision) if isinstance(source, str) else None
    if repository is None:
        fix = did_you_mean(str(source), (place.name for place in BUNDLED.iterdir() if place.is_dir()))
        told = f"{str(source)!r} is not a local folder; a hub repository is written 'owner/name'. {fix}"
        raise CheckpointError(told.rstrip())
    return fetch(repository[0], (subfolder,), repository[1])


@contextmanager
def without_bars(library: Literal["diffusers", "transformers"]) -> Iterator[None]:
    """Turn off a library's progress bars, which fill the screen for files that take a moment to read."""
    logging = import_module(f"{library}.utils.logging")
    shown = logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def fetch(repo_id: str, subfolders: tuple[str, ...], revision: str | None = None) -> Path:
    """Download the configuration and weights of one model of a repository, or find them in the cache.

    The model is in the first subfolder that has one; ``""`` is the repository's root. Returns the folder of the whole
    repository in the hub's cache.
    """

    def download(hub: HfApi, names: list[str]) -> str:
        wanted = choose_files(names, subfolders)
        if not wanted:
            raise CheckpointError(
                f"{repo_id} on the Hugging Face hub holds no diffusers model: no config.json with {DIFFUSERS[0]} or "
                f"{TRANSFORMERS[0]}, complete or in shards, in "
                f"{' or '.join(repr(folder or '/') for folder in subfolders)}."
            )
        return hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted)

    return _downloaded(repo_id, revision, download, lambda: find_cached(repo_id, subfolders, revision))


def fetch_file(repo_id: str, name: str, revision: str | None = None) -> Path:
    """Download one file of a repository that is not a model folder, or find it in the cache."""
    from huggingface_hub import try_to_load_from_cache

    def download(hub: HfApi, names: list[str]) -> str:
        if name not in names:
            raise CheckpointError(f"{repo_id} on the Hugging Face hub holds no {name}.")
        return hub.hf_hub_download(repo_id, name, revision=revision)

    return _downloaded(repo_id, revision, download, lambda: try_to_load_from_cache(repo_id, name, revision=revision))


def _downloaded(
    repo_id: str,
    revision: str | None,
    download: Callable[[HfApi, list[str]], str],
    find: Callable[[], object],
) -> Path:
    """Download the chosen files of a repository, or find them in the cache if the hub cannot be reached."""
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        # Downloading without a connection would try for half a minute; this does not.
        info = hub.model_info(repo_id, revision=revision, timeout=10)
        return Path(download(hub, [entry.rfilename for entry in info.siblings or []]))
    except CheckpointError:
        raise
    except Exception as error:
        cached = None if _is_unknown(error) else find()
        if isinstance(cached, str):
            return Path(cached)
        raise _failure(repo_id, revision, error) from error


def _is_unknown(error: Exception) -> bool:
    """Whether the hub has no such repository or revision."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)


def _failure(repo_id: str, revision: str | None, error: Exception) -> CheckpointError:
    """The error for a failed download: offline mode, or anything that the HTTP library raises without a connection."""
    if _is_unknown(error):
        return CheckpointError(
            f"{repo_id!r} is not a local folder, and the Hugging Face hub has no public model of that name"
            f"{f' at revision {revision!r}' if revision else ''}. Check the spelling, pass a local folder, or log in "
            "with `hf auth login` if it is private."
        )
    return CheckpointError(
        f"{repo_id!r} is not a local folder and not complete in the Hugging Face cache, and the hub cannot be reached "
        f"({type(error).__name__}: {error}). Pass a local folder or file; or download it where there "
        "is a connection, copy the cache and set HF_HOME to it; or unset HF_HUB_OFFLINE if it is set."
    )


def find_cached(repo_id: str, subfolders: tuple[str, ...], revision: str | None) -> str | None:
    """The cached snapshot of a repository, if it has a complete model."""
    from huggingface_hub import try_to_load_from_cache

    for folder in subfolders:
        prefix = f"{folder}/" if folder else ""
        config = try_to_load_from_cache(repo_id, f"{prefix}config.json", revision=revision)
        if isinstance(config, str) and find_weights([file.name for file in Path(config).parent.iterdir()]) is not None:
            return str(Path(config).parents[len(Path(folder).parts)])
    return None


def choose_files(names: list[str], subfolders: tuple[str, ...]) -> list[str]:
    """The files of a repository to download for one model; empty if it has none.

    Example:
        >>> choose_files(["vae/config.json", "vae/diffusion_pytorch_model.bin", "README.md"], ("transformer", "vae"))
        ['vae/config.json', 'vae/diffusion_pytorch_model.bin']
    """
    for folder in subfolders:
        prefix = f"{folder}/" if folder else ""
        weights = find_weights([name.removeprefix(prefix) for name in names if name.startswith(prefix)])
        if weights is not None and f"{prefix}config.json" in names:
            companion = COMPANIONS.get(folder)
            small = [name for name in names if companion is not None and name.startswith(companion)]
            wanted = ("model_index.json", f"{prefix}config.json", *(prefix + name for name in weights.names), *small)
            return [name for name in wanted if name in names]
    return []
