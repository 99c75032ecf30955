"""Execution plans of one iteration: released loops, the same algorithms in the engine, the engine.

`BASES` are written from the releases; `exact:` computes the same in the engine; `steel:` is a
release batched as far as it goes without the engine; `engine` is the `branchcore` recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from plans.branch import branch
from plans.dance import dance
from plans.exact import exact
from plans.flow import flow
from plans.steel import steel
from plans.task import Clock, Outcome, Task

Run = Callable[[Task, Clock], Outcome]


class Execution(NamedTuple):
    """One row of the benchmark."""

    recipe: str
    """Whose trees: the key of the task it runs on."""
    run: Run
    by_prompt: bool = False
    """Prompts run one after the other, so that time is linear in them."""
    tape: bool = False


BASES: dict[str, Run] = {"dance": dance, "flow": flow, "branch": branch, "branch_mix": branch}
RECIPES = {
    "dance": "dance_grpo",
    "flow": "flow_grpo",
    "branch": "branch_grpo",
    "branch_mix": "branch_mix",
    "engine": "branchcore",
}
PLANS: dict[str, Execution] = {
    **{name: Execution(name, run, by_prompt=True) for name, run in BASES.items()},
    **{f"exact:{name}": Execution(name, exact, tape=True) for name in BASES},
    "steel:dance": Execution("dance", partial(steel, tree=False)),
    "steel:branch": Execution("branch", partial(steel, tree=True)),
    "engine": Execution("engine", exact, tape=True),
}
# the released loop that a check compares with: BranchGRPO without its dead last
# edges, and for the engine's own recipe the same loop on its trees
REFERENCE: dict[str, Run] = BASES | dict.fromkeys(("branch", "engine"), partial(branch, dead=False))
