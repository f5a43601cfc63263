"""The tuned models, their checkpoints, and the frozen autoencoder of latent models."""

from lightning_difftune.models.autoencoder import FrozenAutoencoder
from lightning_difftune.models.checkpoints import load_dit
from lightning_difftune.models.dit import DiT
from lightning_difftune.models.export import export_dit, export_network
from lightning_difftune.models.frozen import FrozenTextEncoder

__all__ = ["DiT", "FrozenAutoencoder", "FrozenTextEncoder", "export_dit", "export_network", "load_dit"]
