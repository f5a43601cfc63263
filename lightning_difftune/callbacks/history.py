"""What callbacks that measure something remember of it: the values so far, in checkpoints, too."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from lightning_difftune.errors import CheckpointError


class MeasuringCallback(Callback):
    """Base of callbacks that measure the same thing again and again.

    A subclass has ``self.history = []`` in its constructor and adds a (step, value) for each evaluation. The history is
    part of checkpoints, so that a resumed run has all of it.
    """

    history: list[tuple[int, Any]]
    _latest_step: int | None = None

    @property
    def last_value(self) -> Any:
        """The latest value, or ``None`` before the first."""
        return self.history[-1][1] if self.history else None

    def scores(self) -> dict[str, dict[str, Any]]:
        """What it logs that tells a better model from a worse one, by name; none by default.

        Each has ``higher_is_better``, a ``label`` for figures and, where they are known, ``num_samples`` (generated
        pictures) and ``num_features`` (of the extractor), as plain JSON values. Runs write it to their
        ``environment.json``, from which ``difftune report`` has it.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The history of (step, value)."""
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the history.

        Raises:
            CheckpointError: If this is the state of another callback.
        """
        if "history" not in state_dict:
            raise CheckpointError(
                f"The state of {type(self).__name__} holds {sorted(state_dict)}, expected 'history'. Pass what this "
                "callback's state_dict returned."
            )
        self.history = [(int(step), value) for step, value in state_dict["history"]]
        self._latest_step = self.history[-1][0] if self.history else None
