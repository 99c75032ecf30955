"""Flow-GRPO on Stable Diffusion 3 with a LoRA, as its trainers are usually written."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model

from branchcore.hosts.flow_grpo import clipped_loss, sde_step_with_logprob

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
ATTENTION += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]


class Ema:
    """Average of the trained weights."""

    def __init__(self, parameters, decay):
        self.decay = decay
        self.average = [p.detach().clone() for p in parameters]

    def update(self, parameters):
        for kept, parameter in zip(self.average, parameters, strict=True):
            kept.lerp_(parameter.detach(), 1 - self.decay)


def load_pipeline(config, device):
    pipeline = StableDiffusion3Pipeline.from_pretrained(config.model, dtype=config.dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    lora = LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=ATTENTION)
    pipeline.transformer = get_peft_model(pipeline.transformer, lora)
    return pipeline


def choose_prompts(config, epoch):
    order = np.random.default_rng([config.seed, epoch]).permutation(len(config.prompts))
    return [config.prompts[i] for i in order[: config.prompts_per_epoch]]


@torch.no_grad()
def encode(pipeline, prompts, config):
    found = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        negative_prompt=[""] * len(prompts),
        max_sequence_length=config.tokens,
    )
    names = ("embeds", "negative", "pooled", "negative_pooled")
    return dict(zip(names, found, strict=True))


def predict(transformer, x, timestep, text, config):
    noise_pred = transformer(
        hidden_states=torch.cat([x, x]),
        timestep=torch.cat([timestep, timestep]),
        encoder_hidden_states=torch.cat([text["negative"], text["embeds"]]),
        pooled_projections=torch.cat([text["negative_pooled"], text["pooled"]]),
        return_dict=False,
    )[0]
    without, with_text = noise_pred.chunk(2)
    return without.detach() + config.guidance * (with_text - without.detach())


@torch.no_grad()
def decode(pipeline, latents):
    vae = pipeline.vae
    image = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor)[0]
    return (image / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def sample(pipeline, transformer, text, config):
    """Denoises a batch; returns its images, all states and all log-probabilities."""
    scheduler, count = pipeline.scheduler, len(text["embeds"])
    x = pipeline.prepare_latents(
        count,
        transformer.config.in_channels,
        *config.size,
        config.dtype,
        transformer.device,
        None,
    )
    scheduler.set_timesteps(config.steps)
    states, log_probs = [x], []
    for i, t in enumerate(scheduler.timesteps):
        noise_pred = predict(transformer, x, t.expand(count), text, config)
        level = config.noise_level if i < config.steps - 1 else 0.0
        x, log_prob, _, _ = sde_step_with_logprob(scheduler, noise_pred, t[None], x, level)
        states.append(x)
        log_probs.append(log_prob)
    return decode(pipeline, x), torch.stack(states, 1), torch.stack(log_probs, 1)


def evaluate_batch(pipeline, transformer, batch, j, config):
    """Scores a stored step; returns its log-probabilities, means and g."""
    t, x = batch["timesteps"][:, j], batch["states"][:, j]
    noise_pred = predict(transformer, x, t, batch, config)
    _, log_prob, mean, g = sde_step_with_logprob(
        pipeline.scheduler, noise_pred, t, x, config.noise_level, batch["states"][:, j + 1]
    )
    return log_prob, mean, g


def loss_of(pipeline, transformer, batch, j, config):
    """Returns the loss of one stored step of a batch."""
    log_prob, mean, g = evaluate_batch(pipeline, transformer, batch, j, config)
    a = batch["advantage"].clamp(-config.max_advantage, config.max_advantage)
    loss = clipped_loss(log_prob, batch["log_probs"][:, j], a, config.clip).loss
    if config.kl > 0:
        with torch.no_grad(), transformer.disable_adapter():
            _, base, _ = evaluate_batch(pipeline, transformer, batch, j, config)
        kl = ((mean - base) ** 2).flatten(1).mean(1) / (2 * g.flatten() ** 2)
        loss = loss + config.kl * kl.mean()
    return loss


def collect(pipeline, transformer, prompts, reward, config):
    """Samples a group per prompt; returns what training needs of all samples, shuffled."""
    repeated = [prompt for prompt in prompts for _ in range(config.group)]
    samples = defaultdict(list)
    for first in range(0, len(repeated), config.batch):
        part = repeated[first : first + config.batch]
        text = encode(pipeline, part, config)
        images, states, log_probs = sample(pipeline, transformer, text, config)
        timesteps = pipeline.scheduler.timesteps.repeat(len(part), 1)
        stored = {"states": states, "log_probs": log_probs, "timesteps": timesteps, **text}
        for name, value in (stored | reward(images, part)).items():
            samples[name].append(value)
    samples = {name: torch.cat(values) for name, values in samples.items()}
    groups = samples["reward"].view(-1, config.group)
    spread = groups.std(1, keepdim=True, correction=0)
    samples["advantage"] = ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()
    order = torch.randperm(len(repeated))
    return {name: value[order] for name, value in samples.items()}


def take_step(accelerator, optimizer, parameters, config):
    """Clips the gradient and takes a step, once enough has been accumulated."""
    if accelerator.sync_gradients:
        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def save(transformer, parameters, ema, config):
    """Writes the averaged LoRA."""
    own = [p.detach().clone() for p in parameters]
    for weights in (ema.average, own):
        for parameter, value in zip(parameters, weights, strict=True):
            parameter.data.copy_(value)
        if weights is ema.average:
            transformer.save_pretrained(Path(config.out) / "lora")


def train(config, reward, log=print):
    """Trains the LoRA and leaves its average in `config.out`."""
    accelerator = Accelerator(cpu=True)
    steps = config.steps - 1  # the last one is deterministic
    micro_steps = config.prompts_per_epoch * config.group // config.batch * steps
    accelerator.gradient_accumulation_steps = micro_steps // config.updates
    set_seed(config.seed)
    pipeline = load_pipeline(config, accelerator.device)
    parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=1e-4)
    transformer, optimizer = accelerator.prepare(pipeline.transformer, optimizer)
    ema = Ema(parameters, config.ema_decay)
    for epoch in range(config.epochs):
        prompts = choose_prompts(config, epoch)
        samples = collect(pipeline, transformer, prompts, reward, config)
        losses = []
        for i in range(0, len(samples["reward"]), config.batch):
            batch = {name: value[i : i + config.batch] for name, value in samples.items()}
            for j in range(steps):
                with accelerator.accumulate(transformer):
                    loss = loss_of(pipeline, transformer, batch, j, config)
                    losses.append(loss.detach())
                    accelerator.backward(loss)
                    take_step(accelerator, optimizer, parameters, config)
        metrics = {"reward": samples["reward"].mean(), "loss": torch.stack(losses).mean()}
        ema.update(parameters)
        log({"epoch": epoch} | {name: float(value) for name, value in metrics.items()})
    save(accelerator.unwrap_model(transformer), parameters, ema, config)
