"""Flow-GRPO's stochastic step and its log-probability, in plain torch."""

import math

import torch


def sde_step_with_logprob(
    scheduler, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None
):
    """Returns the next states, their log-probabilities, their means and the diffusion g."""
    places = [scheduler.index_for_timestep(t) for t in timestep]
    shape = (-1, *[1] * (sample.ndim - 1))
    sigma = scheduler.sigmas[places].to(sample.dtype).view(shape)
    after = scheduler.sigmas[[i + 1 for i in places]].to(sample.dtype).view(shape)
    dt = sigma - after
    inner = torch.where(sigma == 1, scheduler.sigmas[1].to(sample.dtype), sigma)
    g = noise_level * torch.sqrt(sigma / (1 - inner))
    drift = g**2 / (2 * sigma)
    mean = sample * (1 - drift * dt) - model_output * (1 + drift * (1 - sigma)) * dt
    std = g * torch.sqrt(dt)
    if prev_sample is None:
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        prev_sample = mean + std * noise
    square = (prev_sample.detach() - mean) ** 2 / (2 * std**2)
    log_prob = -square - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return prev_sample, log_prob.mean(dim=tuple(range(1, mean.ndim))), mean, g
