"""The checks of the exercises in the scripts' docstrings. Each fails on the scripts as they are, and passes after a right change of yours.

    pytest tests/exercises.py -k 03_2            checks exercise 2 of 03_grpo.py; a plain `pytest` runs none of these

What an exercise asks for goes into the script itself: constants in capitals and new functions above its main(), options into it. Work on a branch:
a plain `pytest` then has failures, and should: tests/test_exercises.py holds that the exercises are unsolved, and tests/test_carried.py says where
you changed what a later script carries. SPCT_SCRIPTS=folder checks the scripts in another folder.
A check says what was expected and not how to get there. When you have done or given up, tests/solutions/ has one answer to each (where one lists
REPLACE, the first text of each pair becomes the second).
"""
import argparse
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
from conftest import JUDGE, ROOT

import world  # conftest has put tests/tiny on the path

NAN, ABSENT = math.nan, -math.inf  # scores of a sample that cannot be read, and of a response that an item does not have


def script(number: str):
    """The student's script 01 to 05, run anew; the check fails with the reason if it does not run."""
    [path] = Path(os.environ.get("SPCT_SCRIPTS", ROOT)).glob(f"{number}_*.py")
    spec = importlib.util.spec_from_file_location(f"exercise_{number}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        pytest.fail(f"{path.name} does not run: {type(error).__name__}: {error}", pytrace=False)
    return module


def expect(condition, message: str) -> None:
    """Fail with the message alone: the assertion itself would show the number that was to be found."""
    if not condition:
        pytest.fail(message, pytrace=False)


def given(module, name: str, what: str = "function"):
    """What the student was to write."""
    expect(hasattr(module, name), f"{Path(module.__file__).name} has no {what} {name} yet: write it above main()")
    return getattr(module, name)


def foretold(module, name: str, count: int) -> list[float]:
    """A constant of the student's: one number, or a tuple or list of several."""
    value = given(module, name, "constant")
    values = list(value) if isinstance(value, list | tuple) else [value]
    expect(len(values) == count and all(type(number) in (int, float) for number in values),
           f"{name} should be {'a number' if count == 1 else f'{count} numbers in brackets'}, and is {value!r}")
    return values


def options(module, monkeypatch, *arguments: str):
    """The options that the script's main() reads from a command line; main() goes no further."""
    class Read(Exception):
        pass

    parse, read = argparse.ArgumentParser.parse_args, None

    def parse_and_stop(parser, *_):
        raise Read(parse(parser, list(arguments)))

    def refuse(parser, message):
        raise Read(message)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        try:
            module.main()
        except Read as told:
            [read] = told.args
    expect(isinstance(read, argparse.Namespace), f"{Path(module.__file__).name} {' '.join(arguments)}: {read}")
    return read


def pretend(module, monkeypatch, write) -> list[str]:
    """Put a judge of our own in the place of the model: write(prompt's text, temperature) is what it says. Returns the prompts, as they come."""
    signature, prompts = inspect.signature(module.sample), []

    def sample(*positional, **named):
        call = signature.bind(*positional, **named)
        call.apply_defaults()
        asked = call.arguments
        texts = [asked["tokenizer"].decode(prompt) for prompt in asked["prompts"]]
        prompts.extend(texts)
        outputs = [[write(text, asked["temperature"]) for _ in range(asked["n"])] for text in texts]
        return [[module.Sample(asked["tokenizer"](output, add_special_tokens=False)["input_ids"], output) for output in row] for row in outputs]

    monkeypatch.setattr(module, "sample", sample)
    return prompts


def shown_responses(prompt: str) -> list[str]:
    """The responses in a prompt, in its order."""
    return re.findall(r"\[Response [0-9]+ begins\]\n(.*?)\n\[Response", prompt, re.DOTALL)


def verdict(scores) -> str:
    return f"Specific Criteria: it is good (weight 3).\nAnalysis: as the scores say.\nScores: \\boxed{{{', '.join(map(str, scores))}}}"


def nobody(module):
    """What load_model returns, for a judge that is only pretended: the tokenizer is real."""
    tokenizer = module.AutoTokenizer.from_pretrained(JUDGE)
    return SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace)), tokenizer


@pytest.fixture
def tell(capsys):
    """Says something to the student while a check runs."""
    def say(text):
        with capsys.disabled():
            print(f"\n{text}", end=" ")
    return say


# Step 1 -----------------------------------------------------------------------------------------------------------------------------------

def test_01_1_a_lazy_judge():
    step = script("01")
    found = foretold(step, "LAZY", 3)
    items = [step.Preference(f"q{i}", [f"response {j}" for j in range(n)], [1.0] + [0.0] * (n - 1)) for i, n in enumerate([2] * 6 + [3] * 3 + [4])]
    figures = step.measure(items, [[5] * len(item.responses) for item in items])
    for number, name in zip(found, ("accuracy", "strict", "ties")):
        expect(abs(number - figures[name]) < 0.005, f"LAZY: `measure` says something else than {number} of {name}. Take one item at a time, and ask "
               "what its docstring says of an item whose responses all have the same score.")


def test_01_2_judged_alone(monkeypatch, tell):
    step = script("01")
    judge_alone = given(step, "judge_alone")
    deserved = {"Seven.": 7, "Nine.": 2, "Eleven.": 10, "Twelve.": 1, "Mumble.": None}
    items = [step.Preference("Name a prime.", responses, [float(i == 0) for i in range(len(responses))])
             for responses in (["Seven.", "Nine."], ["Nine.", "Seven.", "Eleven."], ["Mumble.", "Twelve."], ["Eleven."])]

    def write(prompt, temperature):
        expect(temperature == 0, f"judge_alone: greedy was asked for, and it samples at temperature {temperature}")
        expect(step.SCALE_BINARY not in prompt, "judge_alone: the scores are to run from 1 to 10, as with several responses")
        shown = shown_responses(prompt)
        expect(len(shown) == 1, f"judge_alone: every response is to have a prompt of its own, and one shows {len(shown)}")
        return "I cannot say." if deserved[shown[0]] is None else verdict([deserved[shown[0]]])

    with monkeypatch.context() as patch:
        pretend(step, patch, write)
        scores = judge_alone(*nobody(step), items)
    expect([s if s is None else list(s) for s in scores] == [[7, 2], [2, 7, 10], None, [10]],
           "judge_alone: a judge gave 7 to 'Seven.', 2 to 'Nine.', 10 to 'Eleven.', 1 to 'Twelve.' and nothing readable to 'Mumble.'. "
           f"For {[item.responses for item in items]} it returned {scores}")

    model, tokenizer = step.load_model(JUDGE)
    pairs = [item for item in step.load_preferences(JUDGE.parent / "eval.jsonl", limit=30) if len(item.responses) == 2][:12]
    turned = [step.Preference(item.query, item.responses[::-1], item.rewards[::-1]) for item in pairs]

    def judge_together(asked):
        prompts = [step.encode(tokenizer, step.build_prompt(item.query, item.responses)) for item in asked]
        return [step.read_judgement(drawn.text, 2).scores for [drawn] in step.sample(model, tokenizer, prompts, 1, 0.0, 200, progress=False)]

    same = [sum(a == (b and b[::-1]) for a, b in zip(judge(pairs), judge(turned)))
            for judge in (lambda asked: judge_alone(model, tokenizer, asked), judge_together)]
    tell(f"The embedded judge on {len(pairs)} pairs and the same pairs turned round: judged alone, {same[0]} keep their scores; together, {same[1]}.")
    expect(same[0] == len(pairs), f"judge_alone: of {len(pairs)} pairs, {same[0]} have the same scores when the responses change places; all should")


PACK = "Make a packing list for the {}. It must mention {}. It must mention {}."


def test_01_3_principles_decide(tell):
    step = script("01")
    judge_by = given(step, "judge_by")
    model, tokenizer = step.load_model(JUDGE)
    words = ("lake", "rope", "tent"), ("beach", "pen", "map"), ("city", "coat", "bell"), ("farm", "saw", "glue"), ("castle", "bread", "lamp")
    items, principles, wanted = [], [], []
    for place, first, second in words:
        for side, thing in enumerate((first, second)):
            items.append(step.Preference(PACK.format(place, first, second), [f"Pack {first}, cup, book.", f"Take {second}, cup, book."], [1, 0]))
            principles.append(f"must mention {thing} (weight 3)")
            wanted.append(side)
    judgements = judge_by(model, tokenizer, items, principles)
    expect(len(judgements) == len(items), f"judge_by: {len(items)} items and as many principles, but {len(judgements)} judgements")
    for judgement, principle in zip(judgements, principles):
        expect(judgement.principles.rstrip(".") == principle, f"judge_by: the judgement's principles should be {principle!r}, word for word; they "
               f"are {judgement.principles!r}. Read the whole judgement, what you gave it included.")
        expect(judgement.scores and judgement.critique.startswith("Response 1"), "judge_by: the judge should have gone on with its analysis and its "
               f"scores; what was read is {judgement}")
    obeyed = sum(j.scores[side] > j.scores[1 - side] for j, side in zip(judgements, wanted))
    expect(obeyed >= len(items) - 2, "judge_by: of two responses one has what the principle asks for, and it should have the higher score. It does "
           f"in {obeyed} of {len(items)} items: is the critique written after these principles?")

    modals = {importance: modal for modal, importance in world.MODALS.items()}
    pairs = [item for item in step.load_preferences(JUDGE.parent / "eval.jsonl", limit=60) if len(item.responses) == 2][:24]
    true = ["; ".join(f"{modals[c.importance]} {c.text} (weight {c.importance})" for c in world.criteria_of(item.query)) for item in pairs]
    prompts = [step.encode(tokenizer, step.build_prompt(item.query, item.responses)) for item in pairs]
    own = [step.read_judgement(drawn.text, 2).scores for [drawn] in step.sample(model, tokenizer, prompts, 1, 0.0, 200, progress=False)]
    by_truth = [judgement.scores for judgement in judge_by(model, tokenizer, pairs, true)]
    right = [100 * sum(step.chance_of_best(s, item.rewards) for s, item in zip(scores, pairs)) / len(pairs) for scores in (own, by_truth)]
    tell(f"The embedded judge's accuracy on {len(pairs)} pairs: {right[0]:.0f}% by its own principles, {right[1]:.0f}% by the true ones.")


# Step 2 -----------------------------------------------------------------------------------------------------------------------------------

def test_02_1_what_is_kept():
    step = script("02")
    found, kinds = foretold(step, "KEPT", 2), {(9, 2): 0.5, (5, 5): 0.3, (2, 9): 0.2}  # scores -> how often; the first response is the best
    for number, ties_pass in zip(found, (False, True)):
        share = 0.0
        for drawn in itertools.product(kinds, repeat=3):
            group = [step.Trajectory(0, "q", ["good", "bad"], [1.0, 0.0], [0, 1], False, False, scores=list(scores),
                                     correct=scores[0] >= scores[1] if ties_pass else step.is_correct(list(scores), [1.0, 0.0])) for scores in drawn]
            step.reject(group)
            share += math.prod(kinds[scores] for scores in drawn) * sum(t.kept for t in group) / 3
        expect(abs(number - share) < 0.005, f"KEPT: `reject`, asked about all 27 ways in which three samples can come out, does not keep {number} of "
               f"them {'if a tie passes as correct' if ties_pass else 'by Eq. 10'}. Two things must be true of a trajectory that is kept: which?")


def planned(step, monkeypatch, tmp_path, plans: dict[str, str], *arguments: str) -> list:
    """Trajectories as sample_trajectories makes them. A plan such as "cwu c" says how the samples of an item come out, in turn: correct, wrong
    or unreadable; first those without a hint, then the hinted one."""
    args = options(step, monkeypatch, *arguments)
    items = [step.Preference(query, ["good", "bad"], [1, 0]) for query in plans]
    left = {(query, hinted): list(part) for query, plan in plans.items() for hinted, part in zip((False, True), plan.split(" "))}

    def write(prompt, _):
        query = next(query for query in plans if f"User: {query}\n" in prompt)
        outcome = left[query, "best response" in prompt].pop(0)
        scores = [8 if (response == "good") == (outcome == "c") else 3 for response in shown_responses(prompt)]
        return "I cannot say." if outcome == "u" else verdict(scores)

    with monkeypatch.context() as patch:
        patch.setattr(step, "load_model", lambda *_, **__: nobody(step))
        pretend(step, patch, write)
        return step.sample_trajectories(items, args, tmp_path)


def test_02_2_a_hint_where_it_is_needed(monkeypatch, tmp_path):
    step = script("02")
    plans = {"some right": "cww c", "none right": "www c", "all right": "ccc c", "in vain": "wuw w", "none readable": "uuu c", "odd": "wcw u"}
    expected = {"some right": "1000", "none right": "0001", "all right": "0000", "in vain": "0000", "none readable": "0001", "odd": "0100"}

    def kept(trajectories):
        return {query: "".join(str(int(t.kept)) for t in trajectories if t.query == query) for query in plans}

    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    needed = planned(step, monkeypatch, tmp_path / "with", plans, "--needed-only")
    for query, of_item in kept(needed).items():
        expect(of_item == expected[query], f"--needed-only: of an item with the samples {plans[query]!r} (correct, wrong or unreadable, the last one "
               f"hinted) {of_item} is kept (1: kept)")
    for t in needed:
        expect(t.reason == "not needed" or not t.hinted or t.query not in ("some right", "all right"),
               f"--needed-only: a correct hinted trajectory that is not needed has the reason {t.reason!r}")
    plain = kept(planned(step, monkeypatch, tmp_path / "without", plans))
    expect(plain == expected | {"some right": "1001", "all right": "0001"},
           f"without --needed-only nothing should change; of items with the samples {plans} it keeps {plain} (1: kept)")


def test_02_3_does_the_judge_believe_the_hint(monkeypatch, tell):
    step = script("02")
    hint_effect = given(step, "hint_effect")
    args = options(step, monkeypatch, "--temperature", "0.7")
    items = [step.Preference(f"{kind} {i}", ["good", "bad"] if i % 3 else ["bad", "good"], [1, 0] if i % 3 else [0, 1])
             for i, kind in enumerate(["easy"] * 6 + ["hard"] * 4)]

    def judge(believes):
        def write(prompt, temperature):
            expect(temperature == args.temperature, f"hint_effect: asked to sample at temperature {args.temperature}, it does at {temperature}")
            shown, hint = shown_responses(prompt), re.search(r"\((.*?)\)", prompt.rpartition("\\boxed{s1, s2}")[2])
            named = hint and re.fullmatch(r"The best response is number ([12])\.", hint.group(1))
            expect(len(shown) == 2 and (not hint or named), "hint_effect: the hint should be in the words of Trajectory.prompt, with number 1 or 2; "
                   f"the prompt ends with {prompt[-80:]!r}")
            chosen = shown[int(named.group(1)) - 1] if named and believes else "good" if "easy" in prompt else "bad"
            return verdict([8 if response == chosen else 3 for response in shown])
        return write

    for believes, expected, who in ((True, (1, 0.6, 0), "believes every hint, and without one gets 6 pairs of 10 right"),
                                    (False, (0.6, 0.6, 0.6), "never listens to a hint, and gets 6 pairs of 10 right")):
        with monkeypatch.context() as patch:
            prompts = pretend(step, patch, judge(believes))
            shares = hint_effect(*nobody(step), items, args)
        expect(len(prompts) == 3 * len(items), f"hint_effect: {len(items)} pairs and three kinds of prompts, but {len(prompts)} prompts")
        expect(len(shares) == 3 and all(abs(a - b) < 1e-9 for a, b in zip(shares, expected)),
               f"hint_effect: of a judge that {who}, it says {tuple(shares)} (with the truth, with no hint, with a lie)")
    model, tokenizer = step.load_model(JUDGE)
    pairs = [item for item in step.load_lines(JUDGE.parent / "eval.jsonl") if len(item.responses) == 2][:100]
    shares = hint_effect(model, tokenizer, pairs, args)
    tell("The embedded judge, of 100 pairs: right in {:.0%} with the truth, {:.0%} with no hint, {:.0%} with a lie.".format(*shares))


# Step 3 -----------------------------------------------------------------------------------------------------------------------------------

def test_03_1_without_the_deviation():
    step = script("03")
    advantages = step.group_advantages
    expect("divide" in inspect.signature(advantages).parameters, "group_advantages does not take `divide` yet")
    for rewards, expected in (([1, -1, -1, -1], [1.5, -0.5, -0.5, -0.5]), ([1, 1, -1, -1], [1, 1, -1, -1]), ([1, 1, 1], [0, 0, 0])):
        found = advantages(rewards, divide=False)
        expect(list(found) == pytest.approx(expected), f"group_advantages({rewards}, divide=False) should say how far each reward lies above the "
               f"mean, and says {found}")
    expect(advantages([1, -1, -1, -1]) == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3),
           "group_advantages(rewards) should divide as before")
    for number, divide in zip(foretold(step, "FAVOUR", 2), (True, False)):
        hard, even = (sum(map(abs, advantages([1] * right + [-1] * (8 - right), divide=divide))) for right in (1, 4))
        expect(abs(number - hard / even) < 0.006, f"FAVOUR: {number} is not what comes out {'with' if divide else 'without'} the division. Add up "
               "|A_i| over the 8 judgements of each group.")


def test_03_2_three_estimators(tell):
    step = script("03")
    estimators = {"k1": given(step, "kl_k1"), "k2": given(step, "kl_k2"), "k3": step.kl_k3}
    named = given(step, "NO_PULL", "constant")
    log_probs, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -1.5, -5.0])
    for name, expected in (("k1", [0.0, -0.5, 2.0]), ("k2", [0.0, 0.125, 2.0])):
        found = estimators[name](log_probs, reference)
        expect(torch.is_tensor(found) and found.shape == (3,) and torch.allclose(found, torch.tensor(expected)),
               f"kl_{name} of policy {log_probs.tolist()} and reference {reference.tolist()} is {found}: one number a token was asked for, "
               "k1 = logp - ref and k2 = half of its square")
    # A policy of three tokens and its reference. Everything below is exact: the mean over the policy's own draws.
    logits, q = torch.tensor([0.9, 0.1, -0.4], dtype=torch.float64, requires_grad=True), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    logp = logits.log_softmax(0)
    p, true = logp.exp().detach(), (logp.exp() * (logp - q.log())).sum()
    pulls, text = {}, f"A policy of three tokens, KL(policy || reference) = {true.item():.3f}\n"
    for name, estimator in estimators.items():
        values = estimator(logp, q.log())
        mean = (p * values).sum()
        [pull] = torch.autograd.grad(mean, logits, retain_graph=True)  # the draws' probabilities have no gradient, as in `learn`
        pulls[name] = pull.norm().item()
        spread = ((p * (values - mean) ** 2).sum() ** 0.5).item()
        text += f"  {name}: mean {mean.item():.3f}, standard deviation {spread:.3f}, mean gradient {[round(x, 3) for x in pull.tolist()]}\n"
    [gradient] = torch.autograd.grad(true, logits)
    expect(isinstance(named, str) and named in pulls, f"NO_PULL should be 'k1', 'k2' or 'k3', and is {named!r}")
    expect(pulls[named] < 1e-9, f"NO_PULL: {named} does pull. In `learn` the tokens are drawn, and the gradient of the estimate is taken at "
           "them: what is its mean over the policy's draws? (The mean of the gradient of logp is a good place to begin.)")
    tell(f"{text}  the gradient of KL(policy || reference) itself:  {[round(x, 3) for x in gradient.tolist()]}\n")


def careful_share(step, penalty: float, steps: int = 300, prompts: int = 8, group_size: int = 8) -> float:
    """GRPO with the step's own reward, advantages and surrogate on the smallest policy: it judges carefully (60 tokens, right 9 times of 10)
    or guesses (10 tokens, 5 of 10). Starts even; returns how often it judges carefully in the end."""
    logits, rng = torch.zeros(2, requires_grad=True), random.Random(0)
    optimizer = torch.optim.SGD([logits], lr=0.3)
    for _ in range(steps):
        log_probs, ways, pushes = logits.log_softmax(0), [], []
        chance = log_probs[0].exp().item()
        for _ in range(prompts):
            group = [0 if rng.random() < chance else 1 for _ in range(group_size)]
            right = [rng.random() < (0.9, 0.5)[way] for way in group]
            ways += group
            pushes += step.group_advantages([step.reward_of([8, 3] if good else [3, 8], [1.0, 0.0], (60, 10)[way], penalty)
                                             for way, good in zip(group, right)])
        drawn = log_probs[ways]
        optimizer.zero_grad()
        (-step.surrogate(drawn, drawn.detach(), torch.tensor(pushes), 0.2).mean()).backward()
        optimizer.step()
    return logits.softmax(0)[0].item()


def test_03_3_a_length_penalty_and_who_profits(monkeypatch, tell):
    step = script("03")
    expect(len(inspect.signature(step.reward_of).parameters) == 4, "reward_of should take (scores, rewards, tokens, penalty)")
    for arguments, expected in ((([8, 3], [1, 0]), 1), (([3, 8], [1, 0]), -1), (([8, 3], [1, 0], 100, 0.01), 0), ((None, [1, 0], 50, 0.01), -1.5),
                                (([8, 3], [1, 0], 100, 0.0), 1)):
        found = step.reward_of(*arguments)
        expect(abs(found - expected) < 1e-9, f"reward_of{arguments} should be {expected}, and is {found}")
    args = [options(step, monkeypatch, "--group-size", "4", "--max-new-tokens", "160", *more) for more in ((), ("--length-penalty", "0.01"))]
    model, tokenizer = step.load_model(JUDGE)
    items = [item for item in step.load_lines(JUDGE.parent / "train.jsonl")[:30] if len(item.responses) == 2][:2]
    plain, penalised = ([one for group in step.roll_out(model, tokenizer, items, [0, 1], of, 0) for one in group] for of in args)
    for before, after in zip(plain, penalised):
        expect(abs(before.reward) == 1, f"without --length-penalty a reward is 1 or -1, and one is {before.reward}")
        expect(abs(after.reward - (before.reward - 0.01 * len(after.output))) < 1e-6, "roll_out with --length-penalty 0.01: a judgement of "
               f"{len(after.output)} tokens that has the reward {before.reward:g} by the rule has {after.reward}")
    expect([one.advantage for one in penalised[:4]] == pytest.approx(step.group_advantages([one.reward for one in penalised[:4]])),
           "roll_out: the advantages should follow from the rewards after the penalty")
    [breaks] = foretold(step, "BREAKS", 1)
    careful, guess = (right * step.reward_of([8, 3], [1, 0], tokens, breaks) + (1 - right) * step.reward_of([3, 8], [1, 0], tokens, breaks)
                      for right, tokens in ((0.9, 60), (0.5, 10)))
    expect(abs(careful - guess) < 0.02, f"BREAKS: at a penalty of {breaks} a token, a careful judgement has the mean reward {careful:.3f} and a "
           f"guess {guess:.3f}: that is not where the one overtakes the other")
    ends = {penalty: careful_share(step, penalty) for penalty in (breaks / 3, 3 * breaks)}
    tell("GRPO on a policy that chooses between them, 300 steps:\n" + "".join(
        f"  {penalty:.4f} a token: judges carefully in {100 * share:.0f}%, and is right in {90 * share + 50 * (1 - share):.0f}%\n"
        for penalty, share in ends.items()))
    expect(ends[breaks / 3] > 0.8 and ends[3 * breaks] < 0.2, "a third of BREAKS should leave it careful and three times BREAKS should not; after "
           f"training, the shares of careful judgements by penalty are {ends}")


# Step 4 -----------------------------------------------------------------------------------------------------------------------------------

def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_04_1_three_ways_to_vote():
    step = script("04")
    found, k = foretold(step, "SPACE", 3), 8
    scores = tensor(list(itertools.combinations_with_replacement(range(1, 11), k)))[..., None]  # all that k samples can say of a response
    pairs = tensor(list(itertools.combinations_with_replacement([(2, 1), (1, 2), (1, 1)], k)))  # won, lost, tied
    sizes = [len(votes[:, 0].unique()) for votes in (step.vote_sum(scores), step.vote_mean(scores), step.vote_majority(pairs))]
    for number, size, name in zip(found, sizes, ("vote_sum", "vote_mean", "vote_majority")):
        expect(number == size, f"SPACE: over all scores that {k} samples of a pair can have, {name} does not take {number:g} values" +
               (": what does it make of a sample that ties?" if name == "vote_majority" else ""))
    rows = given(step, "DIFFER", "constant")
    expect(isinstance(rows, list | tuple) and len(rows) == 3 and all(len(row) == 2 and all(score in range(1, 11) for score in row) for row in rows),
           f"DIFFER should be three samples [[a, b], [c, d], [e, f]] of whole scores from 1 to 10, and is {rows!r}")
    votes = {name: step.VOTES[name](tensor(rows)).tolist() for name in ("sum", "majority", "mean")}
    expect((votes["sum"][0] - votes["sum"][1]) * (votes["majority"][0] - votes["majority"][1]) < 0,
           f"DIFFER: the sums are {votes['sum']} and the majority's votes {votes['majority']}: they do not choose differently")


def test_04_2_every_response_at_every_place(tell):
    step = script("04")
    show_balanced = given(step, "show_balanced")
    firsts, blocks = set(), set()
    for n, k in ((1, 2), (2, 8), (3, 60), (4, 8)):
        for number in range(12):
            item = step.Preference(f"query {number}", [f"response {j}" for j in range(n)], [float(j == 1 % n) for j in range(n)])
            shown = [show_balanced(item, number, "0", i) for i in range(k)]
            expect([t.order for t in shown] == [show_balanced(item, number, "0", i).order for i in range(k)],
                   "show_balanced: the same arguments should give the same order")
            for i, t in enumerate(shown):
                expect(sorted(t.order) == list(range(n)) and t.responses == [item.responses[j] for j in t.order]
                       and t.rewards == [item.rewards[j] for j in t.order] and (t.item, t.query, t.hinted) == (number, item.query, False),
                       f"show_balanced: a Trajectory as from `show` was asked for, responses and rewards in its order; for {item} it is {t}")
                if i % n == n - 1:
                    block = [tuple(one.order) for one in shown[i - n + 1:i + 1]]
                    expect(all(len(set(place)) == n for place in zip(*block)), f"show_balanced: samples {i - n + 1} to {i} of an item with {n} "
                           f"responses have the orders {block}: every response should stand once at every place")
                    blocks |= {tuple(block)} if n == 3 and number == 0 else set()
            firsts |= {tuple(shown[0].order)} if n == 4 else set()
    expect(len(firsts) > 2 and len(blocks) > 1,
           "show_balanced: every item, and every block of n samples of it, should have a random order of its own; all have the same")

    def right(show, k, pairs=200):
        """How often the sum chooses the better response of a judge that adds 3 to what it sees first; the better one deserves 1 more."""
        items = [step.Preference(f"query {i}", ["good", "bad"], [1, 0]) for i in range(pairs)]
        trajectories = [show(item, number, i) for number, item in enumerate(items) for i in range(k)]
        for t in trajectories:
            t.scores = [(6 if response == "good" else 5) + 3 * (place == 0) for place, response in enumerate(t.responses)]
        votes = step.vote_sum(step.score_tensor(trajectories, k)).tolist()
        return 100 * sum(step.chance_of_best(vote, item.rewards) for vote, item in zip(votes, items)) / pairs

    text = "A judge that adds 3 to the first response, where the better one deserves 1 more; right after k samples:\n"
    for k in (1, 2, 4, 8, 32):
        shares = [right(show, k) for show in (lambda item, number, i: step.show(item, number, f"0 vote {i}"),
                                              lambda item, number, i: show_balanced(item, number, "0", i))]
        text += f"  k = {k:<3} shuffled {shares[0]:5.1f}%   balanced {shares[1]:5.1f}%\n"
        expect(k == 1 or shares[1] == 100, f"show_balanced: the bias of a judge that adds 3 to the first response should cancel over {k} samples of "
               f"a pair, and only {shares[1]:.1f}% are right")
    tell(text)


def test_04_3_stop_when_it_is_decided(tell):
    step = script("04")
    vote_early = given(step, "vote_early")
    for rows, votes, used in (([[10, 1]] * 8, [50, 5], 5), ([[5, 5]] * 4, [20, 20], 4), ([[1, 10], [1, 10], [2, 9], [10, 1]], [4, 29], 3),
                              ([[10, 1], [NAN, NAN], [4, 6]], [14, 7], 3), ([[10, 1], [NAN, NAN], [10, 1], [6, 6]], [20, 2], 3),
                              ([[10, 1, ABSENT], [10, 1, ABSENT], [1, 10, ABSENT]], [20, 2, ABSENT], 2), ([[10, 3, 1], [10, 8, 1]], [20, 11, 2], 2)):
        found, count = vote_early(tensor(rows))
        expect(count == used and torch.is_tensor(found) and found.tolist() == votes,
               f"vote_early of the samples {rows}: the sums {votes} after {used} samples were expected, and it returns {found} after {count}. The "
               "choice is open as long as the samples that are left could lead to a tie; one that cannot be read adds nothing, but was asked for")
    rng, k, spent = random.Random(0), 16, []
    for _ in range(200):
        gap = rng.choice((0, 1, 3, 6))
        scores = tensor([[min(10, max(1, round(rng.gauss(5 + gap / 2 * side, 2)))) for side in (1, -1)] for _ in range(k)])
        votes, count = vote_early(scores)
        whole = step.vote_sum(scores)
        top, full = (v == v.max() for v in (votes, whole))
        expect(torch.equal(top, full), f"vote_early stops after {count} of {k} samples with the sums {votes.tolist()}, but all of them have "
               f"{whole.tolist()}: the choice is not the same")
        worst = step.vote_sum(scores[:count - 1]) + tensor([1, 10] if whole[0] >= whole[1] else [10, 1]) * (k - count + 1)
        expect(worst.argmax() != whole.argmax() or worst[0] == worst[1] or whole[0] == whole[1],
               f"vote_early uses {count} of {k} samples, but one fewer had already decided")
        spent.append(count)
    tell(f"200 pairs, close ones and clear ones: the choices of {k} samples with {sum(spent) / len(spent):.1f} on average, {min(spent)} at least.")


# Step 5 -----------------------------------------------------------------------------------------------------------------------------------

def test_05_1_a_perfect_meta_rm():
    step = script("05")
    found, outcomes = foretold(step, "PERFECT", 3), list(itertools.product((True, False), repeat=4))
    scores = tensor([[[9, 1] if right else [1, 9] for right in of_item] for of_item in outcomes])
    rewards, index = tensor(outcomes), torch.arange(4).expand(len(outcomes), 1, 4)
    for number, k_meta in zip(found, (1, 2, 4)):
        votes = step.vote_guided(scores, rewards, index, k_meta)
        accuracy = step.right_and_tied(votes, torch.zeros(len(outcomes), dtype=torch.long))["accuracy"].mean().item()
        expect(abs(number - accuracy) < 0.005, f"PERFECT: over the 16 equally likely ways in which four samples come out, vote_guided with k_meta = "
               f"{k_meta} is not right in {number} of them. Count the right ones among those kept; half and half is a coin toss.")


def test_05_2_trust_by_degrees():
    step = script("05")
    vote_weighted = given(step, "vote_weighted")
    log3 = math.log(3)
    scores = tensor([[[9, 2], [2, 8]], [[6, 4], [NAN, NAN]], [[NAN, NAN], [NAN, NAN]], [[3, ABSENT], [5, ABSENT]], [[4, ABSENT], [NAN, ABSENT]]])
    rewards = tensor([[0, log3], [log3, -math.inf], [-math.inf, -math.inf], [-math.inf, -log3], [log3, -math.inf]])  # sigmoids 1/2, 3/4, 0 and 1/4
    expected = [[6, 7], [4.5, 3], [0, 0], [1.25, ABSENT], [3, ABSENT]]
    index = torch.tensor([0, 1]).expand(5, 1, 2)
    found = vote_weighted(scores, rewards, index)
    expect(torch.is_tensor(found) and found.shape == (5, 1, 2), "vote_weighted: votes (items, subsets, responses) = (5, 1, 2) were asked for, and "
           f"come as {tuple(getattr(found, 'shape', ()))}")
    for of_item, trust, votes, wanted in zip(scores.tolist(), rewards.tolist(), found[:, 0].tolist(), expected):
        expect(votes == pytest.approx(wanted), f"vote_weighted: samples {of_item} with the meta rewards {[round(m, 2) for m in trust]} should have "
               f"the votes {wanted}, and have {votes} (nan: cannot be read; a score of -inf: there is no such response, and its vote stays -inf)")
    apart = vote_weighted(scores[:1], rewards[:1], torch.tensor([[[1], [0]]]))  # two subsets of one sample each
    expect(apart.shape == (1, 2, 2) and apart.flatten().tolist() == pytest.approx([1.5, 6, 4.5, 1]), "vote_weighted: each subset is to have its own "
           f"votes; for the subsets [[1], [0]] of the samples [[9, 2], [2, 8]] with the meta rewards 0 and log 3 they are {apart.tolist()}")


def test_05_3_learn_to_rank(tell):
    step = script("05")
    ranking_loss = given(step, "ranking_loss")
    log = math.log
    cases = (([log(3), 0.0], [1, 0], [7, 7], log(4 / 3)),  # sigmoid(log 3) = 3/4
             ([log(3), 0.0], [1, 0], [7, 8], 0.0),  # two items: nothing to compare
             ([2.0, 5.0], [1, 1], [7, 7], 0.0),
             ([0.0, log(3), 0.0, 5.0, 5.0], [0, 1, 0, 1, 0], [1, 1, 1, 2, 2], (2 * log(4 / 3) + log(2)) / 3))
    for rewards, labels, items, expected in cases:
        found = ranking_loss(torch.tensor(rewards, dtype=torch.float64), labels, items)
        expect(abs(float(found) - expected) < 1e-6, f"ranking_loss of meta rewards {[round(m, 3) for m in rewards]}, labels {labels} (1: correct) of "
               f"the items {items} should be {expected:.4f}, and is {float(found):.4f}")
    # Meta rewards w0 * (how easy the item is) + w1 * (how careful the judgement is). The first foretells most, but says nothing within an item.
    rng, rows = random.Random(0), []
    for item in range(60):
        easy = rng.gauss(0, 1)
        for _ in range(6):
            careful = rng.gauss(0, 1)
            rows.append((easy, careful, rng.random() < 1 / (1 + math.exp(-2 * easy - careful)), item))
    features, labels, items = torch.tensor([row[:2] for row in rows]), [int(row[2]) for row in rows], [row[3] for row in rows]
    learnt = {}
    for name in ("cross-entropy", "ranking"):
        weights = torch.zeros(2, requires_grad=True)
        for _ in range(60):
            rewards = features @ weights
            loss = (ranking_loss(rewards, labels, items) if name == "ranking" else
                    torch.nn.functional.binary_cross_entropy_with_logits(rewards, torch.tensor(labels, dtype=torch.float32)))
            expect(torch.is_tensor(loss) and loss.requires_grad, "ranking_loss should be a tensor through which gradients reach the meta rewards")
            [gradient] = torch.autograd.grad(loss, [weights])
            weights = (weights - 2.0 * gradient).detach().requires_grad_()
        learnt[name] = weights.tolist()
    tell("What a linear meta RM learns, (weight of how easy the item is, weight of how careful the judgement is):\n" + "".join(
        f"  {name:<14}({a:+.2f}, {b:+.2f})\n" for name, (a, b) in learnt.items()))
    expect(abs(learnt["ranking"][0]) < 1e-3 < 0.3 < learnt["ranking"][1], "ranking_loss: a meta RM that learns from it should look only at what "
           f"differs within an item; its weights for (how easy the item is, how careful the judgement is) are {learnt['ranking']}")
