"""Weight-only quantization of the frozen base model, by qwix.

A quantized parameter is a `qwix.QArray`, a pytree of integers and scales that stands where the
array stood: it is sharded, scanned over and indexed like it. Computation keeps its dtype, which is
that of the scales. Kernels may also be of a narrower float than the rest of the model: then only
the products with them round their operands to it, and sums are in f32, as TPUs multiply f32 by
default.

Axes: l layers, i input, o output width, v vocabulary, d width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.sharding import NamedSharding, PartitionSpec

from hyperlora.errors import UserError

# kind: (type of the kernels, how many inputs share a scale; None for all)
KINDS = {
    'none': None,
    'bfloat16': (jnp.bfloat16, None),
    'int8': (jnp.int8, None),
    'int4': (jnp.int4, 32),
}


def quantize(path: str, array: jax.Array, kind: str) -> jax.Array | qwix.QArray:
    """One parameter of a decoder, quantized if it is a kernel or an embedding.

    Kernels `[l, i, o]` have scales per output channel, and per 32 inputs in int4; embeddings
    `[v, d]` are int8 with a scale per token, which serves looking up and unembedding alike. Norms,
    biases and the eyes of a model stay as they are. In bfloat16 it is kernels alone that are
    rounded, and nothing has scales.

    Args:
      path: e.g. 'layers/mlp/up_proj/kernel'.
      array: its values, or its shape and place alone, as the result then is.
      kind: a key of `KINDS`.

    Raises:
      UserError: int4, and the input width is no multiple of 32.
    """
    if path.endswith('embedder/embedding') and kind != 'bfloat16':
        return _convert(array, jnp.int8, (0,), None)
    if not (path.startswith('layers/') and path.endswith('kernel')):
        return array
    qtype, block = KINDS[kind]
    if kind == 'bfloat16':
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, qtype, sharding=array.sharding)
        return array.astype(qtype)
    if block and array.shape[1] % block:
        raise UserError(
            f'{kind} needs input widths that are multiples of {block}, not {array.shape[1]} '
            f'({path}); use int8'
        )
    return _convert(array, qtype, (0, 2), block)


def _convert(array, *settings):
    if not isinstance(array, jax.ShapeDtypeStruct):
        return _quantize(array, *settings, array.sharding)
    quantized = jax.eval_shape(lambda x: _quantize(x, *settings, None), array)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=_place(x.shape, array.shape, array.sharding)
        ),
        quantized,
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(array, qtype, channelwise_axes, block, sharding):
    quantized = qwix.quantize(
        array.astype(jnp.float32),
        qtype,
        channelwise_axes=channelwise_axes,
        tiled_axes={1: block} if block else None,
        scale_dtype=array.dtype,
    )
    if not isinstance(sharding, NamedSharding):
        return quantized
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, _place(x.shape, array.shape, sharding)),
        quantized,
    )


def _place(
    shape: tuple[int, ...], whole: tuple[int, ...], sharding: NamedSharding
) -> NamedSharding:
    """As the array of shape `whole`, but undivided along an axis that cannot be divided so."""
    parts = [n // m for n, m in zip(whole, sharding.shard_shape(whole), strict=True)]
    split = zip(sharding.spec, shape, parts, strict=False)
    spec = PartitionSpec(*(axis if n % k == 0 else None for axis, n, k in split))
    return NamedSharding(sharding.mesh, spec)


def product(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    weight: jax.Array | qwix.QArray,
) -> jax.Array:
    """`function(x, weight)`, the weight dequantized; in its dtype if that is narrower than x's.

    The backward pass dequantizes again: else the weights of all layers would wait for it.
    """
    if not isinstance(weight, qwix.QArray):
        narrow = weight.dtype.itemsize < x.dtype.itemsize
        return _narrow(x, weight) if narrow else function(x, weight.astype(x.dtype))
    dequantized = jax.checkpoint(lambda x, w: function(x, qwix.dequantize(w)), prevent_cse=False)
    return dequantized(x, weight)


@jax.custom_vjp
def _narrow(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x @ weight`, x rounded to the dtype of the weight, which is frozen; sums in f32."""
    rounded = x.astype(weight.dtype)
    return jnp.matmul(rounded, weight, preferred_element_type=jnp.float32).astype(x.dtype)


def _narrow_backward(weight, gradient):
    # XLA would fold the transposition into the product, for which it has no fast bf16 kernel on
    # CPUs; the barrier keeps it apart.
    return _narrow(gradient, jax.lax.optimization_barrier(weight.T)), None


_narrow.defvjp(lambda x, weight: (_narrow(x, weight), weight), _narrow_backward)


def rows(table: jax.Array | qwix.QArray, tokens: jax.Array) -> jax.Array:
    """Embeddings of tokens: `[v, d]` and `[...]` -> `[..., d]`."""
    found = jax.tree.map(lambda x: x[tokens], table)
    return qwix.dequantize(found) if isinstance(found, qwix.QArray) else found


def check_unquantized(params: Any) -> None:
    """Refuses quantized parameters where their values are to be written.

    Raises:
      UserError: one is quantized.
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, qwix.QArray))
    narrow = len({x.dtype for x in leaves}) > 1  # kernels narrower than the rest
    if narrow or any(isinstance(x, qwix.QArray) for x in leaves):
        raise UserError(
            'a quantized base model cannot be merged or saved; load it without quantization'
        )
