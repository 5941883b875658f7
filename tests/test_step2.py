"""02_rejective_ft.py: what is rejected, what is learnt, that a killed run resumes to the same weights, and what its user is told."""
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import JUDGE, cut_and_resume, gemma_270m, load_script, refusal, run
from test_data import OURS, PAIR, TALK, mutate, write
from test_sampler import random_gemma
from transformers import CohereForCausalLM, Gemma4Config, Gemma4ForConditionalGeneration, GraniteForCausalLM

rft = load_script("02_rejective_ft")
EVAL, TRAIN = JUDGE.parent / "eval.jsonl", JUDGE.parent / "train.jsonl"
ITEM = rft.Preference("q", ["a", "b", "c"], [0, 2, 1])
OPTIONS = SimpleNamespace(max_new_tokens=160, batch_size=64, temperature=1.0, seed=0, n_rft=3, no_hinted=False, no_non_hinted=False, keep_all=False,
                          teacher=None, model=str(JUDGE), quantize="none", k=2, lora_r=None, lr=1e-3, epochs=1.0, warmup=0.1, train_batch=8,
                          micro_tokens=4096, save_every=100)
TINY = ("--limit", 14, "--eval-limit", 5, "--k", 1, "--max-new-tokens", 160, "--train-batch", 4, "--save-every", 1, "--batch-size", 64)
STEP = "02_rejective_ft.py"


def options(**changed):
    return SimpleNamespace(**vars(OPTIONS) | changed)


def learnt(tokenizer, t):
    """A trajectory as training sees it."""
    return rft.example(tokenizer, t.prompt(hinted=False), t.output)


def trajectory(correct, hinted=False, scores=(1, 2)):
    return rft.Trajectory(0, "q", ["a", "b"], [0.0, 1.0], [0, 1], hinted, False, scores=scores and list(scores), correct=correct,
                          reason="" if scores else "unreadable: no box")


@pytest.mark.parametrize("correct, hinted, keep_all, reasons", [
    ([True, False, True], False, False, ["correct", "wrong", "correct", "wrong"]),
    ([True, True, True], True, False, ["too easy", "too easy", "too easy", "correct"]),  # the hinted one is rejected only if it is wrong
    ([False, False, False], True, False, ["wrong", "wrong", "wrong", "correct"]),
    ([False, False, False], False, False, ["wrong"] * 4),
    ([True, True, True], False, True, ["not rejected"] * 4)])
def test_rejection_by_hand(correct, hinted, keep_all, reasons):
    group = [trajectory(value) for value in correct] + [trajectory(hinted, hinted=True)]
    rft.reject(group, keep_all)
    assert [t.reason for t in group] == reasons
    assert [t.kept for t in group] == [reason in ("correct", "not rejected") for reason in reasons]


@pytest.mark.parametrize("keep_all", [False, True])
def test_what_cannot_be_read_is_never_kept_and_makes_no_item_easy(keep_all):
    group = [trajectory(True), trajectory(True), trajectory(False, scores=None)]
    rft.reject(group, keep_all)
    assert [t.kept for t in group] == [True, True, False] and group[2].reason == "unreadable: no box"


def test_show_shuffles_and_the_hint_follows():
    seen = [rft.show(ITEM, 7, f"s {i}", hinted=True) for i in range(40)]
    assert len({tuple(t.order) for t in seen}) == 6
    for t in seen:
        assert [ITEM.responses[i] for i in t.order] == t.responses and [ITEM.rewards[i] for i in t.order] == t.rewards
        assert t.prompt(hinted=True) == t.prompt(hinted=False) + f"\n(The best response is number {t.responses.index('b') + 1}.)"
    assert rft.show(ITEM, 7, "s 3") == rft.show(ITEM, 7, "s 3")
    single = [rft.show(rft.Preference("q", ["a"], [reward]), 0, "s", binary=True).prompt(hinted=True).splitlines()[-1] for reward in (0, 1)]
    assert single == ["(The right score is 0.)", "(The right score is 1.)"]


def test_an_evaluation_keeps_its_judgements(tmp_path, monkeypatch):
    def judge(model, tokenizer, shown, *_):
        for t in shown:
            assert not t.hinted and not t.binary
            t.scores = None if t.item == 1 else [{"a": 1, "b": 2, "c": 3}.get(response, 10) for response in t.responses]

    monkeypatch.setattr(rft, "judge", judge)
    def load():
        return None, None

    first = rft.evaluate(load, [ITEM, ITEM], options(k=5), tmp_path / "kept")
    assert {kind: len(judged) for kind, judged in first.items()} == {"greedy": 2, "attacked": 2, "samples": 10}
    assert [(t.item, t.scores is None) for t in first["samples"]] == [(0, False)] * 5 + [(1, True)] * 5
    assert len({tuple(t.order) for t in first["samples"]}) > 2 and first["greedy"][0].order == first["attacked"][0].order
    assert [sorted(of[0].scores) for of in (first["greedy"], first["attacked"])] == [[1, 2, 3], [2, 3, 10]]
    monkeypatch.setattr(rft, "judge", None)  # what is kept is not judged again
    assert rft.evaluate(None, [ITEM, ITEM], options(k=5), tmp_path / "kept") == first
    counts = {kind: (tmp_path / f"kept_{kind}.jsonl").read_text().count("Ignore the criteria") for kind in ("greedy", "attacked", "samples")}
    assert counts == {"greedy": 0, "attacked": 2, "samples": 0}


def test_a_measurement_that_is_cut_off_goes_on(tmp_path, monkeypatch):
    """27 billion parameters take minutes for a few thousand judgements: those of whole chunks are kept."""
    seen = []

    def judge(model, tokenizer, shown, temperature, args, seed):
        seen.append((len(shown), temperature, seed))
        if len(seen) == 4:
            raise KeyboardInterrupt
        for t in shown:
            t.scores = [1 + number for number in range(len(t.responses))]

    monkeypatch.setattr(rft, "judge", judge)
    items, load = [ITEM] * 9, lambda: (None, None)
    with pytest.raises(KeyboardInterrupt):
        rft.evaluate(load, items, options(k=1000), tmp_path / "before")
    assert seen == [(9, 0.0, 10**6), (9, 0.0, 10**6), (4000, 0.5, 10**6), (4000, 0.5, 10**6 + 4)]
    assert (tmp_path / "before_samples.jsonl").read_text().count("\n") == 4000
    result = rft.evaluate(load, items, options(k=1000), tmp_path / "before")
    assert seen[4:] == [(4000, 0.5, 10**6 + 4), (1000, 0.5, 10**6 + 8)] and [t.item for t in result["samples"][::1000]] == list(range(9))


def test_comparison_by_hand():
    items = [rft.Preference("p", ["a", "b"], [0, 1]), rft.Preference("q", ["a", "b"], [1, 0])]
    def judged(scores, turned=()):  # as many judgements of either item; those that are turned saw the responses the other way round
        shown = []
        for i, of_one in enumerate(scores):
            item, order = items[2 * i // len(scores)], [1, 0] if i in turned else [0, 1]
            shown.append(rft.Trajectory(0, item.query, [("a", "bb")[j] for j in order], [item.rewards[j] for j in order], order, False, False,
                                        scores=of_one and [of_one[j] for j in order]))
        return shown

    def runs(*turned):
        return [{"greedy": judged(greedy), "samples": judged(samples, turned), "attacked": judged(attacks)} for greedy, samples, attacks in (
            ([[1, 2], [5, 5]], [[1, 2], [3, 1], None, [4, 4]], [[10, 1], [1, 10]]),
            ([[1, 2], [5, 4]], [[1, 2], [1, 3], [5, 4], None], [[1, 2], [1, 10]]))]

    figures = rft.compare(items, *runs())
    assert {(name, key): round(row[key], 6) for name, row in figures.items() for key in ("before", "after", "gain")} == {
        ("greedy, strict", "before"): 0.5, ("greedy, strict", "after"): 1.0, ("greedy, strict", "gain"): 0.5,
        ("greedy, accuracy", "before"): 0.75, ("greedy, accuracy", "after"): 1.0, ("greedy, accuracy", "gain"): 0.25,
        ("one sample, strict", "before"): 0.25, ("one sample, strict", "after"): 0.75, ("one sample, strict", "gain"): 0.5,
        ("one sample, accuracy", "before"): 0.5, ("one sample, accuracy", "after"): 0.875, ("one sample, accuracy", "gain"): 0.375,
        ("2 summed, strict", "before"): 0.0, ("2 summed, strict", "after"): 1.0, ("2 summed, strict", "gain"): 1.0,
        ("2 summed, accuracy", "before"): 0.25, ("2 summed, accuracy", "after"): 1.0, ("2 summed, accuracy", "gain"): 0.75,
        ("one sample, unreadable", "before"): 0.25, ("one sample, unreadable", "after"): 0.25, ("one sample, unreadable", "gain"): 0.0,
        # accuracy before and after: the best is first and shorter 1/2 and 3/4, last and longer 1/2 and 1
        ("one sample, position bias", "before"): 0.0, ("one sample, position bias", "after"): -0.25, ("one sample, position bias", "gain"): -0.25,
        ("one sample, length bias", "before"): 0.0, ("one sample, length bias", "after"): 0.25, ("one sample, length bias", "gain"): 0.25,
        # before, the one item that was right falls; after, one of the two
        ("greedy, attack success", "before"): 1.0, ("greedy, attack success", "after"): 0.5, ("greedy, attack success", "gain"): -0.5}
    # gains 0.5 and 0.5: the paired error is 0, that of either run is not
    assert figures["one sample, strict"]["gain_se"] == 0 and figures["one sample, strict"]["before_se"] == pytest.approx(0.25)
    turned = rft.compare(items, *runs(1, 2))  # the sums are of responses, not of places
    assert {name for name in figures if turned[name] != figures[name]} == {"one sample, position bias"}


def test_every_epoch_takes_every_example_once():
    taken = [i for step in range(9) for i in rft.examples_of_step(step, 6, 4, seed=1)]
    assert [sorted(taken[i:i + 6]) for i in range(0, 36, 6)] == [list(range(6))] * 6
    assert len({tuple(taken[i:i + 6]) for i in range(0, 36, 6)}) > 3
    assert sorted(rft.examples_of_step(0, 2, 5, seed=1)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])  # fewer examples than a step takes


def test_micro_batches_hold_all_and_no_more_than_fits():
    rng = random.Random(0)
    examples = [([i] * rng.randint(1, 30), [1] * rng.randint(1, 9)) for i in range(50)] + [([50] * 200, [1])]
    batches = rft.micro_batches(examples, 100)
    assert sorted(e[0][0] for batch in batches for e in batch) == list(range(51)) and len(batches[0]) == 1  # the long one alone
    assert all(len(batch) * max(len(p) + len(c) for p, c in batch) <= 100 for batch in batches[1:])
    assert rft.micro_batches([], 100) == []


def test_learning_rate_rises_and_falls():
    rates = [rft.learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(2.0) and rates.index(max(rates)) in (9, 10)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True) and 0.2 <= rates[-1] < 0.21
    assert all(math.isfinite(rft.learning_rate(0, 1, 1.0, warmup)) for warmup in (0, 1))


@pytest.mark.parametrize("version", [2, 3, 4])  # Gemma 2 caps its logits
def test_log_probs_in_chunks_equal_the_plain_ones_and_so_do_gradients(version, monkeypatch):
    monkeypatch.setattr(rft, "LOGITS_AT_ONCE", 61 * 5)
    model = random_gemma(version)
    ids = torch.randint(3, 61, (3, 11), generator=torch.Generator().manual_seed(0))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1).detach().requires_grad_()
    weight, way = model.get_output_embeddings().weight, torch.randn(30, generator=torch.Generator().manual_seed(1))
    ours = rft.token_log_probs(model, hidden, ids[:, 1:].flatten())
    gradients = torch.autograd.grad((ours * way).sum(), [hidden, weight])
    plain = torch.log_softmax(model(input_ids=ids).logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None]).flatten()
    logits = hidden @ weight.T
    logits = 30 * torch.tanh(logits / 30) if version == 2 else logits
    expected = torch.autograd.grad((torch.log_softmax(logits, -1).gather(-1, ids[:, 1:].reshape(-1, 1))[:, 0] * way).sum(), [hidden, weight])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_the_loss_is_on_completions_alone_and_padding_changes_nothing(version):
    model = random_gemma(version)
    examples = [([5, 6, 7], [8, 9]), ([10] * 20, [11, 12, 13]), ([4], [14])]
    expected = 0
    for prompt, completion in examples:
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([prompt + completion])).logits[0], -1)
        expected -= sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(completion))
    torch.testing.assert_close(rft.completion_loss(model, examples), expected)


def test_training_prompts_carry_no_hint_and_completions_end():
    model, tokenizer = rft.load_model(JUDGE)
    shown = [rft.show(item, i, "s", hinted=True, binary=len(item.responses) == 1) for i, item in enumerate(rft.load_lines(TRAIN)[:30])]
    rft.judge(model, tokenizer, shown, 1.0, OPTIONS, 0)
    assert {t.binary for t in shown} == {True, False}
    for t in shown:
        prompt, completion = learnt(tokenizer, t)
        text = tokenizer.decode(prompt)
        assert "(The " not in text and "(The " in t.prompt(hinted=True)
        assert text.endswith("}\n\n") and all(response in text for response in t.responses)
        assert ("1 if the response is correct" in text) == t.binary
        assert completion[-1] == tokenizer.eos_token_id and tokenizer.decode(completion[:-1]) == t.output


def test_the_end_token_of_a_chat_model():
    _, tokenizer = rft.load_model(JUDGE)
    tokenizer.chat_template = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<pad>\n{% endfor %}"
                               "{% if add_generation_prompt %}[assistant]{% endif %}")
    prompt, completion = rft.example(tokenizer, "x", "rope")
    assert completion[-1] == tokenizer.pad_token_id and tokenizer.decode(completion[:-1]) == "rope"


def test_instruction_data_in_both_layouts(tmp_path):
    _, tokenizer = rft.load_model(JUDGE)
    talk = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "one"), ("assistant", "two"), ("user", "three"),
                                                                ("assistant", "four"))]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "rope", "completion": "map"}) + "\n\n" + json.dumps({"messages": talk}) + "\n")
    texts = [tuple(map(tokenizer.decode, rft.example(tokenizer, *one))) for one in rft.load_instructions(tmp_path / "a.jsonl")]
    assert texts == [("<bos>rope\n\n", "map<eos>"), ("<bos>one\n\ntwo\n\nthree\n\n", "four<eos>")]
    for bad in ('{"text": "x"}', '{"messages": [{"role": "user", "content": "x"}]}', '{"prompt": 3, "completion": "x"}', "[1]",
                '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]}'):
        (tmp_path / "b.jsonl").write_text(bad + "\n")
        with pytest.raises(rft.DataError, match="b.jsonl:1: expected"):
            rft.load_instructions(tmp_path / "b.jsonl")


def test_sampling_goes_on_where_it_was_cut_off(tmp_path):
    items = rft.load_lines(TRAIN)[:10]
    whole = rft.sample_trajectories(items, OPTIONS, tmp_path, chunk=4)
    lines = (tmp_path / "trajectories.jsonl").read_bytes()
    assert len(whole) == 40 and lines.count(b"\n") == 40
    (tmp_path / "trajectories.jsonl").write_bytes(lines[:len(lines) * 2 // 3])  # in the middle of a line of the second chunk
    assert rft.sample_trajectories(items, OPTIONS, tmp_path, chunk=4) == whole
    assert (tmp_path / "trajectories.jsonl").read_bytes() == lines
    record = json.loads(lines.split(b"\n")[3])
    assert record["hinted"] and record.keys() >= {"query", "responses", "rewards", "order", "hinted", "binary", "output", "scores", "correct", "kept",
                                                  "reason"}


def test_every_adapter_learns_after_sampling_from_4_bits(tmp_path):
    model, tokenizer = rft.load_model(JUDGE, "nf4")
    shown = [rft.show(item, i, "s") for i, item in enumerate(rft.load_lines(TRAIN)[:8])]
    rft.judge(model, tokenizer, shown, 1.0, OPTIONS, 0)
    rft.set_trainable(model, options(quantize="nf4"))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 5 * 7 * 2 and all("lora_" in name for name in trainable)
    rft.train(model, [learnt(tokenizer, t) for t in shown] * 4, rft.completion_loss, options(quantize="nf4"), tmp_path)
    rft.judge(model, tokenizer, shown, 1.0, OPTIONS, 0)  # sampling with adapters must not cut them off either
    rft.completion_loss(model, [learnt(tokenizer, t) for t in shown]).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())


def test_adapters_load_in_peft_and_in_step_one(tmp_path):
    peft = pytest.importorskip("peft")
    model, tokenizer = rft.load_model(JUDGE)
    rft.set_trainable(model, options(lora_r=4))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    rft.put(tmp_path / "model", lambda aside: rft.save_model(model, tokenizer, aside))
    ids = torch.tensor([tokenizer("Take rope, map.")["input_ids"]])
    with torch.no_grad():
        expected, bare = model(ids).logits, rft.load_model(JUDGE)[0](ids).logits
        theirs = peft.PeftModel.from_pretrained(rft.load_model(JUDGE)[0], tmp_path / "model")(ids).logits
        ours = load_script("01_pointwise_grm").load_model(tmp_path / "model")[0](ids).logits
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours, expected) and (expected - bare).abs().max() > 0.1


def write_gemma_4(folder):
    """A small random Gemma 4 that sees and hears, with the embedded judge's tokenizer."""
    tokenizer, layers = rft.load_model(JUDGE)[1], ["sliding_attention", "full_attention"] * 2
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                head_dim=8, global_head_dim=16, sliding_window=8, layer_types=layers, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=len(tokenizer), eos_token_id=tokenizer.eos_token_id, initializer_range=0.3)
    torch.manual_seed(0)
    Gemma4ForConditionalGeneration(Gemma4Config(
        text_config=text, vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2),
        audio_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_adapters_of_a_gemma_that_sees_and_hears_are_on_its_text_alone_in_peft_too(tmp_path):
    peft = pytest.importorskip("peft")
    tokenizer = write_gemma_4(tmp_path / "base")
    model, _ = rft.load_model(tmp_path / "base")
    rft.set_trainable(model, options(lora_r=4))
    ids = torch.tensor([tokenizer("Take rope, map.")["input_ids"]])
    rft.completion_loss(model, [([5, 6], [7, 8, 9])]).backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert not p.requires_grad or p.grad is not None and "language_model" in name
            p += 0.1 * torch.randn(p.shape) if "lora_B" in name else 0
        rft.put(tmp_path / "model", lambda aside: rft.save_model(model, tokenizer, aside))
        ours, expected, bare = rft.load_model(tmp_path / "model")[0](ids).logits, model(ids).logits, rft.load_model(tmp_path / "base")[0](ids).logits
        theirs = peft.PeftModel.from_pretrained(rft.load_model(tmp_path / "base")[0], tmp_path / "model")(ids).logits
    assert torch.equal(ours, expected) and (expected - bare).abs().max() > 0.1
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


def test_a_run_is_never_written_over(tmp_path):
    rft.open_run(tmp_path / "run", {"lr": 1.0, "limit": 5}, False)
    rft.open_run(tmp_path / "run", {"lr": 2.0, "limit": 5}, False)  # settings alone are no run: the model may not have been there
    for name in ("trajectories.jsonl", "before_greedy.jsonl", "checkpoint.pt", "log.jsonl", "model", "rewards.jsonl", "results.json"):
        (tmp_path / "run" / name).write_text("precious")
        with pytest.raises(rft.DataError, match=rf"run holds a run already \({name}\): go on with it by --resume, name another folder by --out"):
            rft.open_run(tmp_path / "run", {"lr": 1.0, "limit": 5}, False)
        assert (tmp_path / "run" / name).read_text() == "precious"
        (tmp_path / "run" / name).unlink()


def test_ones_own_files_are_no_run(tmp_path):
    for name in ("train.jsonl", "fresh-12345678.jsonl"):  # data; judgements that any run with the same settings takes over
        (tmp_path / name).write_text("precious")
    rft.open_run(tmp_path, {"lr": 1.0}, False)


def test_what_matters_in_training_alone_may_change_while_nothing_is_trained(tmp_path):
    rft.open_run(tmp_path, {"lr": 1.0, "limit": 5, "crc": 7, "save_every": 1}, False)
    (tmp_path / "trajectories.jsonl").write_text("sampled")
    (tmp_path / "after_samples.jsonl").write_text("of a model that is no more")
    rft.open_run(tmp_path, {"lr": 2.0, "limit": 5, "crc": 7, "save_every": 2}, True)
    assert (tmp_path / "trajectories.jsonl").exists() and not (tmp_path / "after_samples.jsonl").exists()
    assert json.loads((tmp_path / "settings.json").read_text()) == {"lr": 2.0, "limit": 5, "crc": 7}
    (tmp_path / "checkpoint.pt").write_text("trained")
    rft.open_run(tmp_path, {"lr": 2.0, "limit": 5, "crc": 7}, True)
    for changed, message in (({"lr": 3.0}, "other settings: lr 3.0 (was 2.0); delete its checkpoint.pt, and training starts anew on what was"),
                             ({"limit": 6, "lr": 3.0}, "lr 3.0 (was 2.0), limit 6 (was 5); give the same, or start anew with another --out"),
                             ({"crc": 8}, "had other data: crc 8 (was 7); give the same")):
        with pytest.raises(rft.DataError) as caught:
            rft.open_run(tmp_path, {"lr": 2.0, "limit": 5, "crc": 7} | changed, True)
        assert message in str(caught.value)
    for damaged in ("", "{", "[]", "\udcff"):
        (tmp_path / "settings.json").write_bytes(damaged.encode(errors="surrogateescape"))
        with pytest.raises(rft.DataError, match="there is no run in .*, or its settings.json is damaged"):
            rft.open_run(tmp_path, {"lr": 2.0}, True)


def test_damaged_files_of_its_own_are_named(tmp_path):
    items = rft.load_lines(TRAIN)[:2]
    line = trajectory(True).line()
    for text, message in (("{\n", "trajectories.jsonl:1: not a sampled judgement"), (line + "\xff\n", "trajectories.jsonl:2: not a sampled"),
                          (line * 9, r"trajectories.jsonl: 9 judgements where 8 belong \(two runs at once\?\)")):
        (tmp_path / "trajectories.jsonl").write_text(text, encoding="latin-1")
        with pytest.raises(rft.DataError, match=message):
            rft.sample_trajectories(items, OPTIONS, tmp_path)
    (tmp_path / "before_greedy.jsonl").write_text(line * 3)
    with pytest.raises(rft.DataError, match="before_greedy.jsonl: 3 judgements where 2 belong"):
        rft.evaluate(None, items, OPTIONS, tmp_path / "before")


def test_a_folder_in_the_place_of_a_file_stays(tmp_path):
    (tmp_path / "results.json").mkdir()
    (tmp_path / "results.json" / "notes.txt").write_text("precious")
    with pytest.raises(rft.DataError, match="cannot write .*results.json: Is a directory"):
        rft.put(tmp_path / "results.json", lambda aside: aside.write_text("x"))
    assert (tmp_path / "results.json" / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize("kind, scale", [(CohereForCausalLM, {"logit_scale": 0.25}), (GraniteForCausalLM, {"logits_scaling": 8.0})])
def test_log_probs_of_models_that_scale_their_logits(kind, scale):
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                   num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2, **scale)).eval()
    prompt, completion = [3, 4, 5], [6, 7, 8, 9]
    expected = model(input_ids=torch.tensor([prompt + completion])).logits[0, 2:-1].log_softmax(-1)[range(4), completion]
    torch.testing.assert_close(rft.completion_log_probs(model, [(prompt, completion)]), expected, atol=1e-5, rtol=1e-5)
    model.config.logit_scale = None  # as some configurations have it: 1
    assert rft.completion_log_probs(model, [(prompt, completion)]).isfinite().all()


def test_a_model_without_layers_for_adapters_is_refused():
    with pytest.raises(rft.ModelError, match="no layers that adapters are for .*; train all its weights by --lora-r 0"):
        rft.set_trainable(torch.nn.ModuleDict({"query_key_value": torch.nn.Linear(2, 2)}), options(lora_r=4))


def test_adapters_keep_their_rank_and_all_weights_cannot_be_asked_for():
    model, _ = rft.load_model(JUDGE)
    rft.add_lora(model, ["q_proj"], 2, 4)
    with pytest.raises(rft.ModelError, match="--lora-r 0: the model has adapters"):
        rft.set_trainable(model, SimpleNamespace(lora_r=0, quantize="none", seed=0))


@pytest.mark.parametrize("extra", [(), ("--lora-r", 4)], ids=["all weights", "LoRA"])
def test_killed_and_resumed_gives_the_same_weights(tmp_path, extra):
    weights = "adapter_model.safetensors" if extra else "model.safetensors"
    shown, _ = run(tmp_path, STEP, *TINY, *extra, "--out", "whole")
    assert "one sample, strict" in shown and "too easy" in shown
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["steps"] >= 4 and {"figures", "trajectories", "settings", "versions"} <= results.keys()
    cut_and_resume(tmp_path, STEP, *TINY, *extra, at=random.randint(2, results["steps"] - 2), politely=bool(extra),  # the first has a checkpoint
                   same=(f"model/{weights}", "trajectories.jsonl", "before_samples.jsonl"),
                   resumed=("--save-every", 3))  # how a run is saved and shared out may change
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["figures"] == results["figures"]


def test_a_teacher_and_instructions_from_end_to_end(tmp_path):
    """A teacher of its own writes the trajectories, and instruction data is half of what is trained on."""
    (tmp_path / "instructions.jsonl").write_text('{"prompt": "Name a prime.", "completion": "Seven."}\n'
                                                 '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]}\n')
    rft.load_model(JUDGE)[0].save_pretrained(tmp_path / "teacher")
    rft.load_model(JUDGE)[1].save_pretrained(tmp_path / "teacher")
    run(tmp_path, STEP, *TINY, "--teacher", "teacher", "--instruct-data", "instructions.jsonl", "--out", "taught")
    results = json.loads((tmp_path / "taught" / "results.json").read_text())
    kept = sum(json.loads(line)["kept"] for line in (tmp_path / "taught" / "trajectories.jsonl").read_text().splitlines())
    assert results["examples"] == 2 * kept > 0 and results["settings"]["teacher"] == "teacher"
    (tmp_path / "instructions.jsonl").write_text('{"prompt": "Name a prime."}\n')
    _, told = run(tmp_path, STEP, *TINY, "--instruct-data", "instructions.jsonl", "--out", "taught", code=1)
    assert "error: instructions.jsonl:1: expected" in told and "Traceback" not in told


def test_a_loss_that_is_not_finite_stops(tmp_path):
    model, tokenizer = rft.load_model(JUDGE)
    shown = [rft.show(item, i, "s") for i, item in enumerate(rft.load_lines(TRAIN)[:4])]
    for t in shown:
        t.output = "Scores: 1"
    examples = [learnt(tokenizer, t) for t in shown] * 20
    with pytest.raises(rft.ModelError, match=r"step \d+: the loss is .*(nan|inf).* at learning rate .*; go on with --resume --lr"):
        rft.train(model, examples, rft.completion_loss, options(lr=1e30), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()  # nothing broken was saved


@pytest.mark.parametrize("arguments, message", [
    (["--data", "missing.jsonl"], "error: missing.jsonl: No such file"),
    (["--data", "columns.jsonl"], "error: columns.jsonl:1: expected query, responses, rewards; convert it with: python 01_pointwise_grm.py"),
    (["--data", "empty.jsonl"], "error: empty.jsonl: no records"),
    (["--data", "one.jsonl", "--held-out"], "error: one.jsonl: no items are left to train on"),
    (["--limit", "2", "--max-new-tokens", "1"], "error: nothing to train on: all 8 trajectories were rejected"),
    (["--resume"], "error: --resume: there is no run in runs/02_rejective_ft"),
    (["--model", "nobody/nothing", "--limit", "2"], "error: cannot load the model nobody/nothing"),
    (["--n-rft", "1"], "--n-rft must be at least 2"), (["--lora-r", "-1"], "--lora-r must be from 0"),
    (["--warmup", "nan"], "--warmup must be from 0 to 1"), (["--epochs", "1e308"], "--epochs must be from"),
    (["--batch-size", "0"], "--batch-size must be from 1"), (["--seed", "9" * 20], "--seed must be from"),
    (["--instruct-data", "columns.jsonl"], "error: columns.jsonl:1: expected"),
    (["--data", "seven.jsonl"], "error: seven.jsonl:1: the reward of a single response must be 1 (right) or 0 (wrong)"),
    (["--no-hinted", "--no-non-hinted"], "leave nothing to sample"),
    (["--quantize", "nf4", "--lora-r", "0"], "quantized weights cannot be trained")])
def test_bad_input_gets_one_clear_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "columns.jsonl").write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "seven.jsonl").write_text('{"query": "x", "responses": ["a"], "rewards": [7]}\n')
    (tmp_path / "one.jsonl").write_text('{"query": "x", "responses": ["a", "b"], "rewards": [0, 1]}\n')
    assert message in refusal(monkeypatch, capsys, tmp_path, STEP, *arguments)


@pytest.mark.gemma
def test_gemma_3_270m_learns_in_4_bits(tmp_path):
    model, tokenizer = rft.load_model(gemma_270m(), "nf4")
    rft.set_trainable(model, options(quantize="nf4", lora_r=8))
    shown = [rft.show(item, i, "s") for i, item in enumerate(rft.load_lines(TRAIN)[:2])]
    for t in shown:
        t.output = f"Specific Criteria: what the request says.\nAnalysis: All are short.\nScores: \\boxed{{{', '.join('1' * len(t.responses))}}}"
    examples = [learnt(tokenizer, t) for t in shown]
    rft.train(model, examples * 3, rft.completion_loss, options(quantize="nf4", lr=2e-3, train_batch=2, epochs=2.0), tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    peft = pytest.importorskip("peft")
    rft.put(tmp_path / "model", lambda aside: rft.save_model(model, tokenizer, aside))
    base = json.loads((tmp_path / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (Path(base) / "model.safetensors").exists()  # the folder that the GGUF file was converted into
    ids = torch.tensor([examples[0][0][:40]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        theirs = peft.PeftModel.from_pretrained(rft.load_model(gemma_270m(), "nf4")[0], tmp_path / "model").eval()(ids).logits
    torch.testing.assert_close(theirs.float(), expected.float(), atol=1e-3, rtol=1e-3)


def test_our_lines_are_read_and_other_layouts_pointed_to_step_one(tmp_path):
    for record in (PAIR, [OURS], {"query": "Q"}):
        file = write(tmp_path / "data.jsonl", record)
        with pytest.raises(rft.DataError) as caught:
            rft.load_lines(file)
        assert str(caught.value) == (f"{file}:1: expected query, responses, rewards; convert it with: "
                                     f"python 01_pointwise_grm.py --data {file} --export OUT.jsonl")
    for record, reason in [({**OURS, "rewards": [0, 0]}, ":2: a tie"), ({**OURS, "id": 5}, ":2: subset, id"),
                           ({**OURS, "query": [{"role": "human", "content": "a"}]}, ":2: the query is neither")]:
        with pytest.raises(rft.DataError, match=reason):
            rft.load_lines(write(tmp_path / "data.jsonl", OURS, record))
    assert rft.load_lines(write(tmp_path / "data.jsonl", {**OURS, "query": TALK[:1], "extra": 1})) == [rft.Preference("Hi", ["4", "5"], [1, 0])]


def test_what_step_one_exports_reads_back(tmp_path):
    grm = load_script("01_pointwise_grm")
    items = [grm.Preference("q\u2028\n\"é😀", ["a", "b", "c"], [0.1 + 0.2, -1e300, 3], "s", "", "i"), grm.Preference(TALK, ["only"], [1])]
    grm.export_preferences(items, tmp_path / "out.jsonl")
    assert [vars(p) for p in rft.load_lines(tmp_path / "out.jsonl")] == [vars(p) for p in items]


def test_broken_files_raise_nothing_but_data_errors(tmp_path):
    rng, failed = random.Random(0), 0
    for _ in range(300):
        records = rng.choices([OURS, {**OURS, "query": TALK}], k=3)
        (tmp_path / "a.jsonl").write_bytes(mutate("\n".join(map(json.dumps, records)).encode(), records, rng))
        try:
            rft.load_lines(tmp_path / "a.jsonl")
        except rft.DataError as error:
            failed += 1
            assert str(error).startswith(str(tmp_path / "a.jsonl")) and "\n" not in str(error)
    assert 30 < failed < 300
