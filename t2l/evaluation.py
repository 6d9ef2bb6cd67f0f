"""Evaluation of Text-to-LoRA: text tasks, with the baselines and controls beside it.

Source: Text-to-LoRA (arXiv 2506.06105), section 4; the controls answer whether the hypernetwork
reads its input at all.
"""

from __future__ import annotations

import dataclasses
import pathlib
import string
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from hyperlora import trained
from hyperlora.errors import UserError
from hyperlora.evaluation import record
from hyperlora.generation import answer
from hyperlora.lora import Lora
from hyperlora.models.base import BaseModel
from t2l.collections import READERS, SAME_TASK
from t2l.specialize import Specializer
from t2l.tasks import Example, Task, check_descriptions, field, parse

_ROWS = 64  # prompts per batch


def exact_match(answer: str, example: Example) -> bool:
    """The answer is one of those accepted, but for white space around it."""
    return answer.strip() in example.outputs


def gibberish(rng: np.random.Generator) -> str:
    """Twelve words of random letters."""
    letters = list(string.ascii_lowercase)
    return ' '.join(''.join(rng.choice(letters, rng.integers(2, 9))) for _ in range(12))


class Methods:
    """Ways to answer examples of a task; each maps (task, seed, examples) to answers.

    The seed chooses the description, the shots and what the controls are given.
    """

    def __init__(self, specializer: Specializer, tasks: Sequence[Task], max_new_tokens: int):
        self.specializer, self.tasks, self.max_new_tokens = specializer, tasks, max_new_tokens

    @property
    def base(self) -> BaseModel:
        return self.specializer.trained.base

    def _answer(self, prompts: Sequence[str], lora: Lora | None = None) -> list[str]:
        """Answers; a LoRA of one row serves all prompts, of more rows one each."""
        tokens = [self.base.tokenizer.prompt(text) for text in prompts]
        texts: list[str] = []
        for start in range(0, len(tokens), _ROWS):
            batch = tokens[start : start + _ROWS]
            own = lora
            if lora is not None and lora.rows > 1:
                rows = slice(start, start + _ROWS)
                own = lora.replace(pairs=jax.tree.map(lambda x, r=rows: x[:, r], lora.pairs))
            if own is None or own.rows == 1:  # powers of two, so that shapes are few
                size = 1 << (len(batch) - 1).bit_length()
                batch = batch + batch[-1:] * (size - len(batch))
            texts += answer(self.base, batch, self.max_new_tokens, own)[: len(tokens) - start]
        return texts

    def _described(self, description: str, examples: Sequence[Example]) -> list[str]:
        return self._answer([e.input for e in examples], self.specializer([description]))

    @staticmethod
    def description(task: Task, seed: int) -> str:
        """One that was not trained on, where there is one."""
        texts = task.test_descriptions or task.descriptions
        return texts[seed % len(texts)]

    def zero_shot(self, task: Task, seed: int, examples: Sequence[Example]) -> list[str]:
        """The base model with the input alone."""
        return self._answer([e.input for e in examples])

    def description_in_prompt(self, task, seed, examples) -> list[str]:
        """The base model with description and input."""
        text = self.description(task, seed)
        return self._answer([f'{text}\n\n{e.input}' for e in examples])

    def three_shot(self, task, seed, examples) -> list[str]:
        """The base model with three training examples and the input."""
        if len(task.train) < 3:
            raise UserError(f'the method three_shot needs three training examples of {task.name!r}')
        rng = np.random.default_rng((seed, len(task.train)))
        chosen = [task.train[i] for i in rng.choice(len(task.train), 3, replace=False)]
        shots = ''.join(f'Input: {e.input}\nOutput: {e.output}\n\n' for e in chosen)
        return self._answer([f'{shots}Input: {e.input}\nOutput:' for e in examples])

    def t2l(self, task, seed, examples) -> list[str]:
        """The LoRA of the description; the input alone in the prompt."""
        return self._described(self.description(task, seed), examples)

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
        return self._described(self.description(others[rng.integers(len(others))], seed), examples)

    def gibberish(self, task, seed, examples) -> list[str]:
        """Control: the LoRA of random letters."""
        return self._described(gibberish(np.random.default_rng(seed)), examples)

    def empty(self, task, seed, examples) -> list[str]:
        """Control: the LoRA of no text at all."""
        embedder = self.specializer.trained.hypernetwork.encoder
        lora = self.specializer.from_embeddings(embedder.embed([embedder.encode('')]))
        return self._answer([e.input for e in examples], lora)

    def hyperdecoder(self, task, seed, examples) -> list[str]:
        """The LoRA of each input itself (after Ivison and Peters, 2022)."""
        return self._answer(
            [e.input for e in examples], self.specializer([e.input for e in examples])
        )


METHODS: dict[str, Callable[..., list[str]]] = {
    name: method
    for name, method in vars(Methods).items()
    if callable(method) and not name.startswith('_') and name != 'description'
}
# What they answer does not depend on the seed.
_SEEDLESS = ('zero_shot', 'empty', 'hyperdecoder')


def evaluate(config: ConfigDict, checkpoint: str, workdir: pathlib.Path) -> None:
    """Scores answers on the test examples of tasks; writes metrics.json.

    Args:
      config: of `configs/eval_t2l.py`.
      checkpoint: see `trained.load`.
      workdir: where the results go; a rerun with the same settings goes on after the last task.

    Raises:
      UserError: bad tasks, unknown methods, a checkpoint that does not read descriptions.
    """
    # The command line gives a,b as one text.
    names = [name for text in config.methods for name in text.split(',')]
    unknown = set(names) - METHODS.keys()
    if unknown:
        raise UserError(
            f'unknown methods {", ".join(sorted(unknown))}; known: {", ".join(METHODS)}'
        )
    if config.limit < 0 or config.seeds < 1:
        raise UserError('limit must not be negative, seeds must be positive')
    specializer = Specializer(trained.load(checkpoint))
    settings = specializer.trained.config
    held_out = {name for s in settings.data.sources for name in s.get('held_out', ())}
    tasks = _tasks(config)
    if config.only_held_out:
        tasks = [task for task in tasks if task.name in held_out]
    if not tasks:
        raise UserError('no tasks to evaluate on')
    path = workdir / 'metrics.json'
    metrics = record.resume(
        path,
        {
            'checkpoint': checkpoint,
            'weights': record.digest(specializer.trained.params),
            'methods': names,
            **{k: config[k] for k in ('tasks', 'limit', 'seeds', 'max_new_tokens')},
        },
        {'exact_match': {}, 'held_out': [], 'counts': {}, 'seconds': {}},
    )
    methods = Methods(specializer, tasks, config.max_new_tokens)
    todo = [task for task in tasks if task.name not in metrics['exact_match']]
    begun = time.perf_counter()
    for done, task in enumerate(todo, start=1):
        examples = task.test[: config.limit or None]
        scores, seconds = {}, {}
        for name in names:
            start = time.perf_counter()
            runs = range(1 if name in _SEEDLESS else config.seeds)
            answers = [getattr(methods, name)(task, seed, examples) for seed in runs]
            right = [
                [exact_match(*pair) for pair in zip(texts, examples, strict=True)]
                for texts in answers
            ]
            scores[name] = float(np.mean(right))
            seconds[name] = (time.perf_counter() - start) / (len(runs) * len(examples))
        metrics['exact_match'][task.name] = scores
        metrics['counts'][task.name], metrics['seconds'][task.name] = len(examples), seconds
        metrics['held_out'] = sorted(held_out & metrics['exact_match'].keys())
        metrics['average'] = _averages(metrics)
        record.write(path, metrics)
        left = (time.perf_counter() - begun) / done * (len(todo) - done)
        line = '  '.join(f'{name} {score:.2f}' for name, score in scores.items())
        print(f'{task.name}: {line}  ETA {left / 60:.0f} min', flush=True)
    for group, scores in metrics['average'].items():
        print(f'{group}: ' + '  '.join(f'{name} {score:.3f}' for name, score in scores.items()))


def _tasks(config: ConfigDict) -> list[Task]:
    """The tasks of the config, each with a description.

    Raises:
      UserError: one has no description or no test example, or two have one name.
    """
    tasks = READERS['json'](config.tasks) if config.tasks else []
    if config.generated:
        tasks += READERS['generated']()
    path = pathlib.Path(config.descriptions)
    given = parse(path) if config.descriptions else {}
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
            task = dataclasses.replace(task, test_descriptions=texts)
        found[task.name] = task
    return list(found.values())


def _averages(metrics: dict) -> dict[str, dict[str, float]]:
    """Method -> mean over tasks, of tasks held out from training and of the others."""
    groups = {
        'held_out': [name for name in metrics['exact_match'] if name in metrics['held_out']],
        'other': [name for name in metrics['exact_match'] if name not in metrics['held_out']],
    }
    return {
        group: {
            method: float(np.mean([metrics['exact_match'][name][method] for name in names]))
            for method in metrics['methods']
        }
        for group, names in groups.items()
        if names
    }
