"""Benchmarks of tensorflow_datasets as tasks for evaluation.

A question with choices is answered by its letter, GSM8K by the final number. HumanEval and MBPP
are not in tensorflow_datasets, and their answers are programs to be run rather than compared.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import tensorflow_datasets as tfds

from hyperlora.errors import UserError
from t2l.tasks import Example, MappedExamples, Task, describe

_LETTERS = 'ABCDE'


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _choice(question: str, choices: Iterable[Any], answer: int) -> Example:
    """A question, its choices by letter, and the letter of the right one."""
    lines = [f'{letter}: {_text(c)}' for letter, c in zip(_LETTERS, choices, strict=False)]
    return Example('\n'.join([question.strip(), *lines]), (_LETTERS[answer],))


def _arc(record: dict[str, Any]) -> Example:
    # Some questions have three or five choices, and labels in another order.
    labels = [int(label) for label in record['choices']['label']]
    answer = labels.index(int(record['answerKey']))
    return _choice(_text(record['question']), record['choices']['text'], answer)


def _bool_q(record: dict[str, Any]) -> Example:
    text = f'{_text(record["passage"])}\nQuestion: {_text(record["question"])}?'
    return Example(text, ('true' if record['answer'] else 'false',))


def _hellaswag(record: dict[str, Any]) -> Example:
    return _choice(_text(record['context']), record['endings'], int(record['label']))


def _openbookqa(record: dict[str, Any]) -> Example:
    question = record['question']
    choices = [question[f'choice_{letter}'] for letter in 'ABCD']
    return _choice(_text(question['stem']), choices, int(record['answerKey']))


def _piqa(record: dict[str, Any]) -> Example:
    return _choice(_text(record['goal']), (record['sol1'], record['sol2']), int(record['label']))


def _winogrande(record: dict[str, Any]) -> Example:
    choices = record['option1'], record['option2']
    return _choice(_text(record['sentence']), choices, int(record['label']))


def _gsm8k(record: dict[str, Any]) -> Example:
    return Example(_text(record['question']), (_text(record['short_answer']).strip(),))


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set of tfds and how its records become examples.

    Attributes:
      test: the split to report on: that with public answers.
      module: of tfds, which registers the data set when imported; the others register themselves.
    """

    dataset: str
    train: str
    test: str
    license: str
    example: Callable[[dict[str, Any]], Example]
    module: str = ''


BENCHMARKS = {
    'arc_challenge': Benchmark('ai2_arc/ARC-Challenge', 'train', 'test', 'CC BY-SA 4.0', _arc),
    'arc_easy': Benchmark('ai2_arc/ARC-Easy', 'train', 'test', 'CC BY-SA 4.0', _arc),
    'boolq': Benchmark('bool_q', 'train', 'validation', 'CC BY-SA 3.0', _bool_q),
    'gsm8k': Benchmark('gsm8k', 'train', 'test', 'MIT', _gsm8k, 'text.gsm8k.gsm8k'),
    'hellaswag': Benchmark('hellaswag', 'train', 'validation', 'MIT', _hellaswag, 'text.hellaswag'),
    'openbookqa': Benchmark('openbookqa', 'train', 'test', 'Apache-2.0', _openbookqa),
    'piqa': Benchmark('piqa', 'train', 'validation', 'AFL-3.0', _piqa),
    'winogrande': Benchmark(
        'winogrande', 'train_xl', 'validation', 'CC BY 4.0', _winogrande, 'text.winogrande'
    ),
}


def read_benchmarks(names: tuple[str, ...] = (), data_dir: str | None = None) -> list[Task]:
    """Benchmarks by name, or all; tfds downloads what is not in its `data_dir`.

    Raises:
      UserError: unknown name, or data that are not there and cannot be downloaded.
    """
    return [_read(name, data_dir) for name in names or BENCHMARKS]


def _read(name: str, data_dir: str | None) -> Task:
    if name not in BENCHMARKS:
        raise UserError(f'unknown benchmark {name!r}; known: {", ".join(BENCHMARKS)}')
    benchmark = BENCHMARKS[name]
    if benchmark.module:
        importlib.import_module(f'tensorflow_datasets.{benchmark.module}')
    try:
        builder = tfds.builder(
            benchmark.dataset, data_dir=data_dir, file_format='array_record', try_gcs=False
        )
        builder.download_and_prepare()
        splits = [builder.as_data_source(split) for split in (benchmark.train, benchmark.test)]
    except Exception as error:  # tfds raises whatever its downloader, parser or file system does
        raise UserError(f'{benchmark.dataset}: {error}') from error
    train, test = (MappedExamples(split, benchmark.example) for split in splits)
    return Task(
        name, benchmark.dataset, benchmark.license, **describe(name, ()), train=train, test=test
    )
