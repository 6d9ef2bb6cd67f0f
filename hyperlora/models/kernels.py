"""Fused kernels of accelerators for causal self-attention: scores are never written to memory.

Axes: b rows, s tokens, k key/value heads, q query heads per key/value head, h head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib
from jax.sharding import PartitionSpec

from hyperlora.sharding import RULES

_LANES = 128  # of a TPU's vector unit: splash blocks are multiples of it
_BLOCK = 512
_SHORTEST = 256  # with fewer tokens, copies into a kernel's layout move more than scores would


def find(
    q: jax.Array, k: jax.Array, segments: jax.Array | None, softcap: float | None
) -> Callable[..., jax.Array] | None:
    """The kernel for the devices that will compute.

    Args:
      q, k, segments, softcap: as for `attention.causal_attention`.

    Returns:
      A function of q, k, v, segments, window (None in a layer that is not local), scale and
      softcap, `[b, s, k * q * h]`; None where XLA should attend.
    """
    platform = _platform()
    batch, tokens, _, width = q.shape
    if platform == 'tpu' and tokens >= _SHORTEST:
        kernel = splash
    elif (
        platform == 'gpu'
        and segments is None
        and softcap is None
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and width <= 128
        and width % 8 == 0
    ):
        kernel = cudnn
    else:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel
    # XLA cannot divide kernels among devices: each runs its own on its rows and heads.
    rules = nn.get_logical_axis_rules() or RULES
    rows, heads = nn.logical_to_mesh_axes(('batch', 'heads'), rules)
    if batch % _parts(mesh, rows) or k.shape[2] % _parts(mesh, heads):
        return None

    def on_shards(q, k, v, segments, *settings):
        place = PartitionSpec(rows, None, heads)
        return jax.shard_map(
            lambda *args: kernel(*args, *settings),
            in_specs=(place, place, place, PartitionSpec(rows)),
            out_specs=place,
            check_vma=False,  # kernels do not say over which axes their results vary
        )(q, k, v, segments)

    return on_shards


def _platform() -> str | None:
    """That of the mesh in context, which may be elsewhere (see `hyperlora.aot`), if there is one.

    None for a mesh without devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend()
    return mesh.abstract_device and mesh.abstract_device.platform


def _parts(mesh: jax.sharding.AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention, for TPUs; arguments and result as for `find`.

    Args:
      interpret: run the kernel's operations one by one, on any device.
    """
    batch, tokens, heads, width = q.shape
    length = -(-tokens // _LANES) * _LANES
    block = math.gcd(length, _BLOCK)
    if window is None:
        mask = splash_lib.CausalMask((length, length))
    else:
        mask = splash_lib.LocalMask((length, length), (window - 1, 0), 0)
    kernel = splash_lib.make_splash_mha_single_device(
        splash_lib.MultiHeadMask([mask] * heads),
        block_sizes=splash_lib.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,  # 5 products rather than 7
        ),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def pad(x):  # to the right, where causality hides it
        return jnp.pad(x, ((0, 0), (0, length - tokens)) + ((0, 0),) * (x.ndim - 2))

    q, k, v = (pad(x).swapaxes(1, 2) for x in (q * scale, k, v))
    if segments is not None:
        segments = splash_lib.SegmentIds(pad(segments), pad(segments))
    y = jax.vmap(kernel)(q, k, v, segments)[:, :, :tokens]
    return y.swapaxes(1, 2).reshape(batch, tokens, heads * width)


def cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: None,
    window: int | None,
    scale: float,
    softcap: None,
) -> jax.Array:
    """Flash attention of cuDNN, for GPUs; arguments and result as for `find`."""
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation='cudnn',
    )
    return y.reshape(*y.shape[:2], -1)
