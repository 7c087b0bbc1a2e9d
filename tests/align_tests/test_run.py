"""Answers are kept as they come, and what is made of them appears whole and can be read."""

import json
import math
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image as Pillow

from l32jax.align import output, run
from l32jax.align.answer_log import AnswerLog
from l32jax.align.choosing import Scored
from l32jax.align.prompts import Prompt, prompt_of
from l32jax.align.run import Scoring, sample
from l32jax.align.sampling import Answer
from l32jax.data.records import Bad, Record, to_sample
from l32jax.data.sources.open import open_records, open_source
from l32jax.data.tokenizer import Tokenizer
from l32jax.errors import InputError
from tests.data_tests.pictures import png

NUMBER = 4
SETTINGS = {"model": "spoken for", "sampling": {"seed": 0}}


class Silent:
    def begin(self, what, total):
        self.total, self.done = total, 0

    def advance(self, amount):
        self.done += amount


class Parrot:
    """Answers with a digit; can be made to fail on the way."""

    def __init__(self, after: int = 10**9):
        self.after, self.asked = after, []

    def fault(self, prompt: Prompt) -> str | None:
        return "too long" if "long" in str(prompt.messages) else None

    def answers(self, wanted):
        for prompt, numbers in wanted:
            if "refuse" in str(prompt.messages):
                yield Bad(prompt.place, "refused")
                continue
            if self.after == 0:
                raise KeyboardInterrupt
            self.after -= 1
            self.asked += [(prompt.place, number) for number in sorted(numbers)]
            texts = {n: f"it is {n} <image>" if n < 3 else "" for n in sorted(numbers)}
            yield [Answer(prompt, n, text, 7, True) for n, text in texts.items()]


def is_two(answer, truth):
    return float("2" in answer)


@pytest.fixture
def source(tmp_path) -> str:
    """Text, a picture beside it, what cannot be used, and one prompt twice."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(png(28, 28))
    lines = [
        {"question": "One and one?", "answer": "2"},
        {"question": "What is it?", "answer": "2", "image": "pictures/a.png"},
        {"messages": [{"role": "user", "content": ["See", {"image": "pictures/a.png"}, "?"]}]},
        {"question": "One and one?", "answer": "2"},
        {"question": "long", "answer": "2"},
        {"question": "refuse", "answer": "2"},
        {"text": "a document"},
        {"question": "Lost?", "answer": "2", "image": "lost.png"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "<image>?"},
                      {"role": "assistant", "content": "2"}]},
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def go(source, folder, answerer=None, scoring=None, **others):
    return sample(
        source,
        folder,
        answerer or Parrot(),
        number=others.pop("number", NUMBER),
        scoring=scoring or Scoring(is_two),
        settings=others.pop("settings", SETTINGS),
        progress=others.pop("progress", Silent()),
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    names = (output.BEST, output.PAIRS, output.SKIPPED)
    return {name: (folder / name).read_bytes() for name in names}


def test_every_prompt_is_told_of(source, tmp_path):
    progress = Silent()
    report = go(source, tmp_path / "out", progress=progress)
    assert (report.prompts, report.duplicates, report.bad) == (4, 1, 4)
    assert (report.answers, report.tokens, report.best, report.pairs) == (16, 112, 4, 4)
    assert report.share_right == 4 / 16
    assert report.share_of_prompts_with_a_right_answer == 1
    assert progress.done == progress.total == 5
    bad = {item["place"].split()[-1]: item["why"] for item in lines(tmp_path / "out/bad.jsonl")}
    assert bad.keys() == {"5", "6", "7", "8"}
    assert bad["5"] == "too long" and bad["6"] == "refused" and "document" in bad["7"]
    assert json.loads((tmp_path / "out/report.json").read_text())["best"] == 4


def test_the_best_is_data_to_tune_with(source, tmp_path):
    folder = tmp_path / "out"
    go(source, folder)
    tokenizer = Tokenizer.bytes_only().with_image_token()
    samples = open_source(str(folder / output.BEST), tokenizer, with_images=True)
    assert len(samples) == 4 and not any(isinstance(sample, Bad) for sample in samples)
    assert [len(sample.images) for sample in samples] == [0, 1, 1, 0]
    prompts = {prompt_of(record).key for record in good(source) if is_whole(record)}
    for record, line in zip(good(folder / output.BEST), lines(folder / output.BEST), strict=True):
        asked, about = prompt_of(record), line["provenance"]
        assert asked.truth.answer == "it is 2 <image>"
        assert about["prompt"] in prompts and about["answers"] == NUMBER
        assert about["score"] == {"number": 2, "verifier": 1.0, "reward": None}
        assert about["model"] == "spoken for" and about["sampling"] == {"seed": 0}
        assert about["l32jax"]


def is_whole(record: Record) -> bool:
    return bool(record.messages) and "Lost" not in str(record)


def good(source) -> list[Record]:
    return [record for record in open_records(str(source)) if isinstance(record, Record)]


def test_what_was_asked_can_be_read_from_what_was_written(source, tmp_path):
    folder = tmp_path / "out"
    go(source, folder)
    asked = {(p := prompt_of(r)).place: p for r in good(source) if is_whole(r)}
    for record, line in zip(good(folder / output.BEST), lines(folder / output.BEST), strict=True):
        before = asked[line["provenance"]["place"]]
        now = Prompt(prompt_of(record).messages, before.truth)
        assert now.key == before.key
    for line in lines(folder / output.PAIRS):
        assert (line["chosen"], line["rejected"], line["margin"]) == (
            "it is 2 <image>", "it is 1 <image>", 1.0,
        )  # fmt: skip
        assert line["messages"][-1]["role"] == "user"


def test_pictures_are_copied_once(source, tmp_path):
    go(source, tmp_path / "out")
    (copy,) = (tmp_path / "out/images").iterdir()
    assert copy.suffix == ".png" and copy.read_bytes() == png(28, 28)
    assert Pillow.open(copy).size == (28, 28)


def test_a_stopped_run_goes_on_where_it_was(source, tmp_path):
    go(source, tmp_path / "whole")
    folder, first = tmp_path / "out", Parrot(after=2)
    with pytest.raises(KeyboardInterrupt):
        go(source, folder, first)
    assert not (folder / output.BEST).exists() and not (folder / output.REPORT).exists()
    with (folder / run.ANSWERS).open("a") as file:
        file.write('{"prompt": "torn')
    second = Parrot()
    report = go(source, folder, second)
    assert report.answers == 16
    assert len(first.asked) == len(second.asked) == 8 and not set(first.asked) & set(second.asked)
    assert contents(folder) == contents(tmp_path / "whole")
    last = Parrot(after=0)
    assert go(source, folder, last).answers == 16 and not last.asked


def test_more_answers_can_be_asked_for_later_and_fewer_looked_at(source, tmp_path):
    folder = tmp_path / "out"
    assert go(source, folder, number=2).share_right == 0
    second = Parrot()
    assert go(source, folder, second).best == 4
    assert {number for _, number in second.asked} == {2, 3}
    assert go(source, folder, Parrot(after=0), number=2).best == 0


@pytest.mark.parametrize("damage", ["no JSON\n", "{}\n", '{"prompt": "a", "number": 1}\n', "[]\n"])
def test_a_line_that_is_no_answer_is_told(damage, source, tmp_path):
    go(source, tmp_path / "out")
    path = tmp_path / "out" / run.ANSWERS
    path.write_text(damage + path.read_text())
    with pytest.raises(InputError, match="answers.jsonl line 1: it is no answer; remove the line"):
        go(source, tmp_path / "out")


def test_a_folder_holds_answers_of_one_kind(source, tmp_path):
    go(source, tmp_path / "out")
    for other in ({"model": "b"}, {"sampling": {"seed": 1}}, {"verifier": "exact"}):
        with pytest.raises(InputError, match="give the same again, or another folder"):
            go(source, tmp_path / "out", settings=SETTINGS | other)


def test_settings_that_gave_no_answer_can_be_corrected(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(source, tmp_path / "out", Parrot(after=0), settings=SETTINGS | {"model": "mistaken"})
    go(source, tmp_path / "out")
    with pytest.raises(InputError, match="drawn with model='spoken for', not 'mistaken'"):
        go(source, tmp_path / "out", settings=SETTINGS | {"model": "mistaken"})


@pytest.mark.parametrize("damage", ["", "no JSON", "[]"])
def test_damaged_settings_are_told(damage, source, tmp_path):
    go(source, tmp_path / "out")
    (tmp_path / "out" / run.SETTINGS).write_text(damage)
    with pytest.raises(InputError, match="settings.json: they are damaged"):
        go(source, tmp_path / "out")


def test_a_run_that_was_killed_at_once_goes_on(source, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (run.LOCK, f"{run.SETTINGS}.unfinished"):
        (folder / name).write_text("")
    assert go(source, folder).best == 4


def test_a_source_of_which_everything_is_refused_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "refuse", "answer": "2"}\n')
    with pytest.raises(InputError, match="none of them is answered: a.jsonl line 1: refused"):
        go(str(path), tmp_path / "out")


def test_a_failure_while_writing_leaves_what_was_there(source, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    go(source, folder, number=2)
    before = contents(folder)
    monkeypatch.setattr(output, "_count", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(source, folder)
    assert contents(folder) == before and not list(folder.glob("*.unfinished"))


def test_a_source_of_nothing_that_can_be_asked_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="none of them is answered: a.jsonl line 1: it is a doc"):
        go(str(path), tmp_path / "out")


def test_a_verifier_that_fails_is_counted(source, tmp_path):
    def fails(answer, truth):
        raise ValueError("oh")

    report = go(source, tmp_path / "out", scoring=Scoring(fails))
    assert report.verifier_failures == report.answers == 16 and report.best == 0
    assert report.first_failure == "ValueError: oh"


def test_prompts_that_the_verifier_can_tell_nothing_of_are_not_asked(source, tmp_path):
    def needs_truth(answer, truth):
        if truth.answer is None:
            raise InputError("no truth")
        return 1.0

    assert go(source, tmp_path / "out", scoring=Scoring(needs_truth)).bad == 5


# Reward models


def rewards(messages, images, told) -> list[float]:
    assert len(images) == str(messages).count("Image(")
    return [-float(text.split()[2]) for text in told]


def test_a_reward_alone_ranks_all_answers(source, tmp_path):
    short = Scoring(judge=lambda messages, images, told: [-float(len(text)) for text in told])
    assert go(source, tmp_path / "out", number=3, scoring=short).pairs == 0
    report = go(source, tmp_path / "other", number=3, scoring=Scoring(judge=rewards))
    assert report.share_right is None and report.pairs == 4
    for line in lines(tmp_path / "other" / output.PAIRS):
        assert line["chosen"].startswith("it is 0") and line["margin"] == 2


def test_a_reward_ranks_what_the_verifier_lets_through(source, tmp_path):
    def not_zero(answer, truth):
        return float("0" not in answer and answer != "")

    go(source, tmp_path / "out", scoring=Scoring(not_zero, rewards))
    for line in lines(tmp_path / "out" / output.BEST):
        assert line["provenance"]["score"] == {"number": 1, "verifier": 1.0, "reward": -1.0}
    kept = lines(tmp_path / "out" / run.ANSWERS)
    assert {(a["number"], a["reward"]) for a in kept} == {(0, None), (1, -1), (2, -2), (3, None)}


@pytest.mark.parametrize("wrong", [[math.nan] * NUMBER, [1.0]])
def test_rewards_that_are_none_end_the_run(wrong, source, tmp_path):
    with pytest.raises(InputError, match="look at the reward model"):
        go(source, tmp_path / "out", scoring=Scoring(judge=lambda *_: wrong))


def test_something_must_score():
    with pytest.raises(InputError, match="nothing scores them"):
        Scoring()


# The log


def test_the_log_gives_back_what_it_was_given(tmp_path):
    kept = [Scored(n, f"ä\u2028\n{n}", n, bool(n), None, 0.1 * n, "why") for n in range(3)]
    with closing(AnswerLog(tmp_path / "a")) as log:
        log.append("one", kept[::-1])
        log.append("two", kept[:1])
        assert log.read("one", 3) == kept and log.read("one", 2) == kept[:2]
    with closing(AnswerLog(tmp_path / "a")) as log:
        assert log.read("one", 3) == kept and log.numbers("two") == {0}
        assert log.read("three", 3) == [] and log.numbers("three") == set()


def test_training_does_not_see_prompts_without_answers(source):
    found = [
        to_sample(r, Tokenizer.bytes_only().with_image_token(), with_images=True)
        for r in good(source)
    ]
    assert [f.why for f in found if isinstance(f, Bad)][0] == "the assistant says nothing in it"
