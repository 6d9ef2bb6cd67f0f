"""Device meshes and the one table that maps logical axis names to mesh axes.

Every parameter and constrained activation names its axes; where each name lives on the mesh is
decided here alone. One device is the 1 x 1 x 1 case of the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hyperlora.errors import UserError

AXES = ('data', 'fsdp', 'tensor')

RULES = (
    # activations
    ('batch', ('data', 'fsdp')),
    ('length', None),
    ('embed_activation', None),
    # parameters
    ('vocab', 'tensor'),
    ('embed', 'fsdp'),
    ('heads', 'tensor'),
    ('mlp', 'tensor'),
    ('latent', 'fsdp'),
    ('lora', 'tensor'),
    ('layers', None),
    ('norm', None),
)


def make_mesh(shape: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh over the axes data, fsdp and tensor.

    Args:
      shape: size of each axis; -1 for at most one axis takes the devices that are left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = [shape[axis] for axis in AXES]
    if -1 in sizes:
        known = 1
        for size in sizes:
            known *= size if size != -1 else 1
        sizes[sizes.index(-1)] = max(devices // known, 1)
    total = sizes[0] * sizes[1] * sizes[2]
    if total != devices:
        raise UserError(
            f'mesh {dict(zip(AXES, sizes, strict=True))} has {total} places for '
            f'{devices} devices; set config.mesh'
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """NamedSharding of every leaf of an abstract tree whose leaves carry logical axis names."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(tree), mesh, RULES)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_shards(mesh: jax.sharding.Mesh) -> int:
    """Over how many shards a batch is spread."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def own_groups(mesh: jax.sharding.Mesh, groups: int) -> list[int]:
    """Which of the groups of a microbatch live on devices of this process."""
    place = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    found = place.addressable_devices_indices_map((groups,)).values()
    return sorted({group for (rows,) in found for group in range(groups)[rows]})


def global_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """What all processes together hold of a batch.

    Args:
      batch: numpy arrays `[a, ...]`: a microbatches of the rows of this process's `own_groups`.
    """
    place = NamedSharding(mesh, PartitionSpec(None, ('data', 'fsdp')))
    return jax.make_array_from_process_local_data(place, batch)


def put(tree: Any, places: Any) -> Any:
    """Places arrays on a mesh that may span processes.

    Args:
      tree: arrays of the mesh, or arrays of this host, which all hosts must hold alike. (Unlike
        `jax.device_put` this does not send them around to see whether they are.)
    """

    def one(x, place):
        if isinstance(x, jax.Array) and (place.is_fully_addressable or not x.is_fully_addressable):
            return jax.device_put(x, place)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, place, lambda at: x[at])

    return jax.tree.map(one, tree, places)
