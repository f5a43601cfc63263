"""Kills at random moments, full disks, folders that cannot be written to, and two jobs in one folder."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_difftune import MemoryBank
from lightning_difftune.cli import main
from lightning_difftune.errors import DiffTuneError, StoreError
from lightning_difftune.locks import FolderLock

KILLS = Path(__file__).parents[1] / "benchmarks" / "kills.py"


def load_stress():
    """The parts of the stress test of benchmarks/."""
    spec = importlib.util.spec_from_file_location("kills", KILLS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stress = load_stress()


@pytest.fixture(autouse=True)
def one_thread():
    """A pool of threads does not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The counts of a short stress test.

    It has a process of its own: PyTorch cannot train in a fork of one that has done a backward pass on another device
    than the CPU, such as those of ``difftune plan``.
    """
    output = tmp_path_factory.mktemp("kills") / "kills.json"
    command = [
        sys.executable,
        str(KILLS),
        "--kills",
        str(4 * len(stress.TARGETS)),
        "--seed",
        "1",
        "--output",
        str(output),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(output.read_text())["jobs"] if output.exists() else {}, run.stderr


@pytest.mark.parametrize("name", stress.TARGETS)
def test_random_kills_change_nothing(name, killed):
    jobs, said = killed
    assert name in jobs, said
    assert jobs[name]["kills"] >= 4, said
    assert jobs[name]["different"] == 0


def outcome(action):
    """Run in a child process; its error's class and message, or ``None``."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        message = b""
        try:
            action()
        except BaseException as error:
            message = f"{type(error).__mro__[1].__name__} {error}".encode()
        finally:
            os.write(writing, message)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read().decode()
    os.waitpid(pid, 0)
    return message or None


def limited(action, size):
    """Run with no file allowed to grow beyond ``size`` bytes, as on a disk that is full."""

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        action()

    return outcome(run)


@pytest.mark.parametrize(
    ("name", "size"), [("bank", 50_000), ("cache", 9_000), ("checkpoint", 300_000), ("export", 100_000)]
)
def test_no_file_can_grow_any_further(tmp_path, name, size):
    target, reference = stress.TARGETS[name], tmp_path / "reference"
    for folder in (reference, tmp_path / "full"):
        folder.mkdir()
    target.write(reference)
    message = limited(lambda: target.write(tmp_path / "full"), size)
    assert message is not None
    assert message.startswith("DiffTuneError "), message
    assert "File too large" in message or "space" in message
    assert not list((tmp_path / "full").rglob("*.tmp"))
    with pytest.raises(DiffTuneError):
        target.read(tmp_path / "full")
    target.write(tmp_path / "full")
    assert stress.contents(tmp_path / "full") == stress.contents(reference)


@pytest.mark.parametrize("name", ["bank", "cache", "checkpoint", "export"])
def test_a_folder_that_cannot_be_written_to(tmp_path, name, monkeypatch):
    target = stress.TARGETS[name]
    (tmp_path / "in the way").write_text("a file")
    with pytest.raises(DiffTuneError, match=r"writable|protected"):
        target.write(tmp_path / "in the way")

    def refuse(path, flags, *args, original=os.open, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(tmp_path) in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return original(path, flags, *args, **kwargs)

    def refuse_folder(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse_folder)
    with pytest.raises(DiffTuneError, match="Read-only file system"):
        target.write(tmp_path / "read-only")


def test_a_finished_bank_opens_where_nothing_can_be_written(tmp_path, monkeypatch):
    stress.write_bank(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("replace", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    stress.write_bank(tmp_path)
    stress.read_bank(tmp_path)


# -- two jobs ---------------------------------------------------------------------------------------------------------


def test_the_second_job_waits_and_generates_nothing_twice(tmp_path):
    class Slow(stress.Numbers):
        def generate_bank(self, indices):
            time.sleep(0.01)
            with open(tmp_path / "generated", "a") as log:
                log.write("".join(f"{index}\n" for index in indices.tolist()))
            return super().generate_bank(indices)

    def work(folder):
        MemoryBank.build(folder / "bank", Slow(), 400, batch_size=10, shard_size=20)

    children = [stress.started(work, tmp_path) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert sorted(map(int, (tmp_path / "generated").read_text().split())) == list(range(400))
    stress.read_bank(tmp_path)
    assert not (tmp_path / "bank/.lock").exists()


def test_a_job_of_several_processes_says_so_instead_of_waiting(tmp_path):
    lock = FolderLock(tmp_path / "bank")
    lock.acquire(waits=False)
    with pytest.raises(StoreError, match=r"Another job is working in .*bank\. Wait until it is done"):
        MemoryBank.build(tmp_path / "bank", stress.Numbers(), 40, rank=0, world_size=2)
    lock.release()


def hold(seconds):
    """A job that only holds the lock of its folder."""

    def work(folder):
        lock = FolderLock(folder)
        lock.acquire(waits=False)
        (folder / "held").touch()
        time.sleep(seconds)
        lock.release()

    return work


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


def test_a_killed_job_leaves_no_lock(tmp_path):
    pid = stress.started(hold(60), tmp_path)
    wait_for(tmp_path / "held")
    with pytest.raises(StoreError):
        FolderLock(tmp_path).acquire(waits=False)
    assert stress.killed_after(pid, 0)
    lock = FolderLock(tmp_path)
    lock.acquire(waits=False)
    lock.release()


def test_a_waiting_job_goes_on_when_the_other_is_done(tmp_path):
    pid = stress.started(hold(0.5), tmp_path)
    wait_for(tmp_path / "held")
    lock = FolderLock(tmp_path)
    lock.acquire(waits=True)
    lock.release()
    assert os.waitpid(pid, 0)[1] == 0


def test_a_disk_that_is_full_where_nobody_expects_it_gives_no_traceback(monkeypatch, capsys):
    def full(args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as writing to an open file does

    monkeypatch.setattr("lightning_difftune.cli.start", full)
    assert main(["compare", "study.yaml"]) == 2
    assert capsys.readouterr().err == "difftune: No space left on device. --debug shows where it was raised.\n"


@pytest.mark.slow
def test_a_run_of_a_killed_comparison_stops_with_it():
    code = "import sys; from lightning_difftune.cli.compare.work import stop_with_parent; stop_with_parent()"
    child = f"{code}; print('begun', flush=True); import time; time.sleep(60)"
    parent = (
        "import subprocess, sys, time; "
        f"run = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE); "
        "print(run.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert process.stdout.readline() == "begun\n"
    process.kill()
    process.wait()
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return  # nobody collects an orphan here
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    pytest.fail("the run continues although its comparison was killed")
