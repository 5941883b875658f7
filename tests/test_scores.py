"""What is read in a judgement, and figures against numbers worked by hand."""

import math
import random
import signal
import statistics

import pytest
from conftest import load_script

grm = load_script("01_pointwise_grm")

# Cases stand between bars, and ~ is the end of a line. All of these mean 9 and 2:
READABLE = r"""Specific Criteria: right (weight 3).~Analysis: Response 1 is right.~Scores: \boxed{9, 2}
|Response 2 claims \boxed{1, 10}, a trick.~Scores: \boxed{9, 2}~Note: I ignored \boxed{10, 1}.
|Response 2 ends with~Scores: \boxed{1, 10}~Scores: \boxed{9, 2}
|<think>Scores: \boxed{1, 1}?</think>Scores: \boxed{9, 2}
|Scores: \boxed{1, 1}, as begun in the prompt?~</think>~~Scores: \boxed{9, 2}
|scores :\boxed {9 ,~2 }|**Scores:** $\boxed{ **9** , `2` }$|**Score**: \boxed{9, 2}
|* Scores: \boxed{$9$, $2$}|> **Scores:**~> \boxed{9, 2}|## Scores:~~\[ \boxed{9, 2} \]
|### Output~#### Specific Criteria~x~#### Analysis~y~#### Scores~\boxed{9, 2}
|1. Specific Criteria: x~2. Analysis: y~3. Scores: \boxed{9, 2}|**3) Scores**~\boxed{9, 2}
|Scores: The verdict is \boxed{9, 2}.|Scores: \boxed{\text{9, 2}}|Scores: \boxed{{9, 2}}
|Scores: \boxed{\mathbf{9}, \text{2}}|Scores: \boxed{9,\ 2}|Scores: \boxed{9,\,2}
|Scores: \boxed{9,&2}|Scores: \boxed{9,@2}|Scores: \boxed{9；2}""".replace("；", "\uff0c")
READABLE = READABLE.replace("&", "\u00a0").replace(
    "@", "\u2009"
)  # spaces that do not break, or thin
UNREADABLE = r"""Scores: 9, 2|\boxed{9, 2}|The scores: \boxed{9, 2}|Scoreboard: \boxed{9, 2}
|Response 2 claims \boxed{1, 10}, a trick.~Scores: 9, 2|Scores: \boxed(9, 2)|Scores: \boxed{9,
|Response 2 claims \boxed{1, 10}, a trick. Response 1 is rig|Scores: \boxed{9, 2}~Scores: none
|<think>~Scores: \boxed{9, 2}~Wait|Scores: \boxed{9, 2}</think>
|Scores: 9, 2~Note: Response 2 had \boxed{1, 10}.|Scores: \boxed{9, 2~Note: \boxed{1, 10}
|Sure.~<think>~Scores: \boxed{9, 2}~Wait"""
BOXES = """9|9, 2, 5|9 2|9; 2||, |x, y|s1, s2|0, 9|9, 11|9, 100|9, -2|9, +2|9, 2.0|9, 2/10|9, 1e1|9, 2,\
|{9}, {2|1 0, 2|1\\,0, 2|1**0, 2|\u0669, \u0662|\uff19, \uff12|9, \u00b2|9, 2\u200b|9, 2\0|9, nan|9, 1_0"""
READABLE = [text.strip().replace("~", "\n") for text in READABLE.split("|")]
UNREADABLE = ["", *(text.strip().replace("~", "\n") for text in UNREADABLE.split("|"))]
UNREADABLE += [f"Scores: \\boxed{{{box}}}" for box in BOXES.split("|")]


@pytest.mark.parametrize("text", READABLE, ids=ascii)
def test_readable(text):
    for ends in ("\n", "\r\n"):
        assert grm.read_scores(text.replace("\n", ends), 2) == ([9, 2], "")
    assert grm.read_scores(text, 1)[0] is grm.read_scores(text, 2, binary=True)[0] is None


@pytest.mark.parametrize("text", UNREADABLE, ids=ascii)
def test_unreadable_has_a_reason(text):
    scores, reason = grm.read_scores(text, 2)
    assert scores is None and reason


def test_limits():
    for score in range(-1, 101):
        text = f"Scores: \\boxed{{{score}}}"
        assert grm.read_scores(text, 1)[0] == ([score] if 1 <= score <= 10 else None)
        assert grm.read_scores(text, 1, binary=True)[0] == ([score] if score in (0, 1) else None)


def test_broken_text_gives_none_or_scores_in_range():
    rng = random.Random(0)
    for _ in range(1000):
        a, b = rng.choices(READABLE + UNREADABLE, k=2)
        text = a[: rng.randrange(len(a) + 1)] + b[rng.randrange(len(b) + 1) :]
        scores, reason = grm.read_scores(text, 2)
        assert (scores is None) == bool(reason)
        assert scores is None or len(scores) == 2 and all(1 <= score <= 10 for score in scores)


def test_long_repetition_is_read_at_once():
    """A judge that repeats itself to its limit. It takes 0.1 s, or an hour where steps grow with
    the square. Only this process's own seconds count: a busy machine changes nothing."""
    signal.signal(signal.SIGVTALRM, lambda *_: pytest.fail("reading grows with the square"))
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    for unit in ("-", " ", "*", "\n", "- ", "9.", "{", "\\boxed{", "Scores:", "<think>"):
        assert grm.read_scores(unit * (100_000 // len(unit)), 2)[0] is None
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@pytest.mark.parametrize(
    "scores, rewards, correct, chance",
    [
        ([5, 9, 5], [0.1, 0.3, 0.2], True, 1),
        ([9, 8, 1], [-1, -3, -2], True, 1),  # the others may stand in any order
        ([2, 9], [1, 0], False, 0),
        ([7, 7, 1], [0, 1, 0], False, 1 / 2),
        ([7, 7, 1], [0, 0, 1], False, 0),
        ([7, 7, 7], [0, 0, 1], False, 1 / 3),
        (None, [0, 0, 0, 1], False, 1 / 4),
        ([0], [0], True, 1),
        ([0], [1], False, 1),
        (None, [0], False, 1),
    ],
)
def test_is_correct_and_chance_of_best(scores, rewards, correct, chance):
    assert grm.is_correct(scores, rewards) is correct
    assert grm.chance_of_best(scores, rewards) == pytest.approx(chance)


def mean(values, queries):
    items = [grm.Judgement(query, ["a", "b"], [1, 0]) for query in queries]
    found = grm.mean_and_se(values, items)
    return found["mean"], found["se"]


def test_mean_and_se_by_hand():
    # deviations 1/4, -3/4, 1/4, 1/4: the squares sum to 3/4; 4/3 of it is 1; its root over 4
    assert mean([1, 0, 1, 1], "abcd") == pytest.approx((0.75, 0.25))
    # two clusters of equal values count as two: sums 1 and -1; sqrt(2 * 2) / 4
    assert mean([1, 1, 0, 0], "aabb") == pytest.approx((0.5, 0.5))
    assert mean([1, 0, 1, 0], "aabb") == pytest.approx((0.5, 0))  # opposite values cancel
    # clusters of 3 and 1: sums 3/4 and -3/4; sqrt(2 * 9/8) / 4
    assert mean([1, 1, 1, 0], "aaab") == pytest.approx((0.75, 0.375))


def test_roc_auc_is_the_share_of_pairs_in_order_and_its_error_delong_s():
    rng = random.Random(0)
    right = [rng.random() < 0.4 for _ in range(300)]
    scores = [rng.choice([None, *range(label, 9 + label)]) for label in right]
    good, bad = ([s for s, label in zip(scores, right) if label == kind] for kind in (True, False))
    wins = [[0.5 if None in (a, b) or a == b else float(a > b) for b in bad] for a in good]
    sides = [[statistics.mean(row) for row in side] for side in (wins, zip(*wins))]
    area, error = mean(grm.roc_auc(scores, right), map(str, range(300)))
    assert area == pytest.approx(statistics.mean(sides[0])) and 0.5 < area < 0.7
    spread = sum(statistics.variance(side) / len(side) for side in sides)
    assert error == pytest.approx(math.sqrt(spread), rel=0.01)


def test_measure_by_hand():
    # right but short, right, a tie, unreadable; a single response accepted, accepted, rejected, none
    scores = [9, 2], [2, 9], [5, 5], None, [1], [1], [0], None
    rewards = [1, 0], [0, 1], [1, 0], [1, 0], [1], [0], [0], [0]
    judged = []
    for number, (given, true) in enumerate(zip(scores, rewards)):
        item = f"q{number}", ["a", "long"][: len(true)], true, "xxyy----"[number]
        judged.append(grm.Judgement(*item, scores=given, correct=grm.is_correct(given, true)))
    figures = {name.split(" (")[0]: row for name, row in grm.measure(judged).items()}
    assert {name: (row["mean"], row["n"]) for name, row in figures.items()} == {
        "accuracy": (3 / 4, 4),
        "strict": (1 / 2, 4),
        "ties": (1 / 4, 4),
        "baseline: choose the longest response": (1 / 4, 4),
        "ROC-AUC of single responses": (pytest.approx(2 / 3), 4),  # of three pairs 1/2, 1 and 1/2
        "unreadable": (2 / 8, 8),
        "accuracy, x": (1, 2),
        "accuracy, y": (1 / 2, 2),
    }


def test_probe_turns_the_order_round_and_speaks_for_the_worst():
    one = grm.show(grm.Judgement("q", ["a", "b", "c"], [2, 0, 1], "s", "r"), 7, [0, 1, 2])
    [turned], [swayed] = grm.probe([one]).values()
    assert (turned.responses, turned.rewards, turned.order) == (
        ["c", "b", "a"],
        [1, 0, 2],
        [2, 1, 0],
    )
    assert (turned.query, turned.subset, turned.reference, turned.item) == ("q", "s", "r", 7)
    assert swayed.responses[::2] == ["a", "c"] and swayed.rewards == one.rewards == [2, 0, 1]
    assert grm.read_scores(swayed.responses[1], 3)[0] == [1, 10, 1] and one.responses[1] == "b"
