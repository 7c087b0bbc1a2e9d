"""A model that can be asked: parameters with what is needed to use them."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Key

from l32jax.config import LlamaConfig, SamplingConfig
from l32jax.data.batches import place
from l32jax.data.chat import Image, Message, encode_dialog
from l32jax.data.images import ImageSource
from l32jax.data.rows import Batch, VisionShape, make_prompt_batch
from l32jax.data.tokenizer import StreamDecoder, Tokenizer
from l32jax.errors import InputError
from l32jax.generate.decode import bucket, generate
from l32jax.generate.sampling import require_valid
from l32jax.model.inspect import cross_attention_weights
from l32jax.model.llama import batch_logits, bind
from l32jax.model.parameters import Params
from l32jax.sharding import CONTEXT_AXIS

IMAGE_TOKEN = "<|image|>"
Prompt = str | Sequence[Message]


class Model:
    """Parameters with what is needed to use them.

    Attributes:
      config: what the weights are. params: a nested dict of arrays.
      tokenizer: None if none was found. mesh: where it all lives.
    """

    def __init__(
        self, config: LlamaConfig, params: Params, tokenizer: Tokenizer | None, mesh: Mesh
    ):
        require_matching(tokenizer, config, "the call")
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh

    def logits(self, tokens: Any, images: Sequence[Any] = ()) -> Float[np.ndarray, "*b t v"]:
        """Float32 scores of the next token after each of `tokens`: ids [t] or [b t].

        `images`: those of the one row, or a list for each row, in the order of the image tokens.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim == 1:
            return self.logits(tokens[None], [images])[0]
        each = _each(images, len(tokens))
        batch, rows = self._prompts(list(zip(tokens.tolist(), each, strict=True)), False)
        with jax.set_mesh(self.mesh):
            scores = _logits(self.config, self.params, place(batch, self.mesh))
            return np.asarray(scores)[:rows]

    def generate(
        self,
        prompt: Any,
        *,
        images: Sequence[Any] = (),
        raw: bool = False,
        **sampling: Any,
    ) -> Any:
        """The answer to a prompt, or those to a list of prompts, generated side by side.

        Args:
          prompt: a user's text, or the messages of a dialog; or a list of either.
          images: files, bytes, pictures or uint8 arrays; one list for each prompt of several.
          raw: continue the text itself instead of answering it as a chat.
          sampling: fields of SamplingConfig: max_new_tokens, temperature, top_k, top_p, min_p,
            seed.
        """
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Message)):
            return "".join(self.stream(prompt, images=images, raw=raw, **sampling))
        if not prompt:
            raise InputError("prompt: it is empty; ask something")
        each = _each(images, len(prompt))
        encoded = [self.encode(p, i, raw=raw) for p, i in zip(prompt, each, strict=True)]
        return [self._text(tokens) for tokens in self.generate_tokens(encoded, **sampling)]

    def stream(
        self, prompt: Prompt, *, images: Sequence[Any] = (), raw: bool = False, **sampling: Any
    ) -> Iterator[str]:
        """The answer to one prompt, piece by piece, as whole characters are known."""
        encoded = [self.encode(prompt, images, raw=raw)]
        tokenizer = self.require_tokenizer()
        decoder = StreamDecoder(tokenizer)
        for (token,) in self._steps(encoded, sampling):
            if token not in tokenizer.stop_ids:
                yield decoder.feed(token)
        yield decoder.finish()

    def encode(
        self, prompt: Prompt, images: Sequence[Any] = (), *, raw: bool = False
    ) -> tuple[list[int], list[ImageSource]]:
        """The tokens of a prompt, and its images in the order of their tokens."""
        tokenizer = self.require_tokenizer()
        if not raw:
            return _encode_chat(tokenizer, prompt, images)
        if not isinstance(prompt, str) or not prompt:
            raise InputError("prompt: it is empty or not text; a raw prompt needs some text")
        missing = IMAGE_TOKEN * (len(images) - prompt.count(IMAGE_TOKEN))
        tokens = tokenizer.encode(missing + prompt, allow_special=True)
        if tokenizer.bos_id is not None and tokens[:1] != [tokenizer.bos_id]:
            tokens = [tokenizer.bos_id, *tokens]
        return tokens, list(images)

    def generate_tokens(
        self,
        prompts: Sequence[tuple[Sequence[int], Sequence[Any]]],
        *,
        keys: Key[Array, "rows"] | None = None,
        copies: int = 1,
        **sampling: Any,
    ) -> list[list[int]]:
        """The new tokens after each of (tokens, images), stop token included.

        Args:
          keys: what each answer is drawn with, in place of the seed.
          copies: answers to each prompt, which is read once; they follow one another.
        """
        steps = np.stack(list(self._steps(prompts, sampling, keys, copies)), axis=1)
        return [_until_stop(row, self._stop_ids()) for row in steps.tolist()]

    def cross_attention(
        self, tokens: Sequence[int], images: Sequence[Any]
    ) -> Float[np.ndarray, "l n t s"]:
        """How much each text token attends to each image token, by cross layer and head."""
        if not images:
            raise InputError("images to look at: none are given; cross-attention needs one")
        batch, _ = self._prompts([(list(tokens), list(images))], False)
        with jax.set_mesh(self.mesh):
            weights = _cross_attention(self.config, self.params, place(batch, self.mesh))
            return np.asarray(weights)[:, 0]

    def _steps(
        self,
        prompts: Sequence[tuple[Sequence[int], Sequence[Any]]],
        sampling: dict[str, Any],
        keys: Key[Array, "rows"] | None = None,
        copies: int = 1,
    ) -> Iterator[np.ndarray]:
        options = SamplingConfig(**sampling)
        require_valid(options)
        longest = max(len(tokens) for tokens, _ in prompts)
        if longest + options.max_new_tokens > self.config.decoder.max_context:
            raise InputError(
                f"prompt of {longest} tokens and {options.max_new_tokens} new ones: the model's "
                f"context is {self.config.decoder.max_context}; shorten one of them"
            )
        batch, rows = self._prompts(prompts, True)
        if keys is not None:  # rows that fill up the mesh are copies of the last
            of_row = np.minimum(np.arange(len(batch["tokens"])), rows - 1)
            keys = keys.reshape(rows, copies)[of_row].reshape(-1)
        with jax.set_mesh(self.mesh):
            for tokens in generate(
                self.config,
                self.params,
                place(batch, self.mesh),
                options,
                stop_ids=self._stop_ids(),
                pad_id=0,
                keys=keys,
                copies=copies,
            ):
                yield tokens[: rows * copies]

    def _prompts(self, prompts, bucketed: bool) -> tuple[Batch, int]:
        """A batch that the mesh can divide, and how many of its rows are real."""
        self._check(prompts)
        if self.mesh.shape[CONTEXT_AXIS] > 1:
            raise InputError(
                f"mesh whose context axis has {self.mesh.shape[CONTEXT_AXIS]} devices: it splits "
                "rows, for training; load the model on a mesh with context=1 to ask it"
            )
        rows = len(prompts)
        prompts = [*prompts, *[prompts[-1]] * (-rows % _row_multiple(self.mesh))]
        longest = max(len(tokens) for tokens, _ in prompts)
        most_images = max(len(images) for _, images in prompts)
        vision = None
        if most_images:
            assert self.config.vision is not None
            max_tiles = self.config.vision.max_tiles
            vision = VisionShape.of(self.config, max_images=most_images, max_tiles=max_tiles)
        length = bucket(longest) if bucketed else longest
        batch = make_prompt_batch(prompts, length=length, vision=vision)
        if vision is not None and self.config.compat.row_mask == "meta":
            used = batch["aspect"].prod(axis=-1).sum(axis=-1).max()
            batch["tile_index"] = batch["tile_index"][:, :used]
        return batch, rows

    def _check(self, prompts) -> None:
        vocab_size = self.config.decoder.vocab_size
        highest = vocab_size if self.config.vision is None else vocab_size + 1
        for tokens, images in prompts:
            if images and self.config.vision is None:
                raise InputError(
                    f"{len(images)} images for a text-only model: it cannot see them; "
                    "leave them out, or load a vision model"
                )
            if any(not 0 <= token < highest for token in tokens):
                raise InputError(f"token ids: they must lie between 0 and {highest - 1}")

    def require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "tokenizer of the model: none stands beside its weights; put it there, or name it"
            )
        return self.tokenizer

    def _stop_ids(self) -> tuple[int, ...]:
        return () if self.tokenizer is None else self.tokenizer.stop_ids

    def _text(self, tokens: list[int]) -> str:
        stops = self._stop_ids()
        return self.require_tokenizer().decode([token for token in tokens if token not in stops])


def require_matching(tokenizer: Tokenizer | None, config: LlamaConfig, where: str) -> None:
    if tokenizer is not None and tokenizer.num_tokens != config.decoder.vocab_size:
        raise InputError(
            f"tokenizer in {where}: {tokenizer.num_tokens} tokens, and the model has "
            f"{config.decoder.vocab_size}; give the model's own"
        )


def _encode_chat(
    tokenizer: Tokenizer, prompt: Prompt, images: Sequence[Any]
) -> tuple[list[int], list[ImageSource]]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError("prompt: it is empty; ask something")
        prompt = [Message("user", (*map(Image, images), prompt))]
    elif images:
        raise InputError("images beside messages: put each into its message, as chat.Image")
    parts = [part for message in prompt for part in message.content]
    return encode_dialog(tokenizer, prompt), [p.source for p in parts if isinstance(p, Image)]


def _each(images: Sequence[Any], count: int) -> list[list[Any]]:
    if not images:
        return [[] for _ in range(count)]
    if len(images) != count or not all(isinstance(i, (list, tuple)) for i in images):
        raise InputError(f"images of {count} prompts: give one list of images for each of them")
    return [list(row) for row in images]


def _until_stop(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def _row_multiple(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


@partial(jax.jit, static_argnums=0)
def _logits(config: LlamaConfig, params: Params, batch):
    return batch_logits(bind(config, params), batch)


@partial(jax.jit, static_argnums=0)
def _cross_attention(config: LlamaConfig, params: Params, batch):
    return cross_attention_weights(bind(config, params), batch)
