"""A module's pictures with the pre-trained network in them: Domain Guidance, swapped tails; and flow matching."""

import copy
from contextlib import nullcontext

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import tiny_dit

from lightning_difftune import DiTDiffTuningModule
from lightning_difftune.diffusion import RectifiedFlow
from lightning_difftune.draws import Draws
from lightning_difftune.errors import ConfigError
from lightning_difftune.losses import velocity_mse_loss
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.pictures import to_uint8
from lightning_difftune.protocols import SupportsDenoisingLosses
from lightning_difftune.sampling import Sampler, ddim, sample

STEPS = 6
INDICES = torch.arange(4)


def module_of(tuned=True, **settings):
    """A module whose network is not the pre-trained one any more, if it is tuned."""
    sampler = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "guidance_channels": None}
    domain = settings.pop("domain_guidance", False)
    settings = {
        "num_classes": 3,
        "label_table": "resize",
        "sampler": Sampler(**sampler, domain_guidance=domain),
    } | settings
    module = DiTDiffTuningModule(tiny_dit(), **settings)
    module.configure_model()
    if tuned:
        with torch.no_grad():
            for parameter in module.dit.parameters():
                parameter.add_(0.05)
    return module.eval()


def test_the_ends_of_a_swap_are_the_two_models():
    module = module_of()
    swapped = module.generate_swapped(INDICES, [1.0, 0.0, 0.5])
    assert swapped.shape == (3, 4, 1, 8, 8)
    assert swapped.dtype == torch.uint8
    assert torch.equal(swapped[1], module.generate(INDICES))
    null = torch.full((4,), 6)  # of the source, which has six classes and does not know the target's three
    pretrained = sample(tiny_dit(), module.start_noise(INDICES), module.sampler.scheduler, STEPS, null)
    assert torch.equal(swapped[0], to_uint8(pretrained))
    assert not torch.equal(swapped[2], swapped[0])
    assert not torch.equal(swapped[2], swapped[1])


def test_the_tail_can_be_another_tuned_module():
    module, other = module_of(), module_of(tuned=False)
    swapped = module.generate_swapped(INDICES, [0.0, 0.5, 1.0], tail=other)
    assert torch.equal(swapped[0], module.generate(INDICES))
    assert torch.equal(swapped[2], other.generate(INDICES))
    assert not torch.equal(swapped[1], module.generate_swapped(INDICES, [0.5])[0])  # its own label table and guidance


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 2}, "as 'one of 2 classes' that this model begins as 'one of 3 classes'"),
        ({"class_names": ["rose", "tulip", "daisy"]}, "as 'tulip' that this model begins as 'daisy'"),
    ],
)
def test_a_tail_of_other_classes_is_refused(settings, message):
    """It would finish a daisy as a tulip."""
    module = module_of(class_names=["rose", "daisy", "tulip"])
    with pytest.raises(ConfigError, match=message):
        module.generate_swapped(INDICES, [0.5], tail=module_of(**settings))
    module.generate_swapped(INDICES, [0.5], tail=module_of())  # its names are not known


def test_a_swapped_picture_depends_on_its_index_alone():
    module = module_of()
    together = module.generate_swapped(INDICES, [0.5])
    alone = module.generate_swapped(INDICES[2:3], [0.2, 0.5])
    assert (together[0, 2].int() - alone[1, 0].int()).abs().max() <= 1


def test_domain_guidance_is_plain_guidance_before_tuning_and_another_one_after():
    both = [
        {"domain_guidance": domain_guidance, "label_table": "keep", "num_classes": None}
        for domain_guidance in (False, True)
    ]
    plain, domain = (module_of(tuned=False, **settings).generate(INDICES).int() for settings in both)
    assert (plain - domain).abs().max() <= 1
    plain, domain = (module_of(tuned=True, **settings).generate(INDICES).int() for settings in both)
    assert (plain - domain).abs().max() > 1


def test_domain_guidance_guides_away_from_the_null_class_of_the_source():
    module, pretrained = module_of(domain_guidance=True), tiny_dit()
    labels, source_null = INDICES % 3, torch.full((4,), 6)

    def guided(x_t, t, condition):
        eps, eps_null = module.dit(x_t, t, labels)[:, :1], pretrained(x_t, t, source_null)[:, :1]
        return eps_null + 2.0 * (eps - eps_null)

    expected = sample(guided, module.start_noise(INDICES), module.sampler.scheduler, STEPS)
    assert (module.generate(INDICES).int() - to_uint8(expected).int()).abs().max() <= 1
    assert torch.equal(module.generate_swapped(INDICES, [0.0])[0], module.generate(INDICES))


def test_the_bank_is_the_same_with_domain_guidance():
    plain, domain = (module_of(domain_guidance=on).bank_generator() for on in (False, True))
    assert plain.bank_spec() == domain.bank_spec()
    assert torch.equal(plain.generate_bank(INDICES)["latents"], domain.generate_bank(INDICES)["latents"])


def test_the_frozen_copy_is_loaded_once_and_is_not_part_of_the_module():
    module = module_of()
    names = set(module.state_dict())
    frozen = module.frozen_denoiser()
    assert module.frozen_denoiser() is frozen
    assert set(module.state_dict()) == names
    assert all(parameter is not other for parameter in frozen.parameters() for other in module.parameters())
    module.to("meta")
    assert module.frozen_denoiser() is not frozen


FLOW = FlowMatchEulerDiscreteScheduler()


def test_flow_matching_is_a_loss_and_a_scheduler():
    objective = DiffTuningObjective(loss=velocity_mse_loss, diffusion=RectifiedFlow())
    module = module_of(tuned=False, objective=objective, sampler=Sampler(FLOW, STEPS, 1.5, None)).train()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "target": {
            "pixel_values": torch.rand(12, 1, 8, 8, generator=generator) - 0.5,
            "class_labels": torch.arange(12) % 3,
        },
        "retention": {"latents": torch.rand(4, 1, 8, 8, generator=generator)},
    }
    optimizer = torch.optim.Adam(module.trainable_parameters(), 1e-2)
    before = copy.deepcopy(module.dit.state_dict())
    losses = []
    for step in range(60):
        draws = Draws(0, step)
        output = module.objective(module.denoise, *module.prepare(batch, draws), draws)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert not torch.equal(before["final_layer.linear.weight"], module.dit.final_layer.linear.weight)
    assert module.generate(INDICES).shape == (4, 1, 8, 8)
    assert module.generate_swapped(INDICES, [0.0, 0.5]).shape == (2, 4, 1, 8, 8)
    assert module.bank_generator().bank_spec()["sampler"]["scheduler"] == "FlowMatchEulerDiscreteScheduler"


def test_a_scheduler_of_the_other_process_is_refused():
    flow = DiffTuningObjective(loss=velocity_mse_loss, diffusion=RectifiedFlow())
    with pytest.raises(ConfigError, match="predicts 'flow_prediction', but the sampler integrates with DDIMScheduler"):
        DiTDiffTuningModule(tiny_dit(), objective=flow, sampler=Sampler(ddim())).configure_model()
    with pytest.raises(ConfigError, match="the bank_sampler integrates with FlowMatchEulerDiscreteScheduler"):
        DiTDiffTuningModule(tiny_dit(), bank_sampler=Sampler(FLOW)).configure_model()


def test_the_losses_of_the_forgetting_meter_are_simple_ones():
    module = module_of()
    x0, t = torch.rand(3, 1, 8, 8) - 0.5, torch.tensor([0, 400, 999])
    labels, noise = torch.tensor([0, 1, 2]), torch.randn(3, 1, 8, 8)
    process = module.objective.diffusion
    x_t = process.add_noise(x0, noise, t)
    assert isinstance(module, SupportsDenoisingLosses)
    with torch.no_grad():
        found = module.denoising_losses(module.denoise, x0, labels, t, noise)  # of a hybrid loss, the noise part
        expected = (module.dit(x_t, t, labels)[:, :1] - noise).square().mean((1, 2, 3))
        source = module.denoising_losses(module.pretrained(), x0, module.source_condition(labels), t, noise)
        before = (tiny_dit()(x_t, t, torch.full((3,), 6))[:, :1] - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(source, before)


@pytest.mark.parametrize(
    ("scheduler", "steps", "tail", "said"),
    [
        (None, 10, 0.04, "a pretrained_tail of 0.04 is 0 of 10 steps, so that the pre-trained model would do none"),
        (None, 10, 0.99, "a pretrained_tail of 0.99 is 10 of 10 steps, so that the tuned model would do none"),
        ("HeunDiscrete", 10, 0.04, None),  # 19 steps
        ("HeunDiscrete", 10, 0.02, "a pretrained_tail of 0.02 is 0 of 19 steps"),
        (None, 10, 0.06, None),
        (None, 1000, 0.0, None),
        (None, 1001, 0.0, "the sampler: DDIMScheduler cannot take 1,001 steps: .*larger than .*1000"),
    ],
)
def test_a_pretrained_tail_is_a_part_of_the_steps(scheduler, steps, tail, said):
    module = DiTDiffTuningModule(tiny_dit())
    module.configure_model()
    with nullcontext() if said is None else pytest.raises(ConfigError, match=said):
        module.sampler = Sampler(scheduler, steps, pretrained_tail=tail)


@pytest.mark.parametrize("domain_guidance", [False, True])
def test_a_pretrained_tail_is_what_the_swap_draws_at_its_share(domain_guidance):
    plain = module_of(domain_guidance=domain_guidance)
    (swapped,) = plain.generate_swapped(INDICES, [0.5])
    plain.sampler.pretrained_tail = 0.5
    assert torch.equal(plain.generate(INDICES), swapped)
    assert torch.equal(plain.generate_swapped(INDICES, [0.0])[0], swapped), "fraction 0 is what generate draws"
    plain.sampler.pretrained_tail = 0.0
    assert not torch.equal(plain.generate(INDICES), swapped)


def test_a_pretrained_tail_is_not_the_banks_and_travels_with_the_settings():
    module = module_of(sampler=Sampler(num_inference_steps=STEPS, pretrained_tail=0.25))
    assert module.bank_sampler.pretrained_tail == 0
    assert Sampler.from_settings(module.sampler.settings()).pretrained_tail == 0.25
    assert "pretrained_tail" not in Sampler().spec(), "banks of earlier versions keep their spec"


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_pretrained_tail_outside_its_range_is_refused(share):
    with pytest.raises(ConfigError, match=r"pretrained_tail is the share .* \[0, 1\)"):
        Sampler(pretrained_tail=share)
