"""Flow-GRPO on Stable Diffusion 3 with a LoRA, as its trainers are usually written."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model

from branchcore import recipes, updates
from branchcore.models.borrowed import from_pipeline

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
    set_seed(config.seed)
    pipeline = load_pipeline(config, accelerator.device)
    parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=1e-4)
    transformer, optimizer = accelerator.prepare(pipeline.transformer, optimizer)
    ema = Ema(parameters, config.ema_decay)
    model = from_pipeline(
        pipeline, *config.size, guidance=config.guidance, max_text_tokens=config.tokens
    )
    options = {n: getattr(config, n) for n in ("group", "kl", "clip", "noise_level", "updates")}
    recipe = recipes.flow_grpo(model.sigmas(config.steps), **options)
    for epoch in range(config.epochs):
        prompts = choose_prompts(config, epoch)
        for metrics in updates(model, recipe, prompts, reward, iteration=epoch, seed=config.seed):
            take_step(accelerator, optimizer, parameters, config)
        ema.update(parameters)
        log({"epoch": epoch} | {name: float(value) for name, value in metrics.items()})
    save(accelerator.unwrap_model(transformer), parameters, ema, config)
