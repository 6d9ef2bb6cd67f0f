"""`Lora`: the one type that crosses from a hypernetwork to a frozen language model.

Axes: l layers, g rows (one LoRA each), r rank, i input width, o output width, b batch rows,
s tokens, n chunks.

    delta(x) = scaling * ((x @ a^T) * rank_weights) @ b

Rank is the currency of composition. Chunks of a document are concatenated along the rank, and a
row that must see only some of them masks the ranks of the others, so A and B are never repeated
per batch row or per token. A rank weight other than 0 or 1 counts a chunk several times or scales
a document.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from hyperlora.errors import UserError
from hyperlora.models import quantization
from hyperlora.models.families import DecoderConfig

# Where each adapted projection lives among the decoder's stacked layer parameters.
MODULES = {
    'q_proj': ('attention', 'q_proj'),
    'k_proj': ('attention', 'k_proj'),
    'v_proj': ('attention', 'v_proj'),
    'o_proj': ('attention', 'o_proj'),
    'gate_proj': ('mlp', 'gate_proj'),
    'up_proj': ('mlp', 'up_proj'),
    'down_proj': ('mlp', 'down_proj'),
}


def module_dims(config: DecoderConfig, modules: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    """(module, i, o) of the named modules of a decoder, sorted by name.

    Raises:
      UserError: no module, an unknown one, or one named twice.
    """
    c = config
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    table = {
        'q_proj': (c.width, heads),
        'k_proj': (c.width, kv),
        'v_proj': (c.width, kv),
        'o_proj': (heads, c.width),
        'gate_proj': (c.width, c.mlp_width),
        'up_proj': (c.width, c.mlp_width),
        'down_proj': (c.mlp_width, c.width),
    }
    unknown = set(modules) - table.keys()
    if unknown:
        raise UserError(
            f'unknown target modules {", ".join(sorted(unknown))}; known: {", ".join(table)} '
            "(several as ('q_proj','v_proj'))"
        )
    if not modules or len(set(modules)) < len(modules):
        raise UserError(f'name one target module or more, each once, not {tuple(modules)}')
    return tuple((name, *table[name]) for name in sorted(modules))


@struct.dataclass
class LoraPair:
    """Factors of one module: `a [l, g, r, i]` and `b [l, g, r, o]`."""

    a: jax.Array
    b: jax.Array


@struct.dataclass
class Lora:
    """A low-rank update of some modules of a decoder.

    Attributes:
      pairs: module name (a key of `MODULES`) -> `LoraPair`.
      scaling: scalar that multiplies every delta, used as it is (not divided by the rank).
    """

    pairs: dict[str, LoraPair]
    scaling: jax.Array | float

    @property
    def rows(self) -> int:
        return next(iter(self.pairs.values())).a.shape[1]

    @property
    def rank(self) -> int:
        return next(iter(self.pairs.values())).a.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.pairs))


def init(
    key: jax.Array,
    dims: Mapping[str, tuple[int, int]],
    layers: int,
    rank: int,
    scaling: float = 1.0,
    rows: int = 1,
) -> Lora:
    """A fresh LoRA: A normal with deviation 1/sqrt(i), B zero, so it starts as the base model.

    Args:
      key: PRNG key.
      dims: module -> (i, o).
    """
    keys = jax.random.split(key, len(dims))
    pairs = {
        name: LoraPair(
            jax.random.normal(k, (layers, rows, rank, i)) / i**0.5,
            jnp.zeros((layers, rows, rank, o)),
        )
        for k, (name, (i, o)) in zip(keys, sorted(dims.items()), strict=True)
    }
    return Lora(pairs, jnp.float32(scaling))


def project(
    x: jax.Array,
    kernel: jax.Array,
    pair: LoraPair | None,
    scaling: jax.Array,
    rank_weights: jax.Array | None = None,
) -> jax.Array:
    """`x @ kernel` plus the LoRA of each row.

    Args:
      x: `[b, s, i]`.
      kernel: `[i, o]`, perhaps quantized.
      pair: one layer's factors, `a [g, r, i]`, `b [g, r, o]`; g divides b and b/g consecutive
        batch rows share one LoRA row. None leaves the base projection.
      scaling: scalar.
      rank_weights: `[b, r]`, or `[b, s, r]` for packed rows, or None for all ones.

    Returns:
      `[b, s, o]` in the dtype of x.
    """
    y = quantization.product(jnp.matmul, x, kernel)
    if pair is None:
        return y
    batch, tokens, _ = x.shape
    rows, rank, _ = pair.a.shape
    grouped = x.reshape(rows, batch // rows * tokens, -1)
    hidden = jnp.einsum('gti,gri->gtr', grouped, pair.a.astype(x.dtype))
    if rank_weights is not None:
        weights = rank_weights if rank_weights.ndim == 3 else rank_weights[:, None]
        hidden = hidden.reshape(batch, tokens, rank) * weights.astype(x.dtype)
        hidden = hidden.reshape(rows, -1, rank)
    delta = jnp.einsum('gtr,gro->gto', hidden, pair.b.astype(x.dtype))
    return y + scaling.astype(x.dtype) * delta.reshape(y.shape)


def concatenate(*loras: Lora) -> Lora:
    """Sums LoRAs by concatenating their ranks; a LoRA of one row is shared by all rows.

    A module that only some of them adapt gets ranks of zeros for the others. Each scaling is folded
    into B relative to the first one's.
    """
    rows = max(lora.rows for lora in loras)
    first = loras[0]
    widths = {
        name: (pair.a.shape[-1], pair.b.shape[-1])
        for lora in loras
        for name, pair in lora.pairs.items()
    }

    def factors(lora: Lora, name: str) -> LoraPair:
        ratio = lora.scaling / first.scaling if lora is not first else 1
        if name in lora.pairs:
            a, b = lora.pairs[name].a, lora.pairs[name].b
            b = (b * ratio).astype(b.dtype)
        else:
            like = next(iter(lora.pairs.values())).a
            a, b = (jnp.zeros((*like.shape[:3], width), like.dtype) for width in widths[name])
        return LoraPair(*(jnp.broadcast_to(x, (x.shape[0], rows, *x.shape[2:])) for x in (a, b)))

    def stack(name: str) -> LoraPair:
        parts = [factors(lora, name) for lora in loras]
        return LoraPair(*(jnp.concatenate([getattr(p, x) for p in parts], 2) for x in 'ab'))

    return Lora({name: stack(name) for name in sorted(widths)}, first.scaling)


def pack(lora: Lora, groups: int) -> Lora:
    """Rows into ranks: `[l, g * n, r, i]` -> `[l, g, n * r, i]` (o for B), n rows to each group."""

    def merge_axes(x):
        layers, rows, rank, width = x.shape
        return x.reshape(layers, groups, rows // groups * rank, width)

    return lora.replace(pairs=jax.tree.map(merge_axes, lora.pairs))


def compose(
    chunks: Lora, shared: Lora | None, groups: int, chunk_weights: jax.Array
) -> tuple[Lora, jax.Array]:
    """The LoRA of every group of contexts and the rank weights of every batch row.

    Args:
      chunks: one row per chunk, `g * n` rows, the chunks of a group adjacent.
      shared: LoRA of one row added once to every context (the learned bias), or None.
      groups: g.
      chunk_weights: `[b, n]`, how often each of its group's chunks counts in each batch row:
        0 for a chunk of another context.

    Returns:
      A Lora of g rows and rank `n * r (+ r)`, and rank weights `[b, n * r (+ r)]`.
    """
    lora = pack(chunks, groups)
    weights = jnp.repeat(chunk_weights, chunks.rank, axis=1)
    if shared is not None:
        lora = concatenate(lora, shared)
        weights = jnp.pad(weights, ((0, 0), (0, shared.rank)), constant_values=1)
    return lora, weights


def total(parts: Iterable[Lora], max_rank: int) -> Lora:
    """The sum of many LoRAs along the rank.

    Args:
      parts: every row of each is one of the LoRAs.
      max_rank: past it the sum so far is folded by `compact`, so that memory does not grow with the
        number of LoRAs.

    Returns:
      A Lora of one row.
    """
    waiting: list[Lora] = []
    for part in parts:
        waiting.append(pack(part, 1))
        if sum(lora.rank for lora in waiting) > max_rank:
            waiting = [compact(concatenate(*waiting))]
    return compact(concatenate(*waiting))


def reconcile(parts: Iterable[Lora], ridge: float) -> Lora:
    """The sum of many LoRAs, such as those of chunks or documents, without their interference.

    Each is a linear memory: the rows of its A are keys, and what its delta makes of a key is what
    it has to say there. In the sum the others speak as well. Here B is chosen so that at the keys
    of each the whole says what that LoRA says alone. With the keys of each LoRA at a mean square of
    1, G the inner products of all keys and G' those of keys of one LoRA, B becomes the solution of

        (G + ridge) B_new = (G' + ridge) B

    It is ridge regression, by which MEMIT (arXiv 2210.07229) edits many facts at once, but towards
    the LoRAs' own answers. Of one LoRA it is that LoRA; the larger the ridge, the more it is the
    sum. With more keys than inputs it is the delta that is solved for,

        (A^T A + ridge) delta = A^T (G' + ridge) B

    whose sides are sums over the LoRAs, so memory does not grow with their number.

    Args:
      parts: every row of each is one of the LoRAs; all adapt the same modules. Layers whose B is
        zero are left alone.
      ridge: positive.

    Returns:
      A Lora of one row.
    """
    waiting: list[Lora] = []
    products: dict[str, tuple[jax.Array, jax.Array]] = {}
    for part in parts:
        waiting.append(part)
        keys = sum(lora.rows * lora.rank for lora in waiting)
        if products or keys > max(pair.a.shape[-1] for pair in part.pairs.values()):
            for lora in waiting:
                for name, pair in lora.pairs.items():
                    products[name] = _products(pair, lora.scaling, ridge, products.get(name))
            waiting = []
    if products:
        deltas = {name: _ridge_solve(*both, ridge)[:, None] for name, both in products.items()}
        rank = max(min(delta.shape[-2:]) for delta in deltas.values())
        return Lora({name: _factors(delta, rank) for name, delta in deltas.items()}, jnp.float32(1))
    if sum(lora.rows for lora in waiting) < 2:
        return concatenate(*(pack(lora, 1) for lora in waiting))
    scalings = [lora.scaling for lora in waiting]
    pairs = {
        name: _regression([lora.pairs[name] for lora in waiting], scalings, ridge)
        for name in waiting[0].pairs
    }
    return Lora(pairs, jnp.float32(1))


def _targets(pair: LoraPair, scaling: jax.Array, ridge: float) -> tuple[jax.Array, jax.Array]:
    """Keys `[l, k, i]` of all rows, those of a row at a mean square of 1, and (G' + ridge) B."""
    a, b = (x.astype(jnp.float32) for x in (pair.a, pair.b))
    squares = jnp.square(a).sum(-1, keepdims=True)
    spoken = jnp.maximum((squares > 0).sum(2, keepdims=True), 1)  # not padding
    size = jnp.sqrt(squares.sum(2, keepdims=True) / spoken)
    size = jnp.where(size > 0, size, 1)
    keys, values = a / size, b * size * scaling
    wanted = keys @ keys.mT @ values + ridge * values
    return tuple(x.reshape(x.shape[0], -1, x.shape[-1]) for x in (keys, wanted))


@jax.jit
def _products(pair, scaling, ridge, so_far):
    """A^T A `[l, i, i]` and A^T (G' + ridge) B `[l, i, o]`, with those of other LoRAs."""
    keys, wanted = _targets(pair, scaling, ridge)
    own = keys.mT @ keys, keys.mT @ wanted
    return own if so_far is None else jax.tree.map(jnp.add, own, so_far)


@jax.jit
def _regression(pairs, scalings, ridge) -> LoraPair:
    """A module's keys and their B."""
    both = (_targets(pair, scaling, ridge) for pair, scaling in zip(pairs, scalings, strict=True))
    keys, wanted = (jnp.concatenate(x, 1) for x in zip(*both, strict=True))
    b = _ridge_solve(keys @ keys.mT, wanted, ridge)
    return LoraPair(*(x[:, None].astype(pairs[0].a.dtype) for x in (keys, b)))


@jax.jit
def _ridge_solve(products, wanted, ridge):
    """By layer; where nothing is wanted it is 0."""

    def solve(products, wanted):
        return jnp.linalg.solve(products + ridge * jnp.eye(len(products)), wanted)

    def layer(both):
        return jax.lax.cond(jnp.any(both[1] != 0), solve, lambda _, wanted: wanted, *both)

    return jax.lax.map(layer, (products, wanted))


def scale(lora: Lora, factor: float | jax.Array) -> Lora:
    """Multiplies the delta by a factor."""
    return lora.replace(scaling=lora.scaling * factor)


def fold(lora: Lora, rank_weights: jax.Array) -> Lora:
    """Multiplies rank weights `[g, r]` into B, so that the LoRA can be used without them."""
    return lora.replace(
        pairs={
            name: pair.replace(b=pair.b * rank_weights[None, :, :, None].astype(pair.b.dtype))
            for name, pair in lora.pairs.items()
        }
    )


def norms(lora: Lora) -> dict[str, jax.Array]:
    """Module -> Frobenius norm of `scaling A^T B` by layer and row, `[l, g]`."""

    def norm(pair: LoraPair) -> jax.Array:
        # Of the factors' inner products: the delta itself is never made.
        inner = [jnp.einsum('lgri,lgsi->lgrs', x, x) for x in (pair.a, pair.b)]
        return jnp.abs(lora.scaling) * jnp.sqrt(jnp.maximum((inner[0] * inner[1]).sum((2, 3)), 0))

    return {name: norm(pair) for name, pair in lora.pairs.items()}


def silent_rows(lora: Lora) -> np.ndarray:
    """`[g]` bool: rows whose B is zero everywhere, which leave the base model as it is."""
    return ~np.any(
        [np.asarray(jnp.any(pair.b != 0, axis=(0, 2, 3))) for pair in lora.pairs.values()], axis=0
    )


def compact(lora: Lora) -> Lora:
    """The same deltas at the lowest rank that needs no SVD: min(i, o) of the widest module.

    Beyond that rank A^T B itself is smaller than its factors, so one factor becomes the delta and
    the other the identity. A LoRA of lower rank is returned as it is.
    """
    limit = max(min(p.a.shape[-1], p.b.shape[-1]) for p in lora.pairs.values())
    if lora.rank <= limit:
        return lora
    return lora.replace(pairs={name: _dense(pair, limit) for name, pair in lora.pairs.items()})


@functools.partial(jax.jit, static_argnames='rank')
def _dense(pair: LoraPair, rank: int) -> LoraPair:
    delta = jnp.einsum('lgri,lgro->lgio', pair.a, pair.b, preferred_element_type=jnp.float32)
    return _factors(delta.astype(pair.a.dtype), rank)


def _factors(delta: jax.Array, rank: int) -> LoraPair:
    """A delta `[l, g, i, o]` as one factor, the identity as the other, of a rank >= min(i, o)."""
    layers, rows, i, o = delta.shape
    own = min(i, o)
    eye = jnp.broadcast_to(jnp.eye(own, dtype=delta.dtype), (layers, rows, own, own))
    a, b = (eye, delta) if i <= o else (delta.swapaxes(-1, -2), eye)
    return LoraPair(*(jnp.pad(x, ((0, 0), (0, 0), (0, rank - own), (0, 0))) for x in (a, b)))


def pad_rank(lora: Lora, rank: int) -> Lora:
    """The same deltas at a rank that is filled up with zeros."""
    room = ((0, 0), (0, 0), (0, rank - lora.rank), (0, 0))
    return lora.replace(pairs=jax.tree.map(lambda x: jnp.pad(x, room), lora.pairs))


def round_rank(lora: Lora, step: int = 128) -> Lora:
    """The same deltas at a rank rounded up, so that few shapes are compiled."""
    return pad_rank(lora, max(lora.rank + -lora.rank % step, step))


def truncate(lora: Lora, rank: int) -> Lora:
    """The best approximation of at most the given rank, by SVD of each layer's delta.

    Exact once `rank` reaches min(i, o) of every module: a long document's LoRA, whose rank grows
    with its chunks, never needs more.

    Raises:
      ValueError: if rank is not positive.
    """
    if rank < 1:
        raise ValueError(f'rank must be positive, not {rank}')

    def shorten(pair: LoraPair) -> LoraPair:
        q_a, r_a = jnp.linalg.qr(pair.a.astype(jnp.float32).swapaxes(-1, -2))
        q_b, r_b = jnp.linalg.qr(pair.b.astype(jnp.float32).swapaxes(-1, -2))
        u, s, vt = jnp.linalg.svd(r_a @ r_b.swapaxes(-1, -2), full_matrices=False)
        u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
        root = jnp.sqrt(s)[..., None]
        a = root * (q_a @ u).swapaxes(-1, -2)
        b = root * (q_b @ vt.swapaxes(-1, -2)).swapaxes(-1, -2)
        return LoraPair(a.astype(pair.a.dtype), b.astype(pair.b.dtype))

    kept = {name: jax.jit(shorten)(pair) for name, pair in lora.pairs.items()}
    widest = max(pair.a.shape[2] for pair in kept.values())

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, widest - x.shape[2]), (0, 0)))

    return lora.replace(pairs=jax.tree.map(pad, kept))


def merge(params: Any, lora: Lora) -> Any:
    """Decoder parameters with the LoRA added to their kernels.

    Args:
      params: decoder parameters, kernels `[l, i, o]`, not quantized.
      lora: a LoRA of one row.

    Raises:
      ValueError: if the LoRA has more than one row.
      UserError: the parameters are quantized.
    """
    quantization.check_unquantized(params)
    if lora.rows != 1:
        raise ValueError(f'only a LoRA of one row can be merged, not of {lora.rows}')
    layers = dict(params['layers'])
    for name, pair in lora.pairs.items():
        group, module = MODULES[name]
        kernel = layers[group][module]['kernel']
        delta = jnp.einsum(
            'lri,lro->lio', pair.a[:, 0], pair.b[:, 0], preferred_element_type=jnp.float32
        )
        merged = (kernel.astype(jnp.float32) + lora.scaling * delta).astype(kernel.dtype)
        layers[group] = {**layers[group], module: {**layers[group][module], 'kernel': merged}}
    return {**params, 'layers': layers}
