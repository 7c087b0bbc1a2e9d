"""easy-VQA as samples: "easy-vqa/NAME" in a mixture.

train            every question about each picture, each a short chat
train/captions   what each picture shows, in two words, as far as its questions tell
train/reasoned   the same pictures' questions, those two words and whether they fit the question
                 before each answer: "red circle, not blue. no"
test             the untouched split
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from l32jax.data.chat import Image, Message, encode_caption, encode_for_training
from l32jax.data.easy_vqa import EasyVqa, Scene, balanced, conclusion, description
from l32jax.data.images import load_image
from l32jax.data.samples import Document, Sample
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

KINDS = ("train", "train/captions", "train/reasoned", "test")
# Of words that only the picture tells, as targets of a model that does not see it.
GUESS_WEIGHT = 0.1


class EasyVqaSamples(Sequence[Sample]):
    """The pictures of a set, made into samples when looked at; without images asked blind."""

    def __init__(self, name: str, tokenizer: Tokenizer, with_images: bool):
        if name not in KINDS:
            raise InputError(
                f"source 'easy-vqa/{name}' in the mixture: there is none; easy-VQA has "
                f"{', '.join(KINDS)}"
            )
        self._made_of, self._name = (name, tokenizer, with_images), f"easy-vqa/{name}"
        self._tokenizer, self._images = tokenizer, (0,) if with_images else ()
        split, _, self._kind = name.partition("/")
        scenes = EasyVqa("train" if split == "train" else "test")
        self._scenes = [scene for scene in scenes if description(scene) or not self._kind]
        # Scenes come round every epoch; a picture is a few thousand bytes.
        self._sample = functools.cache(self._make_sample)
        self._asked = functools.cache(self._ask)  # some hundred questions with their answers

    def __reduce__(self):
        return EasyVqaSamples, self._made_of

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index):
        return self._sample(self._scenes[index])

    def _make_sample(self, scene: Scene) -> Sample:
        images = (load_image(scene.image),) if self._images else ()
        place = f"{self._name} picture {Path(scene.image).stem}"
        return Sample(tuple(self._documents(scene)), images, place)

    def _documents(self, scene: Scene) -> Iterator[Document]:
        shown = description(scene) or ""  # where it is told, every scene has one
        if self._kind == "captions":
            caption = encode_caption(self._tokenizer, shown, self._images)
            yield Document(*caption, self._images)
            return
        for each in balanced(scene) if self._kind else scene.questions:
            if self._kind == "reasoned":
                yield self._asked(each.text, shown, conclusion(shown, each))
            else:
                yield self._asked(each.text, "", each.answer)

    def _ask(self, text: str, shown: str, told: str) -> Document:
        reply = question(text, shown + told, self._images)
        tokens, weights = encode_for_training(self._tokenizer, reply)
        if not self._images:
            begin = weights.index(1.0)
            guessed = slice(begin, begin + len(self._tokenizer.encode(shown)))
            weights[guessed] = [GUESS_WEIGHT] * len(weights[guessed])
        return Document(tokens, weights, self._images)


def question(text: str, answer: str | None, images: Sequence[Any]) -> list[Message]:
    """A user's question about the images before it, and the answer if it is known."""
    asked = Message("user", (*(Image(image) for image in images), text))
    return [asked] if answer is None else [asked, Message("assistant", answer)]
