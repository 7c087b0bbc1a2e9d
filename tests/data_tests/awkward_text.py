"""Text that one tokenizer may cut otherwise than another."""

from hypothesis import strategies as st

from l32jax.data.tokenizer import Tokenizer

SAMPLE = "what colour is the 3rd circle?\n\n  It's 2024, schöne 日本語 🙂👍🏽 <|eot_id|>\t²½Ⅷ"
# Includes what regular expressions treat differently: digits, spaces, apostrophes, marks.
AWKWARD = st.text(alphabet="aZ19 \n\t\r'.s²Ⅷé日½\u3000\xa0\u0085\u200b\x1cſ_🙂", max_size=30)
TEXT = st.one_of(st.text(max_size=60), AWKWARD)


def has_every_byte(tokenizer: Tokenizer, text: str) -> bool:
    """Else Hugging Face merges what stands on both sides of a lost byte, and we do not."""
    vocabulary = tokenizer.vocabulary
    tokens = zip(vocabulary.pieces, vocabulary.ids, strict=True)
    lost = {piece[0] for piece, i in tokens if i is None}
    return lost.isdisjoint(text.encode(errors="replace"))
