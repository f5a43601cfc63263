"""Our loop against diffusers' own one, for every scheduler that the installed diffusers has; and who is refused."""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import pytest
import torch

from lightning_difftune.errors import ConfigError
from lightning_difftune.sampling import Guided, is_flow, sample, scheduler_named, swap
from lightning_difftune.sampling.schedulers import check_reverses, learns_variance

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GRIDS = [
    {},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_lu_lambdas": True},
]


def schedulers(**settings):
    """Every scheduler of diffusers that can be made here, with each of the grids that it has."""
    for name in sorted(name for name in dir(diffusers) if name.endswith("Scheduler")):
        kind = getattr(diffusers, name)
        accepted = inspect.signature(kind.__init__).parameters
        for grid in GRIDS:
            chosen = {**settings, **grid, **({"clip_sample": False} if "clip_sample" in accepted else {})}
            if not (set(grid) | set(settings)) <= set(accepted):
                continue
            try:
                scheduler = kind(**chosen)
                check_reverses(scheduler)
            except (ImportError, TypeError, ValueError, NotImplementedError, ConfigError):
                continue
            yield pytest.param(scheduler, id="-".join([name.removesuffix("Scheduler"), *map(str, grid.values())]))


def network(x_t, t, condition=None):
    """A prediction that tells fractions of a timestep apart."""
    phase = t.double().view(-1, 1, 1, 1) / 5
    return (0.3 * x_t.double() + 0.5 * phase.sin() + 0.2 * torch.cos(3 * x_t.double() + phase)).float()


def own_loop(scheduler, noise, steps, **settings):
    """What diffusers' pipelines do, for a network of noise."""
    torch.manual_seed(0)
    scheduler.set_timesteps(steps, **settings)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        told = t * 1.0 if not is_flow(scheduler) else t - 1
        x = scheduler.step(network(scaled, told.expand(len(x))), t, x).prev_sample
    return x


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


NOISE_SCHEDULERS = list(schedulers(**BETAS))


@pytest.mark.parametrize("scheduler", NOISE_SCHEDULERS)
def test_noise_predictions_are_sampled_as_diffusers_samples_them(scheduler, noise):
    try:
        expected = own_loop(scheduler, noise, 7)
    except (ValueError, NotImplementedError, IndexError) as error:
        pytest.skip(f"diffusers' own loop does not run: {error}")
    torch.manual_seed(0)
    found = sample(network, noise, scheduler, 7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_the_table_above_goes_through_what_is_installed():
    names = {parameter.id.partition("-")[0] for parameter in NOISE_SCHEDULERS}
    assert {"DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete"} <= names
    assert {"EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"} <= names
    assert {"PNDM", "UniPCMultistep", "LMSDiscrete", "LCM"} <= names
    fractional = 0
    for parameter in NOISE_SCHEDULERS:
        scheduler = parameter.values[0]
        scheduler.set_timesteps(7)
        fractional += bool((scheduler.timesteps.double() % 1).any())
    assert fractional >= 10


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "kind", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]
)
def test_velocities_are_sampled_as_diffusers_samples_them(kind, dynamic, noise):
    kind = getattr(diffusers, kind)
    if dynamic and "use_dynamic_shifting" not in inspect.signature(kind.__init__).parameters:
        pytest.skip("has no dynamic shift")
    scheduler = kind(shift=3.0, **({"use_dynamic_shifting": True} if dynamic else {}))
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (8 * 8 / 4 - 256)  # FLUX's line
    extra = {"mu": mu, "sigmas": np.linspace(1, 1 / 7, 7).tolist()} if dynamic else {}
    expected = own_loop(scheduler, noise, 7, **extra)
    torch.manual_seed(0)
    found = sample(network, noise, scheduler, 7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_solvers_of_noise_predictions_integrate_velocities_over_a_shifted_grid_too(name, noise):
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}
    scheduler = getattr(diffusers, name)(**settings, time_shift_type="exponential")
    assert is_flow(scheduler)
    straight = lambda x_t, t, condition: noise - 0.25  # noqa: E731  the velocity to a constant picture
    found = sample(straight, noise, scheduler, 6)
    torch.testing.assert_close(found, torch.full_like(found, 0.25), rtol=0, atol=5e-3)


REFUSED = {
    "DDIMInverse": "from data to noise",
    "RePaint": "its steps need original_image",
    "KarrasVe": "its steps need sample_hat",
    "EDMEuler": "no noise levels at T timesteps",
    "IPNDM": "no noise levels at T timesteps",
    "CMStochasticIterative": "no noise levels at T timesteps",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_schedulers_of_another_kind_are_refused(name, reason, noise):
    with pytest.raises(ConfigError, match=reason):
        sample(network, noise, getattr(diffusers, f"{name}Scheduler")(), 4)


class WithVariance:
    """Noise of four channels and a variance of four, which differ by the condition."""

    def __call__(self, x_t, t, condition):
        eps = network(x_t, t) + condition.view(-1, 1, 1, 1)
        return torch.cat([eps, (0.5 * x_t + condition.view(-1, 1, 1, 1)).tanh()], dim=1)


def authors_steps(noise, steps, scale, betas):
    """A slow twin of the authors' sampling: respaced betas, guidance on three channels, learned range of variance."""
    kept = [round(k * (999 / (steps - 1))) for k in range(steps)]
    bar = np.cumprod(1 - betas)[kept]
    new = 1 - bar / np.append(1.0, bar[:-1])
    previous = np.append(1.0, bar[:-1])
    posterior = new * (1 - previous) / (1 - bar)
    x, model = noise.double(), WithVariance()
    torch.manual_seed(0)
    for i in reversed(range(steps)):
        t = torch.full((len(x),), kept[i])
        out, null = (model(x.float(), t, torch.full((len(x),), c)).double() for c in (0.7, 0.0))
        eps, v = out[:, :4].clone(), out[:, 4:]
        eps[:, :3] = null[:, :3] + scale * (out[:, :3] - null[:, :3])
        x0 = (x - np.sqrt(1 - bar[i]) * eps) / np.sqrt(bar[i])
        mean = np.sqrt(previous[i]) * new[i] / (1 - bar[i]) * x0
        mean += np.sqrt(1 - new[i]) * (1 - previous[i]) / (1 - bar[i]) * x
        if i == 0:
            return mean
        log_variance = (v + 1) / 2 * np.log(new[i]) + (1 - v) / 2 * np.log(posterior[i])
        x = mean + (0.5 * log_variance).exp() * torch.randn(x.shape)
    raise AssertionError


@pytest.mark.parametrize("steps", [25, 250])
def test_a_learned_variance_is_sampled_as_the_authors_sample_it(steps, noise):
    """The "linspace" grid of DDPM is their respacing; the variance is that of the conditional branch."""
    settings = {"variance_type": "learned_range", "timestep_spacing": "linspace", "clip_sample": False}
    scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, **settings)
    labels, null = torch.full((2,), 0.7), torch.zeros(2)
    torch.manual_seed(0)
    found = sample(WithVariance(), noise, scheduler, steps, labels, null, 1.5, 3)
    expected = authors_steps(noise, steps, 1.5, np.linspace(1e-4, 0.02, 1000))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert learns_variance(scheduler)


def test_a_learned_variance_that_the_network_does_not_have_is_named(noise):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ConfigError, match="8 channels, but the network predicts 4"):
        sample(network, noise, scheduler, 3)


def test_solvers_are_given_the_mean_alone(noise):
    """DPM-Solver cuts predictions of a model with a variance off behind three channels."""
    plain, cutting = (diffusers.DPMSolverMultistepScheduler(variance_type=kind) for kind in (None, "learned_range"))
    labels = torch.zeros(2)
    found = [sample(WithVariance(), noise, scheduler, 5, labels) for scheduler in (plain, cutting)]
    assert torch.equal(*found)
    assert cutting.config.variance_type == "learned_range"


def test_a_swap_on_a_fractional_grid_is_the_process_of_its_own(noise):
    scheduler = scheduler_named("EulerDiscrete", {"beta_start": 1e-4, "beta_end": 0.02})
    first, last = Guided(network), Guided(lambda x_t, t, condition: -network(x_t, t))
    found = swap(first, last, noise, scheduler, [0.0, 1.0], 6)
    assert torch.equal(found[0], sample(first.denoise, noise, scheduler, 6))
    assert torch.equal(found[1], sample(last.denoise, noise, scheduler, 6))
