"""Teaches a base model to judge in small steps, from right judgements that a program writes.

    python tests/tools/cold_start.py --model gemma-270m --data refuse.jsonl --out runs/start

A small base model writes judgements of the right form, but their scores hardly depend on the
responses, and selecting from them taught ours nothing (tests/RESULTS.md). The written ones go in
steps of which each is local: quote the first words of a response; say whether it does harm, as its
reward says; give a number; copy both numbers. Each pair with two responses is judged in both
orders. The data should be about harm. Steps 2 to 5 go on from RUN/model. (The embedded judge began
so, too: tests/tiny/make.py.)
"""

import argparse
import math
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import load_script  # noqa: E402

rft = load_script("02_rejective_ft")
WORDS = 5  # of a quote


def write_judgement(one, rng: random.Random) -> str:
    """A right judgement of two responses with different rewards; rng draws the scores."""
    said, scores = [], []
    for i, (text, reward) in enumerate(zip(one.responses, one.rewards), 1):
        good = reward == max(one.rewards)
        scores.append(rng.randint(8, 10) if good else rng.randint(1, 3))
        quote = " ".join(text.replace('"', "'").split()[:WORDS])
        label = "does no harm" if good else "does harm"
        said.append(f'Response {i} says "{quote}": {label}, {scores[-1]} of 10.')
    box = ", ".join(map(str, scores))
    criteria = "Specific Criteria: does no harm (weight 3); helps the user (weight 2)."
    return f"{criteria}\nAnalysis: {' '.join(said)}\nScores: \\boxed{{{box}}}"


def written(items: list, seed: int) -> list:
    """Judgements with right outputs, of each item with two responses in both orders."""
    rng, done = random.Random(seed), []
    for number, item in enumerate(items):
        for order in ([0, 1], [1, 0]) if len(item.responses) == 2 else []:
            done.append(rft.show(item, number, order))
            done[-1].output = write_judgement(done[-1], rng)
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    option = parser.add_argument
    option("--model", required=True, help="folder or Hub name of a base model")
    option("--quantize", choices=rft.BITS, default="none", help="weights in 8 or 4 bits")
    option("--dtype", choices=rft.DTYPES, default="auto", help="number format of the weights")
    option("--data", required=True, help="preferences to learn from")
    option("--limit", type=int, default=800, help="use the first N items")
    option("--lora-r", type=int, default=16, help="rank of adapters; 0 trains all weights")
    option("--lr", type=float, default=5e-4, help="peak learning rate")
    option("--epochs", type=float, default=2.0, help="passes over the judgements")
    option("--seed", type=int, default=0, help="random seed")
    option("--resume", action="store_true", help="go on with the run in --out")
    option("--out", default="runs/start", help="folder of the run")
    args = parser.parse_args()
    args.instruct_data = None

    judgements = written(rft.read_lines(args.data)[: args.limit], args.seed)
    rft.require(judgements, f"{args.data}: no item with two responses")
    model, tokenizer = rft.load_model(args.model, args.quantize, args.dtype)
    run = rft.Run(args)
    examples = rft.make_examples(model, tokenizer, judgements, args)
    rft.set_trainable(model, args)
    rft.check_loss(model, examples[:2])
    gradients = partial(rft.descend, model, examples, rft.completion_losses, 32, args.seed)
    steps = math.ceil(args.epochs * len(examples) / 32)
    rft.train(model, tokenizer, steps, gradients, args, run)
    run.finish({"judgements": len(examples), "steps": steps})


if __name__ == "__main__":
    rft.start(main)
