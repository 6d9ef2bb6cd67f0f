"""A collection of tasks, put together from a config; some tasks as a whole are held out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from hyperlora.data import readers
from hyperlora.errors import UserError
from t2l import tasks
from t2l.tasks import Example, Task

# Sets of tasks that are one and the same, or of which one teaches another: whoever holds one out
# holds out all.
SAME_TASK: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        'fv_antonym ii_antonyms',
        'fv_synonym ii_synonyms',
        'fv_sentiment ii_sentiment',
        'fv_english_french ii_translation_en_fr',
        'fv_english_german ii_translation_en_de',
        'fv_singular_plural ii_singular_to_plural plural',
        'fv_present_past past_tense',
        'fv_capitalize capitalize_word',
        'fv_word_length count_letters',
        'ii_first_word_letter first_letter',
        'ii_sum sum_of_pair',
        'ii_num_to_verbal number_in_english',
        'fv_adjective_v_verb_3 fv_adjective_v_verb_5 pick_adjective adjective_among_animals_3 '
        'adjective_among_animals_5 adjective_among_objects_3',
        'fv_alphabetically_first_3 fv_alphabetically_first_5 alphabetically_first_of_4',
        'fv_choose_first_of_3 fv_choose_first_of_5 first_word first_number',
        'fv_choose_last_of_3 last_word last_number choose_last_of_5',
        'second_word second_number choose_second_of_4 choose_second_of_5',
        'second_to_last_word choose_fourth_of_5 choose_third_of_4',
        'first_and_last_word first_and_last_of_3 first_and_last_of_5',
        'reverse_words reverse_list_of_3 reverse_numbers',
        'fv_choose_middle_of_3 fv_choose_middle_of_5',
        'fv_color_v_animal_3 fv_color_v_animal_5',
        'fv_concept_v_object_3 fv_concept_v_object_5',
        'fv_fruit_v_animal_3 fv_fruit_v_animal_5 pick_fruit fruit_among_objects_3 '
        'fruit_among_vehicles_5',
        'fv_animal_v_object_3 ii_taxonomy_animal pick_animal animal_among_colors_3 '
        'animal_among_verbs_3 animal_among_adjectives_5 animal_among_vehicles_5',
        'pick_garment garment_among_animals_3 garment_among_jobs_5',
        'pick_job job_among_animals_3 job_among_verbs_5',
        'pick_body_part body_part_among_animals_3 body_part_among_fruits_5',
        'pick_given_name given_name_among_countries_3',
        'pick_month month_among_weekdays_3',
        'pick_number_word number_word_among_animals_3 number_word_among_adjectives_5',
        'country_among_languages_3 country_among_animals_5',
        'fv_object_v_concept_3 fv_object_v_concept_5 pick_object object_among_animals_3 '
        'object_among_adjectives_5',
        'largest_number larger_of_pair',
        'comparative comparative_with_than',
        'ing_form progressive_of_verb',
        'ii_negation sentence_to_negation',
    )
)

_COMPARED = 1000  # examples of a task, to find out whether another one is the same,
_MANY = 20  # which it is if it answers so many inputs alike and none otherwise


@dataclasses.dataclass(frozen=True)
class Collection:
    """Tasks to train on, and tasks of which nothing is seen in training."""

    train: tuple[Task, ...]
    held_out: tuple[Task, ...]
    weights: tuple[float, ...]  # of the tasks to train on: how often each is drawn


def _read_generated(
    seed: int = 0, train: int = 500, test: int = 100, names: tuple[str, ...] = ()
) -> list[Task]:
    """The generated tasks of these names, or all."""
    from t2l import generated  # its libraries are an extra

    return [generated.generate(name, seed, train, test) for name in names or generated.RECIPES]


def _read_parametric(seed: int = 0, train: int = 200, test: int = 100) -> list[Task]:
    """Tasks by rules; see `parametric`."""
    from t2l import parametric

    return [parametric.generate(name, seed, train, test) for name in parametric.RECIPES]


def _read_benchmarks(names: tuple[str, ...] = (), data_dir: str | None = None) -> list[Task]:
    from t2l import benchmarks  # tensorflow_datasets is slow to import

    return benchmarks.read_benchmarks(names, data_dir)


def _read_records(path: str) -> list[Task]:
    from t2l import records

    return records.read_records(path)


READERS: dict[str, Callable[..., list[Task]]] = {
    **tasks.READERS,
    'generated': _read_generated,
    'parametric': _read_parametric,
    'benchmarks': _read_benchmarks,
    'records': _read_records,
}


# What may follow the names of readers on the command line.
_ARGUMENTS = {
    'json': ('path',),
    'natural_instructions': ('path', 'split'),
    'text_to_lora': ('path', 'instructions'),
    'records': ('path',),
}


def source(text: str) -> dict[str, Any]:
    """What `READER` or `READER,ARGUMENT,...` names, as a source of `read`; a path alone holds JSON
    tasks. The arguments are paths, a split of Super-NaturalInstructions, or names of benchmarks.

    Raises:
      UserError: too many arguments.
    """
    reader, *arguments = text.split(',')
    if reader not in READERS:
        return {'reader': 'json', 'path': text}
    if reader == 'benchmarks':
        return {'reader': reader, 'names': tuple(arguments)}
    names = _ARGUMENTS.get(reader, ())
    if len(arguments) > len(names):
        known = ','.join([reader, *map(str.upper, names)])
        raise UserError(f'name the tasks as {known}, not {text!r}')
    return {'reader': reader, **dict(zip(names, arguments, strict=False))}


def read(source: Mapping[str, Any]) -> list[Task]:
    """The tasks of a source {reader, and its arguments}; see `readers.read`."""
    return readers.read(READERS, source, 'tasks')


def collect(config: ConfigDict) -> Collection:
    """Reads the tasks of a config {sources: [{reader, held_out, weight, ...}]}.

    A source names its reader, the tasks to hold out and how often each of its tasks is drawn (1 if
    it does not say); what else it says are arguments of the reader. What any task tests, with the
    same answer, is not trained on: words and sentences occur in several tasks.

    Raises:
      UserError: unknown reader or argument, a held-out task that is not there, two tasks of one
        name, a task without a description or examples, one that leaves nothing to train on, or a
        held-out task that is trained on under another name.
    """
    train: dict[str, Task] = {}
    held_out: dict[str, Task] = {}
    weights: list[float] = []
    for source in config.sources:
        if not isinstance(source, Mapping):
            raise UserError(f'a source of tasks must be a mapping with its reader, not {source!r}')
        arguments = dict(source)
        reader = arguments.get('reader')
        names = set(arguments.pop('held_out', ()))
        weight = arguments.pop('weight', 1.0)
        if not weight > 0:
            raise UserError(f'the weight of a source of tasks must be positive, not {weight}')
        found = read(arguments)
        if missing := names - {task.name for task in found}:
            raise UserError(
                f'held-out tasks that the reader {reader!r} did not find: '
                f'{", ".join(sorted(missing))}'
            )
        for task in found:
            if task.name in train or task.name in held_out:
                raise UserError(f'two tasks are named {task.name!r}')
            if not task.descriptions:
                raise UserError(
                    f'task {task.name!r} of {task.source} has no description: add some to '
                    "'descriptions' in its file"
                )
            if not task.test or not (task.train or task.name in names):
                raise UserError(f'task {task.name!r} of {task.source} lacks train or test examples')
            if task.name in names:
                held_out[task.name] = task
            else:
                train[task.name] = task
                weights.append(weight)
    for same in SAME_TASK:
        if same & train.keys() and same & held_out.keys():
            raise UserError(
                f'{", ".join(sorted(same & held_out.keys()))} held out, but '
                f'{", ".join(sorted(same & train.keys()))} trained on: that is the same task; '
                'hold out both or neither'
            )
    _check_answers(train.values(), held_out.values())
    tested = {pair for task in (*train.values(), *held_out.values()) for pair in _pairs(task.test)}
    return Collection(
        tuple(_without(task, tested) for task in train.values()),
        tuple(held_out.values()),
        tuple(weights),
    )


def _pairs(examples: Iterable[Example]) -> Iterator[tuple[str, str]]:
    return ((example.input, output) for example in examples for output in example.outputs)


def _without(task: Task, tested: set[tuple[str, str]]) -> Task:
    """The task without training examples that are tested.

    Raises:
      UserError: it has no others.
    """
    kept = tuple(example for example in task.train if tested.isdisjoint(_pairs([example])))
    if not kept:
        raise UserError(
            f'all training examples of task {task.name!r} of {task.source} are tested by it or '
            'another task: leave one of the two out'
        )
    return dataclasses.replace(task, train=kept)


def _check_answers(train: Iterable[Task], held_out: Iterable[Task]) -> None:
    """Refuses tasks to train on that answer every input which they share with a held-out task as
    that does, if they share many.

    Raises:
      UserError: there is one.
    """
    answers: dict[str, list[tuple[str, str]]] = {}
    for task in held_out:
        for example in itertools.islice(itertools.chain(task.train, task.test), _COMPARED):
            answers.setdefault(example.input, []).append((task.name, example.output))
    for task in train:
        same: dict[str, list[bool]] = {}
        for example in itertools.islice(task.train, _COMPARED):
            for name, output in answers.get(example.input, ()):
                same.setdefault(name, []).append(output in example.outputs)
        for name, agreed in same.items():
            if len(agreed) >= _MANY and all(agreed):
                raise UserError(
                    f'{name} held out, but {task.name} trained on: they answer {len(agreed)} '
                    'inputs alike, so that is the same task; hold out both or neither'
                )
