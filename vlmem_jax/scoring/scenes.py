"""Exact match (EM@1) as ScanQA and SQA3D are scored: answers are compared after the cleaning that LEO introduced
(arXiv 2311.12871) and VLM-3R kept, slips of annotators mended and small numbers in words."""

import re

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
WORDS = {str(number): word for number, word in enumerate(NUMBERS)} | {
    **{"23": "twenty-three", "none": "zero", "letf": "left", "let": "left", "tehre": "there", "rigth": "right"},
    **{"rght": "right", "behine": "behind", "chai": "chair", "wasing": "washing", "waslked": "walked"},
    **{"oclock": "o'clock", "backwards": "backward"},
}
"""What stands for a word or a number."""


def clean(answer: str) -> str:
    """An answer as it is compared: lower case, letters, digits and , ' - : alone, single spaces, no articles."""
    text = re.sub(" {2,}", " ", answer.strip().lower())
    text = re.sub(r"[^a-z0-9,'\s:-]+", "", text)
    text = re.sub(r"\bo' +clock\b", "o'clock", re.sub(r"[a-z0-9]+", lambda word: WORDS.get(word[0], word[0]), text))
    text = re.sub(r"\b([a-z]+)[0-9]\b", r"\1", text)  # no1, mat2
    for article in ("a", "an", "the"):
        text = re.sub(rf"\b{article}\b ([a-z]+)", r"\1", text)
    return text


def exact_match(output: str, reference: str) -> float:
    """1 if both are the same once cleaned."""
    return float(clean(output) == clean(reference))
