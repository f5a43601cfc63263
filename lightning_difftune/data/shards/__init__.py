"""Folders of tensors in shards of consecutive samples: resumable builds, hashes, memory-mapped reading.

``shard-00000.safetensors`` ... hold ``shard_size`` samples each; ``manifest.json`` is written last, so a folder has one
only when it is complete. Until then ``building.json`` describes the build. The samples of a shard, and the batches in
which they are generated, depend only on ``shard_size`` and the batch size, never on the number of processes.
"""

from __future__ import annotations

from lightning_difftune.data.shards.reader import ShardReader
from lightning_difftune.data.shards.writer import FLOATS, ShardWriter, as_stored, build

__all__ = ["FLOATS", "ShardReader", "ShardWriter", "as_stored", "build"]
