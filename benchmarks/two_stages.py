"""What the second stage is worth: stage 1 and stage 2 against stage 1 alone, at equal steps.

    python -m benchmarks.two_stages runs/two_stages
    python -m benchmarks.two_stages runs/two_stages --only charts

Two sets: easy-VQA with the recipe of `l32jax quickstart`, and charts and documents with that of
configs/vision_twin.py. Each run has a trunk that has only read, stage 1 on captions, and stage 2 on
questions. The control starts where stage 1 ended and takes as many steps as stage 2, with the same
schedule, resolution and average, on what stage 1 read. All are asked the same questions; a part of
them at steps on the way.

Writes docs/two_stages.md and its picture. On two CPU cores about an hour; what was stopped goes on.
Needs the extra `quickstart`.
"""

import argparse
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax

from l32jax import api, quickstart
from l32jax.checkpoint.steps import Steps
from l32jax.cli.runs import read_config
from l32jax.data import easy_vqa
from l32jax.data.charts.baselines import majority_answers
from l32jax.data.charts.draw import draw
from l32jax.data.charts.questions import final_answer
from l32jax.data.charts.questions import questions as questions_about
from l32jax.data.charts.scenes import TINY, Charts, Split
from l32jax.data.images import ImageSource
from l32jax.data.tokenizer import Tokenizer
from l32jax.evaluate import charts as charts_evaluation
from l32jax.evaluate import easy_vqa as easy_vqa_evaluation
from l32jax.evaluate.asking import replies
from l32jax.run_config import TrainConfig
from l32jax.train.loop import stage_directory, train

ROOT = Path(__file__).parents[1]
PICTURES = 300  # of each split of charts
ON_THE_WAY = 400  # questions at a step that is not the last
POINTS = 6  # steps of each stage that are looked at


class Asked(NamedTuple):
    text: str
    image: ImageSource
    answer: str


@dataclass(frozen=True)
class Task:
    """A run of trunk, stage 1 and stage 2; what it is asked, by split; and what one can guess."""

    name: str
    config: TrainConfig
    tokenizer: Tokenizer
    splits: Mapping[str, Sequence[Asked]]
    guesses: Mapping[str, str]
    reply_tokens: int

    @property
    def control(self) -> TrainConfig:
        """Stage 2 as it is, on the data of stage 1."""
        _, first, second = self.config.stages
        return replace(
            self.config,
            model=self.config.model_of(1),
            stages=(replace(second, name="more_of_stage1", data=first.data),),
            start_from=str(stage_directory(self.config, 1)),
            directory=self.config.directory + "_control",
        )


def easy_vqa_task(directory: Path) -> Task:
    tokenizer = quickstart.make_tokenizer()
    config = quickstart.run_config(directory / "easy_vqa", tokenizer)
    asked = [
        Asked(question.text, scene.image, question.answer)
        for scene in easy_vqa.EasyVqa("test")
        for question in scene.questions
    ]
    return Task(
        name="easy-VQA",
        config=replace(config, save_every=40, keep=1000),
        tokenizer=tokenizer,
        splits={"test": asked},
        guesses=easy_vqa.majority_answers(),
        reply_tokens=easy_vqa_evaluation.REPLY,
    )


def charts_task(directory: Path) -> Task:
    config = read_config(ROOT / "configs" / "vision_twin.py")
    assert config.tokenizer is not None
    return Task(
        name="charts",
        config=replace(config, directory=str(directory / "charts"), save_every=150, keep=1000),
        tokenizer=Tokenizer.from_file(config.tokenizer),
        splits={"test": asked_about("test"), "unseen looks": asked_about("test-unseen")},
        guesses=majority_answers(TINY),
        reply_tokens=charts_evaluation.REPLY,
    )


def asked_about(split: Split) -> list[Asked]:
    return [
        Asked(question.text, image, question.answer)
        for scene in itertools.islice(Charts(split), PICTURES)
        for image in [draw(scene)]
        for question in questions_about(scene)
    ]


def share_right(asked: Sequence[Asked], told: Iterable[str]) -> float:
    right = [answer == each.answer for each, answer in zip(asked, told, strict=True)]
    return sum(right) / len(right)


class Scores:
    """Shares of right answers by checkpoint and split, in a file: none is computed twice."""

    def __init__(self, file: Path, task: Task):
        self._file, self._task = file, task
        self._known = json.loads(file.read_text()) if file.is_file() else {}

    def at(self, step: Path, *, all_questions: bool) -> dict[str, float]:
        key = f"{step.relative_to(self._file.parent)} {'all' if all_questions else ON_THE_WAY}"
        if key not in self._known:
            print(f"asking {step}")
            self._known[key] = dict(self._ask(step, all_questions))
            self._file.write_text(json.dumps(self._known, indent=1))
        return self._known[key]

    def _ask(self, step: Path, all_questions: bool) -> Iterator[tuple[str, float]]:
        model = api.load(step, mesh=api.mesh_of(self._task.config))
        for split, asked in self._task.splits.items():
            part = asked if all_questions else asked[:: -(-len(asked) // ON_THE_WAY)]
            pairs = [(each.text, each.image) for each in part]
            told = replies(model, pairs, max_new_tokens=self._task.reply_tokens)
            yield split, share_right(part, map(final_answer, told))


def run(task: Task) -> None:
    """Both arms, or what is left of them."""
    mesh = api.mesh_of(task.config)
    train(task.config, task.tokenizer, None, mesh)
    api.run(task.control)


def evenly(steps: Sequence[int]) -> Sequence[int]:
    """Some of them, the last among them."""
    return steps[:: -max(1, -(-len(steps) // POINTS))][::-1]


def results_of(task: Task, file: Path) -> dict:
    """Points (step after the trunk, share right) of every arm, and the shares at their ends."""
    scores, config = Scores(file, task), task.config
    first = config.stages[1].num_steps
    arms = {
        "stage 1": (stage_directory(config, 1), 0),
        "more of stage 1": (stage_directory(task.control, 0), first),
        "stage 2": (stage_directory(config, 2), first),
    }
    points, ends = {}, {}
    for arm, (directory, before) in arms.items():
        steps = Steps(directory)
        points[arm] = [
            (before + step, scores.at(steps.path(step), all_questions=False))
            for step in evenly(steps.all())
        ]
        ends[arm] = scores.at(steps.path(steps.all()[-1]), all_questions=True)
    blind = {
        split: share_right(asked, [task.guesses.get(each.text, "") for each in asked])
        for split, asked in task.splits.items()
    }
    return {
        "points": points,
        "ends": ends,
        "blind": blind,
        "questions": {split: len(asked) for split, asked in task.splits.items()},
        "steps": [stage.num_steps for stage in config.stages],
    }


def page(results: Mapping[str, dict]) -> str:
    """docs/two_stages.md."""
    columns = [(name, split) for name, found in results.items() for split in found["blind"]]
    lines = [
        "# What the second stage is worth",
        "",
        "Written by `python -m benchmarks.two_stages`, which says what is compared "
        f"({platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}; one seed).",
        "",
        "| questions answered right | " + " | ".join(f"{a}, {b}" for a, b in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]

    def row(title: str, value: Callable[[dict, str], str]) -> str:
        return f"| {title} | " + " | ".join(value(results[a], b) for a, b in columns) + " |"

    def share(arm: str) -> Callable[[dict, str], str]:
        return lambda found, split: f"{found['ends'][arm][split]:.1%}"

    lines += [
        row("how many", lambda found, split: f"{found['questions'][split]:,}"),
        row(
            "each question's commonest answer", lambda found, split: f"{found['blind'][split]:.1%}"
        ),
        row("stage 1", share("stage 1")),
        row("stage 1 alone, at equal steps", share("more of stage 1")),
        row("stage 1 and stage 2", share("stage 2")),
        row(
            "steps of trunk, stage 1, stage 2", lambda found, _: ", ".join(map(str, found["steps"]))
        ),
        "",
        "![right answers by step](pictures/two_stages.svg)",
        "",
        "Stage 1 teaches to say what is on a picture, and the longer it lasts the more its replies "
        "are captions, whatever was asked. Stage 2 makes answers of what was learned. "
        f"On the way {ON_THE_WAY} of the questions were asked; the table has all.",
    ]
    return "\n".join(lines) + "\n"


def draw_curves(results: Mapping[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(5 * len(results), 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    colours = {"stage 1": "C0", "more of stage 1": "C7", "stage 2": "C3"}
    for axes, (name, found) in zip(panels, results.items(), strict=True):
        for split, line in zip(found["blind"], ("-", "--"), strict=False):
            for arm, points in found["points"].items():
                start = found["points"]["stage 1"][-1:] if arm != "stage 1" else []
                steps, shares = zip(*((x, 100 * y[split]) for x, y in start + points), strict=True)
                axes.plot(steps, shares, line, color=colours[arm], label=f"{arm}, {split}")
            guessed = 100 * found["blind"][split]
            axes.axhline(
                guessed, color="black", linewidth=0.6, linestyle=line, label=f"guessed, {split}"
            )
        axes.set(
            title=name, xlabel="step after the trunk", ylabel="right answers, %", ylim=(0, 100)
        )
        axes.legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="for runs and scores")
    tasks = {"easy-vqa": easy_vqa_task, "charts": charts_task}
    parser.add_argument("--only", choices=tasks, help="prints results and writes no page")
    options = parser.parse_args()
    directory, results = options.directory.absolute(), {}
    for name in [options.only] if options.only else tasks:
        task = tasks[name](directory)
        run(task)
        results[task.name] = results_of(task, directory / f"{name}.json")
    print(text := page(results))
    if not options.only:
        draw_curves(results, ROOT / "docs" / "pictures" / "two_stages.svg")
        (ROOT / "docs" / "two_stages.md").write_text(text)


if __name__ == "__main__":
    main()
