"""What every hypernetwork fulfils, and the registry that configs name it by.

A hypernetwork is a builder: given the base model and its part of the config, it returns a
`Hypernetwork`: a linen module and what it reads. To add one: a file with such a builder, a line in
`_BUILDERS`, a config.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from hyperlora.errors import UserError
from hyperlora.lora import Lora
from hyperlora.models.base import BaseModel

_BUILDERS = {
    'associative_memory': 'd2l.associative:build',
    'captioner': 'd2l.captioner:build',
    'doc_to_lora': 'd2l.build:build',
    'lora_table': 'hyperlora.lora_table:build',
    'text_to_lora': 't2l.build:build',
}


@dataclasses.dataclass(frozen=True)
class Hypernetwork:
    """Context in, Lora out.

    Attributes:
      module: linen module whose `__call__(features, mask)` returns (a Lora of one row per context
        chunk, a Lora of one row shared by all or None). Its parameters are all that trains. Of
        `captioner`, soft tokens `[n, p, d]` that stand before the query instead, and None.
      encoder: the frozen model that reads contexts, with `params` and a `fingerprint`; often the
        base model itself.
      encode: (the encoder's parameters, context batch) -> (features, mask). Not differentiated.
        The context batch is the `context` entry of a batch, e.g. `tokens [n, s]`, `mask [n, s]`.
      example: a context batch of the smallest size, for initialisation. Its keys say what the
        hypernetwork can be used for: one of `tokens` and `mask` for documents (`d2l.internalize`
        passes its module `iterative` and `min_gate`), one of `embedding` for tasks.
      start: fresh parameters -> those that training starts from; for parameters that come from
        data, such as the statistics of LoRAs to reconstruct.
      reconcile: LoRAs of chunks or documents, each a row -> one, of one row, in which they do not
        disturb each other; None where sums are what was trained.
      dtype: that the module computes in. Parameters, their gradients and the optimizer stay f32;
        norms, the softmaxes of attention and the sums of products are f32 in any case.
    """

    module: nn.Module
    encoder: Any
    encode: Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array | None]]
    example: dict[str, jax.Array]
    start: Callable[[Any], Any] = lambda params: params
    reconcile: Callable[[Iterable[Lora]], Lora] | None = None
    dtype: DTypeLike = jnp.float32

    def generate(
        self, params: Any, encoder_params: Any, context: dict[str, jax.Array], **kwargs
    ) -> tuple[Lora, Lora | None]:
        """LoRAs of a context batch; `kwargs` go to the module."""
        features, mask = self.encode(encoder_params, context)
        params, features = self._cast((params, features))
        return self.module.apply({'params': params}, features, mask, **kwargs)

    def generate_with_losses(
        self,
        params: Any,
        encoder_params: Any,
        context: dict[str, jax.Array],
        key: jax.Array | None,
    ) -> tuple[Lora, Lora | None, jax.Array | float]:
        """LoRAs of a context batch in training, differentiable in `params`.

        Args:
          key: for dropout; None for none.

        Returns:
          The LoRAs, and the sum of what the module adds to the loss (its `losses` collection).
        """
        features, mask = self.encode(encoder_params, context)
        params, features = self._cast((params, jax.lax.stop_gradient(features)))
        (chunks, shared), state = self.module.apply(
            {'params': params},
            features,
            mask,
            rngs={} if key is None else {'dropout': key},
            mutable=['losses'],
        )
        return chunks, shared, sum(map(jnp.sum, jax.tree.leaves(state)), 0.0)

    def init(self, key: jax.Array, encoder_params: Any) -> Any:
        """Fresh parameters, boxed with their logical axis names."""
        features, mask = self.encode(encoder_params, self.example)
        return self.module.init(key, features, mask)['params']

    def _cast(self, tree: Any) -> Any:
        def one(x):
            return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(one, tree)


def build(
    config: ConfigDict, base: BaseModel, mesh: jax.sharding.Mesh | None = None
) -> Hypernetwork:
    """Builds `config.name` for a base model; an encoder of its own is loaded onto the mesh.

    Args:
      config: `name`, what its builder reads, and `dtype`, that it computes in; f32 if absent.

    Raises:
      UserError: no hypernetwork or dtype of that name, or a size that is not positive.
    """
    for size in ('rank', 'latent_size', 'head_width', 'embedding_width', 'entries'):
        if (value := config.get('shape', {}).get(size, 1)) < 1:
            raise UserError(f'hypernetwork.shape.{size} must be positive, not {value}')
    if config.name not in _BUILDERS:
        raise UserError(f'unknown hypernetwork {config.name!r}; known: {", ".join(_BUILDERS)}')
    module, function = _BUILDERS[config.name].split(':')
    try:
        dtype = jnp.dtype(config.get('dtype', 'float32'))
    except TypeError as error:
        raise UserError(f'unknown dtype {config.dtype!r} of the hypernetwork') from error
    built = getattr(importlib.import_module(module), function)(config, base, mesh)
    return dataclasses.replace(built, dtype=dtype)
