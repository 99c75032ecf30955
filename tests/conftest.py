"""Shared toys: a small policy and the naive per-edge gradient that everything must equal."""

import functools
import importlib
import math

import numpy as np
import pytest
import torch

from branchcore import ops
from branchcore.forest import noise_rows

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LONGEST_FIRST = ("test_triton.py", "test_gpu_check.py", "test_aot.py", "test_cli.py")
"""Files of few but long tests: at the end a core would wait for them."""


def pytest_configure(config):
    """Keeps pytest-xdist from moving files of few tests to the end."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Begins with the longest files."""
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Returns a function: name of a family -> folder of its tiny pipeline, built once."""
    pytest.importorskip("diffusers")
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("pipelines") / name
            importlib.import_module(f"tiny_pipelines.{name}").build(folders[name])
        return folders[name]

    return folder


@pytest.fixture(scope="session")
def copies(tiny_folder):
    """Returns a function: name of a family -> `Copies` of its tiny pipeline, loaded once."""
    import tiny_models
    import tiny_pipelines

    @functools.cache
    def of(name):
        return tiny_models.Copies(tiny_pipelines.Tiny(name, tiny_folder(name)))

    return of


class ToyModel:
    """A two-layer velocity field; rows are independent of each other up to matmul rounding."""

    latent_shape = (3, 5)

    def __init__(self, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.module = torch.nn.Sequential(
            torch.nn.Linear(17, 24), torch.nn.SiLU(), torch.nn.Linear(24, 15)
        ).to(dtype)
        self.base = torch.nn.Sequential(
            torch.nn.Linear(17, 24), torch.nn.SiLU(), torch.nn.Linear(24, 15)
        ).to(dtype)
        with torch.no_grad():
            for p in [*self.module.parameters(), *self.base.parameters()]:
                p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        self.prompts, self.rows = [], []

    def with_prompts(self, prompts):
        self.prompts = list(prompts)
        return self

    def decode(self, latents):
        return latents

    def velocity(self, x, sigma, prompt):
        self.rows.append(len(x))
        return self._call(self.module, x, sigma, prompt)

    def reference_velocity(self, x, sigma, prompt):
        return self._call(self.base, x, sigma, prompt)

    def _call(self, net, x, sigma, prompt):
        code = torch.tensor([ord(p) - 97 for p in self.prompts]).to(prompt)
        prompt = code[prompt] if len(code) else prompt
        extra = torch.stack([sigma, 0.1 * prompt.to(x)], 1)
        return net(torch.cat([x.flatten(1), extra], 1)).view(x.shape)

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.module.parameters()])

    def zero_grad(self):
        self.module.zero_grad(set_to_none=True)


@pytest.fixture
def toy():
    return ToyModel


def naive_gradient(forest, model, advantage, weight, clip, x_of, v_old_of):
    """The released computation: one batch-1 forward and backward per edge, log-probs subtracted."""
    plan = forest.plan
    edges = plan.trained(0)
    for e in edges:
        n = int(plan.parent[e])
        a, b, _, s = plan.row[e]
        eps = ops.philox_normal(
            noise_rows(forest.noise, int(e), int(e) + 1), x_of[n].numel(), torch.float64
        )[0]
        child = a * x_of[n] + b * v_old_of[n] + s * eps

        def log_prob(v, n=n, a=a, b=b, s=s, child=child):
            mean = a * x_of[n] + b * v
            return (-((child - mean) ** 2) / (2 * s**2) - math.log(s) - HALF_LOG_2PI).mean()

        v_new = model.velocity(
            x_of[n].view(1, *model.latent_shape),
            torch.tensor([plan.sigma[n]]),
            torch.tensor([int(plan.prompt[n])]),
        ).flatten()
        ratio = torch.exp(log_prob(v_new) - log_prob(v_old_of[n]))
        clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
        plus, minus = advantage[e]
        term = -plus * torch.minimum(ratio, clipped) + minus * torch.maximum(ratio, clipped)
        (weight[e] * term / len(edges)).backward()


@pytest.fixture
def naive():
    return naive_gradient


@pytest.fixture
def all_states():
    """Recomputes every node's state and velocity one by one, batch 1, straight from the rows."""

    def run(plan, model, noise):
        x, v = {}, {}
        for i in range(len(plan)):
            a, b, c, s = plan.row[i]
            eps = torch.zeros(math.prod(model.latent_shape), dtype=torch.float64)
            if s > 0:
                row = noise_rows(noise, i, i + 1)
                eps = ops.philox_normal(row, len(eps), torch.float64)[0]
            p = int(plan.parent[i])
            x[i] = s * eps
            if p >= 0:
                x[i] = a * x[p] + b * v.get(p, torch.zeros_like(x[p])) + s * eps
            if c != 0:
                g = int(plan.parent[p])
                x[i] = x[i] + c * (x[g] - plan.sigma[g] * v[g])
            if plan.older[i] != 0:
                g = int(plan.parent[plan.parent[p]])
                x[i] = x[i] + plan.older[i] * (x[g] - plan.sigma[g] * v[g])
            if plan.evaluated[i]:
                with torch.no_grad():
                    v[i] = model.velocity(
                        x[i].view(1, *model.latent_shape),
                        torch.tensor([plan.sigma[i]]),
                        torch.tensor([int(plan.prompt[i])]),
                    ).flatten()
        return x, v

    return run


@pytest.fixture
def rng():
    return np.random.default_rng(0)
