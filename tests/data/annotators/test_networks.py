"""The annotators with networks: the same classes as the published ones, tiny and random."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_difftune.data import Canny, HEDSketch, MidasDepth, MidasNormal, UperNetSegmentation
from lightning_difftune.data.annotators import HED
from lightning_difftune.errors import CheckpointError, DataError
from lightning_difftune.protocols import Annotator

SIZE = 48


def pictures(count: int = 3, size: int = SIZE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    return (nn.functional.interpolate(coarse, (size, size), mode="bilinear") * 255).byte()


def dpt(hybrid: bool = True) -> Any:
    """DPT-hybrid as published, a convolutional backbone under a transformer, but small."""
    torch.manual_seed(0)
    bit = {
        "model_type": "bit",
        "global_padding": "same",
        "layer_type": "bottleneck",
        "depths": [1, 1, 1],
        "hidden_sizes": [8, 16, 32],
        "embedding_size": 8,
        "num_groups": 4,
        "out_features": ["stage1", "stage2", "stage3"],
        "embedding_dynamic_padding": True,
    }
    config = transformers.DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        is_hybrid=hybrid,
        backbone_config=bit if hybrid else None,
        backbone_featmap_shape=[1, 32, 2, 2],
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16,
    )
    model = transformers.DPTForDepthEstimation(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the default is so small that all depths are alike
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def upernet(classes: int = 150) -> Any:
    torch.manual_seed(0)
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=classes, auxiliary_in_channels=16, auxiliary_channels=8
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def hed() -> HED:
    torch.manual_seed(0)
    return HED((4, 4, 4, 4, 4))


MAKERS = {
    "sketch": lambda: HEDSketch(hed(), threshold=90, sigma=1, pen=1),
    "depth": lambda: MidasDepth(dpt()),
    "normal": lambda: MidasNormal(dpt()),
    "segmentation": lambda: UperNetSegmentation(upernet()),
}
every_annotator = pytest.mark.parametrize("name", list(MAKERS))


@every_annotator
def test_maps_are_8_bit_and_each_depends_on_its_picture_alone(name: str) -> None:
    annotator = MAKERS[name]()
    assert isinstance(annotator, Annotator)
    maps = annotator(pictures())
    assert (maps.shape, maps.dtype) == ((3, annotator.channels, SIZE, SIZE), torch.uint8)
    assert not maps.requires_grad
    assert len(maps.unique()) > 1
    alone = annotator(pictures()[1:2])
    assert (alone.int() - maps[1:2].int()).abs().float().mean() < 1  # rounding of batched products
    assert annotator(pictures(2, 64)).shape[-1] == 64


@every_annotator
def test_networks_are_frozen_and_in_nobodys_state_dict(name: str) -> None:
    annotator = MAKERS[name]()
    annotator.source.train()

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)
            self.annotator = annotator

    module = Module().train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = annotator(pictures())
    assert torch.equal(maps, annotator(pictures()))
    assert set(module.state_dict()) == {"head.weight", "head.bias"}
    assert not any(inner.training for inner in annotator.network.modules())
    assert not any(parameter.requires_grad for parameter in annotator.network.parameters())


@every_annotator
def test_identity_follows_the_weights(name: str) -> None:
    first, second = MAKERS[name](), MAKERS[name]()
    assert first.identity() == second.identity()
    other = MAKERS[name]()
    with torch.no_grad():
        next(iter(other.source.parameters())).add_(1)
    assert other.identity() != first.identity()


def test_identity_follows_the_constants() -> None:
    network = dpt()
    kinds = [MidasDepth(network), MidasNormal(network), MidasNormal(network, z=1), MidasNormal(network, 0.4)]
    edges = hed()
    kinds += [HEDSketch(edges), HEDSketch(edges, 100), HEDSketch(edges, sigma=1), HEDSketch(edges, pen=1)]
    kinds += [HEDSketch(edges, cut=9), Canny()]
    segmentation = upernet(3)
    kinds += [UperNetSegmentation(segmentation), UperNetSegmentation(segmentation, [[0, 0, 0]] * 3)]
    assert len({annotator.identity() for annotator in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("make", "network"),
    [(MidasDepth, dpt), (MidasNormal, dpt), (UperNetSegmentation, upernet)],
    ids=["depth", "normal", "segmentation"],
)
def test_a_folder_of_transformers_opens_as_the_same_network(make: Any, network: Any, tmp_path: Path) -> None:
    given = network()
    given.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    opened = make(str(tmp_path))
    assert torch.equal(opened(pictures()), make(given)(pictures()))
    assert opened.identity() == make(given).identity()
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_the_layer_that_computes_nothing_may_be_missing(tmp_path: Path) -> None:
    """Published weights of DPT-hybrid lack them; transformers fills them at random."""
    given = dpt()
    state = {name: value for name, value in given.state_dict().items() if "layers.0.residual_layer1" not in name}
    assert len(state) < len(given.state_dict())
    given.save_pretrained(tmp_path, state_dict=state)
    first, second = MidasDepth(tmp_path), MidasDepth(tmp_path)
    assert first.identity() == second.identity() == MidasDepth(given).identity()


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    given = dpt()
    state = {name: value for name, value in given.state_dict().items() if "head.head.0" not in name}
    given.save_pretrained(tmp_path / "lacking", state_dict=state)
    with pytest.raises(CheckpointError, match=r"MidasDepth has no weights.*2 do not fit, the first is head\.head\.0"):
        MidasDepth(tmp_path / "lacking")(pictures())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be opened as transformers' UperNetForSemanticSegmentation"):
        UperNetSegmentation(tmp_path / "empty")(pictures())
    with pytest.raises(CheckpointError, match=r"MidasNormal\(source=\.\.\.\): a local folder"):
        MidasNormal(tmp_path / "nowhere").identity()
    (tmp_path / "ControlNetHED.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"HEDSketch has no weights.*does not hold the weights of HED"):
        HEDSketch(tmp_path)(pictures())
    torch.save({"block1.projection.weight": torch.zeros(1)}, tmp_path / "ControlNetHED.pth")
    with pytest.raises(CheckpointError, match="does not hold the weights of HED"):
        HEDSketch(tmp_path)(pictures())


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("make", [MidasDepth, MidasNormal, UperNetSegmentation, HEDSketch])
def test_no_connection_is_said_at_once_with_annotator_source_and_cure(
    make: Any, offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    annotator = make()  # needs no connection
    start = time.monotonic()
    pattern = rf"{make.__name__} has no weights for its network from '{annotator.source}'.*cannot be reached.*HF_HOME"
    with pytest.raises(CheckpointError, match=pattern + rf".*{make.__name__}\(source=\.\.\.\)"):
        annotator(pictures())
    assert time.monotonic() - start < 10


def test_hed_opens_from_a_file_a_folder_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = HED()
    snapshot = tmp_path / "cache" / "models--lllyasviel--Annotators" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    torch.save(network.state_dict(), snapshot / "ControlNetHED.pth")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = HEDSketch(network).identity()
    for source in (snapshot / "ControlNetHED.pth", str(snapshot), "lllyasviel/Annotators"):
        assert HEDSketch(source).identity() == expected


def test_hed_is_the_mean_of_five_side_outputs() -> None:
    network = HED()
    assert sum(parameter.numel() for parameter in network.parameters()) == 14_716_168  # VGG-16 and five projections
    names = {"norm", "block1.convs.0.weight", "block1.convs.1.bias", "block5.convs.2.weight", "block3.projection.bias"}
    assert names < set(network.state_dict())
    small = hed()
    with torch.no_grad():
        small.norm.copy_(torch.tensor([100.0, 110.0, 120.0]).view(1, 3, 1, 1))
        pixels = pictures(1).float() / 255
        h, sides = pixels * 255 - small.norm, []
        for number in range(1, 6):
            stage = getattr(small, f"block{number}")
            if number > 1:
                h = nn.functional.max_pool2d(h, 2, 2)
            for conv in stage.convs:
                h = conv(h).relu()
            sides.append(nn.functional.interpolate(stage.projection(h), (SIZE, SIZE), mode="bilinear"))
        torch.testing.assert_close(small(pixels), torch.stack(sides).mean(0).sigmoid())


class ListOfEdges(nn.Module):
    """Returns maps of several depths and their fusion last, as PiDiNet."""

    def forward(self, pixels: Tensor) -> list[Tensor]:
        assert pixels.max() <= 1
        grey = pixels.mean(1, keepdim=True)
        return [torch.zeros_like(grey), (grey - grey.roll(1, 3)).abs().mul(20).clamp(0, 1)]


class Fusion(ListOfEdges):
    def forward(self, pixels: Tensor) -> Any:
        return super().forward(pixels)[-1]


def test_of_a_list_of_edges_the_last_is_taken() -> None:
    sketch = HEDSketch(ListOfEdges(), threshold=20, sigma=1)(pictures())
    assert sketch.any()
    assert torch.equal(sketch, HEDSketch(Fusion(), threshold=20, sigma=1)(pictures()))


def test_edges_of_another_shape_and_pictures_too_small_are_refused() -> None:
    with pytest.raises(DataError, match=r"gave edges \(3, 3, 48, 48\) for pictures \(3, 3, 48, 48\)"):
        HEDSketch(nn.Identity())(pictures())
    with pytest.raises(DataError, match=r"at least 16 pixels per side, found \(8, 8\)"):
        HEDSketch(hed())(pictures(size=8))
    with pytest.raises(DataError, match="expected pictures uint8"):
        MidasDepth(dpt())(pictures().float())


def test_can_be_written_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--annotator", type=Annotator)
    for name, settings in (
        ("MidasNormal", {"source": "somewhere/else", "z": 2.0}),
        ("HEDSketch", {"sigma": 1.0}),
        ("UperNetSegmentation", {"palette": [[0, 0, 0], [1, 2, 3]]}),
        ("Canny", {"low": 50}),
    ):
        config = {"class_path": f"lightning_difftune.data.{name}", "init_args": settings}
        annotator = parser.instantiate(parser.parse_object({"annotator": config})).annotator
        assert type(annotator).__name__ == name
    assert annotator.low == 50


@pytest.mark.parametrize("annotator", [HEDSketch, MidasDepth, MidasNormal, UperNetSegmentation])
def test_a_name_is_read_as_a_text_before_it_is_looked_up_among_all_modules(annotator: type) -> None:
    annotation = inspect.signature(annotator).parameters["source"].annotation
    assert annotation.startswith("str |"), "to look a name up among the thousands of modules takes ten seconds"
