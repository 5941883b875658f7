"""Step 5: a meta reward model (meta RM) says which judgements to trust, and guides the vote.

Voting counts every judgement alike, the careless ones too. Whether a judgement's scores were
correct (Eq. 10) is known on training items, and a scalar model can learn to predict it (SPCT, arXiv
2504.02495, section 4). It reads the conversation, the responses and the judgement. Its one logit m
is the meta reward, learnt by binary cross-entropy:

    L = -[ c log sigmoid(m) + (1 - c) log(1 - sigmoid(m)) ],     c = 1 if the scores are correct

It learns from what step 2 sampled without hints, right and wrong, and from fresh judgements of the
judge that is to be guided: the later rollouts of step 3, or samples of step 4 on training items.
Guided voting keeps, of k samples, the k_meta = k / 2 with the highest meta rewards and adds up
those (Eq. 14). Nothing is asked twice: step 4's samples are voted on again. The truth serves only
to measure: the oracle keeps the correct samples (all, if none is correct).

    python 05_metarm.py                                          the judge of step 4, on a CPU
    python 05_metarm.py --samples runs/04_voting/samples_2.jsonl --out runs/second
    python 05_metarm.py --learn runs/fresh/samples_1.jsonl --quantize nf4 --lr 1e-4

A departure from the paper: judgements with a tie at the top are not learnt from. They are wrong by
Eq. 10 and easily told, and decide nothing in a vote. Writes runs/05_metarm/: model/, log.jsonl,
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
import shutil
import sys
import time
import zlib
from collections import Counter, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import transformers
from jinja2 import TemplateError
from peft import LoraConfig
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)


def meta_prompt(one: Judgement) -> str:
    """What the meta RM reads: conversation, responses, the judgement as it was written, and a word
    that asks for a review. There the logit is read."""
    shown = build_prompt(one, form=False).partition("\n\n")[2]  # all but the task
    return f"{shown}\n{one.output.strip()}\nReview:"


def tied(one: Judgement) -> bool:
    """Whether several responses share the highest score."""
    return one.scores is not None and one.scores.count(max(one.scores)) > 1


def held_out(query: str | list[dict]) -> bool:
    """Whether judgements of a query are not learnt from: of one query in ten, in whatever data."""
    return zlib.crc32(str(query).encode()) % 10 == 0


def meta_model(base: str, args):
    """A causal language model whose vocabulary is replaced by one logit, which starts at zero, with
    adapters to train; and its tokenizer. transformers' class for sequence classification."""
    causal, tokenizer = load_model(base, args.quantize, args.dtype)
    config = causal.config
    config.num_labels, config.get_text_config().pad_token_id = 1, tokenizer.eos_token_id
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, causal.base_model)
    width = model.score.in_features
    model.score = torch.nn.Linear(width, 1, bias=False, device=causal.device, dtype=torch.float32)
    torch.nn.init.zeros_(model.score.weight)
    torch.manual_seed(args.seed)
    kind = {"target_modules": "all-linear", "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    model.add_adapter(LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, **kind))
    return model, tokenizer


def meta_rewards(model, texts: list[list[int]]) -> torch.Tensor:
    """The logits (texts,) of token ids, padded on the right."""
    width, pad = max(map(len, texts)), model.config.get_text_config().pad_token_id
    ids = [text + [pad] * (width - len(text)) for text in texts]
    mask = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
    ids, mask = torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float()


def meta_loss(model, examples: list[Example]) -> torch.Tensor:
    """The sum of the binary cross-entropies of examples (token ids, [1 if correct else 0])."""
    labels = torch.tensor([float(one.completion[0]) for one in examples], device=model.device)
    rewards = meta_rewards(model, [one.prompt for one in examples])
    return torch.nn.functional.binary_cross_entropy_with_logits(rewards, labels, reduction="sum")


@torch.no_grad()
def trust(model, tokenizer, judgements: list[Judgement]) -> list[float]:
    """The meta reward of each judgement, -inf for those that cannot be read or are too long."""
    model.eval()
    rewards = torch.full((len(judgements),), -math.inf, dtype=torch.float64)
    examples = []
    for number, one in enumerate(judgements):
        ids = tokenizer(break_up(tokenizer, meta_prompt(one)))["input_ids"]
        if one.scores is not None and len(ids) <= context_of(model):
            examples.append(Example(ids, [number]))
    batches = micro_batches(examples)[RANK::RANKS]
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16, model.device.type == "cuda"):
            found = meta_rewards(model, [one.prompt for one in batch])
        rewards[[one.completion[0] for one in batch]] = found.double().cpu()
    if RANKS > 1:
        torch.distributed.all_reduce(rewards, torch.distributed.ReduceOp.MAX)
    return rewards.tolist()


def vote_guided(scores, rewards, index, k_meta: int) -> torch.Tensor:
    """Votes (items, subsets, responses) of the k_meta most trusted samples of each subset. scores
    (items, total, responses), meta rewards (items, total), index (items, subsets, k)."""
    kept = take(rewards[..., None], index)[..., 0].topk(k_meta).indices
    return vote_sum(take(scores, index.gather(-1, kept)))


def vote_oracle(scores, correct, index) -> torch.Tensor:
    """Votes of the samples that are correct (items, total), or of all in a subset without any."""
    right = take(correct[..., None], index)[..., 0]
    right = right | ~right.any(-1, keepdim=True)
    return vote_sum(torch.where(right[..., None], take(scores, index), math.nan))


def accuracy(vote, best: torch.Tensor, total: int, k: int) -> torch.Tensor:
    """The accuracy (items,) of vote(index), as the mean over random subsets of k samples."""
    rounds = [right_and_tied(vote(index), best)[0] for index in subsets(len(best), total, k)]
    return torch.stack(rounds).mean(0)


def guide(samples: list[Judgement], rewards: list[float], total: int, share: float) -> dict:
    """Accuracy by k and k_meta: voting, guided, their paired gain, the oracle. The last row holds
    the guided quarter of the samples against voting over all (MetaRM@8 against voting@32)."""
    items, scores = samples[::total], score_tensor(samples, total)
    rewards = torch.tensor(rewards, dtype=torch.float64).view(-1, total)
    correct = torch.tensor([one.correct for one in samples]).view(-1, total)
    best = torch.tensor([one.order[one.rewards.index(max(one.rewards))] for one in items])
    few = max(1, total // 4)
    cases = [(k, max(1, round(share * k)), k) for k in powers(total)]
    cases += [(total, k_meta, total) for k_meta in (1, few)] + [(few, max(1, few // 2), total)]
    rows = {}
    for k, k_meta, k_voting in cases:
        ways = {
            "voting": (lambda index: vote_sum(take(scores, index)), k_voting),
            "guided": (lambda index, m=k_meta: vote_guided(scores, rewards, index, m), k),
            "oracle": (lambda index: vote_oracle(scores, correct, index), k),
        }
        found = {name: accuracy(vote, best, total, size) for name, (vote, size) in ways.items()}
        found["gain"] = found["guided"] - found["voting"]
        title = f"{k_meta} of {k}" + (f" over {k_voting}" if k < k_voting else "")
        rows[title] = {name: mean_and_se(of.tolist(), items) for name, of in found.items()}
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
    """The judgements of these files that can be read and were made without a hint, but not of the
    queries that are measured on. Of rollouts, made while the judge changed, the second half."""
    found = []
    for path in paths:
        drawn = read_lines(path, Judgement)
        drawn = drawn[len(drawn) // 2 :] if path.endswith("rollouts.jsonl") else drawn
        found += [one for one in drawn if one.scores is not None and not one.hint]
    found = [one for one in found if str(one.query) not in measured]
    counts = Counter(one.correct for one in found)
    print(f"judgements to learn from: {counts[True]} right, {counts[False]} wrong")
    require(len(counts) == 2, "the meta RM needs right and wrong judgements")
    return found


def origin(samples: Path) -> str:
    """What the judge of step 4's samples was made of, by the settings of the runs that made it."""
    try:
        models = json.loads((samples.parent / "settings.json").read_text())["model"]
        base = models[int(samples.stem.rpartition("_")[2]) - 1]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{samples} is not of step 4: {error}") from None
    while (settings := Path(base).parent / "settings.json").exists():
        base = json.loads(settings.read_text())["model"]
    return base


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("--samples", default="runs/04_voting/samples_1.jsonl", help="of step 4, to vote on")
    option("--learn", nargs="+", help="files of judgements; by default of steps 2 and 3")
    option("--base", help="what the meta RM is made of; by default what the judge was made of")
    option("--quantize", choices=BITS, default="none", help="weights in 8 or 4 bits")
    option("--dtype", choices=DTYPES, default="auto", help="of the weights")
    option("--k-meta", type=float, default=0.5, help="share of the samples that is kept")
    option("--lora-r", type=int, default=8, help="rank of the adapters")
    option("--lr", type=float, default=4e-3, help="peak learning rate (the paper: 1e-5)")
    option("--epochs", type=float, default=1.5, help="passes over the judgements")
    option("--seed", type=int, default=0, help="of everything")
    option("--resume", action="store_true", help="go on with the run in --out")
    option("--out", default="runs/05_metarm", help="folder of the run")
    args = parser.parse_args()
    earlier = "runs/02_rejective_ft/trajectories.jsonl", "runs/03_grpo/rollouts.jsonl"
    args.learn = args.learn or [path for path in earlier if Path(path).exists()]

    require(0 < args.k_meta <= 1, "--k-meta is a share: above 0, at most 1")
    samples = read_lines(args.samples, Judgement)
    total = sum(one.item == samples[0].item for one in samples)
    samples = [one for one in samples if len(one.rewards) > 1]
    judgements = judgements_to_learn(args.learn, {str(one.query) for one in samples})
    base = args.base or origin(Path(args.samples))
    print(f"the meta RM is made of {base}")
    run = Run(args)
    model, tokenizer = meta_model(base, args)
    learn = [one for one in judgements if not held_out(one.query) and not tied(one)]
    texts = [tokenizer(break_up(tokenizer, meta_prompt(one)))["input_ids"] for one in learn]
    examples = [Example(text, [int(one.correct)]) for text, one in zip(texts, learn)]
    steps = train(model, examples, meta_loss, 16, args, run)
    save(model, tokenizer, run)
    unseen = [one for one in judgements if held_out(one.query)]
    areas = roc_auc(trust(model, tokenizer, unseen), [one.correct for one in unseen])
    rewards = trust(model, tokenizer, samples)
    run.append("rewards.jsonl", [{"reward": reward} for reward in rewards], anew=True)
    aucs = {"held-out judgements": mean_and_se(areas, unseen)}
    aucs["samples of one item"] = auc_within(samples, rewards, total)
    for name, row in aucs.items():
        print(f"ROC-AUC, {name}: {100 * row['mean']:.1f} +- {100 * row['se']:.1f} %")
    rows = guide(samples, rewards, total, args.k_meta)
    print_curve(rows)
    run.finish({"rows": rows, "auc": aucs, "examples": len(examples), "steps": steps})


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


def break_up(tokenizer, text: str) -> str:
    """The text with control tokens, such as "<end_of_turn>", broken up: it cannot end a turn."""
    for token in tokenizer.added_tokens_decoder.values():
        word = token.content.strip()
        if len(word) > 1 and (token.special or word in (tokenizer.chat_template or "")):
            text = text.replace(word, f"{word[0]} {word[1:]}")
    return text


def mean_and_se(values: list[float], items: list[Preference]) -> dict:
    """Mean, standard error and n of values, one an item. Items of the same query are a cluster."""
    mean, sums = sum(values) / len(values) if values else math.nan, Counter()
    for value, item in zip(values, items):
        sums[str(item.query)] += value - mean
    spread = sum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1 or math.nan)
    return {"mean": mean, "se": math.sqrt(spread) / max(1, len(values)), "n": len(values)}


def roc_auc(scores: list[float | None], right: list[bool]) -> list[float]:
    """Values, one a score, whose mean is the area under the ROC curve (nan without both kinds) and
    whose spread gives its error (DeLong 1988). Ties and unreadable scores (None) count half."""
    score = torch.tensor([math.nan if s is None else s for s in scores], dtype=torch.float64)
    right = torch.tensor(right, dtype=torch.bool)
    ahead = score[right][:, None] - score[~right]
    wins = (ahead.sign().nan_to_num(0.0) + 1) / 2  # (right, wrong): 1, 0, or 1/2
    values = torch.full_like(score, wins.mean())
    values[right] += (wins.mean(1) - wins.mean()) * len(score) / right.sum()
    values[~right] += (wins.mean(0) - wins.mean()) * len(score) / (~right).sum()
    return values.tolist()


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


def context_of(model) -> int:
    """Tokens that the model takes; with longrope, whose frequencies depend on the longest prompt of
    a batch, only those of its original length."""
    config = model.config.get_text_config()
    original = getattr(config, "original_max_position_embeddings", None)
    return original or getattr(config, "max_position_embeddings", sys.maxsize)


def progress(title: str, total: int, first: int = 0):
    """A progress bar, if it takes more than ten seconds; in a log, a line every ten seconds."""
    wait = 0.1 if sys.stderr.isatty() else 10
    return tqdm(None, title, total, initial=first, delay=10, mininterval=wait, disable=RANK > 0)


def start(main) -> None:
    """Run main(). What the user can put right is one line; a bug shows its traceback."""
    try:
        main()
    except (UserError, TemplateError, BlockingIOError, torch.OutOfMemoryError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command with --resume goes on")


Example = namedtuple("Example", "prompt completion")  # token ids; the completion is learnt


def shuffled(n: int, seed: str) -> list[int]:
    """The numbers 0 to n - 1 in an order that the seed decides: a place must say nothing."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order


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


def train(model, examples: list[Example], loss_of, size: int, args, run: Run) -> int:
    """Make loss_of(model, examples), a sum over completion tokens, small in batches of `size`
    examples. Returns the number of steps."""
    steps = math.ceil(args.epochs * len(examples) / size)
    optimizer = Optimizer(model, steps, args, run)
    bar = progress("training", steps, optimizer.step)
    model.train()
    while optimizer.step < steps:
        numbers = examples_of_step(optimizer.step, len(examples), size, args.seed)
        batch, loss = [examples[i] for i in numbers], torch.zeros((), device=model.device)
        units = sum(len(one.completion) for one in batch)
        for part in micro_batches(batch[RANK::RANKS]):
            with torch.autocast(model.device.type, torch.bfloat16, model.device.type == "cuda"):
                part_loss = loss_of(model, part) / units
            part_loss.backward()
            loss += part_loss.detach()
        if RANKS > 1:
            torch.distributed.all_reduce(loss)
        optimizer.update({"loss": loss.item()})
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        bar.update()
    bar.close()
    return steps


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


def score_tensor(judgements: list[Judgement], k: int) -> torch.Tensor:
    """The scores (items, k, responses) of k judgements an item, put back into the item's order.
    nan: the judgement cannot be read. -inf: the item has no such response."""
    width, rows = max(len(one.order) for one in judgements), []
    for one in judgements:
        scores = dict(zip(one.order, one.scores or [math.nan] * len(one.order)))
        rows.append([scores.get(i, -math.inf) for i in range(width)])
    return torch.tensor(rows, dtype=torch.float64).view(-1, k, width)


def vote_sum(scores: torch.Tensor) -> torch.Tensor:
    """Votes (..., responses) of scores (..., k, responses): their sum over the samples (Eq. 14)."""
    return torch.where(scores.isnan(), 0.0, scores).sum(-2)


def subsets(items: int, total: int, k: int, rounds: int = 100) -> Iterator[torch.Tensor]:
    """Random subsets of k of each item's `total` samples: indices (items, total // k, k), again and
    again. A round's subsets share no sample; so for k = 1 and k = total one round is exact."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(1 if k in (1, total) else rounds):
        order = torch.rand(items, total, generator=generator).argsort(-1)
        yield order[:, : total // k * k].view(items, total // k, k)


def take(scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The samples of subsets: scores (items, total, responses) at indices (items, subsets, k) are
    (items, subsets, k, responses)."""
    return scores[torch.arange(len(scores))[:, None, None], index]


def right_and_tied(votes: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """What votes (items, subsets, responses) are worth if response best (items,) is the best, as
    means over the subsets: (3, items). Accuracy (a tie is a coin toss), strict (Eq. 10), ties."""
    top = votes == votes.amax(-1, keepdim=True)
    count, place = top.sum(-1), best[:, None, None].expand(-1, votes.shape[1], 1)
    right = top.gather(-1, place)[..., 0]
    return torch.stack([right / count, right & (count == 1), count > 1]).double().mean(-1)


def powers(total: int) -> list[int]:
    """1, 2, 4, ... below total, and total."""
    return [2**i for i in range(total.bit_length()) if 2**i < total] + [total]


def print_curve(curve: dict) -> None:
    """Print figures, {title of a row: {name: {"mean", "se"}}}, in percent."""
    print(f"{'':<12}" + "".join(f"{name:>17}" for name in next(iter(curve.values()))))
    for title, row in curve.items():
        cells = [f"{100 * one['mean']:.1f} +- {100 * one['se']:4.1f}" for one in row.values()]
        print(f"{title:<12}" + "".join(f"{cell:>17}" for cell in cells))


if __name__ == "__main__":
    start(main)
