"""Loss weightings against slow twins of their papers' formulas, for every prediction type and both beta schedules."""

import math

import numpy as np
import pytest
import torch

from lightning_difftune import DiffTuningObjective, PowerSchedule
from lightning_difftune.diffusion import GaussianDiffusion, RectifiedFlow
from lightning_difftune.errors import ConfigError
from lightning_difftune.losses import (
    eps_mse_loss,
    hybrid_loss,
    v_mse_loss,
    variational_loss,
    velocity_mse_loss,
    x0_mse_loss,
)
from lightning_difftune.weightings import LossWeighting, MinSNRWeighting, P2Weighting

STABLE_DIFFUSION = (1000, 0.00085, 0.012, "scaled_linear")
PROCESSES = {"linear": GaussianDiffusion(), "scaled_linear": GaussianDiffusion(*STABLE_DIFFUSION)}
LOSSES = {"epsilon": eps_mse_loss, "v_prediction": v_mse_loss, "sample": x0_mse_loss}
T = torch.tensor([0, 1, 50, 200, 500, 998, 999])


def snr_of(name, t):
    """SNR(t) from the definition, in float64."""
    if name == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(t + 1)]
    else:
        betas = [(math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2 for i in range(t + 1)]
    bar = math.prod(1 - beta for beta in betas)
    return bar / (1 - bar)


def min_snr(snr, gamma, prediction):
    """Hang et al. (2023): the weight in the loss of each prediction type."""
    return {
        "epsilon": min(snr, gamma) / snr,
        "v_prediction": min(snr, gamma) / (snr + 1),
        "sample": min(snr, gamma),
    }[prediction]


def p2(snr, k, gamma, prediction):
    """Choi et al. (2022) for eps; ||eps - eps'||^2 = abar ||v - v'||^2 = SNR ||x0 - x0'||^2 for the others."""
    return {"epsilon": 1.0, "v_prediction": snr / (snr + 1), "sample": snr}[prediction] / (k + snr) ** gamma


def batch(process):
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = (torch.randn(len(T), 2, 3, 3, generator=generator) for _ in range(3))
    return output, x0, process.add_noise(x0, noise, T), noise, T, process


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction", LOSSES)
@pytest.mark.parametrize(
    ("weighting", "twin"),
    [
        (MinSNRWeighting(gamma=5), lambda snr, prediction: min_snr(snr, 5, prediction)),
        (P2Weighting(k=1, gamma=1), lambda snr, prediction: p2(snr, 1, 1, prediction)),
        (P2Weighting(k=2, gamma=0.5), lambda snr, prediction: p2(snr, 2, 0.5, prediction)),
    ],
    ids=["Min-SNR", "P2", "P2 with k and gamma"],
)
def test_weights_against_the_twin(name, prediction, weighting, twin):
    assert isinstance(weighting, LossWeighting)
    arguments = batch(PROCESSES[name])
    plain = LOSSES[prediction](*arguments).double().numpy()
    weighted = LOSSES[prediction](*arguments, weighting=weighting).double().numpy()
    expected = np.array([twin(snr_of(name, int(t)), prediction) for t in T])
    np.testing.assert_allclose(weighted, plain * expected, rtol=2e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_what_v_and_x0_are(name):
    """Each loss is the error of what it is named after, by the definitions in float64."""
    process = PROCESSES[name]
    output, x0, x_t, noise = (tensor.double() for tensor in batch(process)[:4])
    for i, t in enumerate(T.tolist()):
        bar = snr_of(name, t) / (1 + snr_of(name, t))
        v = math.sqrt(bar) * noise[i] - math.sqrt(1 - bar) * x0[i]
        for loss, target in ((v_mse_loss, v), (x0_mse_loss, x0[i]), (eps_mse_loss, noise[i])):
            found = loss(output.float(), x0.float(), x_t.float(), noise.float(), T, process)[i].item()
            assert found == pytest.approx((output[i] - target).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("weighting", [MinSNRWeighting(), P2Weighting()], ids=repr)
def test_one_weighting_is_one_objective_whatever_is_predicted(weighting):
    """The same denoiser, stated as eps, v or x0, has the same weighted loss."""
    process = PROCESSES["scaled_linear"]
    x0_hat, x0, x_t, noise = (tensor.double() for tensor in batch(process)[:4])
    t = T
    root = process.sqrt_alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    sigma = process.sqrt_one_minus_alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    eps_hat = (root * x0 + sigma * noise - root * x0_hat) / sigma
    outputs = {"sample": x0_hat, "epsilon": eps_hat, "v_prediction": root * eps_hat - sigma * x0_hat}
    losses = {
        name: LOSSES[name](output.float(), x0.float(), x_t.float(), noise.float(), t, process, weighting)
        for name, output in outputs.items()
    }
    torch.testing.assert_close(losses["v_prediction"], losses["epsilon"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses["sample"], losses["epsilon"], rtol=1e-3, atol=1e-5)


def test_flow_matching_is_weighted_as_its_noise_is():
    process = RectifiedFlow()
    x0, noise, velocity = torch.randn(3, len(T), 2, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    x_t = process.add_noise(x0, noise, T)
    s = ((T + 1) / 1000).view(-1, 1, 1, 1)
    eps_hat = x_t + (1 - s) * velocity
    for weighting in (MinSNRWeighting(), P2Weighting()):
        found = velocity_mse_loss(velocity, x0, x_t, noise, T, process, weighting)
        expected = (eps_hat - noise).square().flatten(1).mean(1)
        weights = [weighting.weights(torch.tensor(((1 - s) / s) ** 2)) for s in ((T + 1) / 1000).tolist()]
        torch.testing.assert_close(found, expected * torch.stack(weights), rtol=1e-3, atol=1e-5)


def test_the_variational_term_has_no_weight():
    output, x0, x_t, noise, t, process = batch(PROCESSES["linear"])
    output = torch.cat([output, output.tanh()], dim=1)
    weighting = P2Weighting()
    expected = eps_mse_loss(output, x0, x_t, noise, t, process) * weighting.weights(process.snr(t))
    expected = expected + variational_loss(output, x0, x_t, t, process)
    torch.testing.assert_close(hybrid_loss(output, x0, x_t, noise, t, process, weighting), expected)


def test_the_objective_weights_both_streams_over_its_own_process():
    process = PROCESSES["scaled_linear"]
    objective = DiffTuningObjective(PowerSchedule(), v_mse_loss, 1.0, process, weighting=MinSNRWeighting())
    _, x0, _, noise, t, _ = batch(process)
    is_retention = torch.arange(len(t)) % 2 == 1
    found = objective.at(lambda x_t, t, condition: 0.3 * x_t, x0, None, is_retention, t, noise)
    x_t = process.add_noise(x0, noise, t)
    error = v_mse_loss(0.3 * x_t, x0, x_t, noise, t, process)
    weights = torch.tensor([min_snr(snr_of("scaled_linear", int(one)), 5, "v_prediction") for one in t])
    torch.testing.assert_close(found.per_sample, (error * weights).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.loss, found.per_sample[::2].mean() + found.per_sample[1::2].mean())


def test_senseless_settings_are_refused():
    with pytest.raises(ConfigError, match="positive gamma, got 0"):
        MinSNRWeighting(gamma=0)
    with pytest.raises(ConfigError, match="k = 0"):
        P2Weighting(k=0)
    with pytest.raises(ConfigError, match="gamma = -1"):
        P2Weighting(gamma=-1)
    output, x0, x_t, noise, t, _ = batch(PROCESSES["linear"])
    with pytest.raises(ConfigError, match=r"v_mse_loss needs a GaussianDiffusion.*velocity_mse_loss"):
        v_mse_loss(output, x0, x_t, noise, t, RectifiedFlow())
