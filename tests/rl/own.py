"""Rewards of one's own, named in the configs of tests as `tests.rl.own:...`."""

import math


def length(output, prompt):
    if output == "raise":
        raise KeyError("no such thing")
    return {"nan": math.nan, "none": None}.get(output, float(len(output) + len(prompt.text)))


def letters_b(output, prompt):
    """The share of b in the output."""
    return output.count("b") / max(len(output), 1)
