from __future__ import annotations

import os
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_difftune.data import ArrayImages, HubImages, ImageFolder, NpzImages, WebDatasetShards
from lightning_difftune.data.derived import joined_by_name
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.latent_cache import LatentCache
from lightning_difftune.data.shards import ShardWriter
from lightning_difftune.errors import ConfigError, DataError, StoreError
from lightning_difftune.protocols import TargetBatch

PICTURES = np.random.default_rng(0).integers(0, 256, (23, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(23) % 5
SPEC = {"fingerprint": "abc", "scale": 0.18215}


class Encoder(nn.Module):
    """A small autoencoder's first half; its padding is lopsided, so mirroring does not commute with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.calls = 0
        self.pictures = 0

    def forward(self, batch: TargetBatch) -> TargetBatch:
        self.calls += 1
        self.pictures += len(batch["pixel_values"])
        mean, log_variance = self.conv(batch["pixel_values"]).chunk(2, dim=1)
        return latents_of(batch, mean, (log_variance / 2).exp())


def latents_of(batch: TargetBatch, mean: Tensor, std: Tensor) -> TargetBatch:
    return {"latent_mean": mean, "latent_std": std, "class_labels": batch["class_labels"]}


@pytest.fixture
def targets() -> ImageTargets:
    return ImageTargets(ArrayImages(PICTURES, LABELS), 16)


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def make(path: Path, targets: ImageTargets, encode, spec=SPEC, **settings) -> LatentCache:
    return LatentCache.build(path, targets, encode, spec, **{"batch_size": 4, "shard_size": 8, **settings})


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2**-11)])
def test_cache_holds_what_the_encoder_says_of_picture_and_mirror_image(tmp_path, targets, encoder, dtype, tolerance):
    cache = make(tmp_path / "cache", targets, encoder, dtype=dtype)
    assert len(cache) == 23
    assert cache.latent_shape == (4, 4, 4)
    indices, flips = [22, 0, 7, 7, 13], [True, False, True, False, True]
    batch, pixels = cache.read(indices, flips), targets.pixels(indices, flips)
    with torch.no_grad():
        expected = encoder(pixels)
    for name in ("latent_mean", "latent_std"):
        torch.testing.assert_close(batch[name], expected[name], rtol=tolerance, atol=1e-6)
    assert batch["latent_mean"].dtype == batch["latent_std"].dtype == torch.float32
    assert torch.equal(batch["class_labels"], pixels["class_labels"])
    # The mirror image's latents are its own, not the picture's mirrored.
    assert not torch.allclose(batch["latent_mean"][2], batch["latent_mean"][3].flip(-1), atol=1e-2)


def test_cache_of_a_diffusers_autoencoder(tmp_path, targets):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2).eval()  # fmt: skip

    def encode(batch: TargetBatch) -> TargetBatch:
        posterior = vae.encode(batch["pixel_values"]).latent_dist
        return latents_of(batch, posterior.mean * 0.18215, posterior.std * 0.18215)

    cache = make(tmp_path / "cache", targets, encode)
    assert cache.latent_shape == (4, 8, 8)
    batch = cache.read([3, 5], [False, True])
    with torch.no_grad():
        expected = encode(targets.pixels([3, 5], [False, True]))
    for name in ("latent_mean", "latent_std"):
        torch.testing.assert_close(batch[name], expected[name], rtol=1e-3, atol=1e-5)


def test_finished_cache_is_opened_without_encoding(tmp_path, targets, encoder):
    make(tmp_path / "cache", targets, encoder)
    calls = encoder.calls
    reopened = make(tmp_path / "cache", targets, encoder)
    assert encoder.calls == calls == 2 * 6  # batches of 4, 4 | 4, 4 | 4, 3, and the mirror images
    directly = LatentCache(tmp_path / "cache")
    assert torch.equal(reopened.read([4], [True])["latent_mean"], directly.read([4], [True])["latent_mean"])
    assert directly.spec["autoencoder"] == SPEC
    directly.verify()


def test_stopped_build_goes_on_at_the_shard_where_it_was(tmp_path, targets, encoder):
    def killed_in_the_second_shard(batch: TargetBatch) -> TargetBatch:
        if encoder.calls == 6:
            raise KeyboardInterrupt
        return encoder(batch)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cache", targets, killed_in_the_second_shard)
    with pytest.raises(StoreError, match="unfinished"):
        LatentCache(tmp_path / "cache")
    progress = []
    cache = make(tmp_path / "cache", targets, encoder, progress=lambda done, total: progress.append((done, total)))
    assert progress == [(12, 23), (16, 23), (20, 23), (23, 23)]
    assert encoder.calls == 6 + 2 * 4
    whole = make(tmp_path / "whole", targets, encoder)
    everything = range(23)
    for flips in ([False] * 23, [True] * 23):
        one, other = cache.read(everything, flips), whole.read(everything, flips)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_workers_and_ranks_do_not_change_the_files(tmp_path, targets, encoder):
    make(tmp_path / "plain", targets, encoder)
    make(tmp_path / "workers", targets, encoder, num_workers=2)
    with ThreadPoolExecutor(2) as pool:
        barrier = threading.Barrier(2)
        ranks = [
            pool.submit(make, tmp_path / "ranks", targets, encoder, rank=rank, world_size=2, barrier=barrier.wait)
            for rank in range(2)
        ]
        assert [len(rank.result(timeout=30)) for rank in ranks] == [23, 23]
    files = sorted(file.name for file in (tmp_path / "plain").iterdir())
    for name in ("workers", "ranks"):
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == files
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_an_unknown_dtype_is_refused_before_the_first_picture(tmp_path, targets):
    with pytest.raises(ConfigError, match=r"dtype of LatentCache must be 'float32' or 'float16', found 'bfloat16'\."):
        make(tmp_path / "cache", targets, None, dtype="bfloat16")


def test_other_autoencoder_pictures_or_dtype_are_refused(tmp_path, targets, encoder):
    make(tmp_path / "cache", targets, encoder)
    before = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    with pytest.raises(StoreError, match=r"autoencoder\.fingerprint: .abc., now .xyz.\)\. Use .* or delete"):
        make(tmp_path / "cache", targets, encoder, {**SPEC, "fingerprint": "xyz"})
    with pytest.raises(StoreError, match=r"dtype: .float16., now .float32."):
        make(tmp_path / "cache", targets, encoder, dtype="float32")
    with pytest.raises(StoreError, match=r"targets\.image_size: 16, now 8"):
        make(tmp_path / "cache", ImageTargets(targets.source, 8), encoder)
    other = ImageTargets(ArrayImages(255 - PICTURES, LABELS), 16)
    with pytest.raises(StoreError, match=r"targets\.identity"):
        make(tmp_path / "cache", other, encoder)
    assert {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before


def of_files(folder: Path) -> ImageTargets:
    (folder / "rose").mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(folder / "rose" / f"{number:02d}.png")
    return ImageTargets(ImageFolder(folder), 16)


def changed(folder: Path, change: str) -> tuple[ImageTargets, list[int]]:
    """The pictures of :func:`of_files` or of the arrays after a change, and which of them are new."""
    pictures, labels, rose = PICTURES.copy(), LABELS.copy(), folder / "rose"
    if change == "a file less":
        (rose / "09.png").unlink()
        return ImageTargets(ImageFolder(folder), 16), []
    if change == "a file more":
        Image.fromarray(PICTURES[0]).save(rose / "005.png")
        return ImageTargets(ImageFolder(folder), 16), [1]
    if change == "another file":
        Image.fromarray(255 - PICTURES[9]).save(rose / "09.png")
        os.utime(rose / "09.png", (0, 0))
        return ImageTargets(ImageFolder(folder), 16), [9]
    if change == "an array":
        pictures[3, 0, 0, 0] ^= 255
        return ImageTargets(ArrayImages(pictures, labels), 16), [3]
    if change == "a label":
        labels[4] = 0
        return ImageTargets(ArrayImages(pictures, labels), 16), [4]
    return ImageTargets(ArrayImages(np.delete(pictures, 9, 0), np.delete(labels, 9)), 16), []


@pytest.mark.parametrize(
    "change", ["an array", "an array less", "a label", "a file less", "a file more", "another file"]
)
@pytest.mark.parametrize("stops", [False, True])
def test_of_other_pictures_only_the_new_ones_are_encoded(tmp_path, targets, encoder, change, stops):
    def stopping(batch: TargetBatch) -> TargetBatch:
        if encoder.calls == 8:
            raise KeyboardInterrupt
        return encoder(batch)

    before = of_files(tmp_path / "pictures") if "file" in change else targets
    if stops:
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cache", before, stopping)
    else:
        make(tmp_path / "cache", before, encoder)
    after, new = changed(tmp_path / "pictures", change)
    if stops:
        encoder.calls = 7  # it encodes a few more and stops again
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cache", after, stopping)
    encoder.pictures = 0
    cache = make(tmp_path / "cache", after, encoder)
    assert encoder.pictures == 2 * len(new) if not stops else encoder.pictures < 2 * 23
    assert not list((tmp_path / "cache").glob("previous-*"))
    cache.verify()
    whole, everything = make(tmp_path / "whole", after, Encoder()), range(len(after))
    for flips in ([False] * len(after), [True] * len(after)):
        one, other = cache.read(everything, flips), whole.read(everything, flips)
        assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


def png_of(picture: np.ndarray) -> bytes:
    content = BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    return content.getvalue()


def stored(kind: str, folder: Path, pictures: np.ndarray) -> ImageTargets:
    """Pictures in a store that is written anew, with those of picture 9 changed or not."""
    folder.mkdir(exist_ok=True)
    files, labels = [png_of(picture) for picture in pictures], LABELS[: len(pictures)]
    if kind == "raw npz":
        np.savez(folder / "set.npz", images=pictures, labels=labels)
        return ImageTargets(NpzImages(folder / "set.npz"), 16)
    if kind == "encoded npz":
        offsets = np.cumsum([0, *map(len, files)])
        np.savez(folder / "set.npz", image_bytes=np.frombuffer(b"".join(files), np.uint8), offsets=offsets)
        return ImageTargets(NpzImages(folder / "set.npz"), 16)
    if kind == "hub":
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = {"image": [{"bytes": file, "path": None} for file in files], "label": labels.tolist()}
        return ImageTargets(HubImages(datasets.Dataset.from_dict(rows, features=features)), 16)
    if kind == "classes joined by name":
        source = ArrayImages(pictures, 4 - labels, class_names=list("edcba"))
        return ImageTargets(joined_by_name(source, list("abcde")), 16)
    for start in range(0, len(files), 10):
        with tarfile.open(folder / f"{start:02d}.tar", "w") as archive:
            for number, file in enumerate(files[start : start + 10], start):
                for name, data in ((f"{number:02d}.png", file), (f"{number:02d}.cls", b"%d" % labels[number])):
                    entry = tarfile.TarInfo(name)
                    is_new = bool((pictures[number] != PICTURES[number]).any())
                    entry.size, entry.mtime = len(data), 0 if kind == "shards of one time" else number + 100 * is_new
                    archive.addfile(entry, BytesIO(data))
        changed = (pictures[start : start + 10] != PICTURES[start : start + 10]).any()
        os.utime(folder / f"{start:02d}.tar", (0, 100 + changed))
    return ImageTargets(WebDatasetShards(folder), 16)


@pytest.mark.parametrize(
    ("kind", "new"),
    [
        ("raw npz", 1),
        ("encoded npz", 1),
        ("hub", 1),
        ("classes joined by name", 1),
        ("shards", 1),
        ("shards of one time", 10),  # all of the shard that was written again
    ],
)
def test_of_other_pictures_in_a_store_only_the_new_ones_are_encoded(tmp_path, encoder, kind, new):
    make(tmp_path / "cache", stored(kind, tmp_path / "set", PICTURES), encoder)
    pictures = PICTURES.copy()
    pictures[9] = 255 - pictures[9]
    after = stored(kind, tmp_path / "set", pictures)
    encoder.pictures = 0
    cache = make(tmp_path / "cache", after, encoder)
    assert encoder.pictures == 2 * new
    whole, everything = make(tmp_path / "whole", after, Encoder()), range(len(after))
    one, other = cache.read(everything, [False] * 23), whole.read(everything, [False] * 23)
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)
    assert not list((tmp_path / "cache").glob("previous-*"))


class Cropped(ImageFolder):
    """A data set of one's own that reads files in its own way."""

    margin = 0

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = super().__getitem__(index)
        return image.crop((self.margin, self.margin, 16, 16)), label


def test_a_cache_of_a_source_whose_code_changed_is_refused(tmp_path, encoder):
    of_files(tmp_path / "pictures")

    def build(source: Cropped) -> LatentCache:
        return make(tmp_path / "cache", ImageTargets(source, 16), encoder)

    build(Cropped(tmp_path / "pictures"))
    build(Cropped(tmp_path / "pictures"))
    assert encoder.pictures == 2 * 23
    otherwise = Cropped(tmp_path / "pictures")
    otherwise.margin = 4
    with pytest.raises(StoreError, match="identity"):
        build(otherwise)


def test_pictures_are_digested_only_where_something_is_to_be_encoded(tmp_path, encoder, monkeypatch):
    targets = stored("shards", tmp_path / "set", PICTURES)
    make(tmp_path / "cache", targets, encoder)
    monkeypatch.setattr(ImageTargets, "picture_digests", lambda targets: pytest.fail("asked for"))
    make(tmp_path / "cache", targets, encoder)


def test_an_unfinished_cache_without_a_shard_is_replaced(tmp_path, targets, encoder):
    def fails(batch: TargetBatch) -> TargetBatch:
        raise KeyboardInterrupt

    for others in (ImageTargets(ArrayImages(255 - PICTURES, LABELS), 16), ImageTargets(targets.source, 8)):
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cache", others, fails)
    assert len(make(tmp_path / "cache", targets, encoder)) == 23


def test_damaged_or_foreign_folders_are_refused(tmp_path, targets, encoder):
    with pytest.raises(StoreError, match="holds no latent-cache"):
        LatentCache(tmp_path / "nothing")
    make(tmp_path / "cache", targets, encoder)
    shard = tmp_path / "cache" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"shard-00001\.safetensors has"):
        make(tmp_path / "cache", targets, encoder)
    bank = ShardWriter(tmp_path / "bank", kind="memory-bank", spec={}, num_samples=1, shard_size=1)
    bank.write(0, {"latents": torch.zeros(1, 4)})
    bank.finish()
    with pytest.raises(StoreError, match="memory-bank"):
        LatentCache(tmp_path / "bank")


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, picture in enumerate(PICTURES[:10]):
        path = tmp_path / "set" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    (tmp_path / "set" / "1" / "3.png").write_bytes(b"")
    return tmp_path / "set"  # in the order 0 2 4 6 8 | 1 3 5 7 9, so the damaged one is picture 6


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_picture_stops_the_build_with_its_name(tmp_path, folder, encoder, num_workers):
    with pytest.raises(DataError, match=r"^image 6 \(.*1/3\.png\) cannot be read .*on_corrupt='skip'"):
        make(tmp_path / "cache", ImageTargets(ImageFolder(folder), 16), encoder, num_workers=num_workers)


def test_skipped_picture_is_recorded_and_replaced_as_without_a_cache(tmp_path, folder, encoder):
    lenient = ImageTargets(ImageFolder(folder), 16, on_corrupt="skip")
    with pytest.warns(UserWarning, match=r"image 6 .*3\.png") as caught:
        cache = make(tmp_path / "cache", lenient, encoder)
    assert "1 of 10 pictures are damaged" in str(caught[-1].message)
    assert cache.replaced() == {6: 7}
    replaced, replacement = (cache.read([index], [True]) for index in (6, 7))
    assert all(torch.equal(replaced[name], replacement[name]) for name in replaced)
    assert torch.equal(lenient.uint8([6]), lenient.uint8([7]))
    with pytest.raises(StoreError, match="made with on_corrupt='skip' and replaced 1 damaged pictures"):
        make(tmp_path / "cache", ImageTargets(ImageFolder(folder), 16), encoder)


def test_encoders_that_do_not_return_latents(tmp_path, targets):
    def of_pixels(function):
        return lambda batch: latents_of(batch, *function(batch["pixel_values"]))

    with pytest.raises(ConfigError, match=r"'latent_mean': \(4, 3\).*for 4 pictures; expected .*\(B, c, h, w\)"):
        make(tmp_path / "a", targets, of_pixels(lambda x: (x.mean((2, 3)), x.std((2, 3)))))
    with pytest.raises(ConfigError, match=r"'latent_std': \(4, 1, 16, 16\)"):
        make(tmp_path / "b", targets, of_pixels(lambda x: (x, x[:, :1])))
    one_embedding = {"prompt_embeds": torch.zeros(1, 2, 3)}
    with pytest.raises(ConfigError, match=r"'prompt_embeds': \(1, 2, 3\)"):
        make(tmp_path / "c", targets, lambda batch: {**of_pixels(lambda x: (x, x))(batch), **one_embedding})
    with pytest.raises(StoreError, match="std is not finite"):
        make(tmp_path / "d", targets, of_pixels(lambda x: (x, x / 0)))


def test_without_mirror_images_a_cache_is_half_as_large(tmp_path, targets, encoder):
    both, one = make(tmp_path / "both", targets, encoder), make(tmp_path / "one", targets, encoder, mirrored=False)
    assert len(both) == len(one) == 23
    everything = range(23)
    plain = both.read(everything, [False] * 23)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in one.read(everything, [False] * 23).items())
    with pytest.raises(ConfigError, match="made without mirror images"):
        one.read([0, 1], [False, True])
    with pytest.raises(StoreError, match="mirrored: false, now true"):
        make(tmp_path / "one", targets, encoder)
    calls = encoder.calls  # the other way round nothing is lacking
    again = make(tmp_path / "both", targets, encoder, mirrored=False).read(everything, [False] * 23)
    assert encoder.calls == calls
    assert all(torch.equal(tensor, plain[name]) for name, tensor in again.items())


def test_captions_and_control_maps_are_encoded_with_their_pictures(tmp_path):
    control = np.zeros((16, 16), np.uint8)
    control[:, :4] = 255
    source = [(picture, f"flower {number}", control) for number, picture in enumerate(PICTURES[:5])]

    def encode(batch: TargetBatch) -> TargetBatch:
        lengths = torch.tensor([float(caption[-1]) for caption in batch["captions"]])
        return {
            "latent_mean": batch["pixel_values"],
            "latent_std": torch.ones_like(batch["pixel_values"]),
            "prompt_embeds": lengths.view(-1, 1, 1).expand(-1, 2, 3),
            "conditioning_pixel_values": batch["conditioning_pixel_values"],
        }

    cache = make(tmp_path / "cache", ImageTargets(source, 16), encode, batch_size=2)
    batch = cache.read([4, 1], [False, True])
    assert batch["prompt_embeds"][:, 0, 0].tolist() == [4, 1]
    maps = batch["conditioning_pixel_values"]
    assert (maps.dtype, maps.shape) == (torch.uint8, (2, 1, 16, 16))
    assert (maps[0, 0, 0, :4] == 255).all()
    assert (maps[1, 0, 0, -4:] == 255).all()
    assert "captions" not in batch
    changed = [(picture, "another", control) for picture, _, control in source]
    with pytest.raises(StoreError, match=r"targets\.identity"):
        make(tmp_path / "cache", ImageTargets(changed, 16), encode)


def test_cache_travels_to_worker_processes(tmp_path, targets, encoder):
    cache = make(tmp_path / "cache", targets, encoder)
    expected = cache.read([1, 22], [False, True])
    copy = pickle.loads(pickle.dumps(cache)).read([1, 22], [False, True])
    assert all(torch.equal(copy[name], expected[name]) for name in expected)


def test_opening_a_finished_cache_writes_nothing(tmp_path, targets, encoder):
    make(tmp_path / "cache", targets, encoder)
    contents = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    make(tmp_path / "cache", targets, encoder)
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == contents


def test_captions_of_an_unfinished_cache_of_another_encoder_are_not_used(tmp_path):
    source = [(picture, "a flower") for picture in PICTURES[:5]]

    def encode(value: float, stops: bool = False):
        def made(batch: TargetBatch) -> TargetBatch:
            if stops and len(batch["captions"]) < 2:
                raise KeyboardInterrupt
            count = len(batch["captions"])
            return {
                "latent_mean": batch["pixel_values"],
                "latent_std": torch.ones_like(batch["pixel_values"]),
                "prompt_embeds": torch.full((count, 2, 3), value),
            }

        return made

    settings = {"batch_size": 2, "of_caption": ["prompt_embeds"]}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cache", ImageTargets(source, 16), encode(1.0, stops=True), {"text": "one"}, **settings)
    cache = make(tmp_path / "cache", ImageTargets(source, 16), encode(2.0), {"text": "two"}, **settings)
    assert cache.read([0, 4], [False, True])["prompt_embeds"].unique().tolist() == [2.0]
