"""Makes the embedded default: tokenizer, judge, train.jsonl and eval.jsonl, all from one seed.

    python tests/tiny/make.py --out tests/tiny                    # about 15 minutes on 2 cores
    python tests/tiny/make.py --out /tmp/trial --scale 0.1        # a trial: a tenth of the steps

The judge has a Gemma 3 architecture and 1.16 million parameters. It learns in four stages:
1. drill   only analyses, of random lists by random criteria: many verdicts in few tokens
2. read    whole judgements of requests: criteria (all of them, or any part in any order),
           verdicts, scores. The prompt is only the conversation
3. prompt  the same with the whole prompt of 01_pointwise_grm.py. One prompt in five ends with a
           hint, and the criteria then speak for it
4. sloppy  some of the criteria, seldom all. What must be avoided comes to mind late, and an
           importance is sometimes wrong. If a request sets no length, a demand for a long list
           often takes the place of a criterion: a taste for length, which many a judge has
All samples share this blind spot: they add up to a judgement that weighs what must be avoided too
little. More samples do not mend it.
What the judge is taught is always consistent and its verdicts are always true. That it misreads in
the end is its own error. We stop teaching it to read early (verdicts weigh little in the last two
stages), because a judge that reads perfectly leaves nothing to vote about.

After the drill, one text in five is a review. It shows somebody's judgement, careful or sloppy, at
times with a score that does not follow. This part is read and not learnt. What is learnt is a note:
how far its weights are from the request's, how much of the request it names, and whether its scores
follow. The note does not say whether the judgement is right. A language model can compare a
judgement with its request anyway; a small model has to learn it. Without reviews, a million
parameters learnt 5,400 judgements by heart sooner than they learnt this comparison from 5,400
labels, and step 5 asks a meta reward model for it.

What made so small a judge learn to read in minutes:
- a drill first: six verdicts a response, hard to guess, on text that holds little else
- query projections that start equal to key projections: a token looks first for itself, and
  checking a list needs just that. With it goes a softer attention (query_pre_attn_scalar 16; with
  head_dim / 8 = 4 the drill was slower in the one trial of both)
- Muon for the matrices: in one trial of 500 steps copying came after 400, with AdamW not at all
- judgements that add up as they go ("3 of 4") and name the modal before the weight: a score is then
  one look away, not a sum of products
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import world  # noqa: E402

sys.path.insert(0, str(HERE.parent))
from conftest import load_script  # noqa: E402

grm, meta = load_script("01_pointwise_grm"), load_script("05_metarm")

PADDING = 16  # sequences are padded to multiples of this
NUMBER_WEIGHT = 4.0  # of weights and scores in the loss; other tokens weigh 1
#         name      steps  learning rate, from and to   weight of a verdict in the loss
STAGES = [
    ("drill", 450, 1.0, 1.0, 4.0),
    ("read", 350, 1.0, 0.6, 2.0),
    ("prompt", 500, 0.6, 0.1, 0.5),
    ("sloppy", 250, 0.1, 0.1, 0.2),
]
ROWS = 32  # a step
REVIEWS = 0.2  # of the texts after the drill
NUMBERS = (1, 1, 2, 2, 2, 2, 2, 2, 3, 4)  # of responses; the drill has 1 and 2


def draw_items(rng: random.Random, count: int, banned: set[str]) -> list[dict]:
    """`count` items of the world with new queries, which join `banned`: 70% with two responses, 10%
    each with 1, 3 and 4."""
    items = []
    while len(items) < count:
        item = world.draw_item(rng, rng.choice((1, 2, 2, 2, 2, 2, 2, 2, 3, 4)))
        if item["query"] not in banned:
            banned.add(item["query"])
            items.append(item)
    return items


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of prompts and judgements is one token; anything else
    falls into pieces and bytes."""
    rng = random.Random(seed)
    texts = [
        " ".join(f"{number} {{{number}, {number}" for number in range(16)),
        " " + " ".join(world.ITEMS + world.PLACES),
    ]
    for n in (1, 2, 3, 4) * 500:
        texts += draw_text("read", rng, n, set())
    for principles in (True, False):
        one = grm.Judgement("x", ["y"], [1], reference="z", principles=principles, binary=True)
        texts.append(grm.build_prompt(one))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(text)})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = split, decoders.ByteLevel()
    bpe.train_from_iterator(
        [bpe.decoder.decode([word]) for word in words],
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=split.alphabet(),
            show_progress=False,
        ),
    )
    missing = [word for word in words if bpe.token_to_id(word) is None]
    assert not missing, f"words of more than one token: {missing}"
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
    )


def build_judge(vocab_size: int, seed: int) -> Gemma3ForCausalLM:
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    judge = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            query_pre_attn_scalar=16,
            max_position_embeddings=4096,
            sliding_window=96,
            rope_parameters={"full_attention": rope, "sliding_attention": rope},
            layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    )
    for layer in judge.model.layers:
        layer.self_attn.q_proj.weight.data.copy_(layer.self_attn.k_proj.weight.data)
    return judge


def draw_text(stage: str, rng: random.Random, n: int, banned: set[str]) -> tuple[str, str]:
    """A prompt and the judgement to learn for it, of n responses."""
    if stage == "drill":
        lists = [rng.sample(world.ITEMS, rng.randint(2, 6)) for _ in range(n)]
        named = [
            (drill_criterion(rng, rng.choice(lists), 0.5 if n == 1 else 0.2), 1) for _ in range(6)
        ]
        text = world.judgement_text(named, lists, False)
        text = text[text.index("Analysis") : text.index("\nScores")]
        return "", re.sub(r"; \d+ of \d+\.", ".", text)  # no totals: only verdicts
    item = world.draw_item(rng, n)
    while item["query"] in banned:
        item = world.draw_item(rng, n)
    criteria = world.criteria_of(item["query"])
    lists = [world.items_of(response) for response in item["responses"]]
    named = draw_named(stage, rng, criteria)
    binary, hint = n == 1 and rng.random() < 0.5, ""
    if rng.random() < REVIEWS:
        return draw_review(rng, item, criteria, lists, binary)
    if stage in ("prompt", "sloppy") and (n > 1 or binary) and rng.random() < 0.2:
        # A judge that is told the answer (as in step 2's hinted sampling) finds criteria that speak
        # for it, if there are any.
        best = item["rewards"].index(max(item["rewards"])) + 1
        hint = f"The best response is number {best}."
        if n == 1:
            hint = f"The right score is {item['rewards'][0]}."
        for _ in range(20):
            text = world.judgement_text(named, lists, binary)
            if grm.is_correct(grm.read_scores(text, n, binary)[0], item["rewards"]):
                break
            named = draw_named(stage, rng, criteria)
    prompt = grm.build_prompt(asked(item, hint=hint, binary=binary))
    return prompt + "\n\n", world.judgement_text(named, lists, binary)


def asked(item: dict, **more):
    """A judgement of an item of the data that is still to be made."""
    return grm.Judgement(item["query"], item["responses"], item["rewards"], **more)


def draw_review(
    rng: random.Random,
    item: dict,
    criteria: list[world.Criterion],
    lists: list[list[str]],
    binary: bool,
) -> tuple[str, str]:
    """What step 5's meta RM reads, as prompt: the item with anyone's judgement, three in ten with a
    score that does not follow; and its review."""
    named = draw_named(rng.choice(("read", "sloppy")), rng, criteria)
    judgement, follow = world.judgement_text(named, lists, binary), rng.random() < 0.7
    if not follow:
        start, scores = judgement[:-1].split("{")
        scores, place = scores.split(", "), rng.randrange(len(lists))
        others = [str(score) for score in (range(2) if binary else range(1, 11))]
        others.remove(scores[place])
        scores[place] = rng.choice(others)
        judgement = f"{start}{{{', '.join(scores)}}}"
    prompt = meta.meta_prompt(asked(item, binary=binary, output=judgement))
    return prompt, " " + world.review_text(named, criteria, follow)


def draw_named(
    stage: str, rng: random.Random, criteria: list[world.Criterion]
) -> list[tuple[world.Criterion, int]]:
    """The criteria that a judgement names, each with the weight that it gives it."""
    if stage == "sloppy":
        count = min(len(criteria), rng.choices((1, 2, 3, 4, 5), (18, 30, 26, 16, 10))[0])
        # without replacement: each draws a time until it comes to mind, and the first are named;
        # what must be absent comes to mind late
        picked = sorted(criteria, key=lambda c: rng.expovariate(0.2 if c.kind == "avoid" else 1.0))
        picked = picked[:count]
        rng.shuffle(picked)
        named = [(c, c.importance if rng.random() < 0.7 else rng.choice((1, 2, 3))) for c in picked]
        if rng.random() < 0.6 and not any(c.kind == "have at least" for c in criteria):
            named[rng.randrange(len(named))] = (
                world.Criterion("have at least", rng.choice("56"), 1),
                rng.choice((1, 2, 3)),
            )
        return named
    picked = criteria if rng.random() < 0.5 else rng.sample(criteria, rng.randint(1, len(criteria)))
    return [(c, c.importance) for c in picked]


def drill_criterion(rng: random.Random, items: list[str], elsewhere: float) -> world.Criterion:
    """A random criterion that a list meets about half of the time, so that it cannot be guessed."""
    kind = rng.choice(
        ["mention", "mention", "avoid", "avoid", "begin with", "end with", "have at least"]
    )
    if kind == "have at least":
        return world.Criterion(kind, str(rng.randint(3, 6)), 1)
    if rng.random() < elsewhere:
        return world.Criterion(kind, rng.choice(world.ITEMS), 1)
    if kind in ("mention", "avoid") or rng.random() < 0.3:
        return world.Criterion(kind, rng.choice(items), 1)
    return world.Criterion(kind, items[0] if kind == "begin with" else items[-1], 1)


def batches(stage: str, rng: random.Random, tokenizer, banned: set[str], weight_of: torch.Tensor):
    """Endless (ids, weights), each (rows, length): weights are those of each token in the loss, 0
    for prompt and padding."""
    begins = tokenizer.convert_tokens_to_ids("Ġbegins")
    while True:
        texts = [
            draw_text(stage, rng, rng.choice((1, 2) if stage == "drill" else NUMBERS), banned)
            for _ in range(ROWS * 8)
        ]
        prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
        answers = [judgement for _, judgement in texts]
        judgements = tokenizer(answers, add_special_tokens=False)["input_ids"]
        if stage == "read":  # without what all prompts share, up to "[Conversation begins]"
            prompts = [prompt[:1] + prompt[prompt.index(begins) - 2 :] for prompt in prompts]
        pairs = sorted(zip(prompts, judgements), key=lambda pair: len(pair[0]) + len(pair[1]))
        groups = [pairs[i : i + ROWS] for i in range(0, len(pairs), ROWS)]  # similar lengths
        rng.shuffle(groups)
        for group in groups:
            length = -(-max(len(p) + len(j) + 1 for p, j in group) // PADDING) * PADDING
            ids = torch.zeros(len(group), length, dtype=torch.long)
            weights = torch.zeros(len(group), length)
            for row, (prompt, judgement) in enumerate(group):
                judgement = judgement + [tokenizer.eos_token_id]
                ids[row, : len(prompt) + len(judgement)] = torch.tensor(prompt + judgement)
                weights[row, len(prompt) : len(prompt) + len(judgement)] = weight_of[judgement]
            yield ids, weights


def train(judge, tokenizer, banned: set[str], seed: int, device: str, folder: Path, stages) -> None:
    """All stages; `folder` keeps the weights after each one. Raises nothing; prints verdict
    accuracy on fresh texts as it goes."""
    yes, no = tokenizer.convert_tokens_to_ids(["Ġyes", "Ġno"])
    weight_of = torch.ones(len(tokenizer))
    numbers = [f"{space}{number}" for space in ("", "Ġ") for number in range(16)]
    weight_of[tokenizer.convert_tokens_to_ids(numbers)] = NUMBER_WEIGHT
    matrices = [p for name, p in judge.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in judge.named_parameters() if p.ndim != 2 or "embed" in name]
    for stage, steps, start, stop, verdict_weight in stages:
        weight_of[[yes, no]] = verdict_weight
        optimizers = [
            torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in groups:
            group["peak"] = group["lr"]
        rng, began, tokens, seen = random.Random(f"{seed} {stage}"), time.time(), 0, []
        for step, (ids, weights) in zip(
            range(steps), batches(stage, rng, tokenizer, banned, weight_of)
        ):
            share = (start + (stop - start) * step / steps) * min(1, (step + 1) / 50)
            for group in groups:
                group["lr"] = group["peak"] * share
            ids, weights = ids.to(device), weights.to(device)
            with torch.autocast(device, dtype=torch.bfloat16):
                hidden = judge.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            learn = weights[:, 1:] > 0
            logits, target = judge.lm_head(hidden[learn].float()), ids[:, 1:][learn]
            weight = weights[:, 1:][learn]
            loss_of_token = torch.nn.functional.cross_entropy(logits, target, reduction="none")
            ((loss_of_token * weight).sum() / weight.sum()).backward()
            torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            verdict = (target == yes) | (target == no)
            right = (logits[verdict][:, yes] > logits[verdict][:, no]) == (target[verdict] == yes)
            tokens += ids.numel()
            seen.append((right.sum().item(), right.numel(), loss_of_token[~verdict].mean().item()))
            if (step + 1) % 50 == 0 or step + 1 == steps:
                hits, verdicts, other = (sum(column) for column in zip(*seen))
                seconds = time.time() - began
                told = f"{stage} {step + 1}/{steps}: verdicts right {hits / max(1, verdicts):.3f}"
                told += f", loss of other tokens {other / len(seen):.3f}"
                told += f", {tokens / seconds:,.0f} tokens/s, {seconds:,.0f} s"
                print(told, flush=True)
                seen = []
        torch.save(judge.state_dict(), folder / f"{stage}.pt")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--out", type=Path, default=HERE, help="where judge/, train.jsonl and eval.jsonl go")
    option("--work", type=Path, default=Path("runs/tiny"), help="weights after each stage go here")
    option("--seed", type=int, default=0)
    option("--scale", type=float, default=1.0, help="factor on the steps (a trial: 0.01)")
    names = [stage[0] for stage in STAGES]
    option("--from-stage", default="drill", choices=names, help="start after the stage before it")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    banned: set[str] = set()
    for name, count in (("eval", 1500), ("train", 5000)):
        with open(args.out / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for item in draw_items(random.Random(f"{args.seed} {name}"), count, banned):
                file.write(json.dumps(item) + "\n")

    tokenizer = build_tokenizer(args.seed)
    judge = build_judge(len(tokenizer), args.seed).to(device)
    size = sum(p.numel() for p in judge.parameters())
    print(f"{len(tokenizer)} tokens, {size:,} parameters", flush=True)
    first = names.index(args.from_stage)
    if first:
        judge.load_state_dict(torch.load(args.work / f"{names[first - 1]}.pt"))
    stages = []
    for name, steps, *rest in STAGES[first:]:
        stages.append((name, max(1, int(steps * args.scale)), *rest))
    train(judge, tokenizer, banned, args.seed, device, args.work, stages)
    judge.to("cpu", torch.float32).save_pretrained(args.out / "judge")
    tokenizer.save_pretrained(args.out / "judge")


if __name__ == "__main__":
    main()
