"""What an iteration communicates on two processes is what the closed forms of the bench say."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
pytest.importorskip("diffusers")
import scaling
import scaling_forms as forms


@pytest.fixture(scope="module")
def found():
    return scaling.counted(2, few=True)


def test_two_processes_do_what_the_forms_say(found):
    assert {r["way"] for r in found} == {"replicate", "shard", "reshard"}
    assert len(found) == 6
    for case in found:
        assert scaling.check(case)["bytes"] > 0


@pytest.mark.parametrize("change", ["lost", "more bytes", "one control more"])
def test_the_check_sees_a_difference(found, change):
    case = next(r for r in found if r["way"] == "shard")
    seen = [tuple(s) for s in case["seen"]]
    where = next(i for i, (kind, _) in enumerate(seen) if kind == forms.GATHERS)
    if change == "lost":
        seen.pop(where)
    elif change == "more bytes":
        seen[where] = (forms.GATHERS, seen[where][1] + 8)
    else:
        seen.append((forms.CONTROL, 8))
    with pytest.raises(AssertionError):
        scaling.check({**case, "seen": seen})


def test_parts_are_padded_and_buckets_filled_in_order():
    assert forms.part_bytes([(5, 3), (4,)], 4, 4) == 4 * (8 * 3 + 4)
    assert forms.replicated([6, 6, 6], 2, 12) == forms.Sent(2, 18.0)
    assert forms.replicated([20, 6], 2, 12).number == 2


def test_a_released_loop_gathers_for_every_edge():
    parts = [[(4, 2)], [(8,)]]
    loop = forms.Loop("toy", rollout=3, edges=5, updates=1)
    whole = 0.5 * (8 + 8) * 4
    assert forms.released(loop, parts, 2) == forms.Sent((3 + 10 + 5) * 2, 18 * whole)


def test_parts_hold_every_parameter_once():
    module = torch.nn.Module()
    module.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    module.out = torch.nn.Linear(2, 1)
    parts = forms.parts_of(module)
    assert parts == [[(2, 2), (2,)]] * 3 + [[(1, 2), (1,)]]
