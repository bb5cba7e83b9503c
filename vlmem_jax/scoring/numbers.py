"""Numbers as people write them: with separators, units, per cent, fractions and powers, in words, as times."""

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction

RELATIVE_TOLERANCE = Fraction(1, 1000)
"""Where the reference has decimals."""


@dataclasses.dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction
    percent: bool = False
    colon: bool = False
    """Whether it is a time or a ratio, such as 12:45."""
    decimal: bool = False
    """Whether it was written with decimals, or is no whole number."""

    def equals(self, other: "Number") -> bool:
        """Whether this is the number `other`, a reference: exactly, unless that has decimals."""
        if self.colon != other.colon:
            return False
        given, wanted = self.value, other.value
        if self.percent != other.percent:  # 50 % is 0.5, and 50 where it is asked for in per cent
            shares = (given / 100, wanted) if self.percent else (given, wanted / 100)
            if _near(*shares, other.decimal or other.percent):
                return True
        return _near(given, wanted, other.decimal)


def _near(given: Fraction, wanted: Fraction, tolerant: bool) -> bool:
    return abs(given - wanted) <= (RELATIVE_TOLERANCE * abs(wanted) if tolerant else 0)


_GROUPED = r"\d{1,3}(?:[, '\u00a0\u2009\u202f]\d{3})+(?:\.\d+)?(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?(?!\d)"
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NUMBER = re.compile(
    rf"""(?<![\w^.]) (?P<sign>(?<![\w)])[-+])? \s* (?:
        (?P<clock>\d+:\d+(?::\d+)*) (?!\d)
        | (?P<whole>\d+) \s+ (?P<above>\d+)\s*/\s*(?P<below>\d+)
        | (?: (?P<grouped>{_GROUPED}) | (?P<comma>\d+,\d{{1,2}}(?![\d,])) | (?P<plain>\d+\.?\d*|\.\d+) )
          (?: \s*/\s* (?P<under>\d+\.?\d*)
            | [eE] (?P<exponent>[-+]?\d+)
            | \s*(?:\^|\*\*)\s* \{{?(?P<power>[-+]?\d+)\}}?
            | \s*(?:\*|x|×|\\times)\s* 10 \s*(?:\^|\*\*)\s* \{{?(?P<tens>[-+]?\d+)\}}? )?
    ) (?P<percent>\s*(?:%|\\%|per\s?cent\b|percent\b))? (?:\s+(?P<scale>{"|".join(_SCALES)})s?\b)?""",
    re.VERBOSE | re.IGNORECASE,
)  # fmt: skip
MOST_POWER = 400
"""Larger powers are no numbers that anyone writes an answer in."""


def numbers(text: str) -> list[Number]:
    """All numbers of a text in their order: those in digits, or where there are none, those in words."""
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text.replace("\u2044", "/"))
    found = [one for match in _NUMBER.finditer(text) if (one := _of_digits(match)) is not None]
    return found or list(_of_words(text)) or list(_of_signs(text))


def _of_digits(match: re.Match) -> Number | None:
    part = match.groupdict()
    sign = -1 if part["sign"] == "-" else 1
    scale = _SCALES[part["scale"].lower()] if part["scale"] else 1
    percent = part["percent"] is not None
    try:
        if part["clock"]:
            value = Fraction(0)
            for piece in part["clock"].split(":"):
                value = value * 60 + int(piece)
            return Number(sign * value, colon=True)
        if part["whole"]:
            value = int(part["whole"]) + Fraction(int(part["above"]), int(part["below"]))
            return Number(sign * value * scale, percent, decimal=value.denominator > 1)
        digits = re.sub(r"[^\d.]", "", part["grouped"] or "") or (part["comma"] or part["plain"]).replace(",", ".")
        value = Fraction(digits.rstrip("."))
        decimal = "." in digits.rstrip(".")
        if part["under"]:
            value /= Fraction(part["under"])
            decimal = value.denominator > 1
        for base, name in ((10, "exponent"), (10, "tens"), (value, "power")):
            if part[name] is not None:
                power = int(part[name])
                if abs(power) > MOST_POWER:
                    return None
                value = Fraction(base) ** power * (1 if name == "power" else value)
                decimal = value.denominator > 1
    except ZeroDivisionError:
        return None
    return Number(sign * value * scale, percent, decimal=decimal and (value * scale % 1 != 0 or scale == 1))


def one_of_two(text: str) -> bool:
    """Whether a text offers two numbers: `3 or 4`."""
    found = list(_NUMBER.finditer(text))
    return any(
        re.fullmatch(r"\s*(?:or|oder|ou|或)\s*", text[a.end() : b.start()]) and a[0].strip() != b[0].strip()
        for a, b in zip(found[:-1], found[1:], strict=True)
    )


_UNITS = {
    name: value
    for value, name in enumerate(
        [
            *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
            *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
        ]
    )
}
_TENS = {
    name: 10 * value
    for value, name in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}


def _of_words(text: str) -> Iterator[Number]:
    """Numbers in English words: `twenty-one`, `one hundred and five`, `minus three`."""
    total = part = None
    sign = 1
    for word in [*re.findall(r"[a-z]+", text.lower()), ""]:
        if word in _UNITS or word in _TENS:
            amount = _UNITS.get(word, _TENS.get(word))
            if part is not None and part % 100 and not (part % 100 in _TENS.values() and amount < 10):
                yield Number(Fraction(sign * ((total or 0) + part)))
                total, part, sign = None, None, 1
            part = (part or 0) + amount
        elif word == "hundred" and part is not None:
            part *= 100
        elif word in _SCALES and part is not None:
            total, part = (total or 0) + part * _SCALES[word], 0
        elif word == "and" and part is not None and (part % 100 == 0 or total):
            continue
        else:
            if part is not None:
                yield Number(Fraction(sign * ((total or 0) + part)))
            total = part = None
            sign = -1 if word in ("minus", "negative") else 1


_CHINESE = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000}


def _of_signs(text: str) -> Iterator[Number]:
    """Numbers in Chinese and Japanese characters."""
    for found in re.findall(r"[零〇一二两兩三四五六七八九十百千万萬亿億]+", text):
        total = section = digit = 0
        for sign in found:
            if sign in _CHINESE:
                digit = _CHINESE[sign]
            elif sign in _CHINESE_UNITS:
                section += (digit or 1) * _CHINESE_UNITS[sign]
                digit = 0
            else:
                total = (total + section + digit) * (10**4 if sign in "万萬" else 10**8)
                section = digit = 0
        yield Number(Fraction(total + section + digit))
