"""Theorem 1: both limits, against plain numpy in float64, and what must not change the result."""

import numpy as np
import pytest
import torch
from tiny import implied_noise

from lightning_difftune.diffusion import GaussianDiffusion, RectifiedFlow
from lightning_difftune.errors import DataError
from lightning_difftune.ideal_denoiser import distance_to_ideal, ideal_denoiser
from lightning_difftune.sampling import sample, scheduler_named

PROCESSES = [GaussianDiffusion(), RectifiedFlow()]


def numpy_twin(x_t, t, data, process):
    """The formula as Theorem 1 has it, entry by entry in float64 with the process from its definition."""
    if isinstance(process, RectifiedFlow):
        a, b = 1 - (t + 1) / 1000, (t + 1) / 1000
    else:
        bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        a, b = np.sqrt(bar[t]), np.sqrt(1 - bar[t])
    result = []
    for i, x in enumerate(x_t.astype(np.float64).reshape(len(x_t), -1)):
        flat = data.astype(np.float64).reshape(len(data), -1)
        log_weight = -((x - a[i] * flat) ** 2).sum(1) / (2 * b[i] ** 2)
        weight = np.exp(log_weight - log_weight.max())
        result.append((weight / weight.sum()) @ flat)
    return np.stack(result).reshape(x_t.shape)


def pictures(count, side=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, side, side, generator=generator) * 2 - 1


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_against_numpy_over_all_noise_levels(process):
    data = pictures(90) * 0.3 + pictures(1, seed=1) * 0.7  # near to each other, so that many samples share the weight
    t = torch.tensor([0, 1, 5, 30, 100, 300, 500, 700, 900, 999])
    x_t = process.add_noise(
        data[: len(t)], torch.randn(len(t), 1, 12, 12, generator=torch.Generator().manual_seed(2)), t
    )
    found = ideal_denoiser(x_t, t, data, process)
    expected = numpy_twin(x_t.numpy(), t.numpy(), data.numpy(), process)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
    spread = np.abs(expected - data[: len(t)].numpy()).max((1, 2, 3))
    assert (spread > 1e-3).any()
    assert (spread < 1e-3).any()  # both regimes were met


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_the_nearest_sample_at_the_data_and_the_mean_at_the_noise(process):
    data, noise = pictures(50), torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    t = torch.zeros(5, dtype=torch.int64)
    start = process.add_noise(data[:5], noise, t)
    assert torch.equal(ideal_denoiser(start, t, data, process), data[:5])
    far = ideal_denoiser(100 * start, t, data, process)  # no weight underflows to nothing far from all the data
    nearest = ((100 * start).flatten(1)[:, None] - data.flatten(1)[None]).square().sum(-1).argmin(1)
    assert torch.equal(far, data[nearest])
    end = torch.full((5,), 999)
    mean = ideal_denoiser(process.add_noise(data[:5], noise, end), end, data, process)
    tolerance = 1e-5 if isinstance(process, RectifiedFlow) else 0.03  # DDPM's last step keeps 0.6 % of the data
    torch.testing.assert_close(mean, data.mean(0).expand(5, -1, -1, -1), atol=tolerance, rtol=0)


def test_chunks_and_batches_change_rounding_only():
    data, t = pictures(70), torch.tensor([2, 400, 990])
    x_t = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(4))
    whole = ideal_denoiser(x_t, t, data)
    for split in (data, list(data.split(33)), iter(data.split(1))):
        torch.testing.assert_close(ideal_denoiser(x_t, t, split, chunk_size=16), whole, atol=1e-5, rtol=0)
    backwards = ideal_denoiser(x_t, t, data.flip(0), chunk_size=1)
    torch.testing.assert_close(backwards, whole, atol=1e-5, rtol=0)


def test_no_prediction_has_a_smaller_loss():
    """It is the minimiser: the mean loss over the joint distribution grows in any direction away from it."""
    process, data = GaussianDiffusion(), pictures(8, side=2)
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(8, (4000,), generator=generator)
    t, noise = torch.full((4000,), 350), torch.randn(4000, 1, 2, 2, generator=generator)
    x_t = process.add_noise(data[chosen], noise, t)
    ideal = implied_noise(process, x_t, ideal_denoiser(x_t, t, data, process), t)

    def loss(prediction):
        return (prediction - noise).square().mean()

    for other in (ideal * 0.9, ideal * 1.1, ideal + 0.1, noise.mean() + 0 * ideal):
        assert loss(ideal) < loss(other)


def test_data_of_another_shape_or_none_are_refused():
    x_t, t = torch.zeros(1, 1, 4, 4), torch.tensor([3])
    with pytest.raises(DataError, match=r"samples \(1, 5, 5\) cannot denoise \(1, 4, 4\)"):
        ideal_denoiser(x_t, t, torch.zeros(2, 1, 5, 5))
    for nothing in ([], torch.zeros(0, 1, 4, 4)):
        with pytest.raises(DataError, match="are empty"):
            ideal_denoiser(x_t, t, nothing)


def test_the_distance_to_the_ideal_is_zero_for_the_ideal_and_grows_with_the_mistake():
    data, x0 = pictures(20, side=4), pictures(20, side=4)[:6]
    timesteps = [0, 300, 999]
    for process in PROCESSES:

        def ideal(x_t, t, condition, process=process):
            clean = ideal_denoiser(x_t, t, data, process)
            noise = implied_noise(process, x_t, clean, t)
            target = noise - clean if isinstance(process, RectifiedFlow) else noise
            return torch.cat([target + condition, torch.full_like(noise, torch.nan)], dim=1)

        right = distance_to_ideal(ideal, x0, 0.0, data, timesteps, process)
        assert [t for t, _ in right] == timesteps
        assert max(distance for _, distance in right) < 2e-3
        wrong = distance_to_ideal(ideal, x0, 0.5, data, timesteps, process)
        for (_, distance), t in zip(wrong, timesteps, strict=True):
            a, b = process.coefficients(torch.tensor([t]), x0)
            expected = 0.5 * (b if isinstance(process, RectifiedFlow) else b / a)
            assert distance == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "KDPM2Discrete"])
def test_it_is_sampled_at_fractions_of_a_timestep(name):
    """For one picture the ideal denoiser is known exactly; evaluated between two timesteps."""
    picture = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    process = GaussianDiffusion()
    scheduler = scheduler_named(name, {"beta_start": 1e-4, "beta_end": 0.02})
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def exact(x_t, t, condition):
        return implied_noise(process, x_t, picture.expand_as(x_t), t)

    torch.testing.assert_close(sample(exact, noise, scheduler, 20), picture.expand_as(noise), rtol=0, atol=0.02)
