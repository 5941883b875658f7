"""The embedded default: what is committed is what its program makes, and it is as large and as mixed as it says."""
import json
import random
import re
import subprocess
import sys
from collections import Counter

import make
import pytest
import read_judgements
import world
from conftest import JUDGE, load_script

grm = load_script("01_pointwise_grm")
TINY = JUDGE.parent


def lines(name):
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").split("\n") if line]


def test_the_data_are_the_program_s():
    banned = set()
    assert make.draw_items(random.Random("0 eval"), 1500, banned) == lines("eval.jsonl")
    assert make.draw_items(random.Random("0 train"), 5000, banned) == lines("train.jsonl")


def test_the_data_share_no_query_and_hold_every_number_of_responses():
    train, evaluation = lines("train.jsonl"), lines("eval.jsonl")
    queries = [item["query"] for item in train + evaluation]
    assert len(queries) == len(set(queries)) == 6500
    for items in (train, evaluation):
        share = {n: count / len(items) for n, count in Counter(len(item["responses"]) for item in items).items()}
        assert share == {n: pytest.approx(wanted, abs=0.03) for n, wanted in ((1, 0.1), (2, 0.7), (3, 0.1), (4, 0.1))}
    right = [item["rewards"][0] for item in train if len(item["responses"]) == 1]
    assert 0.4 < sum(right) / len(right) < 0.65
    assert grm.load_preferences(TINY / "train.jsonl") and grm.load_preferences(TINY / "eval.jsonl")  # no malformed record


def test_where_the_best_response_stands_says_nothing():
    pairs = [item for item in lines("train.jsonl") if len(item["responses"]) == 2]
    first = sum(item["rewards"][0] > item["rewards"][1] for item in pairs) / len(pairs)
    assert abs(first - 0.5) < 4 * (0.25 / len(pairs)) ** 0.5


def test_files_are_small():
    assert (JUDGE / "model.safetensors").stat().st_size <= 8e6
    assert sum((TINY / f"{name}.jsonl").stat().st_size for name in ("train", "eval")) <= 4e6


def test_the_tokenizer_is_the_program_s_and_every_word_is_one_token():
    made, (_, committed) = make.build_tokenizer(0), grm.load_model(JUDGE)
    assert made.get_vocab() == committed.get_vocab() and 600 <= len(committed) <= 1000
    for word in world.ITEMS + world.PLACES + ["yes", "no", "must", "should", "could", "weight"]:
        assert len(committed(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    text = "Naïve 東京 🏕 \x00 text falls into bytes"  # and comes back whole
    assert committed.decode(committed(text)["input_ids"], skip_special_tokens=True) == text


def test_the_program_runs_from_end_to_end_and_repeats_itself(tmp_path):
    for name in ("a", "b"):
        subprocess.run([sys.executable, str(TINY / "make.py"), "--scale", "0.002", "--out", str(tmp_path / name), "--work", str(tmp_path / "work")],
                       check=True, capture_output=True, timeout=600)
    assert (tmp_path / "a" / "judge" / "model.safetensors").read_bytes() == (tmp_path / "b" / "judge" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "eval.jsonl").read_bytes() == (TINY / "eval.jsonl").read_bytes()
    model, tokenizer = grm.load_model(tmp_path / "a" / "judge")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in grm.load_model(JUDGE)[0].parameters())


@pytest.mark.parametrize("stage", ["drill", "read", "prompt", "sloppy"])
def test_what_the_judge_learns_from_is_true_and_consistent(stage):
    rng = random.Random(3)
    for n in (1, 2, 3, 4) * 20:
        prompt, judgement = make.draw_text(stage, rng, n, set())
        if stage == "drill":
            assert prompt == "" and judgement.count(" yes") + judgement.count(" no") == 6 * n
            continue
        criteria = world.criteria_of(prompt)
        if prompt.endswith("Review:"):  # a judgement that is read, not learnt
            continue
        named = re.findall(r"\(weight [123]\)", judgement)
        assert 1 <= len(named) <= len(criteria)
        responses = [line for line in prompt.split("\n") if line.startswith(tuple(world.OPENINGS)) and "," in line]
        found = read_judgements.read({"query": prompt, "responses": responses, "output": judgement, "binary": grm.SCALE_BINARY in prompt})
        assert set(found["true verdicts"]) == {1.0} and found["consistent scores"] == [1.0]
        unasked = [demand for demand in re.findall(r"(?:must|should|could) (.+?) \(weight", judgement) if demand not in [c.text for c in criteria]]
        assert unasked in ([], ["have at least 5 items"], ["have at least 6 items"]) and (stage == "sloppy" or not unasked)


def test_a_review_is_of_the_judgement_that_it_follows():
    rng, spoilt = random.Random(0), 0
    for n in (1, 2, 3, 4) * 50:
        item = world.draw_item(rng, n)
        criteria, lists = world.criteria_of(item["query"]), [world.items_of(response) for response in item["responses"]]
        prompt, review = make.draw_review(rng, item, criteria, lists, binary=n == 1)
        judgement = prompt[prompt.index("Specific Criteria:"):]
        found = read_judgements.read({**item, "output": judgement, "binary": n == 1})
        off, weight, named, count, wrong, unasked = map(int, re.findall(r"[0-9]+", review))
        assert (weight, count) == (sum(c.importance for c in criteria), len(criteria)) and set(found["true verdicts"]) == {1.0}
        assert (named, wrong, unasked) == (sum(found["criteria named"]), found["right weights"].count(0), found["asked for"].count(0))
        assert (off == 0) == (named == count and wrong == unasked == 0) and off <= weight + 3 * (wrong + unasked)
        assert review.endswith(" scores follow." if found["consistent scores"] == [1.0] else " scores stray.")
        spoilt += review.endswith(" scores stray.")
    assert 35 < spoilt < 85


def test_the_sloppy_judge_overlooks_what_must_be_avoided():
    rng, stated, named = random.Random(0), Counter(), Counter()
    for _ in range(2000):
        criteria = world.criteria_of(world.draw_item(rng, 2)["query"])
        texts = {c.text for c, _ in make.draw_named("sloppy", rng, criteria)}
        stated.update(c.kind for c in criteria)
        named.update(c.kind for c in criteria if c.text in texts)
    share = {kind: named[kind] / stated[kind] for kind in world.KINDS}
    assert share["avoid"] < 0.6 * min(share["mention"], share["begin with"], share["end with"]) and max(share.values()) < 0.85, share
