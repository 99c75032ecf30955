"""Execution plans of one iteration: released loops, the same algorithms in the engine, the engine.

`BASES` are written from the releases; `exact:` computes the same in the engine; `steel:` is a
release batched as far as it goes without the engine; `engine` is the `branchcore` recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from plans.branch import branch
from plans.dance import dance
from plans.exact import exact
from plans.flow import flow
from plans.g2rpo import g2rpo
from plans.mix import mix
from plans.steel import steel
from plans.task import Clock, Outcome, Task
from plans.tempflow import tempflow
from plans.tree import tree

Run = Callable[[Task, Clock], Outcome]


class Execution(NamedTuple):
    """One row of the benchmark."""

    recipe: str
    """Whose trees: the key of the task it runs on."""
    run: Run
    by_prompt: bool = False
    """Prompts run one after the other, so that time is linear in them."""
    trains: Literal["edges", "parents", "tape"] = "edges"
    """What a forward and backward is spent on; "tape" = a backward per parent, no forward."""


BASES: dict[str, Run] = {
    "dance": dance,
    "flow": flow,
    "branch": branch,
    "branch_mix": branch,
    "mix": mix,
    "flash": partial(mix, flash=True),
    "tree": tree,
    "tempflow": tempflow,
    "g2rpo": g2rpo,
    "guard": partial(flow, guard=True),
}
RECIPES = {
    "dance": "dance_grpo",
    "flow": "flow_grpo",
    "branch": "branch_grpo",
    "branch_mix": "branch_mix",
    "mix": "mix_grpo",
    "flash": "mix_grpo_flash",
    "tree": "tree_grpo",
    "tempflow": "tempflow_grpo",
    "g2rpo": "g2rpo",
    "guard": "grpo_guard",
    "engine": "branchcore",
}
PLANS: dict[str, Execution] = {
    **{name: Execution(name, run, by_prompt=True) for name, run in BASES.items()},
    **{f"exact:{name}": Execution(name, exact, trains="tape") for name in BASES},
    "steel:dance": Execution("dance", partial(steel, tree=False)),
    "steel:branch": Execution("branch", partial(steel, tree=True)),
    "engine": Execution("engine", exact, trains="tape"),
}
# its training step already serves all children of a state
PLANS["g2rpo"] = PLANS["g2rpo"]._replace(trains="parents")
CORE = tuple(
    name
    for name in PLANS
    if PLANS[name].recipe in ("dance", "flow", "branch", "branch_mix", "engine")
)
# the released loop that a check compares with: BranchGRPO without its dead last
# edges, and for the engine's own recipe the same loop on its trees and with its tails
REFERENCE: dict[str, Run] = BASES | {
    "branch": partial(branch, dead=False),
    "engine": partial(branch, dead=False, multistep=True),
}
