"""The prompts of the digits task: grammar, vocabulary and the 60 prompts."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STROKES = ("thin", "bold")
SLANTS = ("left-leaning", "upright", "right-leaning")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("a", *STROKES, *SLANTS, *DIGITS)
PROMPTS = tuple(
    f"a {stroke} {slant} {digit}" for digit in DIGITS for stroke in STROKES for slant in SLANTS
)
GRAMMAR = f"'a {{{'|'.join(STROKES)}}} {{{'|'.join(SLANTS)}}} {{{'|'.join(DIGITS)}}}'"


class DigitPrompt(NamedTuple):
    """Indices into STROKES, SLANTS and DIGITS."""

    stroke: int
    slant: int
    digit: int


@functools.cache
def parse_prompt(prompt: str) -> DigitPrompt:
    """Read one prompt.

    Raises:
        ValueError: The prompt is not a sentence of the grammar.
    """
    words = prompt.split(" ")
    if len(words) == 4 and words[0] == "a":
        _, stroke, slant, digit = words
        if stroke in STROKES and slant in SLANTS and digit in DIGITS:
            return DigitPrompt(STROKES.index(stroke), SLANTS.index(slant), DIGITS.index(digit))
    unknown = [word for word in words if word not in WORDS]
    hint = f" with unknown words {unknown}" if unknown else ""
    raise ValueError(f"parse_prompt: prompt must be {GRAMMAR}, got {prompt!r}{hint}")


def prompt_indices(prompts: Sequence[str]) -> Tensor:
    """Read prompts into an (L, 3) int64 tensor of stroke, slant and digit indices."""
    return torch.tensor([parse_prompt(prompt) for prompt in prompts]).view(-1, 3)


def word_indices(stroke_slant_digit: Tensor) -> Tensor:
    """Turn (L, 3) indices of `prompt_indices` into (L, 4) indices into WORDS."""
    first = torch.tensor([WORDS.index(group[0]) for group in (STROKES, SLANTS, DIGITS)])
    article = torch.zeros_like(stroke_slant_digit[:, :1])
    return torch.cat([article, stroke_slant_digit + first.to(article.device)], 1)
