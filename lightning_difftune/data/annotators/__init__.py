"""Annotators: pictures to the control maps of the paper's six ControlNet tasks."""

from __future__ import annotations

from lightning_difftune.data.annotators.canny import Canny

__all__ = ["Canny"]
