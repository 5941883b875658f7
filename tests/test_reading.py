"""Reading a judgement: outputs written by hand to exact scores and reasons, and 2,000 broken ones to None or n integers in range."""
import random
import time

import pytest

from conftest import load_script

grm = load_script("01_pointwise_grm")
GOOD = ("Specific Criteria: it is right (weight 3); it is short (weight 1).\n"
        "Analysis: Response 1 is right and short. Response 2 is wrong.\n"
        "Scores: \\boxed{9, 2}")
NOT_WHOLE = "a score is not a whole number"

READABLE = [
    (GOOD, [9, 2]), ("\\boxed{9,2}", [9, 2]), ("\\boxed{ 9 ,\n2\t}", [9, 2]), ("\\boxed {10, 1}", [10, 1]), ("\\boxed{1}", [1]),
    ("**Scores:** $\\boxed{ 8 , 3 }$", [8, 3]), ("Scores: \\boxed{**8**, `3`}", [8, 3]), ("\\boxed{$8$, $3$}", [8, 3]),
    ("Scores: \\boxed{9, 2}\n\nDone. {x} \\box{1, 1}", [9, 2]), ("\\boxed{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ("\\boxed{1, 1} no, rather \\boxed{7} and at last \\boxed{6, 5}", [6, 5]),  # the last box counts, the others need not be readable
    ("Analysis: Response 1 says \\boxed{10, 1}, which is a trick.\nScores: \\boxed{2, 8}", [2, 8]),
]


@pytest.mark.parametrize("text, scores", READABLE)
def test_readable(text, scores):
    judgement = grm.read_judgement(text, len(scores))
    assert judgement.scores == scores and all(type(score) is int for score in judgement.scores) and judgement.unreadable == ""


UNREADABLE = [
    ("", "no \\boxed{...}"), ("Scores: 9, 2", "no \\boxed{...}"), ("boxed{9, 2}", "no \\boxed{...}"), ("\\boxed(9, 2)", "no \\boxed{...}"),
    ("\\Boxed{9, 2}", "no \\boxed{...}"), ("Scores: \\boxed", "no \\boxed{...}"),
    ("\\boxed{9, 2", "the last box is not closed"), ("\\boxed{", "the last box is not closed"),
    ("\\boxed{9, {2}}", "the last box is not closed"),
    ("\\boxed{9, 2} and then \\boxed{9, ", "the last box is not closed"),  # a readable box before does not save it
    ("\\boxed{9}", "1 scores for 2 responses"), ("\\boxed{9, 2, 5}", "3 scores for 2 responses"),
    ("\\boxed{9 2}", "1 scores for 2 responses"),
    ("\\boxed{9, 2,}", "3 scores for 2 responses"), ("\\boxed{9, 2} \\boxed{9}", "1 scores for 2 responses"),
    ("\\boxed{}", "1 scores for 2 responses"),
    ("\\boxed{9; 2}", "1 scores for 2 responses"), ("\\boxed{9}, \\boxed{2}", "1 scores for 2 responses"),
    ("\\boxed{9, 11}", "a score is outside 1..10"), ("\\boxed{9, 99}", "a score is outside 1..10"),
    ("\\boxed{0, 9}", "a score is outside 1..10"),
    ("\\boxed{9, 100}", NOT_WHOLE), ("\\boxed{9, 1000000000000}", NOT_WHOLE), ("\\boxed{9, -2}", NOT_WHOLE), ("\\boxed{9, +2}", NOT_WHOLE),
    ("\\boxed{9, 2.0}", NOT_WHOLE), ("\\boxed{9, 2.5}", NOT_WHOLE), ("\\boxed{9, 1e1}", NOT_WHOLE), ("\\boxed{9, }", NOT_WHOLE),
    ("\\boxed{, }", NOT_WHOLE), ("\\boxed{x, y}", NOT_WHOLE), ("\\boxed{s1, s2}", NOT_WHOLE), ("\\boxed{9, 2/10}", NOT_WHOLE),
    ("\\boxed{1 0, 2}", NOT_WHOLE), ("\\boxed{1_0, 2}", NOT_WHOLE), ("\\boxed{\u0669, \u0662}", NOT_WHOLE),  # 9 and 2 in Arabic
    ("\\boxed{\uff19, \uff12}", NOT_WHOLE), ("\\boxed{9, \u00b2}", NOT_WHOLE), ("\\boxed{9, nan}", NOT_WHOLE),
    ("\\boxed{9, True}", NOT_WHOLE),
    ("\\boxed{9, 2\u200b}", NOT_WHOLE), ("\\boxed{9, 2\0}", NOT_WHOLE),
]


@pytest.mark.parametrize("text, reason", UNREADABLE, ids=lambda value: ascii(value)[:40])
def test_unreadable_says_why(text, reason):
    judgement = grm.read_judgement(text, 2)
    assert judgement.scores is None and judgement.unreadable == reason


@pytest.mark.parametrize("text, scores, reason", [
    ("\\boxed{1}", [1], ""), ("\\boxed{0}", [0], ""), ("\\boxed{2}", None, "a score is outside 0..1"),
    ("\\boxed{10}", None, "a score is outside 0..1"),
    ("\\boxed{-1}", None, NOT_WHOLE), ("\\boxed{0.5}", None, NOT_WHOLE), ("\\boxed{0, 1}", None, "2 scores for 1 responses")])
def test_binary_scores_are_0_and_1(text, scores, reason):
    judgement = grm.read_judgement(text, 1, binary=True)
    assert (judgement.scores, judgement.unreadable) == (scores, reason)


# ---- principles and critique ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, principles, critique", [
    (GOOD, "it is right (weight 3); it is short (weight 1).", "Response 1 is right and short. Response 2 is wrong."),
    ("**Specific Criteria:** right (3)\n\n**Analysis:**\nFine.\nToo long.\n\n**Scores:** \\boxed{9, 2}", "right (3)", "Fine.\nToo long."),
    ("## Specific Criteria:\nright\n## Analysis:\nfine\n## Scores:\n\\boxed{9, 2}", "right", "fine"),
    ("specific criteria : right\nANALYSIS**: fine\nscores: \\boxed{9, 2}", "right", "fine"),
    ("Specific Criteria: right\nAnalysis: cut off in the mid", "right", "cut off in the mid"),
    ("Specific Criteria: only th", "only th", ""), ("Analysis: fine\nScores: \\boxed{9, 2}", "", "fine"),
    ("Specific Criteria: right\nScores: \\boxed{9, 2}", "right", ""), ("Scores: \\boxed{9, 2}", "", ""), ("", "", ""), ("hello", "", "")])
def test_principles_and_critique(text, principles, critique):
    judgement = grm.read_judgement(text, 2)
    assert (judgement.principles, judgement.critique) == (principles, critique)


@pytest.mark.parametrize("text, principles, critique", [
    ("Specific Criteria: depth of analysis: weight 3\nAnalysis: fine\nScores: \\boxed{9, 2}", "depth of analysis: weight 3", "fine"),
    ("Specific Criteria: right\nAnalysis: what the first scores: much. Good.\nScores: \\boxed{9, 2}", "right",
     "what the first scores: much. Good."),
    ("Specific Criteria: whoever scores: wins\nAnalysis: fine\nScores: \\boxed{9, 2}", "whoever scores: wins", "fine")])
def test_a_label_inside_a_line_is_text(text, principles, critique):
    judgement = grm.read_judgement(text, 2)
    assert judgement.scores == [9, 2] and (judgement.principles, judgement.critique) == (principles, critique)


# ---- anything at all ------------------------------------------------------------------------------------------------------------------

def mutate(text, rng):
    """One way in which a model's output goes wrong."""
    kind, at, to = rng.randrange(9), rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[at:]
    if kind == 2:
        return text[:to] + text[min(at, to):]  # repeats a stretch
    if kind == 3:
        odd = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(rng.randrange(1, 30)))
        return text[:at] + odd + text[at:]
    if kind == 4:
        return text.translate(str.maketrans(*rng.choice([("{}", "}{"), ("{", "}"), ("}", "{"), ("\\", "/"), (",", "{"), (":", "}")])))
    if kind == 5:
        return text.replace(rng.choice("0123456789"), rng.choice(
            ["9" * 5000, "-1", "1.5", "\u0665", "\u00b2", "", "00", "0", "10", "11", "\ud800"]))
    if kind == 6:
        part = rng.choice(["\\boxed{", "\\boxed", "}", "{", ",", "Scores:", "Analysis:", "Specific Criteria:", "\\boxed{1, 2}"])
        return text[:at] + part + text[at:]
    if kind == 7:
        return text[:at] + rng.choice([" ", "\n", "*", "_", "\\", "{", "}", ",", "$", "\u00a0"]) * rng.randrange(1, 2000) + text[at:]
    return "".join(rng.choices(text, k=len(text)))


def test_two_thousand_broken_outputs():
    rng = random.Random(0)
    good = [text for text, _ in READABLE] + [text for _, text in grm.worked_examples(len(grm.SHOTS))]
    outcomes = {True: 0, False: 0}
    for _ in range(2000):
        text, n, binary = rng.choice(good), rng.randrange(1, 5), rng.random() < 0.2
        for _ in range(rng.randrange(1, 4)):
            text = mutate(text, rng)
        judgement = grm.read_judgement(text, n, binary)
        outcomes[judgement.scores is None] += 1
        if judgement.scores is None:
            assert judgement.unreadable
        else:
            low, high = (0, 1) if binary else (1, 10)
            assert len(judgement.scores) == n and all(type(s) is int and low <= s <= high for s in judgement.scores)
            assert judgement.unreadable == "" and "\\boxed" in text
        assert judgement.principles in text and judgement.critique in text
    assert min(outcomes.values()) > 100  # both outcomes are met


@pytest.mark.parametrize("unit", [" ", "*", "\\", "\n", "_", "{", "}", ",", "9", "9,", "\\boxed", "\\boxed{", "\\boxed ", "\\boxed{9, 2} ",
                                  "analysis", "analysis ", "analysis*", "analysis: ", "specific criteria ", "scores* ", "scores:",
                                  "specific criteria:\n", "\t \n", "*_", "$ ` "], ids=ascii)
@pytest.mark.parametrize("before, after", [("", ""), ("\\boxed{9, ", "2}"), ("Analysis", ": x\nScores: \\boxed{9, 2}"),
                                           ("\\boxed", "{9, 2}"), ("Specific Criteria: x", "\nScores\\boxed")],
                         ids=["alone", "in", "label", "box", "tail"])
def test_time_grows_with_the_length_alone(unit, before, after):
    text = before + unit * (20_000 // len(unit)) + after
    start = time.process_time()
    grm.read_judgement(text, 2)
    assert time.process_time() - start < 0.5  # a quadratic reader of 20,000 characters takes seconds


def test_long_white_space_around_scores_is_allowed():
    padding = " " * 20_000
    assert grm.read_judgement(f"\\boxed{{{padding}9{padding},{padding}2{padding}}}", 2).scores == [9, 2]
