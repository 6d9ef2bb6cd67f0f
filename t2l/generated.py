"""Text tasks made by code: families of tasks that share their inputs and differ in what is done.

Tasks of one domain get exactly the same inputs, split in the same way, so that nothing but the
description tells them apart. Facts come from babel (names in languages), pycountry (codes),
inflect (English) and num2words (numbers in words); another version of these may know other facts.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence

import babel
import babel.dates
import babel.numbers
import inflect
import numpy as np
import pycountry
from num2words import num2words

from hyperlora.errors import UserError
from t2l.tasks import Example, Task, own_descriptions, parse

_ENGLISH = inflect.engine()
_WORDS: dict[str, list[str]] = {
    kind: text.split()
    for kind, text in parse(pathlib.Path(__file__).with_name('words.yaml')).items()
}
# Kind -> its gloss, and words.
FURTHER_KINDS: dict[str, dict[str, str]] = parse(pathlib.Path(__file__).with_name('kinds.yaml'))
_PAST = dict(entry.split(':') for entry in _WORDS['verb'] if ':' in entry)
_WORDS['verb'] = [entry.split(':')[0] for entry in _WORDS['verb']]
_KIND = {word: kind for kind, words in _WORDS.items() for word in words}
_NOUNS = ('animal', 'fruit', 'vehicle', 'garment', 'job', 'object')
_VOWELS = 'aeiou'

# Transitive verbs of sentences: third person -> (base, past, participle, -ing).
_ACTIONS = {
    third: (base, past, participle, ing)
    for base, third, past, participle, ing in (
        line.split()
        for line in """
        blame blames blamed blamed blaming
        call calls called called calling
        catch catches caught caught catching
        chase chases chased chased chasing
        draw draws drew drawn drawing
        feed feeds fed fed feeding
        find finds found found finding
        follow follows followed followed following
        forget forgets forgot forgotten forgetting
        greet greets greeted greeted greeting
        hear hears heard heard hearing
        help helps helped helped helping
        hug hugs hugged hugged hugging
        lead leads led led leading
        like likes liked liked liking
        miss misses missed missed missing
        paint paints painted painted painting
        pull pulls pulled pulled pulling
        push pushes pushed pushed pushing
        save saves saved saved saving
        see sees saw seen seeing
        stop stops stopped stopped stopping
        teach teaches taught taught teaching
        touch touches touched touched touching
        trust trusts trusted trusted trusting
        visit visits visited visited visiting
        wake wakes woke woken waking
        warn warns warned warned warning
        watch watches watched watched watching
        """.strip().splitlines()
    )
}

# ---------------------------------------------------------------------------------- inputs

Inputs = tuple[str, ...] | Callable[[np.random.Generator], str]  # all, or what draws one


def pick(rng: np.random.Generator, options: Sequence[str], count: int) -> list[str]:
    return [options[i] for i in rng.choice(len(options), count, replace=False)]


def _words(*kinds: str) -> list[str]:
    return [word for kind in kinds for word in _WORDS[kind]]


def _phrase(rng: np.random.Generator) -> str:
    """Three to five words; one is the longest, one the shortest."""
    while True:
        words = pick(rng, _words(*_NOUNS, 'adjective'), int(rng.integers(3, 6)))
        lengths = [len(word) for word in words]
        if lengths.count(max(lengths)) == lengths.count(min(lengths)) == 1:
            return ' '.join(words)


def _repetition(rng: np.random.Generator) -> str:
    """Four words of which one stands twice."""
    words = pick(rng, _words('animal', 'fruit', 'object'), 3)
    return ', '.join(rng.permutation([*words, words[0]]))


def _mixture(rng: np.random.Generator) -> str:
    """One animal, fruit, vehicle, garment and job, in random order."""
    kinds = ('animal', 'fruit', 'vehicle', 'garment', 'job')
    return ', '.join(rng.permutation([pick(rng, _WORDS[kind], 1)[0] for kind in kinds]))


def _medley(rng: np.random.Generator) -> str:
    """One body part, object, adjective, given name, month and number word, in random order."""
    kinds = ('body part', 'object', 'adjective', 'given name', 'month', 'number word')
    return ', '.join(rng.permutation([pick(rng, members(kind), 1)[0] for kind in kinds]))


def list_of(count: int) -> Callable[[np.random.Generator], str]:
    words = _words(*_NOUNS, 'body', 'adjective', 'verb')
    return lambda rng: ', '.join(pick(rng, words, count))


def among(kind: str, other: str, count: int) -> Callable[[np.random.Generator], str]:
    """One word of a kind among words of another: `count` in all."""

    def draw(rng: np.random.Generator) -> str:
        words = pick(rng, members(kind), 1) + pick(rng, members(other), count - 1)
        return ', '.join(rng.permutation(words))

    return draw


def _sentence(rng: np.random.Generator) -> str:
    subject, other = pick(rng, _words('animal', 'job'), 2)
    return f'The {subject} {pick(rng, list(_ACTIONS), 1)[0]} the {other}.'


def _full_name(rng: np.random.Generator) -> str:
    return f'{pick(rng, _WORDS["given_name"], 1)[0]} {pick(rng, _WORDS["surname"], 1)[0]}'


def _path(rng: np.random.Generator) -> str:
    top = pick(rng, ('home', 'data', 'shared', 'srv', 'media', 'work'), 1)[0]
    folder = pick(rng, [name.lower() for name in _WORDS['given_name']], 1)[0]
    stem = pick(rng, _words('fruit', 'object', 'vehicle'), 1)[0]
    ending = pick(rng, ('txt', 'pdf', 'png', 'csv', 'zip', 'mp3', 'doc', 'html'), 1)[0]
    return f'/{top}/{folder}/{stem}.{ending}'


def _number_list(rng: np.random.Generator) -> str:
    """Three to five distinct numbers below 100, both even and odd ones among them."""
    while True:
        numbers = rng.choice(100, int(rng.integers(3, 6)), replace=False)
        if len(set(numbers % 2)) == 2:
            return ', '.join(map(str, numbers))


def _iso_date(rng: np.random.Generator) -> str:
    year, month, day = rng.integers((1950, 1, 1), (2050, 13, 29))
    return f'{year}-{month:02}-{day:02}'


_DAYS = babel.dates.get_day_names(locale='en')
_MONTHS = babel.dates.get_month_names(locale='en')


def _calendar_day(rng: np.random.Generator) -> str:
    day = rng.integers(1, 29)
    return f'{_DAYS[int(rng.integers(7))]}, {day} {_MONTHS[int(rng.integers(1, 13))]}'


def _progression(rng: np.random.Generator) -> str:
    first, step = int(rng.integers(100)), int(rng.integers(1, 13))
    return ', '.join(str(first + i * step) for i in range(4))


def _countries() -> dict[str, str]:
    """Countries of one currency with a short name on which pycountry and CLDR agree -> ISO code of
    two letters."""
    territories = babel.Locale('en').territories
    return {
        c.name: c.alpha_2
        for c in pycountry.countries
        if territories.get(c.alpha_2) == c.name
        and len(c.name) <= 18
        and len(babel.numbers.get_territory_currencies(c.alpha_2)) == 1
    }


def _languages() -> dict[str, str]:
    """Names of languages on which pycountry and CLDR agree -> ISO code of two letters."""
    names = babel.Locale('en').languages
    translated = [babel.Locale(code).languages for code in ('fr', 'de', 'es')]
    return {
        language.name: language.alpha_2
        for language in pycountry.languages
        if names.get(getattr(language, 'alpha_2', '')) == language.name
        and all(language.alpha_2 in table for table in translated)
    }


def _currencies() -> dict[str, str]:
    """English names of the currencies in use -> ISO code."""
    used = {
        code
        for country in pycountry.countries
        for code in babel.numbers.get_territory_currencies(country.alpha_2)
    }
    return {babel.numbers.get_currency_name(code, locale='en'): code for code in sorted(used)}


_COUNTRIES, _LANGUAGES, _CURRENCIES = _countries(), _languages(), _currencies()

# Kind to find, kind of the other words, number of words. None of these kinds to find is a vehicle,
# a color or a verb: finding those is what some held-out tasks are about.
_AMONG: dict[str, tuple[str, str, int]] = {
    f'{kind}_among_{others}_{count}'.replace(' ', '_'): (kind, other, count)
    for kind, other, others, count in (
        ('animal', 'color', 'colors', 3),
        ('animal', 'verb', 'verbs', 3),
        ('animal', 'adjective', 'adjectives', 5),
        ('animal', 'vehicle', 'vehicles', 5),
        ('fruit', 'object', 'objects', 3),
        ('fruit', 'vehicle', 'vehicles', 5),
        ('garment', 'animal', 'animals', 3),
        ('garment', 'job', 'jobs', 5),
        ('job', 'animal', 'animals', 3),
        ('job', 'verb', 'verbs', 5),
        ('body part', 'animal', 'animals', 3),
        ('body part', 'fruit', 'fruits', 5),
        ('object', 'animal', 'animals', 3),
        ('object', 'adjective', 'adjectives', 5),
        ('adjective', 'animal', 'animals', 3),
        ('adjective', 'animal', 'animals', 5),
        ('adjective', 'object', 'objects', 3),
        ('given name', 'country', 'countries', 3),
        ('country', 'language', 'languages', 3),
        ('country', 'animal', 'animals', 5),
        ('language', 'country', 'countries', 5),
        ('month', 'weekday', 'weekdays', 3),
        ('weekday', 'month', 'months', 5),
        ('number word', 'animal', 'animals', 3),
        ('number word', 'adjective', 'adjectives', 5),
        ('adverb', 'adjective', 'adjectives', 3),
        ('comparative', 'adjective', 'adjectives', 3),
    )
}

# A domain is a list of all inputs, or a function that draws one.
DOMAINS: dict[str, Inputs] = {
    'word': tuple(_words(*_NOUNS, 'body', 'adjective', 'verb')),
    'thing': tuple(_words(*_NOUNS, 'body')),
    'noun': tuple(word for word in _words(*_NOUNS) if word != 'scissors'),
    'verb': tuple(_WORDS['verb']),
    'adjective': tuple(_WORDS['adjective']),
    'counted_noun': lambda rng: f'{rng.integers(1, 13)} x {pick(rng, DOMAINS["noun"], 1)[0]}',
    'phrase': _phrase,
    'repetition': _repetition,
    'mixture': _mixture,
    'medley': _medley,
    'list_of_3': list_of(3),
    'list_of_4': list_of(4),
    'list_of_5': list_of(5),
    **{name: among(*kinds) for name, kinds in _AMONG.items()},
    'sentence': _sentence,
    'full_name': _full_name,
    'path': _path,
    'number_list': _number_list,
    'pair': lambda rng: '{} and {}'.format(*rng.choice(np.arange(1, 51), 2, replace=False)),
    'progression': _progression,
    'integer': lambda rng: str(rng.integers(10, 1000)),
    'small_integer': tuple(str(i) for i in range(1, 201)),
    'iso_date': _iso_date,
    'calendar_day': _calendar_day,
    'clock': tuple(f'{hour:02}:{minute:02}' for hour in range(24) for minute in range(60)),
    'country': tuple(_COUNTRIES),
    'language': tuple(_LANGUAGES),
    'currency': tuple(_CURRENCIES),
}

# ---------------------------------------------------------------------------------- answers


def _item(index: int, separator: str | None = None) -> Callable[[str], str]:
    return lambda text: text.split(separator)[index]


def _items(choose: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    """Some items of a comma-separated list."""
    return lambda text: ', '.join(choose(text.split(', ')))


def _pig_latin(word: str) -> str:
    """Leading consonants move to the end before 'ay'; 'way' after a leading vowel."""
    head, tail = re.fullmatch('([^aeiou]*)(.*)', word).groups()
    return f'{tail}{head}ay' if head else f'{word}way'


def _third_person(verb: str) -> str:
    if re.search('(s|x|z|ch|sh|o)$', verb):
        return verb + 'es'
    return re.sub('([^aeiou])y$', r'\1ie', verb) + 's'


def _past(verb: str) -> str:
    if verb in _PAST:
        return _PAST[verb]
    return re.sub('([^aeiou])y$', r'\1i', verb).removesuffix('e') + 'ed'


def _compare(adjective: str, ending: str) -> str:
    """The comparative ('er') or superlative ('est')."""
    if adjective.endswith('e'):
        return adjective + ending[1:]
    if adjective.endswith('y'):
        return f'{adjective[:-1]}i{ending}'
    # A single vowel before a single last consonant in a word of one syllable doubles it.
    doubled = re.fullmatch('[^aeiou]+[aeiou]([bdgmnt])', adjective)
    return adjective + (doubled[1] if doubled else '') + ending


def _adverb(adjective: str) -> str:
    if adjective.endswith('le'):
        return adjective[:-1] + 'y'
    return f'{adjective[:-1]}ily' if adjective.endswith('y') else f'{adjective}ly'


def rewrite(form: str) -> Callable[[str], str]:
    """Another sentence of 'The SUBJECT VERBs the OTHER.', by its parts."""

    def answer(sentence: str) -> str:
        _, subject, verb, _, other = sentence.rstrip('.').split()
        base, past, participle, ing = _ACTIONS[verb]
        return form.format(
            subject=subject,
            other=other,
            verb=verb,
            base=base,
            past=past,
            participle=participle,
            ing=ing,
            subjects=_ENGLISH.plural(subject),
        )

    return answer


@functools.cache
def members(kind: str) -> list[str]:
    """Words of a kind; those that could be taken for another kind are left out.

    Raises:
      KeyError: no such kind.
    """
    adjectives = [word for word in _WORDS['adjective'] if word != 'green']
    if kind in ('country', 'language'):
        names = {'country': _COUNTRIES, 'language': _LANGUAGES}[kind]
        other = {'Chad', 'Georgia', 'Jordan', 'Nauru'}  # also given names; also a language
        return [name for name in names if name.isalpha() and len(name) < 11 and name not in other]
    return {
        'color': 'red blue green yellow purple black white brown gray pink silver golden'.split(),
        'month': list(_MONTHS.values()),
        'weekday': list(_DAYS.values()),
        'number word': [num2words(number) for number in range(1, 21)],
        'adjective': adjectives,
        'adverb': [_adverb(word) for word in adjectives if not word.endswith('ly')],
        'comparative': [_compare(word, 'er') for word in adjectives],
        'verb': [word for word in _WORDS['verb'] if word not in ('fly', 'cook')],
        'body part': _WORDS['body'],
        'given name': _WORDS['given_name'],
    }.get(kind) or (_WORDS.get(kind) or FURTHER_KINDS[kind]['words'].split())


def of_kind(kind: str) -> Callable[[str], str]:
    return lambda text: next(word for word in text.split(', ') if word in members(kind))


def position_of(kind: str) -> Callable[[str], str]:
    """Where in the list the word of a kind stands, from 1."""
    return lambda text: str(1 + text.split(', ').index(of_kind(kind)(text)))


def without(kind: str) -> Callable[[str], str]:
    return _items(lambda words: [word for word in words if word not in members(kind)])


def _numbers(
    choose: Callable[[list[int]], int | list[int]],
) -> Callable[[str], str]:
    """An answer about a comma-separated list of numbers."""

    def answer(text: str) -> str:
        chosen = choose([int(number) for number in text.split(', ')])
        return ', '.join(map(str, chosen)) if isinstance(chosen, list) else str(chosen)

    return answer


def _pair(choose: Callable[[int, int], object]) -> Callable[[str], str]:
    return lambda text: str(choose(*map(int, text.split(' and '))))


def _in_words(language: str) -> Callable[[str], str]:
    return lambda text: num2words(int(text), lang=language)


def _in_italian(text: str) -> str:
    """Compounds of three bear an accent, which num2words leaves out above 120."""
    return re.sub('(?<=.)tre$', 'tré', num2words(int(text), lang='it'))


def _roman(text: str) -> str:
    number, numeral = int(text), ''
    values = (100, 90, 50, 40, 10, 9, 5, 4, 1)
    for value, letters in zip(values, 'C XC L XL X IX V IV I'.split(), strict=True):
        numeral += letters * (number // value)
        number %= value
    return numeral


def _date(form: str) -> Callable[[str], str]:
    """An ISO date by its parts."""

    def answer(text: str) -> str:
        year, month, day = map(int, text.split('-'))
        return form.format(year=year, month=month, day=day, name=_MONTHS[month])

    return answer


def _iso_month(language: str) -> Callable[[str], str]:
    names = babel.dates.get_month_names('wide', 'stand-alone', language)
    return lambda text: names[int(text.split('-')[1])]


def weekday(shift: int = 0, language: str = 'en') -> Callable[[str], str]:
    """The weekday of a calendar day, some days later, in a language."""
    index = {name: i for i, name in _DAYS.items()}
    names = babel.dates.get_day_names('wide', 'stand-alone', language)
    return lambda text: names[(index[text.split(',')[0]] + shift) % 7]


def month(shift: int = 0, language: str = 'en') -> Callable[[str], str]:
    """The month of a calendar day, some months later, in a language."""
    index = {name: i for i, name in _MONTHS.items()}
    names = babel.dates.get_month_names('wide', 'stand-alone', language)
    return lambda text: names[(index[text.split()[-1]] + shift - 1) % 12 + 1]


def clock(form: str, shift: int = 0) -> Callable[[str], str]:
    """A time of 24 hours by its parts, some minutes later."""

    def answer(text: str) -> str:
        hour, minute = map(int, text.split(':'))
        hour, minute = divmod((60 * hour + minute + shift) % (24 * 60), 60)
        half = 'AM' if hour < 12 else 'PM'
        return form.format(hour=hour, minute=minute, twelve=(hour - 1) % 12 + 1, half=half)

    return answer


def _part_of_day(text: str) -> str:
    hour = int(text[:2])
    return ('night', 'morning', 'afternoon', 'evening')[hour // 6]


def country(language: str) -> Callable[[str], str]:
    return lambda text: babel.Locale(language).territories[_COUNTRIES[text]]


def _language(language: str) -> Callable[[str], str]:
    return lambda text: babel.Locale(language).languages[_LANGUAGES[text]]


def _ends_swapped(parts: list[str]) -> list[str]:
    return [parts[-1], *parts[1:-1], parts[0]]


def _counted(text: str, in_words: bool) -> str:
    count, noun = text.split(' x ')
    number = num2words(int(count)) if in_words else count
    return f'{number} {_ENGLISH.plural(noun, count)}'


def _repeated(text: str) -> str:
    words = text.split(', ')
    return next(word for word in words if words.count(word) == 2)


# family -> domain -> task -> the answer to an input.
_TABLE: dict[str, dict[str, dict[str, Callable[[str], str]]]] = {
    'letters': {
        'word': {
            'uppercase': str.upper,
            'capitalize_word': str.capitalize,
            'first_letter': lambda word: word[0],
            'last_letter': lambda word: word[-1],
            'first_three_letters': lambda word: word[:3],
            'drop_first_letter': lambda word: word[1:],
            'drop_last_letter': lambda word: word[:-1],
            'count_letters': lambda word: str(len(word)),
            'count_vowels': lambda word: str(sum(letter in _VOWELS for letter in word)),
            'remove_vowels': lambda word: ''.join(x for x in word if x not in _VOWELS),
            'reverse_letters': lambda word: word[::-1],
            'spell_with_hyphens': '-'.join,
            'pig_latin': _pig_latin,
            'second_letter': lambda word: word[1],
            'third_letter': lambda word: word[2],
            'capital_third_letter': lambda word: word[2].upper(),
            'capital_first_two_letters': lambda word: word[:2].upper(),
            'capital_last_two_letters': lambda word: word[-2:].upper(),
            'last_two_letters': lambda word: word[-2:],
            'drop_first_two_letters': lambda word: word[2:],
            'drop_last_two_letters': lambda word: word[:-2],
            'drop_second_letter': lambda word: word[0] + word[2:],
            'drop_first_and_last_letter': lambda word: word[1:-1],
            'double_last_letter': lambda word: word + word[-1],
            'swap_first_two_letters': lambda word: word[1] + word[0] + word[2:],
            'star_for_vowels': lambda word: re.sub(f'[{_VOWELS}]', '*', word),
            'hyphen_after_first_letter': lambda word: f'{word[0]}-{word[1:]}',
            'count_consonants': lambda word: str(sum(letter not in _VOWELS for letter in word)),
            'repeat_word': lambda word: f'{word} {word}',
        },
    },
    'words': {
        'phrase': {
            'first_word': _item(0),
            'second_word': _item(1),
            'last_word': _item(-1),
            'longest_word': lambda text: max(text.split(), key=len),
            'shortest_word': lambda text: min(text.split(), key=len),
            'count_words': lambda text: str(len(text.split())),
            'reverse_words': lambda text: ' '.join(text.split()[::-1]),
            'sort_words': lambda text: ' '.join(sorted(text.split())),
            'drop_first_word': lambda text: text.split(' ', 1)[1],
            'swap_first_and_last_word': lambda text: ' '.join(_ends_swapped(text.split())),
            'acronym': lambda text: ''.join(word[0].upper() for word in text.split()),
            'snake_case': lambda text: text.replace(' ', '_'),
            'drop_last_word': lambda text: text.rsplit(' ', 1)[0],
            'first_and_last_word': lambda text: ' '.join(text.split()[:: len(text.split()) - 1]),
            'second_to_last_word': _item(-2),
            'length_of_longest_word': lambda text: str(max(map(len, text.split()))),
            'title_case': str.title,
        },
        'list_of_3': {
            'alphabetically_second_of_3': _items(lambda words: sorted(words)[1:2]),
            'first_and_last_of_3': _items(lambda words: words[::2]),
            'reverse_list_of_3': _items(lambda words: words[::-1]),
        },
        'list_of_4': {
            'choose_second_of_4': _item(1, ', '),
            'choose_third_of_4': _item(2, ', '),
            'alphabetically_first_of_4': _items(lambda words: [min(words)]),
        },
        'list_of_5': {
            'choose_second_of_5': _item(1, ', '),
            'choose_fourth_of_5': _item(3, ', '),
            'choose_last_of_5': _item(4, ', '),
            'first_and_last_of_5': _items(lambda words: words[::4]),
        },
        'repetition': {
            'repeated_word': _repeated,
            'remove_repetition': lambda text: ', '.join(dict.fromkeys(text.split(', '))),
        },
    },
    'meaning': {
        'mixture': {
            'pick_animal': of_kind('animal'),
            'pick_fruit': of_kind('fruit'),
            'pick_vehicle': of_kind('vehicle'),
            'pick_garment': of_kind('garment'),
            'pick_job': of_kind('job'),
            'position_of_animal': position_of('animal'),
            'position_of_fruit': position_of('fruit'),
            'pick_animal_and_job': lambda text: (
                f'{of_kind("animal")(text)} and {of_kind("job")(text)}'
            ),
            'mixture_without_animal': without('animal'),
        },
        'medley': {
            'pick_body_part': of_kind('body part'),
            'pick_object': of_kind('object'),
            'pick_adjective': of_kind('adjective'),
            'pick_given_name': of_kind('given name'),
            'pick_month': of_kind('month'),
            'pick_number_word': of_kind('number word'),
        },
        **{name: {name: of_kind(kind)} for name, (kind, *_) in _AMONG.items()},
        'thing': {
            'is_animal': lambda word: 'yes' if _KIND[word] == 'animal' else 'no',
            'kind_of_thing': lambda word: 'body part' if _KIND[word] == 'body' else _KIND[word],
        },
    },
    'inflection': {
        'noun': {
            'plural': _ENGLISH.plural,
            'with_article': _ENGLISH.a,
        },
        'counted_noun': {
            'count_with_noun': functools.partial(_counted, in_words=False),
            'count_in_words_with_noun': functools.partial(_counted, in_words=True),
        },
        'verb': {
            'past_tense': _past,
            'ing_form': _ENGLISH.present_participle,
            'third_person': _third_person,
            'progressive_of_verb': lambda verb: f'is {_ENGLISH.present_participle(verb)}',
        },
        'adjective': {
            'comparative': functools.partial(_compare, ending='er'),
            'superlative': functools.partial(_compare, ending='est'),
            'adverb': _adverb,
            'comparative_with_than': lambda word: f'{_compare(word, "er")} than',
            'as_adjective_as': 'as {} as'.format,
            'less_adjective': 'less {}'.format,
        },
    },
    'sentences': {
        'sentence': {
            'sentence_subject': rewrite('{subject}'),
            'sentence_object': rewrite('{other}'),
            'sentence_to_past': rewrite('The {subject} {past} the {other}.'),
            'sentence_to_future': rewrite('The {subject} will {base} the {other}.'),
            'sentence_to_negation': rewrite('The {subject} does not {base} the {other}.'),
            'sentence_to_question': rewrite('Does the {subject} {base} the {other}?'),
            'sentence_to_passive': rewrite('The {other} is {participle} by the {subject}.'),
            'swap_subject_and_object': rewrite('The {other} {verb} the {subject}.'),
            'sentence_verb': rewrite('{verb}'),
            'sentence_verb_in_past': rewrite('{past}'),
            'sentence_to_perfect': rewrite('The {subject} has {participle} the {other}.'),
            'sentence_to_past_perfect': rewrite('The {subject} had {participle} the {other}.'),
            'sentence_to_progressive': rewrite('The {subject} is {ing} the {other}.'),
            'sentence_to_past_passive': rewrite('The {other} was {participle} by the {subject}.'),
            'sentence_with_must': rewrite('The {subject} must {base} the {other}.'),
            'sentence_with_can': rewrite('The {subject} can {base} the {other}.'),
            'sentence_with_wants_to': rewrite('The {subject} wants to {base} the {other}.'),
            'sentence_to_past_negation': rewrite('The {subject} did not {base} the {other}.'),
            'sentence_to_past_question': rewrite('Did the {subject} {base} the {other}?'),
            'sentence_to_who_question': rewrite('Who {verb} the {other}?'),
            'sentence_with_plural_subject': rewrite('The {subjects} {base} the {other}.'),
        },
    },
    'names': {
        'full_name': {
            'given_name': _item(0),
            'surname': _item(1),
            'initials': lambda text: '.'.join(name[0] for name in text.split()) + '.',
            'surname_first': lambda text: '{1}, {0}'.format(*text.split()),
            'email_address': lambda text: text.lower().replace(' ', '.') + '@example.com',
            'user_name': lambda text: text[0].lower() + text.split()[1].lower(),
            'surname_initial': lambda text: text.split()[1][0],
            'abbreviated_given_name': lambda text: f'{text[0]}. {text.split()[1]}',
            'abbreviated_surname': lambda text: '{} {[0]}.'.format(*text.split()),
            'letter_greeting': lambda text: f'Dear {text.split()[0]},',
            'lowercase_name': str.lower,
        },
        'path': {
            'file_extension': _item(-1, '.'),
            'file_stem': lambda text: text.split('/')[-1].split('.')[0],
            'containing_folder': _item(-2, '/'),
            'top_folder': _item(1, '/'),
            'file_name': _item(-1, '/'),
        },
    },
    'numbers': {
        'number_list': {
            'largest_number': _numbers(max),
            'smallest_number': _numbers(min),
            'first_number': _numbers(lambda numbers: numbers[0]),
            'sort_ascending': _numbers(sorted),
            'sort_descending': _numbers(lambda numbers: sorted(numbers, reverse=True)),
            'even_numbers': _numbers(lambda numbers: [n for n in numbers if n % 2 == 0]),
            'odd_numbers': _numbers(lambda numbers: [n for n in numbers if n % 2]),
            'second_number': _numbers(lambda numbers: numbers[1]),
            'last_number': _numbers(lambda numbers: numbers[-1]),
            'second_largest_number': _numbers(lambda numbers: sorted(numbers)[-2]),
            'second_smallest_number': _numbers(lambda numbers: sorted(numbers)[1]),
            'first_odd_number': _numbers(lambda numbers: next(n for n in numbers if n % 2)),
            'range_of_numbers': _numbers(lambda numbers: max(numbers) - min(numbers)),
            'count_even_numbers': _numbers(lambda numbers: sum(n % 2 == 0 for n in numbers)),
            'reverse_numbers': _numbers(lambda numbers: numbers[::-1]),
            'increment_each': _numbers(lambda numbers: [n + 1 for n in numbers]),
            'double_each': _numbers(lambda numbers: [2 * n for n in numbers]),
        },
        'pair': {
            'sum_of_pair': _pair(lambda a, b: a + b),
            'difference_of_pair': _pair(lambda a, b: abs(a - b)),
            'larger_of_pair': _pair(max),
            'comparison_sign': _pair(lambda a, b: '<' if a < b else '>'),
        },
        'progression': {
            'next_term': _numbers(lambda numbers: 2 * numbers[-1] - numbers[-2]),
            'step_of_progression': _numbers(lambda numbers: numbers[1] - numbers[0]),
        },
        'integer': {
            'successor': lambda text: str(int(text) + 1),
            'predecessor': lambda text: str(int(text) - 1),
            'last_digit': lambda text: text[-1],
            'first_digit': lambda text: text[0],
            'ordinal_suffix': _ENGLISH.ordinal,
        },
        'small_integer': {
            'roman_numeral': _roman,
            'number_in_french': _in_words('fr'),
            'number_in_german': _in_words('de'),
            'number_in_spanish': _in_words('es'),
            'number_in_english': _in_words('en'),
            'number_in_italian': _in_italian,
            'number_in_dutch': _in_words('nl'),
            'number_in_portuguese': _in_words('pt'),
            'number_in_swedish': _in_words('sv'),
            'ordinal_in_words': lambda text: num2words(int(text), to='ordinal'),
        },
    },
    'dates': {
        'iso_date': {
            'year_of_date': _date('{year}'),
            'day_of_date': _date('{day}'),
            'month_of_date': _date('{name}'),
            'american_date': _date('{month:02}/{day:02}/{year}'),
            'date_in_english': _date('{name} {day}, {year}'),
            'month_of_date_in_french': _iso_month('fr'),
            'month_of_date_in_german': _iso_month('de'),
            'month_of_date_in_italian': _iso_month('it'),
            'month_number': _date('{month}'),
            'ordinal_day_of_date': lambda text: _ENGLISH.ordinal(int(text[-2:])),
        },
        'calendar_day': {
            'next_weekday': weekday(1),
            'previous_weekday': weekday(-1),
            'weekday_in_french': weekday(language='fr'),
            'weekday_in_german': weekday(language='de'),
            'is_weekend': lambda text: 'yes' if text.startswith('S') else 'no',
            'next_month': month(1),
            'previous_month': month(-1),
            'weekday_of_day': weekday(),
            'month_of_day': month(),
            'two_weekdays_later': weekday(2),
            'two_months_later': month(2),
            'two_months_earlier': month(-2),
            'three_months_later': month(3),
            'weekday_in_italian': weekday(language='it'),
            'weekday_in_spanish': weekday(language='es'),
            'weekday_in_dutch': weekday(language='nl'),
            'weekday_in_swedish': weekday(language='sv'),
        },
        'clock': {
            'twelve_hour_clock': clock('{twelve}:{minute:02} {half}'),
            'hour_of_time': clock('{hour}'),
            'minutes_of_time': clock('{minute:02}'),
            'am_or_pm': clock('{half}'),
            'one_hour_later': clock('{hour:02}:{minute:02}', 60),
            'part_of_day': _part_of_day,
            'two_hours_later': clock('{hour:02}:{minute:02}', 120),
            'one_hour_earlier': clock('{hour:02}:{minute:02}', -60),
            'half_an_hour_later': clock('{hour:02}:{minute:02}', 30),
            'hour_on_twelve_hour_clock': clock('{twelve}'),
            'minutes_to_next_hour': lambda text: str(60 - int(text[3:])),
        },
    },
    'world': {
        'country': {
            'country_code': lambda text: _COUNTRIES[text],
            'currency_code_of_country': lambda text: babel.numbers.get_territory_currencies(
                _COUNTRIES[text]
            )[0],
            'country_in_french': country('fr'),
            'country_in_german': country('de'),
            'country_in_spanish': country('es'),
            'country_in_italian': country('it'),
        },
        'language': {
            'language_code': lambda text: _LANGUAGES[text],
            'language_in_french': _language('fr'),
            'language_in_german': _language('de'),
            'language_in_italian': _language('it'),
        },
        'currency': {
            'currency_code': lambda text: _CURRENCIES[text],
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a generated task is made: the answer to each input of a domain."""

    family: str
    domain: str
    answer: Callable[[str], str]


RECIPES = {
    name: Recipe(family, domain, answer)
    for family, domains in _TABLE.items()
    for domain, answers in domains.items()
    for name, answer in answers.items()
}

# ---------------------------------------------------------------------------------- tasks


def _draws(domain: str, inputs: Inputs, seed: int) -> Iterator[str]:
    """Distinct inputs of a domain; the i-th depends on (seed, i) alone."""
    rng = np.random.default_rng((seed, zlib.crc32(domain.encode())))
    if not callable(inputs):
        yield from pick(rng, inputs, len(inputs))
        return
    seen = set()
    while True:
        text = inputs(rng)
        if text not in seen:
            seen.add(text)
            yield text


@functools.lru_cache(maxsize=256)
def split(
    domain: str, inputs: Inputs, seed: int, train: int, test: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs (train, test). The test inputs come first, so that they do not depend on `train`."""
    if not callable(inputs):
        test = min(test, len(inputs) // 5)
        train = min(train, len(inputs) - test)
    draws = _draws(domain, inputs, seed)
    drawn = [next(draws) for _ in range(test + train)]
    return tuple(drawn[test:]), tuple(drawn[:test])


def generate(name: str, seed: int = 0, train: int = 500, test: int = 100) -> Task:
    """A task of at most `train` and `test` examples: fewer where its domain is small, of which a
    fifth is for testing.

    Raises:
      UserError: no such task.
    """
    if name not in RECIPES:
        raise UserError(f'unknown generated task {name!r}; known: {", ".join(RECIPES)}')
    recipe = RECIPES[name]
    descriptions, test_descriptions = own_descriptions(name)
    return Task(
        name,
        'generated',
        'Apache-2.0',
        descriptions,
        test_descriptions,
        *(
            tuple(Example(text, (recipe.answer(text),)) for text in inputs)
            for inputs in split(recipe.domain, DOMAINS[recipe.domain], seed, train, test)
        ),
    )
