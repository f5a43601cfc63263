from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from lightning_difftune.errors import CheckpointError
from lightning_difftune.models import DiT, FrozenAutoencoder, export_dit, load_dit
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.hub import choose_files, fetch


@pytest.fixture(autouse=True)
def no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that nobody answers for, and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("load", [load_dit, FrozenAutoencoder])
def test_no_connection_fails_at_once_and_says_what_to_do(load, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"'owner/name'.*cannot be reached.*local folder.*HF_HOME") as caught:
        load("owner/name")
    assert time.monotonic() - start < 10  # the hub's own retries take 23
    assert "HF_HUB_OFFLINE" in str(caught.value)


@pytest.mark.parametrize("offline", [True, False])
def test_cached_model_opens_without_a_connection(
    no_connection: Path, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    model = DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    repository = no_connection / "models--owner--name"
    export_dit(model, repository / "snapshots" / ("a" * 40), "diffusers")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert fingerprint(load_dit("owner/name")) == fingerprint(model)
    assert fetch("owner/name", ("transformer",), revision="a" * 40).name == "a" * 40
    with pytest.raises(CheckpointError, match="cannot be reached"):
        load_dit("owner/name", revision="v2")
    (repository / "snapshots" / ("a" * 40) / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not whole in the Hugging Face cache"):
        load_dit("owner/name")


def test_only_what_is_needed_is_downloaded() -> None:
    names = [
        "README.md",
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.bin",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    transformer = ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.bin"]
    assert choose_files(names, ("transformer", "")) == transformer
    assert choose_files(names, ("vae",))[1:] == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert choose_files(names, ("",)) == []
    root = ["config.json", "diffusion_pytorch_model.bin"]
    assert choose_files(root, ("transformer", "")) == root
    assert choose_files(["transformer/config.json"], ("transformer",)) == []
