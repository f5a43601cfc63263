"""Exports on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lightning_difftune import __version__
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.models import hub


def push(repo_id: str, files: dict[str, Path], private: bool) -> str:
    """Upload an export to the Hugging Face hub.

    Args:
        repo_id: ``user/name``; created if it is not there.
        files: Files and folders by their places in the repository; ``""`` is its root.
        private: Whether a new repository is private.

    Returns:
        The address.

    Raises:
        ConfigError: If the name is none.
        CheckpointError: If the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    if not hub.is_repo_id(repo_id):
        raise ConfigError(f"--push takes user/name, got {repo_id!r}.")
    api = HfApi()
    message = f"Export of lightning_difftune {__version__}"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        for place, path in files.items():
            if path.is_dir():
                api.upload_folder(repo_id=repo_id, folder_path=path, path_in_repo=place or None, commit_message=message)
            else:
                api.upload_file(repo_id=repo_id, path_or_fileobj=path, path_in_repo=place, commit_message=message)
    except Exception as error:  # whatever the hub's HTTP library raises
        raise CheckpointError(
            f"{repo_id} could not be pushed to the hub ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "The export itself is written. Log in with `hf auth login`, and check the name and the connection."
        ) from error
    return f"https://huggingface.co/{repo_id}"
