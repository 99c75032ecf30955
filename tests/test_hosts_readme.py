"""README's converted loop runs, with the gradient of the host's own formulas."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import host_formulas as host
import torch

from branchcore import hosts

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
(LOOP,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
TABLE = re.findall(r"^\| `(\w+)` \| (`.*?`) \| .* \| .* \|$", README, re.MULTILINE)


class Transformer(torch.nn.Module):
    """A small velocity field of (B, tokens, channels)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(4, 4, generator=generator).double())

    def forward(self, x, sigma):
        return torch.tanh(x @ self.weight) * (1 + sigma)


def test_the_converted_loop_has_the_host_s_gradient():
    t = torch.linspace(1, 0, 6)
    names = {
        "torch": torch,
        "transformer": Transformer(),
        "args": SimpleNamespace(sampling_steps=5, eta=0.3, clip_range=1e-4, adv_clip_max=5.0),
        "sigma_schedule": 3 * t / (1 + 2 * t),
        "noise": torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1)).double(),
        "reward": lambda image: image.mean((1, 2)),
        "standardized": lambda r: (r - r.mean()) / (r.std() + 1e-8),
    }
    assert len(LOOP.splitlines()) < 40
    exec(LOOP, names)
    model, states, sigmas = names["transformer"], names["states"], names["sigma_schedule"]
    ours, model.weight.grad = model.weight.grad, None
    for i in range(4):
        x, y, levels = states[i], states[i + 1], (sigmas[i], sigmas[i + 1], 0.3, sigmas[1])
        mean, _, std = host.mean_and_std("dance", x, model(x, sigmas[i]), *levels)
        new = host.log_prob("dance", y, mean, std, constants=False)
        ratio = (new - names["log_probs"][i]).exp()
        (host.clipped_loss(ratio, names["advantages"], 1e-4, 5.0) / 4).backward()
    exact = model.weight.grad
    assert exact.norm() > 0
    assert (ours - exact).norm() <= 1e-10 * exact.norm()


def test_the_table_names_every_host_and_what_it_has():
    rows = {name: re.findall(r"`(\w+)`", cells.split(" | ")[0]) for name, cells in TABLE}
    folder = Path(next(iter(hosts.__path__)))
    for name in {p.stem for p in folder.glob("*.py") if p.stem[0] != "_"} - {"flow_grpo"}:
        module = __import__(f"branchcore.hosts.{name}", fromlist=["_"])
        for function in rows[name]:
            assert inspect.getmodule(getattr(module, function)) is module
