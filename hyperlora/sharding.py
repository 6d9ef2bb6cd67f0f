"""Device meshes and the one table that maps logical axis names to mesh axes.

Every parameter and constrained activation names its axes; where each name lives on the mesh is
decided here alone, or by a config that overrides the table. One device is the 1 x 1 x 1 x 1 case
of the same code.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hyperlora.errors import UserError

# From the slowest network to the fastest. Along the first two parameters are copied: `slice` is for
# slices of TPUs (JAX also calls nodes of GPUs so), between which only gradients travel, over the
# network of the data centre.
AXES = ('slice', 'data', 'fsdp', 'tensor')
COPIES = ('slice', 'data')
BATCH = (*COPIES, 'fsdp')  # a batch is divided over them

RULES = (
    # activations
    ('batch', BATCH),
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


_TOLERANCE = 0.05  # share of the bytes that may be replicated by accident,
_NEGLIGIBLE = 2**24  # or so many bytes: norms are much of a small model, and of no device


def make_mesh(
    shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh over `AXES`.

    Args:
      shape: size of each axis, 1 if it has none; -1 for at most one axis takes the devices that
        are left.
      devices: to build it of; None for all that there are.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the axis `slice` cannot be
        divided over the slices that the devices are in.
    """
    slices = collections.defaultdict(list)
    for device in jax.devices() if devices is None else devices:
        slices[getattr(device, 'slice_index', 0)].append(device)
    count = sum(map(len, slices.values()))
    sizes = [shape.get(axis, 1) for axis in AXES]
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // max(-math.prod(sizes), 1), 1)
    named = dict(zip(AXES, sizes, strict=True))
    if math.prod(sizes) != count:
        raise UserError(
            f'mesh {named} has {math.prod(sizes)} places for {count} devices; set config.mesh'
        )
    if sizes[0] % len(slices):
        raise UserError(
            f'mesh {named}: the devices are in {len(slices)} slices; set config.mesh.slice to '
            f'{len(slices)}'
        )
    own = (sizes[0] // len(slices), *sizes[1:])
    parts = [jax.make_mesh(own, AXES, devices=slices[i]).devices for i in sorted(slices)]
    return jax.sharding.Mesh(
        np.concatenate(parts), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )


def rules(
    overrides: Mapping[str, str | Sequence[str] | None] | None = None,
) -> contextlib.AbstractContextManager:
    """A context in which the rules hold, for `shardings` and for constraints on activations.

    Args:
      overrides: logical axis -> the mesh axes that it is divided over, instead of `RULES`.

    Raises:
      UserError: no such logical or mesh axis.
    """
    table = dict(RULES)
    for name, axes in (overrides or {}).items():
        axes = (axes,) if isinstance(axes, str) and axes else tuple(axes or ())
        if name not in table or set(axes) - set(AXES):
            raise UserError(
                f'config.rules.{name} = {axes}: logical axes are {", ".join(table)}; '
                f'mesh axes are {", ".join(AXES)}'
            )
        table[name] = axes or None
    return nn.logical_axis_rules(tuple(table.items()))


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """NamedSharding of every leaf of an abstract tree whose leaves carry logical axis names.

    The rules are those of the context, see `rules`, or `RULES`.

    Raises:
      UserError: an axis of a leaf cannot be divided evenly over the mesh.
    """
    table = nn.get_logical_axis_rules() or RULES
    places = nn.logical_to_mesh_sharding(nn.get_partition_spec(tree), mesh, table)

    def check(path, leaf, place):
        # Not `nn.unbox`, which under a mesh would constrain the values.
        leaf = leaf.value if isinstance(leaf, nn.Partitioned) else leaf
        for axis, (size, names) in enumerate(zip(leaf.shape, place.spec, strict=False)):
            names = (names,) if isinstance(names, str) else names or ()
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                raise UserError(
                    f'mesh {dict(mesh.shape)}: axis {axis} of {_name(path)} {leaf.shape} cannot '
                    f'be divided by {" x ".join(names)} = {parts}; set config.mesh'
                )

    jax.tree_util.tree_map_with_path(
        check, tree, places, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    return places


def replicated_bytes(tree: Any) -> dict[str, float]:
    """Bytes of each leaf that are held more often than the mesh needs, by name.

    A leaf that is divided into k parts, though the mesh axes fsdp and tensor have n places, counts
    with the share `1 - k / n` of its bytes. (The other axes are for copies.)

    Args:
      tree: arrays or abstract values, with shardings.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf.sharding, NamedSharding):  # on one device
            found[_name(path)] = 0.0
            continue
        shape = leaf.sharding.mesh.shape
        most = math.prod(shape[axis] for axis in AXES if axis not in COPIES)
        parts = leaf.size // max(math.prod(leaf.sharding.shard_shape(leaf.shape)), 1)
        found[_name(path)] = nbytes(leaf) * max(1 - parts / most, 0)
    return found


def check_divided(tree: Any) -> None:
    """Checks that what lives on a mesh is divided over it, but for a few per cent.

    Args:
      tree: as for `replicated_bytes`.

    Raises:
      UserError: more than 5 % of the bytes are replicated; the largest leaves are named.
    """
    found = replicated_bytes(tree)
    total = sum(map(nbytes, jax.tree.leaves(tree)))
    whole = sum(found.values())
    if whole > max(_TOLERANCE * total, _NEGLIGIBLE):
        largest = [name for name in sorted(found, key=found.get, reverse=True) if found[name]][:5]
        raise UserError(
            f'{whole / total:.0%} of {total / 2**20:.0f} MiB are replicated although the mesh '
            f'could divide them, most of all {", ".join(largest)}; set config.mesh, or rules in '
            "the config's file"
        )


def nbytes(leaf: Any) -> int:
    """Bytes of an array or abstract value, on all devices together."""
    return leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) // 8


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_shards(mesh: jax.sharding.Mesh) -> int:
    """Over how many shards a batch is spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: jax.sharding.Mesh, axis: int = 0) -> NamedSharding:
    """The place of an array that is divided like a batch along one of its axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def own_groups(mesh: jax.sharding.Mesh, groups: int) -> list[int]:
    """Which of the groups of a microbatch live on devices of this process."""
    found = batch_sharding(mesh).addressable_devices_indices_map((groups,)).values()
    return sorted({group for (rows,) in found for group in range(groups)[rows]})


def global_batch(batch: Any, place: NamedSharding) -> Any:
    """What all processes together hold of a batch.

    Args:
      batch: numpy arrays `[a, ...]`: a microbatches of the rows of this process's `own_groups`.
      place: where the whole lives.
    """
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
