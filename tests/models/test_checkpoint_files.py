from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_difftune.errors import CheckpointError
from lightning_difftune.files import read_safetensors
from lightning_difftune.models.checkpoint_files import read_json, read_torch

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = STATE) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_safetensors_and_its_metadata(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors", {"key": "value"})
    state, metadata = read_safetensors(tmp_path / "model.safetensors")
    assert same(state)
    assert metadata == {"key": "value"}


def test_plain_state_dict(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "model.pt")
    assert same(read_torch(tmp_path / "model.pt"))


def test_file_older_than_pytorch_1_6(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert same(read_torch(tmp_path / "model.pt"))


def test_training_checkpoint_gives_its_ema_and_may_hold_its_arguments(tmp_path: Path) -> None:
    checkpoint = {
        "model": {name: tensor + 1 for name, tensor in STATE.items()},
        "ema": STATE,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="DiT-XL/2", num_classes=1000),
    }
    torch.save(checkpoint, tmp_path / "0400000.pt")
    assert same(read_torch(tmp_path / "0400000.pt"))


def test_training_checkpoint_without_ema_gives_its_weights(tmp_path: Path) -> None:
    torch.save({"model": STATE, "epoch": 3}, tmp_path / "last.pt")
    assert same(read_torch(tmp_path / "last.pt"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    file, trace = tmp_path / "model.pt", tmp_path / "trace"
    torch.save({**STATE, "extra": RunsCode(trace)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model\.pt holds more than tensors \(.*mkdir\).*could run code"):
        read_torch(file)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pytorch_file(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "model.pt"
    torch.save(STATE, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"model\.pt is truncated"):
        read_torch(file)


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>Not found</html>", b"hello world", bytes(range(256))])
def test_files_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    for name, read in (("model.pt", read_torch), ("model.safetensors", read_safetensors)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read(tmp_path / name)


def test_truncated_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(STATE, file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        read_safetensors(file)


def test_lightning_checkpoint_says_how_to_open_it(tmp_path: Path) -> None:
    torch.save({"base_identity": {"name": "dit"}, "state_dict": STATE}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"checkpoint of this package.*load_from_checkpoint.*export_dit"):
        read_torch(tmp_path / "last.ckpt")


@pytest.mark.parametrize("content", [{"epoch": 3, "loss": 0.1}, [torch.ones(2)], torch.ones(2)])
def test_file_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_torch(tmp_path / "model.pt")


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_json_that_is_not_an_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
