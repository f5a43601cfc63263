from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lightning_difftune.errors import CheckpointError
from lightning_difftune.models import DiT, FrozenAutoencoder, export_dit, load_dit
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.hub import choose_files, fetch


@pytest.fixture(autouse=True)
def no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that does not answer, and an empty cache."""
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
    assert fingerprint(load_dit(f"owner/name@{'a' * 40}")) == fingerprint(model)
    for again in ({"source": "owner/name", "revision": "v2"}, {"source": "owner/name@v2"}):
        with pytest.raises(CheckpointError, match="cannot be reached"):
            load_dit(**again)
    with pytest.raises(CheckpointError, match="'owner/name@v2' and revision='main' name two revisions"):
        load_dit("owner/name@v2", revision="main")
    (repository / "snapshots" / ("a" * 40) / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not complete in the Hugging Face cache"):
        load_dit("owner/name")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub on this machine that serves one folder as ``owner/name``."""
    root, commit = tmp_path / "served", "b" * 40

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path, files = self.path.partition("?")[0], [file for file in root.rglob("*") if file.is_file()]
            headers, names = {}, [file.relative_to(root).as_posix() for file in files]
            if path.startswith("/api/models/owner/name/tree/"):
                sizes = [file.stat().st_size for file in files]
                content: object = [{"type": "file", "path": n, "size": s, "oid": "0"} for n, s in zip(names, sizes)]  # noqa: B905
            elif path.startswith("/api/models/owner/name"):
                content = {"id": "owner/name", "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            elif path.startswith(f"/owner/name/resolve/{commit}/"):
                content = (root / path.partition(f"{commit}/")[2]).read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
            else:
                content, headers = {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(404 if "X-Error-Code" in headers else 200)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield root
    server.shutdown()
    server.server_close()


def test_downloaded_model_opens_again_without_a_connection(
    served: Path, no_connection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    export_dit(model, served, "diffusers")
    assert fingerprint(load_dit("owner/name")) == fingerprint(model)
    assert list(no_connection.rglob("scheduler")), "what it was trained with is read"
    assert not list(no_connection.rglob("README.md")), "nothing is downloaded that is not read"

    with pytest.raises(CheckpointError, match=r"no public model of that name.*private"):
        load_dit("nobody/name")
    with pytest.raises(CheckpointError, match=r"owner/name on the Hugging Face hub holds no diffusers model.*'vae'"):
        FrozenAutoencoder("owner/name", subfolder="vae")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fingerprint(load_dit("owner/name")) == fingerprint(model)


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


@pytest.mark.parametrize("layout", ["diffusers", "older"])
def test_shards_and_variants_are_downloaded_whole(layout: str) -> None:
    """All shards of the best variant there is with its index, and nothing of the others."""
    shards = [
        f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00003.safetensors"
        if layout == "diffusers"
        else f"unet/diffusion_pytorch_model-0000{i}-of-00003.fp16.safetensors"
        for i in (1, 2, 3)
    ]
    index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    names = ["unet/config.json", index, *shards, "scheduler/scheduler_config.json"]
    assert choose_files(names, ("unet",)) == ["unet/config.json", *shards, index, "scheduler/scheduler_config.json"]
    assert choose_files([name for name in names if name != shards[1]], ("unet",)) == []
    full = "unet/diffusion_pytorch_model.safetensors"
    assert choose_files([*names, full], ("unet",))[:2] == ["unet/config.json", full]
    text = ["text_encoder/config.json", "text_encoder/model.fp16.safetensors", "tokenizer/vocab.json"]
    assert choose_files(text, ("text_encoder",)) == text


def test_a_sharded_network_is_downloaded_cached_and_opened(
    served: Path, no_connection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    from lightning_difftune.models.diffusers_layout import open_network

    small: dict[str, Any] = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "norm_num_groups": 2,
    }
    kind: Any = UNet2DConditionModel
    unet = kind(4, **small, up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, cross_attention_dim=8)
    unet.half().save_pretrained(served / "unet", max_shard_size="10KB")
    unet.half().save_pretrained(served / "unet", variant="fp16")
    (served / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(served / "unet" / "elsewhere.safetensors")
    assert len(list((served / "unet").glob("*-of-*"))) > 1
    opened = open_network(kind, "owner/name", "unet")
    assert fingerprint(opened) == fingerprint(unet.float())
    assert not list(no_connection.rglob("elsewhere*"))
    assert open_network(kind, "owner/name", "unet", dtype=torch.bfloat16).dtype == torch.bfloat16
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fingerprint(open_network(kind, "owner/name", "unet")) == fingerprint(opened)
    next(no_connection.rglob("*00001-of-*")).unlink()
    with pytest.raises(CheckpointError, match="not complete in the Hugging Face cache"):
        open_network(kind, "owner/name", "unet")
    local = served / "unet"
    next(local.glob("*00002-of-*")).unlink()
    with pytest.raises(CheckpointError, match=r"unet lacks 1 shards of the weights.*00002-of"):
        open_network(kind, local)
