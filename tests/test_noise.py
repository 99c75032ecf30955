"""Noise as a function: known answers, moments, names, and the log-ratio made from it."""

import math

import pytest
import torch

from branchcore import noise, ops, reference, testing
from branchcore.noise import Noise
from branchcore.reference.philox_normal import philox4x32


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
    ids=["zeros", "ones"],
)
def test_philox_known_answers(word: int, expected: tuple[int, ...]) -> None:
    """Random123's kat_vectors."""
    w = torch.tensor(word)
    assert tuple(int(out) for out in philox4x32((w, w, w, w), (w, w))) == expected


def plain(num_draws: int, seed: int = 1, uid: int = 0) -> Noise:
    counter = torch.tensor([[m, -1, uid] for m in range(num_draws)], dtype=torch.int32)
    mix = torch.tensor([[1.0, 0.0]]).double().expand(num_draws, 2)
    return Noise(torch.tensor([seed, 2, noise.LATENT]), counter, mix)


def test_fp32_normals_are_the_fp64_ones() -> None:
    exact = ops.philox_normal(plain(64), 16384, torch.float64)
    error = (ops.philox_normal(plain(64), 16384).double() - exact).abs()
    assert error.max() < 1.2e-6
    assert (error / exact.abs().clamp(min=1.0)).max() < 3e-7


def test_moments() -> None:
    z = ops.philox_normal(plain(64), 65536).double()
    count = z.numel()
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        spread = math.sqrt(math.prod(range(2 * power - 1, 0, -2)) / count)
        assert abs((z**power).mean() - moment) < 4.5 * spread, power
    neighbours = (z[:, 1:] * z[:, :-1]).mean(), (z[1:] * z[:-1]).mean()
    assert max(abs(value) for value in neighbours) < 4.5 / math.sqrt(count)
    tail = (z.abs() > 4.0).sum() / count
    assert abs(tail - math.erfc(4 / math.sqrt(2))) < 4.5 * math.sqrt(6.3e-5 / count)


def test_a_draw_is_named_by_all_of_its_words() -> None:
    base = plain(1)
    others = [base._replace(key=base.key + step) for step in torch.eye(3, dtype=torch.int64)] + [
        base._replace(counter=base.counter + torch.tensor([[s, 0, u]]).int())
        for s, u in ((1, 0), (0, 1))
    ]
    first = ops.philox_normal(base, 4096).double()
    for other in others:
        z = ops.philox_normal(other, 4096).double()
        assert abs((first * z).mean()) < 4.5 / 64


def test_a_prefix_is_the_same_numbers() -> None:
    long = ops.philox_normal(plain(3), 5000)
    assert all(torch.equal(ops.philox_normal(plain(3), n), long[:, :n]) for n in (1, 63, 2049))


def test_host_generator_is_a_pure_function() -> None:
    first = noise.host_generator(1, 2, 3).random(4)
    assert (noise.host_generator(1, 2, 3).random(4) == first).all()
    others = [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, 3, 2)]
    assert all((noise.host_generator(*words).random(4) != first).all() for words in others)


def test_log_ratio_in_velocity_space() -> None:
    """k p - k^2 q / 2 is the log-ratio to 1e-9 at 65,536 elements; fp32 log-probs lose 1e-8."""
    num_children, num_elements, s, b = 4, 65536, 0.3, -0.1
    draw = plain(num_children)
    v_old = testing.normal((1, num_elements), seed=1)
    v = v_old + 3e-3 * testing.normal((1, num_elements), seed=2)
    starts = torch.tensor([0, num_children])
    eps = ops.philox_normal(draw, num_elements, torch.float64)
    delta = v.double() - v_old.double()
    k = b / s
    exact = -0.5 * ((eps - k * delta).square() - eps.square()).mean(1)
    p, q = ops.edge_dots(v, v_old, starts, draw)
    assert (k * p.double() - 0.5 * k * k * q.double() - exact).abs().max() < 1e-9


def test_shared_stream_is_shared_by_siblings() -> None:
    draw = testing.draws((3,), ("mixed",))
    own = ops.philox_normal(
        draw._replace(mix=torch.tensor([[1.0, 0.0]]).double().expand(3, 2)), 512
    )
    shared = ops.philox_normal(draw, 512) - 0.8 * own
    assert (shared[0] - shared[1:]).abs().max() < 1e-6
    assert (reference.philox_normal(draw, 512) - 0.8 * own - shared).abs().max() < 1e-6
