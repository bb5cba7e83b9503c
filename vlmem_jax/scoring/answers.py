"""The answer in what a model wrote, compared as people write answers: as text, as a choice, or as a number."""

import re
import string
import unicodedata
from collections.abc import Sequence

from vlmem_jax.scoring.numbers import Number, numbers, one_of_two

# --- the answer in an output ------------------------------------------------------------------------------------------

_CUE = re.compile(
    r"""
    (?: (?:final|correct|right|best)\s+ )* \b (?:answer|option|choice)
        (?: \s+ (?:is|would\ be|must\ be) \b (?:\s+(?:option|choice|answer)\b)? \s* :? | \s* [:=] )
    | (?:답|정답) \s* (?:[은는:=])
    | (?:答案|答え|正解|正确答案) \s* (?:应该?是|应为|[是为は:=])
    | (?:选择?|選擇?) \s* (?=[a-z(（])
    | respuesta (?:\s+(?:correcta|final))? \s* (?:\bes\b|:)
    | r[ée]ponse (?:\s+(?:correcte|finale))? \s* (?:\best\b|:)
    | (?:richtige\s+)? antwort \s* (?:\b(?:ist|lautet)\b|:)
    | resposta (?:\s+(?:correta|final))? \s* (?:é\b|:)
    | risposta (?:\s+(?:corretta|finale))? \s* (?:è\b|:)
    | ответ \s* (?:[:=-]|\bэто\b)
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""What stands before an answer that is named as such."""
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00ab": '"', "\u00bb": '"'})


def extract_answer(output: str) -> str:
    """What stands in the last <answer>, after the last words such as `The answer is`, in the last \\boxed{}, or else on
    the last line that is not blank. What a model thought before (</think>) does not count."""
    text, told = _told(output)
    return told if told is not None else text.strip().rpartition("\n")[2].strip()


def _told(output: str) -> tuple[str, str | None]:
    """The output without what was thought and without markup, and what it names as its answer, if it does."""
    text = _plain(output)
    tagged = re.findall(r"<answer>(.*?)(?:</answer>|\Z)", text, re.DOTALL)
    if tagged:
        text = tagged[-1].strip()
    cues = list(_CUE.finditer(text))
    for cue in reversed(cues):
        after = text[cue.end() :].strip().partition("\n")[0].strip()
        if after and not re.match(r"(?:not|never|no)\b(?!$)", after, re.IGNORECASE):
            boxed = last_boxed(after)
            return text, _unwrapped(after if boxed is None else boxed)
    if (boxed := last_boxed(text)) is not None:
        return text, _unwrapped(boxed)
    return (text, text) if tagged else (text, None)


def _plain(output: str) -> str:
    """The output in compatible characters, without thoughts, emphasis and typographic quotes."""
    text = re.sub(r"(\d?)([\u00bc-\u00be\u2150-\u215e])", _spelled_fraction, output)
    text = unicodedata.normalize("NFKC", text).translate(_DASHES).translate(_QUOTES)
    text = text.rpartition("</think>")[2]
    text = re.sub(r"<think>.*\Z", "", text, flags=re.DOTALL)
    text = re.sub(r"\*\*|__|`+|^\s*#+\s+|^\s*>\s+|(?<!\w)[*_](?=\S)|(?<=\S)[*_](?!\w)", "", text, flags=re.MULTILINE)
    return text


def _spelled_fraction(found: re.Match) -> str:
    above, _, below = unicodedata.normalize("NFKC", found[2]).partition("\u2044")
    return f"{found[1]} {above}/{below}".strip()


def last_boxed(output: str) -> str | None:
    """What stands in the last \\boxed{...} whose braces are closed."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", output)]):
        depth = 1
        for place, character in enumerate(output[start:], start):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return output[start:place]
    return None


def _unwrapped(text: str) -> str:
    r"""Without what TeX puts around words: `\text{...}`, `$...$`, `\(...\)`, `\[...\]`."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text.strip())
    return re.sub(r"\$+|\\[()\[\]]", "", text).strip()


# --- texts ------------------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, stripped, with runs of whitespace as one space."""
    return " ".join(text.lower().split())


def bare(text: str) -> str:
    """A text as it is compared: compatible characters, no case, markup, quotes, final punctuation or articles."""
    words = _unwrapped(_plain(text)).casefold().translate(str.maketrans("", "", "\"'"))
    words = re.sub(r"[\s.,;:!?。，！？]+$", "", " ".join(words.split()))
    without = re.sub(r"\b(?:a|an|the)\s+", "", words)
    return without or words


def exact(output: str, reference: str | None) -> float:
    """1 if both are equal once normalised (VisMem's release)."""
    return float(reference is not None and normalise(output) == normalise(reference))


def substr(output: str, reference: str | None) -> float:
    """1 if the output holds the reference, whatever the case; an empty reference is in every output."""
    return float(reference is not None and reference.lower() in output.lower())


def text(output: str, reference: str) -> float:
    """1 if the answer in the output, or its first sentence, is the reference."""
    answer, wanted = extract_answer(output), bare(reference)
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", answer, maxsplit=1)[0]
    return float(wanted in (bare(answer), bare(sentence)))


# --- choices ----------------------------------------------------------------------------------------------------------

_LEADING = re.compile(
    r"""
    (?:(?:option|choice)\s+)?
    (?: [(\[{] \s* ([a-z]) \s* [)\]}]
      | ([a-z]) (?= \s* $ | \s* [.:),;\]] | \s+ -+ \s | \s+ (?:is|was)\s+(?:the\s+)?(?:correct|right|answer|best) ) )
    \s* [.:),;\]-]* \s* (.*)
    """,
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
"""A letter that begins a text and is no word of it, and what follows."""
_SAYING = re.compile(r"^(?:it\s+is|it's|its|this\s+is|that\s+is|that's|they\s+are|these\s+are)\s+", re.IGNORECASE)
_EITHER = re.compile(
    r"[\s)\]]*(?:,|/|&|\band\b|\bor\b|\boder\b|\bou\b|\bo\b|和|或)+[\s(\[]*(?:\b(?:and|or)\b[\s(\[]*)?", re.IGNORECASE
)
"""What stands between two options of which either is meant, or both."""


def choice(output: str, reference: str, choices: Sequence[str] = ()) -> float:
    """1 if both name the same option; where the reference names none, if they are the same text."""
    wanted = _option(_unwrapped(_plain(reference)), choices)
    return text(output, reference) if wanted is None else float(option(output, choices) == wanted)


def option(output: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the option that an output names: by letter, by the words of the choice, or by both. Two are none.

    It is looked for in what the output names as its answer, on its first line, on its last, and at last as the only
    option in it.
    """
    plain, told = _told(output)
    if told is not None:
        return _option(told, choices) or None
    plain = _unwrapped(plain)
    lines = [line.strip() for line in plain.split("\n") if line.strip()]
    for line in (lines[:1] + lines[-1:]) if lines else []:
        if (found := _option(line, choices, alone=False)) is not None:
            return found or None
    return _only_option(plain, choices)


def _letters(choices: Sequence[str]) -> str:
    return string.ascii_uppercase[: len(choices)] or string.ascii_uppercase


def _by_text(choices: Sequence[str]) -> dict[str, str]:
    return {bare(words): letter for words, letter in zip(choices, _letters(choices), strict=False)}


def _option(said: str, choices: Sequence[str], alone: bool = True) -> str | None:
    """The letter of the option that a short text names, empty if it names two; `alone`: also in its midst."""
    letters, by_text = _letters(choices), _by_text(choices)
    words = bare(_SAYING.sub("", said))
    if words in by_text:
        return by_text[words]
    if (found := _LEADING.match(said.strip().lstrip("\"'"))) is not None:
        letter, after = (found[1] or found[2]).upper(), found[3]
        other = by_text.get(bare(after))
        if letter in letters:
            if other not in (None, letter) or _is_letter(after, letters):
                return ""
            return letter
    return _only_option(said, choices) if alone else None


def _is_letter(said: str, letters: str) -> bool:
    """Whether what follows a letter is another: `A, B`."""
    found = re.match(r"(?:and|or|&|/)?\s*[(\[]?([A-Z])[)\].]?\s*$", said.strip())
    return bool(found) and found[1] in letters


def _only_option(said: str, choices: Sequence[str]) -> str | None:
    """The last letter that stands by itself, unless it is one of two; else the only choice whose words are there."""
    letters = _letters(choices)
    found = [
        match
        for match in re.finditer(r"(?<![\w'-])([A-Z])(?![\w'-])", said)
        if match[1] in letters and not _is_word(said, match)
    ]
    if found:
        last = found[-1]
        if len(found) > 1 and found[-2][1] != last[1] and _EITHER.fullmatch(said[found[-2].end() : last.start()]):
            return None
        return last[1]
    words = _words(said)
    if re.search(r"\b(?:not|no|isnt|arent|neither|never)\b", words):
        return None
    named = {letter for choice, letter in _by_text(choices).items() if choice.strip() and _words(choice) in words}
    return named.pop() if len(named) == 1 else None


def _words(said: str) -> str:
    """Its words, with a space before and after each."""
    return " ".join(["", *re.findall(r"[^\W_]+", bare(said)), ""])


def _is_word(said: str, match: re.Match) -> bool:
    """Whether a letter is an article or a pronoun: `A dog`, `I think`."""
    before, after = said[: match.start()], said[match.end() :]
    if before[-1:] in ("(", "["):
        return False
    joined = re.match(r"\s+(?:is|was)\s|\s+(?:and|or)\s+[A-Z]\b", after)
    return match[1] in "AI" and bool(re.match(r"\s+[a-z]", after)) and not joined


# --- numbers ----------------------------------------------------------------------------------------------------------


def number(output: str, reference: str) -> float:
    """1 if the answer in the output is the number of the reference: the first after words that name it as the answer,
    else the last. Units do not count. Whole numbers must be exact, others but for numbers.RELATIVE_TOLERANCE."""
    wanted = parse_number(reference)
    if wanted is None:
        return 0.0
    plain, told = _told(output)
    found = numbers(plain if told is None else told)
    if not found or one_of_two(plain if told is None else told):
        return 0.0
    return float((found[-1] if told is None else found[0]).equals(wanted))


def parse_number(text: str) -> Number | None:
    """The first number in a text; None if there is none."""
    return next(iter(numbers(_unwrapped(_plain(text)))), None)
