"""Linear maps that hypernetworks share."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

# PyTorch's default for a linear map: uniform with deviation 1 / sqrt(3 fan_in).
torch_linear_init = functools.partial(nn.initializers.variance_scaling, 1 / 3, 'fan_in', 'uniform')


def flat_dot_general(x: jax.Array, kernel: jax.Array, *_, **__) -> jax.Array:
    """`x @ kernel` with all rows of x in one axis, for `nn.Dense`.

    XLA on CPU computes the gradient of a kernel from such a product half again as fast.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def dense(
    features: int,
    axes: tuple[str | None, str | None],
    name: str,
    use_bias: bool = False,
    kernel_init: nn.initializers.Initializer | None = None,
    bias_init: nn.initializers.Initializer = nn.initializers.zeros,
) -> nn.Dense:
    """A linear map with logical axis names; its kernel starts as PyTorch's unless told."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=nn.with_logical_partitioning(kernel_init or torch_linear_init(), axes),
        bias_init=nn.with_logical_partitioning(bias_init, axes[1:]),
        dot_general=flat_dot_general,
        name=name,
    )


class PerLayerDense(nn.Module):
    """A linear map with own weights for each layer: `[l, ..., i]` -> `[l, ..., o]`.

    Attributes:
      features: o.
      axes: logical names of i and o.
      kernel_init: of `[l, i, o]`; PyTorch's start unless told.
      bias_init: of `[l, o]`.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers, width = x.shape[0], x.shape[-1]
        init = self.kernel_init or torch_linear_init(batch_axis=(0,))
        kernel = self.param(
            'kernel',
            nn.with_logical_partitioning(init, ('layers', *self.axes)),
            (layers, width, self.features),
        )
        y = jnp.einsum('l...i,lio->l...o', x, kernel)
        if not self.use_bias:
            return y
        bias = self.param(
            'bias',
            nn.with_logical_partitioning(self.bias_init, ('layers', self.axes[1])),
            (layers, self.features),
        )
        return y + bias.reshape(layers, *(1,) * (x.ndim - 2), self.features)
