"""Step 4: inference-time scaling by voting: ask the same judge k times and add up its scores. Nothing is trained; more compute, better rewards.

A judgement rests on the principles that it happened to write, and its scores have ten steps: they often tie. Another sample looks at other
things and errs elsewhere. So (SPCT, arXiv 2504.02495, section 4) sample k judgements at temperature 0.5, each with the responses in an order of
its own, because a judge may favour a position; put the scores back into the item's order, and sum:

    S*_i = S_i1 + S_i2 + ... + S_ik                for response i, over the k samples                                          (Eq. 14)

What the samples share adds up, what they get wrong in different ways cancels, and sums take 9k + 1 values instead of 10: ties become rare. Judges
of other kinds vote by the mean (Eq. 12), which chooses as the sum does, or by the majority of choices (Eq. 13), which forgets how sure each was.

    python 04_voting.py                                                                    the latest embedded judge, 2 CPU cores, minutes
    python 04_voting.py --model google/gemma-3-4b-it --data eval.jsonl --limit 1000                           a small Gemma on one GPU
    python 04_voting.py --model google/gemma-2-27b-it --quantize nf4 --data eval.jsonl --limit 500 --k 8         27 billion parameters on one GPU
    python 04_voting.py --model tests/tiny/judge --model runs/03_grpo/model --html         compare judges; write a page that shows the votes

Reads preferences as JSON Lines (01_pointwise_grm.py --export makes them). Writes runs/04_voting/: samples-*.jsonl and greedy-*.jsonl (every
judgement; a run with the same settings takes them over, and step 5 reads them), results.json, voting.png, on demand votes.html. A run prints
accuracy by k with 95% intervals: the sum, its gain over one sample, majority and mean beside it, ties, how many values the sums took and could
take. The figure for k is the mean over many random subsets of k of the samples. Unreadable samples add nothing; if none can be read, all responses
tie.

Exercises (what is asked for goes into this file: constants and new functions above main(), options into it; the check says what was expected,
and shows what comes of it)
1. SPACE = how many values a response's vote can take over 8 readable samples of a pair, as (sum, mean, majority). DIFFER = [[a, b], [c, d],
   [e, f]]: scores of three samples of a pair where sum and majority choose differently. Check: pytest tests/exercises.py -k 04_1
2. Write show_balanced(item, number, seed, i): sample i of item `number`, a Trajectory as from `show`. Its samples come in rounds of n, the number of
   responses (0 to n - 1, n to 2n - 1, ...). Within a round every response stands once at every place; each round of each item starts from a random
   order of its own. Check: pytest tests/exercises.py -k 04_2
3. Write vote_early(scores (k, responses)), which returns (sums, samples used): it takes the samples in turn and stops as soon as those that are
   left can no longer change the choice, nor lead to a tie. A sample that cannot be read (nan) adds nothing but counts as used.
   Check: pytest tests/exercises.py -k 04_3
Then look: --temperature 0 leaves only the shuffling to tell samples apart. How much of the gain is left? Which temperature gives the most?
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import gc
import html
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib
import psutil
import torch
import transformers
from matplotlib.figure import Figure
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

HERE = Path(__file__).resolve().parent


def judge_items(kind: str, name: str, load: Callable, shown: list[Trajectory], temperature: float, args, out: Path,
                at_once: int = 1024) -> tuple[list[Trajectory], dict]:
    """Let the model `name`, which `load()` loads if something is left to do, judge what is shown: item after item, as many times each.

    The judgements are kept in out/KIND-DIGITS.jsonl, where the digits follow from all that decides them. The file grows by whole items, about
    `at_once` judgements at a time, and what is in it already is taken over. Beside it lies a .json with what decided, the model's "parameters" and
    the mean "tokens" of a judgement, which is returned with the judgements. Raises DataError and ModelError.
    """
    decides = {"kind": kind, "model": fingerprint(name), "quantize": args.quantize, "temperature": temperature, "seed": args.seed,
               "max_new_tokens": args.max_new_tokens, "shown": zlib.crc32(repr(shown).encode()), "prompt": build_prompt("", ["", ""])}
    path, k = out / f"{kind}-{zlib.crc32(json.dumps(decides).encode()):08x}.jsonl", sum(t.item == 0 for t in shown)
    facts, done = path.with_suffix(".json"), judge_and_keep(load, shown, temperature, args, args.seed, path, max(1, at_once // k) * k)
    known = None
    with contextlib.suppress(OSError, DataError):
        known = parse_json(facts.read_bytes())
    if not known:
        model, tokenizer = load()
        tokens = sum(len(ids) + 1 for ids in tokenizer([t.output for t in done], add_special_tokens=False)["input_ids"])  # 1: the end token
        known = decides | {"name": name, "parameters": model.num_parameters(), "tokens": tokens / len(done)}
    put(facts, lambda aside: aside.write_text(json.dumps(known, indent=1) + "\n"))  # in any case: the ranks must all come to this, or none
    return done, known


def score_tensor(trajectories: list[Trajectory], k: int) -> torch.Tensor:
    """The scores (items, k, responses) of k trajectories an item, put back into the item's order.

    nan: the sample cannot be read. -inf: the item has no such response; it loses every vote.
    """
    width, rows = max(len(t.order) for t in trajectories), []
    for t in trajectories:
        scores = dict(zip(t.order, t.scores or [math.nan] * len(t.order)))
        rows.append([scores.get(i, -math.inf) for i in range(width)])
    return torch.tensor(rows, dtype=torch.float64).view(-1, k, width)


def vote_sum(scores: torch.Tensor) -> torch.Tensor:
    """Scores (..., k, responses) to votes (..., responses): each response's sum over the k samples, unreadable ones adding nothing (Eq. 14)."""
    return torch.where(scores.isnan(), 0.0, scores).sum(-2)


def vote_mean(scores: torch.Tensor) -> torch.Tensor:
    """Each response's mean over the samples that can be read (Eq. 12), nan if none can. Within an item it ranks as the sum does, for both count
    the same samples; between items, it does not depend on how many those were."""
    return scores.nanmean(-2)


def vote_majority(scores: torch.Tensor) -> torch.Tensor:
    """How many samples choose each response (Eq. 13). A sample with several best ones splits its vote; an unreadable one has none."""
    best = scores == scores.amax(-1, keepdim=True)  # false throughout for nan
    votes = (best / best.sum(-1, keepdim=True).clamp(min=1)).sum(-2).round(decimals=9)  # three thirds are one
    return torch.where((scores == -math.inf).any(-2), -math.inf, votes)


VOTES = {"sum": vote_sum, "majority": vote_majority, "mean": vote_mean}


def subsets(items: int, total: int, k: int, rounds: int = 100, seed: int = 0) -> Iterator[torch.Tensor]:
    """Random subsets of k of an item's `total` samples: indices (items, total // k, k), `rounds` times.

    A round shuffles the samples and cuts them into subsets that share none; so k = 1 and k = total take one round to be exact.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1 if k in (1, total) else rounds):
        order = torch.rand(items, total, generator=generator).argsort(-1)
        yield order[:, :total // k * k].view(items, total // k, k)


def take(scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The samples of subsets: scores (items, total, responses) at indices (items, subsets, k) are (items, subsets, k, responses)."""
    return scores[torch.arange(len(scores))[:, None, None], index]


def right_and_tied(votes: torch.Tensor, best: torch.Tensor) -> dict[str, torch.Tensor]:
    """What votes (items, subsets, responses) are worth, where response best (items,) is the best: means over the subsets, each (items,).

    accuracy: the chance to choose the best response, ties broken by a fair coin; strict: it alone has the most votes (Eq. 10); ties.
    """
    votes = torch.where(votes.isnan(), 0.0, votes)
    top = votes == votes.amax(-1, keepdim=True)
    count, right = top.sum(-1), top.gather(-1, best[:, None, None].expand(-1, votes.shape[1], 1))[..., 0]
    return {"accuracy": (right / count).mean(-1), "strict": (right & (count == 1)).double().mean(-1), "ties": (count > 1).double().mean(-1)}


def over_subsets(vote: Callable, best: torch.Tensor, total: int, k: int) -> dict[str, torch.Tensor]:
    """`right_and_tied` of vote(indices (items, subsets, k)), a tensor (items, subsets, responses), as the mean over many random subsets."""
    rounds = [right_and_tied(vote(index), best) for index in subsets(len(best), total, k)]
    return {key: torch.stack([values[key] for values in rounds]).mean(0) for key in rounds[0]}


def bootstrap(values: torch.Tensor, clusters: list, rounds: int = 2000) -> list[float]:
    """[mean, low, high] of values (items,) with its 95% interval: items are drawn anew with replacement, those of a cluster (query) together."""
    if not len(values):
        return [math.nan] * 3
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    member = torch.tensor([numbers[cluster] for cluster in clusters])
    sums, sizes = torch.zeros(len(numbers), dtype=torch.float64).index_add(0, member, values.double()), torch.bincount(member)
    drawn = torch.randint(len(numbers), (rounds, len(numbers)), generator=torch.Generator().manual_seed(0))
    low, high = (sums[drawn].sum(1) / sizes[drawn].sum(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [values.double().mean().item(), low, high]


def auc_over_subsets(vote: Callable, right: list[bool], queries: list[str], total: int, k: int) -> list[float]:
    """[ROC-AUC, low, high] of single responses, of which right (items,) says which are right, as the mean over many random subsets, with its interval
    as from `bootstrap`, cut at 0 and 1. vote(indices) is (items, subsets, 1); where it is nan, nothing could be read, and chance is half."""
    values = [roc_auc(votes, right) for index in subsets(len(right), total, k) for votes in vote(index)[..., 0].T.tolist()]
    return torch.tensor(bootstrap(torch.tensor(values).mean(0), queries), dtype=torch.float64).clamp(0, 1).tolist()


def scaling(items: list[Preference], greedy: list[Trajectory], samples: list[Trajectory], total: int) -> dict:
    """Everything that is printed and plotted of one model: figures are [mean, low, high] with a 95% interval over items, clustered by query.

    greedy: one judgement an item. samples: `total` an item. The curve has a row for each k = 1, 2, 4, ..., total.
    """
    many, single = ([i for i, item in enumerate(items) if (len(item.responses) > 1) == kind] for kind in (True, False))
    scores, once = score_tensor(samples, total), score_tensor(greedy, 1)
    best = torch.tensor([items[i].rewards.index(max(items[i].rewards)) for i in many], dtype=torch.long)
    right, queries, of_single = [items[i].rewards[0] > 0 for i in single], [str(items[i].query) for i in many], [str(items[i].query) for i in single]
    longest = torch.tensor([chance_of_best([len(r) for r in items[i].responses], items[i].rewards) for i in many])
    greedy = {key: bootstrap(values, queries) for key, values in right_and_tied(vote_sum(once[many][:, None]), best).items()}
    greedy["auc"] = auc_over_subsets(lambda index: vote_mean(take(once[single], index)), right, of_single, 1, 1)
    result, values = {"items": len(items), "many": len(many), "single": len(single), "unreadable": scores.isnan().any(-1).double().mean().item(),
                      "longest": bootstrap(longest, queries), "greedy": greedy, "curve": [], "by_subset": {}}, {}
    for k in [2**i for i in range(total.bit_length()) if 2**i < total] + [total]:
        row = {"k": k, "space": 10 * k if scores.isnan().any() else 9 * k + 1}  # sums are from k to 10 k; from 1, if some samples cannot be read
        for name, vote in VOTES.items():
            values[k, name] = over_subsets(lambda index: vote(take(scores[many], index)), best, total, k)
            row[name] = {key: bootstrap(of_key, queries) for key, of_key in values[k, name].items()}
        row["gain"] = bootstrap(values[k, "sum"]["accuracy"] - values[1, "sum"]["accuracy"], queries)  # paired: the same items
        row["auc"] = auc_over_subsets(lambda index: vote_mean(take(scores[single], index)), right, of_single, total, k)
        chosen = take(scores, next(subsets(len(items), total, k)))[:, 0]  # one vote on every item: how many different sums it shows
        result["curve"].append(row | {"seen": len(vote_sum(chosen)[chosen.nanmean(1).isfinite()].unique())})
    for subset in sorted({items[i].subset for i in many}):
        of = torch.tensor([items[i].subset == subset for i in many])
        ends = [bootstrap(values[k, "sum"]["accuracy"][of], [q for q, keep in zip(queries, of) if keep]) for k in (1, total)]
        result["by_subset"][subset] = {"n": int(of.sum()), "one": ends[0], "all": ends[1]}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option("--model", action="append", help="folder, Hub name, GGUF file or LoRA folder; repeat it to compare several; by default what step 3 "
           "or else step 2 left in runs/, or the embedded judge")
    option("--quantize", choices=["none", "int8", "nf4"], default="none", help="hold the weights in 8 bits (int8) or 4 (nf4)")
    option("--data", default=str(HERE / "tests/tiny/eval.jsonl"), help="preferences to judge, JSON Lines")
    option("--limit", type=int, default=300, help="use the first so many items of --data")
    option("--k", type=int, default=32, help="samples an item; figures are for 1, 2, 4, ... and so many")
    option("--temperature", type=float, default=0.5, help="of the samples; greedy is measured beside them")
    option("--max-new-tokens", type=int, default=512, help="longest judgement, in tokens")
    option("--batch-size", type=int, help="rows sampled together; by default what memory holds")
    option("--html", action="store_true", help="write a page that shows how votes of the first --model were decided")
    option("--seed", type=int, default=0, help="of the orders and the samples")
    option("--out", default="runs/04_voting", help="folder for everything that is written; samples in it are used again")
    args = parser.parse_args()
    check_options(parser, args)

    join_ranks()
    items, out, start, results = load_lines(args.data)[:args.limit], Path(args.out), time.time(), {}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if not args.model:
        trained = [folder for folder in ("runs/03_grpo/model", "runs/02_rejective_ft/model") if Path(folder).exists()]
        args.model = [*trained, os.path.relpath(HERE / "tests/tiny/judge")][:1]
    print(f"{' and '.join(args.model)}: {args.k} samples of each of the first {len(items)} items of {args.data}")
    for name in dict.fromkeys(args.model):
        load = functools.cache(lambda: load_model(name, args.quantize))
        try:
            greedy, _ = judge_items("greedy", name, load, [show(item, number, None) for number, item in enumerate(items)], 0.0, args, out)
            samples, facts = judge_items("samples", name, load, ballots(items, args.k, f"{args.seed} vote"), args.temperature, args, out)
        except KeyboardInterrupt:
            sys.exit(f"\ninterrupted; go on with: {shlex.join(['python', *sys.argv])}")
        results[name] = scaling(items, greedy, samples, args.k) | {"tokens": facts["tokens"], "parameters": facts["parameters"]}
        print(table_of_votes(name, results[name]))
        if args.html and len(results) == 1:
            put(out / "votes.html", lambda aside: aside.write_text(page(name, items, samples, args.k), encoding="utf-8"))
    if len(results) > 1:
        print(f"\nsum, percent [95% interval]\n  {'':<10}" + "".join(f"{name[-28:]:>30}" for name in results))
        for row, k in enumerate(row["k"] for row in next(iter(results.values()))["curve"]):
            print(f"  {'k = ' + str(k):<10}" + "".join(f"{percent(result['curve'][row]['sum']['accuracy']):>30}" for result in results.values()))
    put(out / "voting.png", lambda aside: plot_votes(results, aside))
    figures = {"models": results, "settings": vars(args), "seconds": time.time() - start,
               "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    figures = json.loads(json.dumps(figures), parse_constant=lambda _: None)  # JSON has no NaN
    put(out / "results.json", lambda aside: aside.write_text(json.dumps(figures, indent=1) + "\n"))
    print(f"\n{figures['seconds']:.0f} s. Everything is in {out}/: results.json, voting.png, the samples" + ", votes.html" * args.html)


# ------------------------------------------------------------------------------------------------------------------------------------------
# How the votes are shown and samples kept apart: the table, the plot, the page.
# ------------------------------------------------------------------------------------------------------------------------------------------

def percent(figure: list[float], sign: str = "") -> str:
    """A figure with its interval: "75.0 [72.1, 77.9]"; nothing if it is not a number."""
    mean, low, high = (100 * value for value in figure)
    return "" if math.isnan(mean) else f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def table_of_votes(name: str, result: dict) -> str:
    """What a run prints of a model, in the manner of Table 3."""
    def line(title, total="", gain="", others=(), seen="", possible="", tokens="", auc=""):
        shares = "".join(f"{100 * value:9.1f}" if value is not None else f"{'':9}" for value in others or [None] * 4)
        return f"  {title:<9}{total:>19}{gain:>23}{shares}{seen:>8}{possible:>6}{tokens:>8}{auc:>22}".rstrip() + "\n"

    text = (f"\n{name}: {result['many']} items with two or more responses, {result['single']} with one; {100 * result['unreadable']:.1f}% of the "
            "samples are unreadable\npercent [95% interval]; accuracy: ties are coin tosses; strict and ties: of the sum; values: which the sum "
            f"took, and could take\n  {'':<9}{'sum':>19}{'gain over k = 1':>23}{'majority':>9}{'mean':>9}{'strict':>9}{'ties':>9}{'values':>14}"
            f"{'tokens':>8}" + f"{'ROC-AUC of single':>22}" * (result["single"] > 0) + "\n")
    text += line("longest", percent(result["longest"])) * (result["many"] > 0)
    greedy = result["greedy"]
    text += line("greedy", percent(greedy["accuracy"]), others=[None, None, greedy["strict"][0], greedy["ties"][0]] * bool(result["many"]),
                 auc=percent(greedy["auc"]))
    for row in result["curve"]:
        others = [row["majority"]["accuracy"][0], row["mean"]["accuracy"][0], row["sum"]["strict"][0], row["sum"]["ties"][0]]
        text += line(f"k = {row['k']}", percent(row["sum"]["accuracy"]), percent(row["gain"], "+") if row["k"] > 1 else "",
                     others * bool(result["many"]), row["seen"], row["space"], round(row["k"] * result["tokens"]), percent(row["auc"]))
    for subset, row in result["by_subset"].items() if len(result["by_subset"]) > 1 else ():
        text += f"  {subset or 'no subset'}, {row['n']} items: k = 1 {percent(row['one'])}, k = {result['curve'][-1]['k']} {percent(row['all'])}\n"
    return text


def draw_curves(axes, curves: dict[str, tuple[list, list]], xlabel: str, ylabel: str) -> None:
    """Draw a line with its band for each of name: (xs, [mean, low, high] for each x), in percent, over a logarithmic axis with a tick at each x.
    Colours differ in brightness, markers and dashes in form: the lines stay apart in grey."""
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, axisbelow=True)
    for number, (name, (xs, figures)) in enumerate(curves.items()):
        mean, low, high = ([100 * value for value in values] for values in zip(*figures))
        color = matplotlib.colormaps["viridis"](0.75 * number / max(1, len(curves) - 1))
        axes.fill_between(xs, low, high, facecolor=(*color[:3], 0.13), edgecolor=(*color[:3], 0.5), linewidth=0.6)
        axes.plot(xs, mean, color=color, marker="os^DvP*X"[number % 8], linestyle=["-", "--", "-.", ":"][number % 4], linewidth=2, markersize=8,
                  markerfacecolor=(color, "white")[number % 2], markeredgewidth=2, label=name)
        axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def plot_votes(results: dict[str, dict], path: Path) -> None:
    """Accuracy over k, after the paper's Figure 1; for several models over compute as well, after Figure 4 (what it takes to read the prompts is
    left out). For single responses alone: ROC-AUC."""
    many = all(result["many"] for result in results.values())
    ks = [row["k"] for row in next(iter(results.values()))["curve"]]
    figures = {name: [row["sum"]["accuracy"] if many else row["auc"] for row in result["curve"]] for name, result in results.items()}
    curves = {name: (ks, of) for name, of in figures.items()}
    with matplotlib.rc_context({"font.size": 14}):
        figure = Figure(figsize=(8 * min(2, len(results)), 5.5), layout="constrained")
        left, *right = figure.subplots(1, min(2, len(results)), sharey=True, squeeze=False)[0]
        if len(results) == 1 and many:
            [[name, result]] = results.items()
            curves = {"sum (Eq. 14)": (ks, figures[name]), "majority (Eq. 13)": (ks, [row["majority"]["accuracy"] for row in result["curve"]])}
            left.axhline(100 * result["greedy"]["accuracy"][0], color="0.3", linestyle=":", linewidth=2, label="greedy, once")
            left.set_title(name, fontsize=14)
        draw_curves(left, curves, "samples per item, k", "accuracy, %" if many else "ROC-AUC, %")
        left.legend(frameon=False, loc="lower right")
        for axes in right:
            compute = {name: [k * result["tokens"] * result["parameters"] for k in ks] for name, result in results.items()}
            draw_curves(axes, {name: (compute[name], of) for name, of in figures.items()}, "compute per item: generated tokens \u00d7 parameters", "")
            axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter("{x:.0e}")
        figure.savefig(path, format="png", dpi=150)


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { border: 1px solid #bbb; padding: .2em .7em; text-align: left; vertical-align: top }
p, td { white-space: pre-wrap } section { border-top: 3px solid #222; margin-top: 3em }"""


def page(name: str, items: list[Preference], samples: list[Trajectory], total: int) -> str:
    """A page of HTML that needs nothing else: a few items with all their samples, and how the sum decided. All text in it is escaped."""
    scores, titles = score_tensor(samples, total), {  # by whether the first sample and the sum choose the best response
        (0, 1): "The vote saved a wrong first sample", (0, 0): "The vote did not save a wrong first sample",
        (1, 0): "The vote spoiled a right first sample"}
    stories = {chances: [] for chances in titles}
    for i, item in enumerate(items):
        votes = [vote_sum(scores[i, :count]).tolist()[:len(item.responses)] for count in (1, total)]
        chances = tuple(chance_of_best(vote, item.rewards) for vote in votes) if len(item.responses) > 1 else None
        if len(stories.get(chances, "xx")) < 2:
            stories[chances].append(story(titles[chances], item, samples[i * total:(i + 1) * total], scores[i]))
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>How the votes were decided</title>\n'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            f"<style>{STYLE}</style></head><body><h1>How the votes were decided</h1>\n<p>Judge: {html.escape(name)}, {total} samples an item, of "
            f"{len(items)} items. The highest of a row or column is bold.</p>\n"
            f"{''.join(sum(stories.values(), [])) or '<p>No vote saved, failed to save or spoiled a first sample.</p>'}</body></html>\n")


def story(title: str, item: Preference, samples: list[Trajectory], scores: torch.Tensor) -> str:
    """One item's part of the page: query, responses y1, y2, ..., each sample's scores (samples, responses) with the sums so far, and its text."""
    def table(*rows):
        kinds = zip(["th"] + ["td"] * len(rows), rows)
        return "<table>" + "".join("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>\n" for tag, row in kinds) + "</table>\n"

    def bold(values):  # the highest of them
        return [f"<b>{value:g}</b>" if value == max(values) else f"{value:g}" for value in values]

    names, scores = [f"y{i + 1}" for i in range(len(item.responses))], scores[:, :len(item.responses)]
    turns = item.query if isinstance(item.query, list) else [{"role": "user", "content": item.query}]
    columns = map(bold, (item.rewards, vote_sum(scores).tolist(), vote_majority(scores).tolist()))
    rows = [["sample", *names, *(f"sum {name}" for name in names), "what it wrote"]]
    for j, t in enumerate(samples):
        read = bold(scores[j].tolist()) if t.scores else [html.escape(t.reason)] + [""] * (len(names) - 1)
        order = ", ".join(f"Response {place} is {names[i]}" for place, i in enumerate(t.order, 1))
        rows.append([j + 1, *read, *bold(vote_sum(scores[:j + 1]).tolist()),
                     f"<details><summary>{order}</summary>{html.escape(t.output)}</details>"])
    return (f"<section><h2>{title}</h2>\n" + "".join(f"<p><b>{turn['role']}:</b> {html.escape(turn['content'])}</p>\n" for turn in turns)
            + table(["", "response", "true reward", "sum", "choices"], *zip(names, map(html.escape, item.responses), *columns))
            + table(*rows) + "</section>\n")


# ------------------------------------------------------------------------------------------------------------------------------------------
# Below: what steps 1 and 2 brought, unchanged.
# ------------------------------------------------------------------------------------------------------------------------------------------

class DataError(ValueError):
    """A preference record or file that cannot be used; the message names the file, the line and what to do."""


@dataclass
class Preference:
    """A query, n >= 1 responses and their ground-truth rewards. Making one that is malformed raises DataError (without a file or line)."""
    query: str | list[dict]  # the user's only turn, or [{"role": "user" | "assistant" | "system", "content": str}, ...] up to their last
    responses: list[str]
    rewards: list[float]  # one per response; exactly one maximum when n >= 2
    subset: str = ""
    reference: str | None = None
    id: str = ""

    def __post_init__(self):
        turns = self.query if isinstance(self.query, list) else [{"role": "user", "content": self.query}]
        if not all(isinstance(turn, dict) and turn.keys() == {"role", "content"} and turn["role"] in ("user", "assistant", "system")
                   and isinstance(turn["content"], str) for turn in turns):
            raise DataError("the query is neither text nor a list of messages {role: user, assistant or system; content: text}")
        if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise DataError("the query is empty or does not end with the user's turn")
        self.query = turns[0]["content"] if len(turns) == 1 else turns
        if not isinstance(self.responses, list) or not self.responses or not all(isinstance(r, str) and r.strip() for r in self.responses):
            raise DataError("the responses are not a list of texts, at least one and none of them empty")
        # `type`, for True is an int to isinstance; the bound is false for NaN, infinities and integers beyond any float
        if not isinstance(self.rewards, list) or not all(type(r) in (int, float) and abs(r) <= sys.float_info.max for r in self.rewards):
            raise DataError("the rewards are not a list of finite numbers")
        if len(self.rewards) != len(self.responses):
            raise DataError(f"{len(self.responses)} responses but {len(self.rewards)} rewards")
        self.rewards = [float(reward) for reward in self.rewards]
        if self.rewards.count(max(self.rewards)) > 1:
            raise DataError("a tie: more than one response has the best reward")
        if not isinstance(self.subset, str) or not isinstance(self.id, str) or not isinstance(self.reference, str | None):
            raise DataError("subset, id or reference is not text")
        try:
            json.dumps(vars(self), ensure_ascii=False).encode()
        except UnicodeEncodeError:  # JSON can escape half a surrogate pair, which no UTF-8 file and no tokenizer takes
            raise DataError("a text holds half a character (a lone surrogate, such as \\ud800)") from None


# The prompt's parts in the order in which they appear. It is the only thing that a language model knows about being a judge.
TASK = ("Judge each response to the conversation. Write the specific criteria that matter here with their weights, analyse every response "
        "against them, then score it.")
TASK_WITHOUT_PRINCIPLES = "Judge each response to the conversation. Analyse every response, then score it."
SCALE = "Scores run from 1 (fails altogether) through 6 (meets some criteria) to 10 (meets all criteria). Be strict; analyse before you score."
SCALE_BINARY = "The score is 1 if the response is correct and 0 if it is not. Be strict; analyse before you score."
GENERAL_CRITERIA = "General criteria: following instructions, usefulness, detail, relevance."
MARKER = re.compile(r"\[(?=\s*(?:conversation|reference|response)[^\[\]]*(?:begins|ends)\s*\])", re.IGNORECASE)


def block(name: str, text: str) -> str:
    """`text` between its own begin and end markers. It is untrusted: a marker inside it loses its bracket, so it cannot close the block."""
    return f"[{name} begins]\n{MARKER.sub('(', text)}\n[{name} ends]\n"


def build_prompt(query: str | list[dict], responses: list[str], reference: str | None = None, hint: str | None = None, binary: bool = False,
                 principles: bool = True, form: bool = True) -> str:
    """The judge's prompt for a conversation and its responses, numbered from 1.

    Args:
        query: the user's turn, or a conversation of {"role", "content"} messages. responses: n >= 1 texts.
        reference: a reference answer to judge against (E.1.3). hint: a last line that gives the truth away, for hinted sampling (section 3.2).
        binary: scores 0 and 1 instead of 1..10, for single responses in training. principles: False leaves the criteria out (Table 4).
        form: False leaves out the form of the answer, which a base model would copy; its worked examples show it.
    """
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else query
    parts = [f"{TASK if principles else TASK_WITHOUT_PRINCIPLES}\n{SCALE_BINARY if binary else SCALE}\n{GENERAL_CRITERIA}\n",
             block("Conversation", "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns))]
    if reference is not None:
        parts.append(block("Reference answer", reference))
    parts += [block(f"Response {number}", response) for number, response in enumerate(responses, 1)]
    if form:
        parts.append("Answer in this form:\n" + "Specific Criteria: each criterion and its weight\n" * principles
                     + "Analysis: each response against each criterion\n"
                     + "Scores: \\boxed{" + ", ".join(f"s{number}" for number in range(1, len(responses) + 1)) + "}")
    return "\n".join(parts) + (f"\n({hint})" if hint else "")


@functools.cache
def control_tokens(tokenizer) -> list[str]:
    """The texts of a tokenizer's special tokens, such as "<end_of_turn>"."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and len(token.content) > 1]


def encode(tokenizer, prompt: str, shots: list[tuple[str, str]] = ()) -> list[int]:
    """Token ids of a prompt, up to where the judgement begins: in the tokenizer's chat template if it has one, else as plain text; BOS once.

    shots: worked (prompt, judgement) pairs that come first, for base models, which were never taught to follow instructions.
    Control tokens spelled out in the text ("<end_of_turn>") are broken up, so that no response can end the user's turn.
    """
    turns = [text for shot in shots for text in shot] + [prompt]
    for token in control_tokens(tokenizer):
        turns = [turn.replace(token, f"{token[0]} {token[1:]}") for turn in turns]
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(turns) + "\n\n")["input_ids"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    # enable_thinking: Qwen 3 would think before it judges, which nobody taught it to do briefly; other templates ignore the name
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written BOS


def end_token(tokenizer) -> int | None:
    """What ends a judgement: the chat template's own token if there is one (Gemma's "<end_of_turn>"), else EOS."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "judgement"}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("judgement")[2].lstrip()  # Llama 2 has a space before its end
    rest = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return rest[0] if rest else tokenizer.eos_token_id


@dataclass
class Judgement:
    """What one output says: its principles and critique, and one score per response, or None and the reason why they are unreadable."""
    principles: str
    critique: str
    scores: list[int] | None
    unreadable: str = ""


def read_judgement(text: str, n: int, binary: bool = False) -> Judgement:
    """Take an output apart (Eq. 7: extract). Scores are the last box, exactly n integers in 1..10 (0..1 if binary); never raises."""
    labels, start = {}, 0
    for label in ("Specific Criteria", "Analysis", "Scores"):  # each at the start of a line, perhaps as a heading or in bold
        if match := re.compile(rf"^[ \t#*_]*{label}[ *_]*:", re.IGNORECASE | re.MULTILINE).search(text, start):
            labels[label], start = match, match.end()

    def part(label):
        if label not in labels:
            return ""
        end = min((later.start() for later in labels.values() if later.start() > labels[label].start()), default=len(text))
        return text[labels[label].end():end].strip("*_# \n")

    principles, critique = part("Specific Criteria"), part("Analysis")
    low, high = (0, 1) if binary else (1, 10)
    boxes = re.findall(r"\\boxed\s*\{([^{}]*)(\}?)", text)
    if not boxes:
        return Judgement(principles, critique, None, "no \\boxed{...}")
    content, closed = boxes[-1]
    entries = [entry.strip("*_`$ \t\n") for entry in content.split(",")]
    if not closed:
        reason = "the last box is not closed"
    elif len(entries) != n:
        reason = f"{len(entries)} scores for {n} responses"
    elif not all(re.fullmatch("[0-9]{1,2}", entry) for entry in entries):
        reason = "a score is not a whole number"
    elif not all(low <= int(entry) <= high for entry in entries):
        reason = f"a score is outside {low}..{high}"
    else:
        return Judgement(principles, critique, [int(entry) for entry in entries])
    return Judgement(principles, critique, None, reason)


def is_correct(scores: list[float] | None, rewards: list[float]) -> bool:
    """Eq. 10: S_j > S_i for all i != j = argmax r; for a single response S_1 = r_1. Unreadable scores (None) are not correct."""
    if scores is None:
        return False
    if len(rewards) == 1:
        return scores[0] == rewards[0]
    best = rewards.index(max(rewards))
    return all(scores[best] > score for i, score in enumerate(scores) if i != best)


def chance_of_best(scores: list[float] | None, rewards: list[float]) -> float:
    """Chance that the argmax of scores, ties broken by a fair coin, is the best of n >= 2 responses; unreadable scores tie all."""
    scores = [0] * len(rewards) if scores is None else scores
    return float(scores[rewards.index(max(rewards))] == max(scores)) / scores.count(max(scores))


def beneath(model: str) -> str:
    """The model that an adapter in the folder `model` was trained on; `model` itself if there is none (or none that can be read)."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(Path(model, "adapter_config.json").read_text())["base_model_name_or_path"] + ""
    return model


def fingerprint(model: str, above: tuple[str, ...] = ()) -> list:
    """What tells a model's weights from others without reading them: the names, sizes and times of its files; a Hub name stands for itself."""
    path, base, files = Path(model), beneath(model), []
    with contextlib.suppress(OSError):  # loading will say what is wrong
        files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in (sorted(path.iterdir()) if path.is_dir() else [path])
                 if file.is_file()]
    return (files or [model]) + (fingerprint(base, (*above, model)) if base not in (model, *above) else [])


def append(path: Path, text: str) -> None:
    """Write `text` at the end of a file, on rank 0 alone. Raises DataError."""
    if RANK == 0:
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(text)


def put(path: Path, write) -> None:
    """Make a file or folder whole or not at all: `write` gets a path aside, which then takes the place of `path`. Rank 0 does; all wait."""
    if RANK == 0:
        aside = path.with_name(f"{path.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        with writing(path):
            write(aside)
            if aside.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            os.replace(aside, path)
    if RANKS > 1:
        torch.distributed.barrier()


def read_lines(path: str | Path, make: Callable, expected: str, ours: bool = False) -> list:
    """make(record) of every line of JSON Lines. ours: the file grows in a run, and a last line that was cut off in writing is passed over. Raises
    DataError that starts with "path:line:" and says what `make` does or, if it raises another error or the file is ours, what is `expected`."""
    made = []
    try:
        lines = Path(path).read_bytes().split(b"\n")  # as bytes: a U+2028 within a text ends no line
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines[:-1] if ours else lines, 1):
        try:
            made += [make(parse_json(line))] if line.strip() or ours else []
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # DataError is a ValueError
            raise DataError(f"{path}:{number}: {error if isinstance(error, DataError) and not ours else expected}") from None
    if not made and not ours:
        raise DataError(f"{path}: no records")
    return made


def parse_json(text: bytes) -> object:
    """Return the JSON value in UTF-8 `text`, with or without a byte order mark. Raises: DataError (without a file or line)."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of 5000 digits, brackets 5000 deep
        raise DataError(f"invalid JSON: {error}") from None


def roc_auc(scores: list[float | None], labels: list[bool]) -> list[float]:
    """Values, one per response, whose mean is the area under the ROC curve, the chance that a right response scores above a wrong one, and whose
    spread gives its standard error (DeLong et al. 1988; clustered, Obuchowski 1997). Ties and unreadable scores (None, nan) count half. nan without
    both kinds."""
    values, right = torch.tensor([math.nan if s is None else s for s in scores], dtype=torch.float64), torch.tensor(labels, dtype=torch.bool)
    shares, sizes = torch.zeros_like(values), torch.where(right, right.sum(), (~right).sum())
    for kind in (True, False):  # a right response's share of the wrong ones that score below it, a wrong one's of the right ones above it
        own, others = values[right == kind], values[right != kind]
        readable = others[~others.isnan()].sort().values
        below, up_to = (torch.searchsorted(readable, own, right=side) for side in (False, True))
        share = (below + up_to + len(others) - len(readable)).double() / 2 / len(others)
        shares[right == kind] = torch.where(own.isnan(), 0.5, share if kind else 1 - share)
    area = shares[right].mean() if not right.all() else math.nan
    return (area + (shares - area) * len(values) / sizes).tolist()


# `torchrun --nproc-per-node N` starts N processes, one per GPU, and tells each its rank; alone we are rank 0 of 1.
RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def join_ranks() -> None:
    """Connect to the other ranks, if there are any. All of them run the same script on shares of the same work; rank 0 alone prints and writes."""
    if RANKS > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(torch.distributed.destroy_process_group)
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")


# What an option may be, from and to, in whatever step has it: better an error at once than one after the sampling.
BOUNDS = {"attack": (0, 10**9), "easy": (0, 10**6), "show": (0, 10**9), "seed": (0, 10**15), "temperature": (0, 100), "lora_r": (0, 4096),
          "lr": (1e-12, 1000), "epochs": (1e-6, 10**6), "warmup": (0, 1), "beta": (0, 1000)} | dict.fromkeys((
              "limit", "eval_limit", "k", "n_fresh", "steps", "prompts", "epochs_per_rollout", "eval_every", "watch", "train_batch", "micro_tokens",
              "save_every", "max_new_tokens", "batch_size"), (1, 10**9))


def check_options(parser: argparse.ArgumentParser, args, *more: tuple[bool, str]) -> None:
    """End with one line if an option is out of its BOUNDS or, of the pairs in `more`, one is (true, what is wrong)."""
    for name, (low, high) in BOUNDS.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:  # false for nan, too
            parser.error(f"--{name.replace('_', '-')} must be from {low:g} to {high:g}")
    for wrong, message in more:
        if wrong:
            parser.error(message)


def longest_prompt(model, max_new_tokens: int) -> int:
    """How many tokens a prompt may have beside a judgement in the model's context. Raises ModelError if there is no room for any."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    if max_new_tokens >= context:
        raise ModelError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the model's context is {context} tokens")
    return context - max_new_tokens


@dataclass
class Sample:
    """A completion: its token ids (with the end token, if it came) and its text without special tokens."""
    ids: list[int]
    text: str


@torch.no_grad()
def sample(model, tokenizer, prompts: list[list[int]], n: int = 1, temperature: float = 1.0, max_new_tokens: int = 512,
           batch_size: int | None = None, seed: int = 0, stop: str | None = None, progress: bool = True) -> list[list[Sample]]:
    """Draw n completions of every prompt.

    Args:
        prompts: token ids, as from `encode`; equal prompts are prefilled once. temperature: 0 is greedy. max_new_tokens: at most so many.
        batch_size: rows decoded together (default: what free memory holds); halved when memory runs out, and what is done stays done.
        stop: cut a completion off before this text. seed: the same arguments draw the same samples (batch_size among them). progress: show a bar.
    Ranks deal the distinct prompts out among themselves, and each gets all samples.
    Returns n samples for each prompt, in the order of `prompts`. Raises ModelError if not even one row fits into memory.
    """
    model.eval()
    end = model.generation_config.eos_token_id
    stop_ids = sorted({*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id, end_token(tokenizer)} - {None})
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    generator = torch.Generator(model.device).manual_seed(seed + 10**9 * RANK)
    # Longest first: neighbours in a batch need little padding, and memory runs out at once or never.
    queue = [(tuple(prompt), slot) for slot, prompt in enumerate(prompt for prompt in prompts for _ in range(n))]
    queue.sort(key=lambda entry: (-len(entry[0]), entry))
    samples, tokens, start = [None] * len(queue), 0, time.time()
    dealt = {prompt: number % RANKS for number, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in queue))}
    queue = [entry for entry in queue if dealt[entry[0]] == RANK]
    bucket = 64 if model.device.type == "cuda" else 16  # columns by which a row's visible ones grow: a graph lasts longer, or nothing is seen in vain
    with tqdm(total=len(queue), desc="sampling", unit=" samples", disable=not progress or RANK > 0) as bar:
        while queue:
            batch = queue[:batch_size or rows_that_fit(model, len(queue[0][0]), max_new_tokens, n)]
            try:
                distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in batch))}
                decoder = Decoder(model, list(distinct), [distinct[prompt] for prompt, _ in batch], temperature, max_new_tokens, stop_ids, pad_id,
                                  generator)
                slots, count = [slot for _, slot in batch], 1
                while slots:
                    steps = min(16, max_new_tokens - count)
                    count += steps
                    decoder.visible = min(max_new_tokens, -(-(count - 1) // bucket) * bucket)
                    for _ in range(steps):
                        decoder.advance()
                    finished, outputs = decoder.finished[:, 0].tolist(), decoder.output[:, :count].tolist()  # the one look at the device
                    if stop:
                        finished = [over or stop in tokenizer.decode(ids) for over, ids in zip(finished, outputs)]
                    if count == max_new_tokens:
                        finished = [True] * len(slots)
                    if 4 * sum(finished) < len(slots):  # moving the rows costs a copy: not for a few
                        continue
                    for slot, ids, over in zip(slots, outputs, finished):
                        if over:
                            samples[slot] = finish(tokenizer, ids, stop_ids, stop)
                            tokens += len(samples[slot].ids)
                    bar.update(sum(finished))
                    bar.set_postfix_str(f"{tokens / (time.time() - start):,.0f} tokens/s")
                    alive = [row for row, over in enumerate(finished) if not over]
                    slots = [slots[row] for row in alive]
                    if slots:
                        decoder.keep(alive)
            except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is what the CPU's allocator raises
                if not re.search("out of memory|allocate memory", str(error)):  # an "illegal memory access" is another matter
                    raise
                if len(batch) == 1:
                    raise ModelError(f"not enough memory for one row of {len(batch[0][0]) + max_new_tokens} tokens: shorten --max-new-tokens, "
                                     "leave out items with so long a prompt, or load the model with --quantize nf4") from None
                batch_size = len(batch) // 2
                bar.write(f"out of memory with {len(batch)} rows; going on with {batch_size}")
            decoder = None  # its buffers are free before the next ones are made; an error caught on the way may hold them in a circle
            gc.collect()
            queue = [entry for entry in queue if samples[entry[1]] is None]
    if RANKS > 1:
        torch.distributed.all_gather_object(parts := [None] * RANKS, samples)
        samples = [next(filter(None, of_slot)) for of_slot in zip(*parts)]
    return [samples[i:i + n] for i in range(0, len(samples), n)]


def finish(tokenizer, ids: list[int], stop_ids: list[int], stop: str | None) -> Sample:
    """A row of output up to its end token; its text ends before `stop`, its ids with the one that completed it."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    if stop and stop in text:
        text = text[:text.index(stop)]
        while stop in tokenizer.decode(ids[:end - 1], skip_special_tokens=True):
            end -= 1
    return Sample(ids[:end], text)


class Decoder:
    """A batch in flight: the fixed buffers that a decode step reads and writes in place.

    Prompts are padded on the left, so every row writes its next token to the same column. The decoder passes itself to the model as the cache:
    in the prefill, attention layers leave their keys and values here by `update`; in a step, each adds one column, and `attend` looks at the
    prompt's and at the first `visible` ones of the row's own. Sliding-window layers keep all columns too and the mask hides the old ones: more
    memory than a rolling window, but nothing to move. In a step only the buffers change, so that it can be captured in a CUDA graph, one for each
    number of rows and `visible` (which is set from outside). What would differ from step to step is in tensors, the random numbers are drawn ahead.
    """

    def __init__(self, model, prompts: list[tuple[int, ...]], rows: list[int], temperature: float, max_new_tokens: int, stop_ids: list[int],
                 pad_id: int, generator: torch.Generator):
        """prompts: distinct, each prefilled once. rows: for each sample, the number of its prompt; equal ones are neighbours."""
        device = model.device
        self.model, self.pad_id, self.visible, self.column = model, pad_id, 0, None
        self.temperature = temperature if temperature > 1e-3 else 0.0  # a softmax of logits / 0.001 is all but greedy, and soon overflows
        # On CUDA: the shapes (rows, visible) for which the kernels are warm and for which `replay` is a graph; a failure is not tried again, and
        # layers in int8 need not be tried: they wait for the device, and a capture that breaks leaves its mark on the allocator.
        self.warm, self.captured, self.graphs = None, None, device.type == "cuda" and not (
            getattr(model, "no_graphs", False) or getattr(model, "is_loaded_in_8bit", False))
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None
        # DeepSeek's cache holds latents: its layers make all keys and values of them in every step, and `attend` cannot stand in
        self.latent = bool(getattr(model.config.get_text_config(), "kv_lora_rank", None))
        transformers.AttentionInterface.register("spct_decode", attend)
        # Prefill: each distinct prompt once, a few thousand tokens at a time.
        self.width = max(map(len, prompts))
        ids = torch.tensor([[pad_id] * (self.width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        padding = torch.tensor([[self.width - len(prompt)] for prompt in prompts], device=device)
        self.columns = torch.arange(self.width + max_new_tokens, device=device)
        logits, parts, columns = [], {}, self.columns[:self.width]
        for part in torch.arange(len(prompts), device=device).split(max(1, 8192 // self.width)):
            self.real, self.cache = self.columns >= padding[part], {}
            logits.append(self.forward(ids[part], (columns - padding[part]).clamp(min=0), columns))
            for layer in self.cache:
                parts.setdefault(layer, []).append(self.cache[layer])
        # A group is the rows of a prompt. If it has far more of them than others do, it makes several groups: their table has room for `size` each.
        size = -(-len(rows) // len(prompts))
        self.groups = [(prompt, (row - rows.index(prompt)) // size) for row, prompt in enumerate(rows)]
        prompt_of_group, rows = torch.tensor([prompt for prompt, _ in dict.fromkeys(self.groups)], device=device), torch.tensor(rows, device=device)
        self.prompt_cache = {}
        for layer in self.cache:
            self.prompt_cache[layer] = [torch.cat(part)[prompt_of_group] for part in zip(*parts.pop(layer))]
            self.cache[layer] = [prompt.new_zeros(len(rows), prompt.shape[1], max_new_tokens, prompt.shape[3]) for prompt in self.prompt_cache[layer]]
        self.seat()
        self.real, self.position = self.columns >= padding[rows], self.width - 1 - padding[rows]
        self.token = torch.zeros(len(rows), 1, dtype=torch.long, device=device)
        self.output = torch.full((len(rows), max_new_tokens), pad_id, device=device)
        self.finished = torch.zeros(len(rows), 1, dtype=torch.bool, device=device)
        self.random = torch.rand(len(rows), max_new_tokens, device=device, generator=generator)
        self.stop_ids, self.column = torch.tensor(stop_ids, device=device), torch.tensor([-1], device=device)
        self.draw(torch.cat(logits)[rows])

    def seat(self):
        """Write down who sits where: table (groups, size), the rows of a group and its first one again; slots (rows,), a row's place in it."""
        members = {}
        for row, group in enumerate(self.groups):
            members.setdefault(group, []).append(row)
        size = max(map(len, members.values()))
        self.table = torch.tensor([rows + rows[:1] * (size - len(rows)) for rows in members.values()], device=self.columns.device)
        self.slots = torch.tensor([number * size + i for number, rows in enumerate(members.values()) for i in range(len(rows))],
                                  device=self.columns.device)

    def update(self, key, value, layer, *_, **__):
        """Store a layer's new keys and values (rows, kv_heads, columns, head_dim); returns what its attention is called with."""
        if self.column is None:  # prefill
            self.cache[layer] = key, value
            return key, value
        for cache, new in zip(self.cache[layer], (key, value)):
            cache.index_copy_(2, self.column, new)
        if self.latent:
            groups = self.slots // self.table.shape[1]
            return [torch.cat([prompt[groups], own[:, :, :self.visible]], 2) for prompt, own in zip(self.prompt_cache[layer], self.cache[layer])]
        return self, layer

    def get_seq_length(self, *_):
        return 0  # transformers asks in order to make masks and positions, which we pass

    def forward(self, ids, position, columns):
        """Logits (rows, vocabulary) after the last of the tokens `ids` (rows, new), which stand at `columns` (new,)."""
        distance = columns[:, None] - self.columns[:self.width + self.visible]
        mask = attention_masks(self.model, self.real[:, None, :self.width + self.visible] & (distance >= 0), distance)
        return self.model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=self, use_cache=True,
                          logits_to_keep=1).logits[:, -1]

    def draw(self, logits):
        """Choose the next token of every row by its logits (rows, vocabulary). Nothing waits for the device."""
        self.column += 1
        self.position += 1
        if self.temperature > 0:  # the first token up to which the probabilities add up to more than a random number (drawn ahead, between 0 and 1)
            sums = torch.softmax(logits.float() / self.temperature, -1).cumsum(-1)
            token = torch.searchsorted(sums, self.random.index_select(1, self.column) * sums[:, -1:], right=True)
        else:
            token = logits.argmax(-1, keepdim=True)
        self.token.copy_(token.masked_fill(self.finished, self.pad_id))
        self.output.index_copy_(1, self.column, self.token)
        self.finished |= (self.token == self.stop_ids).any(-1, keepdim=True)

    def step(self):
        """Run the model on every row's last token, and draw the next."""
        config = self.model.config.get_text_config()
        usual = config._attn_implementation
        config._attn_implementation = usual if self.latent else "spct_decode"
        try:
            self.draw(self.forward(self.token, self.position, self.width + self.column))
        finally:
            config._attn_implementation = usual

    def advance(self):
        """Take a step; on CUDA by a graph, but for the first of a shape: it loads kernels and makes workspaces, which a capture may not."""
        shape = len(self.token), self.visible
        if self.graphs and shape == self.warm != self.captured:
            try:  # the last graph stays until there is a new one: it holds the pool
                self.replay, self.captured = capture(self.step, self.pool), shape
            except RuntimeError as error:
                why = error.__context__ or error  # ending a broken capture fails, too
                if isinstance(why, torch.OutOfMemoryError):
                    raise why
                self.graphs, self.model.no_graphs = False, True
                print(f"sampling goes on without CUDA graphs, more slowly: a step cannot be captured ({str(why).splitlines()[0]})")
        self.warm = shape
        self.replay() if self.graphs and shape == self.captured else self.step()

    def keep(self, rows: list[int]):
        """Drop all other rows."""
        groups, self.groups = list(dict.fromkeys(self.groups)), [self.groups[row] for row in rows]
        left = torch.tensor([groups.index(group) for group in dict.fromkeys(self.groups)], device=self.columns.device)
        rows = torch.tensor(rows, device=self.columns.device)
        for layer in self.cache:
            if len(left) < len(groups):
                self.prompt_cache[layer] = [cache[left] for cache in self.prompt_cache[layer]]
            for cache in self.cache[layer]:
                cache[:len(rows), :, :self.visible] = cache[rows, :, :self.visible]
            self.cache[layer] = [cache[:len(rows)] for cache in self.cache[layer]]
        for name in ("real", "position", "token", "output", "finished", "random"):
            setattr(self, name, getattr(self, name)[rows])
        self.seat()


def attention_masks(model, seen: torch.Tensor, distance: torch.Tensor):
    """What is added to attention's logits: 0 where a query sees a key, the lowest number elsewhere; for Gemma 2 and 3 also that of sliding layers.

    seen: (rows, queries, keys), true where a key may be looked at. distance: how many positions a query stands after a key, of a shape like it.
    """
    config, lowest = model.config.get_text_config(), torch.finfo(model.dtype).min
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device).masked_fill(~seen, lowest)
    sliding = mask.masked_fill(distance >= config.sliding_window, lowest) if getattr(config, "sliding_window", None) else mask
    if getattr(config, "layer_types", None) is None:  # all layers are alike: Llama's see everything, Mistral's slide
        return sliding[:, None]
    return {"full_attention": mask[:, None], "sliding_attention": sliding[:, None]}


def attend(module, query, decoder, layer, mask, scaling, softcap=None, s_aux=None, **_):
    """Attention of a decode step, where memory is what takes the time: the samples of a prompt look at one copy of its keys and values together,
    and what several heads share is not repeated for each.

    Args: query: (rows, heads, 1, head_dim). decoder, layer: what Decoder.update gave in the place of keys and values. mask: (rows, 1, 1, columns),
    the prompt's before the row's own. Returns (rows, 1, heads, head_dim), as transformers wants it. Raises ModelError for an unknown kind.
    """
    if s_aux is not None:
        raise ModelError("this model's attention has sinks, which the sampler does not know")
    (prompt_keys, prompt_values), size = decoder.prompt_cache[layer], decoder.table.shape[1]
    keys, values = (cache[:, :, :decoder.visible] for cache in decoder.cache[layer])

    def grouped(x):  # (rows, key heads, heads of each, ...) to (groups, key heads, size x heads of each, ...)
        return x[decoder.table].transpose(1, 2).flatten(2, 3)

    def ungrouped(x):
        return x.unflatten(2, (size, -1)).transpose(1, 2).flatten(0, 1)[decoder.slots]

    query = query[:, :, 0].unflatten(1, (keys.shape[1], -1))
    scores = torch.cat([ungrouped(grouped(query) @ prompt_keys.mT), query @ keys.mT], -1).float() * scaling
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores  # Gemma 2
    seen, own = torch.softmax(scores + mask, -1).to(query.dtype).split([prompt_keys.shape[2], keys.shape[2]], -1)
    return (ungrouped(grouped(seen) @ prompt_values) + own @ values).flatten(1, 2)[:, None], None


def capture(step, pool):
    """Record what `step` does to the GPU as a CUDA graph, without doing it; returns a function that does it.

    A step is hundreds of small kernels, and Python takes longer to launch them than the GPU to run them; a graph is launched at once. It works
    on the same addresses each time and takes nothing from the CPU. Raises RuntimeError if `step` waits for the device, as layers in int8 do.
    """
    graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # whatever other threads, such as NCCL's, do meanwhile
            step()
    finally:
        torch.cuda.set_stream(usual)  # a capture that fails leaves its own stream behind
    return graph.replay


class ModelError(RuntimeError):
    """A model that cannot be loaded or does not fit; the message says what to do."""


def telling(load):
    """Makes `load`, which returns a model and its tokenizer, raise nothing but ModelErrors of one line; and one for what transformers loads without
    a word though it cannot judge: an encoder, a classifier such as a meta RM, a model whose tokenizer did not arrive."""
    @functools.wraps(load)
    def loaded(name: str | Path, *rest, **options):
        try:
            model, tokenizer = load(name, *rest, **options)
        except Exception as error:  # a damaged file fails in more ways than one can list
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = reason if isinstance(error, ModelError) else f"cannot load the model {name}: {type(error).__name__}: {reason}"
            hint = "; safetensors alone are read, and all of them must be there, whole: if a download or copy was cut off, start it again"
            raise ModelError(reason + hint * ("safetensors" in reason.lower() or isinstance(error, SafetensorError))) from None
        kind = (getattr(model.config, "architectures", None) or [""])[0]
        if getattr(model.config, "is_decoder", True) is False and not kind.endswith("ForCausalLM") or "Classification" in kind:
            raise ModelError(f"{name} is no causal language model but an encoder or a classifier ({kind}), which cannot write; choose another")
        if "Scores" not in tokenizer.decode(tokenizer("Scores")["input_ids"]):
            raise ModelError(f"{name}: its tokenizer knows no words; if a download or copy was cut off (tokenizer.json), start it again")
        if tokenizer.vocab_size > model.get_input_embeddings().num_embeddings:
            raise ModelError(f"{name}: its tokenizer knows {tokenizer.vocab_size} tokens and the model "
                             f"{model.get_input_embeddings().num_embeddings}; take the tokenizer that belongs to the model")
        if odd := {*(getattr(model.config.get_text_config(), "layer_types", None) or ())} - {"full_attention", "sliding_attention"}:
            raise ModelError(f"{name} has layers of a kind that the sampler does not know ({min(odd)}); choose a model with ordinary attention")
        if end_token(tokenizer) is None:
            ends = model.generation_config.eos_token_id
            if ends is None:
                raise ModelError(f"{name}: neither its tokenizer nor generation_config.json names an end token (eos_token): no judgement would end")
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0] if isinstance(ends, list) else ends)
        ids = tokenizer("Scores")["input_ids"]
        with torch.no_grad():
            if not model(input_ids=torch.tensor([ids], device=model.device)).logits.isfinite().all():
                raise ModelError(f"{name} computes what is not a number; its weights are damaged, or too large for {model.dtype}")
        try:  # a prompt for each rank, so that all of them find out
            sample(model, tokenizer, [ids * (rank + 1) for rank in range(RANKS)], max_new_tokens=2, progress=False)
        except Exception as error:  # attention of its own does whatever it likes with what the sampler gives it
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise error if isinstance(error, ModelError) else ModelError(
                f"{name}: the sampler does not fit this kind of model ({kind}: {reason}); choose one with ordinary attention") from None
        return model, tokenizer
    return loaded


@telling
def load_model(name: str | Path, quantize: str = "none"):
    """Load a causal language model and its tokenizer; bfloat16 on CUDA, float32 on the CPU; safetensors only, no remote code.

    Args:
        name: a folder, a Hub name, a GGUF file (converted once, kept in ~/.cache/spct), or a folder with a LoRA adapter in PEFT's format.
        quantize: "nf4" (4 bits, double quantization: about 0.52 bytes a weight), "int8", or "none". Embeddings stay as they are.
    Raises ModelError with what to do: log in for a gated model, pick another quantization, install a package. Says what a large one takes.
    """
    name = str(name)
    if not Path(name).exists() and (not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or "/" in name and Path(name.split("/")[0]).exists()):
        raise ModelError(f"there is no model {name}: no such file or folder, and a name of the Hub is OWNER/MODEL")
    adapter = Path(name, "adapter_config.json")
    if adapter.exists():
        config = json.loads(adapter.read_text())
        base, special = config["base_model_name_or_path"], ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
        if any(config.get(option) for option in special) or not isinstance(config["target_modules"], list):
            raise ModelError(f"{name}: only plain LoRA with a list of target_modules can be read; merge the adapter into its base with peft")
        if os.path.abspath(base) == os.path.abspath(name):
            raise ModelError(f"{name}: its adapter_config.json names the adapter itself as its base model")
        try:
            model, tokenizer = load_model(base, quantize)
        except ModelError as error:
            raise ModelError(f"{error} (the base model of {name}, by its adapter_config.json)") from None
        add_lora(model, config["target_modules"], config["r"], config["lora_alpha"])
        from safetensors.torch import load_file
        weights = load_file(Path(name, "adapter_model.safetensors"))
        weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
        lacking, unknown = model.load_state_dict(weights, strict=False)
        lacking = [weight for weight in lacking if "lora_" in weight]
        if unknown or lacking:
            raise ModelError(f"{name}: the adapter does not fit its base model {base}, or is not whole: {(unknown or lacking)[0]}")
        return model, tokenizer
    cuda = torch.cuda.is_available()
    device, dtype = (f"cuda:{torch.cuda.current_device()}", torch.bfloat16) if cuda else ("cpu", torch.float32)
    config = {"none": None, "int8": BitsAndBytesConfig(load_in_8bit=True),
              "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every call of an int8 layer, and of a kernel that is not needed
    try:
        if name.endswith(".gguf"):
            name = convert_gguf(Path(name))
        check_memory(name, AutoConfig.from_pretrained(name, trust_remote_code=False), quantize, dtype, torch.device(device))
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, quantization_config=config[quantize], use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            device_map={"": device} if cuda or quantize != "none" else None)  # on a GPU: not by way of the machine's memory
        if loaded["missing_keys"]:  # transformers would go on with random ones
            raise ModelError(f"{name} lacks {len(loaded['missing_keys'])} weights, {min(loaded['missing_keys'])} among them: copy it again")
        model = model.to(device) if quantize == "none" else model
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        if "gated" in str(error).lower():
            raise ModelError(f"{name} is gated: accept its terms on its page of the Hub, then run `hf auth login`") from None
        raise ModelError(f"cannot load the model {name}: {first}") from None
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if isinstance(error, ModelError) or not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise ModelError(f"not enough memory on {device} for {name}: try --quantize nf4 (a quarter of bfloat16) or a smaller model") from None
    for module in model.modules():  # on some CPUs, sampling would repack 4-bit weights into a form that has no gradient
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer


class LoRA(torch.nn.Module):
    """A linear layer with a low-rank correction: y = base(x) + alpha / r * B(A(x)). base may be quantized; A is (r, in), B is (out, r)."""

    def __init__(self, base: torch.nn.Module, r: int, alpha: float):
        super().__init__()
        self.base, self.scaling = base, alpha / r
        self.lora_A = torch.nn.Linear(base.in_features, r, bias=False, device=base.weight.device, dtype=torch.float32)
        self.lora_B = torch.nn.Linear(r, base.out_features, bias=False, device=base.weight.device, dtype=torch.float32)
        torch.nn.init.zeros_(self.lora_B.weight)  # starts as the base alone

    def forward(self, x):
        return self.base(x) + (self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))) * self.scaling).to(x.dtype)


def add_lora(model, targets: list[str], r: int, alpha: float) -> None:
    """Wrap every linear layer whose name ends in one of `targets` ("q_proj", ...), but for those that see or hear, and freeze the rest."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.split(".")[-1] in targets and not re.search("vision|audio", name):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], LoRA(module, r, alpha))


def bytes_of_token(config, itemsize: int) -> int:
    """Bytes of a token's keys and values in all layers. Sliding-window layers keep every token, too, and Gemma 4's last ones have none of their own.
    DeepSeek's keep latents; to them are added the keys and values that one layer makes of them."""
    if getattr(config, "kv_lora_rank", None):
        latent, key = config.kv_lora_rank + config.qk_rope_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim
        made = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim + key)
        return ((config.num_hidden_layers + 1) * latent + made) * itemsize
    layers, numbers = getattr(config, "per_layer_config", [config] * config.num_hidden_layers), 0
    for layer in layers[:config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)]:
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        numbers += 2 * heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
    return numbers * itemsize


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU, with those that torch holds unused, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def rows_that_fit(model, prompt: int, new: int, n: int) -> int:
    """How many rows half of the free memory holds: keys and values of `new` tokens and of a prompt, which n rows share unless it is kept as latents,
    and a few copies of a row's logits."""
    config = model.config.get_text_config()
    columns = new + -(-prompt // (1 if getattr(config, "kv_lora_rank", None) else n))
    row = columns * bytes_of_token(config, model.dtype.itemsize) + 16 * config.vocab_size
    return max(1, min(1024 if model.device.type == "cuda" else 256, free_memory(model.device) // 2 // row))


def memory_plan(config, quantize: str = "none", dtype: torch.dtype = torch.bfloat16, rows: int = 1, columns: int = 2048,
                r: int = 16) -> dict[str, int]:
    """What a model of this configuration will take, in bytes by name; no weight is loaded or made.

    Args: rows, columns: of the cache, in tokens; r: rank of the adapters that are trained, on all linear layers; 0: all weights are.
    Returns weights; cache: keys and values; logits: what drawing a token holds; adapters, gradients, optimizer (Adam): of training, in float32.
    """
    with torch.device("meta"):  # tensors with a shape and no content
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()]
    inside, total = sum(layer.weight.numel() for layer in linears), sum(p.numel() for p in model.parameters())
    # nf4 scales each 64 weights by a byte, and each 256 of those bytes by a float; int8 has a float for each output
    packed = {"none": inside * dtype.itemsize, "int8": inside + 4 * sum(layer.out_features for layer in linears),
              "nf4": inside // 2 + inside // 64 + inside // 64 // 256 * 4}[quantize]
    adapters = r * sum(layer.in_features + layer.out_features for layer in linears)
    trained, config = 4 * (adapters or total), config.get_text_config()
    return {"weights": packed + (total - inside) * dtype.itemsize, "cache": rows * columns * bytes_of_token(config, dtype.itemsize),
            "logits": rows * 16 * config.vocab_size, "adapters": 4 * adapters, "gradients": trained, "optimizer": 2 * trained}


def check_memory(name: str, config, quantize: str, dtype: torch.dtype, device: torch.device) -> None:
    """Print the plan of a model of more than 2 GB. Raises ModelError, with the numbers and what to do, if its weights do not fit."""
    gc.collect()  # quantized layers refer to themselves: those of a model that was let go of are free only now
    if getattr(config, "quantization_config", None):  # already packed, in ways that we do not know
        return
    (plan, small), free = (memory_plan(config, kind, dtype) for kind in (quantize, "nf4")), free_memory(device)
    if plan["weights"] > free:
        advice = (f"--quantize nf4 would take {small['weights'] / 1e9:.3g} GB" if small["weights"] < free and quantize != "nf4" else
                  f"even --quantize nf4 takes {small['weights'] / 1e9:.3g} GB: choose a smaller model")
        raise ModelError(f"{name} does not fit: its weights ({quantize}) take {plan['weights'] / 1e9:.3g} GB and {free / 1e9:.3g} GB of memory are "
                         f"free on {device}; {advice}")
    if plan["weights"] > 2e9:
        training = plan["adapters"] + plan["gradients"] + plan["optimizer"]
        print(f"{name}: the weights ({quantize}) take {plan['weights'] / 1e9:.3g} GB of {free / 1e9:.3g} GB that are free on {device}; "
              f"2048 tokens of a sample {plan['cache'] / 1e9:.3g} GB, training adapters of rank 16 {training / 1e9:.3g} GB and its activations")


@contextlib.contextmanager
def writing(path: str | Path):
    """Within it, what the system refuses (no space, no permission, no folder) becomes a DataError that says where, and what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own for it
        reason = getattr(error, "strerror", None) or f"{str(error).splitlines()[0]} (is the disk full?)"
        raise DataError(f"cannot write {path}: {reason}; make room and go on (steps 2, 3 and 5: with --resume), or name another place") from None


def convert_gguf(path: Path) -> str:
    """Dequantize a GGUF file into a Hugging Face folder, once; returns the folder. The minute goes into parsing the vocabulary."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    try:
        import gguf  # noqa: F401  (transformers needs it and is less clear about it)
    except ImportError:
        raise ModelError("reading a GGUF file needs the package gguf: pip install gguf") from None
    folder = Path(os.environ.get("SPCT_CACHE", "~/.cache/spct")).expanduser() / f"{path.stem}-{path.stat().st_size}-{int(path.stat().st_mtime)}"
    if not folder.exists():
        print(f"converting {path.name}, once, into {folder}")
        aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")  # so that an interrupted conversion is never taken for a whole one
        # Newer versions of transformers can keep GGUF's own quantization and have to be told not to.
        plain = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
        try:
            parts = (AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16, **plain),
                     AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
        except Exception as error:  # a broken file fails in the parser in more ways than one can list
            raise ModelError(f"{path} cannot be read as a GGUF model: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
        for part in parts:
            part.save_pretrained(aside)
        with contextlib.suppress(OSError):  # another rank was first
            os.replace(aside, folder)
        if not folder.exists():
            raise ModelError(f"cannot write {folder}: make room, or set SPCT_CACHE to another folder")
        shutil.rmtree(aside, ignore_errors=True)
    return str(folder)


@dataclass
class Trajectory:
    """A sampled judgement: what was shown, what came out, and whether to train on it. A line of trajectories.jsonl."""
    item: int  # the item's number in the data
    query: str | list[dict]
    responses: list[str]  # in the order shown; so are rewards and scores
    rewards: list[float]
    order: list[int]  # responses[i] was the item's response order[i]
    hinted: bool
    binary: bool  # single responses are scored 0 or 1 in training
    reference: str | None = None
    output: str = ""
    scores: list[int] | None = None
    correct: bool = False
    kept: bool = False
    reason: str = ""

    def prompt(self, hinted: bool) -> str:
        """The judge's prompt; hinted: it ends with the truth. What is trained on never is, however it was sampled."""
        best = self.rewards.index(max(self.rewards)) + 1
        hint = f"The best response is number {best}." if len(self.rewards) > 1 else f"The right score is {self.rewards[0]:g}."
        return build_prompt(self.query, self.responses, self.reference, hint if hinted else None, self.binary)

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def show(item: Preference, number: int, seed: str | None, hinted: bool = False, binary: bool = False) -> Trajectory:
    """Item `number` with its responses in a random order, which the seed decides: position must say nothing. None: in their own order."""
    order = list(range(len(item.responses)))
    if seed is not None:
        random.Random(f"{seed} {number}").shuffle(order)
    return Trajectory(number, item.query, [item.responses[i] for i in order], [item.rewards[i] for i in order], order, hinted, binary, item.reference)


def judge(model, tokenizer, shown: list[Trajectory], temperature: float, args, seed: int) -> None:
    """Let the model judge what is shown: fills in output, scores, correct and, if it cannot be read, reason."""
    prompts = [encode(tokenizer, t.prompt(t.hinted)) for t in shown]
    longest = longest_prompt(model, args.max_new_tokens)
    fit = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
    for i, [drawn] in zip(fit, sample(model, tokenizer, [prompts[i] for i in fit], 1, temperature, args.max_new_tokens, args.batch_size, seed)):
        shown[i].output = drawn.text
    for t, prompt in zip(shown, prompts):
        judgement = read_judgement(t.output, len(t.responses), t.binary)
        t.scores, t.correct = judgement.scores, is_correct(judgement.scores, t.rewards)
        why = judgement.unreadable if len(prompt) <= longest else f"the prompt of {len(prompt)} tokens is too long"
        t.reason = f"unreadable: {why}" if t.scores is None else ""


def judge_and_keep(load: Callable, shown: list[Trajectory], temperature: float, args, seed: int, path: Path, chunk: int,
                   decide: Callable = lambda judged: None) -> list[Trajectory]:
    """Let the model that load() gives judge what is shown, `chunk` judgements at a time; the file `path` grows by these, each chunk as decide(chunk)
    leaves it, and what an earlier run left in it is taken over. Returns all judgements. Raises DataError if the file cannot be theirs."""
    done = read_trajectories(path) if path.exists() else []
    if len(done) > len(shown):
        raise DataError(f"{path}: {len(done)} judgements where {len(shown)} belong (two runs at once?); delete it, and they are sampled again")
    if path.exists():
        if len(done) < len(shown):
            del done[len(done) // chunk * chunk:]  # a chunk that was cut off in writing
            put(path, lambda aside: aside.write_text("".join(t.line() for t in done), encoding="utf-8"))
        print(f"{len(done)} of {len(shown)} judgements are taken over from {path}")
    for first in range(len(done), len(shown), chunk):
        part = shown[first:first + chunk]
        judge(*load(), part, temperature, args, seed + part[0].item)
        decide(part)
        append(path, "".join(t.line() for t in part))
        done += part
    return done


def load_lines(path: str | Path) -> list[Preference]:
    """Read preferences from JSON Lines of {"query", "responses", "rewards"} and optionally {"subset", "reference", "id"}, in the file's order. Raises
    DataError."""
    def preference(record):
        item = Preference(**{field.name: record[field.name] for field in fields(Preference) if field.name in record})
        if len(item.rewards) == 1 and item.rewards[0] not in (0, 1):
            raise DataError("the reward of a single response must be 1 (right) or 0 (wrong), as its score is")
        return item

    return read_lines(path, preference, "expected query, responses, rewards; convert it with: "
                      f"python 01_pointwise_grm.py --data {path} --export OUT.jsonl")


def read_trajectories(path: str | Path) -> list[Trajectory]:
    """Read a file of trajectories, but not a last line that was cut off in writing. Raises DataError."""
    expected = "not a sampled judgement; delete the file, and it will be sampled again"
    return read_lines(path, lambda record: Trajectory(**record), expected, ours=True)


def ballots(items: list[Preference], k: int, seed: str, binary: bool = False) -> list[Trajectory]:
    """k judgements to be made of every item, each with an order of its own. binary: single responses are to be scored 0 or 1."""
    return [show(item, number, f"{seed} {i}", binary=binary and len(item.responses) == 1) for number, item in enumerate(items) for i in range(k)]


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that has no é shows a question mark
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what is printed went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, ModelError) as error:
        sys.exit(f"error: {error}")
