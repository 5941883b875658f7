"""Step 2: what is asked, rejected and learnt; the training and saving that later steps share."""

import contextlib
import gc
import itertools
import json
import math
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial

import peft
import pytest
import torch
from conftest import JUDGE, load_script, run_here
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

rft = load_script("02_rejective_ft")
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1}
SIZES |= {"initializer_range": 0.3, "max_position_embeddings": 64, "pad_token_id": 0}
SIZES |= {"eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
FAMILIES = {"gemma2": WINDOWS | {"final_logit_softcapping": 2.0}, "gemma3_text": WINDOWS}
FAMILIES |= {"llama": {}, "qwen3": {}, "phi3": {"sliding_window": 8}, "gpt2": {}}
families = pytest.mark.parametrize("family", FAMILIES)
PAIRS = [([5, 6, 7], [8, 9, 2]), ([10, 11] * 7, [12] * 5 + [2]), ([13], [2]), ([14] * 9, [15, 2])]
EXAMPLES = [rft.Example(*pair) for pair in PAIRS]
RIGHT, WRONG, TIE = [3, 7], [7, 3], [5, 5]


def tiny(family: str, **more):
    """A random model; sliding windows are of 8 tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}) | more)
    return AutoModelForCausalLM.from_config(config).eval()


def options(folder, **changed) -> Namespace:
    usual = {"seed": 0, "lr": 1e-3, "epochs": 1.0, "lora_r": 0, "max_new_tokens": 160}
    usual |= {"shots": False, "instruct_data": None, "ablate": None, "resume": False}
    return Namespace(**usual | {"out": str(folder / "run")} | changed)


def plain_log_probs(model, pairs) -> torch.Tensor:
    """Log-probabilities of the completions' tokens, an unpadded row at a time, from the logits."""
    found = []
    for prompt, completion in pairs:
        log_p = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        found += [log_p[i, token] for i, token in enumerate(completion, len(prompt) - 1)]
    return torch.stack(found)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def same_gradients(model, one: torch.Tensor, other: torch.Tensor) -> None:
    weights, kind = list(trained(model).values()), {"allow_unused": True, "materialize_grads": True}
    found = [torch.autograd.grad(value, weights, **kind) for value in (one, other)]
    torch.testing.assert_close(*found, atol=2e-3, rtol=1e-3)


def judged(scores, rewards=(0, 1), number=0, query="q", **more):
    """A judgement of responses in their own order, with these scores."""
    item = rft.Judgement(query, [f"response {i}" for i in range(len(rewards))], list(rewards))
    one = rft.show(item, number, list(range(len(rewards))), **more)
    one.scores, one.correct = scores, rft.is_correct(scores, item.rewards)
    return one


@pytest.mark.parametrize(
    "scores, hinted, keep_all, expected",
    [
        ([RIGHT, WRONG, None], RIGHT, False, ["kept", "wrong", "", "kept"]),
        ([RIGHT, RIGHT, TIE], WRONG, False, ["kept", "kept", "wrong", "wrong"]),
        ([RIGHT, RIGHT, RIGHT], RIGHT, False, ["too easy"] * 3 + ["kept"]),
        ([RIGHT, RIGHT, RIGHT], WRONG, False, ["too easy"] * 3 + ["wrong"]),
        ([RIGHT, RIGHT, RIGHT], WRONG, True, ["kept"] * 4),
        ([RIGHT, WRONG, None], TIE, True, ["kept", "kept", "", "kept"]),
        ([], RIGHT, False, ["kept"]),
        ([[1], [0], None], [1], False, ["kept", "wrong", "", "kept"]),
    ],
)
def test_reject_by_hand(scores, hinted, keep_all, expected):
    rewards = [1] if [1] in scores else [0, 1]
    group = [judged(one, rewards) for one in scores] + [judged(hinted, rewards, hint="It is 2.")]
    rft.reject(group, keep_all)
    assert [one.reason for one in group] == expected


def test_ask_three_times_without_and_once_with_a_hint(tmp_path):
    items = rft.read_lines(JUDGE.parent / "train.jsonl")[:60]
    asked = rft.ask(items, options(tmp_path))
    assert [one.item for one in asked] == [place // 4 for place in range(240)]
    assert [bool(one.hint) for one in asked] == [place % 4 == 3 for place in range(240)]
    for one in asked:
        item, best = items[one.item], one.rewards.index(max(one.rewards))
        assert one.responses == [item.responses[i] for i in one.order]
        assert one.rewards == [item.rewards[i] for i in one.order]
        assert one.binary == (len(item.responses) == 1)
        number = "".join(filter(str.isdigit, rft.build_prompt(one).splitlines()[-1]))
        assert not one.hint or int(number) == (one.rewards[0] if one.binary else best + 1)
    assert len({(one.item, *one.order) for one in asked}) > 1.5 * 60, "there is one order an item"
    assert rft.ask(items, options(tmp_path, ablate="no-non-hinted")) == asked[3::4]
    plain = [one for one in asked if not one.hint]
    assert rft.ask(items, options(tmp_path, ablate="no-hinted")) == plain


def test_samples_are_drawn_at_the_temperature_asked_for(tmp_path, monkeypatch):
    items = rft.read_lines(JUDGE.parent / "train.jsonl")
    single = [one for one in items if len(one.responses) == 1][:3]  # there is one order only
    data, found = tmp_path / "data.jsonl", []
    data.write_text("".join(json.dumps(asdict(one)) + "\n" for one in single))
    for heat in ("0", "1"):
        with contextlib.suppress(SystemExit):  # all may be too easy
            wanted = "--data", data, "--temperature", heat, "--epochs", "0.1", "--out", heat
            run_here(monkeypatch, tmp_path, "02_rejective_ft.py", *wanted)
        drawn = rft.read_lines(tmp_path / heat / "trajectories.jsonl")
        found.append([len({one.output for one in drawn[4 * i :][:3]}) for i in range(3)])
    assert found[0] == [1, 1, 1] and max(found[1]) > 1


def test_examples_are_outputs_after_prompts_without_a_hint(tmp_path):
    model, tokenizer = rft.load_model(str(JUDGE))
    kept = [judged(RIGHT, hint="The best response is number 2."), judged(RIGHT)]
    for one in kept:
        one.output = "Analysis: Response 2 lists map. Scores: \\boxed{3, 7}"
    turns = {"system": "Be brief.", "user": "Name a tool.", "assistant": "Saw."}
    messages = [{"role": role, "content": text} for role, text in turns.items()]
    file, end = tmp_path / "instruct.jsonl", rft.end_tokens(model, tokenizer)[0]
    file.write_text(json.dumps({"messages": messages}) + "\n")
    args = options(tmp_path, instruct_data=str(file))
    mixed = rft.make_examples(model, tokenizer, kept, args)
    examples = rft.make_examples(model, tokenizer, kept, options(tmp_path))
    assert mixed[:2] == examples and len(mixed) == 4  # one to one
    for one, (prompt, completion) in zip(kept, examples, strict=True):
        assert prompt == rft.encode(tokenizer, replace(one, hint=""))
        assert "number 2" not in tokenizer.decode(prompt)
        assert tokenizer.decode(completion[:-1]) == one.output and completion[-1] == end
    prompt, completion = tokenizer.decode(mixed[3].prompt), mixed[3].completion
    assert "Be brief." in prompt and "Name a tool." in prompt and "Saw." not in prompt
    assert tokenizer.decode(completion[:-1]) == "Saw." and completion[-1] == end
    messages[-1]["content"] = "Saw. " * rft.MICRO_TOKENS  # would not fit into a forward pass
    file.write_text(json.dumps({"messages": messages}) + "\n")
    assert rft.make_examples(model, tokenizer, kept, args) == examples
    for wrong in (3, [], messages[:2], messages[1:] + messages[1:2]):  # the last is the user's
        file.write_text(json.dumps({"messages": wrong}) + "\n")
        with pytest.raises(rft.UserError, match="instruct.jsonl"):
            rft.make_examples(model, tokenizer, kept, args)


@families
def test_log_probs_and_gradients_are_those_of_the_plain_model(family, monkeypatch):
    monkeypatch.setattr(rft, "LOGITS_AT_ONCE", 5 * 61)  # chunks of five tokens
    model = tiny(family)
    plain, found = -plain_log_probs(model, PAIRS), rft.completion_losses(model, EXAMPLES)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)
    rft.check_loss(model, EXAMPLES)
    same_gradients(model, found.sum(), plain.sum())


def test_a_head_that_is_more_than_a_product_is_refused():
    model = tiny("modernbert-decoder", local_attention=8)
    with pytest.raises(rft.UserError, match="loss"):
        rft.check_loss(model, EXAMPLES)


@pytest.mark.parametrize("count, size", [(7, 3), (2, 5), (6, 6), (1, 4)])
def test_every_epoch_is_a_permutation(count, size):
    stream = rft.stream(count, 4 * count * size, 0)
    epochs = [stream[i : i + count] for i in range(0, len(stream), count)]
    assert rft.stream(count, 3 * size, 0) == stream[: 3 * size] and len(stream) == 4 * count * size
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 6 or len(set(map(tuple, epochs))) > 2


def test_micro_batches_hold_everything_within_the_limit():
    lengths = [*range(2, 2900, 59), 3 * rft.MICRO_TOKENS]
    batches = list(rft.micro_batches([rft.Example([n] * (n - 1), [1]) for n in lengths]))
    found = [[one.prompt[0] for one in batch] for batch in batches]
    assert sorted(sum(found, [])) == lengths and 8 < len(batches) < 20
    assert all(len(one) == 1 or max(one) * len(one) <= rft.MICRO_TOKENS for one in found)


def test_learning_rate_and_log(tmp_path):
    """Under a constant gradient, a step of Adam is as long as the learning rate."""
    model, args, rates = tiny("llama").requires_grad_(False), options(tmp_path, lr=1e-2), []
    weight = model.model.norm.weight.requires_grad_()
    run, tokenizer = rft.Run(args), AutoTokenizer.from_pretrained(JUDGE)

    def gradients(first, slope=0.01):
        while True:
            rates.append(-weight.mean().item() / 1e-2)
            weight.grad = torch.full_like(weight, slope)
            yield {"loss": 1.0}

    rft.train(model, tokenizer, 20, gradients, args, run)
    next(gradients(20))
    rates = [after - before for before, after in itertools.pairwise(rates)]
    for step, expected in {0: 0.5, 1: 1, 2: 1, 8: 0.775, 11: 0.55, 14: 0.325, 19: 0.107}.items():
        assert rates[step] == pytest.approx(expected, abs=1e-3)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [line["step"] for line in log] == list(range(1, 21)) and log[0]["loss"] == 1.0
    with pytest.raises(rft.UserError, match="--lr"):
        rft.train(model, tokenizer, 21, partial(gradients, slope=math.nan), args, run)


def test_what_is_trained(tmp_path):
    model, _ = rft.load_model(str(JUDGE), dtype="bfloat16")
    rft.set_trainable(model, options(tmp_path))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert len(trained(model)) == len(list(model.parameters()))
    model, _ = rft.load_model(str(JUDGE), "nf4")
    with pytest.raises(rft.UserError, match="--lora-r"):
        rft.set_trainable(model, options(tmp_path))
    rft.set_trainable(model, options(tmp_path, lora_r=4))
    assert trained(model) and all("lora_" in name for name in trained(model))
    with torch.no_grad():
        rft.completion_losses(model, EXAMPLES)  # sampling must not spoil gradients
    rft.completion_losses(model, EXAMPLES).sum().backward()
    assert all(p.grad.any() for name, p in trained(model).items() if "lora_B" in name)


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_computes_in_the_dtype_of_the_model(dtype, lora_r, tmp_path):
    model, _ = rft.load_model(str(JUDGE), dtype=dtype)
    rft.set_trainable(model, options(tmp_path, lora_r=lora_r))
    seen = set()
    model.base_model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, taken, given: seen.add(given.dtype)
    )
    next(rft.descend(model, EXAMPLES, rft.completion_losses, 2, 0, 0))
    assert seen == {getattr(torch, dtype)}
    assert {p.grad.dtype for p in trained(model).values()} == {torch.float32}


@pytest.mark.parametrize("lora_r", [0, 4])
def test_adapters_of_another_kind_are_refused(lora_r, tmp_path):
    """Else all weights would be trained, but only the adapters saved."""
    model, _ = rft.load_model(str(JUDGE), dtype="float32")
    model.add_adapter(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(rft.UserError, match="LoRA"):
        rft.set_trainable(model, options(tmp_path, lora_r=lora_r))


def test_saved_adapters_are_pefts_and_load_from_anywhere(tmp_path, monkeypatch):
    ids = torch.tensor([[1, 40, 300, 5, 77, 400]])
    monkeypatch.chdir(JUDGE.parent)
    base = AutoModelForCausalLM.from_pretrained(JUDGE, dtype=torch.float32)
    model, tokenizer = rft.load_model("judge", dtype="float32")
    rft.set_trainable(model, options(tmp_path, lora_r=4))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits)  # they begin at zero
        for parameter in trained(model).values():
            parameter += 0.05 * torch.randn_like(parameter)
        logits = model(ids).logits
        assert (logits - base(ids).logits).abs().max() > 0.1
        run = rft.Run(options(tmp_path, model="judge"))
        rft.train(model, tokenizer, 0, itertools.repeat, options(tmp_path), run)
        folder = run.folder / "model"
        by_peft = peft.PeftModel.from_pretrained(base, folder).eval()
        torch.testing.assert_close(by_peft(ids).logits, logits)
        monkeypatch.chdir(tmp_path)
        again, _ = rft.load_model(str(folder), dtype="float32")
        torch.testing.assert_close(again(ids).logits, logits)
    rft.set_trainable(again, options(tmp_path))
    assert list(trained(again)) == list(trained(model))


class Cut(BaseException):
    """Ends training as a kill does: nothing in a script catches it."""


def train_tiny(folder, lora_r=0, size=2, last=None, **changed):
    """Train a tiny model on ten examples, up to a call of the loss. Returns weights and calls."""
    torch.manual_seed(1)
    examples = [rft.Example(row[:3], row[3:]) for row in torch.randint(3, 61, (10, 8)).tolist()]
    model, args, calls = tiny("llama"), options(folder, lora_r=lora_r, **changed), []

    def loss_of(model, batch):
        calls.append(batch)
        if len(calls) == last:
            raise Cut
        return rft.completion_losses(model, batch)

    rft.set_trainable(model, args)
    steps, run = math.ceil(args.epochs * len(examples) / size), rft.Run(args)
    gradients = partial(rft.descend, model, examples, loss_of, size, args.seed)
    rft.train(model, AutoTokenizer.from_pretrained(JUDGE), steps, gradients, args, run)
    return trained(model), len(calls)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_training_goes_on_from_the_checkpoint(lora_r, tmp_path):
    weights, calls = train_tiny(tmp_path / "whole", lora_r, epochs=12.0)
    with pytest.raises(Cut):
        train_tiny(tmp_path / "cut", lora_r, last=57, epochs=12.0)
    gc.collect()  # a run holds a lock as long as it lives
    resumed, later = train_tiny(tmp_path / "cut", lora_r, epochs=12.0, resume=True)
    assert calls == 60 and later < 57, "it began again"
    for name, weight in weights.items():
        assert (resumed[name] - weight).norm() <= 1e-4 * weight.norm(), name
    paths = [tmp_path / name / "run" / "log.jsonl" for name in ("whole", "cut")]
    logs = [[json.loads(line) for line in path.open()] for path in paths]
    assert [[line["step"] for line in log] for log in logs] == [list(range(1, 61))] * 2
    losses = [[line["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][-1] < losses[0][0]
