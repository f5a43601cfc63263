"""Flow matching: the straight path, its loss, and diffusers' flow schedulers in the one loop."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import implied_noise

from lightning_difftune.cli.parser import DiffTuneParser
from lightning_difftune.diffusion import GaussianDiffusion, RectifiedFlow
from lightning_difftune.errors import ConfigError
from lightning_difftune.losses import hybrid_loss, velocity_mse_loss
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.sampling import Sampler, ddim, is_flow, sample
from lightning_difftune.sampling.schedulers import network_timesteps
from lightning_difftune.schedules import PowerSchedule

PROCESS = RectifiedFlow()
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchHeunDiscreteScheduler(),
    DPMSolverMultistepScheduler(**FLOW),
    UniPCMultistepScheduler(**FLOW),
]


def gaussian_velocity(mean, std):
    """The exact velocity E[eps - x0 | x_t] of data N(mean, std^2), at the noise level that t names."""

    def velocity(x_t, t, condition):
        s = ((t + 1).double() / 1000).view(-1, 1, 1, 1)
        gain = (1 - s) * std**2 / ((1 - s) ** 2 * std**2 + s**2)
        x0 = mean + gain * (x_t - (1 - s) * mean)
        return ((x_t - x0) / s).float()

    return velocity


def test_the_path_is_straight_from_data_to_noise():
    x0, noise, t = torch.randn(1000, 1, 2, 2), torch.randn(1000, 1, 2, 2), torch.arange(1000)
    x_t = PROCESS.add_noise(x0, noise, t)
    assert torch.equal(x_t[-1], noise[-1])
    steps = PROCESS.add_noise(x0[:1].expand(1000, -1, -1, -1), noise[:1].expand(1000, -1, -1, -1), t).diff(dim=0)
    torch.testing.assert_close(steps * 1000, (noise - x0)[:1].expand(999, -1, -1, -1), atol=2e-3, rtol=0)
    torch.testing.assert_close(PROCESS.predict_x0(x_t, noise - x0, t), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(implied_noise(PROCESS, x_t, x0, t)[99:], noise[99:], atol=1e-4, rtol=0)


def test_the_loss_is_least_at_the_exact_velocity():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(20_000, 1, 1, 1, generator=generator) for _ in range(2))
    x0 = 0.5 + 0.2 * x0
    t = torch.randint(1000, (20_000,), generator=generator)
    x_t = PROCESS.add_noise(x0, noise, t)

    def loss(output):
        per_sample = velocity_mse_loss(output, x0, x_t, noise, t, PROCESS)
        assert per_sample.shape == (20_000,)
        return per_sample.mean()

    exact = gaussian_velocity(0.5, 0.2)(x_t, t, None)
    with_variance = torch.cat([exact, torch.full_like(exact, float("nan"))], dim=1)
    assert loss(with_variance) == loss(exact)
    for other in (0.95 * exact, 1.05 * exact, exact + 0.1):
        assert loss(exact) < loss(other)
    assert loss(noise - x0) == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_any_flow_scheduler_recovers_a_gaussian(scheduler):
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    found = sample(gaussian_velocity(0.5, 0.2), noise, scheduler, 200)
    assert found.mean().item() == pytest.approx(0.5 + 0.2 * noise.mean().item(), abs=0.005)
    assert found.std().item() == pytest.approx(0.2, abs=0.008)


def test_euler_finds_a_point_mass_in_a_single_step_of_any_length():
    picture, noise = torch.linspace(-1, 1, 4).view(1, 1, 2, 2), torch.randn(3, 1, 2, 2)
    velocity = lambda x_t, t, condition: (x_t - picture) / ((t + 1).float() / 1000).view(-1, 1, 1, 1)  # noqa: E731
    found = sample(velocity, noise, FlowMatchEulerDiscreteScheduler(), 1)
    torch.testing.assert_close(found, picture.expand(3, -1, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_the_network_is_told_sigma_itself_and_whole_timesteps_exactly(scheduler):
    scheduler.set_timesteps(37)
    t = network_timesteps(scheduler)
    assert len(t) == len(scheduler.timesteps)
    torch.testing.assert_close((t + 1) / 1000, scheduler.sigmas[: len(t)].float(), atol=2e-7, rtol=0)
    scheduler.set_timesteps(10)
    t = network_timesteps(scheduler)
    near = (t - t.round()).abs()
    assert not ((near > 0) & (near < 1e-4)).any()


def test_timesteps_of_variance_preserving_schedulers_are_their_own():
    scheduler = ddim()
    scheduler.set_timesteps(50)
    assert network_timesteps(scheduler).tolist() == list(range(980, -1, -20))
    assert [is_flow(s) for s in (ddim(), DPMSolverMultistepScheduler(), *SCHEDULERS)] == [False] * 2 + [True] * 5


def test_the_objective_trains_a_network_that_samples_the_data():
    """End to end in one dimension: psi(s) and xi(s) draw t, the velocity loss trains, the Euler scheduler samples."""
    torch.manual_seed(0)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))

        def forward(self, x_t, t, condition):
            inputs = torch.cat([x_t.flatten(1), (t[:, None] + 1) / 1000], dim=1)
            return self.layers(inputs).view_as(x_t)

    network = Network()
    objective = DiffTuningObjective(PowerSchedule(0.0), velocity_mse_loss, diffusion=RectifiedFlow())
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(400):
        x0 = 0.7 + 0.3 * torch.randn(256, 1, 1, 1)
        loss = objective(network, x0, None, torch.zeros(256, dtype=torch.bool)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = sample(network, torch.randn(4000, 1, 1, 1), FlowMatchEulerDiscreteScheduler(), 50)
    assert found.mean().item() == pytest.approx(0.7, abs=0.06)
    assert found.std().item() == pytest.approx(0.3, abs=0.06)


def test_a_run_is_switched_to_flow_matching_in_yaml():
    parser = DiffTuneParser(exit_on_error=False)
    parser.add_argument("--objective", type=DiffTuningObjective)
    parser.add_argument("--sampler", type=Sampler)
    config = parser.parse_string("""
        objective:
          class_path: lightning_difftune.DiffTuningObjective
          init_args:
            loss: lightning_difftune.losses.velocity_mse_loss
            diffusion: {class_path: lightning_difftune.diffusion.RectifiedFlow}
        sampler:
          scheduler: {class_path: diffusers.FlowMatchEulerDiscreteScheduler, init_args: {shift: 2.0}}
          guidance_channels: null
    """)
    objects = parser.instantiate_classes(config)
    assert isinstance(objects.objective.diffusion, RectifiedFlow)
    assert objects.objective.loss is velocity_mse_loss
    assert is_flow(objects.sampler.scheduler)
    assert objects.sampler.spec()["scheduler_config"]["shift"] == 2.0
    x0, is_retention = torch.randn(4, 1, 2, 2), torch.tensor([False, False, True, True])
    output = objects.objective(lambda x_t, t, condition: 0 * x_t, x0, None, is_retention)
    assert output.loss > 0


def test_a_loss_of_another_process_is_refused():
    x, t = torch.zeros(1, 1, 2, 2), torch.tensor([3])
    with pytest.raises(ConfigError, match="needs the straight path of RectifiedFlow, found GaussianDiffusion"):
        velocity_mse_loss(x, x, x, x, t, GaussianDiffusion())
    with pytest.raises(ConfigError, match="needs a GaussianDiffusion, found RectifiedFlow"):
        hybrid_loss(torch.cat([x, x], 1), x, x, x, t, PROCESS)
    with pytest.raises(ConfigError, match="two noise levels"):
        RectifiedFlow(1)
