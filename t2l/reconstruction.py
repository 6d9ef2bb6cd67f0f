"""Training data of reconstruction: LoRAs of tasks as targets, and embeddings of descriptions.

The targets are a trained table of LoRAs, one entry per task (`hyperlora.lora_table`).

Axes: n rows, l layers, e entries of the table, r rank, i and o a module's widths.

Source: Text-to-LoRA (arXiv 2506.06105), section 3.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hyperlora import trained
from hyperlora.errors import UserError
from hyperlora.lora_table import factors
from hyperlora.models.base import BaseModel
from hyperlora.models.embedders import Embedder
from hyperlora.trained import Trained
from t2l.collections import collect
from t2l.data import draw_embedding, embed


def load_loras(checkpoint: str, base: BaseModel, fits: ConfigDict) -> Trained:
    """A trained table of LoRAs of the shape that a hypernetwork makes.

    Args:
      fits: the hypernetwork's part of a config.

    Raises:
      UserError: not such a checkpoint, or LoRAs of other modules, rank or scaling.
    """
    table = trained.load(checkpoint, base).require('lora_table')
    found = table.config.hypernetwork
    for name, theirs, ours in (
        ('modules', sorted(found.modules), sorted(fits.modules)),
        ('rank', found.shape.rank, fits.shape.rank),
        ('scaling', found.shape.scaling, fits.shape.scaling),
    ):
        if theirs != ours:
            raise UserError(
                f'the LoRAs of {checkpoint} have {name} {theirs}, those of the config {ours}'
            )
    return table


def statistics(table: Any) -> dict[str, dict[str, np.ndarray]]:
    """`mean` and (unbiased) standard `deviation` over the entries of every factor.

    Args:
      table: parameters of a `LoraTable`, or its `factors`.

    Returns:
      a_MODULE `[l, r, i]` and b_MODULE `[l, r, o]`. One entry alone deviates by zero.
    """
    table = factors(table)
    return {
        'mean': {name: x.mean(1) for name, x in table.items()},
        'deviation': {name: x.std(1, ddof=min(1, x.shape[1] - 1)) for name, x in table.items()},
    }


class Targets:
    """Random-access source of (description, LoRA) pairs; every array follows from (seed, index).

    Each pass over the tasks takes them in a new order, with a description drawn for each.
    """

    def __init__(
        self,
        loras: Any,
        embeddings: list[np.ndarray],
        z_score: bool,
        noise: float,
        seed: int,
        length: int,
    ):
        """
        Args:
          loras: parameters of a `LoraTable`, one entry per task.
          embeddings: of the training descriptions of each task, `[descriptions, d]`.
          z_score: whether differences will be divided by the entries' deviation.
          noise: of the descriptions, see `draw_embedding`.
          length: items in all.
        """
        self.loras = factors(loras)
        self.embeddings, self.noise = embeddings, noise
        self.seed, self.length = seed, length
        self.deviation = statistics(self.loras)['deviation'] if z_score else {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, dict[str, Any]]:
        """One pair: `context` {embedding `[1, d]`, task `[1]`} and `target`, see `Reconstruction`,
        of one row."""
        epoch, place = divmod(index, len(self.embeddings))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.embeddings))
        task = order[place]
        rng = np.random.default_rng((self.seed, 1, index))
        embedding = draw_embedding(rng, self.embeddings[task], self.noise)
        target: dict[str, dict[str, np.ndarray]] = {}
        for name, entries in self.loras.items():
            factor, module = name.split('_', 1)
            target.setdefault(module, {})[factor] = entries[None, :, task]
            if self.deviation:
                target[module][f'{factor}_deviation'] = self.deviation[name][None]
        context = {'embedding': embedding[None], 'task': np.asarray([task], np.int32)}
        return {'context': context, 'target': target}


def example(config: ConfigDict, base: BaseModel, encoder: Embedder) -> dict[str, dict[str, Any]]:
    """One pair, all alike in shape; see `data.abstract`."""
    embeddings = [np.zeros((1, encoder.width), np.float32)]
    return Targets(trained.read(config.loras)[1], embeddings, config.z_score, 0.0, 0, 1)[0]


def build(
    config: ConfigDict, base: BaseModel, encoder: Embedder, seed: int, groups_per_step: int
) -> Targets:
    """The pairs of a training; see `hyperlora.data`. The tasks and their descriptions are those
    that the LoRAs were trained on; their names are noted in `config.tasks`.

    Raises:
      UserError: a checkpoint that is not a LoRA per task, or whose tasks cannot be read.
    """
    table = trained.load(config.loras, base).require('lora_table')
    tasks = collect(table.config.data).train
    config.tasks = tuple(task.name for task in tasks)
    if config.tasks != tuple(table.config.data.tasks):
        raise UserError(f'the tasks that {config.loras} was trained on are not there any more')
    if table.config.hypernetwork.shape.entries != len(tasks):
        raise UserError(
            f'{config.loras} holds {table.config.hypernetwork.shape.entries} LoRAs of '
            f'{len(tasks)} tasks: reconstruction needs one of each'
        )
    return Targets(
        table.params,
        embed(encoder, tasks),
        config.z_score,
        config.description_noise,
        seed,
        config.steps * groups_per_step,
    )
