"""The number that a text comes to."""

import re
from fractions import Fraction

MAX_CHARS = 1 << 14  # of the end of a text; answers stand there
MAX_DIGITS = 200
MAX_EXPONENT = 300

BOXED = "\\boxed{"
# Spaces of LaTeX, and signs of a currency, inside of numbers: 1{,}000 and 1\,000 and -$5.
INSIDE_NUMBERS = re.compile(r"\{,\}|\\[,!]|\\?\$")
FRACTION = re.compile(r"((?<![\w)\]}])-)?\s?\\[dt]?frac\s?\{([^{}]{1,50})\}\s?\{([^{}]{1,50})\}")
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]}}])-|)(?P<whole>{DIGITS}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    rf"(?:[eE](?P<exponent>[+-]?[0-9]{{1,3}})(?!\w))?"
    rf"(?:\s?/\s?(?P<below>{DIGITS}(?:\.[0-9]+)?)(?![0-9/]))?"
)


def last_number(text: str) -> Fraction | None:
    """Exactly, what the last number of a text is worth; of the last \\boxed{} if it has one.

    It reads 1,234.5 and 3/4 and \\frac{3}{4}, -2 and 1.5e-3; units and signs such as $ and % are
    passed over. None if there is no number, or one of more digits than anybody means.
    """
    text = text[-MAX_CHARS:]
    text = boxed(text) or text
    text = INSIDE_NUMBERS.sub("", text.replace("\N{MINUS SIGN}", "-"))
    text = FRACTION.sub(r" \1\2/\3 ", text)
    found = list(NUMBER.finditer(text))
    return _value(found[-1]) if found else None


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} of a text; None if there is none that ends."""
    start = text.rfind(BOXED)
    if start < 0:
        return None
    start += len(BOXED)
    depth = 1
    for index in range(start, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[start:index]
    return None


def _value(found: re.Match[str]) -> Fraction | None:
    sign = -1 if found["sign"] else 1
    exponent = int(found["exponent"] or 0)
    if len(found[0]) > MAX_DIGITS or abs(exponent) > MAX_EXPONENT:
        return None
    value = _decimal(found["whole"]) * Fraction(10) ** exponent
    below = _decimal(found["below"] or "1")
    return sign * value / below if below else None


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))
