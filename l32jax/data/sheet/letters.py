"""Text of strangers, so that all of it is seen and none of it does anything."""

from collections.abc import Iterator


def letters(text: str) -> Iterator[tuple[str, bool]]:
    """Stretches of `text`, and whether each is a sign for what would not be seen.

    That is every letter that is not printable: control characters, line breaks, marks that turn
    the direction of writing, spaces other than the usual one. They look as in a Python string.
    """
    begin = 0
    for place, letter in enumerate(text):
        if not letter.isprintable():
            if begin < place:
                yield text[begin:place], False
            yield letter.encode("unicode_escape").decode(), True
            begin = place + 1
    if begin < len(text):
        yield text[begin:], False


def plainly(text: str) -> str:
    """In one line, without what is not printable."""
    return "".join(stretch for stretch, _ in letters(text))
