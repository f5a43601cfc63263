"""Invariants of psi and xi, and slow twins of their formulas."""

import pytest
import torch

from lightning_difftune import ForgettingSchedule, MirroredPowerSchedule, PowerSchedule, SNRSchedule
from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.errors import ConfigError

S = torch.arange(1, 1001, dtype=torch.float64) / 1000
TAUS = [0.0, 0.3, 0.5, 0.7, 1.0, 1.5]
SCHEDULES = [*(PowerSchedule(tau) for tau in TAUS), *(MirroredPowerSchedule(tau) for tau in TAUS), SNRSchedule()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_psi_rises_and_xi_falls_within_bounds(schedule):
    psi, xi = schedule.reconsolidation(S), schedule.retention(S)
    assert isinstance(schedule, ForgettingSchedule)
    assert (psi.diff() >= 0).all()
    assert (xi.diff() <= 0).all()
    assert psi.min() >= 0
    assert psi.max() <= 1
    assert xi.min() >= 0
    assert xi.max() <= 1 + 1e-12


@pytest.mark.parametrize("tau", TAUS)
def test_power_schedule_sums_to_one(tau):
    schedule = PowerSchedule(tau)
    assert torch.equal(schedule.reconsolidation(S) + schedule.retention(S), torch.ones_like(S))


@pytest.mark.parametrize("tau", [0.3, 1.0, 1.5])
def test_mirrored_schedule_gives_the_official_weights(tau):
    """The authors' code draws the 0-based timestep k with (k+1)^tau for the target and (T-k)^tau for retention."""
    schedule = MirroredPowerSchedule(tau)
    target = torch.tensor([float((k + 1) ** tau) for k in range(1000)], dtype=torch.float64)
    retained = torch.tensor([float((1000 - k) ** tau) for k in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(schedule.reconsolidation(S) / schedule.reconsolidation(S).sum(), target / target.sum())
    torch.testing.assert_close(schedule.retention(S) / schedule.retention(S).sum(), retained / retained.sum())


@pytest.mark.parametrize("schedule", [PowerSchedule(0.0), MirroredPowerSchedule(0.0)], ids=repr)
def test_tau_zero_is_standard_fine_tuning(schedule):
    assert torch.equal(schedule.reconsolidation(S), torch.ones_like(S))
    assert torch.equal(schedule.retention(S), torch.zeros_like(S))


def test_snr_schedule_against_a_plain_loop():
    schedule = SNRSchedule(k=2.0, gamma=0.5)
    psi, alpha_bar = schedule.reconsolidation(S), 1.0
    for t in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        expected = (2.0 + alpha_bar / (1 - alpha_bar)) ** -0.5
        assert psi[t].item() == pytest.approx(expected, rel=1e-6)


def test_snr_schedule_of_another_process():
    process = GaussianDiffusion(100, 0.00085, 0.012, "scaled_linear")
    s = torch.arange(1, 101, dtype=torch.float64) / 100
    psi = SNRSchedule(diffusion=process).reconsolidation(s)
    alpha_bar = process.sqrt_alphas_cumprod.double() ** 2
    torch.testing.assert_close(psi, 1 - alpha_bar, rtol=1e-4, atol=1e-5)  # 1 / (1 + SNR)


def test_schedules_take_any_shape():
    s = torch.rand(2, 3, 4).clamp(min=1e-3)
    for schedule in SCHEDULES:
        assert schedule.retention(s).shape == s.shape
        assert schedule.reconsolidation(s).dtype == s.dtype


@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [PowerSchedule, MirroredPowerSchedule])
def test_bad_tau_is_refused(kind, tau):
    with pytest.raises(ConfigError, match="tau must be a finite number of at least 0"):
        kind(tau)


def test_bad_snr_settings_are_refused():
    with pytest.raises(ConfigError, match="k >= 1"):
        SNRSchedule(k=0.5)
