"""The files that describe a folder of shards: a build's plan, a finished folder's manifest, a shard's header.

Everything read here is untrusted: JSON is checked field by field, file names are derived and never read, sizes are
bounded by the files on disk, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from lightning_difftune.errors import StoreError
from lightning_difftune.files import json_digest, json_value

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
BUILDING = "building.json"
TAG = "build"  # the one metadata key of a shard; safetensors writes several in a random order
DTYPES = {"F32": torch.float32, "F16": torch.float16, "U8": torch.uint8, "I64": torch.int64}

_MAX_JSON_BYTES = 64 * 2**20
_MAX_SAMPLES = 2**40
_MAX_DIMENSIONS = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True)
class TensorLayout:
    """One sample of a tensor: dtype in safetensors' notation, and shape without the sample axis."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if len(self.shape) > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {len(self.shape)} dimensions, more than {_MAX_DIMENSIONS}")
        for size in self.shape:
            _check_int(size, "a dimension", 1, 2**31)


@dataclass(frozen=True)
class BuildPlan:
    """The plan of a build, fixed before its first sample.

    Attributes:
        kind: Kind of contents, such as ``"memory-bank"``.
        spec: What determines the contents, as plain JSON values, normalised by a JSON round trip.
        num_samples: Samples in the whole folder.
        shard_size: Consecutive samples in one shard; the last one may be shorter.
        digest: The SHA-256 of the above except ``num_samples``, stored in each shard. Plans with the same digest have
            the same samples, though possibly more of them.
    """

    kind: str
    spec: dict[str, Any]
    num_samples: int
    shard_size: int
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if type(self.kind) is not str or not self.kind:
            raise ValueError(f"kind must be a name, found {self.kind!r}")
        if not isinstance(self.spec, dict):
            raise ValueError(f"spec must be an object, found {type(self.spec).__name__}")
        _check_int(self.num_samples, "num_samples", 1, _MAX_SAMPLES)
        _check_int(self.shard_size, "shard_size", 1, _MAX_SAMPLES)
        object.__setattr__(self, "spec", json_value(self.spec))
        object.__setattr__(self, "digest", json_digest({**self.to_json(), "num_samples": None}))

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.num_samples / self.shard_size)

    def shard_range(self, shard: int) -> range:
        """The sample indices of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_samples))

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "num_samples": self.num_samples,
            "shard_size": self.shard_size,
            "spec": self.spec,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BuildPlan:
        """Check and read the result of :meth:`to_json`; a ``ValueError`` states what is wrong."""
        version = value.get("format_version")
        if version != FORMAT_VERSION or type(version) is not int:
            raise ValueError(f"format version {version!r} is not {FORMAT_VERSION}, the one this version reads")
        return cls(*(_field(value, name) for name in ("kind", "spec", "num_samples", "shard_size")))

    @classmethod
    def load(cls, path: Path) -> BuildPlan:
        """Read ``building.json``, or raise :class:`StoreError`."""
        return _load(path, cls.from_json)


@dataclass(frozen=True)
class ShardRecord:
    """The manifest's entry of a shard: the file's size in bytes and its SHA-256."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check_int(self.bytes, "the bytes of a shard", 1, 2**62)
        if type(self.sha256) is not str or not _SHA256.fullmatch(self.sha256):
            raise ValueError("a shard's sha256 is not 64 lower-case hexadecimal digits")


@dataclass(frozen=True)
class Manifest:
    """The record of a finished build: its plan, the layout of its tensors, and each shard's size and hash."""

    plan: BuildPlan
    tensors: dict[str, TensorLayout]
    shards: tuple[ShardRecord, ...]

    def to_bytes(self) -> bytes:
        """The manifest as a JSON file."""
        tensors = {name: asdict(layout) for name, layout in self.tensors.items()}
        return dump_json({**self.plan.to_json(), "tensors": tensors, "shards": list(map(asdict, self.shards))})

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Manifest:
        """Check and read the result of :meth:`to_bytes`; a ``ValueError`` states what is wrong."""
        plan = BuildPlan.from_json(value)
        if unknown := value.keys() - plan.to_json().keys() - {"tensors", "shards"}:
            raise ValueError(f"there is no field {min(unknown)!r}")
        tensors = {}
        for name, found in _typed(value, "tensors", dict).items():
            layout = _only(found, f"tensor {name!r}", "dtype", "shape")
            tensors[name] = TensorLayout(_typed(layout, "dtype", str), tuple(_typed(layout, "shape", list)))
        records = _typed(value, "shards", list)
        if len(records) != plan.num_shards:
            raise ValueError(f"it lists {len(records)} shards where its sizes make {plan.num_shards}")
        if not tensors:
            raise ValueError("it lists no tensors")
        shards = tuple(ShardRecord(**_only(record, "a shard", "bytes", "sha256")) for record in records)
        return cls(plan, tensors, shards)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read ``manifest.json``, or raise :class:`StoreError`."""
        return _load(path, cls.from_json)


@dataclass(frozen=True)
class ShardHeader:
    """The header of a shard's file: its build and number, its samples and their layout."""

    tag: str | None
    num_samples: int
    tensors: dict[str, TensorLayout]

    @classmethod
    def load(cls, path: Path) -> ShardHeader:
        """Read only the header; a :class:`StoreError` if the file is missing, truncated, or not a shard."""
        try:
            with safe_open(path, framework="np") as file:
                views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is not a mapping
                tag = (file.metadata() or {}).get(TAG)
                shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
                dtypes = {name: view.get_dtype() for name, view in views.items()}
            lengths = {shape[:1] for shape in shapes.values()}
            if len(lengths) != 1 or lengths == {()}:
                raise ValueError("its tensors do not share a sample axis")
            tensors = {name: TensorLayout(dtypes[name], shape[1:]) for name, shape in shapes.items()}
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(f"{path} cannot be read as a shard ({error}). {rebuild_shard(path)}") from error
        return cls(tag, lengths.pop()[0], tensors)


def shard_name(shard: int) -> str:
    """The file of a shard inside its folder."""
    return f"shard-{shard:05d}.safetensors"


def shard_tag(digest: str, shard: int) -> str:
    """The required metadata of shard number ``shard`` in the build with this digest."""
    return f"{digest} {shard}"


def rebuild_shard(path: Path) -> str:
    """The remedy for a damaged shard, as a sentence of an error."""
    return f"Delete it and {path.with_name(MANIFEST)}, then build again: the other shards are kept."


def misfit(path: Path, found: dict[str, TensorLayout], expected: dict[str, TensorLayout]) -> str:
    """What is wrong with a shard that does not fit the others, as a sentence of an error."""
    return f"{path} holds {_described(found)}, but the other shards hold {_described(expected)}."


def dump_json(value: dict[str, Any]) -> bytes:
    """A JSON file whose bytes depend only on the value."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _load(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES // 2**20} MiB")
        value = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        if type(value) is not dict:
            raise ValueError(f"expected an object, found {type(value).__name__}")
        return parse(value)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        fix = "Delete it and build again: finished shards are kept."
        if re.match(r"format version \d", str(error)):
            fix = f"Delete {path.parent} to build it again."
        raise StoreError(f"{path} is not a valid file of this format: {error}. {fix}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _field(value: dict[str, Any], name: str) -> Any:
    if name not in value:
        raise ValueError(f"the field {name!r} is missing")
    return value[name]


def _typed(value: dict[str, Any], name: str, kind: type[T]) -> T:
    found = _field(value, name)
    if type(found) is not kind:  # exactly: True is not a number
        raise ValueError(f"{name!r} must be of type {kind.__name__}, found {type(found).__name__}")
    return found


def _only(value: Any, what: str, *names: str) -> dict[str, Any]:
    if type(value) is not dict or value.keys() != set(names):
        raise ValueError(f"{what} must have the fields {', '.join(names)} and no others")
    return value


def _check_int(value: Any, what: str, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} must be an integer from {low} to {high}, found {value!r:.40}")


def _described(tensors: dict[str, TensorLayout]) -> str:
    return ", ".join(f"{name} {layout.dtype} {layout.shape}" for name, layout in sorted(tensors.items()))
