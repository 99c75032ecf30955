"""Flow-GRPO, or any other recipe, on Stable Diffusion 3 with a LoRA: the engine does it all."""

import branchcore as bc
from branchcore.models.sd3 import from_pretrained
from branchcore.models.weights import add_lora, facts, save_lora


def make(config, reward, log=print, method="flow_grpo", **options):
    """Returns a trainer; a tree takes other options than Flow-GRPO's group."""
    size = {"height": config.size[0], "width": config.size[1], "max_text_tokens": config.tokens}
    model = from_pretrained(config.model, **size, guidance=config.guidance, dtype=config.dtype)
    add_lora(model, rank=config.rank, seed=config.seed)
    options = options or {"group": config.group, "updates": config.updates}
    recipe = bc.recipes.build(method, model.sigmas(config.steps), kl=config.kl, **options)
    settings = bc.TrainerConfig(
        iterations=config.epochs,
        prompts_per_iteration=config.prompts_per_epoch,
        lr=config.lr,
        max_grad_norm=config.max_grad_norm,
        ema_decay=config.ema_decay,
        seed=config.seed,
    )
    return bc.Trainer(
        model, config.prompts, reward, recipe, settings, config.out,
        callbacks=[log], facts=facts(model),
    )  # fmt: skip


def train(config, reward, log=print, method="flow_grpo", **options):
    """Trains the LoRA and leaves its average in `config.out`."""
    trainer = make(config, reward, log, method, **options)
    trainer.run()
    with trainer.averaged():
        save_lora(trainer.model, f"{config.out}/lora")
