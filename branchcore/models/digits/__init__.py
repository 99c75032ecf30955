"""The embedded digits task: a small SD3 transformer, prompts, rewards and an honest evaluation."""

from branchcore.models.digits.evaluate import HELD_OUT_SEED, Evaluation, evaluate, sample, score
from branchcore.models.digits.model import Digits, load_digits_model
from branchcore.models.digits.pictures import sample_grid
from branchcore.models.digits.prompts import PROMPTS
from branchcore.models.digits.rewards import COMPONENT_WEIGHTS, DigitsReward

__all__ = [
    "COMPONENT_WEIGHTS",
    "HELD_OUT_SEED",
    "PROMPTS",
    "Digits",
    "DigitsReward",
    "Evaluation",
    "evaluate",
    "load_digits_model",
    "sample",
    "sample_grid",
    "score",
]
