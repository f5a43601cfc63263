"""Timestep densities: what they are as random numbers, and which stream each leaves without its end."""

from __future__ import annotations

import pytest
import torch

from lightning_difftune import PowerSchedule
from lightning_difftune.densities import LogitNormal, TimestepDensity, Uniform, describe_missing_half, masses
from lightning_difftune.errors import ConfigError

FLUX = 3.158
S = torch.arange(1, 1001, dtype=torch.float64) / 1000
PSI, XI = PowerSchedule().reconsolidation(S), PowerSchedule().retention(S)


def drawn(density):
    """The same density by its definition: random u, shifted."""
    u = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if isinstance(density, LogitNormal):
        normal = torch.distributions.Normal(density.mean, density.std)
        u = normal.icdf(u).sigmoid()
    return density.shift * u / (1 + (density.shift - 1) * u)


@pytest.mark.parametrize(
    "density",
    [Uniform(), Uniform(3.0), Uniform(0.5), LogitNormal(), LogitNormal(0, 1, 3), LogitNormal(-0.7, 0.5)],
    ids=repr,
)
def test_the_masses_are_the_shares_of_its_random_numbers(density):
    assert isinstance(density, TimestepDensity)
    found = masses(density, 1000).reshape(10, 100).mean(1) / 10
    expected = torch.histc(drawn(density), 10, 0, 1) / 400_000
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def shares(density, weights):
    """Mass in s < .1, .1 to .3, .3 to .7, .7 to .9 and above."""
    q = masses(density, 1000) * weights
    return [round(float(part.sum() / q.sum()), 2) for part in q.split([100, 200, 400, 200, 100])]


@pytest.mark.parametrize(
    ("density", "plain", "target", "bank"),
    [
        (Uniform(), [0.1, 0.2, 0.4, 0.2, 0.1], [0.01, 0.08, 0.4, 0.32, 0.19], [0.19, 0.32, 0.4, 0.08, 0.01]),
        (LogitNormal(), [0.01, 0.19, 0.6, 0.18, 0.01], [0, 0.08, 0.6, 0.29, 0.03], [0.03, 0.29, 0.6, 0.08, 0]),
        (LogitNormal(shift=3), [0, 0.03, 0.38, 0.46, 0.14], [0, 0.01, 0.29, 0.52, 0.18], [0, 0.07, 0.58, 0.32, 0.03]),
        (
            Uniform(FLUX),
            [0.03, 0.09, 0.31, 0.32, 0.26],
            [0, 0.03, 0.24, 0.37, 0.36],
            [0.1, 0.21, 0.46, 0.19, 0.04],
        ),
    ],
    ids=repr,
)
def test_the_table_of_the_documentation(density, plain, target, bank):
    assert shares(density, torch.ones_like(S)) == pytest.approx(plain, abs=0.0101)
    assert shares(density, PSI) == pytest.approx(target, abs=0.0101)
    assert shares(density, XI) == pytest.approx(bank, abs=0.0101)


@pytest.mark.parametrize(
    ("density", "named"),
    [
        (Uniform(), []),
        (Uniform(FLUX), []),
        (LogitNormal(), ["the target its noisiest tenth"]),
        (LogitNormal(shift=3), ["the bank its cleanest 30 %"]),
    ],
    ids=repr,
)
def test_a_stream_without_its_end_is_named(density, named):
    found = describe_missing_half(density, PSI, XI) or ""
    for stream in ("the target its noisiest tenth", "the bank its cleanest 30 %"):
        assert (stream in found) == (stream in named), found
    assert "the bank" not in (describe_missing_half(density, torch.ones_like(S), torch.zeros_like(S)) or "")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Uniform, {"shift": 0}),
        (Uniform, {"shift": float("inf")}),
        (LogitNormal, {"std": 0}),
        (LogitNormal, {"shift": -1}),
    ],
)
def test_settings_that_are_not_a_density_are_refused(kind, settings):
    with pytest.raises(ConfigError, match="finite number above 0"):
        kind(**settings)
