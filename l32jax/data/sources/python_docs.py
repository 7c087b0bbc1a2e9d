"""Python's own reference, which comes with Python: "python-docs/NAME" in a mixture.

train   the topics that `help()` knows (`pydoc_data`), each a document, some 100,000 tokens in all
test    every eighth of them, by name, which train does not have

The text is that of the Python that runs, and changes a little with its version.
"""

from collections.abc import Sequence

from l32jax.data.records import Bad, Record, SamplesOf
from l32jax.data.samples import Sample
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

SPLITS = ("train", "test")
EVERY = 8


def open_python_docs(name: str, tokenizer: Tokenizer) -> Sequence[Sample | Bad]:
    """The topics of a split, in the order of their names."""
    if name not in SPLITS:
        raise InputError(
            f"source 'python-docs/{name}' in the mixture: there is none; Python's documentation "
            f"has {', '.join(SPLITS)}"
        )
    records = [
        Record(f"python-docs topic {topic!r}", parts=(text,))
        for number, (topic, text) in enumerate(sorted(_topics().items()), 1)
        if (number % EVERY == 0) == (name == "test")
    ]
    return SamplesOf(records, tokenizer, with_images=False)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        raise InputError(
            "source 'python-docs' in the mixture: this Python comes without pydoc_data; install "
            "its documentation, or use another source"
        ) from None
    return topics
