"""What counts as an error."""

import numpy as np
import pytest

from dpnn.evaluate import Scores, n_better

SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [1.0, 2.0, 3.0]])


def test_the_place_of_the_true_class_is_the_number_of_better_ones():
    assert n_better(SCORES, np.array([1, 1, 0], np.int32)).tolist() == [0, 1, 2]


def test_of_several_labels_the_best_placed_counts():
    labels = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 0]], np.uint8)
    assert n_better(SCORES, labels).tolist() == [0, 2, 1]
    assert n_better(np.array([[1.0, 3.0, 3.0]]), np.array([[0, 1, 1]])).tolist() == [0]


def test_a_sample_without_labels_is_never_right():
    assert n_better(SCORES[:1], np.zeros((1, 3), np.uint8)).tolist() == [3]


@pytest.mark.parametrize("label", [0, 1])
def test_a_score_that_is_not_a_number_is_never_right(label):
    scores = np.array([[np.nan, 1.0, 0.0]])
    assert n_better(scores, np.array([label]))[0] >= 1


def test_a_network_that_gives_all_classes_one_score_is_never_right():
    assert n_better(np.ones((2, 4)), np.array([2, 0])).tolist() == [3, 3]


def test_scores_print_shares_in_per_cent():
    assert str(Scores(360, 0.0125, 0.0, 0.04321)) == "top-1 error 1.25%, top-5 error 0.00%, loss 0.0432 (360 samples)"
