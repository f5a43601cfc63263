from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError
from lightning_difftune.models import DiT, export_dit, hub, load_dit
from lightning_difftune.models.checkpoints import check_state, fingerprint, infer_architecture
from lightning_difftune.models.dit import SIZES

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official_dit_tiny.safetensors"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The authors' state dict of a DiT with 4 heads of 12 channels."""
    return {k.removeprefix("model."): v for k, v in load_file(FIXTURE).items() if k.startswith("model.")}


@pytest.fixture(scope="module")
def model(state: dict[str, Tensor]) -> DiT:
    model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4)
    model.load_state_dict(state)
    return model


def assert_same_function(ours: DiT, theirs: DiT) -> None:
    x = torch.randn(3, *theirs.sample_shape)
    t, y = torch.tensor([0, 100, 999]), torch.tensor([0, 1, theirs.null_class])
    assert torch.equal(ours(x, t, y), theirs(x, t, y))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_official_weights(tmp_path: Path, state: dict[str, Tensor], model: DiT, suffix: str) -> None:
    file = tmp_path / f"DiT{suffix}"
    if suffix == ".pt":
        torch.save(state, file)
    else:
        save_file(state, file)
    loaded = load_dit(str(file), num_heads=4)
    assert loaded.architecture == model.architecture
    assert_same_function(loaded, model)
    assert loaded.training
    assert loaded.class_names is None
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_loaded_model_trains_and_keeps_no_hold_on_the_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    file = tmp_path / "DiT.pt"
    torch.save(state, file)
    loaded = load_dit(file, num_heads=4)
    before = fingerprint(loaded)
    file.write_bytes(b"\0" * file.stat().st_size)  # in place, where a mapped file would change under the model
    assert fingerprint(loaded) == before
    loaded(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([5])).square().sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert fingerprint(loaded) != before


@pytest.mark.parametrize("format", ["safetensors", "diffusers"])
def test_default_device_does_not_matter(tmp_path: Path, model: DiT, format) -> None:  # type: ignore[no-untyped-def]
    path = export_dit(model, tmp_path / "DiT.safetensors", format)
    with torch.device("meta"):
        loaded = load_dit(path)
    assert fingerprint(loaded) == fingerprint(model)


def test_half_precision_weights_become_float32(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "half.safetensors")
    loaded = load_dit(tmp_path / "half.safetensors", num_heads=4)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.pos_embed, state["pos_embed"].bfloat16().float())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_architecture_of_published_sizes_is_known_from_shapes(size: str, patch: int) -> None:
    with torch.device("meta"):
        model = DiT.from_size(f"DiT-{size}/{patch}", input_size=64, num_classes=10)
    assert infer_architecture(model.state_dict(), None, Path("x.pt")) == model.architecture


@pytest.mark.parametrize(
    "sizes",
    [
        {"input_size": 28, "patch_size": 7, "in_channels": 1, "hidden_size": 28, "depth": 1, "mlp_ratio": 2.2},
        {"input_size": 6, "patch_size": 3, "in_channels": 3, "hidden_size": 44, "depth": 2, "mlp_ratio": 49 / 44},
        {"input_size": 16, "patch_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 11, "learn_sigma": False},
    ],
)
def test_architecture_of_other_sizes_is_known_but_for_the_heads(sizes: dict[str, float]) -> None:
    model = DiT(**{**sizes, "num_heads": 2, "num_classes": 3})  # type: ignore[arg-type]
    inferred = infer_architecture(model.state_dict(), 2, Path("x.pt"))
    check_state(DiT(**inferred).state_dict(), model.state_dict(), "x.pt")
    assert {k: v for k, v in inferred.items() if k != "mlp_ratio"} == {
        k: v for k, v in model.architecture.items() if k != "mlp_ratio"
    }
    with pytest.raises(CheckpointError, match=r"x\.pt has hidden size .* not a published size.*Pass num_heads"):
        infer_architecture(model.state_dict(), None, Path("x.pt"))


def test_published_width_at_another_depth_does_not_tell_the_heads() -> None:
    with torch.device("meta"):
        model = DiT(input_size=32, patch_size=2, in_channels=4, hidden_size=384, depth=6, num_heads=8)
    with pytest.raises(CheckpointError, match="Pass num_heads"):
        infer_architecture(model.state_dict(), None, Path("x.pt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("x_embedder.proj.weight"), "no DiT under the official key names.*x_embedder.proj.weight"),
        (lambda s: s.update(pos_embed=torch.zeros(16, 48)), "no DiT under the official key names"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 15, 48)), "not a DiT on square inputs: 15 positions"),
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), r"1 missing \(blocks\.1\.attn\.qkv\.bias\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (
            lambda s: s.update({"blocks.1.attn.proj.weight": torch.zeros(48, 47)}),
            r"1 of another shape \(blocks\.1\.attn\.proj\.weight \(48, 47\) instead of \(48, 48\)\)",
        ),
        (lambda s: [s.pop(name) for name in list(s) if "blocks.1." in name], r"10 missing \(.*, .*, .*, \.\.\.\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, state: dict[str, Tensor], change, message) -> None:  # type: ignore[no-untyped-def]
    altered = dict(state)
    change(altered)
    torch.save(altered, tmp_path / "DiT.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_dit(tmp_path / "DiT.pt", num_heads=4)
    assert str(tmp_path / "DiT.pt") in str(caught.value)


def test_heads_that_do_not_divide_the_width_name_the_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "DiT.safetensors")
    with pytest.raises(CheckpointError, match=r"DiT\.safetensors describes a DiT that cannot be built.*num_heads"):
        load_dit(tmp_path / "DiT.safetensors", num_heads=5)


def test_heads_against_a_file_that_knows_them(tmp_path: Path, model: DiT) -> None:
    file = export_dit(model, tmp_path / "DiT.safetensors")
    assert load_dit(file, num_heads=4).architecture == model.architecture
    with pytest.raises(CheckpointError, match="says that it has 4 heads, not 6"):
        load_dit(file, num_heads=6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "99"}, "format version 99.*Upgrade"),
        ({"format_version": "one"}, "metadata is incomplete or damaged"),
        ({"architecture": "{"}, "metadata is incomplete or damaged"),
        ({"architecture": "[1]"}, "metadata is incomplete or damaged"),
        ({"architecture": json.dumps({"width": 3})}, "a DiT that cannot be built"),
        ({"class_names": json.dumps(["one"] * 1001)}, "1001 class_names were given for num_classes 1000"),
    ],
)
def test_metadata_that_cannot_be_used(
    tmp_path: Path, state: dict[str, Tensor], model: DiT, changes: dict[str, str], message: str
) -> None:
    metadata = {"format_version": "1", "architecture": json.dumps(model.architecture), "class_names": "null"}
    save_file(state, tmp_path / "DiT.safetensors", {**metadata, **changes})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_dit(tmp_path / "DiT.safetensors")
    assert "DiT.safetensors" in str(caught.value)


def test_bundled_model_by_name(tmp_path: Path, model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    export_dit(model, tmp_path / "dit-small.safetensors")
    monkeypatch.setattr(hub, "BUNDLED", tmp_path)
    assert_same_function(load_dit("dit-small"), model)
    with pytest.raises(CheckpointError, match=r"'dit-smal' is not a file.*bundled: dit-small"):
        load_dit("dit-smal")


@pytest.mark.parametrize("source", ["runs/best/model.safetensors", "weights/DiT-XL-2.pt", Path("owner/name")])
def test_path_that_is_not_there_is_never_looked_up_on_the_hub(source: str | Path) -> None:
    with pytest.raises(CheckpointError, match="is not a file, a folder or a bundled model"):
        load_dit(source)


def test_folder_that_holds_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"not a whole diffusers folder.*config\.json.*found \['notes\.txt'\]"):
        load_dit(tmp_path)


class TestFingerprint:
    def test_tells_values_names_types_and_shapes_apart(self) -> None:
        layer = nn.Linear(3, 2)
        prints = {fingerprint(layer), fingerprint(nn.Sequential(layer))}
        with torch.no_grad():
            layer.weight[1, 2] += 1e-3
        prints.add(fingerprint(layer))
        prints.add(fingerprint(layer.bfloat16()))
        layer.weight = nn.Parameter(layer.weight.reshape(3, 2))
        prints.add(fingerprint(layer))
        assert len(prints) == 5

    def test_does_not_depend_on_memory_layout_order_or_mode(self) -> None:
        class Pair(nn.Module):
            def __init__(self, names: str) -> None:
                super().__init__()
                for name in names:
                    self.register_buffer(name, torch.full((2, 3, 4, 4), float(ord(name))))
                self.register_buffer("steps", torch.tensor(7))

        expected = fingerprint(Pair("ab"))
        assert fingerprint(Pair("ba")) == expected
        assert fingerprint(Pair("ab").to(memory_format=torch.channels_last).eval()) == expected

    def test_is_stable_across_releases(self) -> None:
        layer = nn.Linear(2, 1)
        nn.init.constant_(layer.weight, 0.5)
        nn.init.constant_(layer.bias, -1)
        assert fingerprint(layer) == "e4be791e10ed958ebde3b21c9105b0f2376fd3178810f173326f600ca30599bc"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "module._orig_mod.", "model.diffusion_model."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "ema_state_dict"])
def test_what_other_trainers_put_around_the_names_is_taken_off(
    tmp_path: Path, state: dict[str, Tensor], model: DiT, prefix: str, key: str | None
) -> None:
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    if prefix.startswith("module."):
        wrapped["n_averaged"] = torch.tensor(3)  # of torch's AveragedModel
    content = wrapped if key is None else {key: wrapped, "epoch": 3, "pytorch-lightning_version": "2.6.6"}
    torch.save(content, tmp_path / "DiT.pt")
    assert_same_function(load_dit(tmp_path / "DiT.pt", num_heads=4), model)


def test_a_compiled_block_and_a_wrapped_safetensors_file_open(
    tmp_path: Path, state: dict[str, Tensor], model: DiT
) -> None:
    save_file(
        {f"net.{k.replace('blocks.1.', 'blocks.1._orig_mod.')}": v for k, v in state.items()},
        tmp_path / "a.safetensors",
    )
    assert_same_function(load_dit(tmp_path / "a.safetensors", num_heads=4), model)


def test_of_two_models_in_a_file_the_average_is_taken_or_none(
    tmp_path: Path, state: dict[str, Tensor], model: DiT
) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    def save(names: tuple[str, str]) -> Path:
        content = [
            {f"{start}.{k}": v for k, v in held.items()} for start, held in zip(names, (other, state), strict=True)
        ]
        torch.save({"state_dict": content[0] | content[1]}, tmp_path / "DiT.pt")
        return tmp_path / "DiT.pt"

    assert_same_function(load_dit(save(("net", "net_ema")), num_heads=4), model)
    with pytest.raises(CheckpointError, match=r"holds 2 DiTs, whose names start with \['student\.', 'teacher\.'\]"):
        load_dit(save(("student", "teacher")), num_heads=4)


@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("is_sharded", [True, False])
def test_diffusers_folders_in_shards_and_variants(
    tmp_path: Path, model: DiT, variant: str | None, is_safe: bool, is_sharded: bool
) -> None:
    export_dit(model, tmp_path / "pipeline", "diffusers")
    (tmp_path / "pipeline" / "SHA256SUMS").unlink()  # diffusers writes none
    folder = tmp_path / "pipeline" / "transformer"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    dtype = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    write_weights(folder, {k: v.to(dtype) for k, v in state.items()}, variant, is_safe, is_sharded)
    loaded = load_dit(tmp_path / "pipeline")
    for name, tensor in model.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float())
    if is_sharded:
        next(folder.glob("*00002-of-00002*")).unlink()
        with pytest.raises(CheckpointError, match=r"missing \['diffusion_pytorch_model.*00002-of-00002"):
            load_dit(tmp_path / "pipeline")


def write_weights(folder: Path, state: dict[str, Tensor], variant: str | None, is_safe: bool, is_sharded: bool) -> None:
    """Weights as diffusers writes them: in one file or two shards, of a variant or none."""
    save, ending = (save_file, "safetensors") if is_safe else (torch.save, "bin")
    start, dotted = "diffusion_pytorch_model", f".{variant}" if variant else ""
    if not is_sharded:
        save(state, folder / f"{start}{dotted}.{ending}")
        return
    places = {name: f"{start}{dotted}-0000{1 + i % 2}-of-00002.{ending}" for i, name in enumerate(state)}
    for file in set(places.values()):
        save({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{start}.{ending}.index{dotted}.json").write_text(json.dumps(index))
