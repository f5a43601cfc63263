"""Made-up and mangled files: reading them raises only this package's own errors, and quickly."""

from __future__ import annotations

import importlib.util
import io
import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lightning_difftune import MemoryBank
from lightning_difftune.cli.compare.study import read_study
from lightning_difftune.cli.lightning import ConfigReader
from lightning_difftune.cli.run import Run
from lightning_difftune.cli.run_files import check_checkpoint
from lightning_difftune.data.shards.writer import ShardWriter
from lightning_difftune.errors import ConfigError, DiffTuneError
from lightning_difftune.files import read_safetensors
from lightning_difftune.models.checkpoint_files import read_json, read_torch
from lightning_difftune.models.checkpoints import read_file
from lightning_difftune.schedules import MeasuredSchedule

path = Path(__file__).parents[1] / "benchmarks" / "kills.py"
spec = importlib.util.spec_from_file_location("kills", path)
writers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(writers)

SECONDS = 10.0  # for one input, on a busy machine

numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.just(2**70), st.just(10**400))
words = st.one_of(st.text(max_size=12), st.sampled_from(["../x", "/etc/passwd", "F32", "a.b", "${x}", "!!python"]))
values = st.recursive(
    st.one_of(numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)),
    max_leaves=12,
)


@st.composite
def mangled(draw, original):
    """A file with a few of its bytes replaced, repeated, cut out or added, or its end cut off."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([0, 1, 1, 2, 8, 64, len(data)])))
        data[start:stop] = draw(st.one_of(st.binary(max_size=9), st.just(bytes(data[start:stop]) * 2)))
    return bytes(data)


@st.composite
def remade(draw, original):
    """A JSON value with one of its parts, however deep, replaced by another value."""
    if isinstance(original, dict) and original and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(original)))
        changed = {**original, key: draw(remade(original[key]))}
        if draw(st.integers(0, 9)) == 0:
            del changed[key]
        return changed
    if isinstance(original, list) and original and draw(st.integers(0, 9)):
        position = draw(st.integers(0, len(original) - 1))
        return [*original[:position], draw(remade(original[position])), *original[position + 1 :]]
    return draw(values)


def fuzz(strategy, examples, read):
    """Read many inputs; anything but an error of this package fails, and so does a slow one."""
    counts = {"read": 0, "refused": 0}

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def check(content):
        start = time.perf_counter()
        try:
            read(content)
            counts["read"] += 1
        except DiffTuneError:
            counts["refused"] += 1
        assert time.perf_counter() - start < SECONDS

    check()
    assert counts["refused"]
    return counts


def examples(few, many):
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    MemoryBank.build(folder / "bank", writers.Numbers(), 12, shard_size=6)
    return folder / "bank"


@examples(120, 4000)
@pytest.mark.parametrize("name", ["manifest.json", "building.json"])
def test_manifests(bank, tmp_path, examples, name):
    original = (bank / "manifest.json").read_bytes()
    for shard in bank.glob("shard-*"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())

    def read(content):
        (tmp_path / name).write_bytes(content)
        if name == "manifest.json":
            MemoryBank(tmp_path).verify()
        else:
            ShardWriter(tmp_path, kind="memory-bank", spec={"model": "numbers"}, num_samples=12, shard_size=6)

    made_up = remade(json.loads(original)).map(lambda value: json.dumps(value).encode())
    fuzz(st.one_of(mangled(original), made_up, st.binary(max_size=60)), examples, read)


@examples(120, 2500)
def test_safetensors(tmp_path, examples):
    state = {name: tensor[:2] for name, tensor in writers.small_dit().state_dict().items()}
    original = save(state, {"architecture": "{}", "class_names": "null", "format_version": "1"})
    size = int.from_bytes(original[:8], "little")
    header, body = json.loads(original[8 : 8 + size]), original[8 + size :]

    def with_header(value):
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + body

    def read(content):
        (tmp_path / "model.safetensors").write_bytes(content)
        read_safetensors(tmp_path / "model.safetensors")
        read_file(tmp_path / "model.safetensors")

    fuzz(st.one_of(mangled(original), remade(header).map(with_header), st.binary(max_size=60)), examples, read)


@examples(120, 2000)
def test_checkpoints(tmp_path, examples):
    archive, old = io.BytesIO(), io.BytesIO()
    content = {"state_dict": {"weight": torch.arange(6.0)}, "config": "trainer: {max_steps: 3}", "global_step": 3}
    torch.save(content, archive)
    torch.save(content, old, _use_new_zipfile_serialization=False)

    def read(content):
        (tmp_path / "run.ckpt").write_bytes(content)
        try:
            check_checkpoint(tmp_path / "run.ckpt")
            Run(tmp_path, tmp_path / "run.ckpt").settings()
        finally:
            read_torch(tmp_path / "run.ckpt")

    originals = [mangled(file.getvalue()) for file in (archive, old)]
    fuzz(st.one_of(*originals, st.binary(max_size=60)), examples, read)


@examples(80, 1000)
def test_configs_inside_checkpoints(tmp_path, examples):
    def read(text):
        torch.save({"state_dict": {}, "config": text, "pytorch-lightning_version": "2"}, tmp_path / "run.ckpt")
        Run(tmp_path, tmp_path / "run.ckpt").settings()

    fuzz(st.one_of(values, values.map(yaml.safe_dump), st.text(max_size=40)), examples, read)


@examples(150, 3000)
def test_studies(tmp_path, examples):
    study = {"output": "out", "seeds": [0], "base": ["base.yaml"], "metrics": {"fid": "lower"}}
    study |= {"set": {"trainer.max_steps": 3}, "evaluate": [], "title": "A study"}
    study["runs"] = {"a": {"configs": [], "method": "m", "at": {"x": 1}}, "b": {"against": "a"}}
    (tmp_path / "base.yaml").touch()

    def read(content):
        (tmp_path / "study.yaml").write_bytes(content)
        read_study(tmp_path / "study.yaml")

    made_up = remade(study).map(lambda value: yaml.safe_dump(value).encode())
    fuzz(st.one_of(mangled(yaml.safe_dump(study).encode()), made_up, st.binary(max_size=60)), examples, read)


@examples(25, 500)
def test_configs(tmp_path, examples):
    reader = ConfigReader()
    target = {"class_path": "lightning_difftune.data.HandwrittenDigits", "init_args": {"split": "train"}}
    config = {
        "model": {"class_path": "lightning_difftune.DiTDiffTuningModule", "init_args": {"model": "dit-nano-omniglot"}},
        "data": {"class_path": "lightning_difftune.MemoryBankDataModule", "init_args": {"target": target}},
        "trainer": {"max_steps": 3},
    }

    def read(content):
        (tmp_path / "run.yaml").write_bytes(content)
        reader.compose(["--config", str(tmp_path / "run.yaml")])

    made_up = remade(config).map(lambda value: yaml.safe_dump(value).encode())
    fuzz(st.one_of(mangled(yaml.safe_dump(config).encode()), made_up, st.binary(max_size=60)), examples, read)


@examples(100, 1000)
def test_json_of_diffusers_and_measured_schedules(tmp_path, examples):
    original = {"s": [0.001, 0.5, 1.0], "psi": [0.1, 0.5, 1.0]}

    def read(content):
        (tmp_path / "some.json").write_bytes(content)
        read_json(tmp_path / "some.json")
        MeasuredSchedule(tmp_path / "some.json")

    made_up = remade(original).map(lambda value: json.dumps(value).encode())
    fuzz(st.one_of(mangled(json.dumps(original).encode()), made_up, st.binary(max_size=60)), examples, read)


@pytest.mark.parametrize("values", [[10**400, 1], [[0, 1], [1, 2]], "ab", {"a": 1}, [None, 1], [float("nan"), 1]])
@pytest.mark.parametrize("key", ["s", "psi"])
def test_values_that_are_not_levels(tmp_path, key, values):
    (tmp_path / "some.json").write_text(json.dumps({"s": [0.5, 1.0], "psi": [0.5, 1.0], key: values}))
    with pytest.raises(ConfigError, match="is not a measured schedule"):
        MeasuredSchedule(tmp_path / "some.json")


def test_nothing_of_a_config_is_run_while_it_is_read(tmp_path):
    (tmp_path / "run.yaml").write_text(f"trainer: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(ConfigError):
        ConfigReader().compose(["--config", str(tmp_path / "run.yaml")])
    (tmp_path / "study.yaml").write_text(f"title: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_study(tmp_path / "study.yaml")
    assert not (tmp_path / "ran").exists()
