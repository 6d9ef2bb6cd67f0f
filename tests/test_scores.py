"""Scores of answers."""

import pytest

from d2l import scores


@pytest.mark.parametrize(
    ('answer', 'accepted', 'exact', 'f1', 'order_free', 'rouge'),
    [
        ('The Eiffel Tower.', ['eiffel tower'], 1, 1, 1, 0.8),
        ('tower of Eiffel', ['Eiffel tower'], 0, 0.8, 0.8, 0.4),
        ('in 1066', ['1067', '1066'], 0, 2 / 3, 2 / 3, 2 / 3),
        # Punctuation vanishes for SQuAD and separates words for the order-free F1.
        ('twenty-one', ['twenty one'], 0, 0, 1, 1),
        ('10\u201320', ['10-20'], 0, 0, 1, 1),
        ('', ['nothing'], 0, 0, 0, 0),
        ('no', ['yes'], 0, 0, 0, 0),
    ],
)
def test_scores(answer, accepted, exact, f1, order_free, rouge):
    found = [scores.SCORES[name](answer, accepted) for name in scores.SCORES]
    assert found == pytest.approx([exact, f1, rouge, order_free])


def test_the_best_accepted_answer_counts():
    for score in scores.SCORES.values():
        assert score('Paris', ['London', 'Paris']) == 1
