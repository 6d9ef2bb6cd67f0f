"""TPU chips and topologies: what can be compiled for without having one.

Sources of the figures: the pages of Google's Cloud TPU documentation on v4, v5e, v5p and v6e
(peak compute, HBM, inter-chip interconnect and data-centre network per chip; where they give the
last per pod, a chip's share).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from hyperlora.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      flops: bf16 operations per second.
      hbm: bytes of memory.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second that one link of the interconnect carries in each direction.
      dimensions: of the torus; a chip has two links along each.
      wrap: an axis of a slice closes to a ring if its length is a multiple of it.
      dcn_bandwidth: bytes per second to other slices, over the data-centre network; None: unknown.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    wrap: int
    dcn_bandwidth: float | None


CHIPS = {
    'v4': Chip(275e12, 32 * 2**30, 1200e9, 50e9, 3, 4, None),
    'v5e': Chip(197e12, 16 * 2**30, 819e9, 50e9, 2, 16, 25e9 / 8),
    'v5p': Chip(459e12, 95 * 2**30, 2765e9, 100e9, 3, 4, 50e9 / 8),
    'v6e': Chip(918e12, 32 * 2**30, 1640e9, 112e9, 2, 16, 100e9 / 8),
}
_EXAMPLES = 'v4:2x2x2, v5e:2x2, v5e:4x4, v5e:8x8, v5p:2x2x1, v5p:4x4x4, v6e:4x4, 2*v6e:16x16'


@dataclass(frozen=True)
class Topology:
    """One or several equal slices of TPUs.

    Attributes:
      name: such as "v5e:8x8" or "2*v5e:8x8".
      slices: how many.
      chip: its kind.
      shape: chips along each axis of a slice.
      devices: one per chip, which programs can be compiled for, but not run on.
    """

    name: str
    slices: int
    chip: Chip
    shape: tuple[int, ...]
    devices: Sequence[jax.Device]

    @property
    def ici_bandwidth(self) -> float:
        """Bytes per second that each chip can send in a collective over its whole slice.

        Along an axis that closes to a ring a chip sends both ways; along a line its ends have one
        neighbour, and they set the pace.
        """
        ways = sum(2 if n % self.chip.wrap == 0 else 1 for n in self.shape if n > 1)
        return ways * self.chip.link_bandwidth


def topology(name: str) -> Topology:
    """The topology of a name: a chip and a shape, such as "v5e:8x8", or several, "2*v5e:8x8".

    Needs libtpu, but no TPU.

    Raises:
      UserError: libtpu is not installed or knows no such topology, or there are several slices of a
        chip of which no speed of the network between them is published.
    """
    match = re.fullmatch(r'(?:([1-9]\d*)\*)?((\w+):(\d+(?:x\d+)+))', name)
    slices = int(match[1] or 1) if match else 1
    chip = CHIPS.get(match[3]) if match else None
    shape = tuple(map(int, match[4].split('x'))) if match else ()
    unknown = f'unknown topology {name!r}; known: shapes of {", ".join(CHIPS)}, such as {_EXAMPLES}'
    if chip is None or len(shape) != chip.dimensions or 0 in shape:
        raise UserError(unknown)
    if slices > 1 and chip.dcn_bandwidth is None:
        raise UserError(f'{name}: how fast slices of {match[3]} are connected is not published')
    # Else libtpu asks a metadata server about this machine, and refuses a second process.
    for key, value in {
        'TPU_SKIP_MDS_QUERY': '1',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
        'TPU_WORKER_HOSTNAMES': 'localhost',
    }.items():
        os.environ.setdefault(key, value)
    options = {'num_slices': slices}
    if match[3] == 'v4':  # its two cores are one device
        options['chip_config_name'] = 'megacore'
    if set(shape) == {1}:
        options['chips_per_host_bounds'] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform='tpu', topology_name=match[2], **options)
    except Exception as e:  # jax raises several kinds, the same ones for both mistakes
        if 'INVALID_ARGUMENT' in str(e):
            raise UserError(f'{unknown} ({str(e).splitlines()[0]})') from e
        raise UserError(
            f'cannot load libtpu ({str(e).splitlines()[0]}): pip install "hyperlora[tpu]"'
        ) from e
    return Topology(name, slices, chip, shape, found.devices)
