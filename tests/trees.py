"""Small plans written by hand, and how tests of credit call a builder."""

import numpy as np

from branchcore import schedule
from branchcore.passes import concat
from branchcore.steps import dance_sde, euler, renoise
from branchcore.tree import Tree

SDE = dance_sde(0.3)
SG = [1.0, 0.7, 0.4, 0.0]
TOY = [3.0, 1.0, 2.0, 6.0]


def two_level(kids=2, grandkids=2):
    """One root, stochastic edges on both levels; leaves in order of their parents."""
    t = Tree()
    x = t.grow(t.roots(1), 0.5, SDE, children=kids, train=True)
    t.leaf(t.grow(x, 0.0, SDE, children=grandkids, train=True))
    return t.plan()


def uneven():
    """Two trees: one splits into 3 images and 1 with two re-noised states, one is a chain."""
    t = Tree()
    x = t.grow(t.roots(1), 0.7, SDE, children=2, train=True)
    t.leaf(t.chain(t.grow(x[:1], 0.4, SDE, children=3, train=True), [0.0], euler))
    image = t.leaf(t.chain(x[1:], [0.4, 0.0], euler))
    t.grow(image, 0.6, renoise, children=2, train=True)
    t.leaf(t.chain(t.grow(t.roots(1), 0.7, SDE, train=True), [0.0], euler))
    return t.plan()


def chains(group, sg=SG, sde=SDE, train=True):
    t = Tree()
    x = t.chain(t.roots(group), sg[1:-1], sde, train=train)
    t.leaf(t.grow(x, 0.0, euler))
    return t.plan()


def previews(group, sg=(1.0, 0.8, 0.6, 0.4, 0.0)):
    """Chains whose stochastic nodes all have an x0 read-out; leaves by step, then by chain."""
    t = Tree()
    x = t.roots(group)
    for sigma in sg[1:-1]:
        x = t.grow(x, sigma, SDE, train=True)
        t.leaf(t.grow(x, 0.0, euler))
    return t.plan()


def granular(group, strides, steps=6, branches=2):
    """One ODE trunk; at each branch step one shared state, `group` actions, a tail per stride."""
    sg = schedule.shifted_linear(steps, 3).tolist()
    t = Tree()
    x = t.roots(1)
    for k in range(branches):
        kids = t.grow(x, sg[k + 1], SDE, children=group, train=True, update=k)
        for j, stride in enumerate(strides):
            tail = [*sg[k + 2 :: stride][:-1], 0.0]
            t.leaf(t.chain(kids, tail, euler), label=k * len(strides) + j)
        x = t.grow(x, sg[k + 1], euler)
    return t.plan()


def trunks(num, children):
    """TempFlow's tree: at each of two trunk states some SDE children, which are leaves by ODE."""
    t = Tree()
    x = t.roots(num)
    for i in range(len(SG) - 2):
        kids = t.grow(x, SG[i + 1], SDE, children=children, train=True)
        t.leaf(t.chain(kids, SG[i + 2 :], euler))
        x = t.grow(x, SG[i + 1], euler)
    return t.plan()


def images(group, times, stochastic=False):
    """Images with one re-noised state per time, as AWM and Flow-DPO train."""
    t = Tree()
    x = t.leaf(t.chain(t.roots(group), SG[1:], SDE if stochastic else euler))
    for label, time in enumerate(times):
        t.grow(x, time, renoise, train=True, label=label)
    return t.plan()


def take(builder, plan, rewards, weights=None, log_prob=None, **more):
    rewards = np.asarray(rewards, dtype=np.float64)
    rewards = rewards[:, None] if rewards.ndim == 1 else rewards
    weights = np.ones(rewards.shape[1]) if weights is None else np.asarray(weights, float)
    log_prob = np.zeros(len(plan)) if log_prob is None else log_prob
    return builder(plan, rewards, weights, log_prob, **more)


def near(got, wanted, atol=1e-12):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


def of_depth(plan, values, depth):
    lo, hi = plan.levels()[depth]
    return values[lo:hi]


def batch(groups):
    """One call of chains, a prompt per group of rewards."""
    groups = [np.asarray(g, dtype=np.float64) for g in groups]
    plan = concat([chains(len(g), sg=(1.0, 0.5, 0.0), train=len(g) > 1) for g in groups])
    rewards = np.zeros((sum(map(len, groups)), groups[0].shape[1]))
    for prompt, group in enumerate(groups):
        rewards[plan.prompt[plan.leaf] == prompt] = group
    return plan, rewards


def per_prompt(plan, values):
    owner = plan.prompt[plan.leaf]
    return [values[plan.leaf][owner == p] for p in range(plan.num_prompts)]
