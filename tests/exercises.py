"""The checks of tests/exercises.md. Each fails on the scripts as they are and passes once solved.

    pytest tests/exercises.py -k 03_2            checks exercise 2 of step 3

A plain `pytest` runs none of them. SPCT_SCRIPTS=folder checks the scripts in another folder.
"""

import importlib.util
import inspect
import itertools
import math
import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import world
from conftest import JUDGE, ROOT

NAN, ABSENT = math.nan, -math.inf  # scores of an unreadable sample; of a response that is not there
ARGS = SimpleNamespace(shots=False, max_new_tokens=200, prompts=2, group_size=4, seed=0)


def script(number: str):
    """The student's script 01 to 05, run anew."""
    [path] = Path(os.environ.get("SPCT_SCRIPTS", ROOT)).glob(f"{number}_*.py")
    spec = importlib.util.spec_from_file_location(f"exercise_{number}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # before it runs: dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def expect(condition, message: str) -> None:
    """Fail with the message only: the assertion itself would show the answer."""
    if not condition:
        pytest.fail(message, pytrace=False)


def equal(what: str, found, expected) -> None:
    """Fail with what was found and what was expected."""
    found = found.tolist() if torch.is_tensor(found) else found
    same = found == pytest.approx(expected, abs=1e-5)
    expect(same, f"{what} should be {expected}, and is {found}")


def given(module, name: str):
    """What the student was to write."""
    path = Path(module.__file__).name
    expect(hasattr(module, name), f"{path} has no {name} yet: write it above main()")
    return getattr(module, name)


def predicted(module, name: str, values: list[float], hint: str) -> None:
    """Compare a constant of the student's with the right values, which are not shown."""
    answer = given(module, name)
    answer = list(answer) if isinstance(answer, list | tuple) else [answer]
    fine = len(answer) == len(values) and all(type(one) in (int, float) for one in answer)
    expect(fine, f"{name} should be {len(values)} number(s), and is {answer}")
    wrong = [one for one, value in zip(answer, values) if abs(one - value) > 0.002]
    expect(not wrong, f"{name}: not {wrong}. {hint}")


def pretend(module, patch, write) -> list[str]:
    """Put a judge of our own in the place of the model: it says write(prompt's text, temperature).
    Returns the prompts, as they come."""
    signature, prompts = inspect.signature(module.sample), []

    def sample(*positional, **named):
        asked = signature.bind(*positional, **named).arguments
        tokenizer, drawn = asked["tokenizer"], []
        for prompt in map(tokenizer.decode, asked["prompts"]):
            prompts.append(prompt)
            text = write(prompt, asked["temperature"])
            drawn.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        return drawn

    patch.setattr(module, "sample", sample)
    return prompts


def shown_responses(prompt: str) -> list[str]:
    """The responses in a prompt, in its order."""
    return re.findall(r"\[Response [0-9]+ begins\]\n(.*?)\n\[Response", prompt, re.DOTALL)


def verdict(scores) -> str:
    return f"Analysis: as the scores say.\nScores: \\boxed{{{', '.join(map(str, scores))}}}"


def eval_pairs(step, count: int) -> list:
    """The first items with two responses in eval.jsonl."""
    items = step.read_lines(JUDGE.parent / "eval.jsonl")
    return [item for item in items if len(item.responses) == 2][:count]


def greedy(step, model, tokenizer, items) -> list:
    """The scores of greedy judgements, of which each shows both responses."""
    prompts = [step.encode(tokenizer, step.show(item, 0, [0, 1])) for item in items]
    drawn = step.sample(model, tokenizer, prompts, 0.0, ARGS)
    return [step.read_scores(tokenizer.decode(ids), 2)[0] for ids in drawn]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def tell(capsys):
    """Says something to the student while a check runs."""

    def say(text):
        with capsys.disabled():
            print(f"\n{text}", end=" ")

    return say


def test_01_1_a_lazy_judge():
    step, judgements = script("01"), []
    for n in [2] * 6 + [3] * 3 + [4]:
        item = step.Judgement(f"q{n}", [f"r{j}" for j in range(n)], [1] + [0] * (n - 1))
        judgements.append(step.show(item, len(judgements), list(range(n)), scores=[5] * n))
    rows = {name.split()[0]: row["mean"] for name, row in step.measure(judgements).items()}
    values = [rows[name] for name in ("accuracy", "strict", "ties")]
    predicted(step, "LAZY", values, "How often does a random choice find the best response?")


def test_01_2_judged_alone(monkeypatch, tell):
    step = script("01")
    judge_alone = given(step, "judge_alone")
    deserved = {"Seven.": 7, "Nine.": 2, "Eleven.": 10, "Mumble.": None}
    asked = ["Seven.", "Nine."], ["Nine.", "Seven.", "Eleven."], ["Mumble.", "Nine."], ["Eleven."]
    items = [step.Judgement("A prime?", of, [1] + [0] * (len(of) - 1)) for of in asked]

    def write(prompt, temperature):
        shown = shown_responses(prompt)
        expect(temperature == 0, f"judge_alone: it samples at temperature {temperature}, not at 0")
        expect(step.BINARY not in prompt, "judge_alone: the scores should run from 1 to 10")
        expect(len(shown) == 1, f"judge_alone: a prompt shows {len(shown)} responses, not one")
        return "I cannot say." if deserved[shown[0]] is None else verdict([deserved[shown[0]]])

    model, tokenizer = step.load_model(JUDGE)
    with monkeypatch.context() as patch:
        pretend(step, patch, write)
        scores = judge_alone(None, tokenizer, items, ARGS)
    right = list(scores) == [[7, 2], [2, 7, 10], None, [10]]
    expect(right, f"judge_alone: a judge gives {deserved}. Of {asked} it returned {scores}")
    pairs = eval_pairs(step, 8)
    turned = [step.Judgement(p.query, p.responses[::-1], p.rewards[::-1]) for p in pairs]
    alone = [judge_alone(model, tokenizer, of, ARGS) for of in (pairs, turned)]
    together = [greedy(step, model, tokenizer, of) for of in (pairs, turned)]
    same = [sum(a == (b and b[::-1]) for a, b in zip(*way)) for way in (alone, together)]
    tell(f"Of 8 pairs with their responses turned round, {same[0]} keep their scores if")
    tell(f"the embedded judge sees one response, {same[1]} if it sees both.")
    expect(same[0] == 8, "judge_alone: the order of the responses changes scores")


def test_01_3_principles_decide(tell):
    step = script("01")
    judge_by = given(step, "judge_by")
    model, tokenizer = step.load_model(JUDGE)
    pairs, true, modals = eval_pairs(step, 24), [], ["", "could", "should", "must"]
    for item in pairs:
        asked = [(c.importance, c.text) for c in world.criteria_of(item.query)]
        true.append(
            "; ".join(f"{modals[weight]} {text} (weight {weight})" for weight, text in asked)
        )
    texts = judge_by(model, tokenizer, pairs, true, ARGS)
    for text, principle in zip(texts, true):
        head = f"Specific Criteria: {principle}.\nAnalysis: Response 1 lists"
        expect(text.startswith(head), f"judge_by: a text should begin with {head!r}: {text!r}")
    told = [step.read_scores(text, 2)[0] for text in texts]
    for who, scores in (("its own", greedy(step, model, tokenizer, pairs)), ("true", told)):
        right = [step.chance_of_best(of, item.rewards) for of, item in zip(scores, pairs)]
        tell(f"By {who} principles, the judge is right in {sum(right) / 24:.0%} of 24 pairs.")


def named_in(text: str) -> set[str]:
    """The criteria of a judgement, or of its first line."""
    line = text.partition("Specific Criteria: ")[2] or text
    return set(line.partition("\n")[0].strip().rstrip(".").split("; "))


def test_01_4_principles_from_the_query_alone(monkeypatch, tell):
    step = script("01")
    principles_alone = given(step, "principles_alone")
    model, tokenizer = step.load_model(JUDGE)
    pairs = eval_pairs(step, 24)

    def write(prompt, temperature):
        expect(temperature == 0, f"principles_alone: it samples at temperature {temperature}")
        shown = shown_responses(prompt)
        expect(not shown, f"principles_alone: a prompt shows {len(shown)} responses")
        return f"Specific Criteria: {len(prompt)} (weight 1); b (weight 2).\n" + verdict([1])

    with monkeypatch.context() as patch:
        pretend(step, patch, write)
        found = principles_alone(None, tokenizer, pairs, ARGS)
    for text in found:
        right = re.fullmatch(r"\d+ \(weight 1\); b \(weight 2\)", text)
        expect(right, f"principles_alone: the criteria alone, without a full stop, not {text!r}")
    alone = [named_in(text) for text in principles_alone(model, tokenizer, pairs, ARGS)]
    ways = {"the query alone": alone}
    for name, best_first in (("best response first", True), ("worst response first", False)):
        orders = [sorted((0, 1), key=p.rewards.__getitem__, reverse=best_first) for p in pairs]
        shown = [step.show(item, 0, order) for item, order in zip(pairs, orders)]
        prompts = [step.encode(tokenizer, one) for one in shown]
        drawn = step.sample(model, tokenizer, prompts, 0.0, ARGS)
        ways[name] = [named_in(tokenizer.decode(ids, skip_special_tokens=True)) for ids in drawn]
    for name, named in ways.items():
        shares = []
        for item, of in zip(pairs, named):
            asked = [c.text for c in world.criteria_of(item.query)]
            shares.append(sum(any(text in one for one in of) for text in asked) / len(asked))
        same = [
            len(of & other) / len(of | other)
            for of, other in zip(named, ways["best response first"])
        ]
        tell(f"{name}: {sum(shares) / 24:.0%} of the request's criteria are named,")
        tell(f"    and {sum(same) / 24:.0%} of them are those named with the best response first.")


def trajectories(step, outcomes: str, hinted: str = "", ties_pass: bool = False) -> list:
    """Judgements of one item: c correct, t tied, w wrong, u unreadable."""
    group, scores = [], {"c": [9, 2], "t": [5, 5], "w": [2, 9], "u": None}
    for number, outcome in enumerate(outcomes + hinted):
        hint = "a hint" if number >= len(outcomes) else ""
        more = {"scores": scores[outcome], "correct": outcome in ("c", "t")[: 1 + ties_pass]}
        item = step.Judgement("q", ["a", "b"], [1, 0])
        group.append(step.show(item, 0, [0, 1], hint=hint, **more))
    return group


def test_02_1_what_is_kept():
    step, chance, shares = script("02"), {"c": 0.5, "t": 0.3, "w": 0.2}, []
    for ties_pass in (False, True):
        shares.append(0.0)
        for outcomes in itertools.product(chance, repeat=3):
            group = trajectories(step, "".join(outcomes), ties_pass=ties_pass)
            step.reject(group)
            kept = sum(one.reason == "kept" for one in group) / 3
            shares[-1] += math.prod(map(chance.get, outcomes)) * kept
    predicted(step, "KEPT", shares, "Two things are true of a sample that is kept. Which?")


def test_02_2_a_hint_where_it_is_needed():
    step = script("02")
    reject_needless = given(step, "reject_needless")
    plans = {
        "cww c": "kept, wrong, wrong, not needed",
        "www c": "wrong, wrong, wrong, kept",
        "ccc c": "too easy, too easy, too easy, not needed",
        "wuw w": "wrong, , wrong, wrong",
        "wcw u": "wrong, kept, wrong, ",
    }
    for plan, reasons in plans.items():
        group = trajectories(step, *plan.split())
        reject_needless(group)
        equal(f"reasons of the samples {plan}", ", ".join(one.reason for one in group), reasons)


def test_02_3_does_the_judge_believe_the_hint(monkeypatch, tell):
    step = script("02")
    hint_effect, words = given(step, "hint_effect"), r"\n\(The best response is number ([12])\.\)"
    names = [f"easy {i}" for i in range(6)] + [f"hard {i}" for i in range(4)]
    items = [step.Judgement(name, ["good", "bad"], [1, 0]) for name in names]
    model, tokenizer = step.load_model(JUDGE)
    for believes, expected in (("always", (1, 0.6, 0)), ("never", (0.6, 0.6, 0.6))):

        def write(prompt, temperature, believes=believes):
            expect(temperature == 1, f"hint_effect: it samples at temperature {temperature}, not 1")
            shown, end = shown_responses(prompt), prompt.rpartition("\\boxed{s1, s2}")[2].rstrip()
            named = re.fullmatch(words, end)
            expect(named or not end, f"hint_effect: {end!r} is not in the words of `ask`")
            chosen = "good" if "easy" in prompt else "bad"
            chosen = shown[int(named[1]) - 1] if named and believes == "always" else chosen
            return verdict([8 if response == chosen else 3 for response in shown])

        with monkeypatch.context() as patch:
            prompts = pretend(step, patch, write)
            shares = hint_effect(None, tokenizer, items, ARGS)
        expect(len(prompts) == 30, f"hint_effect: 30 prompts for 10 items, not {len(prompts)}")
        firsts = {shown_responses(prompt)[0] for prompt in prompts}
        expect(len(firsts) == 2, "hint_effect: the responses should be in a random order")
        who = f"a judge that {believes} believes a hint and gets 6 of 10 right without one"
        equal(f"hint_effect of {who}", tuple(shares), expected)
    shares = hint_effect(model, tokenizer, eval_pairs(step, 24), ARGS)
    tell("The embedded judge, of 24 pairs: right in {:.0%} with the truth,".format(*shares))
    tell("{1:.0%} with no hint, {2:.0%} with a lie.".format(*shares))


def test_03_1_without_the_deviation():
    step = script("03")
    advantages = step.group_advantages
    known = "divide" in inspect.signature(advantages).parameters
    expect(known, "group_advantages does not take `divide` yet")
    for rewards, expected in (([1, -1, -1, -1], [1.5, -0.5, -0.5, -0.5]), ([1, 1], [0, 0])):
        found = advantages(rewards, divide=False)
        equal(f"group_advantages({rewards}, divide=False)", found, expected)
    equal("the divided A_1", advantages([1, -1, -1, -1])[0], math.sqrt(3))
    values = []
    for divide in (True, False):
        groups = [[1] * right + [-1] * (8 - right) for right in (1, 4)]
        hard, even = (sum(map(abs, advantages(group, divide=divide))) for group in groups)
        values.append(hard / even)
    predicted(step, "FAVOUR", values, "Add up |A_i| over the 8 judgements of each group.")


def test_03_2_three_estimators(tell):
    step = script("03")
    estimators = {"k1": given(step, "kl_k1"), "k2": given(step, "kl_k2"), "k3": step.kl_k3}
    named = given(step, "NO_PULL")
    log_probs, reference = tensor([-1.0, -2.0, -3.0]), tensor([-1.0, -1.5, -5.0])
    equal("kl_k1", estimators["k1"](log_probs, reference), [0.0, -0.5, 2.0])
    equal("kl_k2", estimators["k2"](log_probs, reference), [0.0, 0.125, 2.0])
    # A policy of three tokens and its reference: exact means over the policy's own draws.
    logits, reference = tensor([0.9, 0.1, -0.4]).requires_grad_(), tensor([0.2, 0.3, 0.5]).log()
    logp, pulls = logits.log_softmax(0), {}
    p, true = logp.exp().detach(), (logp.exp() * (logp - reference)).sum()
    for name, estimator in estimators.items():
        values = estimator(logp, reference)
        mean = (p * values).sum()  # the draws' probabilities have no gradient, as in `learn`
        [pull] = torch.autograd.grad(mean, logits, retain_graph=True)
        pulls[name] = pull.norm().item()
        tell(f"{name}: mean {mean.item():.3f}, its mean pull {pull.tolist()}")
    expect(named in pulls, f"NO_PULL should be 'k1', 'k2' or 'k3', and is {named!r}")
    hint = "What is the mean of the gradient of logp over the policy's draws?"
    expect(pulls[named] < 1e-9, f"NO_PULL: {named} does pull. {hint}")
    tell(f"KL: {true.item():.3f}, its pull {torch.autograd.grad(true, logits)[0].tolist()}")


def careful_share(step, penalty: float) -> float:
    """GRPO, with the step's own functions, of a policy that knows two ways to judge: with care (60
    tokens, 90 % right) or by a guess (10 tokens, 50 %). Returns how often it takes care then."""
    step.LENGTH_PENALTY, logits, rng = penalty, torch.zeros(2), random.Random(0)
    for _ in range(300):
        log_probs, ways, rewards = logits.requires_grad_().log_softmax(0), [], []
        for _ in range(64):
            ways.append(int(rng.random() >= log_probs[0].exp().item()))
            scores = [8, 3] if rng.random() < (0.9, 0.5)[ways[-1]] else [3, 8]
            rewards.append(step.reward_of(scores, [1.0, 0.0], (60, 10)[ways[-1]]))
        advantages, drawn = torch.tensor(step.group_advantages(rewards)), log_probs[ways]
        gain = step.surrogate(drawn, drawn.detach(), advantages).mean()
        [gradient] = torch.autograd.grad(gain, logits)
        logits = (logits + 0.3 * gradient).detach()
    return logits.softmax(0)[0].item()


def test_03_3_a_length_penalty_and_who_profits(tell):
    step = script("03")
    given(step, "LENGTH_PENALTY")
    model, tokenizer = step.load_model(JUDGE)
    items, groups = eval_pairs(step, 2), []
    for step.LENGTH_PENALTY in (0.0, 0.01):
        for scores, rule in (([8, 3], 1), ([3, 8], -1), (None, -1)):
            found = step.reward_of(scores, [1.0, 0.0], 50)
            what = f"reward_of {scores} in 50 tokens at a penalty of {step.LENGTH_PENALTY}"
            equal(what, found, rule - step.LENGTH_PENALTY * 50)
        groups.append(step.roll_out(model, tokenizer, items, ARGS, 0))
    for plain, less in zip(*groups):
        expected = [r - 0.01 * len(ids) for r, ids in zip(plain.rewards, plain.outputs)]
        equal("rewards of roll_out", less.rewards, expected)
    breaks = (0.9 - 0.1) / (60 - 10)  # the gain in reward, by the tokens that it costs
    predicted(step, "BREAKS", [breaks], "When do both earn the same on average?")
    low, high = (careful_share(step, penalty) for penalty in (breaks / 3, 3 * breaks))
    tell(f"after GRPO, {low:.0%} take care at a third of BREAKS, {high:.0%} at three times BREAKS")


def test_04_1_three_ways_to_vote():
    step, every = script("04"), itertools.combinations_with_replacement
    scores = tensor(list(every(range(1, 11), 8)))[..., None]  # all that 8 samples can say
    pairs = tensor(list(every([(2, 1), (1, 2), (1, 1)], 8)))  # won, lost, tied
    votes = step.vote_sum(scores), step.vote_mean(scores), step.vote_majority(pairs)
    counts = [len(of[:, 0].unique()) for of in votes]
    predicted(step, "SPACE", counts, "What does a sample add to each, and what if it is a tie?")
    rows = given(step, "DIFFER")
    fine = len(rows) == 3 and all(len(row) == 2 and {*row} <= {*range(1, 11)} for row in rows)
    expect(fine, f"DIFFER should be three pairs of whole scores from 1 to 10, and is {rows!r}")
    sums, choices = (vote(tensor(rows)).tolist() for vote in (step.vote_sum, step.vote_majority))
    fine = (sums[0] - sums[1]) * (choices[0] - choices[1]) < 0
    expect(fine, f"DIFFER: the sums {sums} and the majority's votes {choices} choose the same")


def test_04_2_every_response_at_every_place():
    step = script("04")
    order_of = given(step, "balanced_order")
    by_seed, by_round = set(), set()
    for seed, n, first in itertools.product(("a", "b", "c", "d"), (1, 2, 3, 4), range(0, 48, 12)):
        first -= first % n
        block = [list(order_of(n, seed, i)) for i in range(first, first + n)]
        places = [sorted(place) for place in [*block, *zip(*block)]]
        what = f"balanced_order of samples {first} to {first + n - 1}, {n} responses"
        expect(places == [list(range(n))] * 2 * n, f"{what}: {block}")
        equal(f"{what}, again,", order_of(n, seed, first), block[0])
        by_seed |= {str(block)} if first == 0 and n == 4 else set()
        by_round |= {str(block)} if seed == "a" and n == 4 else set()
    varied = min(len(by_seed), len(by_round)) > 1
    expect(varied, "balanced_order: each seed and each round should have an order of its own")


def test_04_3_stop_when_it_is_decided():
    step = script("04")
    vote_early, lost = given(step, "vote_early"), [NAN, NAN]
    for rows, votes, used in (
        ([[10, 1]] * 8, [50, 5], 5),
        ([[10, 4], [6, 2], [5, 5]], [16, 6], 2),
        ([[1, 10], [1, 10], [2, 9], [10, 1]], [4, 29], 3),
        ([[10, 1], lost, [4, 6]], [14, 7], 3),
        ([[10, 1], lost, [10, 1], [6, 6]], [20, 2], 3),
        ([[10, 1, ABSENT], [10, 1, ABSENT], [1, 10, ABSENT]], [20, 2, ABSENT], 2),
        ([[10, 3, 1], [10, 8, 1]], [20, 11, 2], 2),
    ):
        found, count = vote_early(tensor(rows))
        equal(f"samples used of {rows} (can the rest lead to a tie?)", count, used)
        equal(f"vote_early of {rows}", found, votes)


def test_05_1_a_perfect_meta_rm():
    step, outcomes, values = script("05"), list(itertools.product((True, False), repeat=4)), []
    scores = tensor([[[9, 1] if right else [1, 9] for right in of] for of in outcomes])
    for k_meta in (1, 2, 4):
        votes = step.vote_guided(scores[:, None], tensor(outcomes)[:, None], k_meta)
        right = step.right_and_tied(votes, torch.zeros(16, dtype=torch.long))[0]
        values.append(right.mean().item())
    hint = "Of the 16 outcomes of four samples, how many are right? A tie is a coin toss."
    predicted(step, "PERFECT", values, hint)


def test_05_2_trust_by_degrees():
    step = script("05")
    vote_weighted, lost, log3 = given(step, "vote_weighted"), [NAN, NAN], math.log(3)
    scores = [[[9, 2], [2, 8]], [[6, 4], lost], [lost, lost], [[3, ABSENT], [5, ABSENT]]]
    rewards = [[0, log3], [log3, ABSENT], [ABSENT, ABSENT], [ABSENT, -log3]]  # 1/2, 3/4, 0, 1/4
    expected = [[6, 7], [4.5, 3], [0, 0], [1.25, ABSENT]]
    found = vote_weighted(tensor(scores)[:, None], tensor(rewards)[:, None])
    for of_item, trust, votes, wanted in zip(scores, rewards, found[:, 0], expected):
        equal(f"vote_weighted of {of_item} with the meta rewards {trust}", votes, wanted)
    two = [[1], [0]]  # two subsets of one sample each
    apart = vote_weighted(tensor(scores[:1])[:, two], tensor(rewards[:1])[:, two])
    equal(f"vote_weighted of two subsets of {scores[0]}", apart.flatten(), [1.5, 6, 4.5, 1])


def test_05_3_learn_to_rank():
    step = script("05")
    ranking_loss, log = given(step, "ranking_loss"), math.log
    for rewards, labels, items, expected in (
        ([log(3), 0.0], [1, 0], [7, 7], log(4 / 3)),  # sigmoid(log 3) = 3/4
        ([log(3), 0.0], [1, 0], [7, 8], 0.0),
        ([2.0, 5.0], [1, 1], [7, 7], 0.0),
        ([0.0, log(3), 0.0, 5.0], [0, 1, 0, 1], [1, 1, 1, 2], log(4 / 3)),
        ([0.0, log(3), 0.0], [1, 1, 0], [1, 1, 1], (log(4 / 3) + log(2)) / 2),
    ):
        found = float(ranking_loss(tensor(rewards), labels, items))
        equal(f"ranking_loss({rewards}, {labels}, {items})", found, expected)
    rewards, labels = tensor([0.5, -1.0, 2.0, 0.0]).requires_grad_(), [1, 0, 0, 1]
    loss = ranking_loss(rewards, labels, [1, 1, 2, 2])
    moved = ranking_loss(rewards + tensor([3, 3, -2, -2]), labels, [1, 1, 2, 2])
    equal("ranking_loss after all meta rewards of an item moved", moved.item(), loss.item())
    expect(loss.requires_grad, "ranking_loss: no gradient reaches the meta rewards")
