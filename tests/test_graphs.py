"""CUDA graphs of a rollout: buckets, weights that move, and what torch asks of a capture."""

import importlib
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from runtime_models import FAMILIES, PROMPTS, close, loader, rows

from branchcore.models import runtime
from branchcore.models.runtime import graphs
from branchcore.models.runtime.graphs import BucketedCalls, CudaCapture, padded


@pytest.fixture
def load(tiny_folder):
    return loader(tiny_folder)


def test_padded_rows_are_copies_of_the_first():
    x = torch.arange(6.0).view(3, 2)
    wide = padded(x, 4)
    assert wide.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    same = padded(x, 3)
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", FAMILIES)
def test_calls_in_buckets_equal_calls_of_their_own_size(name, load):
    model = load(name, guidance=1.0 if name in ("sd3", "flux") else 3.0)
    prompted, captured = model.with_prompts(PROMPTS), []

    def capture(call):
        """Repeats a call on the memory that a graph would read and write."""
        captured.append(call)
        result = call()
        return lambda: result.copy_(call())

    inputs = [rows(model, [s] * n, p) for n, s, p in ((1, 0.9, [0]), (3, 0.5, [0, 1, 2]))]
    inputs += [rows(model), rows(model, seed=1)]
    with torch.no_grad():
        plain = [prompted.velocity(*each) for each in inputs]
        model.rollout_predict = BucketedCalls(model, (2, 4), capture).predict
        replayed = [prompted.velocity(*each) for each in inputs]
    for ours, theirs in zip(replayed, plain, strict=True):
        close(ours, theirs, 3e-6)
    assert len(captured) == 2
    model.module.requires_grad_(True)
    assert prompted.velocity(*inputs[0]).requires_grad


def test_graphs_follow_weights_and_adapters(load):
    weights = importlib.import_module("branchcore.models.weights")
    model = load()
    weights.add_lora(model, rank=2)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    prompted, inputs, captured = model.with_prompts(PROMPTS), rows(model), []
    with torch.no_grad():
        plain = prompted.velocity(*inputs), prompted.reference_velocity(*inputs)

        def capture(call):
            captured.append(call)
            result = call()
            return lambda: result  # a graph keeps what was on and off

        model.rollout_predict = BucketedCalls(model, (4,), capture).predict
        for _ in range(2):
            close(prompted.velocity(*inputs), plain[0])
            close(prompted.reference_velocity(*inputs), plain[1])
        assert len(captured) == 2
        model.module.proj_out.weight.data = 2 * model.module.proj_out.weight.data
        assert not torch.allclose(prompted.velocity(*inputs), plain[0])
    assert len(captured) == 3


def test_graphs_are_refused_where_they_cannot_be(load):
    model = load()
    with pytest.raises(NotImplementedError, match="on a CUDA device, got cpu; try compile_blocks"):
        runtime.graph_rollout(model)
    for buckets in ((), (0, 2), (4, 2), (2, 2)):
        with pytest.raises(ValueError, match="buckets must be increasing positive numbers, got"):
            runtime.graph_rollout(model, buckets)
    assert model.rollout_predict is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_graphs_equal_eager_calls(name, load):
    model = load(name, device="cuda")
    prompted = model.with_prompts(PROMPTS)
    calls = [rows(model), rows(model, seed=1), rows(model, [0.4] * 3, [0, 1, 2])]
    calls = [[value.cuda() for value in inputs] for inputs in calls]
    with torch.no_grad():
        plain = [prompted.velocity(*inputs) for inputs in calls]
        change = runtime.graph_rollout(model, (2, 4))
        for inputs, wanted in zip(calls * 2, plain * 2, strict=True):
            close(prompted.velocity(*inputs), wanted)
        parameter = next(p for p in model.module.parameters() if p.ndim > 1)
        parameter.mul_(1.5)
        replayed = prompted.velocity(*calls[0])
        assert not torch.allclose(replayed, plain[0])
        change.undo()
        close(replayed, prompted.velocity(*calls[0]))


def test_the_graph_that_was_not_used_for_longest_is_given_up(load, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    model, captured = load(), []
    prompted = model.with_prompts(PROMPTS)

    def capture(call):
        captured.append(call)
        return call

    model.rollout_predict = BucketedCalls(model, (1, 2, 3), capture).predict
    with torch.no_grad():
        for size in (1, 2, 1, 3, 1, 3):
            prompted.velocity(*rows(model, [0.5] * size, [0] * size))
        assert len(captured) == 3
        prompted.velocity(*rows(model, [0.5] * 2, [0] * 2))
    assert len(captured) == 4


class Stream(str):
    """A name in the place of a stream."""

    def wait_stream(self, other):
        assert other in ("main", "beside")


@pytest.fixture
def cuda(monkeypatch):
    """What a capture asks of torch.cuda: a pool is not taken again once its last graph is gone."""
    state = SimpleNamespace(users={}, current=Stream("main"), modes=set())

    class Graph:
        pool = None

        def __del__(self):
            if self.pool is not None:
                state.users[self.pool] -= 1

        def replay(self):
            pass

    @contextmanager
    def stream(chosen):
        before, state.current = state.current, chosen
        try:
            yield
        finally:
            state.current = before

    class Recording:
        def __init__(self, graph, pool, chosen, mode):
            self.graph, self.pool, self.stream = graph, pool, chosen
            state.modes.add(mode)

        def __enter__(self):
            assert state.users.get(self.pool) != 0
            state.users[self.pool] = state.users.get(self.pool, 0) + 1
            self.graph.pool, self.before, state.current = self.pool, state.current, self.stream

        def __exit__(self, kind, error, trace):
            if error is not None:
                raise RuntimeError("capture was invalidated")
            state.current = self.before

    handles = count()
    fakes = {"graph": Recording, "CUDAGraph": Graph, "stream": stream}
    fakes |= {"Stream": lambda _: Stream("beside"), "current_stream": lambda: state.current}
    fakes |= {"device": lambda _: nullcontext(), "graph_pool_handle": lambda: next(handles)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def test_graphs_that_are_alive_together_share_a_pool_and_the_next_ones_have_another(cuda):
    capture = CudaCapture(torch.device("cuda"))
    streams, first = [], torch.ones(2)

    def call():
        streams.append(cuda.current)
        return first

    replays = [capture(call), capture(call)]
    assert streams == ["beside"] * 8
    assert (cuda.current, cuda.users, cuda.modes) == ("main", {0: 2}, {"thread_local"})
    assert replays[0]() is first
    del replays[0]
    replays.append(capture(call))
    replays.clear()
    replays.append(capture(call))
    assert cuda.users == {0: 0, 1: 1}


def test_a_capture_that_fails_says_why_and_gives_the_stream_back(cuda):
    capture, calls = CudaCapture(torch.device("cuda")), []

    def call():
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("cannot copy while capturing")
        return torch.ones(1)

    with pytest.raises(RuntimeError, match=r"graph_rollout: .*got cannot copy while capturing;"):
        capture(call)
    assert cuda.current == "main"
    assert capture(call)().item() == 1.0
