"""What SFT and DPO change in a vision model, and what they leave: image questions beside text.

    python -m benchmarks.vision_alignment runs/vision_alignment

The model is that of `l32jax quickstart`. SFT shows it two ways to reply to a question about a
picture, with what it sees before the answer ("red circle, not blue. no") and without ("no"), as
often; DPO then prefers the first. A fifth of the rows has no picture. Image encoder and adapter
train, the language model is frozen. Told is how often replies are right, how often they say what is
seen, and what became of the language model, of its replies where no picture is shown, and of
replies that were already as they should be.

On two CPU cores about ten minutes; what was stopped goes on. Needs the extra `quickstart`.
"""

import argparse
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import print_table
from l32jax import api, quickstart
from l32jax.data import easy_vqa
from l32jax.data.easy_vqa import EasyVqa, Scene, balanced, conclusion, description, final_answer
from l32jax.data.images import load_image
from l32jax.evaluate.easy_vqa import ask
from l32jax.model.parameters import flatten, trains
from l32jax.objective_config import Dpo
from l32jax.recipes import SEEING
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.train.loop import train

SCENES = 1500  # to learn from, one question each
TEXTS = 200
ASKED = 10  # one of so many of the test questions


def written(folder: Path) -> dict[str, str]:
    """Dialogs and comparisons of them, about pictures and about none, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [scene for scene in EasyVqa("train") if description(scene)][:SCENES]
    seen = [about(folder, scene, number) for number, scene in enumerate(scenes)]
    guesses = itertools.islice(easy_vqa.majority_answers().items(), TEXTS)
    read = [
        {"question": text, "long": f"{guess}. {guess}", "short": guess} for text, guess in guesses
    ]
    kinds = {"dialogs": dialogs, "pairs": comparisons}
    return {
        f"{what} {kind}": write(folder / f"{what}_{kind}.jsonl", make(told))
        for what, told in (("seen", seen), ("read", read))
        for kind, make in kinds.items()
    }


def about(folder: Path, scene: Scene, number: int) -> dict[str, str]:
    asked = balanced(scene)
    question, shown = asked[number % len(asked)], description(scene) or ""
    picture = Path(scene.image).name
    shutil.copy(scene.image, folder / picture)
    long = shown + conclusion(shown, question)
    return {"image": picture, "question": question.text, "long": long, "short": question.answer}


def dialogs(told: Iterable[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """Long and short answers in turn."""
    for each, kind in zip(told, itertools.cycle(("long", "short")), strict=False):
        yield {"question": each["question"], "answer": each[kind], **picture_of(each)}


def comparisons(told: Iterable[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    for each in told:
        shown = [{"type": "image", "path": path} for path in picture_of(each).values()]
        said = [*shown, {"type": "text", "text": each["question"]}]
        asked = [{"role": "user", "content": said}]
        yield {"messages": asked, "chosen": each["long"], "rejected": each["short"]}


def picture_of(each: Mapping[str, str]) -> dict[str, str]:
    return {"image": each["image"]} if "image" in each else {}


def write(path: Path, records: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def aligned(
    directory: Path, begun: TrainConfig, files: Mapping[str, str]
) -> dict[str, TrainConfig]:
    """SFT from where a run ended, and DPO from there."""

    def data(kind: str, **more: Any) -> DataConfig:
        mixture = ((files[f"seen {kind}"], 0.8), (files[f"read {kind}"], 0.2))
        return DataConfig(
            mixture=mixture, batch_size=16, length=192, max_images=4, max_tiles=4, **more
        )

    sft = StageConfig(
        name="sft",
        num_steps=150,
        trains=SEEING,
        data=data("dialogs"),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=10, weight_decay=0.1),
    )
    dpo = replace(
        sft,
        name="dpo",
        num_steps=60,
        data=data("pairs", max_pairs=4),
        objective=Dpo(reference="ema", refresh_every=10),
        optimizer=OptimizerConfig(peak_lr=2e-4, warmup_steps=5),
    )
    first = TrainConfig(
        model=begun.model,
        stages=(sft,),
        directory=str(directory / "sft"),
        start_from=begun.directory,
    )
    second = replace(
        first, stages=(dpo,), directory=str(directory / "dpo"), start_from=first.directory
    )
    return {"SFT": first, "DPO": second}


class Told:
    """What a model says of pictures, and without any; and what it is made of."""

    def __init__(self, model: api.Model):
        questions = [
            (question, scene) for scene in EasyVqa("test") for question in scene.questions
        ][::ASKED]
        pictures = {scene.image: load_image(scene.image) for _, scene in questions}
        self.seen = ask(model, [(q.text, pictures[scene.image]) for q, scene in questions])
        self.right = np.array(
            [final_answer(r) == q.answer for r, (q, _) in zip(self.seen, questions, strict=True)]
        )
        self.long = np.array([len(reply.split()) > 1 for reply in self.seen])
        texts = sorted({question.text for question, _ in questions})
        self.read = ask(model, [(text, None) for text in texts])
        self.logits = [model.logits(model.encode(text)[0]) for text in texts[:20]]
        is_seeing = trains(SEEING, model.config)
        leaves = flatten(model.params).items()
        self.trunk = {path: np.asarray(leaf) for path, leaf in leaves if not is_seeing(path)}

    def row(self, name: str, before: "Told") -> dict[str, str]:
        """Numbers beside those of the stage before."""
        kept = [
            a == b for a, b, long in zip(self.seen, before.seen, before.long, strict=True) if long
        ]
        bits = sum(int((self.trunk[p] != leaf).sum()) for p, leaf in before.trunk.items())
        logits = sum(int((a != b).sum()) for a, b in zip(self.logits, before.logits, strict=True))
        replies = sum(a != b for a, b in zip(self.read, before.read, strict=True))
        return {
            "model": name,
            "right": f"{self.right.mean():.1%}",
            "says what is seen": f"{self.long.mean():.1%}",
            "long replies as before": f"{np.mean(kept):.1%}" if kept else "",
            "trunk weights changed": f"{bits}",
            "text logits changed": f"{logits}",
            "replies to text changed": f"{replies} of {len(self.read)}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    tokenizer = quickstart.make_tokenizer()
    begun = quickstart.run_config(directory / "quickstart", tokenizer)
    train(begun, tokenizer, None, api.mesh_of(begun))
    told = [Told(api.load(begun.directory))]
    rows = [told[0].row("quickstart", told[0])]
    for name, config in aligned(directory, begun, written(directory / "data")).items():
        told.append(Told(api.run(config)))
        rows.append(told[-1].row(name, told[-2]))
    print_table(rows)


if __name__ == "__main__":
    main()
