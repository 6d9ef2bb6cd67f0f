"""Text-to-LoRA's training data: examples of tasks, and embeddings of their descriptions.

Axes: e embedding width, t query tokens, k labels.

Sampling is hierarchical, as in Text-to-LoRA (arXiv 2506.06105): first tasks, by their weights, then
examples and a description of each. Everything follows from (seed, index).

Some groups, not in the paper, have random letters as description and as answers what the base model
says by itself: a text that describes no task shall leave the model as it is.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from hyperlora.data.packing import pack
from hyperlora.errors import UserError
from hyperlora.generation import answer_tokens
from hyperlora.models.base import BaseModel
from hyperlora.models.embedders import Embedder
from hyperlora.models.tokenizers import Tokenizer
from t2l.collections import collect
from t2l.tasks import Example, Task

_NONSENSE = 512  # texts of random letters, and at most so many inputs that go with them
_SAID = 12  # tokens of what the base model says to an input


def tokenize(
    example: Example, tokenizer: Tokenizer, before: str = ''
) -> tuple[list[int], list[int]]:
    """(prompt, answer with the end of the turn) of an example, with text before the answer."""
    answer = tokenizer.encode(before + example.output)
    return tokenizer.prompt(example.input), [*answer, tokenizer.eos_id]


class TaskGroups:
    """Random-access source of groups of queries; every array follows from (seed, index).

    A group is a packed row: as many examples of one task as fill it, and one description of that
    task. All tasks of a step are different. Rows are drawn anew each time: there is no epoch.
    """

    def __init__(
        self,
        tasks: tuple[Task, ...],
        weights: Sequence[float],
        embeddings: list[np.ndarray],
        tokenizer: Tokenizer,
        config: ConfigDict,
        seed: int,
        groups_per_step: int,
        nonsense: tuple[np.ndarray, list[tuple[list[int], list[int]]]] | None = None,
    ):
        """Tokenizes all training examples that fit into a row.

        Args:
          config: `row_tokens` and `row_labels`; `gibberish`; `description_noise`, see
            `draw_embedding`; `before`, text before answers: after a space the tokens of a word are
            those that it has in a list or a sentence, so that it can be copied.
          weights: how often each task is drawn, in proportion.
          embeddings: of the training descriptions of each task, `[descriptions, e]`.
          nonsense: embeddings `[texts, e]` of what describes no task, and (prompt, answer) pairs of
            the base model as it is; they take the place of the share `config.gibberish` of groups.

        Raises:
          UserError: fewer tasks than a step has, or a task without an example that fits.
        """
        self.config, self.embeddings = config, embeddings
        self.seed, self.groups_per_step, self.nonsense = seed, groups_per_step, nonsense
        self.weights = np.divide(weights, sum(weights))
        if len(tasks) < groups_per_step:
            raise UserError(
                f'{len(tasks)} tasks to train on; a step has {groups_per_step} (config.groups)'
            )
        self.examples = []
        for task in tasks:
            pairs = [tokenize(example, tokenizer, config.before) for example in task.train]
            pairs = [
                (prompt, answer)
                for prompt, answer in pairs
                if len(prompt) + len(answer) <= config.row_tokens
                and len(answer) <= config.row_labels
            ]
            if not pairs:
                raise UserError(
                    f'task {task.name!r} has no training example of at most {config.row_tokens} '
                    f'tokens and an answer of at most {config.row_labels}: leave it out, or raise '
                    'config.data.row_tokens or row_labels'
                )
            self.examples.append(pairs)

    def __len__(self) -> int:
        return self.config.steps * self.groups_per_step

    def __getitem__(self, index: int) -> dict[str, dict[str, np.ndarray]]:
        """One group: `context` {embedding `[1, e]`, task `[1]`} and `query`, see `pack`."""
        step, group = divmod(index, self.groups_per_step)
        drawn = np.random.default_rng((self.seed, 0, step)).choice(
            len(self.examples), self.groups_per_step, replace=False, p=self.weights
        )
        task = drawn[group]
        rng = np.random.default_rng((self.seed, 1, index))
        embeddings, examples = self.embeddings[task], self.examples[task]
        if self.nonsense and rng.random() < self.config.gibberish:
            embeddings, examples = self.nonsense
        embedding = draw_embedding(rng, embeddings, self.config.description_noise)
        pairs = (examples[i] for i in rng.permutation(len(examples)))
        query = pack(pairs, self.config.row_tokens, self.config.row_labels)
        context = {'embedding': embedding[None], 'task': np.asarray([task], np.int32)}
        return {'context': context, 'query': query}


def draw_embedding(rng: np.random.Generator, embeddings: np.ndarray, noise: float) -> np.ndarray:
    """An embedding of a task, `[e]` f32, drawn from those of its descriptions, `[descriptions, e]`.

    Args:
      noise: 0 for one of them as it is (the paper); otherwise a random point between two of them,
        and normal noise of so many times the root mean square of an entry. A few descriptions are
        soon known by heart; so the hypernetwork sees the region between them.
    """
    first, second = embeddings[rng.integers(len(embeddings), size=2)]
    if not noise:
        return first
    mixed = first + rng.random(dtype=np.float32) * (second - first)
    size = noise * np.sqrt(np.mean(np.square(mixed)))
    return mixed + size * rng.standard_normal(mixed.shape, np.float32)


def example(
    config: ConfigDict, base: BaseModel, encoder: Embedder | BaseModel
) -> dict[str, dict[str, np.ndarray]]:
    """A group, all alike in shape; see `data.abstract`."""
    width = encoder.width if isinstance(encoder, Embedder) else 1
    context = {'embedding': np.zeros((1, width), np.float32), 'task': np.zeros(1, np.int32)}
    return {'context': context, 'query': pack((), config.row_tokens, config.row_labels)}


def build(
    config: ConfigDict,
    base: BaseModel,
    encoder: Embedder | BaseModel,
    seed: int,
    groups_per_step: int,
) -> TaskGroups:
    """The groups of a training; see `hyperlora.data`. The names of the tasks are noted in
    `config.tasks`, so that the checkpoint knows them.

    Raises:
      UserError: tasks that cannot be read or trained on; see `collect`, `TaskGroups` and
        `unaided`; gibberish for a hypernetwork that reads no descriptions.
    """
    if config.gibberish and not isinstance(encoder, Embedder):
        raise UserError('config.data.gibberish needs a hypernetwork that reads descriptions')
    collection = collect(config)
    tasks = collection.train
    config.tasks = tuple(task.name for task in tasks)
    nonsense = None
    if isinstance(encoder, Embedder):
        embeddings = embed(encoder, tasks)
        if config.gibberish:
            rng = np.random.default_rng((seed, 2))
            texts = [gibberish(rng) for _ in range(_NONSENSE)]
            nonsense = encoder(texts), unaided(base, tasks, config)
    else:  # the hypernetwork knows tasks by their numbers
        embeddings = [np.zeros((1, 1), np.float32)] * len(tasks)
    weights, tokenizer = collection.weights, base.tokenizer
    return TaskGroups(
        tasks, weights, embeddings, tokenizer, config, seed, groups_per_step, nonsense
    )


def gibberish(rng: np.random.Generator) -> str:
    """Twelve words of random letters."""
    letters = list(string.ascii_lowercase)
    return ' '.join(''.join(rng.choice(letters, rng.integers(2, 9))) for _ in range(12))


def unaided(
    base: BaseModel, tasks: Sequence[Task], config: ConfigDict
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) pairs of inputs of many tasks and what the base model begins to say to them,
    with the end of the turn where it comes to one.

    Raises:
      UserError: no input leaves room for that in a row.
    """
    size = min(_SAID, config.row_labels)
    inputs = dict.fromkeys(task.train[0].input for task in tasks)
    prompts = [base.tokenizer.prompt(text) for text in inputs]
    prompts = [prompt for prompt in prompts if len(prompt) + size <= config.row_tokens]
    if not prompts:
        raise UserError(
            f'no input leaves room for {size} tokens of the base model: raise '
            'config.data.row_tokens, or set config.data.gibberish=0'
        )
    prompts = prompts[:: -(-len(prompts) // _NONSENSE)]
    return list(zip(prompts, answer_tokens(base, prompts, size), strict=True))


def embed(encoder: Embedder, tasks: Sequence[Task]) -> list[np.ndarray]:
    """Of each task, the embeddings `[descriptions, e]` of its training descriptions."""
    texts = [text for task in tasks for text in task.descriptions]
    ends = np.cumsum([len(task.descriptions) for task in tasks])[:-1]
    return np.split(encoder(texts), ends)
