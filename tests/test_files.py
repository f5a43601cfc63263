"""Atomic files and folders, with the modes of the user's umask, and digests."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_difftune.files import atomic_file, atomic_path, atomic_write, tensor_digest, write_safetensors


@pytest.fixture
def umask() -> Iterator[None]:
    """0027: a group reads, others do not."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", b"1")
    with atomic_path(tmp_path / "draft") as draft:
        draft.write_bytes(b"1")
    with atomic_path(tmp_path / "folder") as draft:
        draft.mkdir()
        (draft / "inside").write_bytes(b"1")
    with atomic_path(tmp_path / "tensors") as draft:
        save_file({"a": torch.zeros(1)}, draft)
    with atomic_path(tmp_path / "ours") as draft:
        write_safetensors({"a": torch.zeros(1)}, draft, {})
    assert mode(tmp_path / "folder") == 0o750
    files = ("file", "draft", "folder/inside", "tensors", "ours")
    assert {name: oct(mode(tmp_path / name)) for name in files} == dict.fromkeys(files, "0o640")


class Full(Exception):
    """The disk is full."""


@pytest.mark.parametrize("folder", [False, True])
def test_what_was_there_stays_if_the_writer_fails(tmp_path: Path, folder: bool) -> None:
    place = tmp_path / "place"
    for number in (1, 2):
        with atomic_path(place) as draft:
            draft.mkdir() if folder else None
            (draft / "inside" if folder else draft).write_text(str(number))
    with pytest.raises(Full), atomic_path(place) as draft:
        raise Full
    assert (place / "inside" if folder else place).read_text() == "2"
    assert os.listdir(tmp_path) == ["place"]


def test_two_who_make_the_same_keep_the_first(tmp_path: Path) -> None:
    for number in (1, 2):
        with atomic_path(tmp_path / "folder", replace=False) as draft:
            draft.mkdir()
            (draft / "number").write_text(str(number))
    assert (tmp_path / "folder/number").read_text() == "1"


def test_drafts_of_killed_processes_are_deleted_and_those_of_others_are_not(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], check=True, capture_output=True, text=True
    )
    for owner in (dead.stdout.strip(), str(os.getppid())):
        (tmp_path / f".place.{owner}-draft-x").mkdir()
    with atomic_path(tmp_path / "place") as draft:
        draft.write_bytes(b"1")
    assert sorted(os.listdir(tmp_path)) == [f".place.{os.getppid()}-draft-x", "place"]


def test_a_digest_counts_names_types_shapes_bytes_and_metadata_but_no_order() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(2), "c": torch.ones(2)},
        {"a": torch.zeros(2).int(), "b": torch.ones(2)},
        {"a": torch.zeros(2, 1), "b": torch.ones(2)},
        {"a": torch.zeros(2), "b": torch.tensor([1.0, 2.0])},
    ]
    digests = [tensor_digest(each) for each in [tensors, *others]] + [tensor_digest(tensors, {"format": "1"})]
    assert len(set(digests)) == 6
    assert tensor_digest(dict(reversed(tensors.items()))) == digests[0]


def test_errors_name_the_file_and_not_its_temporary(tmp_path: Path) -> None:
    missing = tmp_path / "nosuch" / "file"
    with pytest.raises(FileNotFoundError) as caught, atomic_file(missing):
        shutil.rmtree(missing.parent)
    assert (caught.value.filename, caught.value.filename2) == (str(missing), None)
    with pytest.raises(OSError, match="other") as full, atomic_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "other")  # a full disk names no file
    assert full.value.filename == str(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as folder:
        atomic_write(tmp_path / "folder", b"1")
    assert folder.value.filename == str(tmp_path / "folder")
    with pytest.raises(FileNotFoundError) as others, atomic_file(tmp_path / "file"):
        missing.read_bytes()
    assert others.value.filename == str(missing), "of the block's own file"
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_pipe_is_written_to_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_bytes)
        atomic_write(pipe, b"content")
        assert read.result(timeout=60) == b"content"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
