"""The verbs that ask a model: once, or turn by turn. Their `--help` does not import jax."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction, arg

from l32jax.config import SamplingConfig
from l32jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from l32jax.api import Model

Files = Annotated[
    tuple[tuple[Path, ...], ...],
    arg(name="image", metavar="FILE ...", help_behavior_hint=""),
    UseAppendAction,
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Which model answers.

    Attributes:
      model: a checkpoint in any format (see `l32jax convert`), a run, or a name of `l32jax models`.
      tokenizer: its file or folder, if it does not stand beside the weights.
      dtype: of weights and computation; bfloat16 by default, on CPU float32.
      compat: whose behaviour to follow where Hugging Face's vision models differ from Meta's.
    """

    model: Annotated[str, arg(metavar="PATH_OR_NAME")]
    tokenizer: Annotated[str | None, arg(metavar="PATH")] = None
    dtype: Literal["float32", "bfloat16"] | None = None
    compat: Literal["meta", "hf"] = "meta"

    def load(self, mesh: "Mesh | None" = None) -> "Model":
        """On one device, or a mesh of several."""
        from l32jax import api

        how = {"dtype": self.dtype, "compat": self.compat, "tokenizer": self.tokenizer}
        return api.load(self.model, mesh=mesh, **how)


def generate(
    model: Source,
    sampling: SamplingConfig,
    *,
    prompt: Annotated[str, arg(metavar="TEXT")],
    images: Files = (),
    raw: bool = False,
) -> int:
    """Answers one prompt, word by word as the words come.

    Examples:
      l32jax generate --model tiny-text --prompt "Say something" --max-new-tokens 20
      l32jax generate --model runs/quickstart --image picture.png --prompt "What shape is it?"
      l32jax generate --model Llama-3.2-1B --raw --prompt "Once upon a time" --temperature 0.8

    Args:
      prompt: what to ask.
      images: files that the prompt is about; they come before it.
      raw: continue the text as it is, instead of answering it as a message of a chat.
    """
    from l32jax.cli.terminal import tell

    files = [path for paths in images for path in paths]
    options = dataclasses.asdict(sampling)
    tell(model.load().stream(prompt, images=files, raw=raw, **options))
    return 0


def chat(model: Source, sampling: SamplingConfig) -> int:
    """Talks with a model, turn by turn.

    A line is a message. /image FILE puts a picture before the next message, /reset begins a new
    conversation, /exit or Ctrl-D leaves; Ctrl-C stops the answer that is being given.

    Examples:
      l32jax chat --model runs/quickstart
      l32jax chat --model Llama-3.2-3B-Instruct --temperature 0.6 --top-p 0.9
      printf 'Hello\\nAnd then?\\n' | l32jax chat --model tiny-text
    """
    from l32jax.cli.terminal import Conversation, lines

    conversation = Conversation(model.load(), dataclasses.asdict(sampling))
    for line in lines():
        if line == "/exit":
            break
        try:
            conversation.take(line)
        except InputError as error:
            if not sys.stdin.isatty():
                raise
            print(f"l32jax: error: {error}", file=sys.stderr)
    return 0
