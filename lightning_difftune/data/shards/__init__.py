"""A folder of tensors in shards of consecutive samples: resumable to build, hashed, memory-mapped to read.

``shard-00000.safetensors`` ... hold ``shard_size`` samples each; ``manifest.json`` is written last, so a folder has one
only when it is complete. Until then ``building.json`` says what is being built. Which samples a shard holds, and which
of them are generated together, depends only on ``shard_size`` and the batch size, never on the number of processes.
"""

from __future__ import annotations

from lightning_difftune.data.shards.reader import ShardReader
from lightning_difftune.data.shards.writer import ShardWriter, build

__all__ = ["ShardReader", "ShardWriter", "build"]
