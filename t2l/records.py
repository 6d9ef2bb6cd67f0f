"""Tasks as ArrayRecord files, written by a tfds builder: made once, and read alike on every host.

The examples of a task that was read from records are a data source, which `grain.MapDataset.source`
takes and worker processes can copy; a training tokenizes all of them before its first step.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from hyperlora.errors import UserError
from t2l.tasks import Example, MappedExamples, Task


@dataclasses.dataclass(eq=False)
class TaskConfig(tfds.core.BuilderConfig):
    """The task that a builder writes."""

    task: Task | None = dataclasses.field(default=None, repr=False)


class TextTask(tfds.core.GeneratorBasedBuilder):
    """One text task: splits `train` and `test` of {input, outputs}; the rest is metadata."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        task = self.builder_config.task
        return tfds.core.DatasetInfo(
            builder=self,
            description=task.descriptions[0] if task.descriptions else '',
            features=tfds.features.FeaturesDict(
                {
                    'input': tfds.features.Text(),
                    'outputs': tfds.features.Sequence(tfds.features.Text()),
                }
            ),
            metadata=tfds.core.MetadataDict(
                name=task.name,
                source=task.source,
                license=task.license,
                descriptions=list(task.descriptions),
                test_descriptions=list(task.test_descriptions),
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        task = self.builder_config.task
        return {
            'train': self._generate_examples(task.train),
            'test': self._generate_examples(task.test),
        }

    def _generate_examples(self, examples: Iterable[Example]) -> Iterator:
        for i, example in enumerate(examples):
            yield i, {'input': example.input, 'outputs': list(example.outputs)}


def write_records(tasks: Iterable[Task], path: str) -> None:
    """Writes each task to `path/text_task/NAME`; a task appears there only when complete.

    Raises:
      UserError: a task is there already, or has no examples of one kind.
    """
    tfds.disable_progress_bar()
    for task in tasks:
        if not (len(task.train) and len(task.test)):
            raise UserError(f'task {task.name!r} of {task.source} lacks train or test examples')
        config = TaskConfig(name=task.name, task=task)
        builder = TextTask(config=config, data_dir=path, file_format='array_record')
        if builder.data_path.exists():
            raise UserError(f'{builder.data_path}: already there; remove it or write elsewhere')
        builder.download_and_prepare()


def _example(record: dict[str, Any]) -> Example:
    return Example(record['input'].decode(), tuple(text.decode() for text in record['outputs']))


def read_records(path: str) -> list[Task]:
    """The tasks that `write_records` left in a folder, in order of name.

    Raises:
      UserError: none, or damaged ones.
    """
    root = pathlib.Path(path).expanduser() / 'text_task'
    folders = sorted(info.parent for info in root.glob('*/*/dataset_info.json'))
    if not folders:
        raise UserError(f'{root}: no records of tasks there')
    return [_read(folder) for folder in folders]


def _read(folder: pathlib.Path) -> Task:
    try:
        builder = tfds.builder_from_directory(str(folder))
        metadata = builder.info.metadata
        task = Task(
            metadata['name'],
            metadata['source'],
            metadata['license'],
            tuple(metadata['descriptions']),
            tuple(metadata['test_descriptions']),
            MappedExamples(builder.as_data_source('train'), _example),
            MappedExamples(builder.as_data_source('test'), _example),
        )
        for examples in (task.train, task.test):
            examples[len(examples) - 1]  # a file that was cut off can be read nowhere
    except Exception as error:  # tfds raises whatever its parsers and readers do
        raise UserError(
            f'{folder}: not the records of a task, or damaged ({error}): write them again'
        ) from error
    return task
