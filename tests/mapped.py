"""The same pictures, captions and control maps as files, as a data set of Hugging Face's library, and as a shard."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from lightning_difftune.data import CaptionedFolder, HubImages, WebDatasetShards

COUNT = 6


def pictures(seed: int = 0, side: int = 16) -> list[Image.Image]:
    """Different pictures of a size that is cropped to 16."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (side, side + 4, 3), dtype=np.uint8)) for _ in range(COUNT)]


def maps() -> list[Image.Image]:
    """Grey control maps, saved in colour as most are."""
    return [picture.convert("L").convert("RGB") for picture in pictures(seed=1)]


def png_of(picture: Image.Image) -> bytes:
    """The file of a picture."""
    content = BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    """A shard with these files."""
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    return file


def hub_data(**columns: Any) -> datasets.Dataset:
    """A data set whose columns are pictures if they are lists of those, else texts, or classes if named ``label``."""
    features: dict[str, Any] = {}
    for name, values in columns.items():
        is_picture = any(isinstance(value, Image.Image) for value in values)
        kind = datasets.ClassLabel(names=["ant", "bee"]) if "label" in name else datasets.Value("string")
        features[name] = datasets.Image() if is_picture else kind
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def sources(folder: Path) -> dict[str, Any]:
    """The three sources."""
    captions = [f"number {i}" for i in range(COUNT)]
    rows, members = [], {}
    for i, (picture, map_) in enumerate(zip(pictures(), maps(), strict=True)):
        picture.save(folder / f"{i}.png"), map_.save(folder / f"{i}-map.png")
        rows.append({"file_name": f"{i}.png", "text": captions[i], "conditioning_image": f"{i}-map.png"})
        members |= {
            f"{i}.conditioning.png": png_of(map_),
            f"{i}.png": png_of(picture),
            f"{i}.txt": captions[i].encode(),
        }
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "files": CaptionedFolder(folder),
        "hub": HubImages(hub_data(conditioning_image=maps(), image=pictures(), text=captions)),
        "shards": WebDatasetShards(write_tar(folder / "0.tar", members)),
    }
