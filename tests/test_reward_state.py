"""The random state of a reward in JSON and back, and what is no such state."""

import json

import numpy as np
import pytest
import torch

from branchcore.rewards import Rewards
from branchcore.rewards.state import check_state, load_state, state_of


class Kept:
    """A reward with any state."""

    def __init__(self, state=None):
        self.state = state

    def __call__(self, images, prompts):
        return {"r": torch.zeros(len(images))}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def through_json(state, rank=0):
    states = json.loads(json.dumps([state_of(Kept(state))]))
    return check_state(Kept(), states, rank, "here")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 5)])
def test_tensors_come_back_bit_for_bit(dtype, shape):
    tensor = (100 * torch.rand(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = through_json({"deep": [{"t": tensor}]})["deep"][0]["t"]
    assert found.dtype == dtype
    assert found.shape == shape
    assert torch.equal(found, tensor)


def test_a_generator_goes_on_where_it_was():
    generator = torch.Generator().manual_seed(3)
    torch.rand(7, generator=generator)
    found = through_json({"generator": generator.get_state()})
    wanted = torch.rand(5, generator=generator)
    other = torch.Generator()
    other.set_state(found["generator"])
    assert torch.equal(torch.rand(5, generator=other), wanted)


def test_json_values_come_back():
    big = np.random.default_rng(0).bit_generator.state
    state = {"numpy": big, "list": [1, 2.5, None, True, "é"], "tuple": (1, 2)}
    assert through_json(state) == {**state, "tuple": [1, 2]}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"rng": {"key": np.zeros(2)}},
            r"\['rng'\]\['key'\] must be a JSON value or a tensor, got nd",
        ),
        ({"a": [{1: 2}]}, r"state_dict\(\)\['a'\]\[0\] must have text keys, got \[1\]"),
    ],
)
def test_other_states_are_refused(state, message):
    with pytest.raises(TypeError, match=message):
        state_of(Kept(state))


def damaged(kind):
    state = state_of(Kept({"t": torch.arange(3)}))
    held = state["t"]
    if kind == "short":
        held["base64"] = held["base64"][:-4]
    if kind == "text":
        held["base64"] = "?"
    if kind == "shape":
        held["shape"] = None
    if kind == "dtype":
        held["torch.Tensor"] = "nn"
    return state


@pytest.mark.parametrize("kind", ["short", "text", "shape", "dtype"])
def test_damaged_tensors_are_refused(kind):
    with pytest.raises(ValueError, match="reward: here must hold whole tensors, got"):
        check_state(Kept(), [damaged(kind)], 0, "here")


def test_a_rank_takes_its_own_state_and_new_ones_share():
    states = [state_of(Kept(rank + 0.5)) for rank in range(3)]
    assert [check_state(Kept(), states, rank, "x") for rank in range(5)] == [
        0.5,
        1.5,
        2.5,
        0.5,
        1.5,
    ]


def test_weights_of_a_module_are_no_state():
    class Plain(torch.nn.Linear):
        pass

    class Own(torch.nn.Linear):
        def state_dict(self):
            return {"draws": 3}

        def load_state_dict(self, state):
            self.draws = state["draws"]

    assert state_of(Plain(2, 2)) is None
    assert state_of(lambda images, prompts: {}) is None
    own = Own(2, 2)
    load_state(own, check_state(own, [state_of(own)], 0, "x"))
    assert own.draws == 3
    load_state(Plain(2, 2), None)


def test_several_rewards_keep_theirs_by_name():
    first, second = Kept(1), Kept(torch.ones(2))
    held = state_of(Rewards({"a": first, "plain": torch.nn.Linear(1, 1), "b": second}))
    assert list(held) == ["a", "b"]
    again = Rewards({"a": Kept(), "b": Kept()})
    load_state(again, check_state(again, [json.loads(json.dumps(held))], 0, "x"))
    assert again.rewards["a"].state == 1
    assert torch.equal(again.rewards["b"].state, torch.ones(2))
    with pytest.raises(ValueError, match=r"state must be of the rewards \['a'\], got \['a', 'b'\]"):
        load_state(Rewards({"a": Kept()}), held)
    for reward, states, wanted in ((Kept(), [None], "a state"), (torch.nn.Linear(1, 1), [1], "no")):
        with pytest.raises(
            ValueError, match=f"reward: here must hold {wanted}.* of {type(reward).__name__}, got"
        ):
            check_state(reward, states, 0, "here")
