"""Text tasks: what they are, and readers of the formats they come in.

A reader takes a path and returns tasks; `READERS` names them for configs. All of them check what
they read and name the file and the place of a mistake.

Sources: Instruction Induction (arXiv 2205.10782) and Function Vectors (arXiv 2310.15213) for JSON
tasks, Super-NaturalInstructions (arXiv 2204.07705), Text-to-LoRA (arXiv 2506.06105).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import yaml

from hyperlora.errors import UserError

DESCRIPTIONS = pathlib.Path(__file__).parent / 'descriptions'
# Given descriptions are few: own ones are added below this number.
FEW_DESCRIPTIONS = 32
_LONGEST_NAME = 200  # of a task: it names files, too


@dataclasses.dataclass(frozen=True)
class Example:
    """One input and the answers that count as right; the first is the one to learn."""

    input: str
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.outputs[0]


@dataclasses.dataclass(frozen=True)
class Task:
    """A text task. No input is in both `train` and `test`, and no description in both tuples.

    Attributes:
      descriptions: what a hypernetwork may train on.
      test_descriptions: kept for testing; may be empty where a source gives few.
    """

    name: str
    source: str
    license: str
    descriptions: tuple[str, ...]
    test_descriptions: tuple[str, ...]
    train: Sequence[Example]
    test: Sequence[Example]


class MappedExamples(Sequence[Example]):
    """Examples made from the records of a data source when asked for."""

    def __init__(self, source: Sequence[Any], example: Callable[[Any], Example]):
        self._source, self._example = source, example

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return self._example(self._source[index])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


# ---------------------------------------------------------------------------------- checks


def parse(path: pathlib.Path) -> Any:
    """The content of a JSON or YAML file.

    Raises:
      UserError: cannot be read, or malformed; names the line.
    """
    try:
        text = path.read_text(encoding='utf-8-sig')
        return json.loads(text) if path.suffix == '.json' else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read: {error}') from error
    except json.JSONDecodeError as error:
        raise UserError(f'{path}, line {error.lineno}: not JSON: {error.msg}') from error
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        line = f', line {mark.line + 1}' if mark else ''
        problem = getattr(error, 'problem', None) or error
        raise UserError(f'{path}{line}: not YAML: {problem}') from error
    except (ValueError, RecursionError) as error:  # a date that there is not; no end of brackets
        raise UserError(f'{path}: cannot be read: {error}') from error


def field(entry: Any, key: str, kind: type | tuple[type, ...], place: str) -> Any:
    """`entry[key]`, checked.

    Raises:
      UserError: not a mapping, no such key, or a value of another type.
    """
    if not isinstance(entry, dict):
        raise UserError(f'{place}: expected a mapping with {key!r}, found {type(entry).__name__}')
    if key not in entry:
        raise UserError(f'{place}: no {key!r}; found: {", ".join(map(str, entry)) or "nothing"}')
    if not isinstance(entry[key], kind):
        raise UserError(f'{place}: {key!r} is of type {type(entry[key]).__name__}')
    return entry[key]


def check_descriptions(descriptions: Sequence[Any], place: str) -> tuple[str, ...]:
    """The descriptions without surrounding blanks.

    Raises:
      UserError: one is empty, no text, or given twice.
    """
    seen: dict[str, int] = {}
    for i, text in enumerate(descriptions):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{place}[{i}]: a description must be text, found {text!r}')
        if (first := seen.setdefault(text.strip(), i)) != i:
            raise UserError(f'{place}[{i}]: the same description as [{first}]: {text!r}')
    return tuple(seen)


def check_examples(
    entries: Iterable[Any], place: str, taken: dict[str, tuple[str, ...]] | None = None
) -> tuple[Example, ...]:
    """Examples of a list of {input, output}; an output is a text or a list of accepted texts, and
    blanks around it do not count.

    An input that comes again with another output is one example with several accepted outputs.

    Args:
      taken: input -> outputs of another split: such an input is left out here, so that nothing
        that is tested is trained on.

    Raises:
      UserError: an empty or missing input or output, or an example given twice.
    """
    taken = taken or {}
    merged: dict[str, dict[str, int]] = {}
    for i, entry in enumerate(entries):
        here = f'{place}[{i}]'
        text = field(entry, 'input', str, here)
        outputs = field(entry, 'output', (str, list), here)
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if not text.strip():
            raise UserError(f'{here}: the input is empty')
        if not outputs or not all(isinstance(o, str) and o.strip() for o in outputs):
            raise UserError(f'{here}: an output must be text, found {entry["output"]!r}')
        outputs = dict.fromkeys(o.strip() for o in outputs)  # annotators agree
        seen = merged.setdefault(text, {})
        if outputs.keys() <= seen.keys():
            first = seen[next(iter(outputs))]
            raise UserError(f'{here}: the same example as {place}[{first}]: {text[:80]!r}')
        if outputs.keys() <= set(taken.get(text, ())):
            raise UserError(f'{here}: also a test example: {text[:80]!r}')
        for output in outputs:
            seen.setdefault(output, i)
    return tuple(
        Example(text, tuple(outputs)) for text, outputs in merged.items() if text not in taken
    )


def split_descriptions(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Given descriptions as (train, test): every fourth is kept for testing."""
    train = tuple(text for i, text in enumerate(texts) if i % 4 != 3)
    return train, tuple(texts[3::4])


@functools.cache
def own_descriptions(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Descriptions (train, test) that come with the package; empty where there are none.

    Raises:
      UserError: the file is malformed, or a description is in both lists.
    """
    path = DESCRIPTIONS / f'{name}.yaml'
    if not path.exists():
        return (), ()
    entry = parse(path)
    train, test = (field(entry, part, list, str(path)) for part in ('train', 'test'))
    check_descriptions([*train, *test], f'{path}: train + test')
    return tuple(train), tuple(test)


def describe(name: str, given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The two description fields of a task: the given ones, and own ones where those are few."""
    train, test = split_descriptions(given)
    if len(given) < FEW_DESCRIPTIONS:
        own_train, own_test = own_descriptions(name)
        known = {*train, *test}
        train += tuple(text for text in own_train if text not in known)
        test += tuple(text for text in own_test if text not in known)
    return {'descriptions': train, 'test_descriptions': test}


def _files(path: str, pattern: str) -> list[pathlib.Path]:
    """The files of a folder, or the one file; in order of name.

    Raises:
      UserError: none.
    """
    root = pathlib.Path(path).expanduser()
    files = [root] if root.is_file() else sorted(root.glob(pattern))
    if not files:
        raise UserError(f'{root}: no {pattern} there')
    return files


# ---------------------------------------------------------------------------------- readers


def read_json(path: str) -> list[Task]:
    """Tasks of a folder of JSON files (or of one file), one task each.

    A file holds {name, source, license, descriptions, train, test}, a split being a list of
    {input, output}.

    Raises:
      UserError: a file that is not so.
    """
    return [_read_json_task(file) for file in _files(path, '*.json')]


def _read_json_task(file: pathlib.Path) -> Task:
    entry = parse(file)
    name, source, license_ = (
        field(entry, key, str, str(file)) for key in ('name', 'source', 'license')
    )
    if len(name.encode()) > _LONGEST_NAME or '/' in name:
        raise UserError(
            f'{file}: a name has at most {_LONGEST_NAME} bytes and no "/", not {name!r}'
        )
    given = check_descriptions(
        field(entry, 'descriptions', list, str(file)), f'{file}: descriptions'
    )
    test = check_examples(field(entry, 'test', list, str(file)), f'{file}: test')
    train = check_examples(
        field(entry, 'train', list, str(file)),
        f'{file}: train',
        {example.input: example.outputs for example in test},
    )
    return Task(name, source, license_, **describe(name, given), train=train, test=test)


def read_natural_instructions(path: str, split: str = '') -> list[Task]:
    """Tasks of a checkout of Super-NaturalInstructions.

    The first 100 instances are for testing, as in its own evaluation; the others and the positive
    examples are for training.

    Args:
      split: a list of tasks in the checkout's `splits`, such as 'default/train_tasks'; all tasks if
        empty.

    Raises:
      UserError: a file that is not of that format, or no such split.
    """
    root = pathlib.Path(path).expanduser()
    if not split:
        return [_read_instructions(file) for file in _files(f'{root}/tasks', 'task*.json')]
    names = root / 'splits' / f'{split}.txt'
    if not names.is_file():
        raise UserError(f'{names}: no such split')
    return [
        _read_instructions(root / 'tasks' / f'{name}.json')
        for name in names.read_text(encoding='utf-8').split()
    ]


def _read_instructions(file: pathlib.Path) -> Task:
    entry = parse(file)
    # Old revisions give the definition as a text, new ones as a list.
    definition = field(entry, 'Definition', (str, list), str(file))
    definition = [definition] if isinstance(definition, str) else definition
    given = check_descriptions(definition, f'{file}: Definition')
    if not given:
        raise UserError(f'{file}: Definition is empty')
    licenses = field(
        {'Instance License': ['unknown'], **entry}, 'Instance License', list, str(file)
    )
    instances = field(entry, 'Instances', list, str(file))
    positive = field(entry, 'Positive Examples', list, str(file))
    test = check_examples(instances[:100], f'{file}: Instances')
    taken = {example.input: example.outputs for example in test}
    train = check_examples(positive, f'{file}: Positive Examples', taken)
    train += check_examples(instances[100:], f'{file}: Instances[100:]', taken)
    return Task(
        file.stem,
        'Super-NaturalInstructions',
        ', '.join(map(str, licenses)),
        **describe(file.stem, given),
        train=train,
        test=test,
    )


def read_text_to_lora(
    path: str, instructions: str, names: tuple[str, ...] = (), test_descriptions: int = 0
) -> list[Task]:
    """Tasks of a checkout of Text-to-LoRA whose data sets are Super-NaturalInstructions tasks.

    `tasks/NAME/metadata.yaml` gives descriptions, a prompt template and the data set; prompts are
    made as there, so they include the definition of the task where the template does.

    Args:
      instructions: the checkout of Super-NaturalInstructions.
      names: which tasks; all those named `lol_*` if empty.
      test_descriptions: how many of the descriptions, from the end, are kept for testing.

    Raises:
      UserError: malformed metadata, or no data set of that name.
    """
    root = pathlib.Path(path).expanduser() / 'tasks'
    files = [root / name / 'metadata.yaml' for name in names]
    files = files or _files(str(root), 'lol_*/metadata.yaml')
    data = pathlib.Path(instructions).expanduser() / 'tasks'
    return [_read_metadata(file, data, test_descriptions) for file in files]


def _read_metadata(file: pathlib.Path, data: pathlib.Path, test_descriptions: int) -> Task:
    entry = parse(file)
    place = str(file)
    given = check_descriptions(field(entry, 'descriptions', list, place), f'{place}: descriptions')
    if not 0 <= test_descriptions < len(given):
        raise UserError(
            f'{place}: {len(given)} descriptions, of which {test_descriptions} for test'
        )
    template = field(entry, 'user_prompt_template', str, place)
    dataset = field(field(entry, 'ds_kwargs', dict, place), 'path', str, place)
    source = data / f'{dataset.split("/")[-1]}.json'
    if not source.is_file():
        raise UserError(f'{place}: its data set {dataset!r} is not at {source}')
    task = _read_instructions(source)
    definition = (task.descriptions + task.test_descriptions)[0]

    def prompts(examples):
        try:
            return tuple(
                Example(template.format(task_def=definition, problem=e.input), e.outputs)
                for e in examples
            )
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f'{place}: cannot fill user_prompt_template ({error!r}), of which the fields are '
                '{task_def} and {problem}'
            ) from error

    count = len(given) - test_descriptions
    return Task(
        file.parent.name,
        f'Text-to-LoRA, {dataset}',
        task.license,
        given[:count],
        given[count:],
        prompts(task.train),
        prompts(task.test),
    )


READERS: dict[str, Callable[..., list[Task]]] = {
    'json': read_json,
    'natural_instructions': read_natural_instructions,
    'text_to_lora': read_text_to_lora,
}
