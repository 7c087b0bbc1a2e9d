"""What kills and saving cost a run: its goodput with kills at random, and steps with and without.

    python -m benchmarks.goodput runs/goodput
    python -m benchmarks.goodput runs/goodput --steps 600 --kills 8 --save-every 20

A small text model trains three times, in processes of their own: saving nothing until its end,
saving every few steps, and that with SIGKILLs at random moments, each of which the same command
follows. About ten minutes on two cores. Saves of real runs are hundreds of steps apart.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.tables import print_table
from l32jax.config import LlamaConfig
from l32jax.config_text import to_json
from l32jax.presets import TINY_TEXT
from l32jax.run_config import DataConfig, OptimizerConfig, StageConfig, TrainConfig
from l32jax.train import goodput, journal

MODEL = LlamaConfig(
    decoder=replace(TINY_TEXT.decoder, embed_dim=256, head_dim=64, mlp_dim=1024, num_groups=6)
)
CHILD = """
import sys
from pathlib import Path
from l32jax import api
from l32jax.config_text import from_json
from l32jax.run_config import TrainConfig
api.run(from_json(TrainConfig, Path(sys.argv[1]).read_text()))
"""
WARM_UP = 10  # first steps of a run, whose times do not count


def config_of(folder: Path, name: str, steps: int, save_every: int) -> TrainConfig:
    stage = StageConfig(
        name="text",
        num_steps=steps,
        trains=("language_model",),
        data=DataConfig(mixture=((str(folder / "text.jsonl"), 1.0),), batch_size=8, length=256),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=10),
    )
    return TrainConfig(
        model=MODEL,
        stages=(stage,),
        directory=str(folder / name),
        save_every=save_every,
        show_every=steps,
        log_every=1,
    )


def start(config: TrainConfig) -> subprocess.Popen:
    path = Path(f"{config.directory}.json")
    path.write_text(to_json(config))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(path.parent / "cache")}
    with Path(f"{config.directory}.txt").open("a") as told:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, path], stdout=told, stderr=told, env=os.environ | cache
        )


def train(config: TrainConfig) -> None:
    code = start(config).wait()
    assert code == 0, Path(f"{config.directory}.txt").read_text()[-2000:]


def train_with_kills(config: TrainConfig, kills: int) -> int:
    """Each kill comes when a random number of further steps is told of; how many there were."""
    metrics, chance, done = Path(config.directory) / "metrics.jsonl", random.Random(0), 0
    while done < kills:
        process, told = start(config), len(journal.read(metrics).records)
        until = told + chance.randrange(config.stages[0].num_steps // kills)
        while process.poll() is None and len(journal.read(metrics).records) <= until:
            time.sleep(0.05)
        if process.poll() is not None:
            return done
        time.sleep(chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
    train(config)
    return done


def steps_of(directory: Path) -> list[float]:
    """Seconds between the ends of steps, with the saves between them."""
    told = journal.read(directory / "metrics.jsonl").records
    times = [line["time"] for line in told if "loss" in line][WARM_UP:]
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def main(folder: Path, steps: int, kills: int, save_every: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    texts = ({"text": f"number {n} and then {n + 1} " * (5 + n % 9)} for n in range(500))
    (folder / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    plain = config_of(folder, "plain", steps, steps)
    saving = config_of(folder, "saving", steps, save_every)
    killed = config_of(folder, "killed", steps, save_every)
    train(plain)
    train(saving)
    count = train_with_kills(killed, kills)
    print_table([row_of(config) for config in (plain, saving, killed)])
    without, with_saves = (steps_of(Path(each.directory)) for each in (plain, saving))
    cost = sum(with_saves) / len(with_saves) / (sum(without) / len(without)) - 1
    waited = blocked_share(Path(saving.directory))
    print(
        f"{count} kills; a save every {save_every} steps of {median(without):.3f} s costs "
        f"{cost:.1%} of step time; training waits for {waited:.1%}"
    )


def blocked_share(directory: Path) -> float:
    seconds = goodput.read(directory).seconds
    return seconds.get("unproductive_checkpoint_save_time", 0.0) / seconds["step"]


def row_of(config: TrainConfig) -> dict[str, str]:
    spent = goodput.read(Path(config.directory))
    whole = sum(spent.seconds.values())
    names = {
        "starting": ("training_prep", "program_startup", "unproductive_checkpoint_restore_time"),
        "saving": ("unproductive_checkpoint_save_time",),
        "done again": (goodput.LOST,),
        "down": (goodput.IDLE,),
    }
    shares = {
        name: f"{sum(spent.seconds.get(each, 0.0) for each in buckets) / whole:.1%}"
        for name, buckets in names.items()
    }
    return {
        "run": Path(config.directory).name,
        "starts": str(spent.starts),
        "seconds": f"{whole:.0f}",
        "goodput": f"{spent.share:.1%}",
    } | shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=20)
    chosen = parser.parse_args()
    main(chosen.folder, chosen.steps, chosen.kills, chosen.save_every)
