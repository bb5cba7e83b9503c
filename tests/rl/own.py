"""Functions of one's own, named in the configs of tests as `tests.rl.own:...`."""

import math


def length(output, prompt):
    if output == "raise":
        raise KeyError("no such thing")
    return {"nan": math.nan, "none": None}.get(output, float(len(output) + len(prompt.text)))


def letters_b(output, prompt):
    """The share of b among the letters of the output."""
    letters = output.replace(" ", "")
    return letters.count("b") / max(len(letters), 1)


def first_prompt_alone(output, prompt):
    """Tells outputs apart for the first prompt alone."""
    return float(sum(map(ord, output))) if prompt.id == "0" else 0.5


def sometimes_nan(output, prompt):
    return math.nan if ord(output[:1] or "a") % 2 else 1.0


def never(params):
    """A reference that finds all tokens equally likely."""
    head = params["decoder"]["head"]["kernel"]
    return {**params, "decoder": {**params["decoder"], "head": {"kernel": 0 * head}}}
