"""Charts and documents as samples: "charts/NAME" in a mixture.

train             every question about each picture, each a short chat
train/captions    what each picture shows: "bars: red3, blue7"
train/reasoned    the questions, with what is seen before each answer: "bars: red3, blue7. blue"
test              other pictures of the same looks and typefaces
test-unseen       pictures of looks and typefaces that are held out (`looks` lists them)
large/…           any of these in 300 to 1000 pixels, with names, legends and numbers on the axes
"""

import dataclasses
from collections.abc import Iterator, Sequence

from l32jax.data.charts.draw import draw
from l32jax.data.charts.questions import questions, reply
from l32jax.data.charts.scenes import LARGE, TINY, Charts, Scene, Split, description
from l32jax.data.chat import encode_caption, encode_for_training
from l32jax.data.samples import Document, Sample
from l32jax.data.sources.easy_vqa import GUESS_WEIGHT, question
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError

SPLITS: dict[str, Split] = {
    "train": "train",
    "train/captions": "train",
    "train/reasoned": "train",
    "test": "test",
    "test-unseen": "test-unseen",
}
LARGER = "large/"


def open_charts(kind: str, tokenizer: Tokenizer, with_images: bool) -> Sequence[Sample]:
    """The set "charts/`kind`"; without images the same is asked and told blind.

    Raises:
      InputError: there is no such set.
    """
    plain = kind.removeprefix(LARGER)
    if plain not in SPLITS:
        raise InputError(
            f"source 'charts/{kind}' in the mixture: there is none; charts has "
            f"{', '.join(SPLITS)}, and the same after {LARGER}"
        )
    scenes = Charts(SPLITS[plain], TINY if plain == kind else LARGE)
    return ChartSamples(f"charts/{kind}", scenes, plain.partition("/")[2], tokenizer, with_images)


@dataclasses.dataclass(frozen=True)
class ChartSamples(Sequence[Sample]):
    """The pictures of a split as samples, which are drawn when looked at and not kept.

    name: for messages. kind: "" for questions, "captions", or "reasoned".
    """

    name: str
    scenes: Charts
    kind: str
    tokenizer: Tokenizer
    with_images: bool

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index):
        scene = self.scenes[index]
        images = (draw(scene),) if self.with_images else ()
        place = f"{self.name} picture {range(len(self))[index]}"
        return Sample(tuple(self._documents(scene)), images, place)

    def _documents(self, scene: Scene) -> Iterator[Document]:
        shown, images = description(scene), (0,) if self.with_images else ()
        if self.kind == "captions":
            yield Document(*encode_caption(self.tokenizer, shown, images), images)
            return
        for asked in questions(scene):
            told = reply(shown, asked) if self.kind else asked.answer
            messages = question(asked.text, told, images)
            tokens, weights = encode_for_training(self.tokenizer, messages)
            if self.kind and not self.with_images:
                begin = weights.index(1.0)
                guessed = slice(begin, begin + len(self.tokenizer.encode(shown)))
                weights[guessed] = [GUESS_WEIGHT] * len(weights[guessed])
            yield Document(tokens, weights, images)
