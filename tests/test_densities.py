"""Timestep densities: compared with random draws, and warnings about streams without their noise levels."""

from __future__ import annotations

import re
from pathlib import Path

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


PAGE = (Path(__file__).parents[1] / "docs" / "tasks" / "base-models.md").read_text()
ROWS = re.findall(r"^\| `((?:Uniform|LogitNormal)\(.*\))` \|.*\| ([\d .*]+) \| ([\d .*]+) \|$", PAGE, re.M)


@pytest.mark.parametrize(("density", "target", "bank"), ROWS)
def test_the_table_of_the_documentation(density, target, bank):
    p0 = eval(density, {"Uniform": Uniform, "LogitNormal": LogitNormal})
    for weights, said in ((PSI, target), (XI, bank)):
        numbers = [float(number) for number in said.replace("*", "").split()]
        assert shares(p0, weights) == pytest.approx(numbers, abs=0.0101)
    named = "the target its noisiest tenth" * target.endswith("**") + "the bank its cleanest 30 %" * ("**.00" in bank)
    found = describe_missing_half(p0, PSI, XI)
    assert (found is not None) == ("*" in target + bank)
    assert found is None or named in found


def test_the_table_has_the_densities_of_families_and_scripts():
    assert len(ROWS) == 5


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
