"""The losses and the forward process against slow twins in plain Python."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.errors import ConfigError
from lightning_difftune.losses import eps_mse_loss, hybrid_loss, variational_loss

PROCESS = GaussianDiffusion()


def twin_of_variational_loss(output, x0, x_t, t):
    """Scalar by scalar in float64, from the definitions."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    bar = [math.prod(1 - b for b in betas[: i + 1]) for i in range(1000)]
    previous = [1.0, *bar[:-1]]
    variance = [betas[i] * (1 - previous[i]) / (1 - bar[i]) for i in range(1000)]
    log_variance_of_posterior = [math.log(variance[max(i, 1)]) for i in range(1000)]

    def posterior_mean(clean, noisy, i):
        return (
            betas[i] * math.sqrt(previous[i]) / (1 - bar[i]) * clean
            + (1 - previous[i]) * math.sqrt(1 - betas[i]) / (1 - bar[i]) * noisy
        )

    total = []
    for k in range(len(t)):
        i, bits = int(t[k]), []
        for eps, v, clean, noisy in zip(
            *(a[k].flatten().tolist() for a in (*output.chunk(2, 1), x0, x_t)), strict=True
        ):
            fraction = (v + 1) / 2
            log_variance = fraction * math.log(betas[i]) + (1 - fraction) * log_variance_of_posterior[i]
            predicted = (noisy - math.sqrt(1 - bar[i]) * eps) / math.sqrt(bar[i])
            mean, true_mean = posterior_mean(predicted, noisy, i), posterior_mean(clean, noisy, i)
            if i == 0:
                cdf = lambda z: 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))  # noqa: E731
                std = math.exp(0.5 * log_variance)
                upper, lower = cdf((clean - mean + 1 / 255) / std), cdf((clean - mean - 1 / 255) / std)
                mass = upper if clean < -0.999 else 1 - lower if clean > 0.999 else upper - lower
                nats = -math.log(max(mass, 1e-12))
            else:
                true = log_variance_of_posterior[i]
                nats = 0.5 * (
                    log_variance
                    - true
                    + math.exp(true - log_variance)
                    + (true_mean - mean) ** 2 * math.exp(-log_variance)
                    - 1
                )
            bits.append(nats / math.log(2))
        total.append(sum(bits) / len(bits))
    return torch.tensor(total)


def batch(t):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(len(t), 2, 3, 3, generator=generator).clamp(-1, 1) for _ in range(2))
    x_t = PROCESS.add_noise(x0, noise, t)
    output = torch.cat(
        [noise + 0.1 * torch.randn(noise.shape, generator=generator), torch.rand(noise.shape) * 2 - 1], 1
    )
    return output, x0, x_t, noise


def test_variational_loss_against_the_twin():
    t = torch.tensor([0, 0, 1, 2, 50, 500, 998, 999])
    output, x0, x_t, _ = batch(t)
    expected = twin_of_variational_loss(output, x0, x_t, t)
    torch.testing.assert_close(variational_loss(output, x0, x_t, t, PROCESS), expected, rtol=2e-4, atol=1e-5)


def test_hybrid_is_the_sum_and_freezes_the_mean():
    t = torch.tensor([0, 10, 999])
    output, x0, x_t, noise = batch(t)
    output.requires_grad_()
    mse = eps_mse_loss(output, x0, x_t, noise, t, PROCESS)
    vb = variational_loss(output, x0, x_t, t, PROCESS)
    assert torch.equal(hybrid_loss(output, x0, x_t, noise, t, PROCESS), mse + vb)
    (grad,) = torch.autograd.grad(vb.sum(), output)
    assert grad[:, :2].abs().max() == 0
    assert grad[:, 2:].abs().max() > 0


def test_mse_ignores_a_learned_variance():
    t = torch.tensor([3, 700])
    output, x0, x_t, noise = batch(t)
    expected = ((output[:, :2] - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(eps_mse_loss(output, x0, x_t, noise, t, PROCESS), expected)
    both = [eps_mse_loss(o, x0, x_t, noise, t, PROCESS) for o in (output, output[:, :2])]
    assert torch.equal(*both)


def test_hybrid_needs_a_learned_variance():
    t = torch.tensor([3, 700])
    output, x0, x_t, noise = batch(t)
    with pytest.raises(ConfigError, match="Use eps_mse_loss"):
        hybrid_loss(output[:, :2], x0, x_t, noise, t, PROCESS)


@pytest.mark.parametrize("betas", [(1e-4, 0.02, "linear"), (0.00085, 0.012, "scaled_linear")])
def test_process_agrees_with_diffusers(betas):
    scheduler = DDPMScheduler(1000, *betas)
    process = GaussianDiffusion(1000, *betas)
    t = torch.arange(1000)
    x0, noise = torch.randn(2, 1000, 1, 2, 2).unbind()
    torch.testing.assert_close(process.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(process.log_betas.exp(), scheduler.betas, rtol=1e-5, atol=0)


def test_predict_x0_inverts_add_noise():
    t = torch.tensor([0, 100, 500, 999])
    x0, noise = torch.randn(2, 4, 1, 2, 2).unbind()
    torch.testing.assert_close(PROCESS.predict_x0(PROCESS.add_noise(x0, noise, t), noise, t), x0, rtol=1e-3, atol=1e-3)


def test_bad_betas_are_refused():
    with pytest.raises(ConfigError, match="0 < beta_start <= beta_end < 1"):
        GaussianDiffusion(beta_start=0.02, beta_end=1e-4)
    with pytest.raises(ConfigError, match="'linear' or 'scaled_linear', found 'cosine'"):
        GaussianDiffusion(beta_schedule="cosine")
