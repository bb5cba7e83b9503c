"""How answers about long videos are compared where published numbers come from, and what a judge says of others.

Video-MME (arXiv 2405.21075), MLVU (arXiv 2406.04264) and VStream-QA (arXiv 2406.08085), as MM-Mem's release (arXiv
2603.01455) reads answers to them. That is looser than `answers.choice`, which is what an answer is worth here: these
tell how much of a published number comes from reading alone.
"""

import re
import string
from collections.abc import Sequence
from typing import NamedTuple


def letter(output: object) -> str:
    """The first letter of an output, as a capital, whatever word it begins; empty if there is none (Video-MME)."""
    return next((c.upper() for c in output if c.isalpha()), "") if isinstance(output, str) else ""


def holds(output: str, reference: object, choices: Sequence[object]) -> float:
    """1 if the output is the letter of the reference, or holds it anywhere, whatever the case: 13 holds 1 and 3
    (MLVU)."""
    said, wanted = output.strip().lower(), str(reference).strip().lower()
    named = dict(zip(string.ascii_lowercase, (str(choice).strip().lower() for choice in choices), strict=False))
    return float(bool(said) and (named.get(said) == wanted or wanted in said))


class Verdict(NamedTuple):
    """What a judge says of an answer in words."""

    is_correct: bool
    score: int
    """From 0 to 5."""


def verdict(said: str | None) -> Verdict:
    """What stands in a judge's {'pred': 'yes', 'score': 4}. What is missing, or none of these, counts as wrong, and as
    0; so does a judge that failed (None)."""
    pred = re.search(r"""["']pred["']\s*:\s*(["'])(\w+)\1""", said or "")
    score = re.search(r"""["']score["']\s*:\s*["']?([0-5])(?![0-9])""", said or "")
    return Verdict(bool(pred) and pred[2].lower() == "yes", int(score[1]) if score else 0)
