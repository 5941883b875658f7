"""The embedded world by hand: its truth, its items, what a judge writes, and who reads it."""

import json
import math
import random
import sys

import pytest
import read_judgements
import sees
import world
from conftest import load_script
from world import Criterion

grm = load_script("01_pointwise_grm")
LIST = ["rope", "tent", "lamp", "book"]
QUERY = (
    "Make a packing list for the lake. It must mention rope. It should avoid cup. "
    "It could begin with tent. It must have at least 4 items."
)
RESPONSES = ["Pack rope, tent, lamp, book.", "Take tent, cup."]
RECORD = {"query": QUERY, "responses": RESPONSES, "order": [0, 1], "binary": False}
ALL = world.criteria_of(QUERY)


@pytest.mark.parametrize(
    "kind, true, false",
    [
        ("mention", ["tent", "rope"], ["drum", "ten"]),
        ("avoid", ["drum"], ["tent"]),
        ("begin with", ["rope"], ["tent", "book"]),
        ("end with", ["book"], ["lamp", "rope"]),
        ("have at least", ["3", "4"], ["5", "rope"]),
    ],
)
def test_holds(kind, true, false):
    for word in true + false:
        assert Criterion(kind, word, 1).holds(LIST) is (word in true)
        assert Criterion(kind, word, 1).holds([]) is (kind == "avoid")


def test_reading_a_request_and_a_list():
    texts = ["mention rope", "avoid cup", "begin with tent", "have at least 4 items"]
    assert [c.text for c in ALL] == texts and [c.importance for c in ALL] == [3, 2, 1, 3]
    assert world.criteria_of("Name a prime.") == []
    assert [world.items_of(text) for text in RESPONSES] == [LIST, ["tent", "cup"]]
    assert world.items_of(" Take rope.\n") == ["rope"] and world.items_of("Pack.") == []
    assert world.met_weight(ALL, LIST) == 8  # rope 3, no cup 2, four items 3
    assert world.met_weight(ALL, ["tent", "cup", "rope"]) == 4  # rope 3, tent first 1


@pytest.mark.parametrize(
    "verdicts, weights, score",
    [
        ([True, True], [3, 1], 10),
        ([False, False], [3, 1], 1),
        ([True, False], [3, 1], 8),  # 1 + round(6.75)
        ([False, True], [3, 1], 3),  # 1 + round(2.25)
        ([True, False, True], [3, 2, 1], 7),
        ([True, False], [2, 2], 5),  # 1 + round(4.5), and Python rounds a half to the even number
    ],
)
def test_score_of(verdicts, weights, score):
    assert world.score_of(verdicts, weights, False) == score
    assert world.score_of(verdicts, weights, True) == all(verdicts)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_items_have_the_truth_that_their_text_states(n):
    kinds, right, modal = set(), 0, {3: "must", 2: "should", 1: "could"}
    for seed in range(300):
        item = world.draw_item(random.Random(seed), n)
        assert item == world.draw_item(random.Random(seed), n) and item["subset"] == f"n={n}"
        criteria = world.criteria_of(item["query"])
        lists = [world.items_of(response) for response in item["responses"]]
        assert 3 <= len(criteria) <= 5 and len({c.argument for c in criteria}) == len(criteria)
        stated = " ".join(f"It {modal[c.importance]} {c.text}." for c in criteria)
        assert item["query"].split(". ", 1)[1] == stated
        for response, items in zip(item["responses"], lists):
            assert response.split(" ", 1)[1] == ", ".join(items) + "."
            assert 2 <= len(items) == len(set(items)) <= 6 and set(items) <= set(world.ITEMS)
        met = [sum(c.importance for c in criteria if c.holds(items)) for items in lists]
        if n == 1:
            assert item["rewards"] == [int(met[0] == sum(c.importance for c in criteria))]
        else:
            assert item["rewards"] == met and len({tuple(items) for items in lists}) == n
            best, second = sorted(met, reverse=True)[:2]
            assert 1 <= best - second <= 2  # close: that is what the world is about
        grm.Judgement(**item)  # raises UserError if script 01 would not take it
        kinds |= {c.kind for c in criteria}
        right += item["rewards"][0] if n == 1 else met.index(max(met)) == 0
    assert kinds == set(world.KINDS)
    share = 1 / 2 + 1 / 2 * 0.07 if n == 1 else 1 / n  # n = 1: by intent or by luck
    assert abs(right / 300 - share) < 0.12


def judgement_of(named, lists=None, binary=False):
    lists = lists or [world.items_of(response) for response in RESPONSES]
    return world.judgement_text(named, lists, binary)


JUDGEMENT = judgement_of([(c, c.importance) for c in ALL])


def read(old: str = "", new: str = "") -> dict:
    """What read_judgements finds in the judgement in which `old` is replaced."""
    assert not old or JUDGEMENT.count(old) == 1
    return read_judgements.read({**RECORD, "output": JUDGEMENT.replace(old, new)})


def test_judgement_text_by_hand():
    # of 9: rope 3, no cup 2 and four items 3 make 8; tent first 1
    assert JUDGEMENT == (
        "Specific Criteria: must mention rope (weight 3); should avoid cup (weight 2); "
        "could begin with tent (weight 1); must have at least 4 items (weight 3).\n"
        "Analysis: Response 1 lists rope, tent, lamp, book: mention rope yes; avoid cup yes; "
        "begin with tent no; have at least 4 items yes; 8 of 9. "
        "Response 2 lists tent, cup: mention rope no; avoid cup no; begin with tent yes; "
        "have at least 4 items no; 1 of 9.\n"
        "Scores: \\boxed{9, 2}"
    )


def test_review_text_by_hand():
    # tent's weight is 2 too high, a lamp of weight 2 too much; cup 2 and items 3 are missing
    named = [(ALL[0], 3), (ALL[2], 3), (Criterion("mention", "lamp", 1), 2)]
    note = "9 of 9 off; 2 of 4 named; wrong weights 1; not asked 1; scores stray."
    assert world.review_text(named, ALL, False) == note
    note = "0 of 9 off; 4 of 4 named; wrong weights 0; not asked 0; scores follow."
    assert world.review_text([(c, c.importance) for c in ALL], ALL, True) == note


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("binary", [False, True])
def test_true_judgements_are_read_as_true(n, binary):
    rng = random.Random(n)
    for _ in range(100):
        item = world.draw_item(rng, n)
        criteria = world.criteria_of(item["query"])
        lists = [world.items_of(response) for response in item["responses"]]
        named = rng.sample(criteria, rng.randint(1, len(criteria)))
        text = judgement_of([(c, c.importance) for c in named], lists, binary)
        weights = [c.importance for c in named]
        scores = [world.score_of([c.holds(of) for c in named], weights, binary) for of in lists]
        assert grm.read_scores(text, n, binary) == (scores, "")
        found = read_judgements.read({**item, "output": text, "binary": binary})
        assert found["true verdicts"] == [1.0] * (n * len(named))
        assert found["right weights"] == [1.0] * len(named) and found["consistent scores"] == [1.0]
        assert len(found["criteria named"]) == len(criteria)
        assert sum(found["criteria named"]) == len(named)


def test_one_flipped_verdict_is_one_false_verdict():
    for word in ("mention rope yes", "begin with tent no", "items no"):
        *_, said = word.split()
        found = read(word, word.replace(said, "yes" if said == "no" else "no"))
        assert sorted(found["true verdicts"]) == [0.0] + [1.0] * 7  # 2 responses by 4 criteria
        assert found["consistent scores"] == [0.0] and found["right weights"] == [1.0] * 4


def test_near_misses():
    # tent should begin: response 1 has it in the second place, response 2 in the first
    assert read()["near misses misread"] == [0.0]
    assert read("begin with tent no", "begin with tent yes")["near misses misread"] == [1.0]
    for kind, word, near in (("end with", "tent", True), ("begin with", "lamp", True),
                             ("end with", "book", False), ("mention", "tent", False)):  # fmt: skip
        assert read_judgements.near_miss(Criterion(kind, word, 0), LIST) == near


def test_named_criteria_and_weights():
    # "mention rope" as it should be, "begin with tent" too heavy, and one that nobody asked for
    named = [(ALL[0], 3), (ALL[2], 3), (Criterion("mention", "lamp", 1), 2)]
    found = read_judgements.read({**RECORD, "output": judgement_of(named)})
    assert found["asked for"] == [1, 1, 0] and found["criteria named"] == [1, 0, 1, 0]
    by_modal = [found[f"{modal} named"] for modal in ("must", "should", "could")]
    assert by_modal == [[1, 0], [0], [1]]
    assert (found["avoid named"], found["others named"]) == ([0], [1, 1, 0])
    assert found["right weights"] == [1, 0] and found["true verdicts"] == [1] * 6


def test_scores_that_do_not_follow():
    for wrong in ("{2, 9}", "{9}", "{9, 2, 2}", "{2, 9} \\boxed{9, 2}"):
        assert read("{9, 2}", wrong)["consistent scores"] == [0.0]
    assert read("tent (weight 1)", "tent (weight 9)")["consistent scores"] == [0.0]
    assert read("{9, 2}", "{9, 2} \\boxed{2, 9}")["consistent scores"] == [1.0]
    assert read("{9, 2}", "")["consistent scores"] == []


HALF = (
    "Analysis: Response 1 lists rope: mention rope no. Response 2 lists tent: mention rope no."
    "\nScores: \\boxed{1, 1}"
)


def test_summary_and_its_standard_error():
    other = {**RECORD, "query": f"{QUERY} "}
    figures = read_judgements.summary([{**RECORD, "output": JUDGEMENT}, {**other, "output": HALF}])
    # 8 of 8 true, and 1 of 2: residuals 8 - 7.2 and 1 - 1.8; sqrt(2 * (0.64 + 0.64)) / 10
    assert figures["true verdicts"] == pytest.approx((0.9, 0.16, 10))
    # 4 of 4 and 0 of 4: residuals 2 and -2; sqrt(2 * 8) / 8
    assert figures["criteria named"] == pytest.approx((0.5, 0.5, 8))
    assert figures["right weights"] == pytest.approx((1.0, math.nan, 4), nan_ok=True)
    three = [{**RECORD, "output": text} for text in (JUDGEMENT, HALF)]
    figures = read_judgements.summary([*three, {**other, "output": JUDGEMENT}])
    # of two queries: all of 4 and none of 4, all of 4; residuals 4 - 16/3 and 4 - 8/3
    error = math.sqrt(2 * (2 * (4 / 3) ** 2)) / 12
    assert figures["criteria named"] == pytest.approx((2 / 3, error, 12))
    assert read_judgements.summary([]) == {}


ODD = ["have at least \u00b2 items yes", "mention \u00b2 yes", "mention rope (weight 0)", "\ud800"]
ODD += ["Response 1 lists ", "Analysis:", "Scores:", "have at least rope items yes", "\0", "no"]
ODD += ["\\boxed{ , , }", "\u0664", " " * 5000]
NINES = "have at least {} items no", "mention {} (weight 3)", "\\boxed{{{}}}", "Response {} lists x"
ODD += [text.format("9" * 5000) for text in NINES]


def test_odd_text_never_raises():
    rng = random.Random(0)
    for _ in range(1000):
        text = JUDGEMENT
        for _ in range(rng.randrange(1, 5)):
            at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            word, odd = rng.choice(["rope", "yes", "4", "3", "9, 2"]), rng.choice(ODD)
            changed = text[:at] + odd + text[at:], text[:at] + text[to:], text.replace(word, odd)
            text = rng.choice(changed)
        responses = rng.choice([RESPONSES, [text], ["."], []])
        record = {"query": rng.choice([QUERY, text]), "responses": responses, "output": text}
        found = read_judgements.read(record)
        assert list(found) == read_judgements.FIGURES
        assert all(value in (0.0, 1.0) for values in found.values() for value in values)
    for odd in ODD:  # what stands around it is still read
        text = JUDGEMENT.replace("mention rope yes", f"mention rope yes; {odd}; ")
        assert sum(read_judgements.read({**RECORD, "output": text})["true verdicts"]) >= 1


def test_the_command_of_read_judgements(tmp_path, capsys, monkeypatch):
    file = tmp_path / "judgements.jsonl"
    records = {**RECORD, "output": JUDGEMENT}, {**RECORD, "query": f"{QUERY} ", "output": ""}
    file.write_text("\n\n".join(map(json.dumps, records)))
    monkeypatch.setattr(sys, "argv", ["read_judgements.py", str(file)])
    read_judgements.main()
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == f"{file}: 2 judgements"
    assert "  true verdicts        100.0 +-  nan %  of 8" in lines
    for bad in ("{}", "[]", '{"query": "q", "responses": ["r"], "output": null}', "{"):
        file.write_text(bad)
        with pytest.raises(SystemExit, match="^error: .*no judgements"):
            read_judgements.main()


def test_what_a_meta_reward_sees(tmp_path, capsys, monkeypatch):
    # of one item: the whole judgement, one without "avoid cup", one whose scores do not follow
    part = judgement_of([(c, c.importance) for c in ALL if c.kind != "avoid"])
    samples = [{**RECORD, "output": text, "correct": True} for text in (JUDGEMENT, part)]
    samples.append({**samples[0], "output": JUDGEMENT.replace("{9, 2}", "{2, 9}")})
    samples[-1]["correct"] = False
    table = sees.what_it_sees(samples, [3.0, 1.0, 5.0])  # standard deviation sqrt(8 / 3)
    spread = math.sqrt(8 / 3)
    gain = {what: row["mean"] * spread for what, (_, row) in table.items() if row["n"]}
    assert gain == pytest.approx({"what to avoid is named": 3, "scores follow": -3,
                                  "scores are correct (Eq. 10)": -3})  # fmt: skip
    assert table["scores follow"][0] == pytest.approx(1 / 3)

    single = {**RECORD, "responses": RESPONSES[:1], "output": ""}
    files = [tmp_path / "samples.jsonl", tmp_path / "rewards.jsonl"]
    files[0].write_text("\n".join(map(json.dumps, [single, *samples])))
    files[1].write_text('{"reward": 3.0}\n{"reward": 1.0}\n{"reward": -Infinity}\n')
    monkeypatch.setattr(sys, "argv", ["sees.py", *map(str, files)])
    sees.main()
    told = capsys.readouterr().out
    assert "what to avoid is named" in told and "+2.00" in told and told.count("nan") >= 1
