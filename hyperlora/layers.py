"""Linear maps that hypernetworks share."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

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
