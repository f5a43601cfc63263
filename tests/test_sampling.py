"""The denoising loop: guidance, skipped passes, schedulers, and what a sample depends on."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from lightning_difftune.draws import labels_of, noise_of
from lightning_difftune.errors import ConfigError
from lightning_difftune.sampling import Sampler, ddim, sample

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


class Counting:
    """A denoiser whose noise prediction depends on its condition, and which counts the samples it sees."""

    def __init__(self):
        self.seen = 0

    def __call__(self, x_t, t, condition):
        assert t.dtype == torch.int64
        self.seen += len(x_t)
        label = condition["label"] if isinstance(condition, dict) else condition
        eps = 0.1 * x_t + label.view(-1, 1, 1, 1)
        return torch.cat([eps, torch.full_like(eps, float("nan"))], dim=1)  # the variance must not be looked at


def test_scale_one_skips_the_unconditional_pass():
    noise, labels = torch.randn(3, 4, 4, 4), torch.ones(3)
    for scale, expected in ((1.0, 30), (1.5, 60)):
        network = Counting()
        sample(network, noise, ddim(), 10, labels, torch.zeros(3), scale)
        assert network.seen == expected


@pytest.mark.parametrize("channels", [None, 3])
def test_guidance_against_a_plain_loop(channels):
    noise, labels, null = torch.randn(2, 4, 3, 3), torch.tensor([1.0, 2.0]), torch.zeros(2)
    network, scheduler = Counting(), ddim()
    scheduler.set_timesteps(5)
    x = noise
    for t in scheduler.timesteps:
        eps = network(x, t.expand(2), labels)[:, :4]
        eps_null = network(x, t.expand(2), null)[:, :4]
        guided = eps_null + 4.0 * (eps - eps_null)
        if channels == 3:
            guided[:, 3] = eps[:, 3]
        x = scheduler.step(guided, t, x).prev_sample
    torch.testing.assert_close(sample(network, noise, ddim(), 5, labels, null, 4.0, channels), x)


def test_conditions_may_be_nested():
    noise = torch.randn(2, 1, 3, 3)
    flat = sample(Counting(), noise, ddim(), 4, torch.ones(2), torch.zeros(2), 2.0)
    nested = sample(Counting(), noise, ddim(), 4, {"label": torch.ones(2)}, {"label": torch.zeros(2)}, 2.0)
    assert torch.equal(flat, nested)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**LINEAR),
        DPMSolverMultistepScheduler(**LINEAR),
        UniPCMultistepScheduler(**LINEAR),
        EulerDiscreteScheduler(**LINEAR),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_any_scheduler_finds_the_only_sample_of_a_point_mass(scheduler):
    """For data that is a single picture the exact noise prediction is known; every solver must arrive at it."""
    picture = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    def exact(x_t, t, condition):
        a = bar[t].float().view(-1, 1, 1, 1)
        return (x_t - a.sqrt() * picture) / (1 - a).sqrt()

    before = dict(scheduler.config)
    result = sample(exact, torch.randn(2, 1, 4, 4), scheduler, 20)
    torch.testing.assert_close(result, picture.expand(2, -1, -1, -1), atol=0.05, rtol=0)
    assert dict(scheduler.config) == before


def test_steps_are_reported():
    done = []
    sample(
        Counting(), torch.randn(1, 1, 2, 2), ddim(), 3, torch.ones(1), on_step=lambda n, x: done.append((n, x.shape))
    )
    assert [n for n, _ in done] == [1, 2, 3]


def test_start_noise_and_labels_depend_on_seed_and_index_alone():
    indices = torch.tensor([5, 0, 10_000_000, 5])
    noise = noise_of(1, indices, (2, 3))
    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[2:3], noise_of(1, indices[2:3], (2, 3)))
    assert not torch.equal(noise, noise_of(2, indices, (2, 3)))
    labels = labels_of(0, torch.arange(6000), 6)
    assert torch.bincount(labels, minlength=6).min() > 880
    assert torch.equal(labels_of(0, torch.tensor([17]), 6), labels[17:18])


def test_mistakes_are_refused():
    with pytest.raises(ConfigError, match="needs a null_condition"):
        sample(Counting(), torch.randn(1, 1, 2, 2), ddim(), 3, torch.ones(1), guidance_scale=2.0)
    with pytest.raises(ConfigError, match="at least 1"):
        Sampler(num_inference_steps=0)


def test_a_spec_is_plain_json():
    import json

    for scheduler in (ddim(), DPMSolverMultistepScheduler(**LINEAR), UniPCMultistepScheduler(**LINEAR)):
        spec = Sampler(scheduler).spec()
        assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    spec = Sampler(num_inference_steps=7, guidance_scale=2.0).spec()
    assert spec["scheduler"] == "DDIMScheduler"
    assert spec["scheduler_config"]["timestep_spacing"] == "leading"
