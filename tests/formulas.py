"""Published losses written out edge by edge at batch 1: what the engine's gradient must equal."""

import math

import torch

from branchcore import ops
from branchcore.forest import noise_rows
from branchcore.matching import (
    AdvantageMatching,
    ContrastiveMatching,
    Preference,
    RewardWeighted,
)
from branchcore.objective import ClippedRatio, MaskedRatio

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _call(model, x, sigma, prompt, *, reference=False):
    call = model.reference_velocity if reference else model.velocity
    at = x.view(1, *model.latent_shape), torch.tensor([sigma]), torch.tensor([prompt])
    return call(*at).flatten()


def _noise(forest, e, size):
    return ops.philox_normal(noise_rows(forest.noise, int(e), int(e) + 1), size, torch.float64)[0]


def shake(model):
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(5e-2 * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p))


class RenoisedEdge:
    """Everything of one re-noised state, recomputed alone."""

    def __init__(self, plan, forest, model, old, e):
        self.t, self.label, self.prompt = plan.sigma[e], plan.label[e], int(plan.prompt[e])
        self.x0 = forest.x[forest.slot[int(plan.parent[e])]]
        eps = _noise(forest, e, self.x0.numel())
        self.x, self.u = (1 - self.t) * self.x0 + self.t * eps, eps - self.x0
        self.v = _call(model, self.x, self.t, self.prompt)
        self.ref = _call(model, self.x, self.t, self.prompt, reference=True).detach()
        self.old = self.v.detach() if old is None else _call(old, self.x, self.t, self.prompt)
        self.old = self.old.detach()

    def kl(self, _form):
        return (self.v - self.ref).square().mean()


def awm(objective, edges, advantage, weight):
    power, (low, high) = objective.power, objective.clip
    for e, a, w in zip(edges, advantage, weight, strict=True):

        def log_prob(v, e=e):
            miss = (v - e.u).square().mean()
            if objective.weighting == "ghuber":
                return -((miss + 1e-10) ** power - 1e-10**power) * e.t / power
            return -{"uniform": 1.0, "t": e.t, "t2": e.t**2}[objective.weighting] * miss

        r = (log_prob(e.v) - log_prob(e.old)).exp()
        c = r.clamp(1 - low, 1 + high)
        (w * (-a[0] * torch.minimum(r, c) + a[1] * torch.maximum(r, c))).backward()


def nft(objective, edges, advantage, weight):
    beta = objective.beta
    for e, a, w in zip(edges, advantage, weight, strict=True):
        good = min(max((a[0] - a[1]) / 10 + 0.5, 0.0), 1.0)
        total = 0.0
        for sign, share_of in ((1, good), (-1, 1 - good)):
            v = e.old + sign * beta * (e.v - e.old)
            x0 = e.x - e.t * v
            scale = (x0 - e.x0).abs().mean().detach().clamp(min=1e-5)
            total = total + share_of * (x0 - e.x0).square().mean() / (scale * beta)
        (w * 5 * total).backward()


def dgpo(objective, edges, advantage, weight):
    keys = sorted({(e.prompt, e.label) for e in edges})
    for key in keys:
        s, mean_weight, count, size = 0.0, 0.0, 0, 0
        for e, a, w in zip(edges, advantage, weight, strict=True):
            size += (e.prompt, e.label) == key
            if (e.prompt, e.label) == key and a.any():
                gain = (e.v - e.u).square().mean() - (e.ref - e.u).square().mean()
                s, mean_weight, count = s + (a[0] - a[1]) * gain, mean_weight + w, count + 1
        if count:
            loss = -torch.nn.functional.logsigmoid(-objective.beta * s)
            (mean_weight / count * size * loss).backward()


def rwr(_objective, edges, advantage, weight):
    for e, a, w in zip(edges, advantage, weight, strict=True):
        (w * a[0] * (e.v - e.u).square().mean()).backward()


class SamplingEdge:
    """Everything of one stochastic sampling step, recomputed alone from its parent's state."""

    def __init__(self, plan, forest, model, old, e):
        n = int(plan.parent[e])
        self.sigma, self.after, self.prompt = plan.sigma[n], plan.sigma[e], int(plan.prompt[e])
        a, b, _, self.s = plan.row[e]
        x = forest.x[forest.slot[n]]
        self.v = _call(model, x, self.sigma, self.prompt)
        self.old = self.v.detach() if old is None else _call(old, x, self.sigma, self.prompt)
        self.old = self.old.detach()
        self.ref = _call(model, x, self.sigma, self.prompt, reference=True).detach()
        self.child = a * x + b * self.old + self.s * _noise(forest, e, x.numel())
        self.mean, self.mean_old = a * x + b * self.v, a * x + b * self.old
        self.mean_ref = a * x + b * self.ref

    def log_prob(self, mean):
        square = (self.child - mean) ** 2
        return (-square / (2 * self.s**2) - math.log(self.s) - HALF_LOG_2PI).mean()

    def log_ratio(self, kind):
        if kind == "cps":
            new, old = (-((self.child - m) ** 2).mean() for m in (self.mean, self.mean_old))
            return new - old
        log_ratio = self.log_prob(self.mean) - self.log_prob(self.mean_old)
        if kind == "gaussian":
            return log_ratio
        shift = ((self.mean - self.mean_old) ** 2).mean() / (2 * self.s**2)
        return (log_ratio + shift) * self.s

    def kl(self, form):
        dt = self.sigma - self.after
        if form == "velocity":
            return (self.v - self.ref).square().mean()
        variance = self.s**2 if form == "gaussian" else self.s**2 / dt
        return ((self.mean - self.mean_ref) ** 2).mean() / (2 * variance)


def policy(objective, edges, advantage, weight):
    low, high = objective.clip
    for e, a, w in zip(edges, advantage, weight, strict=True):
        log_ratio = e.log_ratio(objective.ratio)
        r = log_ratio.exp()
        c = r.clamp(1 - low, 1 + high)
        plus, minus = a
        if isinstance(objective, MaskedRatio):
            far = ((e.mean - e.mean_old) ** 2).mean() / (2 * e.s**2) > objective.trust
            plus = 0.0 if far and r > 1 else plus
            minus = 0.0 if far and r < 1 else minus
        loss = -plus * torch.minimum(r, c) + minus * torch.maximum(r, c)
        loss = loss + objective.log_ratio_penalty * 0.5 * log_ratio**2
        (w * loss).backward()


FORMULAS = {
    ClippedRatio: policy,
    MaskedRatio: policy,
    AdvantageMatching: awm,
    ContrastiveMatching: nft,
    Preference: dgpo,
    RewardWeighted: rwr,
}


def published_gradient(forest, model, objective, advantage, weight, *, old=None, update=0):
    """Adds the gradient of one update, one batch-1 forward and backward per edge.

    Args:
        forest: states of the rollout.
        model: the policy now.
        objective: chooses the formula.
        advantage: (M, 2).
        weight: (M,).
        old: the policy that sampled; None = the same.
        update: which.
    """
    plan, kind = forest.plan, RenoisedEdge if objective.matching else SamplingEdge
    edges = plan.trained(update)
    scaled = weight[edges] / len(edges)
    alone = [kind(plan, forest, model, old, e) for e in edges]
    FORMULAS[type(objective)](objective, alone, advantage[edges], scaled)
    if objective.kl:
        alone = [kind(plan, forest, model, old, e) for e in edges]
        for e, w in zip(alone, scaled, strict=True):
            (w * objective.kl * e.kl(objective.kl_form)).backward()
