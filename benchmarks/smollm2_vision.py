"""What SmolLM2 has learned to see: a run of configs/smollm2_vision.py, asked about test pictures.

    python -m benchmarks.smollm2_vision PATH/SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2_vision
    python -m benchmarks.smollm2_vision FILE.gguf RUN --every 1      # every question: over an hour

Every tenth of the 9,673 test questions of easy-VQA, beside what can be had without looking; and
whether the text logits are the language model's own, bit for bit. About six minutes on one core.
Needs the extra `quickstart`.
"""

import argparse
from pathlib import Path

import numpy as np

from benchmarks.tables import print_table
from l32jax import api
from l32jax.data import easy_vqa
from l32jax.evaluate.easy_vqa import ask
from l32jax.generate.model import Model

TEXTS = ("What is the capital of France?", "Explain gravity to a child.", "What is a triangle?")


def unequal_logits(before: Model, after: Model) -> int:
    """How many of the text logits differ in any bit."""
    count = 0
    for text in TEXTS:
        tokens, _ = before.encode(text)
        count += int((before.logits(tokens) != after.logits(tokens)).sum())
    return count


def right_answers(model: Model, every: int) -> list[dict[str, str]]:
    asked = [
        (question, scene.image)
        for scene in easy_vqa.EasyVqa("test")
        for question in scene.questions
    ][::every]
    told = ask(model, [(question.text, image) for question, image in asked])
    right = np.array(
        [
            easy_vqa.final_answer(reply) == question.answer
            for reply, (question, _) in zip(told, asked, strict=True)
        ]
    )
    is_open = np.array([easy_vqa.is_open(question) for question, _ in asked])
    kinds = {"all": is_open | True, "color or shape": is_open, "yes or no": ~is_open}
    return [
        {"questions": kind, "number": str(mask.sum()), "right": f"{right[mask].mean():.1%}"}
        for kind, mask in kinds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trunk", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    model = api.load(options.run)
    print(f"text logits that differ: {unequal_logits(api.load(options.trunk), model)}")
    print_table(right_answers(model, options.every))
    print(f"each question's commonest answer: {easy_vqa.blind_accuracy():.1%}")
    print(f"the commonest answer, always: {easy_vqa.majority_accuracy():.1%}")


if __name__ == "__main__":
    main()
