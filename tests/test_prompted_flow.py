"""What a call is told from the host, and prompts, guidance and devices of a loaded model."""

import numpy as np
import pytest
import tiny_pipelines
import torch
from tiny_models import PROMPTS, randomise

from branchcore.model import call_velocity
from branchcore.models import prompted_flow

pytest.importorskip("diffusers")
SIGMA, PROMPT = torch.tensor([0.5, 0.5, 0.25]), torch.tensor([0, 1, 1])
HOST = (np.array([0.5, 0.5, 0.25]), np.array([0, 1, 1]))


@pytest.fixture
def model(copies):
    return copies("sd3").load()


@pytest.fixture
def told(monkeypatch):
    """The host's sigma and prompt of every call of the transformer."""
    seen, rows = [], prompted_flow.Rows

    def spy(sigma, prompt, device):
        seen.append((sigma, prompt))
        return rows(sigma, prompt, device)

    monkeypatch.setattr(prompted_flow, "Rows", spy)
    return seen


def states(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, *model.latent_shape, generator=generator, dtype=dtype)


def same(told, sigma, prompt):
    return np.array_equal(told[0], sigma) and np.array_equal(told[1], prompt)


@torch.no_grad()
def test_only_the_call_that_was_announced_uses_the_announcement(model, told):
    view, x = model.with_prompts(PROMPTS), states(model)
    call_velocity(view, x.flatten(1), SIGMA, PROMPT, host=HOST)
    assert told[-1][0] is HOST[0]
    assert told[-1][1] is HOST[1]
    view.velocity(x, SIGMA, PROMPT)
    assert told[-1][0] is not HOST[0]
    other = 1.0 - SIGMA, 2 - PROMPT
    view.announce(SIGMA, PROMPT, *HOST)
    for sigma, prompt in (other, (SIGMA, PROMPT)):
        view.velocity(x, sigma, prompt)
        assert same(told[-1], sigma, prompt)
        assert told[-1][0] is not HOST[0]
    with pytest.raises(RuntimeError):
        call_velocity(view, x[:, :1].flatten(1).repeat(1, 4)[:2], SIGMA, PROMPT, host=HOST)
    view.velocity(x, *other)
    assert same(told[-1], *other)


def test_both_halves_of_guidance_and_the_reference_use_it(copies, told):
    from branchcore.models.weights import add_lora

    model = copies("sd3").load()
    model.guidance = 3.0
    add_lora(model, rank=2)
    randomise(model)
    view, x, null = model.with_prompts(PROMPTS), states(model).flatten(1), len(PROMPTS)
    call_velocity(view, x, SIGMA, PROMPT, host=HOST)
    assert [one[0] is HOST[0] for one in told] == [True, True]
    assert [one[1].tolist() for one in told] == [[null] * 3, [0, 1, 1]]
    told.clear()
    with torch.no_grad():
        call_velocity(view, x, SIGMA, PROMPT, reference=True, host=HOST)
    assert same(told[0], np.tile(HOST[0], 2), [0, 1, 1, null, null, null])


def test_guidance_that_is_set_too_late_is_an_error(model):
    view, x = model.with_prompts(PROMPTS), states(model)
    model.guidance = 3.0
    with pytest.raises(
        ValueError, match=r"guidance must be 1 for prompts without .* got 3\.0; try"
    ):
        view.velocity(x, SIGMA, PROMPT)
    with torch.no_grad():
        guided = model.with_prompts(PROMPTS).velocity(x, SIGMA, PROMPT)
        model.guidance = 1.0
        assert not torch.equal(guided, view.velocity(x, SIGMA, PROMPT))


def test_prompts_are_texts(model):
    with pytest.raises(
        TypeError, match=r"must be a sequence of texts, got one str; try \['a cat'\]"
    ):
        model.encode("a cat")
    with pytest.raises(ValueError, match="prompts must be one or more texts, got none"):
        model.with_prompts([])


def test_everything_moves_to_another_device(tiny_folder):
    model = tiny_pipelines.Tiny("sd3", tiny_folder("sd3")).load()
    model.encode(PROMPTS)
    model.to("meta")
    parts = [part for part in model.pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 5
    for part in parts:
        assert all(tensor.device.type == "meta" for tensor in part.state_dict().values())
    assert model.with_prompts(PROMPTS).text["embeds"].device.type == "meta"
