"""Writes public preference data as the JSON Lines that all steps read.

    python tests/tools/export.py allenai/reward-bench:filtered eval.jsonl
    python tests/tools/export.py openbmb/UltraFeedback train.jsonl --skip-bad --limit 5000
    python tests/tools/export.py pairs.csv ours.jsonl

SOURCE is a file (JSON Lines, JSON, CSV, TSV, Parquet, Arrow) or owner/name[/config][:split] on the
Hub; without a split it is "train". The columns of a record tell its layout. A record that fits none,
or whose verdict is a tie, is refused with its number. --skip-bad leaves such records out.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import load_script  # noqa: E402

grm = load_script("01_pointwise_grm")
COLUMNS = "query", "responses", "rewards", "subset", "reference"  # of our own lines
Judgement, UserError, require = grm.Judgement, grm.UserError, grm.require

# Columns of the first and the second response; the column of the verdict, if there is one; what it
# says (a pattern) if the first is better, if the second is better.
PAIRS = [
    ("chosen", "rejected", None, "", "-"),  # RewardBench 1 and 2, Skywork, HH, RM-Bench, TRL, ...
    ("chosen", "reject", None, "", "-"),  # RMB, pairs
    ("bon_best", "loser_list", None, "", "-"),  # RMB, best of n
    ("chosen_messages", "rejected_messages", None, "", "-"),
    ("conversation_a", "conversation_b", "winner", "model_a", "model_b"),  # Arena
    ("human_ref_a", "human_ref_b", "labels", "1", "0"),  # SHP
    ("response_a", "response_b", "label", "A>B", "B>A"),  # JudgeBench
    ("response_1", "response_2", "preference_strength", "-[123]", "[123]"),  # HelpSteer2
    ("response1", "response2", "overall_preference", "-[123]", "[123]"),  # HelpSteer3
    ("response_1", "response_2", "winner", "model_a", "model_b"),  # PPE preference
    ("output_1", "output_2", "label", "1", "2"),  # LLMBar, OffsetBias
    ("output_1", "output_2", "preference", "1(\\.0)?", "2(\\.0)?"),  # AlpacaFarm
    ("response 1", "response 2", "label", "0", "1"),  # Auto-J
    ("response_0", "response_1", "better_response_id", "0", "1"),  # PKU-SafeRLHF
]
SINGLES = [  # one response; what the verdict says if it is right, if it is wrong
    ("llm_response", "label", "no_error", "error"),  # ReaLMistake
    ("completion", "label", "True", "False"),  # KTO
]
QUERY = "system system_prompt query history prompt conversation_input conversations context passage"
QUERY = (QUERY + " document instruction question input post").split()
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant"}
ROLES |= {"developer": "system"}
HH = re.compile(r"(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.S | re.I)
MARK = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")  # HelpSteer2, between turns


class OtherLabels(UserError):
    """A label that this layout does not have: the others may mean something else, too."""


def read_records(source: str) -> tuple[list[dict], str]:
    """The records of a file or of a data set on the Hub, and which split they are. Raises
    UserError."""
    try:
        from datasets import load_dataset  # takes seconds

        path, (name, split, _) = Path(source).resolve(), f"{source}:train:".split(":", 2)
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(40)
            pointer = start.startswith(b"version https://git-lfs")
            require(not pointer, "only a pointer: git lfs pull")
            require(start[:2] not in (b"\xff\xfe", b"\xfe\xff"), "UTF-16: save it as UTF-8")
            loaded = load_dataset(str(path.parent), data_files=path.name, split="train")
            return list(loaded), "train"
        if path.suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"):
            raise FileNotFoundError("there is no such file")
        owner, *config = name.split("/")
        where = ["/".join([owner, *config[:1]]), *config[1:]]
        return list(load_dataset(*where, split=split)), split
    except Exception as error:  # a network and strangers' files fail in many ways
        raise UserError(f"{source}: cannot be read: {error.__cause__ or error}") from None


def import_preferences(source: str, skip_bad: bool = False) -> list[Judgement]:
    """The preferences of a source. Prints how many records are left out. Raises UserError."""
    try:
        return grm.read_lines(source)  # our own
    except (OSError, UserError):
        (records, split), items, problems = read_records(source), [], []
    for number, record in enumerate(join_ratings(records), 1):
        try:
            items += to_preferences(record)
        except OtherLabels as error:  # also with skip_bad
            raise UserError(f"{source}:{number}: {error}") from None
        except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{source}:{number}: {error}")
    require(items and (skip_bad or not problems), "".join(problems[:1]) or f"{source} is empty")
    print(f"{source}: split {split}, {len(problems)} records left out", *problems[:1])
    return items


def join_ratings(records: list[dict]) -> list[dict]:
    """HelpSteer2 rates each response in a record of its own: neighbours with one prompt are one."""
    joined, last = [], None
    for record in records:
        if not record.keys() >= {"prompt", "response", "helpfulness"}:
            joined.append(record)
        elif last and last["prompt"] == record["prompt"]:
            last["responses"].append(record["response"])
            last["rewards"].append(record["helpfulness"])
        else:
            last = {"prompt": record["prompt"], "responses": [record["response"]]}
            last["rewards"] = [record["helpfulness"]]
            joined.append(last)
    return joined


def listed(record: dict) -> tuple[list, list[float]]:
    """The responses and rewards of layouts that list them, ([], []) if the record does not."""
    if "answers" in record:  # Nectar: rank 1 is the best
        return record["answers"], [-one["rank"] for one in record["answers"]]
    if "summaries" in record:  # TL;DR
        texts = [one["text"] for one in record["summaries"]]
        return texts, [float(i == record["choice"]) for i in range(len(texts))]
    if "answer_0" in record:  # WebGPT
        return [record["answer_0"], record["answer_1"]], [record["score_0"], record["score_1"]]
    if "winner_model_a" in record:  # LMSYS on Kaggle: the turns are lists in JSON
        turns = [json.loads(record[name]) for name in ("prompt", "response_a", "response_b")]
        talks = []
        for answers in turns[1:]:
            pairs = [[said("user", q), said("assistant", a)] for q, a in zip(turns[0], answers)]
            talks.append(sum(pairs, []))
        record["prompt"] = []
        return talks, [record["winner_model_a"], record["winner_model_b"]]
    answers = record.get("responses", record.get("completions", []))  # UltraFeedback
    rewards = record.get("rewards", record.get("scores"))
    if rewards is None:
        rewards = [answer["overall_score"] for answer in answers]
    if rewards and not answers:  # PPE correctness
        answers = [record[f"response_{i + 1}"] for i in range(len(rewards))]
    return answers, [float(reward) for reward in rewards]


def conversations(record: dict) -> tuple[list[list[dict]], list[float]]:
    """The turns that each response of a record brings, the last of them the response; rewards."""
    answers, rewards = listed(record)
    talks = [to_turns(answer, "assistant") for answer in answers]
    for first, second, verdict, *patterns in PAIRS:
        value, here = str(record.get(verdict, "")), record.keys() >= {first, second}
        fits = here and re.fullmatch("|".join(patterns), value)
        if here and not fits and value in ("0", "1", "2") and max(map(len, patterns)) == 1:
            raise OtherLabels(f"{verdict} {value}: {first} and {second} should have {patterns}")
        for name, pattern in zip((first, second), patterns) if fits and not talks else ():
            turns = to_turns(record[name], "assistant")
            alone = {turn["role"] for turn in turns} == {"assistant"}  # not a conversation
            talks += [[turn] for turn in turns] if alone else [turns]
            rewards += [float(bool(re.fullmatch(pattern, value)))] * (len(talks) - len(rewards))
    for name, verdict, right, wrong in SINGLES:
        if not talks and name in record and str(record.get(verdict)) in (right, wrong):
            talks, rewards = [to_turns(record[name], "assistant")], [record[verdict]]
            rewards = [float(str(record[verdict]) == right)]
    return talks, rewards


def to_preferences(record: dict) -> list[Judgement]:
    """The preferences of a record, whose columns tell the layout. Raises UserError."""
    record = {name.lower(): value for name, value in record.items() if value is not None}
    talks, rewards = conversations(record)
    subset = record.get("subset", record.get("domain", ""))
    known = 0 < len(talks) == len(rewards) and subset != "Ties"
    require(known, f"a tie, uneven or unknown columns {[*record]}: use query, responses, rewards")
    query, items = [], []
    for name in QUERY:
        value = record.get(name, record.get("info", {}).get(name)) or []
        query += to_turns(value, "system" if name.startswith("system") else "user")
    if not any(turn["role"] == "user" for turn in query + talks[0]):
        query += to_turns(record.get("messages") or [], "user")
    talks = [[turn for turn in query if turn not in talk] + talk for talk in talks]
    *query, _ = talks[0]
    same = all(talk[:-1] == query and talk[-1]["role"] == "assistant" for talk in talks)
    if {turn["role"] for turn in query} == {"user"}:
        first, *more = [turn["content"] for turn in query]
        question = str(record.get("question") or "").strip()
        known = {first, question} if question in first else {first}  # the prompt may hold it
        query = "\n\n".join([first, *[text for text in more if text not in known]])
    require(query, f"no query in {[*record]}")
    require(same, "the responses do not follow on one and the same query")
    require(not record.get("tools"), "tools: the judge would not see them")
    scores = [record.get(f"score_{name}") for name in ("chosen", "rejected")]
    require(scores[0] is None or scores[0] != scores[1], f"equal scores {scores}")
    pairs = record.get("sampled_conflict_pairs", [range(len(talks))])  # PPE correctness
    if rewards == [1, 1, 1, 0, 0, 0]:  # RM-Bench: three styles
        pairs = [(0, 3), (1, 4), (2, 5)]
    for pair in pairs:
        order = random.Random(str(query)).sample(pair, len(pair))  # the best is anywhere
        texts, truth = [talks[i][-1]["content"] for i in order], [rewards[i] for i in order]
        items.append(Judgement(query, texts, truth, subset, record.get("reference")))
    return items


def said(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def to_turns(value, speaker: str) -> list[dict]:
    """Turns {"role", "content"} of text or messages. speaker: of what names no role."""
    if isinstance(value, str) and re.match(r"\s*human:", value, re.I):
        value = [said(role, text) for role, text in HH.findall(value) if text.strip()]
    elif isinstance(value, str) and MARK.search(value):
        parts = ["User", *MARK.split(value)]
        value = [said(*turn) for turn in zip(parts[::2], parts[1::2]) if turn[1].strip()]
    turns = []
    for message in value if isinstance(value, list) else [value]:
        message = {"content": message} if isinstance(message, str) else message
        role = message.get("role", message.get("from", speaker)).lower()
        names = "content", "value", "answer", "response", "full_text"
        text = next(filter(None, map(message.get, names)), "")
        if isinstance(text, list):
            kinds = {part.get("type", str(part)) for part in text}
            require(kinds == {"text"}, f"not only text: {sorted(kinds)}"[:200])
            text = "".join(part["text"] for part in text)
        text += str(message.get("tool_calls") or "")
        turns.append(said(ROLES.get(role, role), text.strip()))
    return turns


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a file, or owner/name[/config][:split] on the Hub")
    parser.add_argument("file", help="the JSON Lines to write")
    parser.add_argument("--limit", type=int, help="write the first so many preferences")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what cannot be used")
    args = parser.parse_args()
    require(not Path(args.file).exists(), f"{args.file} exists: name another file")
    items = import_preferences(args.source, args.skip_bad)[: args.limit]
    with open(args.file, "w", encoding="utf-8") as file:
        file.writelines(
            json.dumps({name: getattr(item, name) for name in COLUMNS}, ensure_ascii=False) + "\n"
            for item in items
        )
    print(f"wrote {len(items)} preferences to {args.file}")


if __name__ == "__main__":
    grm.start(main)
