"""Atomic files and folders, with digests."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_difftune.errors import CheckpointError

SHA256 = "sha256"  # the key of the digest in the metadata of our safetensors files
SUMS = "SHA256SUMS"  # in folders that we write

# -- atomic writes ----------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears under its name only when the ``with`` block succeeds.

    Its folder is created. An ``OSError``, such as of a full disk, names ``path`` and leaves nothing behind. A pipe or
    device, such as ``/dev/stdout``, is written to directly.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            yield file
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with _naming(path, temporary):
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Let errors name the final path in place of a temporary one or none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and str(error.filename or temporary).startswith(str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whatever kills the process; see :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(data)


def discard_temporaries(folder: Path, name: str = "*") -> None:
    """Delete the temporary files that killed runs left behind for the file ``name``, or for any file."""
    for leftover in folder.glob(f".{name}.*-*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path, replace: bool = True) -> Iterator[Path]:
    """A path for a file or folder that replaces ``path`` only when the ``with`` block succeeds.

    For writers that need a path, such as ``save_pretrained``. It is on the same disk as ``path`` and has the same name.
    Remains of killed processes are deleted.

    Args:
        path: The final path.
        replace: Whether to replace an existing ``path``; otherwise it stays, as when two processes write the same.

    Raises:
        OSError: The disk is full or refuses; an existing ``path`` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*-draft-*"):
        if not _is_running(leftover.name.removeprefix(f".{path.name}.").partition("-")[0]):
            shutil.rmtree(leftover, ignore_errors=True)
    prefix = f".{path.name}.{os.getpid()}-draft-"
    with (
        _naming(path, path.with_name(prefix)),
        TemporaryDirectory(prefix=prefix, dir=path.parent) as workspace,
    ):
        draft, replaced = Path(workspace) / path.name, Path(workspace) / "replaced"
        yield draft
        _follow_umask(Path(workspace))
        if path.exists() and not replace:
            return
        if not path.is_dir():
            draft.replace(path)
            return
        path.rename(replaced)  # folders cannot be exchanged atomically
        try:
            draft.rename(path)
        except OSError:
            replaced.rename(path)
            raise


def _follow_umask(folder: Path) -> None:
    """Give files their usual modes; safetensors makes them readable by their owner only."""
    usual = folder / ".usual"
    usual.touch()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(usual.stat().st_mode)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:  # another user's
        return True
    return True


# -- digests of tensors and folders -----------------------------------------------------------------------------------


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a safetensors file into memory => tensors, metadata; checked against its hash, if it has one."""
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}). Download it again.") from error
    stated = metadata.pop(SHA256, None)
    if stated is not None and stated != tensor_digest(tensors, metadata):
        raise CheckpointError(
            f"{file} was altered: its contents do not have the sha256 that it states. Export it again."
        )
    return tensors, metadata


def write_safetensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that contains its hash, and whose bytes depend only on its contents."""
    save_file(dict(tensors), file, {**metadata, SHA256: tensor_digest(tensors, metadata)})
    order_metadata(file)


def order_metadata(file: Path) -> None:
    """Sort a safetensors file's metadata in place; the library writes it in random order."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= size:
            opened.seek(8)
            opened.write(ordered.ljust(size))


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of all files below a folder, except ``README.md``, which people edit, to ``SHA256SUMS``."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (SUMS, "README.md"))
    lines = [f"{file_digest(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Compare the files in a folder with ``SHA256SUMS`` there or in the parent folder, if it exists.

    Raises:
        CheckpointError: If a file was altered.
    """
    for place in (folder, folder.parent):
        if not (place / SUMS).is_file():
            continue
        stated = (place / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
        for digest, _, name in (line.partition("  ") for line in stated):
            file = place / name
            if file.parent == folder and file.is_file() and file_digest(file) != digest:
                raise CheckpointError(
                    f"{file} was altered: it does not have the SHA-256 in {place / SUMS}. Write or download it again; "
                    f"if you changed it on purpose, delete {SUMS}."
                )


# -- SHA-256, in hexadecimal ------------------------------------------------------------------------------------------


def bytes_digest(data: bytes) -> str:
    """The SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def text_digest(text: str) -> str:
    """The SHA-256 of a text in UTF-8."""
    return bytes_digest(text.encode("utf-8", "surrogateescape"))


def own_number(value: Any) -> Any:
    """A number of NumPy as Python's, which JSON and checkpoints can hold; everything else as it is.

    Example:
        >>> own_number(np.int64(3)), own_number("3")
        (3, '3')
    """
    return value.item() if isinstance(value, np.generic) else value


def json_value(content: Any) -> Any:
    """A value as JSON would give it back: lists for tuples, and Python's own numbers.

    Raises:
        TypeError, ValueError: If JSON has nothing for a part of it, such as NaN.
    """

    def number(value: Any) -> Any:
        if (own := own_number(value)) is value:
            raise TypeError(f"a {type(value).__name__} is not JSON")
        return own

    return json.loads(json.dumps(content, allow_nan=False, default=number))


def json_digest(content: Any) -> str:
    """The SHA-256 of a JSON value; the order of keys does not matter."""
    return text_digest(json.dumps(content, sort_keys=True))


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_digest(*parts: npt.NDArray[Any] | str) -> str:
    """The SHA-256 of strings and arrays in this order, shapes and types included."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{len(part)}:{part}".encode())
        else:
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """The SHA-256 of named tensors, with dtypes and shapes, and metadata; order and device do not matter.

    At most one tensor is copied at a time. Of meta tensors, as in `difftune plan`, only names, dtypes and shapes count.

    Example:
        >>> tensor_digest({"a": torch.zeros(2)}) == tensor_digest({"a": torch.zeros(2, 1)})
        False
    """
    digest = hashlib.sha256(b"" if metadata is None else json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if not isinstance(tensor, FakeTensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
