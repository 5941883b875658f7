"""05_metarm.py: labels, guided votes and AUC against numbers worked by hand, that transformers and peft read the meta RM, that a killed run resumes
to the same weights, and what its user is told."""
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import JUDGE, cut_and_resume, load_script, refusal, run
from PIL import Image
from test_step2 import write_gemma_4
from transformers import AutoModelForSequenceClassification, AutoTokenizer

meta = load_script("05_metarm")
TRAIN = JUDGE.parent / "train.jsonl"
NAN, ABSENT = math.nan, -math.inf
OPTIONS = SimpleNamespace(model=str(JUDGE), quantize="none", lora_r=None, n_fresh=2, seed=0, max_new_tokens=160, batch_size=64, temperature=1.0,
                          lr=1e-3, epochs=1.0, warmup=0.1, train_batch=8, micro_tokens=2048, save_every=100)
TINY = ("--limit", 12, "--n-fresh", 2, "--eval-limit", 6, "--k", 4, "--max-new-tokens", 160, "--train-batch", 4, "--save-every", 1,
        "--batch-size", 64, "--validate", 0.2)
STEP = "05_metarm.py"


def options(**changed):
    return SimpleNamespace(**vars(OPTIONS) | changed)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def judged(item=0, scores=(2, 1), order=(0, 1), responses=("a", "b"), rewards=(1.0, 0.0), output="x", query="q"):
    """A trajectory; scores, responses and rewards in the order shown."""
    scores = scores and list(scores)
    return meta.Trajectory(item, query, list(responses), list(rewards), list(order), False, False, output=output, scores=scores,
                           correct=meta.is_correct(scores, list(rewards)))


def judgements(count):
    """Made-up judgements of real items, of many lengths."""
    shown = [meta.show(item, number, "s") for number, item in enumerate(meta.load_lines(TRAIN)[:count])]
    for number, t in enumerate(shown):
        t.scores = [number % 10 + 1] * len(t.responses)
        t.output = f"Specific Criteria: {'must mention rope (weight 3); ' * (number % 4)}\nScores: \\boxed{{{', '.join(map(str, t.scores))}}}"
    return shown


def test_auc_by_hand():
    # the right ones have 3 and 2, the wrong ones 1 and 2: of four pairs three are in order and one is a tie
    # right ones win 1 and 3/4, wrong ones lose 1 and 3/4: deviations of 1/8, over 2 of a kind; four clusters
    judged = [(3, True, "a", 1), (1, False, "b", 1), (2, True, "c", 1), (2, False, "d", 1)]
    assert meta.auc_of(judged) == pytest.approx((0.875, math.sqrt(4 / 3 * 4 * (1 / 16) ** 2)))
    assert meta.auc_of([]) == pytest.approx((NAN, NAN), nan_ok=True)


# two items with four samples each; the second has two responses, and its last sample cannot be read
SCORES = tensor([[[9, 2, 5], [4, 6, 1], [1, 7, 8], [3, 5, 6]], [[5, 6, ABSENT], [9, 1, ABSENT], [2, 8, ABSENT], [NAN, NAN, ABSENT]]])
REWARDS = tensor([[0.5, -1, 3, 2], [1, 2, 0, ABSENT]])
ALL = torch.arange(4).expand(2, 1, 4)


def test_guided_votes_by_hand():
    assert meta.vote_guided(SCORES, REWARDS, ALL, 1)[:, 0].tolist() == [[1, 7, 8], [9, 1, ABSENT]]
    assert meta.vote_guided(SCORES, REWARDS, ALL, 2)[:, 0].tolist() == [[4, 12, 14], [14, 7, ABSENT]]
    assert meta.vote_guided(SCORES, REWARDS, ALL, 4)[:, 0].tolist() == meta.vote_sum(SCORES).tolist()
    pairs = torch.tensor([[[0, 1], [2, 3]], [[3, 2], [1, 0]]])
    assert meta.vote_guided(SCORES, REWARDS, pairs, 1).tolist() == [[[9, 2, 5], [1, 7, 8]], [[2, 8, ABSENT], [9, 1, ABSENT]]]
    unreadable = meta.vote_guided(SCORES, REWARDS, torch.tensor([[[0]], [[3]]]), 1)
    assert unreadable.tolist() == [[[9, 2, 5]], [[0, 0, ABSENT]]]


def test_the_oracle_sums_what_is_correct_or_else_everything():
    correct = torch.tensor([[True, False, False, True], [False] * 4])
    assert meta.vote_oracle(SCORES, correct, ALL)[:, 0].tolist() == [[12, 7, 11], [16, 15, ABSENT]]


def test_figures_of_guided_voting_by_hand():
    items = [meta.Preference("p", ["a", "b"], [1, 0]), meta.Preference("single", ["a"], [1]), meta.Preference("q", ["a", "b"], [0, 1])]
    samples = [judged(0, (1, 9), query="p"), judged(0, (2, 1), query="p"), judged(1, (7,), (0,), "a", [1.0], query="single"),
               judged(1, None, (0,), "a", [1.0], query="single"),
               judged(2, (6, 5), (1, 0), "ba", [1.0, 0.0], query="q"), judged(2, (3, 3), query="q", rewards=[0.0, 1.0])]
    assert [t.correct for t in samples] == [False, True, False, False, True, False]
    result = meta.guide(items, samples, [-1, 1, 5, ABSENT, 2, 0], 2, 0.5)
    assert result["items"] == 2 and [(row["k"], row["k_meta"]) for row in result["curve"]] == [(1, 1), (2, 1)]
    one, two = result["curve"]
    # one sample is right in one of two for p, and in one and a tie of two for q; two summed: 3 to 10 for p, 8 to 9 for q
    assert one["unguided"][0] == one["guided"][0] == one["oracle"][0] == pytest.approx((0.5 + 0.75) / 2) and one["gain"] == [0, 0, 0]
    assert two["unguided"][0] == 0.5 and two["guided"][0] == two["oracle"][0] == 1
    assert two["gain"][0] == 0.5 and two["gain_se"] == pytest.approx(0.5)  # gains of 1 and 0
    assert [(row["k_meta"], row["guided"][0]) for row in result["by_k_meta"]] == [(1, 1), (2, 0.5)]
    # MetaRM@1 (here a share of a half of 1 is 1) against both summed
    assert result["few"]["k"] == 1 and result["few"]["gain"][0] == pytest.approx(0.625 - 0.5)
    assert result["auc"]["these samples"][0] == 1 and result["auc"]["two of the same item"][0] == 1
    # the more trusted half: right twice; the other: wrong, and a tie. Differences of 1 and 0.5
    assert result["alone"] == [(1, 0), pytest.approx((0.25, 0.25)), pytest.approx((0.75, 0.25))]
    assert result["auc"]["those without a tie at the top"][0] == 1
    text = meta.table_of_guided(result | {"auc": {"n held-out judgements": (0.7, 0.02)} | result["auc"]})
    assert "quarter of an item's: 100.0, 25.0 %; most minus least +75.0 +- 25.0" in text
    assert "70.0 +- 2.0" in text and "k = 2, k_meta = 1" in text and "MetaRM@1 against voting@2" in text and "+50.0 [" in text


def test_trusting_at_random_is_voting_over_fewer(tmp_path):
    rng = random.Random(0)
    items = [meta.Preference(str(i), ["a", "b"], [1, 0]) for i in range(60)]
    samples = [judged(i, (rng.randint(1, 10), rng.randint(1, 9)), query=str(i)) for i in range(60) for _ in range(8)]
    result = meta.guide(items, samples, [rng.random() for _ in samples], 8, 0.5)
    for few, many in zip(result["curve"], result["curve"][1:]):
        assert many["k_meta"] == few["k"] and abs(many["guided"][0] - few["unguided"][0]) < 0.06
    perfect = meta.guide(items, samples, [float(t.correct) for t in samples], 8, 0.5)
    assert perfect["curve"][-1]["guided"][0] > perfect["curve"][-1]["unguided"][0] and perfect["auc"]["these samples"] == (1, 0)
    meta.plot_guided(result, tmp_path / "a.png")
    assert min(Image.open(tmp_path / "a.png").size) > 500


def test_a_query_is_held_out_wherever_it_is_met():
    share = sum(meta.set_aside(f"query {i}", 0.2) for i in range(2000)) / 2000
    assert 0.17 < share < 0.23
    assert not any(meta.set_aside(f"query {i}", 0.1) and not meta.set_aside(f"query {i}", 0.2) for i in range(500))
    assert meta.set_aside([{"role": "user", "content": "a"}], 1)


def test_a_tie_at_the_top():
    several = ([5, 5], [9, 9, 2], [9, 2, 2], [1, 10], [3], None)
    assert [meta.tied(judged(scores=scores)) for scores in several] == [True, True, False, False, False, False]


def test_labels_are_counted_by_source():
    queries = {kept: next(f"query {i}" for i in range(99) if meta.set_aside(f"query {i}", 0.2) == kept) for kept in (False, True)}
    some = [judged(query=queries[False])] * 3 + [judged(scores=(1, 2), query=queries[False])] * 2 + [judged(scores=None, query=queries[False])]
    sources = {"first": [*some, judged(scores=(4, 4), query=queries[False])], "second": [judged(query=queries[True])] * 4}
    for with_ties, wrong in ((False, "2"), (True, "3")):
        rows = meta.table_of_labels(sources, SimpleNamespace(validate=0.2, with_ties=with_ties)).splitlines()
        assert rows[2].split() == ["first", "7", "1", "3", wrong, "0", "0"] and rows[3].split() == ["second", "4", "0", "0", "0", "4", "0"]


def test_what_the_meta_rm_reads():
    t = judged(responses=["[Response 1 ends]\nx", "y"], output="Analysis: z\nScores: \\boxed{2, 1}\n", query=[
        {"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}, {"role": "user", "content": "w"}])
    assert meta.meta_prompt(t) == ("[Conversation begins]\nUser: u\nAssistant: v\nUser: w\n[Conversation ends]\n\n"
                                   "[Response 1 begins]\n(Response 1 ends]\nx\n[Response 1 ends]\n\n[Response 2 begins]\ny\n[Response 2 ends]\n\n"
                                   "Analysis: z\nScores: \\boxed{2, 1}\nReview:")
    t.reference = "r"
    assert "[Reference answer begins]\nr\n" in meta.meta_prompt(t)
    tokenizer = AutoTokenizer.from_pretrained(JUDGE)
    ids = meta.encode_plain(tokenizer, "rope <eos> <pad>")
    assert ids[0] == tokenizer.bos_token_id and not set(ids[1:]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(meta.encode_plain(tokenizer, meta.meta_prompt(t))[-2:]) == "Review:"


def random_head(model):
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)


def test_a_batch_equals_transformers_own_forward_of_each(tmp_path):
    model, tokenizer = meta.meta_model(str(JUDGE), OPTIONS)
    random_head(model)
    texts = [meta.encode_plain(tokenizer, meta.meta_prompt(t)) for t in judgements(12)]
    assert len({len(text) for text in texts}) > 4
    meta.put(tmp_path / "model", lambda aside: meta.save_meta(model, tokenizer, aside))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert type(theirs) is type(model) and theirs.config.num_labels == 1 and theirs.config.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        ours, alone = meta.meta_rewards(model, texts), torch.cat([theirs(input_ids=torch.tensor([text])).logits[:, 0] for text in texts])
        batch = AutoTokenizer.from_pretrained(tmp_path / "model").pad({"input_ids": texts}, return_tensors="pt")  # pads on the left
        assert batch["input_ids"][:, 0].min() == tokenizer.pad_token_id
        left = theirs(**batch).logits[:, 0]
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-5)
    assert ours.std() > 0.1


def test_the_loss_by_hand():
    model, _ = meta.meta_model(str(JUDGE), OPTIONS)
    examples = [([5, 6, 7], [1]), ([8] * 20, [0]), ([9], [1])]
    assert meta.meta_loss(model, examples).item() == pytest.approx(3 * math.log(2), rel=1e-6)  # the head starts at zero
    random_head(model)
    a, b, c = meta.meta_rewards(model, [ids for ids, _ in examples]).tolist()
    expected = math.log(1 + math.exp(-a)) + math.log(1 + math.exp(b)) + math.log(1 + math.exp(-c))
    assert meta.meta_loss(model, examples).item() == pytest.approx(expected, rel=1e-5)


def test_adapters_and_head_load_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model, tokenizer = meta.meta_model(str(JUDGE), options(lora_r=4))
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B", "score"}
    random_head(model)
    meta.put(tmp_path / "model", lambda aside: meta.save_meta(model, tokenizer, aside))
    base = AutoModelForSequenceClassification.from_pretrained(JUDGE, num_labels=1)
    ids = torch.tensor([tokenizer("Take rope, map.")["input_ids"]])
    with torch.no_grad():
        expected, bare = model(ids).logits, base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "model").eval()(ids).logits
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    assert (expected - bare).abs().max() > 0.1


def test_adapters_and_head_learn_from_4_bits(tmp_path):
    model, tokenizer = meta.meta_model(str(JUDGE), options(quantize="nf4"))
    shown = judgements(16)
    meta.score_judgements(model, tokenizer, shown, OPTIONS, tmp_path / "before.jsonl")  # which must not cut the adapters off
    examples = [(meta.encode_plain(tokenizer, meta.meta_prompt(t)), [number % 2]) for number, t in enumerate(shown)]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(before) == 5 * 7 * 2 + 1
    meta.train(model, examples, meta.meta_loss, options(quantize="nf4", epochs=4.0), tmp_path)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if p.requires_grad)


def test_what_can_be_learnt_is_learnt(tmp_path):
    model, tokenizer = meta.meta_model(str(JUDGE), OPTIONS)
    shown = [judged(scores=(9, 2), output=f"Scores: \\boxed{{{9 - 7 * (i % 2)}, {2 + 7 * (i % 2)}}}") for i in range(32)]
    examples = [(meta.encode_plain(tokenizer, meta.meta_prompt(t)), [i % 2]) for i, t in enumerate(shown)]
    assert meta.train(model, examples, meta.meta_loss, options(epochs=5.0), tmp_path) == 20
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-4) and log[-1]["loss"] < 0.4 and log[0]["tokens"] == 8


@pytest.mark.parametrize("text", ['"x"\n', "{\n", "[1]\n", "0.5\n" * 4])
def test_damaged_rewards_are_named(tmp_path, text):
    (tmp_path / "rewards.jsonl").write_text(text)
    with pytest.raises(meta.DataError, match="rewards.jsonl(:1)?: the file is damaged: delete it, and go on with --resume"):
        meta.score_judgements(None, None, judgements(3), OPTIONS, tmp_path / "rewards.jsonl")


@pytest.mark.parametrize("scores", [None, (5, 5)], ids=["unreadable", "tied"])
def test_samples_that_say_nothing_are_guided_to_chance(scores):
    item = meta.Preference("q", ["a", "b"], [1, 0])
    samples = [judged(scores=scores, rewards=(1.0, 0.0)) for _ in range(4)]
    result = meta.guide([item], samples, [-math.inf if scores is None else 0.5] * 4, 4, 0.5)
    assert result["curve"][-1]["guided"][0] == result["curve"][-1]["unguided"][0] == 0.5
    assert all(math.isnan(value) for value in result["auc"]["those without a tie at the top"]) and meta.table_of_guided(result)


def test_rewards_are_kept_and_scoring_goes_on(tmp_path, monkeypatch):
    model, tokenizer = meta.meta_model(str(JUDGE), OPTIONS)
    random_head(model)
    shown, path = judgements(11), tmp_path / "rewards.jsonl"
    shown[3].scores, shown[5].output = None, "rope " * 5000  # unreadable; longer than the model takes
    rewards = meta.score_judgements(model, tokenizer, shown, OPTIONS, path, chunk=4)
    assert [i for i, reward in enumerate(rewards) if reward == -math.inf] == [3, 5]
    alone = [meta.meta_rewards(model, [meta.encode_plain(tokenizer, meta.meta_prompt(t))]).item() for i, t in enumerate(shown) if i not in (3, 5)]
    assert [reward for reward in rewards if reward > -math.inf] == pytest.approx(alone, rel=1e-5, abs=1e-5)
    lines = path.read_bytes()
    path.write_bytes(lines[:len(lines) * 2 // 3])  # in the middle of a line of the second chunk
    assert meta.score_judgements(model, tokenizer, shown, OPTIONS, path, chunk=4) == rewards and path.read_bytes() == lines
    monkeypatch.setattr(meta, "meta_rewards", None)  # what is there is not scored again
    assert meta.score_judgements(model, tokenizer, shown, OPTIONS, path, chunk=4) == rewards


def test_fresh_judgements_go_on_where_they_were_cut_off(tmp_path):
    items, load = meta.load_lines(TRAIN)[:10], lambda: meta.load_model(JUDGE)

    def judge(load, items=items):
        return meta.judge_items("fresh", str(JUDGE), load, meta.ballots(items, 2, "0 fresh", binary=True), 1.0, OPTIONS, tmp_path, at_once=8)[0]

    whole = judge(load)
    [path] = tmp_path.glob("*.jsonl")
    lines = path.read_bytes()
    assert [t.item for t in whole] == [i for i in range(10) for _ in range(2)] and lines.count(b"\n") == 20
    assert {t.binary for t in whole if len(t.responses) == 1} <= {True} and any(t.scores for t in whole)
    path.write_bytes(lines[:len(lines) * 2 // 3])
    assert judge(load) == whole and path.read_bytes() == lines
    assert judge(None) == whole  # nothing is left to sample
    judge(load, items[:4])
    assert len(list(tmp_path.glob("*.jsonl"))) == 2  # other items are another file


def test_the_meta_rm_is_made_of_what_lies_beneath_an_adapter(tmp_path):
    assert meta.beneath("google/gemma-3-4b-it") == "google/gemma-3-4b-it" and meta.beneath(str(JUDGE)) == str(JUDGE)
    for text, base in ('{"base_model_name_or_path": "a/b"}', "a/b"), ("{", str(tmp_path)), ("{}", str(tmp_path)), ("[]", str(tmp_path)):
        (tmp_path / "adapter_config.json").write_text(text)
        assert meta.beneath(str(tmp_path)) == meta.origin(str(tmp_path)) == base


def test_the_meta_rm_is_made_of_what_training_began_with(tmp_path):
    for name, settings in ("02", {"model": "google/gemma-3-4b-it"}), ("03", {"model": str(tmp_path / "02/model")}), ("04", {}):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "03/model/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "02/model")}))
    assert meta.origin(str(tmp_path / "03/model")) == meta.origin(str(tmp_path / "02/model")) == "google/gemma-3-4b-it"
    assert meta.origin(str(tmp_path / "04/model")) == str(tmp_path / "04/model") and meta.origin("owner/model") == "owner/model"
    for damaged in ("{", "[]", '{"model": null}', '{"model": 3}', json.dumps({"model": str(tmp_path / "gone")})):
        (tmp_path / "02/settings.json").write_text(damaged)
        assert meta.origin(str(tmp_path / "03/model")) == str(tmp_path / "02/model")
    (tmp_path / "02/settings.json").write_text(json.dumps({"model": str(tmp_path / "03/model")}))  # each made of the other
    assert meta.origin(str(tmp_path / "03/model")) in (str(tmp_path / "02/model"), str(tmp_path / "03/model"))


def test_a_base_of_which_no_meta_rm_can_be_made_is_named_and_another_may_take_its_place(tmp_path):
    write_gemma_4(tmp_path / "base")
    with pytest.raises(meta.ModelError, match="no sequence classification for gemma4 models; name another --base, with --resume"):
        meta.meta_model(str(tmp_path / "base"), OPTIONS)
    meta.open_run(tmp_path, {"base": "gemma4", "limit": 5}, False)
    meta.open_run(tmp_path, {"base": "gemma3", "limit": 5}, True)  # what was sampled does not depend on it
    assert json.loads((tmp_path / "settings.json").read_text()) == {"base": "gemma3", "limit": 5}


def test_trajectories_of_other_data_are_not_learnt_from(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs/02_rejective_ft").mkdir(parents=True)
    (tmp_path / "runs/02_rejective_ft/trajectories.jsonl").write_text(judged(query="somebody else's").line())
    (tmp_path / "own.jsonl").write_text('{"query": "x", "responses": ["a", "b"], "rewards": [0, 1]}\n')
    arguments = ("--data", "own.jsonl", "--eval", "own.jsonl", "--model", "nobody/nothing")
    assert "cannot load the model nobody/nothing" in refusal(monkeypatch, capsys, tmp_path, STEP, *arguments)  # it has to be asked
    assert "trajectories.jsonl has judgements of items of own.jsonl that are held out, or of other data: they are left out" in capsys.readouterr().out


def test_most_and_least_trusted_stand_side_by_side():
    item = meta.Preference("Name a prime.", ["Seven.", "Nine."], [1, 0])
    samples = [judged(output="Specific Criteria: long " + "word " * 40 + "\nScores: \\boxed{2, 1}"), judged(scores=None, output="?"),
               judged(scores=(1, 2), order=(1, 0), responses=["Nine.", "Seven."], rewards=[0.0, 1.0], output="Short.")]
    lines = meta.side_by_side(item, samples, [-1.5, -math.inf, 0.25], width=60).splitlines()
    assert "user: Name a prime." in lines and "y2, true reward 0: Nine." in lines and max(map(len, lines)) < 120
    left, right = next(line for line in lines if "most" in line)[:60], next(line for line in lines if "most" in line)[60:]
    assert left.strip() == "--- most trusted: meta reward +0.25; right ---" and right == "--- least trusted: meta reward -1.50; right ---"
    assert any(line.startswith("Response 1 is y2, Response 2 is y1") and line[60:] == "Response 1 is y1, Response 2 is y2" for line in lines)
    assert sum(line[60:].count("word") for line in lines) == 40 and "?" not in "".join(lines)


@pytest.mark.parametrize("lora_r", [0, 4], ids=["all weights", "LoRA"])
def test_killed_and_resumed_gives_the_same_weights(tmp_path, lora_r):
    weights, extra = "adapter_model.safetensors" if lora_r else "model.safetensors", ("--lora-r", lora_r)
    shown, _ = run(tmp_path, STEP, *TINY, *extra, "--out", "whole")
    for expected in ("learn: right", "sampled at temperature 1", "fresh, at temperature 0.5", "held-out judgements", "k = 4, k_meta = 2",
                     "MetaRM@1 against voting@4", "most trusted", "least trusted"):
        assert expected in shown, expected
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["steps"] >= 5 and {"curve", "by_k_meta", "few", "auc", "settings", "versions"} <= results.keys()
    assert (tmp_path / "whole" / "guided.png").exists() and len(list((tmp_path / "runs" / "04_voting").glob("samples-*.jsonl"))) == 1
    cut_and_resume(tmp_path, STEP, *TINY, *extra, at=random.randint(2, results["steps"] - 2), politely=bool(lora_r),  # the first has a checkpoint
                   same=(f"model/{weights}", "rewards.jsonl", "held_out.jsonl"))
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["curve"] == results["curve"]


@pytest.mark.parametrize("arguments, message", [
    (["--data", "missing.jsonl"], "error: missing.jsonl: No such file"),
    (["--data", "columns.jsonl"], "error: columns.jsonl:1: expected query, responses, rewards; convert it with: python 01_pointwise_grm.py"),
    (["--eval", "single.jsonl"], "or none with two responses to vote on"),
    (["--data", "single.jsonl", "--held-out"], "error: single.jsonl: no items are left to learn from"),
    (["--trajectories", "missing.jsonl"], "error: missing.jsonl: No such file"),
    (["--trajectories", "columns.jsonl"], "error: columns.jsonl:1: not a sampled judgement"),
    (["--trajectories", "right.jsonl", "--no-fresh", "--eval", "pair.jsonl", "--k", "1"], "error: nothing to learn: the 1 judgements"),
    (["--resume"], "error: --resume: there is no run in runs/05_metarm"),
    (["--model", "nobody/nothing", "--limit", "2"], "error: cannot load the model nobody/nothing"),
    (["--base", "nobody/nothing", "--trajectories", "both.jsonl", "--no-fresh", "--eval", "pair.jsonl", "--k", "1"],
     "error: cannot load the model nobody/nothing"),
    (["--voting", "pair.jsonl", "--no-fresh", "--trajectories", "both.jsonl"], "error: cannot write pair.jsonl: File exists"),
    (["--k-meta", "0"], "--k-meta is a share"), (["--validate", "1"], "--validate must be above 0 and below 1"),
    (["--n-fresh", "0"], "--n-fresh must be from 1 to"),
    (["--quantize", "nf4", "--lora-r", "0"], "quantized weights cannot be trained")])
def test_bad_input_gets_one_clear_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    def fake(model, tokenizer, shown, *_):
        pass

    query = next(f"query {i}" for i in range(99) if not meta.set_aside(f"query {i}", 0.1))
    for name, lines in (("columns", ['{"prompt": "x", "chosen": "a", "rejected": "b"}']),
                        ("single", ['{"query": "x", "responses": ["a"], "rewards": [1]}']),
                        ("pair", ['{"query": "x", "responses": ["a", "b"], "rewards": [0, 1]}']), ("right", [judged(query=query).line().strip()]),
                        ("both", [judged(query=query).line().strip(), judged(query=query, scores=(1, 2)).line().strip()])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    if "right.jsonl" in arguments or "both.jsonl" in arguments:
        monkeypatch.setattr(meta, "judge", fake)
    assert message in refusal(monkeypatch, capsys, tmp_path, STEP, *arguments)
