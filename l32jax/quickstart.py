"""The whole road in minutes on a laptop: a small Llama 3.2 Vision learns to see.

Data: easy-VQA, 64 x 64 pictures of one coloured shape, with questions. The recipe is the family's,
in miniature: a language model that has only ever read; stage 1 trains image encoder and adapter
against it, frozen; stage 2 anneals. The language model never changes once pictures come in.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from l32jax.api import Model, load
from l32jax.config import DecoderConfig, LlamaConfig, RopeScaling, VisionConfig
from l32jax.conversion.convert import save
from l32jax.data import easy_vqa
from l32jax.data.images import load_image
from l32jax.data.tokenizer import Tokenizer
from l32jax.evaluate.easy_vqa import accuracy, accuracy_without_pictures, ask
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.sharding import make_mesh
from l32jax.train.loop import stage_directory, train


def make_tokenizer() -> Tokenizer:
    """Learned from the training questions and the chat format's own words."""
    asked = [f"{question.text} {question.answer}" for question in easy_vqa.questions("train")]
    described = [f"{answer} {answer}, not {answer}." for answer in easy_vqa.answers()] * 1000
    return Tokenizer.train(
        [*asked, *described, *["user", "assistant", "\n\n"] * 1000], num_merges=256
    )


def model_config(vocab_size: int) -> LlamaConfig:
    """Six blocks, two of them looking; a picture is four tiles of 32 pixels, unscaled."""
    trunk = DecoderConfig(
        vocab_size=vocab_size,
        embed_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=160,
        num_groups=2,
        group_pattern=("self", "cross", "self"),
        rope_scaling=RopeScaling(factor=32.0, original_context=128),
        max_context=1024,
    )
    vision = VisionConfig(
        image_size=32,
        patch_size=8,
        embed_dim=64,
        num_heads=2,
        mlp_dim=128,
        num_local_layers=2,
        num_global_layers=1,
        taps=(1,),
    )
    return LlamaConfig(decoder=trunk, vision=vision)


def stages() -> tuple[StageConfig, ...]:
    """Captions teach what is to be seen, fast; then it learns to begin a reply with it.

    How an answer follows, "red circle, not blue. no", the trunk has read in words alone.
    """
    text = DataConfig(
        mixture=(("easy-vqa/train/reasoned", 0.9), ("easy-vqa/train/captions", 0.1)),
        batch_size=16,
        length=80,
        packing="none",  # a row is one picture, and as many questions about it as fit
    )
    pairs = DataConfig(
        mixture=(("easy-vqa/train/captions", 1.0),),
        batch_size=64,
        length=8,
        max_images=1,
        mirror_images=True,
        packing="none",
    )
    questions = dataclasses.replace(
        pairs, mixture=(("easy-vqa/train/reasoned", 1.0),), batch_size=32, length=56
    )
    seeing = OptimizerConfig(  # it ends at the rate where the next stage begins to anneal
        peak_lr=4e-3, final_lr=2e-3, warmup_steps=40, weight_decay=0.1, gate_rate=30.0
    )
    annealing = dataclasses.replace(
        seeing, peak_lr=seeing.final_lr, final_lr=0.0, warmup_steps=0, schedule="linear"
    )
    return (
        StageConfig(
            name="trunk",
            num_steps=600,
            trains=("language_model",),
            data=text,
            optimizer=OptimizerConfig(peak_lr=2e-3, warmup_steps=20, weight_decay=0.1),
        ),
        StageConfig(
            name="stage1",
            num_steps=500,
            trains=("vision_tower", "adapter"),
            data=pairs,
            optimizer=seeing,
        ),
        StageConfig(
            name="stage2",
            num_steps=160,
            trains=("vision_tower", "adapter"),
            data=questions,
            optimizer=annealing,
        ),
    )


def run_config(directory: str | Path, tokenizer: Tokenizer, *, seed: int = 0) -> TrainConfig:
    return TrainConfig(
        model=model_config(tokenizer.num_tokens),
        stages=stages(),
        directory=str(directory),
        seed=seed,
        log_every=25,
    )


def run(directory: str | Path, *, seed: int = 0) -> float:
    """Trains, evaluates, exports and draws; returns the accuracy on the test split.

    A run that was stopped goes on where it was. Everything it makes is below `directory`.
    """
    directory = Path(directory)
    tokenizer = make_tokenizer()
    config = run_config(directory, tokenizer, seed=seed)
    mesh = make_mesh()
    train(config, tokenizer, None, mesh)
    model = load(directory, mesh=mesh)
    hidden, seeing = accuracy_without_pictures(model), accuracy(model)
    exported = _export(model, directory / "hugging_face")
    drawn = _draw(model, directory / "answers.png")
    Console().print(_table(hidden, seeing))
    print(f"language model unchanged: {_trunk_change(config, mesh)}")
    print(f"checkpoint    {stage_directory(config, len(config.stages) - 1)}")
    print(f"Hugging Face  {exported}")
    print(f"pictures      {drawn}")
    asking = "--image FILE --prompt 'what color is the shape?'"
    print(f"to ask it     l32jax generate --model {directory} {asking}")
    return seeing


def _table(hidden: float, seeing: float) -> Table:
    table = Table(title=f"easy-VQA, {len(easy_vqa.questions('test')):,} test questions")
    table.add_column("answers")
    table.add_column("right", justify="right")
    table.add_row("the commonest answer, always", f"{easy_vqa.majority_accuracy():.1%}")
    table.add_row("each question's commonest answer", f"{easy_vqa.blind_accuracy():.1%}")
    table.add_row("the model, pictures hidden", f"{hidden:.1%}")
    table.add_row("the model", f"[bold]{seeing:.1%}[/bold]")
    return table


def _trunk_change(config: TrainConfig, mesh: Mesh) -> str:
    """Text logits after stage 2 beside those of the language model that stage 1 began with."""
    last = len(config.stages) - 1
    before, after = (load(stage_directory(config, stage), mesh=mesh) for stage in (0, last))
    tokens, _ = after.encode("what color is the shape?")
    difference = np.abs(before.logits(tokens) - after.logits(tokens)).max()
    return f"text logits differ by {difference:g} at most"


def _export(model: Model, directory: Path) -> Path:
    """In Hugging Face's format, tokenizer and image processor included."""
    if directory.exists():
        shutil.rmtree(directory)
    save(model, directory, to="hf")
    return directory


def _draw(model: Model, path: Path) -> Path:
    """Some test pictures, each with a question, the model's answer, and the truth if it differs."""
    from matplotlib.figure import Figure  # an extra: only this command draws

    pictures = easy_vqa.EasyVqa("test")
    scenes = [pictures[number * len(pictures) // 12] for number in range(12)]
    asked = [scene.questions[index % len(scene.questions)] for index, scene in enumerate(scenes)]
    pairs = zip(asked, scenes, strict=True)
    answers = ask(model, [(question.text, scene.image) for question, scene in pairs])
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, scene, question, answer in zip(
        figure.subplots(3, 4).flat, scenes, asked, answers, strict=True
    ):
        right = easy_vqa.final_answer(answer) == question.answer
        axes.imshow(load_image(scene.image))
        told = answer if right else f"{answer} (truth: {question.answer})"
        axes.set_title(f"{question.text}\n{told}", color="black" if right else "red", fontsize=9)
        axes.axis("off")
    figure.savefig(path)
    return path
