"""Made-up documents: facts about people, places and things that do not exist, a question for each.

What there is to tell is in facts.yaml. Names of people and some towns come from faker: another
version of it may make other documents.
"""

from __future__ import annotations

import calendar
import dataclasses
import functools
import math
import pathlib
import random
import re
from collections.abc import Callable, Iterator, Sequence

import yaml
from faker.factory import Factory
from num2words import num2words

from d2l.documents import Document, Question
from hyperlora.errors import UserError

SPLITS = ('train', 'phrasings', 'attributes')
_LOCALES = (
    *('en_GB', 'en_US', 'en_IE', 'en_IN', 'da_DK', 'de_DE', 'es_ES', 'et_EE', 'fi_FI', 'fr_FR'),
    *('hr_HR', 'hu_HU', 'id_ID', 'it_IT', 'nl_NL', 'no_NO', 'pl_PL', 'pt_BR', 'ro_RO', 'sl_SI'),
    *('sv_SE', 'sw', 'tr_TR', 'yo_NG', 'zu_ZA'),
)
# Not it_IT, whose towns are a set: every process would draw others.
_TOWNS = ('da_DK', 'de_DE', 'fi_FI', 'hr_HR', 'pl_PL', 'ro_RO', 'sl_SI')
_ROMAN = ('II', 'III', 'IV', 'VI', 'VII', 'VIII', 'IX', 'XI', 'XII')  # V, X: see facts.yaml
_NAMES = re.compile(r'\b[^\W\da-z_]\w{2,}')  # words with capitals
_LONG = 450  # characters of a document that gets no more remarks
_PRONOUNS = {'he': 'his', 'she': 'her', 'it': 'its'}

# ---------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class Phrasings:
    """Sentences about X and V; see facts.yaml."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Something that can be told of entities of a kind.

    Attributes:
      values: a generator with its arguments, or word lists.
      train, test: phrasings; a held-out attribute has only the latter.
    """

    name: str
    values: tuple[str, ...]
    train: Phrasings
    test: Phrasings

    def phrasings(self, split: str) -> Phrasings:
        return self.train if split == 'train' else self.test


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of entity.

    Attributes:
      names: patterns; none for people.
      nouns: what an entity may be called; none where that is the last word of its name.
      apposition: how noun and name go together.
      attributes, held_out: those for training, and those for testing only.
    """

    names: tuple[str, ...]
    nouns: tuple[str, ...]
    apposition: str
    fillers: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    held_out: tuple[Attribute, ...]

    def of_split(self, split: str) -> tuple[Attribute, ...]:
        return self.held_out if split == 'attributes' else self.attributes


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(', ')) if text else ()


def _sentences(text: str) -> list[str]:
    """Sentences, `~` before those kept for testing; statements without a full stop.

    They start small unless that is X, V or a day, so that they can be put after other words.
    """
    found = re.findall(r'[^.?]+[.?]', text)
    return [
        re.sub(r'^((?:~ )?)((?!X\b|V\b|\w+day)[A-Z])', _small, s.strip().rstrip('.')) for s in found
    ]


def _small(match: re.Match) -> str:
    return match[1] + match[2].lower()


def _phrasings(sentences: Sequence[str]) -> Phrasings:
    return Phrasings(
        tuple(s for s in sentences if not s.endswith('?')),
        tuple(s for s in sentences if s.endswith('?')),
    )


def _attribute(head: str, text: str) -> Attribute:
    name, _, values = head.removeprefix('~ ').partition(' = ')
    sentences = _sentences(text)
    held_out = [s.removeprefix('~ ') for s in sentences if s.startswith('~ ')]
    rest = [s for s in sentences if not s.startswith('~ ')]
    if head.startswith('~ '):
        held_out, rest = rest, []
    return Attribute(name, tuple(values.split()), _phrasings(rest), _phrasings(held_out))


def _kind(entry: dict) -> Kind:
    facts = entry['facts']
    return Kind(
        _listed(entry.get('names', '')),
        _listed(entry.get('nouns', '')),
        entry.get('apposition', 'the N X'),
        tuple(_sentences(entry.get('fillers', ''))),
        tuple(_attribute(k, text) for k, text in facts.items() if not k.startswith('~ ')),
        tuple(_attribute(k, text) for k, text in facts.items() if k.startswith('~ ')),
    )


_TABLES = yaml.load(
    pathlib.Path(__file__).with_name('facts.yaml').read_text(encoding='utf-8'),
    getattr(yaml, 'CSafeLoader', yaml.SafeLoader),
)
WORDS = {name: _listed(text) for name, text in _TABLES['words'].items()}
KINDS = {name: _kind(entry) for name, entry in _TABLES['kinds'].items()}
_FILLERS, _INTRODUCTIONS = (_sentences(_TABLES[key]) for key in ('fillers', 'introductions'))
_OPENERS = [
    f'{words} ' if words.endswith('that') else f'{words}, ' for words in _listed(_TABLES['openers'])
]

# ---------------------------------------------------------------------------------- values


@functools.cache
def _faker(locale: str):
    return Factory.create(locale)


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


@dataclasses.dataclass(frozen=True)
class Value:
    """A value as it is written, other ways to write it, and the generator that made it."""

    text: str
    others: tuple[str, ...] = ()
    source: str = ''


class _Inventor:
    """Values of one document: no two share a capitalised word, none occurs twice.

    Methods that are named in facts.yaml draw the ways to write a value.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self._used: set[str] = set()

    def unused(self, draw: Callable[[], list[str]], common: str = '') -> list[str]:
        """
        Args:
          common: words that may be shared.
        """
        while True:
            ways = draw()
            text = ways[0].casefold()
            names = {word.casefold() for word in _NAMES.findall(ways[0])}
            again = not {*text.split()} - self._used or text in self._used
            if not again and not (names - {*common.casefold().split()}) & self._used:
                self._used |= names | {text}
                return ways

    def value(self, attribute: Attribute, capital: bool) -> Value:
        """
        Args:
          capital: it must not start with a small letter.
        """
        source, *arguments = attribute.values
        if source in WORDS:
            ways = self.unused(lambda: [' '.join(map(self.word, attribute.values))])
        else:
            ways = self.unused(lambda: getattr(self, source)(*arguments))
        if capital:
            ways = sorted(ways, key=lambda way: way[0].islower())
        return Value(ways[0], tuple(w for w in dict.fromkeys(ways[1:]) if w != ways[0]), source)

    def name(self, pattern: str, noun: str) -> str:
        def part(match):
            key = match[1]
            word = self.word(key) if key in WORDS else getattr(self, key)()[0]
            return ' '.join(map(_upper, word.split()))

        pattern = re.sub(r'\bN\b', ' '.join(map(_upper, noun.split())), pattern)
        common = re.sub(r'{\w+}', '', pattern)
        return self.unused(lambda: [re.sub(r'{(\w+)}', part, pattern)], common)[0]

    def word(self, key: str) -> str:
        return self.rng.choice(WORDS[key])

    def _shuffled(self, *ways: str) -> list[str]:
        """The ways, one of the first two in front."""
        return list(ways) if self.rng.random() < 0.5 else [ways[1], ways[0], *ways[2:]]

    def _local(self, locales: Sequence[str], *methods: str) -> list[str]:
        """One-word names of one locale."""
        faker = _faker(self.rng.choice(locales))
        faker.random = self.rng
        while True:
            names = [getattr(faker, method)() for method in methods]
            if all(re.fullmatch(r'\w{3,10}', name) and name[0].isupper() for name in names):
                return names

    def person(self, gender: str = '') -> list[str]:
        gender = gender or self.rng.choice(('male', 'female'))
        locales = _LOCALES[:4] if self.rng.random() < 0.4 else _LOCALES
        return [' '.join(self._local(locales, f'first_name_{gender}', f'last_name_{gender}'))]

    def surname(self) -> list[str]:
        return self._local(_LOCALES, 'last_name_male')

    def place(self) -> list[str]:
        return [self.word('beginning') + self.word('end')]

    def river(self) -> list[str]:
        (name,) = self.place()
        return [name, f'River {name}']

    def town(self) -> list[str]:
        return self.place() if self.rng.random() < 0.6 else self._local(_TOWNS, 'city')

    def company(self) -> list[str]:
        pattern = self.rng.choice(KINDS['company'].names)
        draw = {'surname': self.surname, 'place': self.place}
        return [
            re.sub(
                r'{(\w+)}', lambda m: draw[m[1]]()[0] if m[1] in draw else self.word(m[1]), pattern
            )
        ]

    def address(self) -> list[str]:
        return [f'{self.rng.randint(2, 180)} {self.word("street")} {self.word("road")}']

    def roman(self) -> list[str]:
        return [self.rng.choice(_ROMAN)]

    def count(self, low: str, high: str) -> list[str]:
        number = self._number(int(low), int(high))
        if number < 100:
            return self._shuffled(str(number), num2words(number))
        return self._shuffled(f'{number:,}', str(number)) if number > 999 else [str(number)]

    def _number(self, low: int, high: int) -> int:
        """Of all magnitudes alike; large ones are often round."""
        number = round(math.exp(self.rng.uniform(math.log(low), math.log(high))))
        if number > 999 and self.rng.random() < 0.5:
            number = round(number, 2 - len(str(number)))
        return min(max(number, low), high)

    def measure(self, low: str, high: str, unit: str, symbol: str) -> list[str]:
        number = self.rng.randint(int(low), int(high))
        unit = unit.replace('~', ' ')
        return self._shuffled(f'{number} {unit}', f'{number} {symbol}', f'{number}')

    def money(self, low: str, high: str) -> list[str]:
        number = self._number(int(low), int(high))
        sign, name = self.rng.choice((('$', 'dollars'), ('£', 'pounds'), ('€', 'euros')))
        return self._shuffled(
            f'{sign}{number:,}', f'{number:,} {name}', f'{sign}{number}', f'{number} {name}'
        )

    def year(self, low: str, high: str) -> list[str]:
        return [str(self.rng.randint(int(low), int(high)))]

    def day(self) -> list[str]:
        day, month = self.rng.randint(1, 28), calendar.month_name[self.rng.randint(1, 12)]
        return self._shuffled(f'{day} {month}', f'{month} {day}')

    def date(self, low: str, high: str) -> list[str]:
        day, month = self.rng.randint(1, 28), calendar.month_name[self.rng.randint(1, 12)]
        (year,) = self.year(low, high)
        return self._shuffled(f'{day} {month} {year}', f'{month} {day}, {year}')

    def time(self, low: str, high: str) -> list[str]:
        hour, minute = self.rng.randint(int(low), int(high)), 5 * self.rng.randint(0, 11)
        twelve = f'{(hour - 1) % 12 + 1}:{minute:02}'
        half = 'am' if hour < 12 else 'pm'
        return self._shuffled(f'{hour}:{minute:02}', f'{twelve} {half}', f'{twelve} {half[0]}.m.')


# ------------------------------------------------------------------------------------- texts


@dataclasses.dataclass(frozen=True)
class Entity:
    """Attributes:
    short: names that stand for it in its document, once its noun is known.
    noun: empty for people.
    noun_in_name: the name tells what it is.
    """

    kind: Kind
    name: str
    short: tuple[str, ...]
    noun: str
    pronoun: str

    @property
    def noun_in_name(self) -> bool:
        return not self.noun or self.name.casefold().endswith(self.noun)


def _entity(invent: _Inventor, kind: Kind) -> Entity:
    rng = invent.rng
    if not kind.names:
        gender = rng.choice(('male', 'female'))
        (name,) = invent.unused(lambda: invent.person(gender))
        return Entity(kind, name, tuple(name.split()), '', 'he' if gender == 'male' else 'she')
    noun = rng.choice(kind.nouns) if kind.nouns else ''
    name = invent.name(rng.choice(kind.names), noun)
    noun = noun or name.split()[-1].casefold()
    pronoun = rng.choice(('he', 'she')) if kind is KINDS['animal'] else 'it'
    return Entity(kind, name, (f'the {noun.split()[-1]}',), noun, pronoun)


@dataclasses.dataclass(frozen=True)
class _Fact:
    entity: Entity
    statement: str
    question: str
    value: Value


def _fill(template: str, letter: str, text: str) -> str:
    """The template with the text in place of a letter, and with the right article before it."""
    vowel = re.match(r'[aeiou8]|hour|honest', text.casefold()) and not re.match(
        r'uk|un[ia]|eu|one', text.casefold()
    )
    article = r'\1n' if vowel else r'\1'
    template = re.sub(rf'\b([Aa])(?= "?{letter}\b)', article, template)
    return re.sub(rf'\b{letter}\b', lambda _: text, template)


def _named(template: str, name: str) -> str:
    """The template with the name in place of X."""
    if name.endswith('s'):
        template = template.replace("X's", "X'")
    return re.sub(r'\bX\b', lambda _: name, template)


class _Writer:
    """Writes sentences one after the other; knows what a reader knows by then."""

    def __init__(self, rng: random.Random, entities: Sequence[Entity]):
        self.rng = rng
        short = [entity.short for entity in entities]
        self._lone = {entity.name for entity in entities if short.count(entity.short) == 1}
        self._said: set[str] = set()  # remarks
        self._introduced: set[str] = set()
        self._called: set[str] = set()  # whose nouns are known
        self._topic: Entity | None = None  # whom a pronoun would mean

    def tell(self, facts: Sequence[_Fact]) -> str:
        """A sentence of one fact or of two about the same entity."""
        first = facts[0]
        if len(facts) == 1:
            opened = self.rng.random() < 0.12
            text = self._about(first.entity, first.statement, plain=opened)
            text = self.rng.choice(_OPENERS) + text if opened else text
        else:
            text = self._joined(*facts)
        last = facts[-1]
        shadowed = last.value.source in ('person', 'town', 'company', 'river')
        at_start = all(fact.statement.startswith('X') for fact in facts)
        self._topic = first.entity if at_start and not shadowed else None
        return self._sentence(text, [fact.value for fact in facts])

    def _joined(self, first: _Fact, second: _Fact) -> str:
        one, two = first.statement, second.statement.replace('V', 'W')
        simple = [s.startswith('X ') and s.count('X') == 1 and ',' not in s for s in (one, two)]
        if all(simple) and ' and ' not in one and self.rng.random() < 0.7:
            if self.rng.random() < 0.35:
                name = self._about(first.entity, 'X', plain=True)
                who = 'which' if first.entity.pronoun == 'it' else 'who'
                return f'{name}, {who}{one[1:]},{two[1:]}'
            return f'{self._about(first.entity, one)} and{two[1:]}'
        one = self._about(first.entity, one)
        self._topic = None if first.value.source == 'person' else first.entity
        two = self._about(first.entity, two, plain=None)
        return f'{one}{self.rng.choice((", and ", ", and ", ", while ", "; "))}{two}'

    def remark(self, entity: Entity, introduce: bool) -> str:
        """A sentence without a fact."""
        if introduce:
            text = _fill(self.rng.choice(_INTRODUCTIONS), 'N', entity.noun)
            self._called.add(entity.name)
            self._introduced.add(entity.name)
            text = _named(text, entity.name)
        else:
            new = {*entity.kind.fillers, *_FILLERS} - self._said
            text = self.rng.choice(sorted(new))
            self._said.add(text)
            text = self._about(entity, text)
        self._topic = entity
        return self._sentence(text, ())

    def introduced(self, entity: Entity) -> bool:
        return entity.name in self._introduced

    def _about(self, entity: Entity, template: str, plain: bool | None = False) -> str:
        """The template with a name for X.

        Args:
          plain: no pronoun (true), or a pronoun wherever one can be (none).
        """
        own = self._topic is entity and not plain
        if own and re.match(r'X\b', template) and (plain is None or self.rng.random() < 0.6):
            possessive = template.startswith("X's")
            word = _PRONOUNS[entity.pronoun] if possessive else entity.pronoun
            template = word + template[3 if possessive else 1 :]
        elif own and "X's" in template:
            template = template.replace("X's", _PRONOUNS[entity.pronoun], 1)
        name = self._name(entity, "X's" in template) if 'X' in template else ''
        return _named(template, name)

    def _name(self, entity: Entity, possessive: bool) -> str:
        known = entity.name in self._called or entity.noun_in_name
        if entity.name in self._introduced:
            if known and entity.name in self._lone and self.rng.random() < 0.65:
                return self.rng.choice(entity.short)
            return entity.name
        self._introduced.add(entity.name)
        if known or possessive or self.rng.random() < 0.4:
            return entity.name
        self._called.add(entity.name)
        text = entity.kind.apposition.replace('N', entity.noun)
        return text.replace('X', entity.name.removeprefix('the '))

    def _sentence(self, text: str, values: Sequence[Value]) -> str:
        for letter, value in zip('VW', values, strict=False):
            text = _fill(text, letter, value.text)
        return _upper(text) + '.'


def _share(rng: random.Random, kinds: Sequence[Kind], split: str, count: int) -> list[int]:
    """How many facts each entity gets: at least one, at most what there is to tell."""
    most = [len(kind.of_split(split)) for kind in kinds]
    shares = [1] * len(kinds)
    while sum(shares) < count:
        shares[rng.choice([i for i, m in enumerate(most) if shares[i] < m])] += 1
    return shares


def _document(seed: int, index: int, low: int, high: int, split: str) -> Document:
    rng = random.Random(f'{split}/{seed}/{index}')
    invent = _Inventor(rng)
    count = rng.randint(low, high)
    wanted = min(rng.choice((1, 1, 1, 2, 2, 3)), count)
    kinds: list[Kind] = []
    while len(kinds) < wanted or sum(len(k.of_split(split)) for k in kinds) < count:
        again = kinds and rng.random() < 0.15  # another one of a kind that is there
        kinds.append(kinds[-1] if again else rng.choice(list(KINDS.values())))
    entities = [_entity(invent, kind) for kind in kinds]
    facts = []
    for entity, share in zip(entities, _share(rng, kinds, split, count), strict=True):
        for attribute in rng.sample(entity.kind.of_split(split), share):
            phrasings = attribute.phrasings(split)
            statement = rng.choice(phrasings.statements)
            question = rng.choice(phrasings.questions)
            value = invent.value(attribute, capital=statement.startswith('V'))
            facts.append(_Fact(entity, statement, question, value))
    mixed = rng.random() < 0.4  # else one entity after the other
    if mixed:
        rng.shuffle(facts)
    text = _text(_Writer(rng, entities), facts, 0 if mixed else rng.choice((0, 0.6)))
    rng.shuffle(facts)
    questions = (
        Question(
            _upper(_named(fact.question, fact.entity.name)),
            (fact.value.text, *fact.value.others),
        )
        for fact in facts
    )
    return Document(f'facts/{seed}/{index}', text, tuple(questions))


def _text(writer: _Writer, facts: Sequence[_Fact], breaks: float) -> str:
    """
    Args:
      breaks: the odds that another entity begins a paragraph.
    """
    rng, text, before = writer.rng, '', None
    joined, remarks = rng.choice((0, 0.3, 0.6)), rng.choice((0, 0.15, 0.35))
    left = list(facts)
    while left:
        entity = left[0].entity
        several = len(left) > 1 and left[1].entity is entity and rng.random() < joined
        now, left = left[: 1 + several], left[1 + several :]
        if before is not None:
            text += '\n\n' if before is not entity and rng.random() < breaks else ' '
        if not writer.introduced(entity) and not entity.noun_in_name and rng.random() < 0.2:
            text += writer.remark(entity, introduce=True) + ' '
        text += writer.tell(now)
        if rng.random() < remarks and len(text) < _LONG:
            text += ' ' + writer.remark(entity, introduce=False)
        before = entity
    return text


def read_facts(
    count: int, seed: int = 0, facts: int | Sequence[int] = (1, 8), split: str = 'train'
) -> Iterator[Document]:
    """Documents facts/SEED/0, facts/SEED/1, ...; each follows from (seed, its number) alone.

    A document tells facts about one to three entities (more where `split` has little to tell about
    one). Every fact has a question; the first of its answers is as in the text, the others are
    other ways to write it.

    Args:
      facts: how many facts a document has, or at least and at most how many.
      split: `train`; `phrasings`, the same attributes in sentences and questions that `train` never
        has; `attributes`, attributes that `train` never has.

    Raises:
      UserError: bad arguments.
    """
    numbers = tuple(facts) if isinstance(facts, (tuple, list)) else (facts,)
    numbers = numbers * 2 if len(numbers) == 1 else numbers
    whole = len(numbers) == 2 and all(isinstance(number, int) for number in numbers)
    if not whole or not 1 <= numbers[0] <= numbers[1] <= 20:
        raise UserError(f'facts: a number from 1 to 20, or the least and the most, not {facts!r}')
    if split not in SPLITS:
        raise UserError(f'unknown split {split!r} of facts; known: {", ".join(SPLITS)}')
    if count < 1:
        raise UserError(f'count: a positive number of documents, not {count}')
    return (_document(seed, index, *numbers, split) for index in range(count))
