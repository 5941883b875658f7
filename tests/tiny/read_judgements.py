"""What is in a judge's judgements? In the embedded world the truth of every verdict can be computed, so we can look.

    python tests/tiny/read_judgements.py runs/01_pointwise_grm/judgements.jsonl [another.jsonl ...]

For each file (any step's JSON Lines with "query", "responses" and "output"): the share of verdicts that are true, the share of named
criteria that the request asks for, the share of a request's criteria that the judgement names (all, by importance, what is to be avoided and the
others), the share of named criteria whose weight is right, and the share of judgements whose scores follow from their own verdicts and weights.
Two files side by side show what training changed.
"""
from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from world import MODALS, Criterion, criteria_of, items_of, score_of

# Plain and short: a superscript two is a letter to \w and a digit to isdigit, but not to int; nor are 5000 digits.
CRITERION = r"(mention|avoid|begin with|end with|have at least) ([A-Za-z0-9]{1,20})(?: items)?"


def read(record: dict) -> dict[str, list[float]]:
    """What one judgement contributes to each figure, as 0s and 1s. Nothing of what cannot be read; never raises on odd text."""
    found = {"true verdicts": [], "asked for": [], "criteria named": [], "must named": [], "should named": [], "could named": [],
             "avoid named": [], "others named": [], "right weights": [], "consistent scores": []}
    principles, _, rest = record["output"].partition("Analysis:")
    analysis, _, scores = rest.partition("Scores:")
    criteria = {c.text: c for c in criteria_of(record["query"])}
    weights = {}
    for kind, argument, weight in re.findall(CRITERION + r" \(weight ([0-9])\)", principles):
        weights[Criterion(kind, argument, 0).text] = int(weight)
    found["asked for"] = [float(text in criteria) for text in weights]
    modal = {importance: word for word, importance in MODALS.items()}
    for text, criterion in criteria.items():
        found["criteria named"].append(float(text in weights))
        found[f"{modal[criterion.importance]} named"].append(float(text in weights))
        found["avoid named" if criterion.kind == "avoid" else "others named"].append(float(text in weights))
        if text in weights:
            found["right weights"].append(float(weights[text] == criterion.importance))
    follow = []
    for number, response in enumerate(record["responses"], 1):
        part = re.search(rf"Response {number} lists (.*?)(?=Response [0-9]+ lists|$)", analysis, re.DOTALL)
        verdicts = {}
        for kind, argument, verdict in re.findall(CRITERION + r" (yes|no)\b", part.group(1) if part else ""):
            criterion = Criterion(kind, argument, 0)
            verdicts[criterion.text] = verdict == "yes"
            found["true verdicts"].append(float(criterion.holds(items_of(response)) == (verdict == "yes")))
        total = [weights[text] for text in verdicts if text in weights]
        follow.append(score_of([v for text, v in verdicts.items() if text in weights], total, record.get("binary", False)) if sum(total) else None)
    boxes = re.findall(r"\\boxed\{([0-9, ]{1,100})\}", scores)
    if boxes:  # the last, as in read_judgement
        found["consistent scores"].append(float([int(score) for score in boxes[-1].replace(",", " ").split()] == follow))
    return found


def summary(records: list[dict]) -> dict[str, tuple[float, float, int]]:
    """(share, standard error clustered by query, count) of every figure: a ratio, whose error allows for several verdicts a judgement, and for
    several judgements of a query."""
    readings = {}
    for record in records:
        of_query = readings.setdefault(json.dumps(record["query"]), {})
        for name, values in read(record).items():
            of_query.setdefault(name, []).extend(values)
    result = {}
    for name in next(iter(readings.values()), []):
        parts = [(sum(reading[name]), len(reading[name])) for reading in readings.values() if reading[name]]
        count = sum(size for _, size in parts)
        if count:
            share = sum(total for total, _ in parts) / count
            correction = len(parts) / (len(parts) - 1) if len(parts) > 1 else math.nan  # one query says nothing of the spread
            error = math.sqrt(correction * sum((total - share * size) ** 2 for total, size in parts)) / count
            result[name] = (share, error, count)
    return result


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        try:
            records = [json.loads(line) for line in Path(path).read_bytes().split(b"\n") if line.strip()]
            figures = summary(records)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            sys.exit(f"error: {path}: not a file of judgements with query, responses and output: {error}")
        print(f"{path}: {len(records)} judgements")
        for name, (share, error, count) in figures.items():
            print(f"  {name:<20}{100 * share:6.1f} +- {100 * error:4.1f} %  of {count}")


if __name__ == "__main__":
    main()
