"""03_grpo.py: reward, advantages, clip and KL by hand, the reference, that ranks share a step, that a killed run resumes to the same weights."""
import json
import math
import random
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import JUDGE, ROOT, cut_and_resume, gemma_270m, load_script, refusal, run
from test_sampler import random_gemma

grpo, rft = load_script("03_grpo"), load_script("02_rejective_ft")
TRAIN = JUDGE.parent / "train.jsonl"
OPTIONS = SimpleNamespace(max_new_tokens=160, batch_size=64, seed=0, model=str(JUDGE), quantize="none", lora_r=None, lr=1e-3, micro_tokens=4096,
                          group_size=4, flip_reward=False, beta=0.1, clip_eps=0.2, epochs_per_rollout=1, easy=3, data="data.jsonl")
TINY = ("--limit", 8, "--eval-limit", 5, "--k", 1, "--max-new-tokens", 160, "--prompts", 3, "--group-size", 3, "--steps", 5, "--save-every", 1,
        "--eval-every", 2, "--watch", 3, "--easy", 2, "--batch-size", 64, "--model", JUDGE)
STEP = "03_grpo.py"


def options(**changed):
    return SimpleNamespace(**vars(OPTIONS) | changed)


def test_reward_by_hand():
    assert grpo.reward_of([3, 7, 6], [0, 2, 1]) == 1 and grpo.reward_of([7, 7, 6], [0, 2, 1]) == -1  # a tie earns nothing
    assert grpo.reward_of(None, [0, 1]) == -1 and grpo.reward_of([1], [1]) == 1 and grpo.reward_of([1], [0]) == -1


def test_advantages_by_hand():
    assert grpo.group_advantages([1, 1, -1, -1]) == [1, 1, -1, -1]
    assert grpo.group_advantages([1, -1, -1, -1]) == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3)
    assert grpo.group_advantages([1, 1, 1]) == [0, 0, 0] and grpo.group_advantages([-1, -1]) == [0, 0]


def test_kl_by_hand_and_without_bias():
    log_probs, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
    torch.testing.assert_close(grpo.kl_k3(log_probs, reference), torch.tensor([0.0, math.e - 2]))
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    estimate = (p * grpo.kl_k3(p.log(), q.log())).sum()  # its mean over draws from p
    torch.testing.assert_close(estimate, (p * (p / q).log()).sum())


def test_clipping_by_hand():
    old = torch.zeros(6)
    new = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.1]).log()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    expected = torch.tensor([2.4, -3.0, 1.0, -1.6, 2.2, -2.2])  # min(ratio A, clipped ratio A) at eps = 0.2
    torch.testing.assert_close(grpo.surrogate(new, old, advantages, 0.2), expected)


def test_gradients_of_clip_and_kl_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    new, old, reference, advantages = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(4))

    def objective(log_probs):
        return (grpo.surrogate(log_probs, old, advantages, 0.2) - 0.08 * grpo.kl_k3(log_probs, reference)).sum()

    new.requires_grad_()
    [gradient] = torch.autograd.grad(objective(new), [new])
    for i in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[i] = 1e-6
        assert gradient[i].item() == pytest.approx(((objective(new + step) - objective(new - step)) / 2e-6).item(), rel=1e-5, abs=1e-8)


def rollouts_of(model, tokenizer, args):
    items = grpo.load_lines(TRAIN)[:3]
    return items, grpo.roll_out(model, tokenizer, items, [2, 0], args, 5)


def test_roll_out_shuffles_per_prompt_and_rewards_by_the_truth():
    model, tokenizer = grpo.load_model(JUDGE)
    items, groups = rollouts_of(model, tokenizer, OPTIONS)
    assert [len(group) for group in groups] == [4, 4] and all(len({tuple(one.prompt) for one in group}) == 1 for group in groups)
    shown = grpo.show(items[2], 2, "0 5", binary=len(items[2].responses) == 1)
    for one in groups[0]:
        assert one.prompt == grpo.encode(tokenizer, shown.prompt(hinted=False))
        scores = grpo.read_judgement(tokenizer.decode(one.output, skip_special_tokens=True), len(shown.responses), shown.binary).scores
        assert one.readable == (scores is not None) and one.reward == grpo.reward_of(scores, shown.rewards)
    _, flipped = rollouts_of(model, tokenizer, options(flip_reward=True))
    assert [[one.reward for one in group] for group in flipped] == [[-one.reward for one in group] for group in groups]


@pytest.mark.parametrize("version", [2, 3, 4])
def test_reading_the_prompt_once_gives_the_same_log_probs(version):
    model = random_gemma(version)  # with a sliding window of 8
    groups = [([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [[20, 21, 22], [23], [24] * 12]), ([30, 31], [[32, 33], [34]]), ([40] * 20, [[41, 42]])]
    alone = rft.completion_log_probs(model, [(prompt, output) for prompt, outputs in groups for output in outputs])
    torch.testing.assert_close(grpo.group_log_probs(model, groups), alone, atol=1e-5, rtol=1e-5)
    for group in groups:
        torch.testing.assert_close(grpo.group_log_probs(model, [group]),
                                   rft.completion_log_probs(model, [(group[0], output) for output in group[1]]), atol=1e-5, rtol=1e-5)


def rollout(prompt, output, advantage):
    return grpo.Rollout(prompt, output, 1.0, True, advantage)


def test_the_update_is_equation_15():
    """One step of plain gradient descent against the loss written out for every token, from a policy that has left both old and reference."""
    model, tokenizer = grpo.load_model(JUDGE)
    groups = [[rollout([5, 6, 7], [30, 31, 2], 1.5), rollout([5, 6, 7], [40, 2], -1.5)], [rollout([9] * 12, [50, 51, 52, 53], 0.5)]]
    reference = grpo.Reference(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    args, total = options(beta=0.3, micro_tokens=16), 0
    for one in groups[0] + groups[1]:
        ids, start = torch.tensor([one.prompt + one.output]), len(one.prompt)
        new, ref = (torch.log_softmax(of(input_ids=ids).logits[0], -1)[range(start - 1, len(ids[0]) - 1), one.output]
                    for of in (model, reference.model))
        ratio = (new - new.detach()).exp()
        clipped = torch.minimum(ratio * one.advantage, ratio.clamp(0.8, 1.2) * one.advantage)
        total = total - (clipped - 0.3 * ((ref.detach() - new).exp() - (ref.detach() - new) - 1)).mean() / 3
    parameters = dict(model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values()))))
    seen = {}
    optimizer = SimpleNamespace(param_groups=[{}], zero_grad=lambda: None,
                                step=lambda: seen.update({name: p.grad.clone() for name, p in parameters.items()}))
    metrics = grpo.learn(model, reference, parameters, optimizer, groups, 1.0, 0, args)
    assert metrics["loss"] == pytest.approx(total.item(), abs=1e-5) and metrics["kl"] > 0 and metrics["clipped"] == 0
    scale = min(1.0, 1 / metrics["norm"])  # the gradient is clipped to norm 1
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name] * scale, atol=1e-6, rtol=1e-3)


def test_later_passes_are_clipped_and_equal_rewards_without_kl_change_nothing():
    model, tokenizer = grpo.load_model(JUDGE)
    groups = [[one._replace(advantage=(-1.0) ** i) for i, one in enumerate(group)] for group in rollouts_of(model, tokenizer, OPTIONS)[1]]
    reference, (parameters, optimizer) = grpo.Reference(model), grpo.start_training(model, OPTIONS)
    assert grpo.learn(model, reference, parameters, optimizer, groups, 3e-2, 0, options(epochs_per_rollout=3))["clipped"] > 0
    model, _ = grpo.load_model(JUDGE)
    parameters, optimizer = grpo.start_training(model, OPTIONS)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    groups = [[one._replace(advantage=0.0) for one in group] for group in groups]
    metrics = grpo.learn(model, grpo.Reference(model), parameters, optimizer, groups, 1e-2, 0, options(beta=0))
    assert metrics["norm"] == 0 and all(torch.equal(p, before[name]) for name, p in parameters.items())


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_reference_stays_where_the_model_was(lora_r):
    model, tokenizer = grpo.load_model(JUDGE)
    grpo.set_trainable(model, options(lora_r=lora_r))
    groups = [([5, 6, 7], [[30, 31, 2], [40]])]
    start_at = grpo.group_log_probs(model, groups).detach()
    reference = grpo.Reference(model)
    assert (reference.model is model) == bool(lora_r)  # with adapters there is no second model in memory
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    moved = grpo.group_log_probs(model, groups).detach()
    torch.testing.assert_close(reference.log_probs(groups), start_at)
    assert (moved - start_at).abs().max() > 0.01
    assert torch.equal(grpo.group_log_probs(model, groups).detach(), moved)  # swapped back


def test_under_autocast_the_reference_is_still_another_model():
    """Autocast keeps a parameter's copy in bfloat16, and swapped weights must not be taken for those that it knows."""
    model, tokenizer = grpo.load_model(JUDGE)
    grpo.set_trainable(model, options(lora_r=4))
    reference = grpo.Reference(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    groups = [([5, 6, 7], [[30, 31, 2], [40]])]
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = grpo.group_log_probs(model, groups)
        ref = reference.log_probs(groups)
        assert (log_probs - ref).abs().max() > 0.01
        torch.testing.assert_close(grpo.group_log_probs(model, groups), log_probs)


def test_easy_items_are_left_out_and_counted_once(tmp_path, monkeypatch, capsys):
    items = [grpo.Preference(f"q{i}", ["a", "b"], [0, 1]) for i in range(10)]
    calls = []

    def judge(model, tokenizer, shown, *_):
        calls.append(len(shown))
        for i, t in enumerate(shown):
            t.correct = t.item % 3 > 0 or i % 3 > 0  # items 0, 3, 6, 9 are wrong in the first of their samples
            t.reason = "" if t.item != 3 else "unreadable: the prompt of 9 tokens is too long"

    monkeypatch.setattr(grpo, "judge", judge)
    def load():
        return None, None

    assert grpo.hard_items(load, items, OPTIONS, tmp_path, chunk=4) == [0, 6, 9] and calls == [12, 12, 6]
    assert "7 of 10 items are too easy" in capsys.readouterr().out
    assert grpo.hard_items(None, items, OPTIONS, tmp_path, chunk=4) == [0, 6, 9] and len(calls) == 3  # taken over
    items[4] = grpo.Preference("q4", ["a" * 9000, "b"], [0, 1])
    everything = grpo.hard_items(lambda: grpo.load_model(JUDGE), items, options(easy=0), tmp_path / "none", chunk=4)
    assert everything == [0, 1, 2, 3, 5, 6, 7, 8, 9] and "1 of 10 items are too long" in capsys.readouterr().out
    monkeypatch.setattr(grpo, "judge", lambda model, tokenizer, shown, *_: [setattr(t, "correct", True) for t in shown])
    with pytest.raises(grpo.DataError, match="data.jsonl: all 10 items are too easy"):
        (tmp_path / "easy.jsonl").unlink()
        grpo.hard_items(load, items, OPTIONS, tmp_path)


UPDATE = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_step3 import *
    grpo.join_ranks()
    model, tokenizer = grpo.load_model(JUDGE)
    groups = [[rollout([5, 6, 7 + i], [30 + j, 31, 2][:2 + i % 2], (-1.0) ** j * (1 + i)) for j in range(3)] for i in range(4)]
    reference, (parameters, optimizer) = grpo.Reference(model), grpo.start_training(model, OPTIONS)
    for step in range(2):
        metrics = grpo.learn(model, reference, parameters, optimizer, groups, 1e-3, step, OPTIONS)
    metrics = [metrics, grpo.learn(model, reference, parameters, optimizer, groups[:1], 1e-3, 2, OPTIONS)]  # the second rank has none
    drawn = grpo.sample(model, tokenizer, [[5, 6, 7], [8, 9], [5, 6, 7], [10] * 9], 2, 0.0, 8, progress=False)
    grpo.put(grpo.Path({out!r}), lambda aside: torch.save([metrics, dict(model.named_parameters()), [[s.ids for s in of] for of in drawn]], aside))
"""


def test_two_ranks_take_the_same_step_as_one(tmp_path):
    results = []
    for ranks in (1, 2):
        program, out = tmp_path / f"update{ranks}.py", tmp_path / f"weights{ranks}.pt"
        program.write_text(textwrap.dedent(UPDATE.format(tests=str(ROOT / "tests"), out=str(out))))
        run(tmp_path, program, ranks=ranks)
        results.append(torch.load(out, weights_only=True))
    (metrics, weights, drawn), (metrics2, weights2, drawn2) = results
    assert all(two == pytest.approx(one, rel=1e-4, abs=1e-6) for one, two in zip(metrics, metrics2, strict=True)) and drawn2 == drawn
    origin = dict(grpo.load_model(JUDGE)[0].named_parameters())
    for name in weights:
        torch.testing.assert_close(weights2[name], weights[name], atol=2e-5, rtol=1e-4)
    assert any((weights[name] - origin[name]).abs().max() > 1e-3 for name in weights)


def test_two_ranks_run_from_end_to_end(tmp_path):
    shown, _ = run(tmp_path, STEP, *TINY, "--out", "two", ranks=2)
    assert shown.count("one sample, strict") == 1  # rank 0 alone prints
    assert (tmp_path / "two" / "log.jsonl").read_text().count("\n") == 5
    shown, _ = run(tmp_path, "02_rejective_ft.py", "--limit", 6, "--eval-limit", 4, "--k", 1, "--max-new-tokens", 160, "--train-batch", 4,
                   "--model", JUDGE, "--out", "rft", ranks=2)
    assert shown.count("not hinted") == 1 and (tmp_path / "rft" / "trajectories.jsonl").read_text().count("\n") == 24


@pytest.mark.parametrize("lora_r", [0, 4], ids=["all weights", "LoRA"])
def test_killed_and_resumed_gives_the_same_weights(tmp_path, lora_r):
    extra, weights = ("--lora-r", lora_r), "adapter_model.safetensors" if lora_r else "model.safetensors"
    shown, _ = run(tmp_path, STEP, *TINY, *extra, "--out", "whole")
    assert "one sample, strict" in shown and "too easy" in shown
    assert (tmp_path / "whole" / "training.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and ["eval_strict" in line for line in lines] == [False, True, False, True, True]
    assert {"reward", "signal", "kl", "clipped", "entropy", "length", "unreadable", "norm", "seconds_rollout", "seconds_training"} <= lines[0].keys()
    cut_and_resume(tmp_path, STEP, *TINY, *extra, at=random.randint(2, 3), politely=bool(lora_r),
                   same=(f"model/{weights}", "easy.jsonl", "before_samples.jsonl", "after_samples.jsonl"))


@pytest.mark.parametrize("arguments, message", [
    (["--data", "missing.jsonl"], "error: missing.jsonl: No such file"),
    (["--data", "one.jsonl", "--held-out"], "error: one.jsonl: no items are left to train on"),
    (["--resume"], "error: --resume: there is no run in runs/03_grpo"),
    (["--model", "nobody/nothing"], "error: cannot load the model nobody/nothing"),
    (["--group-size", "1"], "--group-size must be at least 2"),
    (["--steps", "0"], "--steps must be from 1 to"), (["--beta", "nan"], "--beta must be from 0 to"),
    (["--clip-eps", "1"], "between 0 and 1"), (["--quantize", "nf4", "--lora-r", "0"], "quantized weights cannot be trained")])
def test_bad_input_gets_one_clear_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "one.jsonl").write_text('{"query": "x", "responses": ["a", "b"], "rewards": [0, 1]}\n')
    assert message in refusal(monkeypatch, capsys, tmp_path, STEP, *arguments)


def test_what_is_not_finite_stops_with_the_step():
    model, tokenizer = grpo.load_model(JUDGE)
    parameters, optimizer = grpo.start_training(model, OPTIONS)
    with pytest.raises(grpo.ModelError, match=r"step 8: the loss is nan .* go on with --resume --lr"):
        grpo.learn(model, grpo.Reference(model), parameters, optimizer, [[rollout([5, 6], [30, 2], math.nan)]], 1e-3, 7, OPTIONS)


@pytest.mark.gemma
def test_gemma_3_270m_takes_two_steps_in_4_bits(tmp_path):
    """Its outputs cannot be read (a base model), so the rewards are set here; what is tested is the machinery: rollouts, adapters, reference."""
    model, tokenizer = grpo.load_model(gemma_270m(), "nf4")
    args = options(quantize="nf4", lora_r=8, group_size=2, max_new_tokens=12)
    grpo.set_trainable(model, args)
    reference, (parameters, optimizer) = grpo.Reference(model), grpo.start_training(model, args)
    items = grpo.load_lines(TRAIN)[:2]
    for step in range(2):
        groups = [[one._replace(advantage=(-1.0) ** i) for i, one in enumerate(group)]
                  for group in grpo.roll_out(model, tokenizer, items, [0, 1], args, step)]
        metrics = grpo.learn(model, reference, parameters, optimizer, groups, 1e-3, step, args)
        assert math.isfinite(metrics["loss"]) and metrics["norm"] > 0 and (metrics["kl"] > 1e-7) == (step > 0)
    assert all(p.grad is None for p in parameters.values()) and reference.model is model
