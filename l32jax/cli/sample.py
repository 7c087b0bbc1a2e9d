"""The verb that samples answers and keeps the best. Its `--help` does not import jax."""

import dataclasses
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from l32jax.cli import INTERRUPTED
from l32jax.cli.ask import Source
from l32jax.cli.counting import Bar
from l32jax.cli.stopping import stoppable
from l32jax.config import MeshConfig, SamplingConfig
from l32jax.errors import InputError

if TYPE_CHECKING:
    from l32jax.align.judging import Judge
    from l32jax.align.output import Report
    from l32jax.align.run import Answerer

# What Llama 3.2's own generation configs say, for answers of some length.
USUAL = SamplingConfig(max_new_tokens=512, temperature=0.6, top_p=0.9)


def sample(
    prompts: Annotated[str, arg(metavar="PROMPTS")],
    destination: Annotated[Path, arg(metavar="DST")],
    /,
    model: Source,
    sampling: SamplingConfig = USUAL,
    *,
    answers: int = 16,
    verifier: Annotated[str | None, arg(metavar="NAME")] = None,
    reward: Annotated[str | None, arg(metavar="PATH")] = None,
    rows: int = 64,
    mesh: str | None = None,
    endpoint: Annotated[str | None, arg(metavar="ADDRESS")] = None,
    parallel: int = 8,
) -> int:
    """Draws many answers to each prompt, and keeps the best as data to tune with.

    A prompt is a dialog without its last answer, which a verifier holds answers against. Verifiers
    are exact, number, choice, python, tool_calls, or module:function of your own. DST becomes a
    folder: answers.jsonl has all answers, best.jsonl the best right one to each prompt, pairs.jsonl
    the best beside the worst, report.json how right they are. Answers are kept as they come: the
    same command goes on after it was stopped (exit code 75) or killed.

    Examples:
      l32jax sample sums.jsonl sampled --model Llama-3.2-1B-Instruct --verifier number
      l32jax sample code.jsonl sampled --model runs/sft --verifier python --temperature 1.0
      l32jax sample calls.jsonl sampled --model runs/sft --verifier tool_calls --answers 32
      l32jax sample vqa.jsonl sampled --model Llama-3.2-11B-Vision --verifier my_rules:score
      l32jax sample sums.jsonl sampled --model big --verifier number --endpoint http://host:8000/v1

    Args:
      prompts: a source of conversations or questions, as a run's mixture names it.
      destination: the folder to make, or to go on with.
      answers: to each prompt.
      verifier: what says whether an answer is right.
      reward: a reward model, which ranks answers; those that are right, if there is a verifier.
      rows: answers drawn at a time; as many as there is memory for.
      mesh: devices along the mesh axes, like data=8; by default one device.
      endpoint: a server that speaks OpenAI's chat completions, where --model is a name; its key is
        read from OPENAI_API_KEY.
      parallel: requests to the endpoint at a time.
    """
    _check(sampling, answers, rows, mesh, endpoint)
    from l32jax.align import run, verifiers

    if verifier is None and reward is None:
        raise InputError(
            "answers to choose from: nothing scores them; give --verifier, --reward or both"
        )
    check = None if verifier is None else verifiers.verifier(verifier)
    try:
        with stoppable(), closing(Bar()) as bar:
            judge, judged_by = (None, {}) if reward is None else _judge(reward)
            settings = {"verifier": verifier, "reward": reward, **judged_by}
            if endpoint is None:
                answerer, found = _engine(model, sampling, answers, rows, mesh)
            else:
                answerer, found = _server(endpoint, model, sampling, parallel)
            report = run.sample(
                prompts,
                destination,
                answerer,
                number=answers,
                scoring=run.Scoring(check, judge),
                settings=settings | found | {"sampling": dataclasses.asdict(sampling)},
                progress=bar,
            )
    except KeyboardInterrupt:
        print(
            "l32jax: stopped; what is done is kept, and the same command goes on", file=sys.stderr
        )
        return INTERRUPTED
    Console().print(_table(report))
    print(
        f"{destination} is written: best.jsonl is a source to tune with, pairs.jsonl to prefer by."
    )
    return 0


def _check(
    sampling: SamplingConfig, answers: int, rows: int, mesh: str | None, endpoint: str | None
) -> None:
    if answers < 1 or rows < 1:
        raise InputError(f"--answers {answers} and --rows {rows}: give at least 1")
    if answers > 1 and sampling.temperature == 0:
        raise InputError(f"--temperature 0 for {answers} answers: all would be equal; raise it")
    if mesh is not None and endpoint is not None:
        raise InputError(f"--mesh {mesh} with --endpoint: it is for a model here; leave one out")


def _judge(path: str) -> tuple["Judge", dict[str, Any]]:
    """The reward model, and what its rewards depend on."""
    from l32jax import api
    from l32jax.align.judging import Judge
    from l32jax.align.sampling import fingerprint

    model = api.load(path)
    return Judge(model), {"reward_parameters": fingerprint(model.params)}


def _engine(
    source: Source, sampling: SamplingConfig, answers: int, rows: int, mesh: str | None
) -> tuple["Answerer", dict[str, Any]]:
    """The model, loaded, and what its answers depend on."""
    from l32jax.align.sampling import Engine, fingerprint
    from l32jax.generate.sampling import require_valid
    from l32jax.sharding import make_mesh

    require_valid(sampling)
    model = source.load(None if mesh is None else make_mesh(MeshConfig.parse(mesh)))
    model.require_tokenizer()
    about = {**dataclasses.asdict(source), "parameters": fingerprint(model.params)}
    return Engine(model, sampling, answers, rows), about


def _server(
    address: str, source: Source, sampling: SamplingConfig, parallel: int
) -> tuple["Answerer", dict[str, Any]]:
    from l32jax.align.endpoint import Endpoint
    from l32jax.generate.sampling import require_valid

    if source != Source(model=source.model):
        raise InputError(
            "--tokenizer, --dtype or --compat with --endpoint: leave them to the server"
        )
    require_valid(sampling)
    found = Endpoint(address, model=source.model, sampling=sampling, parallel=parallel)
    return found, {"endpoint": address, "model": source.model}


def _table(report: "Report") -> Table:
    table = Table("", "number")
    table.columns[1].justify = "right"
    for name, value in dataclasses.asdict(report).items():
        if isinstance(value, float):
            text = f"{value:.1%}" if name.startswith("share") else f"{value:,.1f}"
        else:
            text = f"{value:,}" if isinstance(value, int) else value
        if text is not None:
            table.add_row(name.replace("_", " "), text)
    return table
