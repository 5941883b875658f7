"""What does a meta reward see? For each fault of a judgement: what it costs in meta reward.

    python tests/tiny/sees.py runs/04_voting/samples_1.jsonl runs/05_metarm/rewards.jsonl

Guided voting compares samples of one item, and so does this: the mean meta reward of the samples
without a fault minus that of the samples with it, over all places (an item, a criterion, a
response) where samples differ, in standard deviations; errors are clustered by query.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pstdev
from types import SimpleNamespace

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[:2]]
from conftest import load_script  # noqa: E402
from read_judgements import follow, near_miss, parse  # noqa: E402
from world import criteria_of, items_of  # noqa: E402


def virtues(one: dict):
    """Yield (what, where, whether it is so) of a sample: the opposites of its faults."""
    weights, verdicts, scores = parse(one["output"], len(one["responses"]))
    asked = {criterion.text: criterion for criterion in criteria_of(one["query"])}
    for text, criterion in asked.items():
        what = (
            "what to avoid is named" if criterion.kind == "avoid" else "another criterion is named"
        )
        yield what, text, text in weights
        if text in weights:
            yield "its weight is right", text, weights[text] == criterion.importance
    yield "nothing is named that was not asked for", "", weights.keys() <= asked.keys()
    for number, of_response in zip(one["order"], verdicts):  # by the response's number in the item
        items = items_of(one["responses"][one["order"].index(number)])
        for criterion, yes in of_response:
            what = "near misses" if near_miss(criterion, items) else "other verdicts"
            yield (
                f"{what} are read rightly",
                (number, criterion.text),
                criterion.holds(items) == yes,
            )
    yield "scores follow", "", scores == follow(weights, verdicts, one["binary"])
    yield "one response is above all others", "", scores.count(max(scores)) == 1
    yield "scores are correct (Eq. 10)", "", one["correct"]


def what_it_sees(samples: list[dict], rewards: list[float]) -> dict[str, tuple[float, dict]]:
    """By virtue: the share of samples that lack it; the gain in meta reward, its error, and n."""
    places = defaultdict(lambda: ([], []))  # meta rewards of those without and with the virtue
    spread = pstdev(reward for reward in rewards if math.isfinite(reward))
    for one, reward in zip(samples, rewards, strict=True):
        if math.isfinite(reward):
            for what, where, so in virtues(one):
                places[what, one["query"], where][so].append(reward / spread)
    mean_and_se, table = load_script("01_pointwise_grm").mean_and_se, {}
    for what in dict.fromkeys(key[0] for key in places):
        of = {key: both for key, both in places.items() if key[0] == what}
        lacking = sum(len(a) for a, _ in of.values()) / sum(len(a + b) for a, b in of.values())
        gains = {key: fmean(b) - fmean(a) for key, (a, b) in of.items() if a and b}
        queries = [SimpleNamespace(query=key[1]) for key in gains]
        table[what] = (lacking, mean_and_se([*gains.values()], queries))
    return table


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    samples, rewards = ([*map(json.loads, open(path))] for path in sys.argv[1:])
    samples = [one for one in samples if len(one["responses"]) > 1]
    rewards = [one["reward"] for one in rewards]
    print(f"{'':<42}{'not so':>7}{'gain in meta reward':>22}{'places':>8}")
    for what, (lacking, row) in what_it_sees(samples, rewards).items():
        print(f"{what:<42}{lacking:7.1%}{row['mean']:+13.2f} +- {row['se']:.2f} sd{row['n']:8}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
