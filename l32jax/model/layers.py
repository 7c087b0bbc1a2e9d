"""The layers that every block of the family is made of; `sharding` explains the letters."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from qwix import QArray

from l32jax.config import LoraConfig
from l32jax.model.quantise import dequantised
from l32jax.model.remat import PRODUCT
from l32jax.sharding import activation_spec, param_spec


def normal_param(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...], scale: float) -> nnx.Param:
    """A parameter that is born sharded, as the alphabet says."""
    init = jax.nn.initializers.normal(scale)
    return nnx.Param(init(rngs.params(), shape, jnp.float32, out_sharding=param_spec(dims)))


def gate_param() -> nnx.Param:
    """The scalar whose tanh lets a branch in: closed at first."""
    return nnx.Param(jnp.zeros(()))


class RMSNorm(nnx.Module):
    """Normalises the last dimension in float32, rounds to x's dtype, then scales (as Meta)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse_rms).astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse_std = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.eps)
        return (centred * inverse_std * self.scale[...] + self.bias[...]).astype(x.dtype)


def lora_of(lora: LoraConfig | None, name: str) -> LoraConfig | None:
    """What adapts the projection of that name: nothing, if it is not among the targets."""
    return lora if lora is not None and name in lora.targets else None


class Projection(nnx.Module):
    """Maps dimensions `ins` to `outs`; the one place where a weight meets an activation.

    With LoRA, what `lora_b` [outs r] makes of what `lora_a` [r ins] makes of the activation is
    added, scaled. A weight may be quantised (see `quantise`).

    Projection({"d": 2048, "n": 32, "h": 64}, "d", "nh") maps an embedding to 32 heads of 64.
    Weights are stored [outs, ins], torch's layout: conversion never transposes.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        ins: str,
        outs: str,
        *,
        bias: bool = False,
        lora: LoraConfig | None = None,
        rngs: nnx.Rngs,
    ):
        in_shape, out_shape = (tuple(sizes[dim] for dim in dims) for dims in (ins, outs))
        self.ins, self.outs = ins, outs
        scale = math.prod(in_shape) ** -0.5
        self.weight = normal_param(rngs, outs + ins, (*out_shape, *in_shape), scale)
        # A bias is sharded as the activation it is added to.
        zeros = jnp.zeros(out_shape, out_sharding=activation_spec(outs)) if bias else None
        self.bias = nnx.Param(zeros) if bias else None
        self.lora = lora
        self.lora_a = _lora_a(rngs, "r" + ins, (lora.rank, *in_shape)) if lora else None
        self.lora_b = _zeros(outs + "r", (*out_shape, lora.rank)) if lora else None

    def __call__(self, x: Array, to: PartitionSpec | None = None) -> Array:
        """[b t ins] -> [b t outs], accumulated in float32.

        Args:
          to: where the result lives; by default b and t stay as they are sharded.
        """
        if to is None:
            rows = jax.typeof(x).sharding.spec[:2]
            to = PartitionSpec(*rows, *activation_spec(self.outs))
        y = self._weighed(x, to)
        if self.lora_a is not None:
            y = y + self._adapted(x, to)
        if self.bias is not None:
            y = y + self.bias[...]
        return checkpoint_name(y.astype(x.dtype), PRODUCT)

    def _weighed(self, x: Array, to: PartitionSpec) -> Array:
        """Float32, as is what is added to it."""
        ins, outs, weight = self.ins, self.outs, self.weight[...]

        def product(x: Array, weight: Array | QArray) -> Array:
            whole = dequantised(weight, outs + ins, x.dtype)
            return _product(f"bt{ins},{outs}{ins}->bt{outs}", x, whole, to)

        # The backward pass dequantises again: else it would find the weights of all layers saved.
        again = isinstance(weight, QArray)
        return (jax.checkpoint(product) if again else product)(x, weight)

    def _adapted(self, x: Array, to: PartitionSpec) -> Array:
        """Devices that split the inputs share out the places whose sums they make."""
        assert self.lora is not None and self.lora_a is not None and self.lora_b is not None
        ins, outs = self.ins, self.outs
        a, b = (each[...].astype(x.dtype) for each in (self.lora_a, self.lora_b))
        low = _product(f"bt{ins},r{ins}->btr", x, a, PartitionSpec(*to[:2], None))
        return self.lora.scale * _product(f"btr,{outs}r->bt{outs}", low.astype(x.dtype), b, to)


def _lora_a(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...]) -> nnx.Param:
    """As PEFT begins (`reset_lora_parameters`): Kaiming's uniform with a gain of a third."""
    bound = math.prod(shape[1:]) ** -0.5
    where = param_spec(dims)
    return nnx.Param(
        jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound, out_sharding=where)
    )


def _zeros(dims: str, shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, out_sharding=param_spec(dims)))


def _product(equation: str, x: Array, weight: Array, to: PartitionSpec) -> Array:
    return jnp.einsum(equation, x, weight, preferred_element_type=jnp.float32, out_sharding=to)


class SwiGLU(nnx.Module):
    def __init__(self, embed_dim: int, mlp_dim: int, *, lora: LoraConfig | None, rngs: nnx.Rngs):
        sizes = {"d": embed_dim, "f": mlp_dim}
        self.gate = Projection(sizes, "d", "f", lora=lora_of(lora, "gate"), rngs=rngs)
        self.up = Projection(sizes, "d", "f", lora=lora_of(lora, "up"), rngs=rngs)
        self.down = Projection(sizes, "f", "d", lora=lora_of(lora, "down"), rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], to: PartitionSpec) -> Float[Array, "b t d"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x), to)


class GeluMLP(nnx.Module):
    """The image encoder's MLP: biases, and the exact (erf) GELU."""

    def __init__(self, embed_dim: int, mlp_dim: int, *, lora: LoraConfig | None, rngs: nnx.Rngs):
        sizes = {"d": embed_dim, "f": mlp_dim}
        self.up = Projection(sizes, "d", "f", bias=True, lora=lora_of(lora, "up"), rngs=rngs)
        self.down = Projection(sizes, "f", "d", bias=True, lora=lora_of(lora, "down"), rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))
