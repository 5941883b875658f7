"""What is in a judge's judgements? In the embedded world the truth of every verdict is known.

    python tests/tiny/read_judgements.py runs/01_pointwise_grm/judgements.jsonl [another.jsonl ...]

Reads any step's JSON Lines with "query", "responses" and "output". For each file it prints shares:
- true verdicts, and near misses that are read wrongly: "begin with" or "end with" an item that is
  in the list, but not at this place
- named criteria that the request asks for, and criteria of the request that the judgement names:
  all, by importance, what must be avoided and the others
- named criteria that have the right weight
- judgements whose scores follow from their own verdicts and weights
Two files side by side show what training changed. More is better, but for near misses misread.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from world import MODALS, Criterion, criteria_of, items_of, score_of

# Short and of ASCII digits: to \w and isdigit, not to int, a superscript two is a digit.
CRITERION = r"(mention|avoid|begin with|end with|have at least) ([A-Za-z0-9]{1,20})(?: items)?"
WEIGHT = re.compile(CRITERION + r" \(weight ([0-9])\)")
VERDICT = re.compile(CRITERION + r" (yes|no)\b")
BOX = re.compile(r"\\boxed\{([0-9, ]{1,100})\}")
FIGURES = (
    "true verdicts, near misses misread, asked for, criteria named, must named, should named, "
    "could named, avoid named, others named, right weights, consistent scores"
).split(", ")


def parse(output: str, n: int) -> tuple[dict[str, int], list[list[tuple[Criterion, bool]]], list]:
    """What a judgement of n responses says: the weight of each criterion that it names, by text;
    for each response its verdicts (criterion, whether "yes"); the scores, empty if there are
    none."""
    principles, _, analysis = output.partition("Analysis:")
    weights = {}
    for kind, argument, weight in WEIGHT.findall(principles):
        weights[Criterion(kind, argument, 0).text] = int(weight)
    verdicts = []
    for number in range(1, n + 1):
        end = r"(?=Response [0-9]+ lists|Scores:|$)"
        part = re.search(rf"Response {number} lists (.*?){end}", analysis, re.DOTALL)
        said = VERDICT.findall(part[1] if part else "")
        verdicts.append([(Criterion(kind, word, 0), yes == "yes") for kind, word, yes in said])
    box = BOX.search(output.rpartition("Scores:")[2])
    return (
        weights,
        verdicts,
        [int(score) for score in box[1].replace(",", " ").split()] if box else [],
    )


def follow(weights: dict[str, int], verdicts: list, binary: bool) -> list[int | None]:
    """The scores that follow from a judgement's verdicts and weights; None: nothing follows."""
    scores = []
    for of_response in verdicts:
        met = [yes for criterion, yes in of_response if criterion.text in weights]
        total = [
            weights[criterion.text] for criterion, _ in of_response if criterion.text in weights
        ]
        scores.append(score_of(met, total, binary) if sum(total) else None)
    return scores


def near_miss(criterion: Criterion, items: list[str]) -> bool:
    """Whether an item that should begin or end the list is in it, but at another place."""
    place = criterion.kind in ("begin with", "end with")
    return place and criterion.argument in items and not criterion.holds(items)


def read(record: dict) -> dict[str, list[float]]:
    """What one judgement contributes to each figure, as 0s and 1s. Nothing of what cannot be read;
    never raises on odd text."""
    weights, verdicts, scores = parse(record["output"], len(record["responses"]))
    asked = {criterion.text: criterion for criterion in criteria_of(record["query"])}
    modal = {importance: word for word, importance in MODALS.items()}
    found = {name: [] for name in FIGURES}
    found["asked for"] = [float(text in asked) for text in weights]
    for text, criterion in asked.items():
        kind = "avoid" if criterion.kind == "avoid" else "others"
        for name in ("criteria", modal[criterion.importance], kind):
            found[f"{name} named"].append(float(text in weights))
        if text in weights:
            found["right weights"].append(float(weights[text] == criterion.importance))
    for response, of_response in zip(record["responses"], verdicts):
        items = items_of(response)
        for criterion, yes in of_response:
            right = criterion.holds(items) == yes
            found["true verdicts"].append(float(right))
            if near_miss(criterion, items):
                found["near misses misread"].append(float(not right))
    if scores:
        expected = follow(weights, verdicts, record.get("binary", False))
        found["consistent scores"].append(float(scores == expected))
    return found


def summary(records: list[dict]) -> dict[str, tuple[float, float, int]]:
    """(share, standard error, count) of every figure. A judgement has several verdicts and a query
    several judgements, so a share is a ratio, and its error is clustered by query."""
    readings = {}
    for record in records:
        of_query = readings.setdefault(json.dumps(record["query"]), {})
        for name, values in read(record).items():
            of_query.setdefault(name, []).extend(values)
    result = {}
    for name in FIGURES:
        parts = [of_query[name] for of_query in readings.values() if of_query[name]]
        count = sum(map(len, parts))
        if count:
            share = sum(map(sum, parts)) / count
            squares = sum((sum(part) - share * len(part)) ** 2 for part in parts)
            # one query says nothing about the spread
            clusters = len(parts) / (len(parts) - 1) if len(parts) > 1 else math.nan
            result[name] = (share, math.sqrt(clusters * squares) / count, count)
    return result


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for path in sys.argv[1:]:
        try:
            lines = Path(path).read_bytes().split(b"\n")
            records = [json.loads(line) for line in lines if line.strip()]
            figures = summary(records)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            sys.exit(f"error: {path}: no judgements with query, responses and output: {error}")
        print(f"{path}: {len(records)} judgements")
        for name, (share, error, count) in figures.items():
            print(f"  {name:<20}{100 * share:6.1f} +- {100 * error:4.1f} %  of {count}")
    print(f"what the figures mean: the first lines of {Path(__file__).name}")


if __name__ == "__main__":
    main()
