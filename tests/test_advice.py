"""Warnings fire for the histories that they are about, once, and for no other."""

import dataclasses
import json
import random
import warnings

import pytest
import torch

from branchcore import recipes, schedule
from branchcore.advice import Advice, clip_of
from branchcore.matching import AdvantageMatching
from branchcore.objective import ClippedRatio, MaskedRatio
from branchcore.run_report.facts import WARNING
from branchcore.trainer import Trainer
from branchcore.trainer_config import TrainerConfig


def rows(count, **metrics):
    """A healthy history, with metrics that are numbers or functions of the iteration."""
    usual = {
        "reward": 1.0, "reward/a": 0.5, "reward/b": 0.5, "reward_std/a": 0.2, "reward_std/b": 0.1,
        "zero_std_share": 0.1, "ratio_dev_mean": 1e-4, "ratio_dev_max": 1e-3, "clip_share": 0.2,
        "grad_norm": 1.0, "leaves": 100, "masked_leaves": 0, "noise_floor": 1e-6,
    }  # fmt: skip
    chosen = usual | {name.replace("__", "/"): value for name, value in metrics.items()}
    made = []
    for i in range(1, count + 1):
        values = {name: v(i) if callable(v) else v for name, v in chosen.items()}
        made.append({"iteration": i, **{k: v for k, v in values.items() if v is not None}})
    return made


def said(history, clip=1e-3):
    """(iteration, text) of all that an adviser says."""
    advice = Advice(clip)
    texts = [(row["iteration"], text) for row in history for text in advice(row)]
    assert all(WARNING.match(text) for _, text in texts), "a report shows cause and cure apart"
    return texts


def when(history, clip=1e-3):
    return [iteration for iteration, _ in said(history, clip)]


def test_a_healthy_run_is_left_alone():
    noise = random.Random(0)
    history = rows(
        400,
        reward=lambda i: 1.0 + 0.01 * i + noise.gauss(0, 0.1),
        reward_std__a=lambda i: 0.2 + noise.gauss(0, 0.02),
        grad_norm=lambda i: 2.0 ** noise.gauss(0, 0.5),
        eval__diversity=lambda i: 0.3 + noise.gauss(0, 0.01) if i % 20 == 0 else None,
        eval__reward=lambda i: 1.0 + 0.01 * i if i % 20 == 0 else None,
    )
    assert said(history) == []


def at(*iterations, high, low):
    return lambda i: high if i in iterations else low


def between(first, last, inside, outside):
    return lambda i: inside if first <= i <= last else outside


def test_a_cause_is_named_once_until_it_was_away_for_twenty_iterations():
    for away, expected in [(19, [3]), (20, [3, 4 + 20])]:
        history = rows(40, clip_share=at(3, 4 + away, high=0.6, low=0.1))
        assert when(history) == expected
    assert when(rows(300, clip_share=0.6)) == [1]


def test_the_noise_floor():
    found = said(rows(5, noise_floor=lambda i: 2e-3 if i > 1 else None))
    assert found == [
        (
            2,
            "noise_floor: the clip range must exceed the noise floor of the log ratio, got clip "
            "0.001 below 2.0e-03 (unchanged weights at another batch shape); try a larger clip, "
            "clip_floor=2 or updates=1",
        )
    ]
    assert said(rows(5, noise_floor=1e-3)) == []
    assert said(rows(5, noise_floor=1.0, ratio_dev_mean=0.0), clip=None) == []
    assert said(rows(5, noise_floor=2e-3, clip=4e-3)) == []


def test_the_smaller_clip_counts():
    assert clip_of(ClippedRatio(clip=(1e-3, 1e-4))) == 1e-4
    assert clip_of(MaskedRatio()) is None  # its clip range is infinite
    assert clip_of(AdvantageMatching()) is None


def test_clipping():
    assert said(rows(5, clip_share=0.5)) == []
    ((first, text),) = said(rows(5, clip_share=lambda i: 0.51 if i >= 3 else 0.4))
    assert first == 3
    assert "clip_share: must be below half of the trained edges, got 0.51" in text
    assert "for a clip range of 0.001" in text
    assert "try a smaller lr, fewer updates or a larger clip" in text
    ((_, text),) = said(rows(5, clip_share=0.51), clip=None)
    assert "clip range of" not in text


@pytest.mark.parametrize(("clip", "limit"), [(1e-3, 1e-2), (0.2, 0.5), (None, 0.5)])
def test_a_ratio_far_from_one(clip, limit):
    assert said(rows(5, ratio_dev_mean=0.99 * limit), clip) == []
    ((first, text),) = said(rows(5, ratio_dev_mean=1.01 * limit), clip)
    assert first == 1
    assert f"ratio_dev_mean: |ratio - 1| must be below {limit:g} on average" in text
    assert "far from the one that sampled" in text


def test_masked_leaves():
    assert said(rows(5, masked_leaves=1, leaves=99)) == []
    assert said(rows(5, masked_leaves=None)) == []
    ((first, text),) = said(rows(5, masked_leaves=lambda i: 2 if i == 4 else 0))
    assert first == 4
    assert "masked_leaves: must be at most 1% of the leaves, got 2 of 102" in text
    assert when(rows(5, masked_leaves=3, leaves=0)) == [1]


def test_a_spike_of_the_gradient():
    assert when(rows(30, grad_norm=at(10, high=11.0, low=1.0))) == []  # nine are not enough
    ((first, text),) = said(rows(30, grad_norm=at(11, high=11.0, low=1.0)))
    assert first == 11
    assert (
        "grad_norm: must be below 10 times its median, got 11 after a median of 1 over 10" in text
    )
    assert when(rows(30, grad_norm=at(11, high=9.9, low=1.0))) == []
    assert when(rows(30, grad_norm=at(20, high=float("nan"), low=1.0))) == []
    # rising slowly is no spike, and old norms are forgotten
    assert when(rows(200, grad_norm=lambda i: 1.05**i)) == []
    assert when(rows(200, grad_norm=lambda i: 1.0 if i <= 60 else 8.0)) == []


def test_groups_without_spread_name_their_reward():
    same = {"reward_std__a": 1e-9}
    assert when(rows(20, zero_std_share=between(3, 6, 0.6, 0.5), **same)) == []
    ((first, text),) = said(rows(20, zero_std_share=between(3, 7, 0.6, 0.5), **same))
    assert first == 7
    assert "zero_std_share: must be below half of the (prompt, reward) groups, got 0.60" in text
    assert "(reward/a: the same score for all leaves of a prompt)" in text
    assert "reward/b" not in text
    ((_, text),) = said(rows(20, zero_std_share=0.9, reward_std__a=0.0, reward_std__b=0.0))
    assert "(reward/a and reward/b: the same score" in text
    ((first, text),) = said(rows(20, zero_std_share=0.6))
    assert first == 5
    assert "(prompts that are too easy or too hard)" in text


def test_a_saturated_reward():
    def falls(i):
        return 0.2 if i <= 10 else 0.009

    risen = {"reward__a": lambda i: 0.5 if i <= 10 else 0.99}
    ((first, text),) = said(rows(40, reward_std__a=falls, **risen))
    assert first == 15  # five in a row
    assert (
        "reward/a: the spread within a prompt must tell leaves apart, got 0.009 after 0.2" in text
    )
    assert "from 0.5 to 0.99" in text
    sunk = {"reward__a": lambda i: 0.5 if i <= 10 else 0.1}
    assert when(rows(40, reward_std__a=falls, **sunk)) == []
    assert when(rows(40, reward_std__a=lambda i: 0.2 if i <= 10 else 0.011, **risen)) == []
    assert when(rows(40, reward_std__a=0.0, **risen)) == []  # never had any spread
    assert when(rows(9, reward_std__a=lambda i: 0.2 if i <= 4 else 0.0, **risen)) == []


def evaluations(count, reward, diversity, every=5):
    def held_out(of):
        return lambda i: of(i // every) if i % every == 0 else None

    return rows(count * every, eval__reward=held_out(reward), eval__diversity=held_out(diversity))


def up(k):
    return 1.0 + 0.1 * k + 0.02 * (-1) ** k


def down(k):
    return 0.5 - 0.02 * k + 0.004 * (-1) ** k


def test_a_reward_that_rises_while_diversity_falls():
    ((first, text),) = said(evaluations(20, up, down))
    assert first == 50  # the tenth evaluation
    assert "got eval/diversity from 1.22 to 0.78 of its mean" in text
    assert "the reward from 1.08 to 2.02 over 10 points" in text
    assert "a larger kl" in text


@pytest.mark.parametrize(
    ("reward", "diversity"),
    [
        (up, lambda k: 0.5),
        (up, up),
        (down, down),
        (lambda k: 1.0, down),
        (lambda k: (-1.0) ** k, down),
        (up, lambda k: 0.5 - 0.001 * k),  # 2 % in all
        (up, lambda k: 0.5 - 0.01 * k + 0.2 * (-1) ** k),  # within chance
        (up, lambda k: float("nan")),
        (up, lambda k: 0.0),
    ],
)
def test_either_trend_alone_is_no_cause(reward, diversity):
    assert said(evaluations(20, reward, diversity)) == []


def test_diversity_that_fell_long_ago_is_no_cause():
    """The window slides: a trend over the first ten evaluations is gone twenty later."""
    history = evaluations(60, lambda k: up(min(k, 10)), lambda k: down(min(k, 10)))
    advice, last = Advice(1e-3), None
    for row in history:
        if advice._away.get("diversity") == 0:
            last = row["iteration"]
        advice(row)
    assert when(history) == [50]
    assert last < 120


def test_the_spread_of_rewards_stands_in_for_diversity():
    """Every reward counts alike, whatever its scale; without evaluations, 20 iterations a point."""
    rising = {"reward": lambda i: 1.0 + 0.01 * i}
    fall = {"reward_std__a": lambda i: 100 - 0.2 * i, "reward_std__b": lambda i: 0.2 - 0.0004 * i}
    ((first, text),) = said(rows(300, **rising, **fall))
    assert first == 200
    assert "got the spread of rewards within a prompt from 1." in text
    grow = {"reward_std__b": lambda i: 0.2 + 0.003 * i}
    assert when(rows(300, **rising, **(fall | grow))) == []
    evaluated = {"eval__other": lambda i: 1.0 if i % 7 == 0 else None}
    assert when(rows(300, **rising, **fall, **evaluated)) == [70]


def test_a_replay_leaves_the_same_state():
    history = rows(
        200,
        clip_share=lambda i: 0.6 if i % 50 < 3 else 0.1,
        grad_norm=lambda i: 20.0 if i in (40, 90, 160) else 1.0,
        reward_std__a=lambda i: 0.2 / i,
        reward__a=lambda i: 1 - 1 / i,
        eval__diversity=lambda i: 1 / i if i % 10 == 0 else None,
        eval__reward=lambda i: float(i) if i % 10 == 0 else None,
    )
    whole = said(history)
    assert len({text.split(":")[0] for _, text in whole}) == 4
    for cut in (1, 3, 43, 100, 155):
        advice = Advice(1e-3)
        advice.replay(json.loads(json.dumps(row)) for row in history[:cut])
        rest = [(r["iteration"], text) for r in history[cut:] for text in advice(r)]
        assert rest == [(i, text) for i, text in whole if i > cut]


SG = schedule.shifted_linear(4)
CONFIG = TrainerConfig(iterations=8, prompts_per_iteration=2, checkpoint_every=3)


def train(toy, out, iterations=8, resume=False):
    recipe = recipes.branch_mix(SG, splits=(0, 1), window=0, eta=0.7)

    def reward(images, prompts):
        same = torch.zeros(len(images))
        return {"dull": same, "flat": same + 1, "mean": images.flatten(1).mean(1)}

    config = dataclasses.replace(CONFIG, iterations=iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = toy(torch.float32)
        Trainer(model, ["a", "b"], reward, recipe, config, out, resume=resume).run()
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return lines, texts


@pytest.mark.parametrize("cut", [4, 5, 7])
def test_a_run_warns_logs_and_resumes_with_what_it_said(toy, tmp_path, cut):
    whole, texts = train(toy, tmp_path / "whole")
    assert [row.get("warnings") for row in whole] == [None] * 4 + [texts] + [None] * 3
    assert len(texts) == 1
    assert "(reward/dull and reward/flat: the same score for all leaves of a prompt)" in texts[0]
    _, first = train(toy, tmp_path / "cut", iterations=cut)
    resumed, second = train(toy, tmp_path / "cut", resume=True)
    assert [row.get("warnings") for row in resumed] == [row.get("warnings") for row in whole]
    assert first + second == texts
