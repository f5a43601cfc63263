"""The objectives: drawn timesteps, the relation of the two forms, and tau = 0."""

import pytest
import torch

from lightning_difftune import (
    DiffTuningObjective,
    MirroredPowerSchedule,
    PowerSchedule,
    SNRSchedule,
    WeightedDiffTuningObjective,
)
from lightning_difftune.densities import LogitNormal, Uniform
from lightning_difftune.draws import Draws
from lightning_difftune.errors import ConfigError
from lightning_difftune.losses import eps_mse_loss
from lightning_difftune.source import SourceFacts

TARGET, RETAINED = torch.zeros(200_000, dtype=torch.bool), torch.ones(200_000, dtype=torch.bool)


def zero_network(x_t, t, condition):
    return torch.zeros(len(x_t), 2 * x_t.shape[1], *x_t.shape[2:])


@pytest.mark.parametrize(
    "schedule", [PowerSchedule(1.0), PowerSchedule(0.3), MirroredPowerSchedule(1.5), SNRSchedule()], ids=repr
)
@pytest.mark.parametrize("is_retention", [TARGET, RETAINED], ids=["target", "retention"])
def test_drawn_timesteps_follow_the_schedule(schedule, is_retention):
    objective = DiffTuningObjective(schedule)
    t = objective.timesteps(Draws(0, 0).uniform(len(is_retention)), is_retention)
    s = torch.arange(1, 1001, dtype=torch.float64) / 1000
    weights = schedule.retention(s) if is_retention[0] else schedule.reconsolidation(s)
    expected = (weights / weights.sum()).view(20, 50).sum(1)  # in 20 bins of 50 steps
    drawn = torch.bincount(t // 50, minlength=20) / len(t)
    standard_error = (expected * (1 - expected) / len(t)).sqrt()
    assert ((drawn - expected).abs() < 5 * standard_error + 1e-7).all()


def test_every_timestep_can_be_drawn_and_none_beyond():
    objective = DiffTuningObjective(PowerSchedule(1.0))
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert objective.timesteps(edges, torch.tensor([False, False])).tolist() == [0, 999]
    assert objective.timesteps(edges, torch.tensor([True, True])).tolist() == [0, 998]  # xi(1) = 0


def test_the_two_forms_agree_up_to_their_stated_constants():
    """Weighted = Z times sampled, with Z_psi = mean psi and Z_xi = mean xi; exact, by summing over all timesteps."""
    torch.manual_seed(0)
    schedule = PowerSchedule(0.7)
    sampled = DiffTuningObjective(schedule, eps_mse_loss, retention_weight=1.0)
    weighted = WeightedDiffTuningObjective(schedule, eps_mse_loss, retention_weight=1.0)
    t = torch.arange(1000)
    x0, noise = torch.randn(2, 1000, 1, 4, 4).unbind()

    def network(x_t, t, condition):
        return torch.cat([x_t * 0.3, x_t], dim=1)

    for is_retention, weights in ((TARGET[:1000], weighted.psi), (RETAINED[:1000], weighted.xi)):
        losses = sampled.at(network, x0, None, is_retention, t, noise).per_sample
        expectation_sampled = (losses * weights / weights.sum()).sum()
        expectation_weighted = weighted.at(network, x0, None, is_retention, t, noise).per_sample.mean()
        torch.testing.assert_close(expectation_weighted, weights.mean() * expectation_sampled)


def test_weighted_form_draws_uniformly():
    t = WeightedDiffTuningObjective().timesteps(Draws(0, 0).uniform(len(TARGET)), TARGET)
    counts = torch.bincount(t, minlength=1000)
    assert counts.min() > 120
    assert counts.max() < 290


@pytest.mark.parametrize("schedule", [PowerSchedule(0.0), MirroredPowerSchedule(0.0)], ids=repr)
@pytest.mark.parametrize("kind", [DiffTuningObjective, WeightedDiffTuningObjective])
def test_tau_zero_is_the_plain_loss_whatever_the_bank_holds(kind, schedule):
    objective = kind(schedule, eps_mse_loss)
    assert not objective.uses_retention
    x0 = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    is_retention = torch.arange(8) >= 6
    out = objective(zero_network, x0, None, is_retention, Draws(3, 0))
    draws = Draws(3, 0)
    t, noise = objective.timesteps(draws.uniform(8), is_retention), draws.normal(8, 1, 4, 4)
    assert torch.equal(out.timesteps[:6], t[:6])
    assert torch.equal(out.loss, noise[:6].square().flatten(1).mean(1).mean())
    uniform = Draws(1, 0).uniform(100_000)
    timesteps = objective.timesteps(uniform, torch.zeros(100_000, dtype=torch.bool))
    assert (timesteps - (uniform.double() * 1000).long()).abs().max() <= 1  # the identity, up to float32 rounding


def test_loss_is_the_target_mean_plus_the_weighted_retention_mean():
    objective = DiffTuningObjective(retention_weight=0.1)
    is_retention = torch.tensor([False, False, False, True])
    out = objective(zero_network, torch.randn(4, 1, 4, 4), None, is_retention)
    torch.testing.assert_close(out.reconsolidation, out.per_sample[:3].mean())
    torch.testing.assert_close(out.retention, out.per_sample[3])
    torch.testing.assert_close(out.loss, out.reconsolidation + 0.1 * out.retention)


def test_retention_only_and_reconsolidation_only():
    is_retention = torch.tensor([False, False, False, True])
    x0 = torch.randn(4, 1, 4, 4)
    retention = DiffTuningObjective(retention_weight=0.1, reconsolidation_weight=0.0)
    out = retention(zero_network, x0, None, is_retention)
    assert retention.uses_retention
    torch.testing.assert_close(out.loss, 0.1 * out.per_sample[3])
    torch.testing.assert_close(out.reconsolidation, out.per_sample[:3].mean())  # still told
    reconsolidation = DiffTuningObjective(retention_weight=0.0, reconsolidation_weight=0.5)
    out = reconsolidation(zero_network, x0, None, is_retention)
    assert not reconsolidation.uses_retention
    torch.testing.assert_close(out.loss, 0.5 * out.per_sample[:3].mean())


def test_no_retained_sample_in_the_batch():
    out = DiffTuningObjective()(zero_network, torch.randn(4, 1, 4, 4), None, torch.zeros(4, dtype=torch.bool))
    assert out.retention == 0
    assert out.loss.isfinite()


def test_draws_do_not_depend_on_the_number_of_processes():
    whole = Draws(7, 5)
    uniform, normal = whole.uniform(12), whole.normal(12, 3)
    for world_size in (2, 3):
        for rank in range(world_size):
            share = Draws(7, 5, rank=rank, world_size=world_size)
            assert torch.equal(share.uniform(12 // world_size), uniform[rank::world_size])
            assert torch.equal(share.normal(12 // world_size, 3), normal[rank::world_size])


def test_nothing_of_the_objective_enters_a_checkpoint():
    assert not DiffTuningObjective().state_dict()


class Rising:
    def reconsolidation(self, s):
        return s

    def retention(self, s):
        return s - 0.5


class Nothing(Rising):
    def reconsolidation(self, s):
        return s * 0


def test_bad_schedules_and_weights_are_refused():
    with pytest.raises(ConfigError, match="retention"):
        DiffTuningObjective(Rising())
    with pytest.raises(ConfigError, match="retention_weight"):
        DiffTuningObjective(retention_weight=-1.0)
    with pytest.raises(ConfigError, match="reconsolidation_weight = nan"):
        DiffTuningObjective(reconsolidation_weight=float("nan"))
    with pytest.raises(ConfigError, match=r"Nothing is learned.*retention_weight = 0.0"):
        DiffTuningObjective(retention_weight=0.0, reconsolidation_weight=0.0)
    with pytest.raises(ConfigError, match=r"Nothing is learned.*PowerSchedule\(tau=0\)"):
        DiffTuningObjective(PowerSchedule(0.0), reconsolidation_weight=0.0)
    Nothing.retention = lambda self, s: s
    with pytest.raises(ConfigError, match="psi is 0 everywhere"):
        DiffTuningObjective(Nothing())


def shares(objective, retained):
    """Frequencies of ten ranges of timesteps."""
    count = 200_000
    is_retention = torch.full((count,), retained)
    t = objective.timesteps(Draws(0, 0).uniform(count), is_retention)
    return torch.bincount(t * 10 // objective.diffusion.num_timesteps, minlength=10) / count


@pytest.mark.parametrize("density", [Uniform(3.0), LogitNormal(0.5, 0.8), LogitNormal(0, 1, 3)], ids=repr)
def test_timesteps_are_drawn_from_the_product_of_density_and_schedule(density, recwarn):
    s = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    objective = DiffTuningObjective(PowerSchedule(), eps_mse_loss, density=density)
    for retained, weights in ((False, s), (True, 1 - s)):
        expected = (density.density(s) * weights).reshape(10, 100).sum(1)
        torch.testing.assert_close(shares(objective, retained), (expected / expected.sum()).float(), atol=5e-3, rtol=0)
    weighted = WeightedDiffTuningObjective(PowerSchedule(), eps_mse_loss, density=density)
    expected = density.density(s).reshape(10, 100).sum(1)
    for retained in (False, True):
        torch.testing.assert_close(shares(weighted, retained), (expected / expected.sum()).float(), atol=5e-3, rtol=0)


def test_without_a_density_and_with_a_uniform_one_the_draws_are_the_same():
    uniform, retained = Draws(0, 0).uniform(1000), torch.arange(1000) % 2 == 0
    plain, explicit = (DiffTuningObjective(density=density) for density in (None, Uniform()))
    assert torch.equal(plain.timesteps(uniform, retained), explicit.timesteps(uniform, retained))


def test_a_density_that_leaves_a_stream_without_its_end_warns_once(recwarn):
    DiffTuningObjective(density=LogitNormal(shift=3)).bind(SourceFacts("model", ""))
    said = [str(w.message) for w in recwarn if "shows the bank its cleanest 30 %" in str(w.message)]
    assert len(said) == 1


def test_a_schedule_that_runs_backwards_is_said_aloud(recwarn):
    class Backwards(PowerSchedule):
        def reconsolidation(self, s):
            return 1 - s

        def retention(self, s):
            return s

    DiffTuningObjective(Backwards())
    assert len([w for w in recwarn if "psi falls and xi rises towards noise" in str(w.message)]) == 1
    DiffTuningObjective(PowerSchedule(1.5))
    assert len(recwarn) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tables_stay_float32_at_any_precision(dtype):
    objective = DiffTuningObjective().to(dtype)
    tables = dict(objective.named_buffers())
    assert len(tables) > 8
    assert {table.dtype for table in tables.values()} == {torch.float32}
    assert all(torch.equal(table, dict(DiffTuningObjective().named_buffers())[name]) for name, table in tables.items())
