"""A pipeline that another trainer owns is lent as it is: weights, wrappers, flags, modes."""

import copy

import pytest
import tiny_pipelines
import torch

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from branchcore import recipes, updates  # noqa: E402
from branchcore.models.borrowed import from_pipeline  # noqa: E402

PROMPTS = ["a bold cat", "seven dogs"]


@pytest.fixture(scope="module", params=["sd3", "flux"])
def tiny(request, tiny_folder):
    return tiny_pipelines.Tiny(request.param, tiny_folder(request.param))


def lent(tiny, pipe, **options):
    size = tiny.spec.SIZE["height"], tiny.spec.SIZE["width"]
    return from_pipeline(pipe, *size, **{"guidance": 1.0, **tiny.spec.OPTIONS, **options})


def own(tiny):
    pipe = copy.copy(tiny.plain)
    pipe.transformer = copy.deepcopy(tiny.plain.transformer)
    return pipe


def velocity(model, reference=True):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, *model.latent_shape, generator=generator)
    with torch.no_grad():
        view = model.with_prompts(PROMPTS)
        args = x, torch.tensor([0.9, 0.9, 0.4]), torch.tensor([0, 1, 1])
        if reference:
            return view.velocity(*args), view.reference_velocity(*args)
        return view.velocity(*args)


def test_it_computes_what_the_loaded_family_does_and_touches_nothing(tiny):
    pipe = own(tiny)
    config = peft.LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False)
    pipe.transformer = peft.get_peft_model(pipe.transformer, config).train()
    before = {n: p.requires_grad for n, p in pipe.transformer.named_parameters()}
    forwards = {n for n, m in pipe.transformer.named_modules() if "forward" in vars(m)}
    model = lent(tiny, pipe)
    policy, reference = velocity(model)
    assert {n: p.requires_grad for n, p in pipe.transformer.named_parameters()} == before
    assert any(before.values())
    assert not all(before.values())
    assert pipe.transformer.training
    assert {n for n, m in pipe.transformer.named_modules() if "forward" in vars(m)} == forwards
    assert (policy - reference).abs().max() > 1e-3
    loaded = tiny.load(negative_prompt="")
    torch.testing.assert_close(reference, velocity(loaded, reference=False), rtol=1e-4, atol=1e-5)


def test_dtype_and_wrappers_are_looked_through(tiny):
    pipe = own(tiny)
    pipe.transformer = pipe.transformer.to(torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["attn.to_q"])
    pipe.transformer = peft.get_peft_model(pipe.transformer, config)
    model = lent(tiny, pipe)
    assert model.dtype == torch.bfloat16
    assert model.module is pipe.transformer.get_base_model()
    assert model.sharing is None
    assert lent(tiny, pipe, share=True).sharing is not None


def test_what_cannot_be_lent_is_refused(tiny_folder):
    sd3 = tiny_pipelines.Tiny("sd3", tiny_folder("sd3"))
    pipe = own(sd3)
    with pytest.raises(ValueError, match=r"must be one of .*StableDiffusion3Pipeline.*, got dict"):
        from_pipeline({}, 16, 16, guidance=1.0)
    with pytest.raises(ValueError, match="height must be a positive multiple of 16, got 20"):
        from_pipeline(pipe, 20, 16, guidance=1.0)
    with pytest.raises(ValueError, match="guidance must be at least 1"):
        from_pipeline(pipe, 16, 16, guidance=0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'text_tokens'"):
        from_pipeline(pipe, 16, 16, guidance=1.0, text_tokens=3)
    config = peft.LoraConfig(r=2, target_modules=["attn.to_q"], lora_dropout=0.1)
    pipe.transformer = peft.get_peft_model(pipe.transformer, config)
    with pytest.raises(ValueError, match=r"must have no dropout, got 0\.1 at .*attn\.to_q"):
        from_pipeline(pipe, 16, 16, guidance=1.0)


def test_autocast_around_an_iteration_computes_in_bf16(tiny_folder):
    sd3 = tiny_pipelines.Tiny("sd3", tiny_folder("sd3"))
    pipe = own(sd3)
    pipe.transformer.requires_grad_(False)
    config = peft.LoraConfig(r=2, target_modules=["attn.to_q"], init_lora_weights=False)
    pipe.transformer = peft.get_peft_model(pipe.transformer, config)
    model = lent(sd3, pipe, guidance=3.0)
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    recipe = recipes.flow_grpo(model.sigmas(3), group=3, kl=0.04)

    def gradient():
        for _ in updates(model, recipe, PROMPTS, brightness, iteration=0):
            found = torch.cat([p.grad.flatten() for p in parameters])
            pipe.transformer.zero_grad()
        return found

    exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        low = gradient()
    assert low.dtype == torch.float32
    assert 1e-4 < float((low - exact).norm() / exact.norm()) < 0.3


def brightness(images, prompts):
    # of two colours: what bf16 rounds is far below their spread
    return {"mean": images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))}
