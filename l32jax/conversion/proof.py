"""That what was written is what was read: tensor by tensor, and by running both."""

from pathlib import Path

import numpy as np

from l32jax import api
from l32jax.checkpoint import gguf_write, hugging_face_tiles
from l32jax.checkpoint.engine import compare
from l32jax.checkpoint.engine.transfer import Progress
from l32jax.checkpoint.formats import Checkpoint, Format, open_checkpoint
from l32jax.config import VisionConfig
from l32jax.conversion.outputs import Content
from l32jax.data.tokenizer import Tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog, and then"
TOLERANCE = 1e-3  # of the logits' standard deviation


def require_equal(content: Content, to: Format, path: Path | str, progress: Progress) -> int:
    expected = content.checkpoint.slices
    if to == "hf":
        expected = hugging_face_tiles.kept(expected)
    if to == "gguf":
        expected = gguf_write.kept(expected, content.checkpoint.config, content.gguf_kind)
    return compare.require_same(expected, open_checkpoint(path, verified=False).slices, progress)


def compare_logits(content: Content, path: Path | str, *, exact: bool) -> str:
    """Both sides' scores of the same tokens, computed in float32."""
    before, after = (
        _logits(side, content.tokenizer)
        for side in (content.checkpoint, open_checkpoint(path, verified=False))
    )
    difference, scale = float(np.abs(before - after).max()), float(before.std())
    if exact and difference > TOLERANCE * scale:
        raise compare.Differs(
            f"logits: they differ by up to {difference:.3g}, at a standard deviation of {scale:.3g}"
        )
    same = float((before.argmax(-1) == after.argmax(-1)).mean())
    return (
        f"verified: logits differ by {difference:.3g} at most (their standard deviation is "
        f"{scale:.3g}); the best token is the same at {same:.0%} of {len(before)} positions"
    )


def _logits(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> np.ndarray:
    """Of a prompt, which for a vision model is about a picture."""
    model = api.model_of(checkpoint, tokenizer, dtype=np.float32)
    width = checkpoint.config.decoder.vocab_size
    tokens = tokenizer.encode(PROMPT) if tokenizer else [(7 * i) % width for i in range(16)]
    if checkpoint.config.vision is None:
        return model.logits(tokens)
    image_id = width  # the one token that has no logit
    return model.logits([image_id, *tokens], [_picture(checkpoint.config.vision)])


def _picture(vision: VisionConfig) -> np.ndarray:
    """Colours that run across two tiles, or one if the model has no more."""
    width = min(vision.max_tiles, 2) * vision.image_size
    rows, columns = np.mgrid[: vision.image_size, :width]
    return np.stack((rows, columns, rows + columns), axis=-1).astype(np.uint8)
