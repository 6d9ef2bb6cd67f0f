"""Hundreds of text tasks by rules: each rule makes a task of every value of its parameter.

They widen what a hypernetwork is trained on. A description is a template of `parametric.yaml` with
the parameter in it, so a task is known by that parameter alone: descriptions cannot be learned by
heart, they must be read. What `configs/t2l.py` holds out is no rule's value.
"""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import babel
import babel.dates
import inflect
import numpy as np
from num2words import num2words

from hyperlora.errors import UserError
from t2l import generated
from t2l.generated import Inputs
from t2l.tasks import Example, Task, parse

TEMPLATES: dict[str, dict[str, list[str]]] = parse(
    pathlib.Path(__file__).with_name('parametric.yaml')
)
_ENGLISH = inflect.engine()

# Positions from the start and from the end, counted as Python does.
_NTH = {'first': 0, 'second': 1, 'third': 2, 'fourth': 3, 'fifth': 4, 'sixth': 5}
_NTH |= {'third to last': -3, 'second to last': -2, 'last': -1}
_COUNTS = {3: 'three', 4: 'four', 5: 'five', 6: 'six', 7: 'seven'}

# Kinds of words that are not told apart: members of one could be taken for members of another.
_ALIKE = tuple(
    frozenset(kinds.split(', '))
    for kinds in (
        'object, tool, furniture, instrument, weapon, building, landform, room, shape',
        'job, ruler, relative, creature, given name',
        'meal, dessert, fruit, vegetable, spice',
        'pronoun, preposition, conjunction',
        'spice, vegetable, flower, tree, fruit',
        'sport, dance',
        'metal, planet, gem',
        'city, country, language, continent or ocean, planet',
        'verb, dance, emotion, sport, weather',
        'adjective, gem, fruit, flower',
        'fabric, garment',
    )
)
# Finding these is what held-out tasks are about.
NEVER_SOUGHT = ('vehicle', 'verb')


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a task is made.

    Attributes:
      rule: of `parametric.yaml`.
      slots: what stands in the templates.
      domain: names the inputs; tasks of one domain share them.
      inputs: all inputs, or a function that draws one.
      answer: to an input.
    """

    rule: str
    slots: Mapping[str, object]
    domain: str
    inputs: Inputs
    answer: Callable[[str], str]


# ---------------------------------------------------------------------------------- inputs

_ANY = generated.DOMAINS['thing']


# Kind -> what it is, in a few words.
GLOSSES = {kind: entry['gloss'] for kind, entry in generated.FURTHER_KINDS.items()} | {
    'animal': 'a living being that is no plant',
    'fruit': 'something juicy from a tree or bush',
    'garment': 'something to wear',
    'job': 'what somebody does for a living',
    'body part': 'a piece of a human being',
    'object': 'a thing that people have at home',
    'vehicle': 'a means of transport',
    'verb': 'a word for what is done',
    'adjective': 'a word for what something is like',
    'given name': 'what parents call a child',
    'country': 'a nation on the map',
    'language': 'something people speak',
    'month': 'a twelfth of the year',
    'weekday': 'a seventh of a week',
    'number word': 'a word that is used in counting',
}


def _told_apart(kind: str, other: str) -> bool:
    return kind != other and not any({kind, other} <= alike for alike in _ALIKE)


def _phrase(rng: np.random.Generator) -> str:
    """Five or six words."""
    return ' '.join(generated.pick(rng, _ANY, int(rng.integers(5, 7))))


def _mixed(kind: str) -> Callable[[np.random.Generator], str]:
    """A word of a kind among two to four words of as many other kinds."""
    others = [other for other in GLOSSES if _told_apart(kind, other)]

    def draw(rng: np.random.Generator) -> str:
        chosen: list[str] = [kind]
        for other in rng.permutation(others):
            if all(_told_apart(str(other), known) for known in chosen):
                chosen.append(str(other))
        words = [
            generated.pick(rng, generated.members(k), 1)[0] for k in chosen[: rng.integers(3, 6)]
        ]
        return ', '.join(rng.permutation(words))

    return draw


def _of_kind_or_not(kind: str) -> tuple[str, ...]:
    """Members of a kind, and as many other words."""
    rng = np.random.default_rng(0)
    others = [word for k in GLOSSES if _told_apart(kind, k) for word in generated.members(k)]
    members = generated.members(kind)
    return (*members, *generated.pick(rng, others, len(members)))


def _with_letter(letter: str, index: int) -> Callable[[np.random.Generator], str]:
    """Four words, of which one has the letter at a place."""
    fitting = [word for word in _ANY if word[index] == letter]
    others = [word for word in _ANY if word[index] != letter]

    def draw(rng: np.random.Generator) -> str:
        words = generated.pick(rng, fitting, 1) + generated.pick(rng, others, 3)
        return ', '.join(rng.permutation(words))

    return draw


# ---------------------------------------------------------------------------------- answers


def _letters(change: Callable[[str], str], index: int) -> Callable[[str], str]:
    """The word with one letter changed."""

    def answer(word: str) -> str:
        place = index % len(word)
        return word[:place] + change(word[place]) + word[place + 1 :]

    return answer


def _parts(
    change: Callable[[list[str], int], list[str]], index: int, separator: str
) -> Callable[[str], str]:
    """Some or all parts of a text, of which one, at an index, is treated apart."""

    def answer(text: str) -> str:
        parts = text.split(separator)
        return separator.join(change(parts, index % len(parts)))

    return answer


def _give(parts: list[str], i: int) -> list[str]:
    return [parts[i]]


def _drop(parts: list[str], i: int) -> list[str]:
    return parts[:i] + parts[i + 1 :]


def _upper(parts: list[str], i: int) -> list[str]:
    return [*parts[:i], parts[i].upper(), *parts[i + 1 :]]


def _initial(parts: list[str], i: int) -> list[str]:
    return [parts[i][0]]


def _front(parts: list[str], i: int) -> list[str]:
    return [parts[i], *_drop(parts, i)]


def _is_kind(kind: str) -> Callable[[str], str]:
    return lambda word: 'yes' if word in generated.members(kind) else 'no'


def _with_time(time: str) -> Callable[[str], str]:
    return lambda text: f'{text.removesuffix(".")} {time}.'


def _with_adverb(adverb: str) -> Callable[[str], str]:
    def answer(text: str) -> str:
        words = text.split()
        return ' '.join([*words[:2], adverb, *words[2:]])

    return answer


def _date(pattern: str) -> Callable[[str], str]:
    """An ISO date in the form of a pattern of CLDR."""
    return lambda text: babel.dates.format_date(
        datetime.date.fromisoformat(text), pattern, locale='en'
    )


# ---------------------------------------------------------------------------------- rules

_SIGNS = {
    'a hyphen': '-',
    'an underscore': '_',
    'a slash': '/',
    'a dot': '.',
    'a plus sign': '+',
    'a colon': ':',
    'an arrow': ' -> ',
    'the word and': ' and ',
    'the word or': ' or ',
    'a semicolon': '; ',
    'a vertical bar': ' | ',
    'an ampersand': ' & ',
}
_BRACKETS = {
    'parentheses': '()',
    'square brackets': '[]',
    'angle brackets': '<>',
    'curly braces': '{}',
    'double quotes': '""',
    'single quotes': "''",
    'stars': '**',
    'hyphens': '--',
    'slashes': '//',
    'underscores': '__',
}
_BEFORE = 'my your this every another no old big little the some our many more real'.split()
_AFTER = 'shop lover expert store club day box maker please indeed again today here now too'.split()
_SAID = 'banana river seven London music window blue never tomorrow horse coffee garden'.split()
_SAID += 'winter pilot silver nothing dragon bread'.split()
_MODALS = 'should may could might would shall'.split()
_MODALS += ['needs to', 'likes to', 'tries to', 'hopes to', 'has to', 'refuses to', 'used to']
_ADVERBS = 'always never often rarely sometimes usually secretly gladly still also'.split()
_TIMES = 'today, every day, in the morning, at night, on Monday, in summer, right now, again'
_WHO = 'the king, my sister, nobody, Peter, the robot, everyone, our neighbor, a stranger'
_TITLES = 'Dr. Professor Captain Judge Colonel Sister Senator President Chef Coach'.split()
_HOSTS = 'school.org work.net mail.com uni.edu bank.de news.tv'.split()
_ENDINGS = 'txt pdf png jpg mp3 zip html csv py json'.split()
_UNITS = 'kg km meters liters dollars euros percent degrees minutes hours points pages'.split()
# A pattern as people write it -> CLDR's, and its parts.
_DATES = {
    'DD.MM.YYYY': ('dd.MM.yyyy', 'day, month and year with dots'),
    'DD/MM/YYYY': ('dd/MM/yyyy', 'day, month and year with slashes'),
    'MM-DD-YYYY': ('MM-dd-yyyy', 'month, day and year with hyphens'),
    'YYYY/MM/DD': ('yyyy/MM/dd', 'year, month and day with slashes'),
    'YYYYMMDD': ('yyyyMMdd', 'year, month and day without anything between'),
    'D Mon YYYY': ('d MMM yyyy', 'the day, the month in three letters and the year'),
    'Mon D': ('MMM d', 'the month in three letters and the day, no year'),
    'MM/YYYY': ('MM/yyyy', 'month and year with a slash'),
    'DD.MM.': ('dd.MM.', 'day and month, a dot after each'),
    'M/D/YY': ('M/d/yy', 'month, day and the last two digits of the year with slashes'),
    'Mon YYYY': ('MMM yyyy', 'the month in three letters and the year'),
    'D-Mon-YY': ('d-MMM-yy', 'day, short month and short year with hyphens'),
}
_LANGUAGES = {
    'French': 'fr',
    'German': 'de',
    'Spanish': 'es',
    'Italian': 'it',
    'Portuguese': 'pt',
    'Dutch': 'nl',
    'Swedish': 'sv',
    'Norwegian': 'no',
    'Danish': 'da',
    'Finnish': 'fi',
    'Polish': 'pl',
    'Czech': 'cs',
    'Romanian': 'ro',
    'Turkish': 'tr',
    'Indonesian': 'id',
    'Hungarian': 'hu',
}


def _rules() -> Iterator[Recipe]:
    yield from _rules_of_letters()
    yield from _rules_of_lists()
    yield from _rules_of_kinds()
    yield from _rules_of_numbers_and_dates()
    yield from _rules_of_sentences_and_names()


def _rules_of_letters() -> Iterator[Recipe]:
    word = 'word', generated.DOMAINS['word']
    for nth, i in _NTH.items():
        if nth in ('fourth', 'fifth', 'sixth'):  # some words are of three letters
            continue
        slots = {'nth': nth}
        yield Recipe('letter_give', slots, *word, lambda text, i=i: text[i])
        if nth != 'second':
            yield Recipe('letter_capital', slots, *word, lambda text, i=i: text[i].upper())
        if nth != 'last':
            yield Recipe('letter_drop', slots, *word, _letters(lambda letter: '', i))
        yield Recipe('letter_double', slots, *word, _letters(lambda letter: 2 * letter, i))
        yield Recipe('letter_star', slots, *word, _letters(lambda letter: '*', i))
    for sign in ('#', '-', '_', 'x', '?', '@'):
        yield Recipe('vowels_by', {'sign': sign}, *word, lambda t, s=sign: re.sub('[aeiou]', s, t))
    for text in _AFTER:
        yield Recipe('append', {'text': text}, *word, lambda word, text=text: f'{word} {text}')
    for text in _BEFORE:
        yield Recipe('prepend', {'text': text}, *word, lambda word, text=text: f'{text} {word}')
    for text in _SAID:
        yield Recipe('always', {'text': text}, *word, lambda word, text=text: text)
    for name, pair in _BRACKETS.items():
        yield Recipe('wrap', {'brackets': name}, *word, lambda t, p=pair: p[0] + t + p[1])
    for ending in _ENDINGS:
        yield Recipe('extension', {'ending': ending}, *word, lambda t, e=ending: f'{t}.{e}')
    for times in (3, 4, 5):
        slots = {'times': _COUNTS[times]}
        yield Recipe('repeat', slots, *word, lambda t, n=times: ' '.join([t] * n))


def _rules_of_lists() -> Iterator[Recipe]:
    phrase = 'long_phrase', _phrase
    for nth in ('third', 'fourth', 'third to last', 'second to last', 'second', 'first', 'last'):
        for rule, change in (
            ('word_give', _give),
            ('word_drop', _drop),
            ('word_upper', _upper),
            ('word_letter', _initial),
        ):
            yield Recipe(rule, {'nth': nth}, *phrase, _parts(change, _NTH[nth], ' '))
    for name, sign in _SIGNS.items():
        yield Recipe('join', {'sign': name}, *phrase, lambda t, s=sign: t.replace(' ', s))
        separated = lambda t, s=sign: t.replace(', ', s)  # noqa: E731
        yield Recipe(
            'separator', {'sign': name}, 'list_of_4', generated.DOMAINS['list_of_4'], separated
        )
    for count in _COUNTS:
        name = f'list_of_{count}'
        domain = name, generated.DOMAINS.get(name) or generated.list_of(count)
        for nth, i in _NTH.items():
            if not -count <= i < count or 2 * (i % count) + 1 == count:  # the middle is held out
                continue
            slots = {'nth': nth, 'count': _COUNTS[count]}
            yield Recipe('item_give', slots, *domain, _parts(_give, i, ', '))
            if count in (4, 5):
                yield Recipe('item_drop', slots, *domain, _parts(_drop, i, ', '))
                yield Recipe('item_upper', slots, *domain, _parts(_upper, i, ', '))
                if i:
                    yield Recipe('item_front', slots, *domain, _parts(_front, i, ', '))
    for rule, index in (('initial_item', 0), ('final_item', -1)):
        for letter in 'abcdefghijklmnopqrstuvwxyz':
            fitting = [word for word in _ANY if word[index] == letter]
            if len(fitting) < 5:
                continue
            domain = f'{rule}_{letter}', _with_letter(letter, index)
            yield Recipe(
                rule,
                {'letter': letter},
                *domain,
                lambda text, letter=letter, index=index: next(
                    word for word in text.split(', ') if word[index] == letter
                ),
            )


def _rules_of_kinds() -> Iterator[Recipe]:
    rng = np.random.default_rng(0)
    for kind, gloss in GLOSSES.items():
        if kind in NEVER_SOUGHT:
            continue
        slots = {'kind': kind, 'a_kind': _ENGLISH.a(kind), 'gloss': gloss}
        mixed = f'mixed_{kind}', _mixed(kind)
        yield Recipe('kind_mixed', slots, *mixed, generated.of_kind(kind))
        yield Recipe('kind_without', slots, *mixed, generated.without(kind))
        yield Recipe('kind_position', slots, *mixed, generated.position_of(kind))
        if kind != 'animal':  # a generated task
            either = f'{kind}_or_not', _of_kind_or_not(kind)
            yield Recipe('is_kind', slots, *either, _is_kind(kind))
        others = [o for o in GLOSSES if _told_apart(kind, o) and len(generated.members(o)) > 6]
        for other, count in zip(generated.pick(rng, others, 2), (3, 5), strict=True):
            more = {
                'other': other,
                'others': _ENGLISH.plural(other),
                'a_other': _ENGLISH.a(other),
            }
            among = f'{kind}_among_{other}_{count}', generated.among(kind, other, count)
            yield Recipe('kind_among', slots | more, *among, generated.of_kind(kind))


def _rules_of_numbers_and_dates() -> Iterator[Recipe]:
    integer = 'integer', generated.DOMAINS['integer']
    numbers = 'number_list', generated.DOMAINS['number_list']
    for k in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 50, 100):
        yield Recipe('add', {'k': k}, *integer, lambda text, k=k: str(int(text) + k))
        if k <= 10:
            yield Recipe('subtract', {'k': k}, *integer, lambda text, k=k: str(int(text) - k))
    for k in (2, 3, 5, 10, 100):
        each = lambda text, k=k: ', '.join(str(int(n) + k) for n in text.split(', '))  # noqa: E731
        yield Recipe('add_each', {'k': k}, *numbers, each)
    for unit in _UNITS:
        yield Recipe('unit_of_number', {'unit': unit}, *integer, lambda t, u=unit: f'{t} {u}')
    small = 'small_integer', generated.DOMAINS['small_integer']
    for language, code in _LANGUAGES.items():
        slots = {'language': language}
        if code not in ('fr', 'it', 'cs'):  # held out; without accents; see generated.py
            yield Recipe('number_in', slots, *small, lambda t, c=code: num2words(int(t), lang=c))
        day = 'calendar_day', generated.DOMAINS['calendar_day']
        locale = 'nb' if code == 'no' else code
        if code != 'de':
            yield Recipe('weekday_in', slots, *day, generated.weekday(language=locale))
        yield Recipe('month_in', slots, *day, generated.month(language=locale))
        country = 'country', generated.DOMAINS['country']
        yield Recipe('country_in', slots, *country, generated.country(locale))
    for k in (-4, -3, -2, 1, 2, 3, 4, 5):
        some = 'one day' if abs(k) == 1 else f'{num2words(abs(k))} days'
        slots = {'shift': f'{some} {"later" if k > 0 else "earlier"}'}
        yield Recipe('weekday_shift', slots, *day, generated.weekday(k))
    for k in (-5, -4, -3, -2, 1, 2, 3, 4, 5, 6):
        some = 'one month' if abs(k) == 1 else f'{num2words(abs(k))} months'
        slots = {'shift': f'{some} {"later" if k > 0 else "earlier"}'}
        yield Recipe('month_shift', slots, *day, generated.month(k))
    clock = 'clock', generated.DOMAINS['clock']
    for minutes in (-180, -120, -30, -15, -10, 5, 10, 15, 20, 45, 90, 180, 240):
        hours, rest = divmod(abs(minutes), 60)
        some = f'{num2words(hours)} hours' if hours and not rest else f'{abs(minutes)} minutes'
        slots = {'shift': f'{some} {"later" if minutes > 0 else "earlier"}'}
        shifted = generated.clock('{hour:02}:{minute:02}', minutes)
        yield Recipe('clock_shift', slots, *clock, shifted)
    iso = 'iso_date', generated.DOMAINS['iso_date']
    for pattern, (form, words) in _DATES.items():
        yield Recipe('date_format', {'pattern': pattern, 'words': words}, *iso, _date(form))


def _rules_of_sentences_and_names() -> Iterator[Recipe]:
    sentence = 'sentence', generated.DOMAINS['sentence']
    for modal in _MODALS:
        form = generated.rewrite(f'The {{subject}} {modal} {{base}} the {{other}}.')
        yield Recipe('verb_with', {'modal': modal}, *sentence, form)
    for adverb in _ADVERBS:
        yield Recipe('adverb_with', {'adverb': adverb}, *sentence, _with_adverb(adverb))
    for time in _TIMES.split(', '):
        yield Recipe('time_with', {'time': time}, *sentence, _with_time(time))
    for who in _WHO.split(', '):
        form = generated.rewrite(f'{who[0].upper()}{who[1:]} {{verb}} the {{other}}.')
        yield Recipe('subject_by', {'text': who}, *sentence, form)
    name = 'full_name', generated.DOMAINS['full_name']
    for title in _TITLES:
        yield Recipe('title', {'title': title}, *name, lambda t, x=title: f'{x} {t.split()[1]}')
    for host in _HOSTS:
        address = lambda t, h=host: f'{t.lower().replace(" ", ".")}@{h}'  # noqa: E731
        yield Recipe('email_at', {'host': host}, *name, address)


# Slots that follow from another one.
_FOLLOWING = ('a_kind', 'gloss', 'others', 'a_other', 'words')


def _name(recipe: Recipe) -> str:
    """The rule and its parameters."""
    values = [str(value) for slot, value in recipe.slots.items() if slot not in _FOLLOWING]
    return '_'.join((recipe.rule, *values)).replace(' ', '_')


RECIPES = {_name(recipe): recipe for recipe in _rules()}


def generate(name: str, seed: int = 0, train: int = 200, test: int = 100) -> Task:
    """A task of at most `train` and `test` examples; see `generated.generate`.

    With the `test` and the seed of the generated tasks, no input that they test is trained on.

    Raises:
      UserError: no such task.
    """
    if name not in RECIPES:
        raise UserError(f'unknown parametric task {name!r}')
    recipe = RECIPES[name]
    described = {
        part: tuple(template.format(**recipe.slots) for template in templates)
        for part, templates in TEMPLATES[recipe.rule].items()
    }
    splits = generated.split(recipe.domain, recipe.inputs, seed, train, test)
    return Task(
        name,
        'parametric',
        'Apache-2.0',
        described['train'],
        described['test'],
        *(tuple(Example(x, (recipe.answer(x),)) for x in inputs) for inputs in splits),
    )
