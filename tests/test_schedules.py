"""Invariants of psi and xi, and slow twins of their formulas."""

import numpy as np
import pytest
import torch

from lightning_difftune import (
    DiffTuningObjective,
    ForgettingSchedule,
    MeasuredSchedule,
    MirroredPowerSchedule,
    PowerSchedule,
    SNRSchedule,
)
from lightning_difftune.diffusion import GaussianDiffusion, RectifiedFlow
from lightning_difftune.errors import ConfigError
from lightning_difftune.losses import eps_mse_loss, velocity_mse_loss
from lightning_difftune.schedules import describe_backwards, fit_schedule, isotonic

S = torch.arange(1, 1001, dtype=torch.float64) / 1000
TAUS = [0.0, 0.3, 0.5, 0.7, 1.0, 1.5]


def bound(schedule, process=None):
    """A schedule that knows its process, DiT's by default."""
    schedule.bind(process or GaussianDiffusion())
    return schedule


SCHEDULES = [
    *(PowerSchedule(tau) for tau in TAUS),
    *(bound(MirroredPowerSchedule(tau)) for tau in TAUS),
    bound(SNRSchedule()),
]


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
    schedule = bound(MirroredPowerSchedule(tau))
    target = torch.tensor([float((k + 1) ** tau) for k in range(1000)], dtype=torch.float64)
    retained = torch.tensor([float((1000 - k) ** tau) for k in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(schedule.reconsolidation(S) / schedule.reconsolidation(S).sum(), target / target.sum())
    torch.testing.assert_close(schedule.retention(S) / schedule.retention(S).sum(), retained / retained.sum())


@pytest.mark.parametrize("schedule", [PowerSchedule(0.0), MirroredPowerSchedule(0.0)], ids=repr)
def test_tau_zero_is_standard_fine_tuning(schedule):
    assert torch.equal(schedule.reconsolidation(S), torch.ones_like(S))
    assert torch.equal(schedule.retention(S), torch.zeros_like(S))


def test_snr_schedule_against_a_plain_loop():
    schedule = bound(SNRSchedule(k=2.0, gamma=0.5))
    psi, alpha_bar = schedule.reconsolidation(S), 1.0
    for t in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        expected = (2.0 + alpha_bar / (1 - alpha_bar)) ** -0.5
        assert psi[t].item() == pytest.approx(expected, rel=1e-6)


def test_snr_schedule_of_another_process():
    process = GaussianDiffusion(100, 0.00085, 0.012, "scaled_linear")
    s = torch.arange(1, 101, dtype=torch.float64) / 100
    psi = bound(SNRSchedule(), process).reconsolidation(s)
    alpha_bar = process.sqrt_alphas_cumprod.double() ** 2
    torch.testing.assert_close(psi, 1 - alpha_bar, rtol=1e-4, atol=1e-5)  # 1 / (1 + SNR)


PROCESSES = [
    GaussianDiffusion(),
    GaussianDiffusion(1000, 0.00085, 0.012, "scaled_linear"),
    GaussianDiffusion(100),
    RectifiedFlow(50),
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{type(p).__name__}-{p.num_timesteps}")
def test_an_objective_binds_its_process_to_its_schedule(process):
    """Slow twins of psi and xi at each level of the objective's process, whatever the schedule was bound to before."""
    steps = process.num_timesteps
    snr = [float(process.snr(torch.tensor([t]))) for t in range(steps)]
    psi = bound(SNRSchedule(k=2.0))
    objective = DiffTuningObjective(psi, loss_of(process), diffusion=process)
    torch.testing.assert_close(objective.psi.double(), torch.tensor([1 / (2 + x) for x in snr], dtype=torch.float64))
    objective = DiffTuningObjective(bound(MirroredPowerSchedule(0.7)), loss_of(process), diffusion=process)
    mirrored = torch.tensor([((steps - t) / steps) ** 0.7 for t in range(steps)])
    torch.testing.assert_close(objective.xi, mirrored)


def loss_of(process):
    return velocity_mse_loss if isinstance(process, RectifiedFlow) else eps_mse_loss


@pytest.mark.parametrize("schedule", [SNRSchedule(), MirroredPowerSchedule()], ids=repr)
def test_a_schedule_without_a_process_says_so(schedule):
    with pytest.raises(ConfigError, match=r"call schedule.bind\(process\)"):
        schedule.retention(S)


@pytest.mark.parametrize(
    ("psi", "xi", "message"),
    [
        (S, 1 - S, None),
        (torch.ones_like(S), torch.zeros_like(S), None),
        (1 - S, S, "psi falls and xi rises"),
        (S, S, "runs backwards: xi rises"),
        ((S - 0.5).square(), 1 - S, "runs backwards: psi falls"),
    ],
)
def test_a_schedule_that_runs_backwards_is_told_from_one_that_does_not(psi, xi, message):
    found = describe_backwards(PowerSchedule(), psi, xi)
    assert found is None if message is None else message in found


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


def test_a_measured_schedule_adapts_where_tuning_helped_and_retains_elsewhere(tmp_path):
    s = [0.1, 0.3, 0.5, 0.7, 0.9]
    schedule = fit_schedule(tmp_path / "new" / "psi.json", s, [1.0, 2.0, 1.0, 1.0, 0.5], [1.1, 2.0, 0.8, 0.9, 0.1])
    # gains 0, 0, 0.2, 0.1, 0.8; the two that fall are averaged, and the largest is scaled to 1
    psi = schedule.reconsolidation(torch.tensor([0.01, *s, 1.0], dtype=torch.float64))
    torch.testing.assert_close(psi, torch.tensor([0, 0, 0, 0.1875, 0.1875, 1, 1], dtype=torch.float64))
    between = torch.tensor([[0.4], [0.8]])
    torch.testing.assert_close(schedule.reconsolidation(between), torch.tensor([[0.09375], [0.59375]]))
    torch.testing.assert_close(schedule.retention(between), torch.tensor([[0.90625], [0.40625]]))
    again = MeasuredSchedule(tmp_path / "new" / "psi.json")
    assert torch.equal(again.reconsolidation(psi), schedule.reconsolidation(psi))
    assert repr(again) == "MeasuredSchedule(psi.json)"
    objective = DiffTuningObjective(again)
    assert objective.uses_retention
    assert objective.psi.diff().min() >= 0


def test_isotonic_regression_is_the_nearest_rising_sequence():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(size=6)
        found = isotonic(values)
        assert (np.diff(found) >= -1e-12).all()
        others = np.sort(found + rng.normal(size=(2000, 6)) * rng.uniform(0, 1, (2000, 1)), axis=1)
        assert ((others - values) ** 2).sum(1).min() >= ((found - values) ** 2).sum() - 1e-12
    assert isotonic(np.array([1.0, 2.0, 3.0])).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON with lists"),
        ('{"s": [0.5]}', "is not JSON with lists"),
        ('{"s": [0.2, 0.8], "psi": ["a", 1]}', "is not JSON with lists"),
        ('{"s": [0.5], "psi": [1]}', "needs two levels"),
        ('{"s": [0.2, 0.8], "psi": [0, 0.5, 1]}', "needs two levels"),
        ('{"s": [0.8, 0.2], "psi": [0, 1]}', "needs two levels"),
        ('{"s": [0.0, 0.2], "psi": [0, 1]}', "needs two levels"),
        ('{"s": [0.2, 0.8], "psi": [1, 0.5]}', "needs two levels"),
        ('{"s": [0.2, 0.8], "psi": [0, 1.5]}', "needs two levels"),
        ('{"s": [0.2, 0.8], "psi": [0, 0]}', "needs two levels"),
        ('{"s": [0.2, 0.8], "psi": [0, NaN]}', "needs two levels"),
    ],
)
def test_files_that_are_not_a_schedule_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "psi.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        MeasuredSchedule(tmp_path / "psi.json")


def test_measurements_that_give_no_schedule_are_refused(tmp_path):
    for before, after, message in (
        ([1.0, 1.0], [1.0, 1.1], "nowhere better"),
        ([1.0], [0.5], "positive loss of both models at each of the 2"),
        ([0.0, 1.0], [0.5, 0.5], "positive loss"),
        ([1.0, 1.0], [float("nan"), 0.5], "positive loss"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_schedule(tmp_path / "psi.json", [0.2, 0.8], before, after)
    assert not (tmp_path / "psi.json").exists()


@pytest.mark.parametrize("kind", [PowerSchedule, MirroredPowerSchedule])
def test_a_floor_lifts_psi_and_leaves_xi(kind):
    s = torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
    plain, lifted = kind(tau=1.0), kind(tau=1.0, floor=0.3)
    if kind is MirroredPowerSchedule:
        plain.num_timesteps = lifted.num_timesteps = 1000
    assert lifted.reconsolidation(s).tolist() == [0.3, 0.3, 0.9]
    assert torch.equal(lifted.retention(s), plain.retention(s))
    assert repr(lifted) == f"{kind.__name__}(tau=1, floor=0.3)"


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_a_floor_that_is_not_a_share_is_refused(floor):
    with pytest.raises(ConfigError, match="floor is the least psi"):
        PowerSchedule(floor=floor)
