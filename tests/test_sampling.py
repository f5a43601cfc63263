"""The denoising loop: guidance, skipped passes, schedulers, and what a sample depends on."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from jsonargparse import ArgumentParser

from lightning_difftune.draws import choices_of, noise_of
from lightning_difftune.errors import ConfigError
from lightning_difftune.sampling import Guided, Sampler, adds_noise, ddim, is_flow, sample, scheduler_named, swap

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


class Counting:
    """A denoiser whose noise prediction depends on its condition, and which counts the samples it sees."""

    def __init__(self):
        self.seen = 0

    def __call__(self, x_t, t, condition):
        assert t.shape == (len(x_t),)
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
        a = bar[t.round().long()].float().view(-1, 1, 1, 1)
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
    labels = choices_of(0, torch.arange(6000), 6)
    assert torch.bincount(labels, minlength=6).min() > 880
    assert torch.equal(choices_of(0, torch.tensor([17]), 6), labels[17:18])


def test_domain_guidance_of_a_model_by_itself_is_plain_guidance():
    torch.manual_seed(0)
    noise, labels, null = torch.randn(2, 4, 3, 3), torch.tensor([1.0, 2.0]), torch.zeros(2)
    for channels in (None, 3):
        plain = sample(Counting(), noise, ddim(), 10, labels, null, 2.5, channels)
        tuned, frozen = Counting(), Counting()
        domain = sample(tuned, noise, ddim(), 10, labels, null, 2.5, channels, null_denoise=frozen)
        torch.testing.assert_close(domain, plain)
        assert tuned.seen == frozen.seen == 2 * 10


def test_domain_guidance_takes_the_unconditional_branch_from_the_frozen_model():
    noise, labels, frozen_null = torch.randn(2, 4, 3, 3), torch.tensor([1.0, 2.0]), torch.tensor([7.0, 7.0])

    def frozen(x_t, t, condition):
        assert torch.equal(condition, frozen_null)
        return 0.3 * x_t - 1

    scheduler = ddim()
    scheduler.set_timesteps(5)
    x = noise
    for t in scheduler.timesteps:
        eps, eps_null = Counting()(x, t.expand(2), labels)[:, :4], frozen(x, t.expand(2), frozen_null)
        x = scheduler.step(eps_null + 2.0 * (eps - eps_null), t, x).prev_sample
    sampler = Sampler(num_inference_steps=5, guidance_scale=2.0, guidance_channels=None, domain_guidance=True)
    torch.testing.assert_close(sampler(Counting(), noise, labels, frozen_null, null_denoise=frozen), x)


def test_domain_guidance_is_set_in_yaml_and_leaves_the_spec_of_older_banks_alone():
    parser = ArgumentParser()
    parser.add_argument("--sampler", type=Sampler)
    keys = {"scheduler", "scheduler_config", "num_inference_steps", "guidance_scale", "guidance_channels"}
    for text, is_on, spec_keys in (
        ("{guidance_scale: 2.0}", False, keys),
        ("{guidance_scale: 2.0, domain_guidance: true}", True, keys | {"domain_guidance"}),
    ):
        sampler = parser.instantiate_classes(parser.parse_args(["--sampler", text])).sampler
        assert sampler.domain_guidance is is_on
        assert sampler.spec().keys() == spec_keys


def test_guidance_away_from_the_condition_itself_is_skipped():
    labels = {"label": torch.ones(3)}
    network = Counting()
    sample(network, torch.randn(3, 1, 2, 2), ddim(), 10, labels, {"label": torch.ones(3)}, 3.0)
    assert network.seen == 30


@pytest.mark.parametrize(
    "scheduler", [ddim(), DPMSolverMultistepScheduler(**LINEAR)], ids=lambda scheduler: type(scheduler).__name__
)
def test_a_swap_is_to_the_bit_a_process_of_its_own_for_each_fraction(scheduler):
    torch.manual_seed(1)
    noise, steps, fractions = torch.randn(3, 4, 5, 5), 10, [0.5, 0.0, 0.3, 1.0, 0.1, 0.32]
    labels, null, source = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), torch.full((3,), -1.0)
    tuned, pretrained = Counting(), lambda x_t, t, condition: 0.2 * x_t.sin() + condition.view(-1, 1, 1, 1)

    def restarted(fraction):
        calls = 0

        def network(x_t, t, condition):
            nonlocal calls
            calls += 1
            if calls <= steps - round(fraction * steps):
                return tuned(x_t, t, condition)
            assert torch.equal(condition[3:], null)
            return pretrained(x_t, t, torch.full_like(condition, -1.0))

        return sample(network, noise, scheduler, steps, labels, null, 2.0)

    model = Guided(tuned, labels, null, 2.0)
    found = swap(model, Guided(pretrained, source), noise, scheduler, fractions, steps)
    assert found.shape == (6, 3, 4, 5, 5)
    for samples, fraction in zip(found, fractions, strict=True):
        expected = restarted(fraction)
        # Guiding away from the same prediction rounds: e + w (e - e) is e to the bit.
        assert torch.equal(samples, expected)
    assert torch.equal(found[1], sample(tuned, noise, scheduler, steps, labels, null, 2.0))
    assert torch.equal(found[2], found[5])  # 3.2 steps of ten are three
    assert not torch.equal(found[1], found[4])


def test_a_swap_shares_the_beginning_and_every_fraction_counts_its_tail_alone():
    tuned, pretrained, noise = Counting(), Counting(), torch.randn(2, 1, 2, 2)
    condition, fractions = torch.ones(2), [percent / 100 for percent in range(0, 101, 10)]
    swap(Guided(tuned, condition), Guided(pretrained, condition), noise, ddim(), fractions, 50)
    assert tuned.seen == 2 * 50
    assert pretrained.seen == 2 * sum(range(0, 51, 5))
    restarting = 2 * 50 * len(fractions)
    assert restarting == 1100
    assert tuned.seen + pretrained.seen == 650


def test_mistakes_are_refused():
    with pytest.raises(ConfigError, match="needs a null_condition"):
        sample(Counting(), torch.randn(1, 1, 2, 2), ddim(), 3, torch.ones(1), guidance_scale=2.0)
    for fractions in ([], [0.5, 1.1], [float("nan")]):
        with pytest.raises(ConfigError, match=r"must be numbers in \[0, 1\]"):
            swap(Guided(Counting()), Guided(Counting()), torch.randn(1, 1, 2, 2), ddim(), fractions)
    for sampler, null_denoise in ((Sampler(domain_guidance=True), None), (Sampler(), Counting())):
        with pytest.raises(ConfigError, match="if and only if domain_guidance is on"):
            sampler(Counting(), torch.randn(1, 1, 2, 2), torch.ones(1), torch.zeros(1), null_denoise=null_denoise)
    with pytest.raises(ConfigError, match="at least 1"):
        Sampler(num_inference_steps=0)


def test_a_spec_is_plain_json():
    for scheduler in (ddim(), DPMSolverMultistepScheduler(**LINEAR), UniPCMultistepScheduler(**LINEAR)):
        spec = Sampler(scheduler).spec()
        assert json.loads(json.dumps(spec, allow_nan=False)) == spec
    spec = Sampler(num_inference_steps=7, guidance_scale=2.0).spec()
    assert spec["scheduler"] == "DDIMScheduler"
    assert spec["scheduler_config"]["timestep_spacing"] == "leading"


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "HeunDiscrete"])
def test_a_named_scheduler_reverses_the_same_process(name):
    given = ddim()
    scheduler = scheduler_named(name, given.config)
    assert type(scheduler).__name__ == f"{name}Scheduler"
    torch.testing.assert_close(scheduler.alphas_cumprod, given.alphas_cumprod)
    assert not adds_noise(scheduler)
    again = Sampler.from_settings(json.loads(json.dumps(Sampler(scheduler, 7, 2.0, None).settings())))
    assert again.spec() == Sampler(scheduler, 7, 2.0, None).spec()
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = torch.ones(2), torch.zeros(2)
    drawn = [one(Counting(), noise, *condition) for one in (again, Sampler(scheduler, 7, 2.0, None))]
    assert torch.equal(*drawn)


def test_velocity_schedulers_and_noisy_ones_are_told_apart():
    flow = scheduler_named("FlowMatchEulerDiscrete", ddim().config)
    assert is_flow(flow)
    assert not adds_noise(flow)
    for name in ("DDPM", "EulerAncestralDiscrete", "LCM"):
        assert adds_noise(scheduler_named(name, ddim().config))
    with pytest.raises(ConfigError, match=r"diffusers has no DPMScheduler\. Did you mean DPMSolver"):
        scheduler_named("DPM", ddim().config)
    with pytest.raises(ConfigError, match=r"lacks 'scheduler_config'"):
        Sampler.from_settings({"scheduler": "DDIMScheduler"})
    with pytest.raises(ConfigError, match="This version of diffusers has no NewScheduler"):
        Sampler.from_settings({"scheduler": "NewScheduler", "scheduler_config": {}})
