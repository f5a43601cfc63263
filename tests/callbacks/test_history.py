"""Common behaviour of the measuring callbacks: history, state, and the better direction."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from lightning_difftune.callbacks import FID, ChainOfForgetting, ControlSimilarity, SuddenConvergence
from lightning_difftune.cli.record import scores
from lightning_difftune.errors import CheckpointError
from lightning_difftune.metrics import BlurredSSIM, ControlMSE, DigitClassifier


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: FID(feature_extractor=DigitClassifier()), 2.5),
        (lambda: ControlSimilarity(BlurredSSIM()), 0.5),
        (lambda: ChainOfForgetting(feature_extractor=DigitClassifier()), {0: 2.5, 100: 3.5}),
        (lambda: SuddenConvergence("fid"), 2.5),
    ],
)
def test_the_history_goes_through_a_checkpoint(make, value, tmp_path):
    first, second = make(), make()
    assert first.last_value is None
    first.history = [(10, value), (20, value)]
    torch.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert (second.history, second.last_value) == (first.history, value)
    assert second._latest_step == 20
    second.on_train_start(
        SimpleNamespace(global_step=10, enable_validation=False, fit_loop=MagicMock(), callback_metrics={}), None
    )
    assert second.history == [(10, value)], "of a fit that starts at step 10"
    with pytest.raises(CheckpointError, match=rf"The state of {type(first).__name__} holds \['other'\]"):
        second.load_state_dict({"other": 1})


def test_a_callback_says_what_is_better():
    digits = FID(num_samples=400, feature_extractor=DigitClassifier())
    found = scores([digits, FID(), ControlSimilarity(BlurredSSIM()), ControlSimilarity(ControlMSE()), object()])
    assert found[digits.monitor] == {
        "higher_is_better": False,
        "label": f"Fréchet distance ({digits.distance.name})",
        "num_samples": 400,
        "num_features": 64,
    }
    assert (found["fid"]["label"], found["fid"]["num_features"]) == ("FID", 2048)
    better = {name: facts["higher_is_better"] for name, facts in found.items()}
    assert better == {digits.monitor: False, "fid": False, "control/ssim": True, "control/mse": False}
