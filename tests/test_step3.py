"""Step 3: reward, advantages, clip and KL by hand; a group as one row; the reference; Eq. 15."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from benchmark import copy_of
from conftest import JUDGE, load_script
from test_step2 import families, options, plain_log_probs, same_gradients, tiny, trained

grpo = load_script("03_grpo")


def group(prompt: list[int], outputs: list[list[int]], advantages: list[float]):
    known = {"prompt": prompt, "outputs": outputs, "advantages": advantages}
    known["completion"] = sum(outputs, [])
    return grpo.Group._make(known.get(name) for name in grpo.Group._fields)


# beyond windows of 8 tokens; outputs of one token; padding
GROUPS = [
    group([5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [[20, 21, 22], [23], [24] * 12], [1.0, -0.5, -0.5]),
    group([30, 31], [[32, 33, 2], [34, 2]], [-1.0, 1.0]),
    group([40] * 20, [[41, 42]], [0.5]),
]
PAIRS = [(one.prompt, output) for one in GROUPS for output in one.outputs]


def mean_of_outputs(values: torch.Tensor) -> torch.Tensor:
    """The mean over each output's tokens, then over outputs, of values (tokens,)."""
    parts = values.split([len(output) for _, output in PAIRS])
    return torch.stack([part.mean() for part in parts]).mean()


def test_reward_and_advantages_by_hand():
    cases = [([3, 7, 6], [0, 2, 1], 1), ([7, 7, 6], [0, 2, 1], -1), (None, [0, 1], -1)]
    for scores, rewards, reward in [*cases, ([1], [1], 1), ([1], [0], -1), (None, [0], -1)]:
        assert grpo.reward_of(scores, rewards) == reward
    root = math.sqrt(3)
    assert grpo.group_advantages([1, -1, -1, -1]) == pytest.approx([root] + [-1 / root] * 3)
    assert grpo.group_advantages([1, 1, -1, -1]) == [1, 1, -1, -1]
    assert grpo.group_advantages([-1, -1, -1]) == [0, 0, 0]


def test_kl_by_hand_unbiased_and_never_negative():
    found = grpo.kl_k3(torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.0, -1.0, -2.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, math.e - 2, 1 / math.e]))
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    mean = (p * grpo.kl_k3(p.log(), q.log())).sum()  # over draws from p
    torch.testing.assert_close(mean, (p * (p / q).log()).sum())
    near = torch.linspace(-1e-3, 1e-3, 2001)
    assert (grpo.kl_k3(torch.zeros_like(near), near) >= 0).all()


def test_surrogate_by_hand_on_both_sides_of_the_clip():
    log_probs = (torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 1.1]).log() - 1).requires_grad_()
    found = grpo.surrogate(log_probs, torch.full((6,), -1.0), torch.tensor([2.0, -2.0] * 3))
    torch.testing.assert_close(found, torch.tensor([2.4, -3.0, 1.0, -1.6, 2.2, -2.2]))
    [slope] = torch.autograd.grad(found.sum(), log_probs)  # ratio A, or none where it is clipped
    torch.testing.assert_close(slope, torch.tensor([0.0, -3.0, 1.0, 0.0, 2.2, -2.2]))


@families
def test_a_group_as_one_row_is_each_completion_alone(family):
    model, close = tiny(family), {"atol": 1e-4, "rtol": 1e-4}
    plain, found = plain_log_probs(model, PAIRS), grpo.group_log_probs(model, GROUPS)
    torch.testing.assert_close(found, plain, **close)
    alone = [grpo.group_log_probs(model, [one]) for one in GROUPS]
    torch.testing.assert_close(torch.cat(alone), plain, **close)
    same_gradients(model, found.sum(), plain.sum())


def test_nothing_in_group_log_probs_waits_for_the_device():
    with torch.device("meta"):
        model = tiny("gemma2")
    found = grpo.group_log_probs(model, GROUPS)
    assert found.device.type == "meta" and found.shape == (23,)


def learn(model, reference, fixed) -> tuple[dict, tuple]:
    """What learn() returns, and the gradients that it leaves."""
    model.zero_grad()
    seen = grpo.learn(model, reference, GROUPS, fixed, SimpleNamespace(beta=0.3))
    return seen, tuple(p.grad for p in trained(model).values())


@pytest.mark.parametrize("lora_r, change", [(0, 0.02), (4, 0.2)])
def test_learn_is_equation_15_also_in_later_updates(lora_r, change, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "MICRO_TOKENS", 64)  # several micro-batches
    model, fixed, old = tiny("gemma2"), {}, None
    grpo.set_trainable(model, options(tmp_path, lora_r=lora_r))
    reference, first = copy_of(model), plain_log_probs(model, PAIRS).detach()
    seen, _ = learn(model, reference, {})
    assert abs(seen["kl"]) < 1e-6
    assert seen["entropy"] == pytest.approx(-mean_of_outputs(first).item(), rel=1e-4)
    advantages = [a for one in GROUPS for a in one.advantages]
    advantages = torch.tensor([a for a, (_, output) in zip(advantages, PAIRS) for _ in output])
    for _ in range(3):
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter += change * torch.randn_like(parameter)
        kept = grpo.group_log_probs(reference, GROUPS)
        torch.testing.assert_close(kept, first, atol=1e-4, rtol=1e-4)
        log_probs = plain_log_probs(model, PAIRS)
        old = log_probs.detach() if old is None else old
        ratio = (log_probs - old).exp()
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        kl = (first - log_probs).exp() - (first - log_probs) - 1
        loss = -mean_of_outputs(gain - 0.3 * kl)
        expected = torch.autograd.grad(loss, list(trained(model).values()))
        seen, found = learn(model, reference, fixed)
        assert seen["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
        assert seen["kl"] == pytest.approx(mean_of_outputs(kl).item(), rel=1e-3)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert ((ratio < 0.8) | (ratio > 1.2)).any(), "no ratio was clipped"


@pytest.mark.parametrize("lora_r", [0, 4])
def test_before_learning_the_kl_is_0_for_a_model_with_dropout(lora_r, tmp_path):
    dropout = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.5)
    model = tiny("gpt2", vocab_size=739, max_position_embeddings=1024, **dropout)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(JUDGE / name, tmp_path)
    model, _ = grpo.load_model(str(tmp_path), dtype="float32")
    grpo.set_trainable(model, options(tmp_path, lora_r=lora_r))
    seen, _ = learn(model, copy_of(model), {})
    assert abs(seen["kl"]) < 1e-6


def test_rollouts_are_rewarded_by_the_truth(tmp_path):
    model, tokenizer = grpo.load_model(str(JUDGE), dtype="float32")
    items = grpo.read_lines(JUDGE.parent / "train.jsonl")[:4]
    groups = grpo.roll_out(model, tokenizer, items, options(tmp_path, prompts=4, group_size=4), 1)
    for found in groups:
        one, item = found.judgements[0], items[found.judgements[0].item]
        assert one.responses == [item.responses[i] for i in one.order]
        assert found.prompt == grpo.encode(
            tokenizer, grpo.show(item, 0, one.order, binary=one.binary)
        )
        assert one.binary == (len(item.responses) == 1)
        assert len(found.outputs) == 4 and found.completion == sum(found.outputs, [])
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found.outputs]
        scores = [grpo.read_scores(text, len(one.responses), one.binary)[0] for text in texts]
        truth = [item.rewards[i] for i in one.order]
        assert found.rewards == [grpo.reward_of(of_one, truth) for of_one in scores]
        assert found.advantages == grpo.group_advantages(found.rewards)
    assert {found.judgements[0].item for found in groups} == {0, 1, 2, 3}
    assert {reward for found in groups for reward in found.rewards} == {1.0, -1.0}


def test_prompts_that_are_all_too_long_are_refused(tmp_path):
    model, tokenizer = grpo.load_model(str(JUDGE), dtype="float32")
    one = grpo.Judgement("q", ["long " * 3000, "short"], [1, 0])
    run = SimpleNamespace(write=lambda *what: None)
    args = options(tmp_path, prompts=1, group_size=2)
    with pytest.raises(grpo.UserError, match="too long"):
        next(grpo.practise(model, model, tokenizer, [one], args, run, 0))


def test_a_collapse_is_said_once(monkeypatch, capsys):
    told = []
    good = {"signal": 0.1, "unreadable": 0.5, "kl": 1.0}
    quiet = [good | {"signal": 0.0}] * 9  # one step more is a sign
    for lines in (
        [good] * 3,
        [*quiet, good, *quiet],
        [*quiet, quiet[0]],
        [good | {"unreadable": 0.6}] * 3,
        [good | {"kl": 1.5}] * 3,
    ):
        grpo.say_once.cache_clear()
        monkeypatch.setattr(grpo, "roll_out", lambda *ask: [SimpleNamespace(judgements=[])])
        draw = iter(lines).__next__
        monkeypatch.setattr(grpo, "watch", lambda groups, draw=draw: draw())
        monkeypatch.setattr(grpo, "learn", lambda *ask: {})
        run = SimpleNamespace(write=lambda *what: None)
        steps = grpo.practise(None, None, None, [], None, run, 0)
        assert [next(steps) for _ in lines] == lines
        told.append(capsys.readouterr().out.count("collapse?"))
    assert told == [0, 0, 1, 1, 1]
