"""Rewards of answers by a reward model, many at a time."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from l32jax.data.batches import own_rows, place
from l32jax.data.chat import Message, encode_for_training
from l32jax.data.images import ImageSource
from l32jax.data.rows import Batch, VisionShape, make_row, stack
from l32jax.data.samples import Document, Sample
from l32jax.errors import InputError
from l32jax.generate.decode import bucket
from l32jax.generate.model import Model
from l32jax.model.llama import bind
from l32jax.train.preferences import rewards

ROWS = 8  # documents at a time, one in each row


class Judge:
    """A reward model, asked what answers are worth; `align.run` takes it to choose by.

    Raises:
      InputError: the model has no reward head.
    """

    def __init__(self, model: Model):
        if not model.config.reward_head:
            raise InputError(
                "reward model: it has no reward head; train one, with reward_head=True of its model"
            )
        self._model = model

    def __call__(
        self, messages: Sequence[Message], images: Sequence[ImageSource], answers: Sequence[str]
    ) -> list[float]:
        """Rewards of answers to a dialog; of `images` there are as many as places in it."""
        tokenizer, seen = self._model.require_tokenizer(), tuple(range(len(images)))
        dialogs = ((*messages, Message("assistant", answer)) for answer in answers)
        encoded = (encode_for_training(tokenizer, dialog) for dialog in dialogs)
        documents = tuple(Document(*each, seen) for each in encoded)
        return self.documents(Sample(documents, tuple(images)))

    def documents(self, sample: Sample) -> list[float]:
        """What each document of a sample is worth."""
        found: list[float] = []
        for first in range(0, len(sample.documents), ROWS):
            part = sample.documents[first : first + ROWS]
            found += self._scored(part, sample.images)[: len(part)]
        return found

    def _scored(
        self, documents: Sequence[Document], images: tuple[ImageSource, ...]
    ) -> list[float]:
        """Padded to one of a few shapes."""
        model = self._model
        length = bucket(max(len(document.tokens) for document in documents))
        if length > model.config.decoder.max_context:
            raise InputError(
                f"answer with its prompt of {length} tokens: beyond the model's context"
            )
        vision = None
        if images:
            assert model.config.vision is not None
            most = model.config.vision.max_tiles
            vision = VisionShape.of(model.config, max_images=len(images), max_tiles=most)
        filled = [*documents, *[documents[-1]] * (ROWS - len(documents))]
        rows = [make_row([Sample((d,), images)], length=length, vision=vision) for d in filled]
        batch: Batch = stack(rows)
        batch["document"] = np.where(batch["stop"] > 0, 0, -1).astype(np.int32)
        with jax.set_mesh(model.mesh):
            return own_rows(self._run(model.params, place(batch, model.mesh)))[:, 0].tolist()

    @cached_property
    def _run(self) -> Any:
        config = self._model.config
        return jax.jit(lambda params, batch: rewards(bind(config, params), batch, 1))
