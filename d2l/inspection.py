"""Looking into a Doc-to-LoRA hypernetwork.

Axes: n chunks, e entries of features (see `d2l.hypernetwork`), h heads, d head width, z latents, s
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from d2l import chunking
from hyperlora.errors import UserError
from hyperlora.trained import Trained


def attention_maps(trained: Trained, tokens: Sequence[int]) -> jax.Array:
    """Where the latents of each cross-attention block look, `[blocks, e, h, z, s]` f32; sums to 1
    over s.

    Args:
      tokens: of one chunk, the context encoder's.

    Raises:
      UserError: no token, or not a Doc-to-LoRA checkpoint.
    """
    trained.require('doc_to_lora')
    if not len(tokens):
        raise UserError('the chunk is empty; there is nothing to look at')
    hypernetwork = trained.hypernetwork
    padded, mask = chunking.pad([tokens], len(tokens))
    features, mask = hypernetwork.encode(
        hypernetwork.encoder.params, {'tokens': padded, 'mask': mask}
    )
    _, state = hypernetwork.module.apply(
        {'params': trained.params},
        features,
        mask,
        mutable=['intermediates'],
        capture_intermediates=lambda module, _: module.name in ('q_proj', 'k_proj'),
    )
    blocks = state['intermediates']['perceiver']
    config = hypernetwork.module.config.perceiver
    maps = []
    names = (name for name in blocks if name.startswith('cross_'))
    for name in sorted(names, key=lambda name: int(name.removeprefix('cross_'))):
        # A block that is used again was captured as often.
        captured = (blocks[name][projection]['__call__'] for projection in ('q_proj', 'k_proj'))
        for q, k in zip(*captured, strict=True):
            q, k = (x.reshape(*x.shape[:-1], -1, config.head_dim) for x in (q, k))
            k = jnp.repeat(k, config.num_heads // config.num_kv_heads, 2)
            q = jnp.broadcast_to(q, (len(k), *q.shape[1:]))
            scores = jnp.einsum('ezhd,eshd->ehzs', q, k) * config.head_dim**-0.5
            maps.append(jax.nn.softmax(scores.astype(jnp.float32)))
    return jnp.stack(maps)
