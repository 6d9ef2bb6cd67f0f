"""Evaluation of Text-to-LoRA: text tasks, with the baselines and controls beside it.

Source: Text-to-LoRA (arXiv 2506.06105), section 4; the controls answer whether the hypernetwork
reads its input at all.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from hyperlora import lora_table, trained
from hyperlora.errors import UserError
from hyperlora.evaluation import plots, record
from hyperlora.evaluation.methods import methods_of, public
from hyperlora.generation import answer, answer_in_batches, bucket
from hyperlora.lora import Lora
from hyperlora.models.base import BaseModel
from hyperlora.models.embedders import MAX_CHARACTERS
from hyperlora.trained import Trained
from t2l import collections
from t2l.collections import SAME_TASK
from t2l.data import gibberish
from t2l.specialize import Specializer
from t2l.tasks import Example, Task, check_descriptions, field, parse

_ROWS = 64  # LoRAs in one call


def known_tasks(trained: Trained) -> set[str]:
    """The names of the tasks that a checkpoint was trained on."""
    return set(trained.config.get('data', {}).get('tasks', ()))


def exact_match(answer: str, example: Example) -> bool:
    """The answer is one of those accepted, but for white space around it."""
    return answer.strip() in example.outputs


class Methods:
    """Ways to answer examples of a task; each maps (task, seed, examples) to answers.

    The seed chooses the description, the shots and what the controls are given. None instead of
    answers: the method does not know the task, or a prompt of it does not fit the model's window.
    """

    def __init__(
        self,
        specializer: Specializer,
        tasks: Sequence[Task],
        multitask: Trained | None = None,
        per_task: Trained | None = None,
    ):
        """
        Args:
          tasks: all that are evaluated on.
          multitask: a `LoraTable` of one entry, for the method of that name.
          per_task: a `LoraTable` of an entry per task, for the methods in `_TABLES`.
        """
        self.specializer, self.tasks = specializer, tasks
        self._known = known_tasks(specializer.trained)
        self._tables = {'multitask': multitask, 'per_task': per_task}

    @property
    def base(self) -> BaseModel:
        return self.specializer.trained.base

    def _loras(self) -> tuple[list[str], Trained]:
        """The LoRAs per task, and the names of their tasks."""
        table = self._tables['per_task']
        names = list(table.config.data.get('tasks', ()))
        if (count := table.config.hypernetwork.shape.entries) != len(names):
            raise UserError(f'--config.per_task has {count} LoRAs, but {len(names)} tasks')
        return names, table

    def _room(self, examples: Sequence[Example]) -> int:
        """Tokens of the longest accepted answer, and a few: what goes on after them is wrong."""
        encode = self.base.tokenizer.encode
        return bucket(max(len(encode(text)) for e in examples for text in e.outputs) + 3, 8)

    def _answer(
        self, examples: Sequence[Example], lora: Lora | None = None, before='', after=''
    ) -> list[str] | None:
        """Answers with a LoRA of one row, with text before and after each input."""
        prompts = [self.base.tokenizer.prompt(f'{before}{e.input}{after}') for e in examples]
        room = self._room(examples)
        tokens = max(map(len, prompts)) + room
        if tokens > self.base.config.max_length:
            logging.warning('%d tokens do not fit into the window: a method is left out', tokens)
            return None
        return answer_in_batches(self.base, prompts, room, lora)

    def _described(self, description: str, examples: Sequence[Example]) -> list[str] | None:
        return self._answer(examples, self.specializer([description]))

    def _description(self, task: Task, seed: int) -> str:
        """One that was not trained on, where there is one: of a task that was not, any."""
        texts = task.test_descriptions
        if not texts or task.name not in self._known:
            texts = task.descriptions + task.test_descriptions
        order = np.random.default_rng([*task.name.encode()]).permutation(len(texts))
        return texts[order[seed % len(texts)]]

    def zero_shot(self, task: Task, seed: int, examples: Sequence[Example]) -> list[str]:
        """The base model with the input alone."""
        return self._answer(examples)

    def description_in_prompt(self, task, seed, examples) -> list[str]:
        """The base model with description and input."""
        return self._answer(examples, before=f'{self._description(task, seed)}\n\n')

    def three_shot(self, task, seed, examples) -> list[str] | None:
        """The base model with three training examples and the input."""
        if len(task.train) < 3:
            return None
        rng = np.random.default_rng((seed, len(task.train)))
        chosen = [task.train[i] for i in rng.choice(len(task.train), 3, replace=False)]
        shots = ''.join(f'Input: {e.input}\nOutput: {e.output}\n\n' for e in chosen)
        return self._answer(examples, before=f'{shots}Input: ', after='\nOutput:')

    def t2l(self, task, seed, examples) -> list[str]:
        """The LoRA of the description; the input alone in the prompt."""
        return self._described(self._description(task, seed), examples)

    def known_description(self, task, seed, examples) -> list[str] | None:
        """The LoRA of a description that was trained on: what is lost by compression alone."""
        if task.name not in self._known or not task.descriptions:
            return None
        return self._described(task.descriptions[seed % len(task.descriptions)], examples)

    def multitask(self, task, seed, examples) -> list[str]:
        """One LoRA trained on all tasks."""
        return self._answer(examples, lora_table.single(self._tables['multitask']))

    def per_task(self, task, seed, examples) -> list[str] | None:
        """The LoRA trained on this task alone: the oracle."""
        names, table = self._loras()
        if task.name not in names:
            return None
        return self._answer(examples, lora_table.entries(table, names.index(task.name)))

    def average(self, task, seed, examples) -> list[str]:
        """The mean of A and of B over the LoRAs of all tasks."""
        names, table = self._loras()
        loras = lora_table.entries(table, *range(len(names)))
        mean = jax.tree.map(lambda x: x.mean(1, keepdims=True), loras.pairs)
        return self._answer(examples, loras.replace(pairs=mean))

    def other_description(self, task, seed, examples) -> list[str]:
        """Control: the LoRA of another task's description."""
        others = [
            other
            for other in self.tasks
            if not any({task.name, other.name} <= same for same in ({task.name}, *SAME_TASK))
        ]
        if not others:
            raise UserError('the method other_description needs a second task')
        rng = np.random.default_rng((seed, *task.name.encode()))
        return self._described(self._description(others[rng.integers(len(others))], seed), examples)

    def gibberish(self, task, seed, examples) -> list[str]:
        """Control: the LoRA of random letters."""
        return self._described(gibberish(np.random.default_rng(seed)), examples)

    def empty(self, task, seed, examples) -> list[str] | None:
        """Control: the LoRA of no text at all, if the embedder has tokens of its own around it."""
        embedder = self.specializer.trained.hypernetwork.encoder
        if not (tokens := embedder.encode('')):
            return None
        return self._answer(examples, self.specializer.from_embeddings(embedder.embed([tokens])))

    def hyperdecoder(self, task, seed, examples) -> list[str] | None:
        """The LoRA of each input itself (after Ivison and Peters, 2022)."""
        inputs = [e.input for e in examples]
        if max(map(len, inputs)) > MAX_CHARACTERS:
            return None
        room, texts = self._room(examples), []
        for start in range(0, len(inputs), _ROWS):
            now = inputs[start : start + _ROWS]
            prompts = list(map(self.base.tokenizer.prompt, now))
            texts += answer(self.base, prompts, room, self.specializer(now))
        return texts


METHODS: dict[str, Callable[..., list[str] | None]] = public(Methods)
# What they answer does not depend on the seed.
_SEEDLESS = ('zero_shot', 'multitask', 'per_task', 'average', 'empty', 'hyperdecoder')
# Methods that need plain LoRAs, and where the config names these.
_TABLES = {'multitask': 'multitask', 'per_task': 'per_task', 'average': 'per_task'}


def evaluate(config: ConfigDict, checkpoint: str, workdir: pathlib.Path) -> None:
    """Scores answers on the test examples of tasks; writes metrics.json.

    Args:
      config: of `configs/eval_t2l.py`.
      checkpoint: see `trained.load`.
      workdir: where the results go; a rerun with the same settings goes on after the last task.

    Raises:
      UserError: bad tasks, unknown methods, a checkpoint that does not read descriptions.
    """
    names = methods_of(config.methods, METHODS)
    if config.limit < 0 or config.seeds < 1:
        raise UserError('limit must not be negative, seeds must be positive')
    if config.only not in ('', 'seen', 'unseen'):
        raise UserError(f"only must be 'seen' or 'unseen' or empty, not {config.only!r}")
    for name, table in _TABLES.items():
        if name in names and not config[table]:
            raise UserError(
                f'the method {name} needs --config.{table}=CHECKPOINT (configs/t2l.py:{table})'
            )
    specializer = Specializer(trained.load(checkpoint, quantization=config.base_quantization))
    seen = known_tasks(specializer.trained)
    tables = {
        name: trained.load(config[name], specializer.trained.base).require('lora_table')
        if config[name]
        else None
        for name in ('multitask', 'per_task')
    }
    tasks = _tasks(config)
    if config.only:
        tasks = [task for task in tasks if (task.name in seen) == (config.only == 'seen')]
    if not tasks:
        raise UserError('no tasks to evaluate on')
    path = workdir / 'metrics.json'
    metrics = record.resume(
        path,
        config,
        {'exact_match': {}, 'seen': [], 'counts': {}, 'seconds': {}},
        checkpoint=checkpoint,
        weights=record.digest(specializer.trained.params),
        methods=names,
        texts=record.digest(
            [
                (task.name, task.descriptions, task.test_descriptions)
                + tuple(
                    (e.input, e.outputs) for e in itertools.islice(task.test, config.limit or None)
                )
                for task in tasks
            ]
        ),
        **{name: table and record.digest(table.params) for name, table in tables.items()},
    )
    methods = Methods(specializer, tasks, **tables)
    todo = [task for task in tasks if task.name not in metrics['exact_match']]
    begun = time.perf_counter()
    for done, task in enumerate(todo, start=1):
        examples = list(itertools.islice(task.test, config.limit or None))
        scores, seconds = {}, {}
        for name in names:
            start = time.perf_counter()
            runs = range(1 if name in _SEEDLESS else config.seeds)
            answers = [getattr(methods, name)(task, seed, examples) for seed in runs]
            if any(texts is None for texts in answers):
                continue
            right = [
                [exact_match(*pair) for pair in zip(texts, examples, strict=True)]
                for texts in answers
            ]
            scores[name] = float(np.mean(right))
            seconds[name] = (time.perf_counter() - start) / (len(runs) * len(examples))
        metrics['exact_match'][task.name] = scores
        metrics['counts'][task.name], metrics['seconds'][task.name] = len(examples), seconds
        metrics['seen'] = sorted(seen & metrics['exact_match'].keys())
        metrics['average'] = _averages(metrics)
        record.write(path, metrics)
        left = (time.perf_counter() - begun) / done * (len(todo) - done)
        line = '  '.join(f'{name} {score:.2f}' for name, score in scores.items())
        print(f'{task.name}: {line}  ETA {left / 60:.0f} min', flush=True)
    plots.bars(
        workdir / 't2l_methods.png',
        metrics['average'],
        'exact match',
        'Tasks by their descriptions',
    )
    for group, scores in metrics['average'].items():
        print(f'{group}: ' + '  '.join(f'{name} {score:.3f}' for name, score in scores.items()))


def _tasks(config: ConfigDict) -> list[Task]:
    """The tasks of the config, each with a description.

    Raises:
      UserError: one has no description or no test example, or two have one name.
    """
    tasks = collections.read(collections.source(config.tasks)) if config.tasks else []
    if config.generated:
        tasks += collections.read({'reader': 'generated'})
    path = pathlib.Path(config.descriptions)
    given = parse(path) if config.descriptions else {}
    if not isinstance(given, dict):
        raise UserError(f'{path}: it must map names of tasks to lists of descriptions')
    found = {}
    for task in tasks:
        if task.name in found:
            raise UserError(f'two tasks are named {task.name!r}')
        if not task.test:
            raise UserError(f'task {task.name!r} has no test examples')
        if not (task.descriptions or task.test_descriptions):
            if task.name not in given:
                raise UserError(
                    f'task {task.name!r} has no description: give some in a YAML file '
                    '(task name: list of texts) as --config.descriptions'
                )
            texts = field(given, task.name, list, str(path))
            texts = check_descriptions(texts, f'{path}: {task.name}')
            if not texts:
                raise UserError(f'{path}: no descriptions of {task.name!r}')
            task = dataclasses.replace(task, test_descriptions=texts)
            del given[task.name]
        found[task.name] = task
    if given:
        raise UserError(
            f'{path}: {", ".join(map(str, given))}: no such tasks, or they have descriptions'
        )
    return list(found.values())


def _averages(metrics: dict) -> dict[str, dict[str, float]]:
    """Method -> mean over tasks, of tasks seen in training and of the others. A method that does
    not know all tasks of a group has no mean there: it would be one over other tasks."""
    scores = metrics['exact_match']
    groups = {
        'seen': [scores[name] for name in scores if name in metrics['seen']],
        'unseen': [scores[name] for name in scores if name not in metrics['seen']],
    }
    return {
        group: {
            method: float(np.mean([task[method] for task in tasks]))
            for method in metrics['settings']['methods']
            if all(method in task for task in tasks)
        }
        for group, tasks in groups.items()
        if tasks
    }
