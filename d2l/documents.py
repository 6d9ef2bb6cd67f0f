"""Documents with questions, from files of several layouts.

A reader maps a path (for `tfds` a name, for `facts` and `words` a number) to documents. What it
finds wrong it names, with file and line.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from d2l import files, haystacks, pictures
from d2l.pictures import PREFIX, QUESTION
from hyperlora.data import readers
from hyperlora.errors import UserError

# Each with the blanks that follow it.
_PARAGRAPH = re.compile(r'.+?(?:\n\s*\n|\Z)', re.DOTALL)
_SENTENCE = re.compile(r'.+?(?:\n|(?<=[.!?])\s|(?<=[。！？])|\Z)', re.DOTALL)
_LABELS = ('Text:', 'Words:', 'Here:', 'Note:', 'Image:')  # before a word that stands alone


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and the answers that are accepted; none where they are yet to be generated. An
    empty one is not put: the answer comes at once."""

    text: str
    answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and questions about it.

    Attributes:
      name: unique within its source.
    """

    name: str
    text: str
    questions: tuple[Question, ...] = ()


def read_squad(path: str, articles: bool = False) -> Iterator[Document]:
    """SQuAD's JSON: data / paragraphs / qas. Each paragraph is a document, or each article.

    Raises:
      UserError: not such a file; the message names the place.
    """
    file = pathlib.Path(path).expanduser()
    where = path
    try:
        for index, article in enumerate(json.loads(file.read_text(encoding='utf-8-sig'))['data']):
            title, paragraphs = article.get('title', index), article['paragraphs']
            texts = {f'{title}/{i}': [paragraph] for i, paragraph in enumerate(paragraphs)}
            for name, text in ({str(title): paragraphs} if articles else texts).items():
                where = f'{path}, {name}'
                asked = [qa for part in text for qa in part['qas'] if qa['answers']]
                entry = {
                    'context': '\n\n'.join(part['context'] for part in text),
                    'questions': [qa['question'] for qa in asked],
                    'answers': [[answer['text'] for answer in qa['answers']] for qa in asked],
                }
                yield _from_entry(entry, where, name)
    except OSError as error:
        raise UserError(f'{path}: cannot read it ({error.strerror})') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not UTF-8 (bad byte at offset {error.start})') from error
    except json.JSONDecodeError as error:
        raise UserError(f'{path}:{error.lineno}: not valid JSON ({error.msg})') from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{where}: not in the layout of SQuAD ({error!r})') from error


def read_jsonl(path: str) -> Iterator[Document]:
    """A JSON object per line.

    Keys: `context` (or `text`, `document`); `questions` (or `prompts`), a list of texts, or
    `question` (or `input`), one; beside them `answers` (or `responses`), a list for each question,
    of one text or several; `id` (else the line's number). So do LongBench, ROPES and the raw files
    of Doc-to-LoRA.

    Raises:
      UserError: a line that is not such an object, by number.
    """
    file = pathlib.Path(path).expanduser()
    try:
        lines = file.read_text(encoding='utf-8-sig').split('\n')  # texts may hold other line ends
    except OSError as error:
        raise UserError(f'{path}: cannot read it ({error.strerror})') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not UTF-8 (bad byte at offset {error.start})') from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f'{path}:{number}: not valid JSON ({error.msg})') from error
        yield _from_entry(entry, f'{path}:{number}', str(number))


def read_parquet(path: str) -> Iterator[Document]:
    """Parquet with the columns of `read_jsonl`, as Doc-to-LoRA's raw data: context, prompts,
    responses. `path` may be a pattern such as folder/*level_1*.parquet.

    Raises:
      UserError: no such file, or other columns.
    """
    import pyarrow.parquet  # of the extra `documents`

    pattern = pathlib.Path(path).expanduser()
    files = sorted(pattern.parent.glob(pattern.name))
    if not files:
        raise UserError(f'{path}: no such parquet file')
    for file in files:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f'{file}: not a readable parquet file ({error})') from error
        row = 0
        for batch in table.iter_batches():
            for entry in batch.to_pylist():
                yield _from_entry(entry, f'{file}, row {row}', f'{file.stem}/{row}')
                row += 1


def read_text(path: str, characters: int = 1500) -> Iterator[Document]:
    """Text files (a file, or all of a folder whose endings `d2l.files` knows) as passages of about
    `characters`: whole paragraphs or, where one is longer, lines and sentences; without questions.

    Raises:
      UserError: nothing there to read.
    """
    root = pathlib.Path(path).expanduser()
    found = (
        [root]
        if root.is_file()
        else sorted(p for p in root.rglob('*') if p.suffix.lower() in files.SUFFIXES)
    )
    if not found:
        raise UserError(f'{path}: no text file ({", ".join(files.SUFFIXES)}) there')
    for file in found:
        text = files.read(file)
        for number, passage in enumerate(_passages(text, characters)):
            yield Document(f'{file.relative_to(root.parent)}/{number}', passage)


def read_tfds(name: str, split: str = 'train', data_dir: str | None = None) -> Iterator[Document]:
    """A TFDS data set of contexts, questions and answers: squad, drop, or the folder of one that
    `tfds_builder.write_documents` wrote.

    Raises:
      UserError: not there, or not of that kind.
    """
    # TFDS shuffles: questions about one context are anywhere.
    questions: dict[tuple[str, str], list[Question]] = {}
    for record in readers.tfds_source(name, split, data_dir):
        try:
            text = (record['context'] if 'context' in record else record['passage']).decode()
            answers = record['answers']['text'] if 'answers' in record else [record['answer']]
            question = Question(
                record['question'].decode(), tuple(dict.fromkeys(a.decode() for a in answers))
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f'TFDS {name!r} has no contexts with questions ({error})') from error
        own = questions.setdefault((record.get('name', b'').decode(), text), [])
        if question.text or question.answers:
            own.append(question)
    for number, ((title, text), asked) in enumerate(questions.items()):
        yield Document(title or f'{name}/{number}', text, tuple(asked))


def read_facts(
    count: int, seed: int = 0, facts: int | Sequence[int] = (1, 8), split: str = 'train'
) -> Iterator[Document]:
    """See `d2l.facts.read_facts`."""
    from d2l.facts import read_facts  # of the extra `documents`

    return read_facts(count, seed, facts, split)


def read_words(count: int, seed: int = 0) -> Iterator[Document]:
    """Single words (those of `haystacks.words`), each to be said without being asked. What is
    learned first, and takes longest, is to carry over any word at all.
    """
    words = haystacks.words()
    rng = random.Random(seed)
    for number in range(count):
        word = rng.choice(words)
        text = f'{rng.choice(_LABELS)} {word}'
        yield Document(f'words/{seed}/{number}', text, (Question('', (word,)),))


def read_names(
    path: str, asked: bool = True, digits: int = 50, seed: int = 0
) -> Iterator[Document]:
    """The names in an emoji.json (see `d2l.pictures`), and those of digits, as texts that stand for
    pictures: the name as it is, and four times its words in any order, some repeated; half of them
    with an end of line, as a captioner ends a name. The last of the five is answered by some name
    of the same group, so that things of a kind are likelier than others also when a picture is
    taken for its like. Each digit is its own group. No picture is opened.

    Args:
      asked: by `pictures.QUESTION`; otherwise the name is to be said without a question.
      digits: texts of each digit; with 800 they are half of all texts.

    Raises:
      UserError: not such a folder.
    """
    rng = random.Random(seed)
    question = QUESTION if asked else ''
    groups = {entry['name']: entry.get('subcategory', '') for entry in pictures.entries(path)}
    count = 5
    groups |= {name: name for name in pictures.DIGITS}
    alike: dict[str, list[str]] = {}
    for name, group in groups.items():
        alike.setdefault(group, []).append(name)
    for name, group in groups.items():
        words = name.split()
        for number in range(digits if name in pictures.DIGITS else count):
            chosen = list(words)
            if number % count:
                length = rng.randint(max(2, len(words)), max(4, len(words)))
                chosen += rng.choices(words, k=length - len(words))
                rng.shuffle(chosen)
            end = rng.choice(('', '\n'))
            text = f'{PREFIX} {" ".join(chosen)}{end}'
            answer = rng.choice(alike[group]) if number % count == count - 1 else name
            yield Document(f'{name}/{number}', text, (Question(question, (answer,)),))


READERS: dict[str, Callable[..., Iterable[Document]]] = {
    'squad': read_squad,
    'articles': functools.partial(read_squad, articles=True),
    'jsonl': read_jsonl,
    'parquet': read_parquet,
    'text': read_text,
    'tfds': read_tfds,
    'facts': read_facts,
    'names': read_names,
    'words': read_words,
}


# What follows the reader's name where it is no path; all but the first may be left out.
_FORMS = {'facts': 'COUNT,SPLIT,FACTS', 'words': 'COUNT', 'tfds': 'NAME,SPLIT'}


def source(text: str, held_out: bool = False) -> dict[str, Any]:
    """What `READER,PATH` names, as a source of `read`. A path alone is read by its ending (.json is
    SQuAD's layout); what has none is the name of a TFDS data set, of which `tfds,NAME,SPLIT` names
    a split. Made-up documents are named as `facts,COUNT`, `facts,COUNT,SPLIT` or, with so many
    facts each, `facts,COUNT,SPLIT,FACTS`.

    Args:
      held_out: where no split is named, it is TFDS's `validation` and the made-up documents'
        `phrasings`, rather than `train`.

    Raises:
      UserError: neither, or more than that.
    """
    reader, comma, path = text.partition(',')
    if reader in READERS and not path and (comma or reader in _FORMS):
        raise UserError(
            f'name the documents as {reader},{_FORMS.get(reader, "PATH")}, not {text!r}'
        )
    if not path:
        endings = {'.json': 'squad', '.jsonl': 'jsonl', '.parquet': 'parquet', '': 'tfds'}
        endings |= dict.fromkeys(files.SUFFIXES, 'text')
        reader, path = endings.get(pathlib.Path(text).suffix, ''), text
    if not reader or not path:
        raise UserError(f'name the documents as READER,PATH ({", ".join(READERS)}), not {text!r}')
    if reader in _FORMS:
        form = _FORMS[reader].split(',')
        given = path.split(',')
        fields = dict(zip(form, given + [''] * len(form), strict=False))
        numbers = fields.get('COUNT', '1'), fields.get('FACTS') or '1'
        if len(given) > len(form) or not all(number.isdecimal() for number in numbers):
            raise UserError(f'name the documents as {reader},{_FORMS[reader]}, not {text!r}')
        if reader == 'tfds':
            split = fields['SPLIT'] or ('validation' if held_out else 'train')
            return {'reader': reader, 'name': fields['NAME'], 'split': split}
        source = {'reader': reader, 'count': int(fields['COUNT']), 'seed': 0}
        if reader == 'words':
            return source
        span = (int(fields['FACTS']),) * 2 if fields['FACTS'] else (1, 8)
        split = fields['SPLIT'] or ('phrasings' if held_out else 'train')
        return {**source, 'facts': span, 'split': split}
    if reader == 'names':
        return {'reader': reader, 'path': path, 'asked': True, 'digits': 50, 'seed': 0}
    return {'reader': reader, 'path': path}


def read(sources: Iterable[dict[str, Any]]) -> list[Document]:
    """The documents of sources {reader, and its arguments}, in order.

    Raises:
      UserError: unknown reader or argument, unreadable files, two documents of one name, an empty
        document, or no document at all.
    """
    found: dict[str, Document] = {}
    for source in sources:
        for document in readers.read(READERS, source, 'documents'):
            if document.name in found:
                raise UserError(f'two documents are named {document.name!r}')
            if not document.text.strip():
                raise UserError(f'document {document.name!r} is empty')
            found[document.name] = document
    if not found:
        raise UserError('the sources hold no document')
    return list(found.values())


def _first(entry: dict[str, Any], *keys: str) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _from_entry(entry: Any, where: str, name: str) -> Document:
    if not isinstance(entry, dict):
        raise UserError(f'{where}: not a JSON object')
    text = _first(entry, 'context', 'text', 'document')
    questions = _first(entry, 'questions', 'prompts')
    one = _first(entry, 'question', 'input')
    answers = _first(entry, 'answers', 'responses')
    if questions is None:
        questions = [] if one is None else [one]
        answers = None if answers is None else [answers]
    if not isinstance(text, str):
        raise UserError(f'{where}: no text under context, text or document')
    if not _texts(questions):
        raise UserError(f'{where}: questions must be a list of texts')
    answers = [[]] * len(questions) if answers is None else answers
    if not isinstance(answers, list):
        raise UserError(f'{where}: answers must be a list, of one for each question')
    if len(answers) != len(questions):
        raise UserError(f'{where}: {len(questions)} questions, but {len(answers)} answers')
    answers = [[answer] if isinstance(answer, str) else answer for answer in answers]
    if not all(map(_texts, answers)):
        raise UserError(f'{where}: the answers to a question must be a text or a list of texts')
    pairs = zip(questions, map(dict.fromkeys, answers), strict=True)  # each answer once
    return Document(
        str(entry.get('id', name)), text, tuple(Question(q, tuple(a)) for q, a in pairs)
    )


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _passages(text: str, characters: int) -> Iterator[str]:
    parts = []
    for paragraph in _PARAGRAPH.findall(text):
        parts += [paragraph] if len(paragraph) <= characters else _SENTENCE.findall(paragraph)
    passage = ''
    for part in parts:
        if passage and len(passage) + len(part) > characters:
            yield passage.strip()
            passage = ''
        passage = (passage + part).lstrip()
    if passage:
        yield passage.strip()
