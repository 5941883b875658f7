"""The embedded default is what its program makes, and as large and as mixed as it says."""

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


def items_in(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]


def test_the_data_are_the_program_s():
    banned = set()
    assert make.draw_items(random.Random("0 eval"), 1500, banned) == items_in("eval.jsonl")
    assert make.draw_items(random.Random("0 train"), 5000, banned) == items_in("train.jsonl")


def test_the_data_share_no_query_and_hold_every_number_of_responses():
    train, evaluation = items_in("train.jsonl"), items_in("eval.jsonl")
    queries = [item["query"] for item in train + evaluation]
    assert len(queries) == len(set(queries)) == 6500
    for items in (train, evaluation):
        counts = Counter(len(item["responses"]) for item in items)
        share = {n: counts[n] / len(items) for n in sorted(counts)}
        assert share == pytest.approx({1: 0.1, 2: 0.7, 3: 0.1, 4: 0.1}, abs=0.03)
    right = [item["rewards"][0] for item in train if len(item["responses"]) == 1]
    assert 0.4 < sum(right) / len(right) < 0.65
    assert len(grm.read_lines(TINY / "train.jsonl")) == 5000  # none is malformed


def test_where_the_best_response_stands_says_nothing():
    pairs = [item for item in items_in("train.jsonl") if len(item["responses"]) == 2]
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


def test_the_program_runs_from_end_to_end_and_makes_the_same_data(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, TINY / "make.py", "--scale", "0.002", "--out", out]
    done = subprocess.run([*command, "--work", tmp_path / "work"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("eval.jsonl", "train.jsonl"):
        assert (out / name).read_bytes() == (TINY / name).read_bytes()
    sizes = [
        sum(p.numel() for p in grm.load_model(of)[0].parameters()) for of in (out / "judge", JUDGE)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("stage", ["drill", "read", "prompt", "sloppy"])
def test_what_the_judge_learns_from_is_true_and_consistent(stage):
    rng = random.Random(3)
    for n in (1, 2, 3, 4) * 20:
        prompt, judgement = make.draw_text(stage, rng, n, set())
        if stage == "drill":
            assert prompt == "" and judgement.count(" yes") + judgement.count(" no") == 6 * n
        if stage == "drill" or prompt.endswith("Review:"):  # a judgement that is read, not learnt
            continue
        criteria = [criterion.text for criterion in world.criteria_of(prompt)]
        starts = tuple(world.OPENINGS)
        lists = [line for line in prompt.split("\n") if line.startswith(starts) and "," in line]
        record = {"query": prompt, "responses": lists, "output": judgement}
        found = read_judgements.read(record | {"binary": grm.BINARY in prompt})
        assert set(found["true verdicts"]) == {1.0} and found["consistent scores"] == [1.0]
        named = re.findall(r"(?:must|should|could) (.+?) \(weight [123]\)", judgement)
        assert 1 <= len(named) <= len(criteria)
        unasked = [text for text in named if text not in criteria]
        assert unasked in ([], ["have at least 5 items"], ["have at least 6 items"])
        assert stage == "sloppy" or not unasked


def test_a_review_is_of_the_judgement_that_it_follows():
    rng, spoilt = random.Random(0), 0
    for n in (1, 2, 3, 4) * 50:
        item = world.draw_item(rng, n)
        criteria = world.criteria_of(item["query"])
        lists = [world.items_of(response) for response in item["responses"]]
        prompt, review = make.draw_review(rng, item, criteria, lists, binary=n == 1)
        judgement = prompt[prompt.index("Specific Criteria:") :].removesuffix("\nReview:")
        found = read_judgements.read({**item, "output": judgement, "binary": n == 1})
        off, weight, named, count, wrong, unasked = map(int, re.findall(r"[0-9]+", review))
        assert weight == sum(criterion.importance for criterion in criteria)
        assert count == len(criteria) and named == sum(found["criteria named"])
        faults = found["right weights"].count(0), found["asked for"].count(0)
        assert (wrong, unasked) == faults and set(found["true verdicts"]) == {1.0}
        assert (off == 0) == (named == count and wrong == unasked == 0)
        assert off <= weight + 3 * (wrong + unasked)
        stray = found["consistent scores"] != [1.0]
        assert review.endswith(f" scores {'stray' if stray else 'follow'}.")
        spoilt += stray
    assert 35 < spoilt < 85


def test_the_sloppy_judge_overlooks_what_must_be_avoided():
    rng, stated, named = random.Random(0), Counter(), Counter()
    for _ in range(2000):
        criteria = world.criteria_of(world.draw_item(rng, 2)["query"])
        texts = {criterion.text for criterion, _ in make.draw_named("sloppy", rng, criteria)}
        stated.update(criterion.kind for criterion in criteria)
        named.update(criterion.kind for criterion in criteria if criterion.text in texts)
    share = {kind: named[kind] / stated[kind] for kind in world.KINDS}
    others = min(share[kind] for kind in ("mention", "begin with", "end with"))
    assert share["avoid"] < 0.6 * others and max(share.values()) < 0.85, share
