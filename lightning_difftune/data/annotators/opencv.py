"""OpenCV, which the edge and sketch annotators need and nothing else does."""

from __future__ import annotations

from types import ModuleType

from lightning_difftune.errors import ConfigError


def cv2_of(annotator: str) -> ModuleType:
    """The module ``cv2``.

    Raises:
        ConfigError: If it is not installed; names the annotator that asked for it.
    """
    try:
        import cv2
    except ImportError as error:  # not installed, or a build that needs libraries of a desktop
        raise ConfigError(
            f"{annotator} needs OpenCV, which cannot be imported ({error}). Run `pip install opencv-python-headless`."
        ) from error
    return cv2
