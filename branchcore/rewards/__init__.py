"""Rewards: what scores decoded leaves, and how its answers are checked.

A reward is any callable `reward(images, prompts) -> {component: (N,) fp32}` of images (N, 3, H, W)
in [0, 1], videos (N, F, 3, H, W), or whatever else the model decodes. A failed score is an error,
never a zero. Several rewards are combined by `Rewards({"hps": HPSv2(...), "clip": ClipScore(...)})`
and weighted by `TrainerConfig.reward_weights`, the one place where weights are.
"""

from branchcore.rewards.build import build
from branchcore.rewards.clip import ClipScore
from branchcore.rewards.combined import Rewards
from branchcore.rewards.hpsv2 import HPSv2
from branchcore.rewards.imagereward import ImageReward
from branchcore.rewards.jpeg import JpegCompressibility
from branchcore.rewards.overlap import OneAtATime, Scoring, score_async
from branchcore.rewards.pickscore import PickScore
from branchcore.rewards.scores import Reward, Scores, component_weights, score
from branchcore.rewards.subprocess_reward import SubprocessReward

__all__ = [
    "ClipScore",
    "HPSv2",
    "ImageReward",
    "JpegCompressibility",
    "OneAtATime",
    "PickScore",
    "Reward",
    "Rewards",
    "Scores",
    "Scoring",
    "SubprocessReward",
    "build",
    "component_weights",
    "score",
    "score_async",
]
