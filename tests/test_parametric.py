"""Tasks by rules."""

import re

import pytest
from ml_collections import ConfigDict

from configs.t2l import HELD_OUT
from hyperlora.errors import UserError
from t2l import generated, parametric
from t2l.collections import collect

# One worked example of each rule: task | input | output.
ROWS = [
    tuple(line.split(' | '))
    for line in """
    letter_give_third | plough | o
    letter_capital_second_to_last | plough | G
    letter_drop_second | plough | pough
    letter_double_last | plough | ploughh
    letter_star_first | plough | *lough
    vowels_by_# | plough | pl##gh
    append_shop | plough | plough shop
    prepend_my | plough | my plough
    always_river | plough | river
    wrap_square_brackets | plough | [plough]
    extension_pdf | plough | plough.pdf
    repeat_three | plough | plough plough plough
    word_give_third_to_last | a b c d e f | d
    word_drop_second | a b c d e f | a c d e f
    word_upper_last | a b c | a b C
    word_letter_fourth | ant bee cow dog | d
    join_an_arrow | a b c | a -> b -> c
    separator_a_semicolon | a, b, c | a; b; c
    item_give_second_four | a, b, c, d | b
    item_drop_first_five | a, b, c, d, e | b, c, d, e
    item_upper_last_four | a, b, c, d | a, b, c, D
    item_front_third_four | a, b, c, d | c, a, b, d
    initial_item_b | ant, bee, cow | bee
    final_item_t | bee, ant, cow | ant
    kind_mixed_flower | piano, tulip, Rome | tulip
    kind_without_flower | piano, tulip, Rome | piano, Rome
    kind_position_flower | piano, tulip, Rome | 2
    is_kind_flower | tulip | yes
    is_kind_flower | Rome | no
    add_20 | 95 | 115
    subtract_5 | 13 | 8
    add_each_10 | 1, 22 | 11, 32
    unit_of_number_kg | 12 | 12 kg
    number_in_Finnish | 21 | kaksikymmentäyksi
    weekday_in_Polish | Friday, 3 May | piątek
    month_in_Norwegian | Friday, 3 May | mai
    country_in_Danish | Germany | Tyskland
    weekday_shift_three_days_earlier | Monday, 3 May | Friday
    month_shift_two_months_later | Monday, 3 November | January
    clock_shift_15_minutes_later | 23:50 | 00:05
    clock_shift_three_hours_earlier | 02:05 | 23:05
    date_format_D-Mon-YY | 2031-03-04 | 4-Mar-31
    verb_with_used_to | The cat sees the dog. | The cat used to see the dog.
    adverb_with_often | The cat sees the dog. | The cat often sees the dog.
    time_with_at_night | The cat sees the dog. | The cat sees the dog at night.
    subject_by_the_king | The cat sees the dog. | The king sees the dog.
    title_Judge | Anna Ford | Judge Ford
    email_at_news.tv | Anna Ford | anna.ford@news.tv
    """.strip().splitlines()
]
ROWS = [tuple(part.strip() for part in row) for row in ROWS]


@pytest.mark.parametrize('name,text,output', ROWS)
def test_answer(name, text, output):
    assert parametric.RECIPES[name].answer(text) == output


def test_one_kind_among_another():
    name, recipe = next((n, r) for n, r in parametric.RECIPES.items() if r.rule == 'kind_among')
    for example in parametric.generate(name, train=20, test=5).train:
        words = example.input.split(', ')
        assert len(words) in (3, 5) and example.output in words
        others = [*words]
        others.remove(example.output)
        assert example.output in generated.members(recipe.slots['kind'])
        assert {*others} <= {*generated.members(recipe.slots['other'])}


def test_every_rule_has_a_worked_example():
    rules = {parametric.RECIPES[name].rule for name, *_ in ROWS} | {'kind_among'}
    assert rules == {recipe.rule for recipe in parametric.RECIPES.values()}
    assert rules == parametric.TEMPLATES.keys()


@pytest.fixture(scope='module')
def tasks():
    return {name: parametric.generate(name, train=20, test=5) for name in parametric.RECIPES}


def test_tasks_are_whole(tasks):
    assert len(tasks) > 700
    for name, task in tasks.items():
        inputs = [example.input for example in (*task.train, *task.test)]
        assert len({*inputs}) == len(inputs) >= 14, name
        for example in (*task.train, *task.test):
            assert example.output.strip() and '\n' not in example.input, name
        texts = (*task.descriptions, *task.test_descriptions)
        assert len({*texts}) == len(texts) and len(task.test_descriptions) == 3, name
        assert not [text for text in texts if not text.strip() or re.search('[{}]', text)], name
    name = 'kind_mixed_flower'
    assert tasks[name] == parametric.generate(name, train=20, test=5)
    assert tasks[name].train != parametric.generate(name, seed=1, train=20, test=5).train


# Of these two parameters go into a task, and some templates do without the second.
TWO = {'kind_among', 'item_give', 'item_drop', 'item_upper', 'item_front'}


def test_a_description_says_the_parameter(tasks):
    """Of two tasks of a rule no description is the same."""
    described = {}
    for name, task in tasks.items():
        rule = parametric.RECIPES[name].rule
        for text in (*task.descriptions, *task.test_descriptions):
            assert rule in TWO or described.setdefault((rule, text), name) == name, text


def test_no_input_is_trained_on_that_a_generated_task_tests():
    for name, recipe in parametric.RECIPES.items():
        if recipe.domain in generated.DOMAINS:
            inputs = generated.DOMAINS[recipe.domain]
            _, tested = generated.split(recipe.domain, inputs, 0, 500, 100)
            assert not {*tested} & {e.input for e in parametric.generate(name).train}, name


def test_held_out_tasks_are_nobodys():
    """What the config holds out is no rule's task; a task that is, is found out."""
    rules = {'reader': 'parametric'}
    generated_tasks = {'reader': 'generated', 'held_out': HELD_OUT['generated']}
    assert len(collect(ConfigDict({'sources': (generated_tasks, rules)})).held_out) == 13
    for kind in parametric.NEVER_SOUGHT:
        assert not [r for r in parametric.RECIPES.values() if r.slots.get('kind') == kind]
    one = {**generated_tasks, 'names': ('first_letter', 'plural'), 'held_out': ('first_letter',)}
    with pytest.raises(UserError, match='first_letter held out, but letter_give_first trained on'):
        collect(ConfigDict({'sources': (one, rules)}))


def test_words_are_of_one_kind():
    words = [word for kind in ('animal', 'fruit', 'job') for word in generated.members(kind)]
    words += [w for e in generated.FURTHER_KINDS.values() for w in e['words'].split()]
    assert len({*words}) == len(words)
    for kind, gloss in parametric.GLOSSES.items():
        assert len(generated.members(kind)) >= 7 and gloss.strip(), kind


def test_weights_of_sources():
    source = {'reader': 'generated', 'names': ('plural', 'surname'), 'train': 20, 'test': 5}
    rules = {'reader': 'parametric', 'train': 4, 'test': 2, 'weight': 0.25}
    found = collect(ConfigDict({'sources': (source, rules)}))
    assert found.weights == (1.0, 1.0, *[0.25] * len(parametric.RECIPES))
    assert [task.name for task in found.train[2:]] == [*parametric.RECIPES]
    with pytest.raises(UserError, match='weight of a source of tasks must be positive, not 0'):
        collect(ConfigDict({'sources': ({**source, 'weight': 0},)}))
    with pytest.raises(UserError, match="unknown parametric task 'nope'"):
        parametric.generate('nope')
