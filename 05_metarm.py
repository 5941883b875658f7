"""Step 5: a meta reward model (meta RM) says which judgements to trust, and guides the vote.

Voting counts every judgement alike, the careless ones too. On training items we know which
judgements are correct (Eq. 10). A scalar model can learn to predict this (SPCT, arXiv 2504.02495,
section 4). It reads the conversation, the responses and the judgement. Its one logit m is the meta
reward, learnt by binary cross-entropy:

    L = -[ c log sigmoid(m) + (1 - c) log(1 - sigmoid(m)) ],     c = 1 if the scores are correct

It learns from step 2's samples without hints, right and wrong. It also learns from the judge to be
guided: from step 3's later rollouts, or from step 4's samples of training items. Of k samples,
guided voting adds up the scores of the k_meta = k / 2 with the highest meta rewards (Eq. 14). The
samples are those of step 4. The oracle, for comparison, knows the truth: it keeps the correct
samples (all, if none is correct).

    python 05_metarm.py                                          the judge of step 4, on a CPU
    python 05_metarm.py --samples runs/04_voting/samples_2.jsonl --out runs/second
    python 05_metarm.py --learn runs/fresh/samples_1.jsonl --quantize nf4 --lr 1e-4

A departure from the paper: we do not train on judgements with a tie at the top. They are wrong by
Eq. 10, easy to tell, and change little in a vote. Writes runs/05_metarm/: model/, log.jsonl,
rewards.jsonl (a meta reward for each sample), results.json. tests/tools/plot.py draws the curves.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import math
import os
import random
import re
import sys
import time
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from tqdm import tqdm


def meta_prompt(one: Judgement) -> str:
    """What the meta RM reads: conversation, responses, the judgement as it was written, and a word
    that asks for a review. There the logit is read."""
    shown = build_prompt(one, form=False).partition("\n\n")[2]  # all but the task
    return f"{shown}\n{one.output.strip()}\nReview:"


def tied(one: Judgement) -> bool:
    """Whether several responses share the highest score."""
    return one.scores is not None and one.scores.count(max(one.scores)) > 1


def held_out(query: str | list[dict]) -> bool:
    """Whether a query is kept out of training, in all data: one in ten is."""
    return zlib.crc32(str(query).encode()) % 10 == 0


def meta_model(base: str, args):
    """A causal language model whose vocabulary is replaced by one logit, which starts at zero, with
    adapters to train; and its tokenizer. transformers' class for sequence classification."""
    causal, tokenizer = load_model(base, args.quantize, args.dtype)
    config = causal.config
    config.num_labels, config.get_text_config().pad_token_id = 1, tokenizer.eos_token_id
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, causal.base_model)
    width = model.score.in_features
    model.score = torch.nn.Linear(width, 1, bias=False, device=causal.device, dtype=torch.float32)
    torch.nn.init.zeros_(model.score.weight)
    torch.manual_seed(args.seed)
    kind = {"target_modules": "all-linear", "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    model.add_adapter(LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, **kind))
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.data = parameter.data.float()
    return model, tokenizer


def meta_rewards(model, texts: list[list[int]]) -> torch.Tensor:
    """The logits (texts,) of token ids, padded on the right."""
    width, pad = max(map(len, texts)), model.config.get_text_config().pad_token_id
    ids = [text + [pad] * (width - len(text)) for text in texts]
    mask = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
    ids, mask = torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()


def meta_losses(model, examples: list[Example]) -> torch.Tensor:
    """The binary cross-entropies (examples,) of (token ids, [1 if correct else 0])."""
    labels = torch.tensor([float(one.completion[0]) for one in examples], device=model.device)
    rewards = meta_rewards(model, [one.prompt for one in examples])
    return torch.nn.functional.binary_cross_entropy_with_logits(rewards, labels, reduction="none")


@torch.no_grad()
def trust(model, tokenizer, judgements: list[Judgement]) -> list[float]:
    """The meta reward of each judgement, -inf for those that cannot be read."""
    model.eval()
    rewards = torch.full((len(judgements),), -math.inf, dtype=torch.float64)
    examples, amp = [], model.dtype == torch.bfloat16
    for number, one in enumerate(judgements):
        if one.scores is not None:
            ids = tokenizer(break_up(tokenizer, meta_prompt(one)))["input_ids"]
            examples.append(Example(ids, [number]))
    for batch in itertools.islice(micro_batches(examples), RANK, None, RANKS):
        with torch.autocast(model.device.type, torch.bfloat16, amp):
            found = meta_rewards(model, [one.prompt for one in batch])
        rewards[[one.completion[0] for one in batch]] = found.double().cpu()
    if RANKS > 1:
        torch.distributed.all_reduce(rewards, torch.distributed.ReduceOp.MAX)
    return rewards.tolist()


def vote_guided(scores, rewards, k_meta: int) -> torch.Tensor:
    """Votes (items, subsets, responses) of the k_meta most trusted samples of each subset: scores
    (items, subsets, k, responses), meta rewards (items, subsets, k)."""
    return vote_sum(scores.take_along_dim(rewards.topk(k_meta).indices[..., None], -2))


def vote_oracle(scores, correct) -> torch.Tensor:
    """Votes of the correct (items, subsets, k) samples; if a subset has none, of all in it."""
    right = correct | ~correct.any(-1, keepdim=True)
    return vote_sum(torch.where(right[..., None], scores, math.nan))


def accuracy(rounds: list[torch.Tensor], best: torch.Tensor) -> torch.Tensor:
    """The accuracy (items,) of votes on random subsets, (items, subsets, responses) a round."""
    return torch.stack([right_and_tied(votes, best)[0] for votes in rounds]).mean(0)


def guide(samples: list[Judgement], rewards: list[float], total: int, share: float) -> dict:
    """Accuracies (items,) by k and k_meta: voting, guided, their difference, the oracle. The last
    row holds the guided quarter of the samples against voting over all (MetaRM@8 and voting@32)."""
    scores, rows = score_tensor(samples, total), {}
    rewards = torch.tensor(rewards, dtype=torch.float64).view(-1, total)
    correct = torch.tensor([one.correct for one in samples]).view(-1, total)
    best = [one.order[one.rewards.index(max(one.rewards))] for one in samples[::total]]
    best, few = torch.tensor(best), max(1, total // 4)
    cases = [(k, max(1, round(share * k)), k) for k in powers(total)]
    cases += [(total, k_meta, total) for k_meta in (1, few)] + [(few, max(1, few // 2), total)]
    for k, k_meta, k_voting in cases:
        voting = [vote_sum(drawn) for drawn in subsets(scores, k_voting)]
        pairs = zip(subsets(scores, k), subsets(rewards, k))
        guided = [vote_guided(*drawn, k_meta) for drawn in pairs]
        pairs = zip(subsets(scores, k), subsets(correct, k))
        oracle = [vote_oracle(*drawn) for drawn in pairs]
        row = {"voting": accuracy(voting, best), "guided": accuracy(guided, best)}
        row |= {"oracle": accuracy(oracle, best), "gain": row["guided"] - row["voting"]}
        rows[f"{k_meta} of {k}" + (f" over {k_voting}" if k < k_voting else "")] = row
    return rows


def auc_within(samples: list[Judgement], rewards: list[float], total: int) -> dict:
    """How well rewards tell right from wrong samples of one item: the mean ROC-AUC of items."""
    values, items = [], []
    for first in range(0, len(samples), total):
        numbers = [i for i in range(first, first + total) if samples[i].scores is not None]
        areas = roc_auc([rewards[i] for i in numbers], [samples[i].correct for i in numbers])
        if areas and not math.isnan(areas[0]):
            values.append(sum(areas) / len(areas))
            items.append(samples[first])
    return mean_and_se(values, items)


def judgements_to_learn(paths: list[str], measured: set[str]) -> list[Judgement]:
    """The readable judgements of these files, without hinted ones and `measured` queries."""
    found = []
    for path in paths:
        drawn = read_lines(path)
        found += [one for one in drawn if one.scores is not None and not one.hint]
    kept = [one for one in found if str(one.query) not in measured]
    counts = Counter(one.correct for one in kept)
    print(f"to learn from: {counts[True]} right, {counts[False]} wrong judgements;", end=" ")
    print(f"{len(found) - len(kept)} of measured queries are left out")
    require(len(counts) == 2, "the meta RM needs right and wrong judgements")
    return kept


def origin(samples: Path) -> str:
    """The model from which the judge of step 4's samples was trained, by its runs' settings."""
    try:
        models = json.loads((samples.parent / "settings.json").read_text())["model"]
        base = models[int(samples.stem.rpartition("_")[2]) - 1]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{samples} is not of step 4: {error}") from None
    runs = history(base)
    return runs[-1]["model"] if runs else base


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("--samples", default="runs/04_voting/samples_1.jsonl", help="of step 4, to vote on")
    option("--learn", nargs="+", help="files of judgements; by default of steps 2 and 3")
    option("--base", help="start model; by default the judge before training")
    option("--quantize", choices=BITS, default="none", help="weights in 8 or 4 bits")
    option("--dtype", choices=DTYPES, default="auto", help="number format of the weights")
    option("--k-meta", type=float, default=0.5, help="share of the samples kept, k_meta / k")
    option("--lora-r", type=int, default=8, help="rank of the adapters")
    option("--lr", type=float, default=1.5e-3, help="peak learning rate (the paper: 1e-5)")
    option("--epochs", type=float, default=1.5, help="passes over the judgements")
    option("--seed", type=int, default=0, help="random seed")
    option("--resume", action="store_true", help="go on with the run in --out")
    option("--out", default="runs/05_metarm", help="folder of the run")
    args = parser.parse_args()
    if not args.learn:  # the judge of the first rollouts was another one
        rollouts = sorted(Path("runs/03_grpo/rollouts").glob("*.jsonl"))
        args.learn = ["runs/02_rejective_ft/trajectories.jsonl", *rollouts[len(rollouts) // 2 :]]
        args.learn = [str(path) for path in args.learn if Path(path).exists()]

    require(0 < args.k_meta <= 1, "--k-meta is a share: above 0, at most 1")
    samples = read_lines(args.samples)
    numbers = [one.item for one in samples]
    total = numbers.count(numbers[0])
    even = [number for number in numbers[::total] for _ in range(total)]
    require(numbers == even, f"{args.samples} lacks {total} samples of an item")
    require(args.learn, "nothing to learn from: run steps 2 and 3, or give --learn")
    judgements = judgements_to_learn(args.learn, {str(one.query) for one in samples})
    base = args.base or origin(Path(args.samples))
    print(f"the meta RM starts as {base}")
    model, tokenizer = meta_model(base, args)
    run = Run(args)
    learn = [one for one in judgements if not held_out(one.query) and not tied(one)]
    texts = [tokenizer(break_up(tokenizer, meta_prompt(one)))["input_ids"] for one in learn]
    examples = [Example(text, [int(one.correct)]) for text, one in zip(texts, learn)]
    gradients = partial(descend, model, examples, meta_losses, 16, args.seed)
    steps = math.ceil(args.epochs * len(examples) / 16)
    train(model, tokenizer, steps, gradients, args, run)
    unseen = [one for one in judgements if held_out(one.query)]
    areas = roc_auc(trust(model, tokenizer, unseen), [one.correct for one in unseen])
    rewards = trust(model, tokenizer, samples)
    run.write("rewards.jsonl", [{"reward": reward} for reward in rewards])
    aucs = {"held-out judgements": mean_and_se(areas, unseen)}
    aucs["samples of one item"] = auc_within(samples, rewards, total)
    for name, row in aucs.items():
        print(f"ROC-AUC, {name}: {100 * row['mean']:.1f} +- {100 * row['se']:.1f} %")
    rows = print_table("accuracy", guide(samples, rewards, total, args.k_meta), samples[::total])
    run.finish({"rows": rows, "auc": aucs, "examples": len(examples), "steps": steps})


# --------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that the user can fix: it is shown in one line."""


def require(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass
class Judgement:
    """An item of the data: a query, its n >= 1 responses and their true rewards. Later also what
    the judge was shown, what it wrote, what we read in it. Raises UserError if malformed."""

    query: str | list[dict]  # text, or turns {"role", "content"}, the last the user's
    responses: list[str]
    rewards: list[float]  # one per response, one maximum; a single response has 1 (right) or 0
    subset: str = ""
    reference: str | None = None  # an answer to judge against (E.1.3)
    item: int = 0  # the item's number in the data
    order: list[int] = field(default_factory=list)  # responses[i] is the item's response order[i]
    binary: bool = False  # a single response is scored 0 or 1, as in training
    hint: str = ""  # a last line that gives the truth away (section 3.2)
    principles: bool = True  # whether they are asked for (Table 4)
    output: str = ""
    tokens: int = 0
    scores: list[int] | None = None  # in the order shown, like responses and rewards
    correct: bool = False  # Eq. 10
    reason: str = ""  # why scores is None

    def __post_init__(self):
        turns = [] if isinstance(self.query, str) else self.query
        require(self.query and all(turn["role"] + turn["content"] for turn in turns), "no query")
        n, best = len({text.strip() for text in self.responses} - {""}), max(self.rewards)
        require(n == len(self.responses) == len(self.rewards), "equal, empty or unrated responses")
        fine = self.rewards.count(best) == 1 and (n > 1 or best in (0, 1))
        require(fine and math.isfinite(sum(self.rewards)), "needs one best reward (single: 0 or 1)")


def read_lines(path: str | Path) -> list[Judgement]:
    """Items or judgements from JSON Lines of our own. Raises UserError."""
    records = []
    try:
        for line in Path(path).read_bytes().strip().split(b"\n"):
            records.append(Judgement(**json.loads(line)))  # no other keys
    except (UserError, ValueError, TypeError, LookupError, AttributeError) as error:
        other = f"other kinds of files: python tests/tools/export.py {path} NEW.jsonl"
        raise UserError(f"{path}:{len(records) + 1}: {error} ({other})") from None
    return records


# The parts of the prompt, in their order: all that a model knows about judging.
TASK = "Judge each response to the conversation. Write the specific criteria that matter here with "
TASK += "their weights, analyse every response against them, then score it."
CRITIQUE_TASK = "Judge each response to the conversation. Analyse every response, then score it."
SCALE = "Scores run from 1 (fails altogether) through 6 (meets some criteria) to 10 (meets all "
SCALE += "criteria)."
BINARY = "The score is 1 if the response is correct and 0 if it is not."
GENERAL = " Be strict; analyse before you score.\n"
GENERAL += "General criteria: following instructions, usefulness, detail, relevance.\n"
MARKER = re.compile(r"\[(?=\s*(conversation|reference|response)[^\[\]]*(begins|ends)\s*\])", re.I)


def build_prompt(one: Judgement, form: bool = True) -> str:
    """The judge's prompt. form: whether it ends with the form of the answer."""

    def block(name: str, text: str) -> str:  # untrusted: cannot end its block
        text = MARKER.sub("(", text).replace("\\boxed", "\\ boxed")  # nor bring a box of its own
        return f"[{name} begins]\n{text}\n[{name} ends]\n"

    turns = [{"role": "user", "content": one.query}] if isinstance(one.query, str) else one.query
    turns = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    task, scale = TASK if one.principles else CRITIQUE_TASK, BINARY if one.binary else SCALE
    parts = [f"{task}\n{scale}{GENERAL}", block("Conversation", turns)]
    parts += [block("Reference answer", one.reference)] if one.reference else []
    parts += [block(f"Response {i}", text) for i, text in enumerate(one.responses, 1)]
    criteria = "Specific Criteria: each criterion and its weight\n" if one.principles else ""
    box = ", ".join(f"s{i}" for i in range(1, len(one.responses) + 1))
    answer = "Analysis: each response against each criterion\nScores: \\boxed"
    answer = f"Answer in this form:\n{criteria}{answer}{{{box}}}"
    return "\n".join(parts + [answer] * form) + (f"\n({one.hint})" if one.hint else "")


def break_up(tokenizer, text: str) -> str:
    """The text with control tokens, such as "<end_of_turn>", broken up: it cannot end a turn."""
    for token in tokenizer.added_tokens_decoder.values():
        word = token.content.strip()
        if word[1:] and (token.special or "|" in word or word in (tokenizer.chat_template or "")):
            text = text.replace(word, f"{word[0]} {word[1:]}")
    return text


def end_tokens(model, tokenizer) -> list[int]:
    """What ends a judgement. The first is the one to learn: the chat template's ("<end_of_turn>")
    if it has one, else EOS. An empty line, as in encode_turns, ends the turn of a base model."""
    own = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "answer"}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2].lstrip()
        first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
        ends = [token for token in first if token in tokenizer.added_tokens_decoder] + ends
    else:
        empty = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        ends += empty if len(empty) == 1 else []
    return [token for token in dict.fromkeys(ends) if token is not None]


def mean_and_se(values: list[float], items: list[Judgement]) -> dict:
    """Mean, standard error and n of values, one an item. Items of the same query are a cluster."""
    mean, sums = sum(values) / len(values) if values else math.nan, Counter()
    for value, item in zip(values, items):
        sums[str(item.query)] += value - mean
    spread = sum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1 or math.nan)
    return {"mean": mean, "se": math.sqrt(spread) / max(1, len(values)), "n": len(values)}


def roc_auc(scores: list[float | None], right: list[bool]) -> list[float]:
    """One value per score. The mean is the area under the ROC curve (nan without both kinds), the
    spread gives its error (DeLong 1988). Ties and unreadable scores (None) count half."""
    score = torch.tensor([math.nan if s is None else s for s in scores], dtype=torch.float64)
    right = torch.tensor(right, dtype=torch.bool)
    ahead = (score[right][:, None] - score[~right]).sign().nan_to_num(0.0)
    wins = (ahead + 1) / 2  # (right, wrong): 1, 0, or 1/2
    values = torch.full_like(score, wins.mean())
    values[right] += (wins.mean(1) - wins.mean()) * len(score) / right.sum()
    values[~right] += (wins.mean(0) - wins.mean()) * len(score) / (~right).sum()
    return values.tolist()


BITS, DTYPES = ["none", "int8", "nf4"], ["auto", "float32", "bfloat16"]


# `torchrun --nproc-per-node N` starts N processes, a GPU each. Alone we are rank 0 of 1.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


progress = partial(tqdm, delay=10, mininterval=10, disable=RANK > 0)


class Run:
    """The folder of a run. A new run moves what the folder holds to NAME.1, NAME.2, ...; --resume
    goes on with it. Ranks meet here; only rank 0 writes. Raises UserError."""

    def __init__(self, args):
        self.folder, self.start, self.settings = Path(args.out), time.time(), dict(vars(args))
        resume, path = self.settings.pop("resume"), self.folder / "settings.json"
        if RANK == 0:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.lock = open(f"{self.folder}.lock", "w")  # one process at a time
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = json.loads(path.read_text()) if resume else self.settings
            was = [f"{name} {old}" for name, old in before.items() if self.settings[name] != old]
            require(not was, f"--resume: the run in {self.folder} had {', '.join(was)}")
            if self.folder.exists() and not resume:
                moved = (Path(f"{self.folder}.{number}") for number in itertools.count(1))
                moved = self.folder.rename(next(path for path in moved if not path.exists()))
                print(f"what was in {self.folder} is now in {moved}")
            self.write("settings.json", [self.settings], indent=1)
        else:
            sys.stdout = open(os.devnull, "w")
        if RANKS > 1:
            torch.distributed.init_process_group()
            torch.distributed.barrier()

    def write(self, name: str, records, indent=None) -> None:
        """Write a file of JSON Lines, whole or not at all."""
        path = self.folder / name
        if RANK == 0:
            path.parent.mkdir(exist_ok=True)
            lines = [json.dumps(one, ensure_ascii=False, indent=indent) + "\n" for one in records]
            path.with_suffix(".part").write_text("".join(lines), encoding="utf-8")
            os.replace(path.with_suffix(".part"), path)

    def finish(self, results: dict) -> None:
        """Write results.json, with settings, version, date and seconds."""
        results |= {"settings": self.settings, "seconds": round(time.time() - self.start)}
        results |= {"date": time.strftime("%Y-%m-%d"), "transformers": transformers.__version__}
        results = json.loads(json.dumps(results).replace("NaN", "null"))  # JSON has no NaN
        self.write("results.json", [results], indent=1)
        print(f"{results['seconds']} s; everything is in {self.folder}/")


def load_model(name: str, quantize: str = "none", dtype: str = "auto"):
    """A causal language model and its tokenizer, from a folder, the Hub, or a LoRA folder, whose
    base is loaded with it. quantize: nf4 (4 bits, double quantization), int8 or none. dtype: auto
    is bfloat16 on a GPU that has it, else float32. No remote code. Raises UserError."""
    device = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    kind = {"auto": "bfloat16" if native else "float32"}.get(dtype, dtype)
    if device != "cpu":
        torch.cuda.set_device(device)  # graphs and ranks' messages use it
    require(not Path(name, "model").is_dir(), f"{name} is a run: give its model, {name}/model")
    how = dict(dtype=kind, device_map={"": device}, use_safetensors=True, output_loading_info=True)
    if quantize != "none":  # else as the checkpoint is
        bits = {f"load_in_{4 if quantize == 'nf4' else 8}bit": True, "bnb_4bit_quant_type": "nf4"}
        bits |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": kind}
        how["quantization_config"] = transformers.BitsAndBytesConfig(**bits)
    name = str(Path(name).resolve()) if Path(name).exists() else name  # adapters name their base
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(name, **how)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except ValueError:  # an adapter may have none
            tokenizer = transformers.AutoTokenizer.from_pretrained(model.config.name_or_path)
        end_tokens(model, tokenizer)  # a template may be broken
    except Exception as error:  # strangers' files fail in many ways
        raise UserError(f"cannot load the model {name}: {str(error).splitlines()[0]}") from None
    require(not report["missing_keys"], f"{name} lacks weights: {report['missing_keys']}")
    for module in [*model.modules(), model.config.get_text_config()]:
        for rate in [r for r in vars(module) if re.search("dropout|^jitter|^p$|avx512bf16", r)]:
            setattr(module, rate, 0.0)  # the same log-probabilities; 4 bits keep their gradient
    return model.eval(), tokenizer


def start(main) -> None:
    """Run main(). A user's mistake is shown in one line, a bug with its traceback."""
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        busy = isinstance(error, BlockingIOError)
        sys.exit("error: " + ("another process uses --out" if busy else str(error)))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: --resume goes on")


Example = namedtuple("Example", "prompt completion")  # token ids; the completion is learnt


def stream(count: int, total: int, seed: int) -> list[int]:
    """`total` numbers below `count`: epoch after epoch, each in an order of its own."""
    epochs = [random.Random(f"{seed} {epoch}") for epoch in range(total // count + 1)]
    return sum([epoch.sample(range(count), count) for epoch in epochs], [])[:total]


MICRO_TOKENS = 8192  # of a forward pass in training, with padding: fewer take less memory


def micro_batches(examples: list):
    """Split examples into batches of similar length, at most MICRO_TOKENS tokens with padding."""
    examples = sorted(examples, key=lambda one: -len(one.prompt) - len(one.completion))
    while examples:
        size = max(1, MICRO_TOKENS // (len(examples[0].prompt) + len(examples[0].completion)))
        yield examples[:size]
        examples = examples[size:]


def train(model, tokenizer, steps: int, gradients, args, run: Run) -> list[dict]:
    """AdamW, clipped to norm 1; the learning rate rises linearly in a tenth of the steps and falls
    along a cosine to a tenth of its peak. From step `first` on, gradients(first) sets this rank's
    p.grad once per step and yields what to log. Goes on from the run's checkpoint. Saves all
    weights, or the adapters in PEFT's format, in model/. Returns the log."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(weights.values(), args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    path, log, rise = run.folder / "checkpoint.pt", [], max(1, round(0.1 * steps))
    if path.exists():
        state = torch.load(path, map_location=model.device, weights_only=True)
        model.load_state_dict(state["weights"], strict=False)
        adam.load_state_dict(state["adam"])
        log = state["log"]
    if model.device.type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    bar = progress(range(len(log), steps), "training", steps, initial=len(log))
    model.train()
    for step, line in zip(bar, gradients(len(log))):
        for p in weights.values() if RANKS > 1 else ():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0).item()
        require(math.isfinite(norm), f"step {step + 1}: the gradient is {norm}; lower --lr")
        fall = 0.55 + 0.45 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))
        adam.param_groups[0]["lr"] = args.lr * min((step + 1) / rise, fall)
        adam.step()
        adam.zero_grad()
        log.append({"step": step + 1, "norm": norm, **line})
        run.write("log.jsonl", log)
        bar.set_postfix({name: f"{value:.2f}" for name, value in line.items()}, refresh=False)
        if RANK == 0 and (len(log) % 10 == 0 or len(log) == steps):
            state = {"log": log, "weights": weights, "adam": adam.state_dict()}
            torch.save(state, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
    for one in (model, tokenizer) if RANK == 0 else ():
        one.save_pretrained(run.folder / "model")
    return log


def descend(model, examples: list[Example], losses_of, size: int, seed: int, first: int):
    """For train(): the gradients of the mean of losses_of(model, examples), one a completion token,
    on batches of `size` examples."""
    for step in itertools.count(first):
        numbers = stream(len(examples), (step + 1) * size, seed)[-size:]
        batch, loss = [examples[i] for i in numbers], torch.zeros((), device=model.device)
        units, amp = sum(len(one.completion) for one in batch), model.config.dtype == torch.bfloat16
        for part in micro_batches(batch[RANK::RANKS]):
            with torch.autocast(model.device.type, torch.bfloat16, amp):
                part_loss = losses_of(model, part).sum() / units
            part_loss.backward()
            loss += part_loss.detach()
        if RANKS > 1:
            torch.distributed.all_reduce(loss)
        yield {"loss": loss.item()}


def score_tensor(judgements: list[Judgement], k: int) -> torch.Tensor:
    """The scores (items, k, responses) of k judgements an item, in the item's order. nan: cannot be
    read. -inf: the item has no such response."""
    width, rows = max(len(one.order) for one in judgements), []
    for one in judgements:
        scores = dict(zip(one.order, one.scores or [math.nan] * len(one.order)))
        rows.append([scores.get(i, -math.inf) for i in range(width)])
    return torch.tensor(rows, dtype=torch.float64).view(-1, k, width)


def vote_sum(scores: torch.Tensor) -> torch.Tensor:
    """Votes (..., responses) of scores (..., k, responses): their sum over the samples (Eq. 14)."""
    return torch.where(scores.isnan(), 0.0, scores).sum(-2)


def subsets(values: torch.Tensor, k: int, rounds: int = 100):
    """Random subsets of k of each item's samples, of values (items, samples, ...): a round yields
    (items, samples // k, k, ...). Its subsets share no sample: for k = 1 and k = samples one round
    is exact. Every call draws the same."""
    (items, total), generator = values.shape[:2], torch.Generator().manual_seed(0)
    for _ in range(1 if k in (1, total) else rounds):
        order = torch.rand(items, total, generator=generator).argsort(-1)
        index = order[:, : total // k * k].view(items, total // k, k)
        yield values[torch.arange(items)[:, None, None], index]


def right_and_tied(votes: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Accuracy (ties break at random), strict (Eq. 10), ties of votes (items, subsets, responses):
    means over the subsets, (3, items). best (items,): the best response."""
    top = votes == votes.amax(-1, keepdim=True)
    count, place = top.sum(-1), best[:, None, None].expand(-1, votes.shape[1], 1)
    right = top.gather(-1, place)[..., 0]
    return torch.stack([right / count, right & (count == 1), count > 1]).double().mean(-1)


def powers(total: int) -> list[int]:
    """1, 2, 4, ... below total, and total."""
    return [2**i for i in range(total.bit_length()) if 2**i < total] + [total]


def history(model: str) -> list[dict]:
    """The settings of the runs that made a model, the latest first."""
    path = Path(model).parent / "settings.json"
    found = [json.loads(path.read_text())] if path.exists() else []
    return found + [earlier for run in found for earlier in history(run["model"])]


def print_table(title: str, rows: dict[str, dict], items: list[Judgement]) -> dict[str, dict]:
    """Print and return the means and errors of values (items,), {row: {column: values}}."""
    print(f"\n{title}, %\n{'':<12}" + "".join(f"{name:>17}" for name in next(iter(rows.values()))))
    figures = {}
    for name, row in rows.items():
        figures[name] = {column: mean_and_se(of.tolist(), items) for column, of in row.items()}
        found = [(100 * one["mean"], 100 * one["se"]) for one in figures[name].values()]
        print(f"{name:<12}" + "".join(f"{mean:>9.1f} +- {se:4.1f}" for mean, se in found))
    return figures


if __name__ == "__main__":
    start(main)
