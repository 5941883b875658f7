"""How good is a judge of the embedded world? The figures of tests/tiny/README.md.

    python tests/tiny/measure_judge.py                 # 300 pairs of eval.jsonl, 32 samples each
    python tests/tiny/measure_judge.py --model runs/02_rejective_ft/model --data train.jsonl

Prints what the vote of k samples at temperature 1 is worth (each sample sees the responses in an
order of its own), as step 4 does, and what the judgements contain, by read_judgements.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import read_judgements  # noqa: E402
from conftest import load_script  # noqa: E402

step = load_script("04_voting")


def judge(model, tokenizer, items, args) -> list:
    """args.k judgements of each item, each with the responses in an order of its own."""
    asked = step.ballots(items, args.k, "measure")
    prompts = [step.encode(tokenizer, one) for one in asked]
    drawn = step.sample(model, tokenizer, prompts, args.temperature, args)
    return [step.read_into(one, ids, tokenizer, args) for one, ids in zip(asked, drawn)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--model", default=str(HERE / "judge"))
    option("--data", default=str(HERE / "eval.jsonl"))
    option("--items", type=int, default=300, help="the first so many with two responses")
    option("--k", type=int, default=32, help="samples of each")
    option("--temperature", type=float, default=1.0)
    option("--max-new-tokens", type=int, default=320)
    args = parser.parse_args()
    items = [item for item in step.read_lines(args.data) if len(item.responses) == 2]
    items = items[: args.items]
    judged = judge(*step.load_model(args.model), items, args)
    title = f"{len(items)} items with two responses, {args.k} samples each, by k"
    step.print_table(title, step.scaling(judged, args.k), items)
    unreadable = sum(one.scores is None for one in judged) / len(judged)
    print(f"unreadable: {unreadable:.1%}\n\nin the judgements:")
    figures = read_judgements.summary([asdict(one) for one in judged])
    for name, (share, error, _) in figures.items():
        print(f"  {name:<20}{100 * share:6.1f} +- {100 * error:4.1f} %")


if __name__ == "__main__":
    step.start(main)
