"""Step 3: rule-based online reinforcement learning (GRPO): the judge learns from its verdicts.

Rejective fine-tuning learns from right judgements only, drawn once. Here the judge draws anew at
every step and learns from the wrong ones too (SPCT, arXiv 2504.02495, section 3.2). For a prompt it
writes G judgements, the rollouts. Judgement i earns

    r_i = +1 if its scores are correct (Eq. 10), else -1, also if they are unreadable       (Eq. 11)

GRPO compares it with its group: the advantage is A_i = (r_i - mean(r)) / std(r). A group that is
all right or all wrong says nothing. Every token of judgement i is pushed by A_i, but not far from
pi_old, which drew it (clip), nor from ref, the model before the first step (KL). logp is log pi:

    L = -1/G sum_i 1/|o_i| sum_t [ min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i) - beta KL ]
    ratio = pi / pi_old,    KL = exp(ref - logp) - (ref - logp) - 1                         (Eq. 15)

o_i are the tokens of judgement i. With one update a rollout (UPDATES) the ratio is 1, its gradient
that of logp, and the loss's value is just beta KL: watch the reward. Nothing rewards the format;
the KL term keeps it. On the embedded judge the reward goes from about -0.1 to 0.15 in 40 steps.

    python 03_grpo.py                                            the judge after step 2, on a CPU
    python 03_grpo.py --model google/gemma-3-1b-it --data train.jsonl --eval eval.jsonl --lr 2e-5
    torchrun --nproc-per-node 8 03_grpo.py --model google/gemma-2-27b-it --quantize nf4 ...

Writes runs/03_grpo/: log.jsonl (a line a step), rollouts.jsonl, model/, results.json.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import transformers
from jinja2 import TemplateError
from peft import LoraConfig
from safetensors import SafetensorError
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.cache_utils import Cache, StaticLayer

CLIP_EPS = 0.2
UPDATES = 1  # of the policy on the same rollouts


def reward_of(scores: list[int] | None, rewards: list[float]) -> float:
    """Eq. 11: +1 for correct scores, -1 for wrong or unreadable (None) ones."""
    return 1.0 if is_correct(scores, rewards) else -1.0


def group_advantages(rewards: list[float]) -> list[float]:
    """A_i = (r_i - mean(r)) / std(r) within a prompt's group; zeros if all rewards are equal."""
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    return [(reward - mean) / deviation if deviation else 0.0 for reward in rewards]


def kl_k3(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per token, an estimate of KL(policy || reference): exp(d) - d - 1, d = reference - policy. It
    is unbiased and never negative; expm1 keeps it so where d is small."""
    difference = reference - log_probs
    return torch.expm1(difference) - difference


def surrogate(log_probs, old, advantages) -> torch.Tensor:
    """Per token, min(ratio A, clip(ratio, 1 - eps, 1 + eps) A): nothing is gained by moving the
    ratio further than eps from 1 in the direction that A wants. All are (tokens,)."""
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - CLIP_EPS, 1 + CLIP_EPS)
    return torch.minimum(ratio * advantages, clipped * advantages)


# The rollouts of a prompt. prompt: token ids; completion: those of all outputs in a row.
Group = namedtuple("Group", "prompt completion outputs advantages rewards judgements")


def roll_out(model, tokenizer, items: list[Preference], args, step: int) -> list[Group]:
    """G judgements of each item of a step at temperature 1, with their rewards and advantages. The
    prompts show the responses in an order of their own, and have single ones scored 0 or 1."""
    asked, groups = [], []
    for number in examples_of_step(step, len(items), args.prompts, args.seed):
        order = shuffled(len(items[number].responses), f"{args.seed} {step} {number}")
        asked.append(show(items[number], number, order, binary=len(order) == 1))
    prompts = [encode(tokenizer, one, args.shots) for one in asked]
    drawn = sample(model, tokenizer, prompts, args.group_size, 1.0, args, args.seed + step)
    for one, prompt, completions in zip(asked, prompts, drawn):
        judgements = [read_into(replace(one), completion, args) for completion in completions]
        rewards = [reward_of(of_one.scores, one.rewards) for of_one in judgements]
        outputs = [completion.ids for completion in completions]
        advantages = group_advantages(rewards)
        groups.append(Group(prompt, sum(outputs, []), outputs, advantages, rewards, judgements))
    return groups


def group_log_probs(model, groups: list[Group]) -> torch.Tensor:
    """Log-probabilities of all outputs' tokens, in the order of groups and outputs: (tokens,).

    A group is one row: its prompt, read once, then its outputs, one after the other. `block_masks`
    lets each output see the prompt and itself, at the positions that it would have alone.
    """
    width = max(len(group.prompt) + len(group.completion) for group in groups)
    ids, member, position, sources = [], [], [], []
    for row, group in enumerate(groups):
        start = len(group.prompt)
        numbers, places = [0] * start, list(range(start))
        for number, output in enumerate(group.outputs, 1):
            # a token follows from the one before it, the first of an output from the prompt's last
            before = [start - 1, *range(len(places), len(places) + len(output) - 1)]
            sources += [row * width + column for column in before]
            numbers += [number] * len(output)
            places += range(start, start + len(output))
        padding = width - len(places)
        ids.append(group.prompt + group.completion + [0] * padding)
        member.append(numbers + [-1] * padding)
        position.append(places + [0] * padding)
    ids, member, position = (torch.tensor(x, device=model.device) for x in (ids, member, position))
    mask = block_masks(model, member, position, member, position)
    row = {"attention_mask": mask, "position_ids": position, "use_cache": False}
    hidden = model.base_model(input_ids=ids, **row).last_hidden_state.flatten(0, 1)
    targets = torch.tensor(sum((group.completion for group in groups), []), device=model.device)
    return token_log_probs(model, hidden[torch.tensor(sources, device=model.device)], targets)


class Reference:
    """The model as it was at the start. If adapters are trained, their first weights are put in the
    place of the learnt ones while it is asked; else it is a frozen copy."""

    def __init__(self, model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        adapters = any("lora_" in name for name in trained)
        self.model = model if adapters else copy.deepcopy(model).requires_grad_(False)
        self.pairs = [(p, p.detach().clone()) for p in trained.values()] if adapters else []

    def swap(self) -> None:
        for parameter, first in self.pairs:
            learnt = parameter.data.clone()
            parameter.data.copy_(first)
            first.copy_(learnt)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def log_probs(self, groups: list[Group]) -> torch.Tensor:
        self.swap()
        found = group_log_probs(self.model, groups)
        self.swap()
        return found


def learn(model, reference: Reference, groups: list[Group], fixed: dict, args) -> dict[str, float]:
    """Add the gradient of Eq. 15 on rollouts. fixed: old and reference log-probabilities of each
    micro-batch, kept by the first of several updates. Returns what a student should watch."""
    count, cuda = sum(len(group.outputs) for group in groups), model.device.type == "cuda"
    sums = torch.zeros(3, device=model.device)
    model.train()
    for number, part in enumerate(micro_batches(groups[RANK::RANKS])):
        lengths = [len(output) for group in part for output in group.outputs]
        lengths = torch.tensor(lengths, device=model.device)
        weight = (1 / lengths / count).repeat_interleave(lengths)  # mean over tokens, then outputs
        advantages = sum((group.advantages for group in part), [])
        advantages = torch.tensor(advantages, device=model.device).repeat_interleave(lengths)
        with torch.autocast(model.device.type, torch.bfloat16, cuda):
            ref = fixed[number][1] if number in fixed else reference.log_probs(part)
            log_probs = group_log_probs(model, part)
        old, ref = fixed.setdefault(number, (log_probs.detach(), ref))
        kl = kl_k3(log_probs, ref)
        loss = -(weight * (surrogate(log_probs, old, advantages) - args.beta * kl)).sum()
        loss.backward()
        # -log p of what was drawn is on average the entropy
        sums += torch.stack([loss, (weight * kl).sum(), -(weight * old).sum()]).detach()
    if RANKS > 1:
        torch.distributed.all_reduce(sums)
    return dict(zip(("loss", "kl", "entropy"), sums.tolist()))


def watch(groups: list[Group]) -> dict[str, float]:
    """What the rollouts of a step are like, as means: reward, share of groups with a signal, ..."""
    drawn = [one for group in groups for one in group.judgements]
    named = {"reward": [reward for group in groups for reward in group.rewards]}
    named["signal"] = [any(group.advantages) for group in groups]
    named["unreadable"] = [one.scores is None for one in drawn]
    named["length"] = [one.tokens for one in drawn]
    return {name: sum(values) / len(values) for name, values in named.items()}


def hard_items(model, tokenizer, items: list[Preference], args, run: Run) -> list[Judgement]:
    """Leave out the items that the model gets right in all of --easy samples."""
    asked = ballots(items, args.easy, f"{args.seed} easy", binary=True)
    wrong = judge(model, tokenizer, asked, 1.0, args, run, "easy.jsonl") if asked else []
    numbers = {one.item for one in wrong if not one.correct} if args.easy else range(len(items))
    require(numbers, "all items are too easy: use others, or --easy 0")
    print(f"{len(numbers)} of {len(items)} items are not right in all of {args.easy} samples")
    return [items[number] for number in sorted(numbers)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    step2 = Path("runs/02_rejective_ft/model")
    option("--model", default=str(step2 if step2.exists() else TINY / "judge"), help="as in step 1")
    option("--quantize", choices=BITS, default="none", help="weights in 8 or 4 bits")
    option("--dtype", choices=DTYPES, default="auto", help="of the weights")
    option("--data", default=str(TINY / "train.jsonl"), help="preferences to learn from")
    option("--eval", default=str(TINY / "eval.jsonl"), help="or held-out: the last of --data")
    option("--limit", type=int, nargs=2, default=[600, 300], help="items to learn from, to measure")
    option("--easy", type=int, default=3, help="leave out items that are right in all of N samples")
    option("--steps", type=int, default=40, help="rollouts")
    option("--prompts", type=int, default=16, help="prompts a step")
    option("--group-size", type=int, default=8, help="G, judgements of each prompt (the paper: 4)")
    option("--beta", type=float, default=0.08, help="weight of the KL term (the paper's for 27B)")
    option("--lr", type=float, default=4e-3, help="peak learning rate (the paper: 4e-7)")
    option("--lora-r", type=int, default=16, help="rank of adapters; 0 trains all weights")
    option("--shots", action="store_true", help="a worked example first, for base models")
    option("--max-new-tokens", type=int, default=320, help="longest judgement, in tokens")
    option("--seed", type=int, default=0, help="of everything")
    option("--resume", action="store_true", help="go on with the run in --out")
    option("--out", default="runs/03_grpo", help="folder of the run")
    args = parser.parse_args()

    require(args.group_size > 1, "--group-size 1: nothing to compare a judgement with")
    items, others = split(args)
    run = Run(args)
    model, tokenizer = load_model(args.model, args.quantize, args.dtype)
    before = evaluate(model, tokenizer, others, args, run, "before.jsonl")
    items = hard_items(model, tokenizer, items, args, run)
    set_trainable(model, args)
    reference = Reference(model)
    optimizer = Optimizer(model, args.steps * UPDATES, args, run)
    drawn = optimizer.step // UPDATES * args.prompts * args.group_size  # before the checkpoint
    kept = run.lines("rollouts.jsonl", Judgement)[:drawn]
    run.append("rollouts.jsonl", map(asdict, kept), anew=True)
    bar = progress("GRPO", optimizer.steps, optimizer.step)
    while optimizer.step < optimizer.steps:
        groups, fixed = roll_out(model, tokenizer, items, args, optimizer.step), {}
        run.append("rollouts.jsonl", [asdict(one) for group in groups for one in group.judgements])
        for _ in range(UPDATES):
            log = watch(groups) | learn(model, reference, groups, fixed, args)
            optimizer.update(log)
        bar.set_postfix({name: f"{value:.2f}" for name, value in log.items()}, refresh=False)
        bar.update(UPDATES)
    bar.close()
    folder = save(model, tokenizer, run)
    model, tokenizer = load_model(folder, args.quantize, args.dtype)  # what was saved is measured
    after = evaluate(model, tokenizer, others, args, run, "after.jsonl")
    run.finish({"figures": compare(before, after)})


# --------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something that the user can put right. The end of the file prints it as one line."""


def require(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass
class Preference:
    """A query, its n >= 1 responses and their true rewards. Raises UserError if malformed."""

    query: str | list[dict]  # the user's text, or turns {"role", "content"}; the last is the user's
    responses: list[str]
    rewards: list[float]  # one a response, with one maximum; a single response has 1 (right) or 0
    subset: str = ""
    reference: str | None = None  # an answer to judge against (E.1.3)

    def __post_init__(self):
        turns = [] if isinstance(self.query, str) else self.query
        require(self.query and all(turn["role"] + turn["content"] for turn in turns), "no query")
        n = len({text.strip() for text in self.responses} - {""})
        require(n == len(self.responses) == len(self.rewards), "not n responses and n rewards")
        self.rewards = [float(reward) for reward in self.rewards]
        best = self.rewards.count(max(self.rewards)) == 1 and math.isfinite(sum(self.rewards))
        require(best, "not one response has the best reward")
        require(n > 1 or self.rewards[0] in (0, 1), "a single response's reward is not 0 or 1")


@dataclass
class Judgement(Preference):
    """What the judge was shown, what it wrote, and what we read in it."""

    item: int = 0  # the item's number in the data
    order: list[int] = field(default_factory=list)  # responses[i] is the item's response order[i]
    binary: bool = False  # the score of a single response is 0 or 1, as in training
    hint: str = ""  # a last line of the prompt that gives the truth away (section 3.2)
    principles: bool = True  # whether they are asked for (Table 4)
    output: str = ""
    tokens: int = 0
    scores: list[int] | None = None  # in the order shown, like responses and rewards
    correct: bool = False  # Eq. 10
    reason: str = ""  # why scores is None


def show(item: Preference, number: int, order: list[int] | None = None, **more) -> Judgement:
    """A judgement that is still to be made: item `number`, its responses in this order, if any."""
    order = list(range(len(item.responses))) if order is None else order
    shown = [item.responses[i] for i in order], [item.rewards[i] for i in order]
    return Judgement(item.query, *shown, item.subset, item.reference, number, order, **more)


def read_lines(path: str | Path, kind: type = Preference) -> list:
    """The records of JSON Lines of our own, as objects of a dataclass. Raises UserError."""
    names, records = [one.name for one in fields(kind)], []
    try:
        for line in Path(path).read_bytes().strip().split(b"\n"):
            record = json.loads(line)
            records.append(kind(**{name: record[name] for name in names if name in record}))
    except (OSError, UserError, ValueError, TypeError, LookupError, AttributeError) as error:
        hint = "01_pointwise_grm.py --export converts other files"
        raise UserError(f"{path}:{len(records) + 1}: {error} ({hint})") from None
    return records


# The parts of the prompt, in their order. They are all that a model knows about being a judge.
TASK = "Judge each response to the conversation. Write the specific criteria that matter here with "
TASK += "their weights, analyse every response against them, then score it."
CRITIQUE_TASK = "Judge each response to the conversation. Analyse every response, then score it."
SCALE = "Scores run from 1 (fails altogether) through 6 (meets some criteria) to 10 (meets all "
SCALE += "criteria)."
BINARY = "The score is 1 if the response is correct and 0 if it is not."
GENERAL = """ Be strict; analyse before you score.
General criteria: following instructions, usefulness, detail, relevance.
"""
MARKER = re.compile(r"\[(?=\s*(conversation|reference|response)[^\[\]]*(begins|ends)\s*\])", re.I)


def block(name: str, text: str) -> str:
    """Untrusted text between markers. It can neither close the block nor bring a box of its own."""
    text = MARKER.sub("(", text).replace("\\boxed", "\\ boxed")
    return f"[{name} begins]\n{text}\n[{name} ends]\n"


def build_prompt(one: Judgement, form: bool = True) -> str:
    """The judge's prompt. form: whether it ends with the form of the answer."""
    turns = [{"role": "user", "content": one.query}] if isinstance(one.query, str) else one.query
    turns = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    task, scale = TASK if one.principles else CRITIQUE_TASK, BINARY if one.binary else SCALE
    parts = [f"{task}\n{scale}{GENERAL}", block("Conversation", turns)]
    parts += [block("Reference answer", one.reference)] if one.reference else []
    parts += [block(f"Response {i}", text) for i, text in enumerate(one.responses, 1)]
    criteria = "Specific Criteria: each criterion and its weight\n" if one.principles else ""
    analysis = "Analysis: each response against each criterion\n"
    box = ", ".join(f"s{i}" for i in range(1, len(one.responses) + 1))
    answer = f"Answer in this form:\n{criteria}{analysis}Scores: \\boxed{{{box}}}"
    return "\n".join(parts + [answer] * form) + (f"\n({one.hint})" if one.hint else "")


# A worked example for --shots. A base model copies its form, so the prompt does not end with one.
SHOT = Judgement("Name three colours of the rainbow.", ["Red, brown.", "Red, green, blue."], [0, 1])
SHOT.output = """Specific Criteria: all are in the rainbow (weight 3); there are three (weight 2).
Analysis: Response 1 names two, one of them wrong. Response 2 names three, all of them right.
Scores: \\boxed{1, 10}"""
CRITIQUE_START = "Analysis: Response 1"  # leads a judge past principles that it has learnt to write


def encode(tokenizer, one: Judgement, shots: bool = False) -> list[int]:
    """Token ids of a judgement's prompt, after a worked example if `shots`."""
    form = not shots or bool(tokenizer.chat_template)
    turns = [build_prompt(SHOT, form), SHOT.output] * shots + [build_prompt(one, form)]
    return encode_turns(tokenizer, turns, "" if one.principles else CRITIQUE_START)


def break_up(tokenizer, text: str) -> str:
    """The text with control tokens, such as "<end_of_turn>", broken up: it cannot end a turn."""
    for token in tokenizer.added_tokens_decoder.values():
        word = token.content.strip()
        if len(word) > 1 and (token.special or word in (tokenizer.chat_template or "")):
            text = text.replace(word, f"{word[0]} {word[1:]}")
    return text


def encode_turns(tokenizer, turns: list[str], start: str = "") -> list[int]:
    """Token ids of turns (user, assistant, ..., user) and of the `start` of what comes next, in the
    chat template if there is one. BOS comes once."""
    turns = [break_up(tokenizer, turn) for turn in turns]
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join([*turns, start]))["input_ids"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    style = {"enable_thinking": False, "add_generation_prompt": True}  # Qwen 3 thinks by default
    text = tokenizer.apply_chat_template(turns, tokenize=False, **style) + start
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written BOS


def end_tokens(model, tokenizer) -> list[int]:
    """What ends a judgement. The first is the one to learn: the chat template's ("<end_of_turn>")
    if it has one, else EOS. An empty line, as in encode_turns, ends the turn of a base model."""
    own, tail = model.generation_config.eos_token_id, "\n\n"
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "answer"}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2].lstrip()
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    if tokenizer.chat_template:
        ends = [token for token in ids[:1] if token in tokenizer.added_tokens_decoder] + ends
    elif len(ids) == 1:
        ends += ids
    return [token for token in dict.fromkeys(ends) if token is not None]


LABEL = re.compile(r"^[^\w\n]*(?:\d+[.)][^\w\n]*)?scores?\b[ *_\r]*(:|$)", re.I | re.M)
BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
DECORATION = re.compile(r"\\(?:text|mathbf|[,;: ])|[{}$*`\s]")


def read_scores(text: str, n: int, binary: bool = False) -> tuple[list[int] | None, str]:
    """extract(C) of Eq. 7: n whole numbers in 1..10 (0..1 if binary), or None and the reason. The
    verdict is the first box after the last line that begins with "Scores:", not one that is quoted
    before it, noted after it, or only thought (<think>)."""
    text = text.rpartition("</think>")[2]
    labels = [*LABEL.finditer("" if text.lstrip().startswith("<think>") else text)]
    box = BOX.search(text, labels[-1].end()) if labels else None
    if not box:
        return None, "no closed box after Scores:" if labels else "no line begins with Scores:"
    entries = DECORATION.sub("", box[1]).replace("\uff0c", ",").split(",")
    numbers = [int(entry) if re.fullmatch("[0-9]{1,2}", entry) else -1 for entry in entries]
    low, high = (0, 1) if binary else (1, 10)
    if len(numbers) != n or min(numbers) < low or max(numbers) > high:
        return None, f"the box does not hold {n} whole numbers in {low}..{high}"
    return numbers, ""


def is_correct(scores: list[float] | None, rewards: list[float]) -> bool:
    """Eq. 10: S_j > S_i for all i != j = argmax r; of a single response S_1 = r_1. None: False."""
    if scores is None or len(rewards) == 1:
        return scores == rewards
    best = scores[rewards.index(max(rewards))]
    return best == max(scores) and scores.count(best) == 1


def chance_of_best(scores: list[float] | None, rewards: list[float]) -> float:
    """Chance that the argmax of the scores is the best response; ties are tossed, None ties all."""
    scores = scores or [0] * len(rewards)
    return float(scores[rewards.index(max(rewards))] == max(scores)) / scores.count(max(scores))


def mean_and_se(values: list[float], items: list[Preference]) -> dict:
    """Mean, standard error and n of values, one an item. Items of the same query are a cluster."""
    mean, sums = sum(values) / len(values) if values else math.nan, Counter()
    for value, item in zip(values, items):
        sums[str(item.query)] += value - mean
    spread = sum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1 or math.nan)
    return {"mean": mean, "se": math.sqrt(spread) / max(1, len(values)), "n": len(values)}


def read_into(one: Judgement, completion: Sample, args) -> Judgement:
    """Write down what the judge wrote: output, tokens, scores, correct, reason. Returns `one`."""
    one.output = (CRITIQUE_START, "")[one.principles] + completion.text.partition(TASK)[0]
    one.tokens = len(completion.ids)
    one.scores, one.reason = read_scores(one.output, len(one.responses), one.binary)
    one.correct = is_correct(one.scores, one.rewards)
    if one.scores is None and one.tokens in (0, args.max_new_tokens):
        one.reason += f" (cut off at {one.tokens} tokens)"
    return one


CHUNK = 1024  # judgements that a kill may cost


def judge(model, tokenizer, asked, temperature, args, run, name) -> list[Judgement]:
    """Let the model judge what is asked. The run's file `name` grows by CHUNK judgements at a time,
    after those that it holds already. Returns all of them, in order."""
    done = run.lines(name, Judgement)
    for first in range(len(done), len(asked), CHUNK):
        part = asked[first : first + CHUNK]
        prompts = [encode(tokenizer, one, args.shots) for one in part]
        drawn = sample(model, tokenizer, prompts, 1, temperature, args, args.seed + first)
        part = [read_into(one, completion, args) for one, [completion] in zip(part, drawn)]
        run.append(name, map(asdict, part))
        done += part
    return done


# A notebook cell has no __file__.
TINY = Path(globals().get("__file__", "x")).resolve().parent / "tests/tiny"


# `torchrun --nproc-per-node N` starts N processes, a GPU each. Alone we are rank 0 of 1.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Run:
    """The folder of a run. A new run moves what the folder holds to NAME.1, NAME.2, ...; --resume
    goes on with it. A second process in the folder is refused. Ranks meet here; rank 0 writes."""

    def __init__(self, args):
        self.folder, self.start, self.settings = Path(args.out), time.time(), vars(args)
        path, resume = self.folder / "settings.json", self.settings.pop("resume")
        if RANK == 0:
            self.open(path, resume)
        else:
            sys.stdout = open(os.devnull, "w")
        if RANKS > 1:
            torch.distributed.init_process_group()
            torch.distributed.barrier()

    def open(self, path: Path, resume: bool) -> None:
        """Make the folder, or go on with the run that it holds. Raises UserError."""
        before = json.loads(path.read_text()) if path.exists() else {}
        was = [f"{name} {value}" for name, value in before.items() if self.settings[name] != value]
        require(before or not resume, f"--resume: there is no run in {self.folder}")
        require(not (resume and was), f"--resume: the run in {self.folder} had {', '.join(was)}")
        if before:
            self.lock(path)
        if self.folder.exists() and not resume:
            names = (Path(f"{self.folder}.{number}") for number in itertools.count(1))
            aside = self.folder.rename(next(name for name in names if not name.exists()))
            print(f"what was in {self.folder} is now in {aside}")
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.settings, indent=1) + "\n")
        self.lock(path)

    def lock(self, path: Path) -> None:
        """Hold the run while this process lives. Raises BlockingIOError if another one does."""
        self.handle = open(path)
        fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def lines(self, name: str, kind: type) -> list:
        """The records that an earlier part of the run left in a file; one that was cut off goes."""
        path = self.folder / name
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        return read_lines(path, kind) if path.exists() and path.stat().st_size else []

    def append(self, name: str, records, anew: bool = False) -> None:
        """Add records to a file, or write it anew."""
        path = self.folder / name
        if RANK == 0:
            part = path.with_suffix(".part") if anew else path
            with open(part, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
            os.replace(part, path)

    def finish(self, results: dict) -> None:
        """Write results.json: the results, settings, versions, date and seconds."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        about = {"settings": self.settings, "date": time.strftime("%Y-%m-%d"), "versions": versions}
        results |= about | {"seconds": round(time.time() - self.start)}
        results = json.loads(json.dumps(results), parse_constant=lambda _: None)  # JSON has no NaN
        if RANK == 0:
            (self.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{results['seconds']} s; everything is in {self.folder}/")


BITS, DTYPES = ["none", "int8", "nf4"], ["auto", "float32", "bfloat16"]


def load_model(name: str, quantize: str = "none", dtype: str = "auto"):
    """A causal language model and its tokenizer, from a folder, the Hub, or a LoRA folder, whose
    base is loaded with it. quantize: nf4 (4 bits, double quantization), int8 or none. dtype: auto
    is bfloat16 on a GPU that has it, else float32. No remote code. Raises UserError."""
    device = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
    native = dtype == "bfloat16" or (device != "cpu" and torch.cuda.get_device_capability()[0] >= 8)
    kind = torch.bfloat16 if native and dtype != "float32" else torch.float32
    require(not Path(name, "model").is_dir(), f"{name} is a run: give its model, {name}/model")
    options = {"dtype": kind, "device_map": {"": device}, "output_loading_info": True}
    if quantize != "none":  # given, it would hide how a checkpoint is quantized already
        bits = {"load_in_4bit": quantize == "nf4", "load_in_8bit": quantize == "int8"}
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        bits = BitsAndBytesConfig(**bits, **nf4, bnb_4bit_compute_dtype=kind)
        options["quantization_config"] = bits
    name = str(Path(name).resolve()) if Path(name).exists() else name  # adapters name their base
    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **options)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except ValueError:  # an adapter may have none of its own
            tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"cannot load the model {name}: {why}") from None
    require(not report["missing_keys"], f"{name} lacks weights: {report['missing_keys']}")
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # else 4 bits lose their gradient on some CPUs
        rates = [name for name, rate in vars(module).items() if "dropout" in name and rate]
        rates += ["p"] * isinstance(module, torch.nn.Dropout)
        for name in rates:
            setattr(module, name, 0.0)  # the same weights give the same log-probabilities
    return model.eval(), tokenizer


Sample = namedtuple("Sample", "ids text")  # token ids with the end token, if it came; text without
BATCH = 1024 if torch.cuda.is_available() else 256  # completions at once; fewer where memory ends
GROUP = 16  # completions in a row: each is multiplied with the columns of all of them


def context_of(model) -> int:
    """Tokens that the model takes; with longrope, whose frequencies depend on the longest prompt of
    a batch, only those of its original length."""
    config = model.config.get_text_config()
    original = getattr(config, "original_max_position_embeddings", None)
    return original or getattr(config, "max_position_embeddings", sys.maxsize)


@torch.no_grad()
def sample(model, tokenizer, prompts, n, temperature, args, seed=0) -> list[list[Sample]]:
    """Draw n completions of every prompt (token ids), each of at most args.max_new_tokens tokens,
    greedily at temperature 0. A prompt that is too long for the model gets Sample([], ""). Ranks
    share the prompts, and each gets all samples."""
    ends, room = end_tokens(model.eval(), tokenizer), context_of(model) - args.max_new_tokens
    places, rows, size = {}, [], BATCH  # places of a prompt's completions: equal prompts share rows
    for number, prompt in enumerate(prompts):
        if len(prompt) <= room:
            places.setdefault(tuple(prompt), []).extend(range(number * n, number * n + n))
    for prompt, of_prompt in places.items():
        parts = math.ceil(len(of_prompt) / GROUP)
        rows += [(prompt, of_prompt[part::parts]) for part in range(parts)]
    rows.sort(key=lambda row: (-len(row[1]), -len(row[0])))  # neighbours need little padding
    rows, samples = rows[RANK::RANKS], [Sample([], "")] * (len(prompts) * n)
    generator = torch.Generator(model.device).manual_seed(seed + 10**9 * RANK)
    bar = progress("samples", len(samples))
    while rows:
        part = rows[: max(1, size // len(rows[0][1]))]
        try:
            batch = Batch(model, part, temperature, args.max_new_tokens, ends, generator)
            outputs, batch = batch.finish(), None  # the next one needs its memory
        except torch.OutOfMemoryError:
            require(len(part) > 1, "out of memory with one prompt")
            size = len(part) * len(part[0][1]) // 2
            continue
        for (_, of_row), row in zip(part, outputs):
            for place, ids in zip(of_row, row):
                end = next((i for i, token in enumerate(ids, 1) if token in ends), len(ids))
                text = tokenizer.decode(ids[:end], skip_special_tokens=True)
                samples[place] = Sample(ids[:end], text)
            bar.update(len(of_row) * RANKS)
        rows = rows[len(part) :]
    bar.close()
    if RANKS > 1:
        torch.distributed.all_gather_object(parts := [None] * RANKS, samples)
        samples = [max(of_place, key=lambda one: len(one.ids)) for of_place in zip(*parts)]
    return [samples[i : i + n] for i in range(0, len(samples), n)]


def progress(title: str, total: int, first: int = 0):
    """A progress bar, if it takes more than ten seconds; in a log, a line every ten seconds."""
    wait = 0.1 if sys.stderr.isatty() else 10
    return tqdm(None, title, total, initial=first, delay=10, mininterval=wait, disable=RANK > 0)


def block_masks(model, member, position, key_member, key_position):
    """The attention masks of rows that hold a prompt and several completions of it.

    All are (rows, columns). A token sees the prompt (member 0) and its own completion (the same
    member) at positions up to its own. Prompt p q r, completions a b and d e, padded on the left:

        token       .  p  q  r  a  d  b  e
        member     -1  0  0  0  1  2  1  2      b sees p q r a b, and e sees p q r d e:
        position    0  0  1  2  3  3  4  4      what each would see alone after the prompt

    Returns what is added to attention's logits (rows, 1, queries, keys), 0 or the lowest number; if
    layers are of two kinds, a dict, in which sliding ones do not see beyond their window.
    """
    distance = position[:, None, :, None] - key_position[:, None, None, :]
    key_member = key_member[:, None, None, :]
    hidden = (distance < 0) | (key_member != 0) & (key_member != member[:, None, :, None])
    config, lowest = model.config.get_text_config(), torch.finfo(model.dtype).min
    mask = torch.zeros_like(hidden, dtype=model.dtype).masked_fill(hidden, lowest)
    window = getattr(config, "sliding_window", None) or sys.maxsize
    sliding = mask.masked_fill(distance >= window, lowest)
    two_kinds = getattr(config, "layer_types", None)  # Llama's layers all see all, Mistral's slide
    return {"full_attention": mask, "sliding_attention": sliding} if two_kinds else sliding


class Batch:
    """Prompts in flight, a row each, with up to n completions of every prompt in the same row.

    A row has the prompt's columns, padded on the left, then n columns for each step, one for every
    completion (see `block_masks`), so that all share the prompt's keys and values. A step changes
    buffers in place and waits for nothing: CUDA can record it as a graph, and launch it at once.
    """

    def __init__(self, model, rows, temperature, length, ends, generator):
        """rows: (prompt, places of its completions). Reads the prompts, draws the first tokens."""
        self.model, self.temperature, self.length, device = model, temperature, length, model.device
        prompts, sizes = zip(*[(prompt, len(places)) for prompt, places in rows])
        self.n, self.width = n, width = max(sizes), max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + [*p] for p in prompts], device=device)
        padding = torch.tensor([[width - len(p)] for p in prompts], device=device)
        column = torch.arange(width + n * length, device=device)
        after = column - width  # below 0 in the prompt
        self.position = (width - padding + torch.where(after < 0, after, after // n)).clamp(min=0)
        self.member = torch.where(after < 0, 0, after % n + 1).where(column >= padding, -1)
        layers = range(model.config.get_text_config().num_hidden_layers)
        self.cache = Cache(layers=[StaticLayer(width) for _ in layers])
        self.ends, self.visible = torch.tensor(ends, device=device), width
        self.random = torch.rand(len(rows), n, length, device=device, generator=generator)
        self.output = torch.full_like(self.random, ends[0], dtype=torch.long)
        self.finished = (
            torch.arange(n, device=device) >= torch.tensor(sizes, device=device)[:, None]
        )
        self.token, self.step = self.output[..., 0].clone(), torch.zeros_like(column[:1])
        self.last = column[width : width + n] - n  # columns of the tokens that were drawn last
        self.draw(self.forward(ids, column[:width], 1).expand(-1, n, -1))

    def forward(self, ids, columns, wanted: int):
        """Logits (rows, wanted, vocabulary) of the last of ids (rows, new) at `columns` (new,)."""
        own = self.member[:, columns], self.position[:, columns]
        seen = self.member[:, : self.visible], self.position[:, : self.visible]
        more = {"attention_mask": block_masks(self.model, *own, *seen), "position_ids": own[1]}
        more |= {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": wanted}
        return self.model(input_ids=ids, **more).logits

    def draw(self, logits) -> None:
        """Choose the next token of every completion by its logits (rows, n, vocabulary)."""
        if self.temperature > 0:  # the first at which the summed probabilities pass a random number
            sums = torch.softmax(logits.float() / self.temperature, -1).cumsum(-1)
            threshold = self.random.index_select(-1, self.step) * sums[..., -1:]
            token = torch.searchsorted(sums, threshold, right=True)[..., 0]
        else:
            token = logits.argmax(-1)
        self.token.copy_(token.masked_fill(self.finished, self.ends[0]))
        self.output.index_copy_(-1, self.step, self.token[..., None])
        self.finished |= (self.token[..., None] == self.ends).any(-1)
        self.step += 1
        self.last += self.n

    def advance(self) -> None:
        """Run the model on the last token of every completion, and draw the next."""
        self.draw(self.forward(self.token, self.last, self.n))

    def keep(self, rows: list[int], steps: int) -> None:
        """Drop all other rows, and make room for so many more steps."""
        index, more = torch.tensor(rows, device=self.step.device), self.n * steps
        for layer in self.cache.layers:
            if layer.is_initialized:
                keys, values = layer.keys[index], layer.values[index]
                layer.keys, layer.values = (
                    pad(states, (0, 0, 0, more)) for states in (keys, values)
                )
        self.visible += more
        for name in ("member", "position", "random", "output", "finished", "token"):
            setattr(self, name, getattr(self, name)[index])

    def finish(self) -> list[list[list[int]]]:
        """Decode to the end: token ids (rows, n, up to the longest), not yet cut at their end."""
        outputs, alive, done = [None] * len(self.token), list(range(len(self.token))), 1
        # layers in 8 bits wait for the device: they cannot be recorded
        graphs = self.token.is_cuda and not getattr(self.model, "is_loaded_in_8bit", False)
        over = [False] * len(alive)
        while alive:
            steps, advance = min(64 if graphs else 16, self.length - done), self.advance
            self.keep([row for row, end in enumerate(over) if not end], steps)
            for step in range(steps):
                if graphs and step == 1:  # the first has loaded kernels
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        self.advance()
                    advance = graph.replay
                advance()
            done += steps
            over = (self.finished.all(-1) | (done == self.length)).tolist()  # waits for the device
            for row, ids, end in zip(alive, self.output[..., :done].tolist(), over):
                outputs[row] = ids if end else None
            alive = [row for row, end in zip(alive, over) if not end]
        return outputs


def start(main) -> None:
    """Run main(). What the user can put right is one line; a bug shows its traceback."""
    try:
        main()
    except (UserError, TemplateError, BlockingIOError, torch.OutOfMemoryError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command with --resume goes on")


def split(args) -> tuple[list[Preference], list[Preference]]:
    """Items to learn from, and others to measure on: no query is in both."""
    data, [size, measured] = read_lines(args.data), args.limit
    others = data[-measured:] if args.eval == "held-out" else read_lines(args.eval)[:measured]
    queries = {str(item.query) for item in others}
    items = [item for item in data if str(item.query) not in queries][:size]
    others = [item for item in others if len(item.responses) > 1]
    require(items and others, f"{args.data}, {args.eval}: nothing to learn from, or to measure on")
    print(f"{len(items)} items of {args.data} to learn from, {len(others)} others to measure on")
    return items, others


def shuffled(n: int, seed: str) -> list[int]:
    """The numbers 0 to n - 1 in an order that the seed decides: a place must say nothing."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


def ballots(items: list[Preference], k: int, seed: str, binary: bool = False) -> list[Judgement]:
    """k judgements to be made of every item, each with the responses in an order of its own.
    binary: single responses are scored 0 or 1, as in training."""
    asked = []
    for number, item in enumerate(items):
        for i in range(k):
            order = shuffled(len(item.responses), f"{seed} {i} {number}")
            asked.append(show(item, number, order, binary=binary and len(order) == 1))
    return asked


def evaluate(model, tokenizer, items, args, run, name) -> list[Judgement]:
    """Judge every item four times at temperature 0.5."""
    return judge(model, tokenizer, ballots(items, 4, "evaluation"), 0.5, args, run, name)


def compare(before: list[Judgement], after: list[Judgement]) -> dict[str, list[dict]]:
    """Print and return what one sample is worth: before, after, and the paired gain."""
    print(f"\n{'one sample, %':<14}{'before':>16}{'after':>16}{'gain':>16}")
    columns = {"accuracy": [], "strict": [], "unreadable": []}
    for judgements in (before, after):
        columns["accuracy"].append([chance_of_best(one.scores, one.rewards) for one in judgements])
        columns["strict"].append([float(one.correct) for one in judgements])
        columns["unreadable"].append([float(one.scores is None) for one in judgements])
    for name, values in columns.items():
        values.append([b - a for a, b in zip(*values)])
        columns[name] = [mean_and_se(of, before) for of in values]
        cells = [f"{100 * row['mean']:.1f} +- {100 * row['se']:4.1f}" for row in columns[name]]
        print(f"{name:<14}" + "".join(f"{cell:>16}" for cell in cells))
    return columns


LOGITS_AT_ONCE = 2**25  # 128 MB in float32


def token_log_probs(model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (tokens,) of `targets` (tokens,) after the hidden states (tokens, width).

    Gemma's vocabulary has 262,144 entries: the logits of 2048 tokens take 2 GB. So they are made
    for a few tokens at a time, forgotten, and made again in the backward pass.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    def of_chunk(hidden, targets):
        logits = head(hidden).float()
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    size = max(1, LOGITS_AT_ONCE // config.vocab_size)
    chunks = zip(hidden.split(size), targets.split(size))
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def set_trainable(model, args) -> None:
    """Train the adapters that the model has, or new ones on all linear layers of its blocks if
    --lora-r says so, or else all weights, in float32."""
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    if not adapters and args.lora_r:
        torch.manual_seed(args.seed)
        kind = {"target_modules": "all-linear"}
        if any(re.search("vision|audio", name) for name, _ in model.named_modules()):
            kind["exclude_modules"] = ".*(vision|audio).*"  # what sees or hears stays as it is
        model.add_adapter(LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, **kind))
    elif not adapters:
        require(not getattr(model, "is_quantized", False), "--quantize needs --lora-r to learn")
        model.float().requires_grad_(True)
    for parameter in adapters:
        parameter.requires_grad_(True)


class Optimizer:
    """AdamW: the gradient is clipped to norm 1; the learning rate rises linearly in a tenth of the
    steps, then falls along a cosine to a tenth of the peak. A checkpoint in the run is taken up."""

    def __init__(self, model, steps: int, args, run: Run):
        self.lr, self.steps, self.run, self.step = args.lr, steps, run, 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        adam = torch.optim.AdamW
        if model.device.type == "cuda":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if getattr(model, "is_quantized", False):
                from bitsandbytes.optim import AdamW8bit as adam  # its state takes 8 bits, too
        self.adam = adam(self.parameters.values(), args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        path = run.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, map_location=model.device, weights_only=True)
            model.load_state_dict(state["weights"], strict=False)
            self.adam.load_state_dict(state["adam"])
            self.step = state["step"]
        log = run.folder / "log.jsonl"
        lines = log.read_text().splitlines()[: self.step] if log.exists() else []
        run.append("log.jsonl", map(json.loads, lines), anew=True)

    def update(self, log: dict) -> None:
        """Take a step against the gradients, summed over the ranks, and add `log` to log.jsonl."""
        for parameter in self.parameters.values() if RANKS > 1 else ():
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
            torch.distributed.all_reduce(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0).item()
        require(math.isfinite(norm), f"step {self.step + 1}: the gradient is {norm}; lower --lr")
        rise = max(1, round(0.1 * self.steps))
        fall = 0.55 + 0.45 * math.cos(
            math.pi * max(0, self.step - rise) / max(1, self.steps - rise)
        )
        for group in self.adam.param_groups:
            group["lr"] = self.lr * min((self.step + 1) / rise, fall)
        self.adam.step()
        self.adam.zero_grad()
        self.step += 1
        self.run.append("log.jsonl", [{"step": self.step, "norm": norm, **log}])
        if RANK == 0 and (self.step % 10 == 0 or self.step == self.steps):
            state = {"step": self.step, "weights": self.parameters, "adam": self.adam.state_dict()}
            torch.save(state, self.run.folder / "checkpoint.part")
            os.replace(self.run.folder / "checkpoint.part", self.run.folder / "checkpoint.pt")


def examples_of_step(step: int, count: int, size: int, seed: int) -> list[int]:
    """Which of `count` examples a step takes: epoch after epoch, each in an order of its own."""
    order = []
    for epoch in range(step * size // count, ((step + 1) * size - 1) // count + 1):
        order += shuffled(count, f"{seed} {epoch}")
    return order[step * size % count :][:size]


MICRO_TOKENS = 8192  # of a forward pass in training, with padding: fewer take less memory


def micro_batches(examples: list) -> list[list]:
    """Split examples into batches of similar length, at most MICRO_TOKENS tokens with padding."""
    batches, width = [], 0
    for one in sorted(examples, key=lambda one: -len(one.prompt) - len(one.completion)):
        if not batches or width * (len(batches[-1]) + 1) > MICRO_TOKENS:
            batches.append([])
            width = len(one.prompt) + len(one.completion)
        batches[-1].append(one)
    return batches


def save(model, tokenizer, run: Run) -> Path:
    """Save all weights, or the adapters (in PEFT's format), to the run's folder model/."""
    folder, part = run.folder / "model", run.folder / "model.part"
    if RANK == 0:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    if RANKS > 1:
        torch.distributed.barrier()
    return folder


if __name__ == "__main__":
    start(main)
