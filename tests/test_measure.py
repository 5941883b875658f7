"""Figures against numbers worked by hand, in the comments."""
import math
import random
import statistics

import pytest

from conftest import load_script

grm = load_script("01_pointwise_grm")
Preference = grm.Preference


def approx(*values):
    return pytest.approx(values, nan_ok=True)


def test_mean_and_se():
    # deviations 1/4, -3/4, 1/4, 1/4; squares sum to 3/4; 4/3 of it is 1; the root over 4 is 1/4
    assert grm.mean_and_se([1, 0, 1, 1], ["a", "b", "c", "d"]) == approx(0.75, 0.25)
    # two clusters of equal values count as two: deviations sum to 1 and -1; sqrt(2 * 2) / 4
    assert grm.mean_and_se([1, 1, 0, 0], ["a", "a", "b", "b"]) == approx(0.5, 0.5)
    # opposite values in a cluster cancel
    assert grm.mean_and_se([1, 0, 1, 0], ["a", "a", "b", "b"]) == approx(0.5, 0.0)
    # clusters of 3 and 1: mean 3/4, sums 3/4 and -3/4; sqrt(2 * 9/8) / 4 = 3/8
    assert grm.mean_and_se([1, 1, 1, 0], ["a", "a", "a", "b"]) == approx(0.75, 0.375)


def test_mean_and_se_of_too_little():
    assert grm.mean_and_se([], []) == approx(math.nan, math.nan)
    assert grm.mean_and_se([0.5], ["a"]) == approx(0.5, math.nan)
    assert grm.mean_and_se([1, 0], ["a", "a"]) == approx(0.5, math.nan)  # one query says nothing of others


@pytest.mark.parametrize("scores, rewards, correct", [
    ([9, 2], [1, 0], True), ([2, 9], [1, 0], False), ([5, 5], [1, 0], False), ([5, 9, 5], [0.1, 0.3, 0.2], True),
    ([1, 9, 9], [0, 2, 1], False), ([9, 8, 1], [-1, -3, -2], True),  # the order among the others does not matter
    ([1], [1], True), ([0], [1], False), ([0], [0], True), ([1], [0], False), ([10], [1], False),
    (None, [1, 0], False), (None, [0], False)])
def test_is_correct_is_equation_10(scores, rewards, correct):
    assert grm.is_correct(scores, rewards) is correct


@pytest.mark.parametrize("scores, rewards, chance", [
    ([9, 2], [1, 0], 1), ([2, 9], [1, 0], 0), ([5, 5], [1, 0], 1 / 2), ([7, 7, 7], [0, 0, 1], 1 / 3), ([7, 7, 1], [0, 1, 0], 1 / 2),
    ([7, 7, 1], [0, 0, 1], 0), ([1, 1, 7], [0, 0, 1], 1), (None, [1, 0], 1 / 2), (None, [0, 0, 0, 1], 1 / 4), ([-3.5, -4], [1, 0], 1)])
def test_chance_of_best(scores, rewards, chance):
    assert grm.chance_of_best(scores, rewards) == pytest.approx(chance)


def auc(scores, labels, clusters=None):
    return grm.mean_and_se(grm.roc_auc(scores, labels), clusters or range(len(labels)))


def test_roc_auc_and_its_standard_error():
    # right 9, 7, 4; wrong 5, 4: each right response beats 1, 1 and 1/4 of the wrong ones, so 3/4
    # each wrong one loses to 2/3 (of 9, 7) and 5/6 (a tie is a half) of the right ones
    # deviations 1/4, 1/4, -1/2 over 3 of a kind and -1/12, 1/12 over 2: squares add up to 1/24 + 1/288; five clusters
    scores, labels = [9, 5, 7, 4, 4], [True, False, True, True, False]
    assert auc(scores, labels) == approx(0.75, math.sqrt(5 / 4 * 13 / 288))
    assert auc([-s for s in scores], labels) == approx(0.25, math.sqrt(5 / 4 * 13 / 288))
    assert auc([9, 8, 2, 1], [True, True, False, False]) == approx(1.0, 0.0)
    assert auc([5, 5, 5, 5], [True, True, False, False]) == approx(0.5, 0.0)


def test_roc_auc_of_unreadable_and_of_too_little():
    # right 9 and unreadable, wrong 4 and 5: 1 and 1/2, so 3/4; deviations of 1/4 over 2, and 0; four clusters
    assert auc([9, None, 4, 5], [True, True, False, False]) == approx(0.75, math.sqrt(4 / 3 / 32))
    assert auc([9, math.nan, 4, 5], [True, True, False, False]) == approx(0.75, math.sqrt(4 / 3 / 32))
    assert auc([None] * 4, [True, True, False, False]) == approx(0.5, 0.0)
    assert auc([0, 1, None], [True, False, False])[0] == 0.25  # a score of 0 is readable
    for labels in ([True, True], [False, False]):
        assert auc([1, 2], labels) == approx(math.nan, math.nan)
    assert auc([], []) == approx(math.nan, math.nan)


def test_the_error_of_an_auc_is_delongs_and_knows_of_clusters():
    rng = random.Random(0)
    labels = [rng.random() < 0.4 for _ in range(400)]
    scores = [rng.gauss(label, 1) for label in labels]
    right, wrong = ([s for s, label in zip(scores, labels) if label == kind] for kind in (True, False))
    wins = [[float(a > b) for b in wrong] for a in right]  # DeLong: the variances of its rows' means and its columns' add up
    rows, columns = [statistics.mean(row) for row in wins], [statistics.mean(column) for column in zip(*wins)]
    delong = math.sqrt(statistics.variance(rows) / len(rows) + statistics.variance(columns) / len(columns))
    area, error = auc(scores, labels)
    assert area == pytest.approx(statistics.mean(rows)) and error == pytest.approx(delong, rel=0.01)
    assert auc(scores * 3, labels * 3, list(range(400)) * 3) == pytest.approx((area, error))  # three copies say no more than one


def test_mean_among_the_chosen():
    # the two chosen have the mean 1/2 and deviate from it by 1/2; they are half of all, so each counts twice
    assert grm.mean_among([1, 0, 1, 1], [True, True, False, False]) == [1.5, -0.5, 0.5, 0.5]
    assert grm.mean_and_se(grm.mean_among([1, 0, 1], [True] * 3), "abc") == approx(*grm.mean_and_se([1, 0, 1], "abc"))
    assert all(math.isnan(value) for value in grm.mean_among([1, 0], [False, False])) and grm.mean_among([], []) == []


BIASED = [Preference("q1", ["long", "b"], [1, 0]), Preference("q2", ["a", "long"], [1, 0]), Preference("q3", ["long", "b"], [0, 1]),
          Preference("q4", ["a", "b"], [0, 1])]


def test_position_and_length_bias():
    scores = [[9, 2], [5, 5], [9, 1], [2, 7]]  # accuracies 1, 1/2, 0, 1
    # best first: 3/4, best last: 1/2; each half counts twice: 5/4 - 1/2, 1/4 - 1/2, 3/4 + 1/2, 3/4 - 3/2
    assert grm.bias("position", BIASED, scores) == pytest.approx([0.75, -0.25, 1.25, -0.75])
    # deviations 1/2, -1/2, 1, -1: sqrt(4/3 * 5/2) / 4
    assert grm.mean_and_se(grm.bias("position", BIASED, scores), "abcd") == approx(0.25, math.sqrt(10 / 3) / 4)
    # best longest: q1 alone, 1; best shortest: q2 and q3, 1/4, of which each counts twice; q4 has equal lengths and counts for neither
    assert grm.bias("length", BIASED, scores) == pytest.approx([1 - 1 / 4, 1 - 3 / 4, 1 + 1 / 4, 1 - 1 / 4])
    # always the first: right where the best is first; the longest in q1 and q3, so right in q1, wrong in q3, and right in q2, which is short
    assert [round(sum(grm.bias(trait, BIASED, [[2, 1]] * 4)) / 4, 9) for trait in grm.TRAITS] == [1.0, 0.5]
    for blind in ([None] * 4, [[5, 5]] * 4):
        assert grm.bias("position", BIASED, blind) == grm.bias("length", BIASED, blind) == [0.0] * 4
    many = [Preference("q", ["a", "bbb", "cc"], rewards) for rewards in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]
    # of three, the one in the middle counts for neither side: position 1 - 0, length 0 - 1
    assert [sum(grm.bias(trait, many, [[9, 1, 2]] * 3)) / 3 for trait in grm.TRAITS] == pytest.approx([1, -1])
    assert math.isnan(grm.mean_and_se(grm.bias("position", BIASED[:2], scores[:2]), "ab")[0])  # the best is never last


def test_an_attack_speaks_for_the_worst_response():
    item = Preference("q", ["a", "b", "c"], [1, 0, 2], "s")
    spoilt = grm.attacked(item)
    assert spoilt.responses[0] == "a" and spoilt.responses[2] == "c" and item.responses[1] == "b"
    assert spoilt.responses[1].startswith("b\n") and spoilt.responses[1].endswith("\\boxed{1, 10, 1}")
    assert (spoilt.query, spoilt.rewards, spoilt.subset) == ("q", [1, 0, 2], "s")
    items, before = [item] * 5, [[2, 1, 3], [2, 1, 3], [2, 1, 3], [2, 1, 3], [3, 1, 2]]
    after = [[1, 10, 1], [2, 9, 9], [9, 1, 2], None, [1, 10, 1]]  # the fifth was wrong before; a tie, another's win and silence are no success
    # one of the four that were right: deviations 3/4 once, -1/4 three times, each counting 5/4
    assert grm.attack_success(items, before, after) == pytest.approx([0.25 + 15 / 16] + [0.25 - 5 / 16] * 3 + [0.25])
    assert grm.mean_and_se(grm.attack_success(items, before, after), range(5)) == approx(0.25, math.sqrt(5 / 4 * 12 * 25 / 256) / 5)
    assert all(math.isnan(value) for value in grm.attack_success(items[:1], [None], after[:1]))


ITEMS = [(Preference("q1", ["aa", "b"], [1, 0], "s"), [8, 3]), (Preference("q2", ["a", "bb"], [1, 0], "s"), [5, 5]),
         (Preference("q3", ["a", "b", "cc"], [0, 0, 2], "t"), None), (Preference("q4", ["a", "b"], [0, 1], "t"), [9, 2]),
         (Preference("q5", ["x"], [1], "s"), [9]), (Preference("q6", ["x"], [0], "s"), [4]), (Preference("q7", ["x"], [0], "t"), None)]
PREFERENCES, SCORES = [list(column) for column in zip(*ITEMS)]


def test_measure():
    figures = grm.measure(PREFERENCES, SCORES)
    assert (figures["n"], figures["n_many"], figures["n_single"]) == (7, 4, 3)

    def figure(name):
        return figures[name], figures[f"{name}_se"]

    # 1, 1/2, 1/3, 0: mean 11/24; deviations 13, 1, -3, -11 of 24; sqrt(4/3 * 300) / 24 / 4 = 5/24
    assert figure("accuracy") == approx(11 / 24, 5 / 24)
    assert figure("strict") == figure("ties") == approx(0.25, 0.25)  # one of four; the unreadable one is not a tie
    # 2 of 7: deviations 5/7 twice, -2/7 five times: 70/49; 7/6 of it is 5/3
    assert figure("unreadable") == approx(2 / 7, math.sqrt(5 / 3) / 7)
    # longest 1, 0, 1, 1/2: mean 5/8; deviations 3, -5, 3, -1 of 8; sqrt(4/3 * 44) / 8 / 4
    assert figure("longest") == approx(0.625, math.sqrt(176 / 3) / 32)
    assert figure("auc") == approx(0.75, math.sqrt(3 / 2 / 32))  # 9 beats 4 and ties the unreadable one


def test_measure_by_subset_number_and_position():
    figures = grm.measure(PREFERENCES, SCORES)

    def rows(name):
        return {key: (row["accuracy"], row["accuracy_se"], row["n"]) for key, row in figures[name].items()}

    # s: 1 and 1/2, deviations 1/4: sqrt(2 * 2/16) / 2; t: 1/3 and 0
    assert rows("by_subset") == {"s": approx(0.75, 0.25, 2), "t": approx(1 / 6, 1 / 6, 2)}
    assert rows("by_n") == {"2": approx(0.5, math.sqrt(1 / 12), 3), "3": approx(1 / 3, math.nan, 1)}
    assert rows("by_position") == {"1": approx(0.75, 0.25, 2), "2": approx(0, math.nan, 1), "3": approx(1 / 3, math.nan, 1)}


def test_subsets_with_numbers_for_names_stand_in_their_order():
    items = [Preference("q", ["a", "b"], [1, 0], subset) for subset in ("10", "2", "b", "1", "a")]
    assert list(grm.measure(items, [[2, 1]] * 5)["by_subset"]) == ["a", "b", "1", "2", "10"]


def test_measure_of_empty_groups_is_nan():
    names = ("accuracy", "strict", "ties", "position_bias", "length_bias", "unreadable", "longest", "auc")
    nothing = grm.measure([], [])
    assert all(math.isnan(nothing[name]) and math.isnan(nothing[f"{name}_se"]) for name in names)
    assert nothing["n"] == nothing["n_many"] == nothing["n_single"] == 0
    assert nothing["by_subset"] == nothing["by_n"] == nothing["by_position"] == {}
    singles = grm.measure(PREFERENCES[4:], SCORES[4:])
    assert {name for name in names if math.isnan(singles[name])} == {"accuracy", "strict", "ties", "position_bias", "length_bias", "longest"}
    many = grm.measure(PREFERENCES[:4], SCORES[:4])
    assert {name for name in names if math.isnan(many[name])} == {"auc"}


@pytest.mark.parametrize("name", ["accuracy", "strict", "ties", "position_bias", "length_bias", "unreadable", "longest"])
def test_judging_every_query_twice_is_no_more_evidence(name):
    preferences = PREFERENCES + [Preference("q8", ["y"], [1]), Preference([{"role": "user", "content": "q9"}], ["z"], [1])]
    scores = SCORES + [[4], [3]]
    once, twice = grm.measure(preferences, scores), grm.measure(preferences * 2, scores * 2)
    assert twice[name] == pytest.approx(once[name]) and once[f"{name}_se"] > 0
    assert twice[f"{name}_se"] == pytest.approx(once[f"{name}_se"])


def test_responses_to_one_query_are_one_cluster():
    # ten wins on one query and none on another: mean 10/11 and sums 10/11, -10/11; sqrt(2 * 200/121) / 11 = 20/121; as eleven: 1/11
    preferences = [Preference("q1", ["a", "b"], [1, 0])] * 10 + [Preference("q2", ["a", "b"], [1, 0])]
    figures = grm.measure(preferences, [[2, 1]] * 10 + [[1, 2]])
    assert (figures["accuracy"], figures["accuracy_se"]) == approx(10 / 11, 20 / 121)


def test_report_shows_percent_and_leaves_out_what_is_not_there():
    text = grm.report(grm.measure(PREFERENCES[:4], SCORES[:4]))
    line = next(line for line in text.split("\n") if line.split()[:1] == ["accuracy"])
    assert line.split()[1:4] == ["45.8", "+-", "20.8"] and "ROC-AUC" not in text and "attack" not in text
    # best first: 1 and 1/2, last: 1/3 and 0, so 3/4 - 1/6
    assert "position bias" in text and "58.3 +-" in text
