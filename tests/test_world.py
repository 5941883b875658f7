"""The embedded world: its truth by hand, its items, what a judge writes in it, and the program that reads judgements."""
import json
import math
import random
import sys

import pytest
import read_judgements
import world
from world import Criterion

from conftest import load_script

grm = load_script("01_pointwise_grm")
LIST = ["rope", "tent", "lamp", "book"]


@pytest.mark.parametrize("kind, argument, items, holds", [
    ("mention", "tent", LIST, True), ("mention", "drum", LIST, False), ("mention", "rope", [], False), ("mention", "ten", LIST, False),
    ("avoid", "drum", LIST, True), ("avoid", "tent", LIST, False), ("avoid", "rope", [], True),
    ("begin with", "rope", LIST, True), ("begin with", "tent", LIST, False), ("begin with", "book", LIST, False),
    ("begin with", "rope", [], False),
    ("end with", "book", LIST, True), ("end with", "lamp", LIST, False), ("end with", "rope", LIST, False), ("end with", "rope", [], False),
    ("begin with", "rope", ["rope"], True), ("end with", "rope", ["rope"], True),
    ("have at least", "4", LIST, True), ("have at least", "3", LIST, True), ("have at least", "5", LIST, False),
    ("have at least", "1", [], False), ("have at least", "rope", LIST, False)])
def test_holds(kind, argument, items, holds):
    assert Criterion(kind, argument, 1).holds(items) is holds


def test_reading_a_request_and_a_list():
    query = ("Make a packing list for the lake. It must mention rope. It could begin with tent. It should have at least 4 items. "
             "It must avoid cup.")
    assert world.criteria_of(query) == [Criterion("mention", "rope", 3), Criterion("begin with", "tent", 1),
                                        Criterion("have at least", "4", 2), Criterion("avoid", "cup", 3)]
    assert [c.text for c in world.criteria_of(query)] == ["mention rope", "begin with tent", "have at least 4 items", "avoid cup"]
    assert world.criteria_of("Name a prime.") == []
    assert world.items_of("Pack rope, tent, lamp, book.") == LIST
    assert world.items_of(" Take rope.\n") == ["rope"] and world.items_of("Pack.") == []
    # rope 3 + (not tent first) + 4 items 2 + no cup 3; then rope 3 + tent first 1
    assert world.met_weight(world.criteria_of(query), LIST) == 8
    assert world.met_weight(world.criteria_of(query), ["tent", "cup", "rope"]) == 4


@pytest.mark.parametrize("verdicts, weights, binary, score", [
    ([True, True], [3, 1], False, 10), ([False, False], [3, 1], False, 1),
    ([True, False], [3, 1], False, 8),  # 1 + round(6.75)
    ([False, True], [3, 1], False, 3),  # 1 + round(2.25)
    ([True, False], [1, 2], False, 4), ([True, False], [2, 1], False, 7), ([True, False, True], [3, 2, 1], False, 7),
    ([True, False], [2, 2], False, 5),  # 1 + round(4.5), and Python rounds a half to the even number
    ([True, True], [3, 1], True, 1), ([True, False], [3, 1], True, 0), ([False, False], [3, 1], True, 0)])
def test_score_of(verdicts, weights, binary, score):
    assert world.score_of(verdicts, weights, binary) == score


# ---- items -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_items_have_the_truth_that_their_text_states(n):
    kinds, right = set(), 0
    for seed in range(300):
        item = world.draw_item(random.Random(seed), n)
        assert item == world.draw_item(random.Random(seed), n)
        criteria, lists = world.criteria_of(item["query"]), [world.items_of(response) for response in item["responses"]]
        modal = {3: "must", 2: "should", 1: "could"}
        assert 3 <= len(criteria) <= 5 and len({c.argument for c in criteria}) == len(criteria)
        assert item["query"].split(". ", 1)[1] == " ".join(f"It {modal[c.importance]} {c.text}." for c in criteria)
        for response, items in zip(item["responses"], lists):
            assert response.split(" ", 1)[1] == ", ".join(items) + "." and 2 <= len(items) <= 6 and len(set(items)) == len(items)
            assert set(items) <= set(world.ITEMS)
        met = [sum(c.importance for c in criteria if c.holds(items)) for items in lists]
        assert met == [world.met_weight(criteria, items) for items in lists] and len(lists) == n and item["subset"] == f"n={n}"
        if n == 1:
            assert item["rewards"] == [int(met[0] == sum(c.importance for c in criteria))]
        else:
            assert item["rewards"] == met and met.count(max(met)) == 1 and len({tuple(items) for items in lists}) == n
            best, second = sorted(met, reverse=True)[:2]
            assert 1 <= best - second <= 2  # close: that is what the world is about
        grm.Preference(**item)  # raises DataError if script 01 would not take it
        kinds |= {c.kind for c in criteria}
        right += item["rewards"][0] if n == 1 else met.index(max(met)) == 0
    assert kinds == set(world.KINDS)
    share = {1: 1 / 2 + 1 / 2 * 0.07, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4}[n]  # n = 1: right by intent or by luck; else the best comes first
    assert abs(right / 300 - share) < 0.12


def test_other_seeds_draw_other_items():
    assert len({json.dumps(world.draw_item(random.Random(seed), 2)) for seed in range(300)}) == 300


# ---- judgements ------------------------------------------------------------------------------------------------------------------------

QUERY = ("Make a packing list for the lake. It must mention rope. It should avoid cup. It could begin with tent. "
         "It must have at least 4 items.")
RESPONSES = ["Pack rope, tent, lamp, book.", "Take tent, cup."]
RECORD = {"query": QUERY, "responses": RESPONSES}
ALL = world.criteria_of(QUERY)


def judgement_of(named, binary=False):
    return world.judgement_text(named, [world.items_of(response) for response in RESPONSES], binary)


JUDGEMENT = judgement_of([(c, c.importance) for c in ALL])


def test_judgement_text_by_hand():
    # of 9: rope 3, no cup 2 and four items 3 make 8; tent first 1
    assert JUDGEMENT == (
        "Specific Criteria: must mention rope (weight 3); should avoid cup (weight 2); could begin with tent (weight 1); "
        "must have at least 4 items (weight 3).\n"
        "Analysis: Response 1 lists rope, tent, lamp, book: mention rope yes; avoid cup yes; begin with tent no; "
        "have at least 4 items yes; 8 of 9. "
        "Response 2 lists tent, cup: mention rope no; avoid cup no; begin with tent yes; have at least 4 items no; 1 of 9.\n"
        "Scores: \\boxed{9, 2}")


def test_review_text_by_hand():
    # asked for: rope 3, no cup 2, tent first 1, four items 3. Tent's weight is 2 too high, a lamp of weight 2 too much; cup 2 and items 3 are missing
    named = [(ALL[0], 3), (ALL[2], 3), (Criterion("mention", "lamp", 1), 2)]
    assert world.review_text(named, ALL, False) == "9 of 9 off; 2 of 4 named; wrong weights 1; not asked 1; scores stray."
    assert world.review_text([(c, c.importance) for c in ALL], ALL, True) == "0 of 9 off; 4 of 4 named; wrong weights 0; not asked 0; scores follow."


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("binary", [False, True])
def test_true_judgements_are_read_as_true(n, binary):
    rng, modal = random.Random(n), {3: "must", 2: "should", 1: "could"}
    for _ in range(100):
        item = world.draw_item(rng, n)
        criteria, lists = world.criteria_of(item["query"]), [world.items_of(response) for response in item["responses"]]
        named = [(c, c.importance) for c in rng.sample(criteria, rng.randint(1, len(criteria)))]
        text = world.judgement_text(named, lists, binary)
        scores = [world.score_of([c.holds(items) for c, _ in named], [w for _, w in named], binary) for items in lists]
        judgement = grm.read_judgement(text, n, binary)
        assert judgement.scores == scores and judgement.unreadable == ""
        assert judgement.principles == "; ".join(f"{modal[w]} {c.text} (weight {w})" for c, w in named) + "."
        assert judgement.critique.startswith("Response 1 lists ") and f"Response {n} lists " in judgement.critique
        found = read_judgements.read({**item, "output": text, "binary": binary})
        assert found["true verdicts"] == [1.0] * (n * len(named)) and found["right weights"] == [1.0] * len(named)
        assert found["consistent scores"] == [1.0]
        assert len(found["criteria named"]) == len(criteria) and sum(found["criteria named"]) == len(named)
        if len(named) == len(criteria):  # then the scores say what the rewards say
            if n == 1 and binary:
                assert grm.is_correct(scores, item["rewards"])
            elif n > 1 and not binary:
                assert grm.chance_of_best(scores, item["rewards"]) > 0


def test_one_flipped_verdict_is_one_false_verdict():
    for old, new in (("mention rope yes", "mention rope no"), ("begin with tent no", "begin with tent yes"), ("items no", "items yes")):
        assert JUDGEMENT.count(old) == 1
        found = read_judgements.read({**RECORD, "output": JUDGEMENT.replace(old, new)})
        assert sum(found["true verdicts"]) == 7 and len(found["true verdicts"]) == 8  # 2 responses by 4 criteria
        assert found["consistent scores"] == [0.0]  # each flip moves 1, 3 or 3 of 9 points of weight, and so the score
        assert found["right weights"] == [1.0] * 4


def test_named_criteria_and_weights():
    # "mention rope" as it should be, "begin with tent" too heavy, and one that nobody asked for
    named = [(ALL[0], 3), (ALL[2], 3), (Criterion("mention", "lamp", 1), 2)]
    found = read_judgements.read({**RECORD, "output": judgement_of(named)})
    assert found["asked for"] == [1, 1, 0] and found["criteria named"] == [1, 0, 1, 0]
    assert (found["must named"], found["should named"], found["could named"]) == ([1, 0], [0], [1])
    assert (found["avoid named"], found["others named"]) == ([0], [1, 1, 0])
    assert found["right weights"] == [1, 0] and found["true verdicts"] == [1] * 6 and found["consistent scores"] == [1]


def test_scores_that_do_not_follow():
    for old, new in (("{9, 2}", "{2, 9}"), ("{9, 2}", "{9}"), ("{9, 2}", "{9, 2, 2}"), ("tent (weight 1)", "tent (weight 9)"),
                     ("{9, 2}", "{9, 2} \\boxed{2, 9}")):
        assert read_judgements.read({**RECORD, "output": JUDGEMENT.replace(old, new)})["consistent scores"] == [0.0]
    assert read_judgements.read({**RECORD, "output": JUDGEMENT.replace("{9, 2}", "{2, 9} \\boxed{9, 2}")})["consistent scores"] == [1.0]
    assert read_judgements.read({**RECORD, "output": JUDGEMENT.replace("{9, 2}", "")})["consistent scores"] == []


def test_summary_and_its_standard_error():
    # verdicts: 8 of 8 true, and 1 of 2: share 9/10; residuals 8 - 7.2 and 1 - 1.8; sqrt(2 * (0.64 + 0.64)) / 10 = 0.16
    half = "Analysis: Response 1 lists rope: mention rope no. Response 2 lists tent: mention rope no.\nScores: \\boxed{1, 1}"
    figures = read_judgements.summary([{**RECORD, "output": JUDGEMENT}, {**RECORD, "query": f"{QUERY} ", "output": half}])
    assert figures["true verdicts"] == pytest.approx((0.9, 0.16, 10))
    # 4 of 4 and 0 of 4: share 1/2, residuals 2 and -2; sqrt(2 * 8) / 8
    assert figures["criteria named"] == pytest.approx((0.5, 0.5, 8))
    assert figures["right weights"] == pytest.approx((1.0, math.nan, 4), nan_ok=True)  # all of one judgement
    assert figures["consistent scores"] == pytest.approx((0.5, 0.5, 2))  # without weights nothing follows
    # three judgements of two queries, right in all, none and all of 4: share 2/3; of the first query 4 - 16/3, of the second 4 - 8/3
    figures = read_judgements.summary([{**RECORD, "query": query, "output": text} for query, text in
                                       ((QUERY, JUDGEMENT), (QUERY, half), (f"{QUERY} ", JUDGEMENT))])
    assert figures["criteria named"] == pytest.approx((2 / 3, math.sqrt(2 * (2 * (4 / 3) ** 2)) / 12, 12))
    assert read_judgements.summary([]) == {} and "true verdicts" not in read_judgements.summary([{**RECORD, "output": ""}])


ODD = ["have at least \u00b2 items yes", "mention \u00b2 yes", "have at least " + "9" * 5000 + " items no",
       "mention " + "9" * 5000 + " (weight 3)", "\\boxed{" + "9" * 5000 + "}", "\\boxed{ , , }", "mention rope (weight 0)",
       "Response 1 lists ", "Analysis:", "Scores:", "\ud800", "\0", "have at least rope items yes", "Response " + "9" * 5000 + " lists x",
       "yes", "no", "mention", "\u0664", " " * 5000]


def test_odd_text_never_raises():
    rng = random.Random(0)
    for i in range(1000):
        text = JUDGEMENT
        for _ in range(rng.randrange(1, 5)):
            at, to = rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)
            text = rng.choice([text[:at], text[:at] + rng.choice(ODD) + text[at:], text[:at] + text[min(at, to):],
                               text.replace(rng.choice(["rope", "yes", "4", "3", "9, 2"]), rng.choice(ODD))])
        found = read_judgements.read({"query": rng.choice([QUERY, text]), "responses": rng.choice([RESPONSES, [text], ["."], []]),
                                      "output": text})
        assert set(found) == {"true verdicts", "asked for", "criteria named", "must named", "should named", "could named", "avoid named",
                              "others named", "right weights", "consistent scores"}
        assert all(value in (0.0, 1.0) for values in found.values() for value in values)
    for odd in ODD:
        found = read_judgements.read({**RECORD, "output": JUDGEMENT.replace("mention rope yes", f"mention rope yes; {odd}; ")})
        assert sum(found["true verdicts"]) >= 1  # what stands around it is still read


def test_command(tmp_path, capsys, monkeypatch):
    file = tmp_path / "judgements.jsonl"
    file.write_text(json.dumps({**RECORD, "output": JUDGEMENT}) + "\n\n" + json.dumps({**RECORD, "query": f"{QUERY} ", "output": ""}) + "\n")
    monkeypatch.setattr(sys, "argv", ["read_judgements.py", str(file)])
    read_judgements.main()
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == f"{file}: 2 judgements"
    assert "  true verdicts        100.0 +-  nan %  of 8" in lines and "  criteria named        50.0 +- 50.0 %  of 8" in lines
    for bad in ("{}", "[]", '{"query": "q", "responses": ["r"], "output": null}', "{"):
        file.write_text(bad)
        with pytest.raises(SystemExit, match="^error: .*not a file of judgements"):
            read_judgements.main()
