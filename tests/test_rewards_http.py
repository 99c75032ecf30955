"""A reward behind a URL: what is sent, what is taken, and what is asked for again."""

import email.utils
import json
import math
import socket
import threading
import time

import faulty_rewards
import numpy as np
import pytest
import torch
from faulty_rewards import leaves

from branchcore import rewards
from branchcore.rewards import HttpReward, NoRetry, Retrying, RetryLater, RewardFailure, score
from branchcore.rewards.http_reward import _seconds


@pytest.fixture(autouse=True)
def _nothing_is_left_behind():
    with faulty_rewards.nothing_left_behind():
        yield


@pytest.fixture
def server(tmp_path):
    made = faulty_rewards.Server(tmp_path)
    yield made
    made.close()


def scored(request):
    images, prompts = request.read()
    means = images.double().flatten(1).mean(1).tolist()
    request.answer(json.dumps({"b": means, "len": [len(p) for p in prompts]}))


def then(first, *others):
    """Does the first once, the others once each; the last again and again."""
    acts = [first, *others]
    return lambda request: (acts.pop(0) if len(acts) > 1 else acts[0])(request)


def says(text, status=200, **headers):
    def act(request):
        request.read()
        request.answer(text, status, **headers)

    return act


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_images_and_prompts_arrive_as_they_are(server, dtype):
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator()).to(dtype)
    prompts = ["", "a cat", "zß\n"]
    server.act = scored
    got = HttpReward(server.url)(images, prompts)
    assert list(got) == ["b", "len"]
    assert torch.equal(got["b"], images.float().double().flatten(1).mean(1))
    assert got["len"].tolist() == [0.0, 5.0, 3.0]
    (request,) = server.requests
    assert request.path == "/score?model=a"
    assert request.headers["Content-Type"] == "application/octet-stream"


def test_levels_are_a_quarter_of_the_bytes(server):
    images = torch.tensor([0.0, 0.1, 0.5, 1.0, 1.3, -0.2])[:, None].expand(-1, 64)
    server.act = scored
    got = rewards.build(f"{server.url},name=x,dtype=uint8,timeout=9")(images, ["p"] * 6)
    assert got["b"].tolist() == [0.0, 26.0, 128.0, 255.0, 255.0, 0.0]
    assert len(server.requests[0].body) < 6 * 64 + 300


@pytest.mark.parametrize(
    "bad",
    [
        says("down for a moment", 500),
        says("", 503),
        says("slow down", 429),
        says("<html>proxy</html>"),
        says('{"b": [1.0, 2.0', Content_Length=10**4),
        says(b"\xff\xfe"),
        says("[" * 60000),
        says('{"b": [1, NaN, 2], "len": [2, 2, 2]}'),
        says('{"b": [1, 1e999, 2], "len": [2, 2, null]}'),
        lambda request: None,
        lambda request: (request.read(), request.wfile.write(b"hello\r\n")),
    ],
)
def test_what_may_pass_is_asked_for_again(server, bad):
    server.act = then(bad, bad, scored)
    images, prompts = leaves(3)
    got = score(Retrying(HttpReward(server.url), backoff_s=0.01), images, prompts)
    assert got.values.tolist() == [[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (says("no such model\n", 404), "must score 3 images, got 404 Not Found: no such model$"),
        (says("", 401), "got 401 Unauthorized"),
        (says("", 302, Location="http://elsewhere/"), "got 302 Found"),
        (says("", 204), "got 204 No Content"),
        (says("[1, 2, 3]"), r"return components by name, got b'\[1, 2, 3\]'"),
        (says("{}"), "return components by name, got b'{}'"),
        (says('{"b": [1, 2]}'), "with as many numbers for b, got 2"),
        (says('{"b": 1}'), "with as many numbers for b, got no list"),
        (says('{"b": [1, "2", 3]}'), "with numbers for b, got '2'"),
        (says('{"b": [1, true, 3]}'), "with numbers for b, got True"),
        (says('{"b": [1, [2], 3]}'), r"with numbers for b, got \[2\]"),
        (says(json.dumps({"b": [1, 2, 3], "x" * 70000: [1, 2, 3]})), "in at most 68608 bytes, got"),
    ],
)
def test_what_no_second_try_mends_is_an_error_at_once(server, bad, message):
    server.act = bad
    with pytest.raises(NoRetry, match=f"HttpReward: {server.url[:20]}.*{message}"):
        score(Retrying(HttpReward(server.url), max_failed_share=0.5), *leaves(3))
    assert len(server.requests) == 1


def test_a_refusal_is_read_though_nobody_took_the_images(server):
    server.act = lambda request: request.answer("too large", 413)
    with pytest.raises(NoRetry, match="got 413 Request Entity Too Large: too large"):
        HttpReward(server.url)(torch.zeros(4, 3, 1024, 1024), ["p"] * 4)


def test_a_huge_answer_is_not_read_to_its_end(server):
    def endless(request):
        request.read()
        request.send_response(200)
        request.end_headers()
        for _ in range(10**6):
            request.wfile.write(b" " * 2**16)

    server.act = endless
    started = time.monotonic()
    with pytest.raises(NoRetry, match="must score 2 images in at most 67584 bytes, got more"):
        HttpReward(server.url)(*leaves(2))
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("part", ["head", "body"])
def test_the_time_limit_is_for_the_whole_call(server, part):
    """A byte comes every now and then, each in time."""

    def trickling(request):
        request.read()
        if part == "body":
            request.send_response(200)
            request.end_headers()
        for _ in range(20):
            time.sleep(0.1)
            request.wfile.write(b" " if part == "body" else b"HTTP/1.1 200 OK\r\n"[_ : _ + 1])

    server.act = trickling
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"got TimeoutError: no answer within 0\.3 s"):
        HttpReward(server.url, timeout_s=0.3)(*leaves(2))
    assert time.monotonic() - started < 1.0
    assert "branchcore-reward-call" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(RuntimeError, match=r"got TimeoutError: no answer within 0\.2 s"):
        HttpReward(server.url).within(*leaves(2), 0.2)
    with pytest.raises(RewardFailure, match=r"no answer within 0\.2 s \(tries: 2\)"):
        score(Retrying(HttpReward(server.url), attempts=2, timeout_s=0.2, backoff_s=0), *leaves(2))


def test_a_server_that_is_not_there_is_asked_again():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    refused = r"must score 2 images, got ConnectionRefusedError: .* \(tries: 2\)"
    with pytest.raises(RewardFailure, match=refused):
        score(Retrying(HttpReward(url), attempts=2, backoff_s=0.01), *leaves(2))


def test_an_image_that_cannot_be_scored_is_masked(server):
    def picky(request):
        images, prompts = request.read()
        if "p3" in prompts:
            request.answer("cannot decode", 500)
        else:
            numbers = images[:, 0].tolist()
            request.answer(json.dumps({"b": [None if x == 6.0 else x for x in numbers]}))

    server.act = picky
    images, prompts = leaves(8)
    reward = Retrying(HttpReward(server.url), attempts=2, backoff_s=0.0, max_failed_share=0.25)
    got = score(reward, images, prompts)
    assert np.flatnonzero(got.masked).tolist() == [3, 5]
    assert got.values[~got.masked, 0].tolist() == [1.0, 2.0, 3.0, 5.0, 7.0, 8.0]
    assert np.isnan(got.values[got.masked]).all()


def test_a_busy_server_is_left_alone_for_as_long_as_it_says(server):
    server.act = then(says("busy", 429, Retry_After="1"), scored)
    started = time.monotonic()
    score(Retrying(HttpReward(server.url), backoff_s=0.0), *leaves(2))
    assert 1.0 <= time.monotonic() - started < 3.0
    server.act = says("busy", 503, Retry_After="17")
    with pytest.raises(RetryLater, match="got 503 Service Unavailable: busy") as caught:
        HttpReward(server.url)(*leaves(2))
    assert caught.value.after_s == 17.0


def test_retry_after_is_a_number_or_a_date():
    date = email.utils.formatdate(time.time() + 30.0, usegmt=True)
    assert 28.0 < _seconds(date) <= 30.0
    past = email.utils.formatdate(0.0, usegmt=True)
    assert [_seconds(x) for x in (None, "12", past, "soon", "-3", "nan")] == [0, 12, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "url",
    ["ftp://h/x", "http://", "http:///x", "h:80/x", "http://h:0/x", "http://h:99999/x",
     "http://h/a b", "http://h/x#y", "http://h/\n", "http://é/x"],
)  # fmt: skip
def test_addresses_are_checked(url):
    with pytest.raises(ValueError, match="HttpReward: url must be http://host"):
        HttpReward(url)


def test_a_password_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="got 'h/x'") as caught:
        HttpReward("http://me:secret@h/x")
    assert "secret" not in str(caught.value)


def test_other_settings_are_checked():
    for value in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="timeout_s must be positive and finite"):
            HttpReward("http://h/x", timeout_s=value)
    with pytest.raises(ValueError, match="dtype must be one of float32, uint8, got 'int8'"):
        HttpReward("http://h/x", dtype="int8")


def test_a_spec_is_its_address_and_its_options(server):
    server.act = scored
    reward = rewards.build([f"{server.url},name=x", f"{server.url},name=y,timeout=5"])
    assert [part.timeout_s for part in reward.rewards.values()] == [300.0, 5.0]
    assert list(reward(*leaves(2))) == ["x/b", "x/len", "y/b", "y/len"]
    specs = ["https://h:8/a?b=c,name=z", "clip=/x/y", "jpeg", "subprocess=a:b"]
    assert [rewards.kind_of(spec) for spec in specs] == ["http", "clip", "jpeg", "subprocess"]
