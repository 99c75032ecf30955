"""What is particular to Wan and SANA: sizes, variants, schedulers, text, parts kept in fp32."""

import json
import shutil

import pytest
import tiny_pipelines
import torch

from branchcore.models import sana, wan
from branchcore.models.schedules import flow_sigmas, timestep_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPTS = ["a bold cat", "thin dog on the house"]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
RELEASED = {
    "wan": ("UniPCMultistepScheduler", FLOW),
    "sana": ("DPMSolverMultistepScheduler", FLOW | {"algorithm_type": "dpmsolver++"}),
}


@pytest.fixture(params=RELEASED)
def name(request):
    return request.param


@pytest.fixture
def tiny(name, tiny_folder):
    return tiny_pipelines.Tiny(name, tiny_folder(name))


@pytest.fixture
def change(tmp_path):
    """Returns a function that copies a tiny pipeline with other configuration entries."""

    def changed(tiny, index=None, transformer=None):
        folder = shutil.copytree(tiny.folder, tmp_path / "changed")
        for file, new in (("model_index", index), ("transformer/config", transformer)):
            path = folder / f"{file}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | (new or {})))
        return folder

    return changed


def released(tiny, change, **options):
    """The pipeline with the scheduler that the released weights come with."""
    cls, config = RELEASED[tiny.name]
    folder = change(tiny, index={"scheduler": ["diffusers", cls]})
    getattr(diffusers, cls)(**config, **options).save_pretrained(folder / "scheduler")
    return folder


def plain(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def states(model, count):
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(1))


def test_released_schedulers_give_levels_from_1_to_0(tiny, change):
    model = tiny.load(released(tiny, change))
    sigmas = model.sigmas(4)
    t = torch.linspace(1, 1 / 1000, 5, dtype=torch.float64)
    grid = t[:-1] if tiny.name == "wan" else 1 - t.flip(0)[:-1]
    expected = [*(3 * grid / (1 + 2 * grid)).tolist(), 0.0]
    assert expected[0] > 0.999
    assert sigmas.tolist() == pytest.approx([1.0, *expected[1:]], abs=1e-7)


def test_whole_timesteps_are_the_schedulers_own_at_any_number_of_steps(name):
    cls, config = RELEASED[name]
    scheduler = getattr(diffusers, cls)(**config)
    for steps in range(1, 101):
        sigma = torch.from_numpy(flow_sigmas(name, scheduler, steps)[:-1]).float()
        assert torch.equal(timestep_of(sigma, True), scheduler.timesteps.float()), steps


def test_released_schedulers_condition_on_whole_timesteps(tiny, change):
    folder = released(tiny, change)
    model = tiny.load(folder, integer_timesteps=True)
    pipe = plain(folder)
    step, seen = pipe.scheduler.step, []

    def recorded(prediction, time, sample, *args, **kwargs):
        seen.append((int(time), sample, prediction))
        return step(prediction, time, sample, *args, **kwargs)

    pipe.scheduler.step = recorded
    pipe(
        prompt=PROMPTS, latents=states(model, 2), num_inference_steps=4, output_type="latent",
        **tiny.spec.SIZE, **tiny.spec.call(1.0),
    )  # fmt: skip
    view, told = model.with_prompts(PROMPTS), []
    model.module.register_forward_pre_hook(
        lambda _, __, kwargs: told.append(kwargs["timestep"]), with_kwargs=True
    )
    scale = getattr(model.module.config, "timestep_scale", 1.0)
    for level, (time, x, v) in zip(model.sigmas(4)[:-1], seen, strict=True):
        with torch.no_grad():
            got = view.velocity(x, torch.full((2,), float(level)), torch.arange(2))
        assert torch.equal(told[-1], torch.full((2,), float(time)) * scale)
        assert float((got - v).abs().max()) <= 1e-5
    model.family.integer_timesteps = False
    with torch.no_grad():
        view.velocity(x, torch.full((2,), 0.8184), torch.arange(2))
    assert float(told[-1][0]) == pytest.approx(818.4 * scale)


def test_a_scheduler_of_diffusion_is_refused(tiny, change):
    model = tiny.load(released(tiny, change))
    model.pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match=r"scheduler must start at sigma 1, got .* DPMSolver"):
        model.sigmas(4)


def test_wan_takes_4_k_and_1_frames(tiny_folder):
    for frames, near in ((0, 1), (4, 5), (32, 33), (-3, 1)):
        with pytest.raises(ValueError, match=f"4 k [+] 1, got {frames}; try {near}$"):
            wan.from_pretrained(tiny_folder("wan"), height=32, width=32, num_frames=frames)
    tiny = tiny_pipelines.Tiny("wan", tiny_folder("wan"))
    assert tiny.load(num_frames=1).latent_shape == (4, 1, 4, 6)
    model = tiny.load(num_frames=9)
    assert model.latent_shape == (4, 3, 4, 6)
    model.decode_batch = 1
    assert model.decode(states(model, 2)).shape == (2, 9, 3, 32, 48)


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("index", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}),
        ("index", {"boundary_ratio": 0.9}),
        ("index", {"expand_timesteps": True}),
        ("transformer", {"image_dim": 1280}),
        ("transformer", {"added_kv_proj_dim": 24}),
        ("transformer", {"in_channels": 36}),
    ],
)
def test_wan_refuses_what_is_not_text_to_video_2_1(file, entry, tiny_folder, change):
    tiny = tiny_pipelines.Tiny("wan", tiny_folder("wan"))
    wrong = f"must be Wan 2.1 text to video .* got a configuration with {next(iter(entry))}$"
    with pytest.raises(NotImplementedError, match=wrong):
        tiny.load(change(tiny, **{file: entry}))


def test_sana_refuses_a_distilled_transformer(tiny_folder, change):
    tiny = tiny_pipelines.Tiny("sana", tiny_folder("sana"))
    with pytest.raises(NotImplementedError, match=r"SANA 1\.0 or 1\.5 .* with guidance_embeds$"):
        tiny.load(change(tiny, transformer={"guidance_embeds": True}))
    with pytest.raises(ValueError, match="height must be a positive multiple of 32, got 48; try"):
        sana.from_pretrained(tiny.folder, height=48)


def test_sana_uses_the_pipelines_instruction_unless_told(tiny_folder):
    tiny = tiny_pipelines.Tiny("sana", tiny_folder("sana"))
    pipe, arguments = plain(tiny.folder), tiny.spec.call(1.0)
    del arguments["complex_human_instruction"]
    found = {}
    for instruction in (None, (), ["a red cat"]):
        model = tiny.load(instruction=instruction)
        x = states(model, 2)
        view = model.with_prompts(PROMPTS)
        with torch.no_grad():
            found[instruction is None] = x - view.velocity(x, torch.ones(2), torch.arange(2))
        own = {} if instruction is None else {"complex_human_instruction": list(instruction)}
        expected = pipe(
            prompt=PROMPTS, latents=x, num_inference_steps=1, output_type="latent",
            **tiny.spec.SIZE, **arguments, **own,
        ).images  # fmt: skip
        assert float((found[instruction is None] - expected).abs().max()) <= 1e-5
    assert float((found[True] - found[False]).abs().max()) > 1e-3


def test_sana_counts_a_prompts_tokens_without_the_instructions(tiny_folder):
    tiny = tiny_pipelines.Tiny("sana", tiny_folder("sana"))
    for instruction in (["the bold house,"], ()):
        model = tiny.load(instruction=instruction)
        pipe, limit = model.pipe, model.family.max_text_tokens
        longest = next(n for n in range(99) if _cut(pipe, "z" * (n + 1), instruction, limit))
        model.encode(["z" * longest])
        with pytest.raises(ValueError, match=f"at most {limit} tokens, got {limit + 1} in 'zz"):
            model.encode(["z" * (longest + 1)])


def _cut(pipe, prompt, instruction, limit):
    """Whether the pipeline's own tokens of a prompt are not all of it."""
    before = "\n".join(instruction)
    start = len(pipe.tokenizer.encode(before)) - 2 if instruction else 0
    return len(pipe.tokenizer.encode(before + prompt)) > start + limit


def test_wan_keeps_in_fp32_what_its_class_wants(tiny_folder):
    tiny = tiny_pipelines.Tiny("wan", tiny_folder("wan"))
    loaded, exact = tiny.load(dtype=torch.bfloat16), tiny.load()
    cast = tiny.load().to(torch.bfloat16)
    kept = {"time_embedder", "scale_shift_table", "norm2"}
    for model in (loaded, cast):
        for name, parameter in model.module.named_parameters():
            whole = not kept.isdisjoint(name.split("."))
            assert parameter.dtype == (torch.float32 if whole else torch.bfloat16), name
        x, sigma = states(model, 2), torch.tensor([0.3, 0.9])
        with torch.no_grad():
            got, expected = (
                one.with_prompts(PROMPTS).velocity(x, sigma, torch.arange(2))
                for one in (model, exact)
            )
        assert got.dtype == torch.bfloat16
        assert float((got - expected).std()) <= 0.03 * float(expected.std())
