"""Answers compared with several references as captions are, word by word, as ScanQA is reported: by pycocoevalcap, the
extra `captions`."""

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from vlmem_jax.scoring.scenes import clean

NAMES = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L")


def captions(lines: Sequence[dict[str, Any]]) -> tuple[dict[str, float], str]:
    """NAMES of the answers that have references, both cleaned as for exact match (VLM-3R); or none, and why."""
    judged = [line for line in lines if line["answers"]]
    if not judged:
        return {}, ""
    if reason := _missing():
        return {}, f"{', '.join(NAMES)} are left out: {reason}"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints as it goes
            return _scores(judged), ""
    except Exception as error:  # whatever it and its Java programs may raise: the other numbers stand without them
        return {}, f"{', '.join(NAMES)} are left out: pycocoevalcap failed with {type(error).__name__}: {error}"


def _missing() -> str:
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "they need the package pycocoevalcap; install it with: pip install 'vlmem_jax[captions]'"
    if shutil.which("java") is None:
        return "the tokeniser of pycocoevalcap and its METEOR are Java programs; put a `java` of 8 or newer on PATH"
    return ""


def _scores(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenised(texts: list[list[str]]) -> dict[int, list[str]]:
        cleaned = {n: [{"caption": " ".join(clean(text).split())} for text in of] for n, of in enumerate(texts)}
        return PTBTokenizer().tokenize(cleaned)

    references, outputs = (
        tokenised([line["answers"] for line in lines]),
        tokenised([[line["output"]] for line in lines]),
    )
    found = [scorer.compute_score(references, outputs)[0] for scorer in (Cider(), Bleu(4), Meteor(), Rouge())]
    found[1] = found[1][3]  # of 1 to 4 words
    return dict(zip(NAMES, map(float, found), strict=True))
