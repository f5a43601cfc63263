from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_difftune.data import shards
from lightning_difftune.data.shards import ShardReader, ShardWriter
from lightning_difftune.errors import ConfigError, StoreError

SPEC = {"weights": "abc", "sampler": {"name": "ddim", "steps": 50}, "guidance_scale": 1.5}
NUM_SAMPLES, SHARD_SIZE, NUM_SHARDS = 23, 7, 4


def generate(indices: Tensor) -> dict[str, Tensor]:
    """Sample i as a function of i alone, in arithmetic that is exact in float32."""
    pattern = (indices.view(-1, 1, 1, 1) * 7919 + torch.arange(48).view(3, 4, 4) * 104729) % 1000
    return {"latents": pattern.float() / 8, "class_labels": indices % 5}


def open_writer(path: Path, **changes: Any) -> ShardWriter:
    arguments = {"kind": "test-store", "spec": SPEC, "num_samples": NUM_SAMPLES, "shard_size": SHARD_SIZE}
    return ShardWriter(path, **(arguments | changes))


def build(
    writer: ShardWriter, generate: Callable[[Tensor], dict[str, Tensor]], batch_size: int, **settings: Any
) -> None:
    """Build with a function of one batch."""
    shards.build(writer, lambda batches: map(generate, batches), batch_size, **settings)


def put(writer: ShardWriter, shard: int, tensors: dict[str, Tensor] | None = None) -> None:
    """Write one shard, with its own samples or other ones."""
    tensors = generate(writer.indices(shard)) if tensors is None else tensors
    writer.check(shard, tensors)
    writer.write(shard, tensors)


def make(path: Path, **changes: Any) -> ShardReader:
    build(open_writer(path, **changes), generate, 3)
    return open_reader(path)


def open_reader(path: Path) -> ShardReader:
    return ShardReader(path, kind="test-store")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def dies(action: Callable[[], object]) -> bool:
    """Run in a child process; whether SIGKILL ended it."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "store"
    make(path)
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def resave(path: Path, tensors: dict[str, Tensor]) -> None:
    """Put other tensors under a shard's own metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_round_trip_in_any_order_with_repeats(finished: Path) -> None:
    reader = open_reader(finished)
    for indices in ([22, 0, 7, 6, 7, 7, 13, 14], [4], [9, 8, 12], [], list(range(NUM_SAMPLES))):
        wanted = torch.tensor(indices, dtype=torch.int64)
        read, made = reader.rows(wanted), generate(wanted)
        assert read.keys() == made.keys()
        for name in made:
            assert read[name].dtype == made[name].dtype
            assert torch.equal(read[name], made[name])
    reader.verify()


def test_properties(finished: Path) -> None:
    reader = open_reader(finished)
    assert len(reader) == NUM_SAMPLES
    assert reader.spec == SPEC
    assert reader.shapes == {"latents": (3, 4, 4), "class_labels": ()}
    assert reader.dtypes == {"latents": torch.float32, "class_labels": torch.int64}


def test_what_was_read_is_a_copy(finished: Path) -> None:
    reader, first = open_reader(finished), torch.tensor([1])
    reader.rows(first)["latents"].zero_()
    assert torch.equal(reader.rows(first)["latents"], generate(first)["latents"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int64])
def test_dtypes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    writer = open_writer(tmp_path, num_samples=5, shard_size=2)
    build(writer, lambda indices: {"x": indices.view(-1, 1).to(dtype)}, 2)
    read = open_reader(tmp_path).rows(torch.tensor([4, 1]))["x"]
    assert read.dtype == dtype
    assert read.tolist() == [[4], [1]]


@pytest.mark.parametrize("index", [-1, NUM_SAMPLES])
def test_index_outside_is_refused(finished: Path, index: int) -> None:
    with pytest.raises(IndexError, match="samples 0 to 22"):
        open_reader(finished).rows(torch.tensor([3, index]))


def test_pickled_reader_maps_anew(finished: Path) -> None:
    reader, everything = open_reader(finished), torch.arange(NUM_SAMPLES)
    fresh = len(pickle.dumps(reader))
    reader.rows(everything)
    assert len(pickle.dumps(reader)) == fresh
    again = pickle.loads(pickle.dumps(reader))
    assert torch.equal(again.rows(everything)["latents"], generate(everything)["latents"])


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers(finished: Path, start: str) -> None:
    reader, everything = open_reader(finished), torch.arange(NUM_SAMPLES)
    reader.rows(everything)  # so that workers start from maps that are already open
    batches = list(everything.split(4))
    loader = DataLoader(batches, batch_size=None, collate_fn=reader.rows, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat([batch["latents"] for batch in loader]), generate(everything)["latents"])


# -- building --------------------------------------------------------------------------------------------------------


def test_files_of_a_finished_store(finished: Path) -> None:
    names = [f"shard-{shard:05d}.safetensors" for shard in range(NUM_SHARDS)]
    assert sorted(contents(finished)) == ["manifest.json", *names]
    assert len(load_file(finished / names[-1])["latents"]) == NUM_SAMPLES % SHARD_SIZE


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_bytes_do_not_depend_on_world_size(finished: Path, tmp_path: Path, world_size: int) -> None:
    for rank in reversed(range(world_size)):  # rank 0 is last, as after a barrier
        build(open_writer(tmp_path), generate, 3, rank=rank, world_size=world_size)
    assert contents(tmp_path) == contents(finished)


def test_barriers_surround_the_manifest(tmp_path: Path) -> None:
    seen = []
    build(open_writer(tmp_path), generate, 3, barrier=lambda: seen.append((tmp_path / "manifest.json").exists()))
    assert seen == [False, False, True]  # before the work is dealt out, too


def test_work_is_dealt_by_shard(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    assert writer.folder.missing_shards(1, 2) == [1, 3]
    work = writer.work(4, 1, 2)
    assert [(batch.shard, batch.indices.tolist()) for batch in work] == [
        (1, [7, 8, 9, 10]),
        (1, [11, 12, 13]),
        (3, [21, 22]),
    ]
    put(writer, 1)
    assert [batch.shard for batch in writer.work(4, 1, 2)] == [3]


def test_progress_counts_the_share_of_the_rank(tmp_path: Path) -> None:
    writer, calls = open_writer(tmp_path), []
    put(writer, 2)
    build(writer, generate, 5, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(12, 23), (14, 23), (19, 23), (21, 23), (23, 23)]


def test_finished_store_is_left_alone(copy: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}

    def never(indices: Tensor) -> dict[str, Tensor]:
        raise AssertionError("nothing is left to generate")

    build(open_writer(copy), never, 3)
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} == before
    with pytest.raises(StoreError, match="finished test-store"):
        put(open_writer(copy), 0, generate(torch.arange(7)))


def resume(path: Path) -> list[int]:
    """Finish the store; the shards that were generated for it."""
    seen: list[int] = []

    def noting(indices: Tensor) -> dict[str, Tensor]:
        seen.extend(indices.tolist())
        return generate(indices)

    build(open_writer(path), noting, 3)
    assert len(seen) == len(set(seen))
    return sorted({index // SHARD_SIZE for index in seen})


@pytest.mark.parametrize("calls", [1, 2, 5, 7])
def test_resume_after_a_kill_while_generating(finished: Path, tmp_path: Path, calls: int) -> None:
    def deadly(indices: Tensor, count: list[int] = []) -> dict[str, Tensor]:  # noqa: B006
        count.append(1)
        if len(count) == calls:
            kill_me()
        return generate(indices)

    assert dies(lambda: build(open_writer(tmp_path), deadly, 3))
    done = (calls - 1) // 3  # three batches a shard; the last one may not have come to the disk yet
    assert resume(tmp_path) in [list(range(first, NUM_SHARDS)) for first in (max(0, done - 1), done)]
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("count", range(1, NUM_SHARDS + 3))  # building.json, the shards, the manifest
def test_resume_after_a_kill_while_writing(
    finished: Path, tmp_path: Path, call: str, after: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(os, call), []

    def deadly(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == count and not after:
            kill_me()
        original(*arguments)
        if len(calls) == count and after:
            kill_me()

    with monkeypatch.context() as patch:
        patch.setattr(os, call, deadly)
        assert dies(lambda: build(open_writer(tmp_path), generate, 3))
    done = {int(file.stem[-5:]) for file in tmp_path.glob("shard-*.safetensors")}
    assert sorted(set(resume(tmp_path)) | done) == list(range(NUM_SHARDS))
    assert not set(resume(tmp_path)) & done
    assert contents(tmp_path) == contents(finished)


def test_same_writer_resumes_after_an_interrupt(finished: Path, tmp_path: Path) -> None:
    writer = open_writer(tmp_path)

    def interrupted(indices: Tensor) -> dict[str, Tensor]:
        if 3 in indices:
            raise KeyboardInterrupt
        return generate(indices)

    with pytest.raises(KeyboardInterrupt):
        build(writer, interrupted, 3)
    build(writer, generate, 3)
    assert contents(tmp_path) == contents(finished)


def test_killed_runs_leftovers_are_cleared(finished: Path, tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    for name in ("shard-00002.safetensors", "manifest.json"):
        (tmp_path / f".{name}.4711-0badcafe.tmp").write_bytes(b"half")
    put(writer, 1)
    assert len(list(tmp_path.glob(".*.tmp"))) == 2
    put(writer, 2)
    assert [file.name for file in tmp_path.glob(".*.tmp")] == [".manifest.json.4711-0badcafe.tmp"]
    resume(tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_damaged_shard_of_an_unfinished_store_is_made_anew(finished: Path, tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    for shard in (0, 1):
        put(writer, shard)
    put(writer, 2)
    os.truncate(tmp_path / "shard-00001.safetensors", 300)
    shorter = {name: tensor[:5] for name, tensor in generate(writer.indices(2)).items()}
    resave(tmp_path / "shard-00002.safetensors", shorter)
    assert resume(tmp_path) == [1, 2, 3]
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize("count", range(1, NUM_SHARDS + 3))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, count: int) -> None:
    original, files = os.fsync, []

    def full(descriptor: int) -> None:
        if os.path.isfile(f"/dev/fd/{descriptor}"):
            files.append(descriptor)
            if len(files) == count:
                raise OSError(code, os.strerror(code))
        original(descriptor)

    done = min(max(count - 2, 0), NUM_SHARDS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = rf"No space left.*(building|shard-0000{done}|manifest).*{done} of 4 shards.*kept.*free some space"
        with pytest.raises(StoreError, match=message):
            build(open_writer(tmp_path / "store"), generate, 3)
    assert not list((tmp_path / "store").glob(".*.tmp"))
    assert len(list((tmp_path / "store").glob("shard-*"))) == done
    assert resume(tmp_path / "store") == list(range(done, NUM_SHARDS))
    assert contents(tmp_path / "store") == contents(finished)


def test_a_second_job_cannot_corrupt_the_store(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, original = open_writer(tmp_path), open_writer(tmp_path), os.replace

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", original)
        put(second, 0)  # while the first has its file ready
        original(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    with pytest.raises(StoreError, match="another job builds"):
        put(first, 0)
    assert resume(tmp_path) == [1, 2, 3]
    assert contents(tmp_path) == contents(finished)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"building.json cannot be written.*Make it writable or name another"):
        open_writer(tmp_path / "file" / "store")


# -- refusing what does not belong together --------------------------------------------------------------------------

OTHERS = [
    ({"spec": SPEC | {"guidance_scale": 4.0}}, r"guidance_scale: 1.5, now 4.0"),
    ({"spec": SPEC | {"sampler": {"name": "ddim", "steps": 20}}}, r"sampler.steps: 50, now 20"),
    ({"spec": SPEC | {"seed": 3}}, r"seed: absent, now 3"),
    ({"shard_size": 8}, r"shard_size: 7, now 8"),
    ({"kind": "other-store"}, r"kind: \"test-store\", now \"other-store\""),
]


@pytest.mark.parametrize(("changes", "message"), OTHERS)
@pytest.mark.parametrize("complete", [False, True])
def test_another_build_is_refused(
    finished: Path, tmp_path: Path, changes: dict[str, Any], message: str, complete: bool
) -> None:
    path = finished
    if not complete:
        path = tmp_path
        put(open_writer(path), 0, generate(torch.arange(7)))
    before = contents(path)
    name = "manifest" if complete else "building"
    with pytest.raises(StoreError, match=rf"{name}.json belongs to another .*{message}.*or delete"):
        open_writer(path, **changes)
    assert contents(path) == before


def test_shard_of_another_build_is_refused(copy: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", spec=SPEC | {"weights": "xyz"})
    shutil.copy(tmp_path / "other" / "shard-00002.safetensors", copy)
    with pytest.raises(StoreError, match=r"shard-00002.safetensors does not belong"):
        open_reader(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"shard-00002.safetensors was not made by this build"):
        resume(copy)


def test_swapped_shards_are_refused(copy: Path) -> None:
    shutil.copy(copy / "shard-00000.safetensors", copy / "shard-00001.safetensors")
    with pytest.raises(StoreError, match=r"shard-00001.safetensors does not belong"):
        open_reader(copy)


def test_unfinished_missing_and_other_kind(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no test-store.*Build it"):
        open_reader(tmp_path / "nowhere")
    open_writer(tmp_path / "begun")
    with pytest.raises(StoreError, match=r"begun is unfinished.*Build it"):
        open_reader(tmp_path / "begun")
    with pytest.raises(StoreError, match="that of a test-store, not of a memory-bank"):
        ShardReader(finished, kind="memory-bank")


def test_finish_without_all_shards(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    put(writer, 0)
    with pytest.raises(StoreError, match="lacks 3 of 4 shards, the first one shard-00001"):
        writer.finish()
    assert not writer.folder.complete


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "no tensors"),
        ({"latents": torch.zeros(6, 3)}, r"shape \(6, 3\), but the shard holds 7"),
        ({"latents": torch.tensor(1.0)}, r"shape \(\), but the shard holds 7"),
        ({"latents": torch.zeros(7, 3, dtype=torch.float64)}, "is torch.float64; write one of"),
        ({"latents": torch.zeros(7, 0)}, "a dimension must be an integer from 1"),
        ({"latents": torch.zeros(7, 3).index_fill(0, torch.tensor([2, 5]), np.nan)}, "in 2 of 7.*sample 9"),
        ({"latents": torch.tensor([0, 0, 0, 0, 0, 0, np.inf])}, "in 1 of 7.*sample 13"),
        ({"latents": torch.zeros(7, 3)}, r"holds latents F32 \(3,\), but the other shards hold latents F32 \(2,\)"),
        ({"latents": torch.zeros(7, 2, dtype=torch.float16)}, "latents F16.*latents F32"),
        ({"latents": torch.zeros(7, 2), "more": torch.zeros(7)}, "more F32"),
    ],
)
def test_unfit_tensors_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    put(open_writer(tmp_path), 0, {"latents": torch.zeros(7, 2)})
    for writer in (open_writer(tmp_path), open_writer(tmp_path)):  # whether or not this process wrote the first shard
        with pytest.raises(StoreError, match=message):
            put(writer, 1, tensors)
        assert writer.folder.missing_shards() == [1, 2, 3]


def test_ranks_that_disagree_about_shapes_are_found_out(tmp_path: Path) -> None:
    first, second = open_writer(tmp_path, num_samples=14), open_writer(tmp_path, num_samples=14)
    put(first, 0, {"x": torch.zeros(7, 2)})
    (tmp_path / "shard-00000.safetensors").rename(tmp_path / "hidden")
    put(second, 1, {"x": torch.zeros(7, 3)})
    (tmp_path / "hidden").rename(tmp_path / "shard-00000.safetensors")
    with pytest.raises(StoreError, match=r"shard-00001.safetensors holds x F32 \(3,\), but the other"):
        first.finish()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda indices: {"x": torch.zeros(len(indices) - 1)}, r"3 samples were asked for, but x has shape \(2,\)"),
        (lambda indices: {"x": torch.tensor(1.0)}, r"3 samples were asked for, but x has shape \(\)"),
        (lambda indices: {f"x{int(indices[0])}": torch.zeros(len(indices))}, r"its batches do not all hold \['x6'\]"),
    ],
)
def test_batches_of_something_else_are_refused(
    tmp_path: Path, made: Callable[[Tensor], dict[str, Tensor]], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        build(open_writer(tmp_path), made, 3)
    assert not list(tmp_path.glob("shard-*"))


@pytest.mark.parametrize(
    "changes",
    [{"num_samples": 0}, {"shard_size": 0}, {"shard_size": 2.5}, {"spec": {"x": object()}}, {"spec": {"x": np.nan}}],
)
def test_impossible_plans(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Cannot plan a test-store"):
        open_writer(tmp_path / "store", **changes)
    assert not (tmp_path / "store").exists()


def test_impossible_batch_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        build(open_writer(tmp_path), generate, 0)


# -- damage ----------------------------------------------------------------------------------------------------------


def follow_advice(path: Path, shard: str) -> None:
    """Follow the error's advice."""
    (path / shard).unlink(missing_ok=True)
    (path / "manifest.json").unlink()


def test_truncated_shard(finished: Path, copy: Path) -> None:
    os.truncate(copy / "shard-00001.safetensors", 1000)
    with pytest.raises(StoreError, match=r"shard-00001.safetensors has 1000 bytes.*Delete it and .*manifest.json"):
        open_reader(copy)
    follow_advice(copy, "shard-00001.safetensors")
    assert resume(copy) == [1]
    assert contents(copy) == contents(finished)


def test_missing_shard(finished: Path, copy: Path) -> None:
    (copy / "shard-00003.safetensors").unlink()
    with pytest.raises(StoreError, match=r"shard-00003.safetensors is missing.*Delete it and"):
        open_reader(copy)
    follow_advice(copy, "shard-00003.safetensors")
    assert resume(copy) == [3]
    assert contents(copy) == contents(finished)


def test_flipped_byte(copy: Path) -> None:
    path = copy / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"shard-00002.safetensors was altered.*Delete it and .*manifest.json"):
        open_reader(copy).verify()
    follow_advice(copy, "shard-00002.safetensors")
    assert resume(copy) == [2]
    open_reader(copy).verify()


def test_every_flipped_byte_of_a_header_is_noticed(copy: Path) -> None:
    path = copy / "shard-00000.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for position in range(header):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(StoreError, match="shard-00000"):
            open_reader(copy).verify()


def test_shard_with_other_tensors(copy: Path) -> None:
    path = copy / "shard-00000.safetensors"
    tensors = generate(torch.arange(7))
    resave(path, tensors | {"latents": tensors["latents"].view(-1, 4, 3, 4)})  # as many bytes
    with pytest.raises(StoreError, match=r"latents F32 \(4, 3, 4\), but the other shards hold .*\(3, 4, 4\)"):
        open_reader(copy)


def test_shard_damaged_after_opening(copy: Path) -> None:
    reader = open_reader(copy)
    os.truncate(copy / "shard-00001.safetensors", 100)
    with pytest.raises(StoreError, match=r"shard-00001.safetensors cannot be read"):
        reader.rows(torch.tensor([8]))


# -- the manifest is untrusted ---------------------------------------------------------------------------------------


def altered(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, r"format version 1 is not 2.*Delete .*copy to build it again"),
        ({"format_version": True}, "format version True"),
        ({"num_samples": "23"}, "num_samples must be an integer"),
        ({"num_samples": True}, "num_samples must be an integer"),
        ({"num_samples": -23}, "num_samples must be an integer from 1"),
        ({"num_samples": 10**30}, "num_samples must be an integer"),
        ({"num_samples": 70}, "lists 4 shards where its sizes make 10"),
        ({"shard_size": 0}, "shard_size must be"),
        ({"kind": ["memory-bank"]}, "kind must be a name"),
        ({"kind": "other"}, "that of a other"),
        ({"spec": []}, "spec must be an object"),
        ({"spec": SPEC | {"guidance_scale": 4}}, "does not belong"),
        ({"tensors": {}}, "lists no tensors"),
        ({"tensors": {"latents": {"dtype": "F32", "shape": [3, 4, 4]}}}, "other shards hold latents F32"),
        ({"tensors": {"latents": {"dtype": "F64", "shape": [3]}}}, "dtype 'F64' is not one of"),
        ({"tensors": {"latents": {"dtype": "F32", "shape": [-3]}}}, "a dimension must be"),
        ({"tensors": {"latents": {"dtype": "F32", "shape": [2**40]}}}, "a dimension must be"),
        ({"tensors": {"latents": {"dtype": "F32", "shape": [1] * 99}}}, "99 dimensions"),
        ({"tensors": {"latents": {"dtype": "F32", "shape": [1], "file": "/etc/passwd"}}}, "and no others"),
        ({"shards": []}, "lists 0 shards"),
        ({"shards": ["../../elsewhere"] * 4}, "a shard must have the fields"),
        ({"shards": [{"bytes": 1.5, "sha256": "0" * 64}] * 4}, "the bytes of a shard must be"),
        ({"shards": [{"bytes": 15, "sha256": "0" * 63 + "\n"}] * 4}, "64 lower-case hexadecimal"),
        ({"shards": [{"bytes": 15, "sha256": "0" * 64}] * 4}, "but the manifest says 15"),
        ({"extra": 1}, "no field 'extra'"),
    ],
)
def test_altered_manifest(copy: Path, changes: dict[str, Any], message: str) -> None:
    altered(copy, **changes)
    with pytest.raises(StoreError, match=message):
        open_reader(copy)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format_version": NaN}',
        "[" * 100_000,
        '{"spec":' * 5000,
        "\xff\xfe",
        '{"num_samples": 1e999}',
        '{"format_version": ' + "9" * 5000 + "}",
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "building.json"])
def test_malformed_json(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=rf"{name} is not a valid file.*Delete it and build again"):
        open_writer(tmp_path)


def test_oversized_manifest_is_not_read(copy: Path) -> None:
    os.truncate(copy / "manifest.json", 2**40)  # sparse
    with pytest.raises(StoreError, match="larger than 64 MiB"):
        open_reader(copy)


def mutate(value: Any, rng: random.Random) -> Any:
    """Replace, drop or repeat one random part of a JSON value."""
    junk = [None, True, -1, 0, 2**70, 1e308, "", "../x", [], {}, [[]], "F32", 3.5]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if rng.random() < 0.15 else {**rest, (key if rng.random() < 0.9 else "x"): mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice([[], [mutate(value[at], rng)], [value[at]] * 2]) + value[at + 1 :]
    return rng.choice(junk)


def test_fuzzed_manifest(copy: Path) -> None:
    original = (copy / "manifest.json").read_bytes()
    everything, rng, refused = torch.arange(NUM_SAMPLES), random.Random(0), 0
    for turn in range(600):
        data = bytearray(original)
        if turn % 2:
            data = bytearray(json.dumps(mutate(json.loads(original), rng)).encode())
        else:
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data))
                data[at : at + rng.choice([0, 1, 1, 1, 9])] = rng.randbytes(rng.choice([0, 1, 1, 1, 3]))
        (copy / "manifest.json").write_bytes(data)
        try:
            reader = open_reader(copy)
            reader.verify()
        except StoreError:
            refused += 1
        else:  # nothing that matters was changed
            assert torch.equal(reader.rows(everything)["latents"], generate(everything)["latents"])
    assert refused > 550


def test_fuzzed_shard_header(copy: Path) -> None:
    path, rng = copy / "shard-00001.safetensors", random.Random(0)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for turn in range(400):
        if turn % 2:
            header = json.dumps(mutate(json.loads(data[8:start]), rng)).encode()
        else:
            header = bytearray(data[8:start])
            for _ in range(rng.randint(1, 3)):
                header[rng.randrange(len(header))] = rng.randrange(256)
        header = bytes(header).ljust(start - 8)  # of the same size if possible, to come past the check of sizes
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])
        if header != data[8:start]:
            with pytest.raises(StoreError, match="shard-00001"):
                open_reader(copy).verify()
