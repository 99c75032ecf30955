"""Rewards: what scores decoded leaves, and how its answers are checked.

A reward is any callable `reward(images, prompts) -> {component: (N,) fp32}` of images (N, 3, H, W)
in [0, 1], videos (N, F, 3, H, W), or whatever else the model decodes. A failed call is made again
(`Retrying`); what fails for good is a masked leaf, up to a limit, then an error, never a zero.
Several rewards are combined by `Rewards({"hps": HPSv2(...), "clip": ClipScore(...)})` and weighted
by `TrainerConfig.reward_weights`, the one place where weights are.
"""

from branchcore.rewards.build import build, kind_of
from branchcore.rewards.clip import ClipScore
from branchcore.rewards.combined import Rewards
from branchcore.rewards.failures import NoRetry, RetryLater, RewardFailure
from branchcore.rewards.hpsv2 import HPSv2
from branchcore.rewards.http_reward import HttpReward
from branchcore.rewards.imagereward import ImageReward
from branchcore.rewards.jpeg import JpegCompressibility
from branchcore.rewards.overlap import OneAtATime, Scoring, score_async
from branchcore.rewards.pickscore import PickScore
from branchcore.rewards.retrying import Retrying, patient
from branchcore.rewards.scores import (
    Partial,
    Reward,
    Scores,
    check_masked,
    component_weights,
    score,
)
from branchcore.rewards.subprocess_reward import SubprocessReward

__all__ = [
    "ClipScore",
    "HPSv2",
    "HttpReward",
    "ImageReward",
    "JpegCompressibility",
    "NoRetry",
    "OneAtATime",
    "Partial",
    "PickScore",
    "RetryLater",
    "Retrying",
    "Reward",
    "RewardFailure",
    "Rewards",
    "Scores",
    "Scoring",
    "SubprocessReward",
    "build",
    "check_masked",
    "component_weights",
    "kind_of",
    "patient",
    "score",
    "score_async",
]
