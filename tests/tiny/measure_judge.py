"""How good is a judge of the embedded world? The figures of tests/tiny/README.md.

    python tests/tiny/measure_judge.py                       # 300 of the items with two responses in eval.jsonl, 32 samples each, 2 minutes
    python tests/tiny/measure_judge.py --model runs/02_rejective_ft/model --data tests/tiny/train.jsonl

Prints what one sample at temperature 1 is worth, what the sum of k is worth (each sample sees the responses in an order of its own), and what
the judgements contain, by read_judgements.py. Standard errors are clustered by item.
"""
from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from conftest import load_script  # noqa: E402

grm = load_script("01_pointwise_grm")
import read_judgements  # noqa: E402


def judge(model, tokenizer, items, k, temperature, seed=0):
    """k judgements of each item: a list (items) of lists (k) of (scores in the items' order or None, record for read_judgements)."""
    rng = random.Random(seed)
    orders = [[rng.sample(range(len(item.responses)), len(item.responses)) for _ in range(k)] for item in items]
    prompts = [grm.encode(tokenizer, grm.build_prompt(item.query, [item.responses[i] for i in order]))
               for item, of in zip(items, orders) for order in of]
    drawn = iter(grm.sample(model, tokenizer, prompts, 1, temperature, 320, seed=seed))
    result = []
    for item, of in zip(items, orders):
        judgements = []
        for order in of:
            [output] = next(drawn)
            scores = grm.read_judgement(output.text, len(order)).scores
            if scores:
                scores = [score for _, score in sorted(zip(order, scores))]
            judgements.append((scores, {"query": item.query, "responses": [item.responses[i] for i in order], "output": output.text}))
        result.append(judgements)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(HERE / "judge"))
    parser.add_argument("--data", default=str(HERE / "eval.jsonl"))
    parser.add_argument("--items", type=int, default=300, help="the first so many with two responses")
    parser.add_argument("--k", type=int, default=32, help="samples of each")
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    items = [item for item in grm.load_preferences(args.data) if len(item.responses) == 2][:args.items]
    model, tokenizer = grm.load_model(args.model)
    judged = judge(model, tokenizer, items, args.k, args.temperature)

    def show(name, values):  # values: a list per item
        mean, se = grm.mean_and_se([float(v) for of in values for v in of], [i for i, of in enumerate(values) for _ in of])
        print(f"  {name:<28}{100 * mean:6.1f} +- {100 * se:4.1f} %")

    print(f"{len(items)} items with two responses, {args.k} samples each at temperature {args.temperature:g}")
    truth = [item.rewards for item in items]
    show("readable", [[scores is not None for scores, _ in of] for of in judged])
    show("one sample, strict (Eq. 10)", [[grm.is_correct(scores, rewards) for scores, _ in of] for of, rewards in zip(judged, truth)])
    show("one sample, ties half", [[grm.chance_of_best(scores, rewards) for scores, _ in of] for of, rewards in zip(judged, truth)])
    show("one sample, tied", [[scores is not None and scores[0] == scores[1] for scores, _ in of] for of in judged])
    size = 2
    while size <= args.k:
        sums = []
        for of, rewards in zip(judged, truth):
            readable = [scores for scores, _ in of[:size] if scores]
            sums.append([grm.chance_of_best([sum(column) for column in zip(*readable)] if readable else None, rewards)])
        show(f"sum of {size}, ties half", sums)
        size *= 2
    for name, (share, error, _) in read_judgements.summary([record for of in judged for _, record in of]).items():
        print(f"  {name:<28}{100 * share:6.1f} +- {100 * error:4.1f} %")


if __name__ == "__main__":
    main()
