"""Text-to-LoRA's training data: examples of tasks, and embeddings of their descriptions.

Axes: n tasks of a group, e embedding width, b queries, t query tokens, k labels.

Sampling is hierarchical, as in Text-to-LoRA (arXiv 2506.06105): first tasks, all alike, then
examples and a description of each. Everything follows from (seed, index).
"""

from __future__ import annotations

from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel
from hyperlora.models.embedders import Embedder
from hyperlora.models.tokenizers import Tokenizer
from t2l.collections import collect
from t2l.tasks import Example, Task

_LENGTH_STEP = 8  # lengths are padded to multiples of it, so that shapes are few


def tokenize(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(prompt, answer with the end of the turn) of an example."""
    return tokenizer.prompt(example.input), [*tokenizer.encode(example.output), tokenizer.eos_id]


class TaskGroups:
    """Random-access source of groups of queries; every array follows from (seed, index).

    A group has `tasks_per_group` tasks, all tasks of a step being different, one description of
    each, and `examples_per_task` different examples of each. Items are drawn anew: there is no
    epoch.
    """

    def __init__(
        self,
        tasks: tuple[Task, ...],
        embeddings: list[np.ndarray],
        tokenizer: Tokenizer,
        config: ConfigDict,
        seed: int,
        groups_per_step: int,
    ):
        """Tokenizes all training examples of at most `config.max_tokens` tokens.

        Args:
          embeddings: of the training descriptions of each task, `[descriptions, e]`.

        Raises:
          UserError: fewer tasks than a step has, or a task with too few examples that fit.
        """
        self.config, self.embeddings = config, embeddings
        self.seed, self.groups_per_step = seed, groups_per_step
        needed = config.tasks_per_group * groups_per_step
        if len(tasks) < needed:
            raise UserError(
                f'{len(tasks)} tasks to train on; a step has {needed} (config.groups, '
                'config.accumulate, config.data.tasks_per_group)'
            )
        self.examples = []
        for task in tasks:
            pairs = [tokenize(example, tokenizer) for example in task.train]
            pairs = [(p, a) for p, a in pairs if len(p) + len(a) <= config.max_tokens]
            if len(pairs) < config.examples_per_task:
                raise UserError(
                    f'task {task.name!r} has {len(pairs)} training examples of at most '
                    f'{config.max_tokens} tokens; {config.examples_per_task} are needed: leave it '
                    'out or raise config.data.max_tokens'
                )
            self.examples.append(pairs)

    def __len__(self) -> int:
        return self.config.steps * self.groups_per_step

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One group: `embedding [n, e]` and n x `examples_per_task` (prompt, answer) pairs."""
        c, count = self.config, self.config.tasks_per_group
        step, group = divmod(index, self.groups_per_step)
        order = np.random.default_rng((self.seed, 0, step)).permutation(len(self.examples))
        chosen = order[group * count : (group + 1) * count]
        rng = np.random.default_rng((self.seed, 1, index))
        pairs, rows = [], []
        for task in chosen:
            rows.append(self.embeddings[task][rng.integers(len(self.embeddings[task]))])
            examples = self.examples[task]
            picked = rng.choice(len(examples), c.examples_per_task, replace=False)
            pairs += [examples[i] for i in picked]
        return {'embedding': np.stack(rows), 'pairs': pairs}


def pad(pairs: list[tuple[list[int], list[int]]], length: int, labels: int) -> dict:
    """Query arrays of (prompt, answer) pairs: tokens `[b, t]`, labels, label_positions and
    label_weights `[b, k]`; each pair weighs 1."""
    shape = len(pairs), labels
    query = {
        'tokens': np.zeros((len(pairs), length), np.int32),
        'labels': np.zeros(shape, np.int32),
        'label_positions': np.zeros(shape, np.int32),
        'label_weights': np.zeros(shape, np.float32),
    }
    for i, (prompt, answer) in enumerate(pairs):
        count = len(answer)
        row = [*prompt, *answer[:-1]]
        query['tokens'][i, : len(row)] = row
        query['labels'][i, :count] = answer
        query['label_positions'][i, :count] = len(prompt) - 1 + np.arange(count)
        query['label_weights'][i, :count] = 1 / count
    return query


def build(
    config: ConfigDict,
    base: BaseModel,
    encoder: Embedder,
    seed: int,
    groups: int,
    accumulate: int,
) -> grain.MapDataset:
    """Training steps: every leaf `[accumulate, groups * per group, ...]`.

    Raises:
      UserError: tasks that cannot be read or trained on; see `collect` and `TaskGroups`.
    """
    tasks = collect(config).train
    texts = [text for task in tasks for text in task.descriptions]
    ends = np.cumsum([len(task.descriptions) for task in tasks])[:-1]
    embeddings = np.split(encoder(texts), ends)
    source = TaskGroups(tasks, embeddings, base.tokenizer, config, seed, groups * accumulate)
    own = np.repeat(np.eye(config.tasks_per_group, dtype=np.float32), config.examples_per_task, 0)

    def round_up(count):
        return -(-count // _LENGTH_STEP) * _LENGTH_STEP

    def stack(items):
        pairs = [pair for item in items for pair in item['pairs']]
        query = pad(
            pairs,
            round_up(max(len(prompt) + len(answer) - 1 for prompt, answer in pairs)),
            round_up(max(len(answer) for _, answer in pairs)),
        )
        query['chunk_weights'] = np.tile(own, (len(items), 1))
        batch = {'context': {'embedding': np.concatenate([i['embedding'] for i in items])}}
        batch['query'] = query

        def split(x):
            return x.reshape(accumulate, -1, *x.shape[1:])

        return {part: {k: split(v) for k, v in batch[part].items()} for part in batch}

    return grain.MapDataset.source(source).batch(groups * accumulate, batch_fn=stack)
