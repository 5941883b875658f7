"""Step 5: what the meta RM reads and learns, guided votes by hand, and that it loads in peft."""

import itertools
import json
import math
import random
from dataclasses import asdict
from functools import partial

import peft
import pytest
import torch
from conftest import JUDGE, load_script
from test_step2 import RIGHT, WRONG, judged, options, trained
from transformers import AutoModelForSequenceClassification

grm, meta = load_script("01_pointwise_grm"), load_script("05_metarm")
NAN, LOW = math.nan, -math.inf
TEXTS = [[5, 6, 7], [8] * 150, [9, 10], list(range(3, 100))]


@pytest.fixture(scope="module")
def meta_rm():
    """A meta RM with weights that are not zero, and its tokenizer."""
    args = options(JUDGE, quantize="none", dtype="float32", lora_r=4)
    model, tokenizer = meta.meta_model(str(JUDGE), args)
    assert all("lora_" in name or "score" in name for name in trained(model))
    with torch.no_grad():
        assert not meta.meta_rewards(model, TEXTS).any()  # it begins without an opinion
        for parameter in trained(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval(), tokenizer


def test_it_reads_the_judgement_but_neither_task_nor_truth():
    one = judged(WRONG, (0.25, 0.75), query="Pack a bag.")
    one.output = "Analysis: fine.\nScores: \\boxed{7, 3}"
    text = meta.meta_prompt(one)
    for part in ("Pack a bag.", "response 0", "response 1", one.output):
        assert text.count(part) == 1
    assert not [part for part in ("0.75", meta.TASK[:20], meta.SCALE[:20]) if part in text]
    one.rewards, one.correct = [1.0, 0.0], True
    assert meta.meta_prompt(one) == text


def test_meta_rewards_do_not_depend_on_padding(meta_rm):
    with torch.no_grad():
        together = meta.meta_rewards(meta_rm[0], TEXTS)
        alone = [meta.meta_rewards(meta_rm[0], [text]) for text in TEXTS]
        changed = meta.meta_rewards(meta_rm[0], [[*text[:-1], 99] for text in TEXTS])
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert ((together - changed).abs()[:3] > 1e-3).all() and together.std() > 0.1


def test_meta_loss_by_hand(meta_rm, monkeypatch):
    monkeypatch.setattr(meta, "meta_rewards", lambda model, texts: torch.tensor([2.0, -1.0, 0.5]))
    examples = [meta.Example([1], [label]) for label in (1, 1, 0)]
    right, wrong, other = (1 / (1 + math.exp(-logit)) for logit in (2, -1, 0.5))
    expected = -math.log(right) - math.log(wrong) - math.log(1 - other)
    assert meta.meta_losses(meta_rm[0], examples).sum().item() == pytest.approx(expected, rel=1e-5)


def test_trust_keeps_places_and_distrusts_what_cannot_be_read(meta_rm):
    model, tokenizer = meta_rm
    samples = [judged(s, query=q) for s, q in ((RIGHT, "a"), (None, "b"), (WRONG, "c d" * 200))]
    ids = [tokenizer(meta.meta_prompt(one))["input_ids"] for one in samples]
    with torch.no_grad():
        first, _, third = (meta.meta_rewards(model, [one]).item() for one in ids)
    assert meta.trust(model, tokenizer, samples) == pytest.approx([first, LOW, third], rel=1e-3)


def test_guided_votes_and_the_oracle_by_hand():
    scores = torch.tensor([[[5, 6], [9, 1], [4, 8], [NAN, NAN]]], dtype=torch.float64)
    rewards = torch.tensor([[0.3, -2.0, 1.5, LOW]], dtype=torch.float64)
    correct = torch.tensor([[True, False, True, False]])
    pairs, every = [[0, 1], [2, 3]], [[3, 1, 0, 2]]  # samples of subsets
    guided = meta.vote_guided(scores[:, pairs], rewards[:, pairs], 1)
    assert guided.tolist() == [[[5, 6], [4, 8]]]
    for k_meta, expected in ((1, [4, 8]), (2, [9, 14]), (3, [18, 15]), (4, [18, 15])):
        found = meta.vote_guided(scores[:, every], rewards[:, every], k_meta)
        assert found.tolist() == [[expected]]
    assert meta.vote_oracle(scores[:, every], correct[:, every]).tolist() == [[[9, 14]]]
    oracle = meta.vote_oracle(scores[:, pairs], ~correct[:, pairs])
    assert oracle.tolist() == [[[9, 1], [0, 0]]]
    nothing = meta.vote_oracle(scores[:, pairs], correct[:, pairs] & False)
    assert nothing.tolist() == [[[14, 7], [4, 8]]]


def test_a_perfect_meta_rm_beats_voting():
    chance = random.Random(1)
    drawn = [chance.choices(range(1, 11), k=3) for _ in range(320)]
    samples = [judged(s, (0, 2, 1), i // 8, f"q{i // 8}") for i, s in enumerate(drawn)]
    perfect = meta.guide(samples, [float(one.correct) for one in samples], 8, 0.5)
    assert list(perfect) == "1 of 1,1 of 2,2 of 4,4 of 8,1 of 8,2 of 8,1 of 2 over 8".split(",")
    for title, row in perfect.items():
        mean = {name: of.mean().item() for name, of in row.items()}
        assert mean["gain"] == pytest.approx(mean["guided"] - mean["voting"], abs=1e-9)
        assert mean["gain"] >= 0 and mean["oracle"] >= mean["voting"] and len(row["gain"]) == 40
        assert mean["gain"] > 0.05 or title == "1 of 1"
    exact = sum(grm.chance_of_best(one.scores, one.rewards) for one in samples) / 320
    assert perfect["1 of 1"]["voting"].mean().item() == pytest.approx(exact)
    every = meta.guide(samples, [0.0] * 320, 8, 1.0)["8 of 8"]
    assert every["guided"].equal(every["voting"])
    assert every["voting"].equal(perfect["4 of 8"]["voting"])


def test_auc_within_items_by_hand():
    scores = [RIGHT, WRONG, RIGHT, WRONG, RIGHT, RIGHT, RIGHT, WRONG, None, WRONG, WRONG, WRONG]
    samples = [judged(s, number=i // 3, query=f"q{i // 3}") for i, s in enumerate(scores)]
    rewards = [2.0, 1.0, 0.0, 3.0, 4.0, 9.0, 1.0, 1.0, LOW, 1.0, 2.0, 3.0]
    found = meta.auc_within(samples, rewards, 3)  # one pair of two; both; a tie; only wrong ones
    assert found["mean"] == pytest.approx((0.5 + 1 + 0.5) / 3) and found["n"] == 3


def test_held_out_is_the_same_tenth_in_every_process():
    numbers = [i for i in range(1000) if meta.held_out(f"query {i}")]
    assert len(numbers) == 88 and numbers[:6] == [15, 20, 77, 94, 102, 103]


def test_a_saved_meta_rm_loads_in_peft(meta_rm, tmp_path):
    run = meta.Run(options(tmp_path))
    meta.train(*meta_rm, 0, itertools.repeat, options(tmp_path), run)
    kind = {"num_labels": 1, "dtype": torch.float32}
    base = AutoModelForSequenceClassification.from_pretrained(JUDGE, **kind)
    again = peft.PeftModel.from_pretrained(base, run.folder / "model").eval()
    for text in TEXTS:
        with torch.no_grad():
            logit = again(input_ids=torch.tensor([text])).logits[0]
            torch.testing.assert_close(logit, meta.meta_rewards(meta_rm[0], [text]))


def test_a_meta_rm_in_bfloat16_is_trained_and_asked(tmp_path):
    found, samples = [], [judged(RIGHT), judged(WRONG, query="another")]
    for dtype in ("float32", "bfloat16"):
        args = options(tmp_path, quantize="none", dtype=dtype, lora_r=4, lr=1e-2)
        model, tokenizer = meta.meta_model(str(JUDGE), args)
        assert {p.dtype for p in trained(model).values()} == {torch.float32}
        examples = [meta.Example(text, [i % 2]) for i, text in enumerate(TEXTS)]
        gradients = partial(meta.descend, model, examples, meta.meta_losses, 4, 0)
        meta.train(model, tokenizer, 3, gradients, args, meta.Run(args))
        found.append(meta.trust(model, tokenizer, samples))
    assert found[1] == pytest.approx(found[0], abs=0.1) and min(map(abs, found[0])) > 0


def test_what_it_learns_from_has_no_hint_and_no_query_that_is_measured(tmp_path, capsys):
    known = [judged(RIGHT, query="a"), judged(WRONG, query="b"), judged(None, query="c")]
    known += [judged(RIGHT, query="d", hint="It is 2."), judged(WRONG, query="measured")]
    path = tmp_path / "trajectories.jsonl"
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in known))
    found = meta.judgements_to_learn([str(path)], {"measured"})
    assert [one.query for one in found] == ["a", "b"]
    assert "1 right, 1 wrong judgements; 1 of measured" in capsys.readouterr().out
    with pytest.raises(meta.UserError):
        meta.judgements_to_learn([str(path)], {"a"})
