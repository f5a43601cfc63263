"""Annotators: make the control maps of the paper's six ControlNet tasks from pictures."""

from __future__ import annotations

from lightning_difftune.data.annotators.edges import HED, Canny, HEDSketch
from lightning_difftune.data.annotators.networks import MidasDepth, MidasNormal, UperNetSegmentation

__all__ = ["HED", "Canny", "HEDSketch", "MidasDepth", "MidasNormal", "UperNetSegmentation"]
