"""Data: every layout to exact values, every malformed record to its message, and 500 broken files to nothing but DataError."""
import gzip
import json
import os
import random
from pathlib import Path

import pytest

from conftest import load_script

grm = load_script("01_pointwise_grm")
DataError, Preference = grm.DataError, grm.Preference
export_preferences, load_preferences, to_preferences = grm.export_preferences, grm.load_preferences, grm.to_preferences

OURS = {"query": "2+2?", "responses": ["4", "5"], "rewards": [1, 0]}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def answer(text):
    return {"role": "assistant", "content": text}


def ranking(preference):
    """The responses, best first (and then as they stand): what the shuffle must not change."""
    return [r for _, r in sorted(zip(preference.rewards, preference.responses), key=lambda pair: -pair[0])]


LAYOUTS_TO_TRY = [
    (OURS, "2+2?", ["4", "5"], "", ""),
    ({**OURS, "query": TALK, "subset": "s", "id": 7}, TALK, ["4", "5"], "s", "7"),
    ({**OURS, "query": [{"from": "human", "value": "2+2?"}]}, "2+2?", ["4", "5"], "", ""),
    ({"prompt": "Q", "chosen": "good", "rejected": "bad", "category": "c", "id": "x"}, "Q", ["good", "bad"], "c", "x"),
    ({"prompt": "Q", "prompt_id": "p", "messages": [], "score_chosen": 8.0, "chosen": [{"role": "user", "content": "Q"}, answer("good")],
      "rejected": [{"role": "user", "content": "Q"}, answer("bad")]}, "Q", ["good", "bad"], "", "p"),
    ({"prompt": TALK, "chosen": [answer("good")], "rejected": [answer("bad")]}, TALK, ["good", "bad"], "", ""),
    ({"chosen": TALK + [answer("good")], "rejected": TALK + [answer("bad")], "source": "magpie"}, TALK, ["good", "bad"], "magpie", ""),
    ({"chosen": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}],
      "rejected": [{"from": "Human", "value": "Q", "role": None}, {"from": "bot", "value": "bad"}]}, "Q", ["good", "bad"], "", ""),
    ({"prompt": "Q", "chosen": ["good"], "rejected": ["bad", "worse", "worst"], "subset": "Focus"}, "Q", None, "Focus", ""),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: See you\n\nsoon",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: No"}, TALK, ["See you\n\nsoon", "No"], "", ""),
    ({"question": "Q", "response_A": "a", "response_B": "b", "label": "A>B", "pair_id": "1", "source": "law"}, "Q", ["a", "b"], "law", "1"),
    ({"question": "Q", "response_A": "a", "response_B": "b", "label": "B>A"}, "Q", ["b", "a"], "", ""),
    ({"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": -2}, "Q", ["a", "b"], "", ""),
    ({"context": TALK, "response1": "a", "response2": "b", "overall_preference": 3, "domain": "code"}, TALK, ["b", "a"], "code", ""),
    ({"bon_uid": "3", "category_path": "BoN_set/Chat", "conversation_input": [{"role": "user", "content": "Q", "language": "English"}],
      "bon_best": {"llm_name": "m", "answer": "good"}, "loser_list": [{"llm_name": "n", "answer": "bad"}, {"answer": "worse"}]},
     "Q", None, "BoN_set/Chat", "3"),
    ({"pair_uid": "4", "conversation_input": TALK, "chosen": {"answer": "good", "score": 5}, "reject": {"answer": "bad"}},
     TALK, ["good", "bad"], "", "4"),
]


@pytest.mark.parametrize("record, query, best_first, subset, id", LAYOUTS_TO_TRY)
def test_layout(tmp_path, record, query, best_first, subset, id):
    file = write(tmp_path / "data.jsonl", record)
    [preference] = load_preferences(file)
    assert (preference.query, preference.subset, preference.id, preference.reference) == (query, subset, id, None)
    if best_first is None:  # best of n: the order of the others is free
        assert ranking(preference)[0] == "good" and preference.rewards.count(1.0) == 1 and sum(preference.rewards) == 1
        assert sorted(preference.responses)[:3] == ["bad", "good", "worse"]
    else:
        assert ranking(preference) == best_first and sorted(preference.rewards) == [0.0, 1.0]
    assert load_preferences(file) == [preference]  # the shuffle is the same again


def test_orders_of_own_lines_and_of_labelled_pairs_are_kept():
    for i, record in enumerate(r for r in [{**OURS, "rewards": [0, 1]}, LAYOUTS_TO_TRY[11][0], LAYOUTS_TO_TRY[13][0]]):
        [preference] = to_preferences(record)
        assert preference.responses == [["4", "5"], ["a", "b"], ["a", "b"]][i] and preference.rewards == [0.0, 1.0]


def test_position_of_the_best_carries_no_information():
    places = [0, 0, 0, 0]
    for i in range(2000):
        [preference] = to_preferences({"prompt": f"Q{i}", "chosen": ["good"], "rejected": ["bad", "worse", "worst"]})
        places[preference.rewards.index(1.0)] += 1
    assert all(425 < count < 575 for count in places)  # 500 each, give or take 4 standard deviations


def test_rm_bench_is_paired_style_by_style(tmp_path):
    record = {"id": "chat-1", "prompt": "Q", "chosen": ["g1", "g2", "g3"], "rejected": ["b1", "b2", "b3"], "domain": "chat"}
    file = tmp_path / "data.json"
    file.write_text(json.dumps([record, {**record, "domain": None, "id": None}], indent=1))
    preferences = load_preferences(file)
    assert [ranking(p) for p in preferences] == [["g1", "b1"], ["g2", "b2"], ["g3", "b3"]] * 2
    assert [p.subset for p in preferences] == ["chat/concise", "chat/plain", "chat/markdown", "concise", "plain", "markdown"]
    assert [p.id for p in preferences][2:4] == ["chat-1-markdown", "concise"]
    assert load_preferences(file, limit=2) == preferences[:2]


def test_gzip_byte_order_mark_blank_lines_and_unicode_separators(tmp_path):
    record = {**OURS, "responses": ["one\u2028line\x85\u2029\x1c", "5"], "reference": "4"}
    text = "\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n\n  \n" + json.dumps(OURS)
    for name, data in (("a.jsonl", text.encode()), ("b.jsonl", gzip.compress(text.encode())), ("c.jsonl.gz", gzip.compress(text.encode())),
                       ("d.json", f"\ufeff\n [{json.dumps(record)}, {json.dumps(OURS)}]".encode())):
        (tmp_path / name).write_bytes(data)
        first, second = load_preferences(tmp_path / name)
        assert first == Preference("2+2?", ["one\u2028line\x85\u2029\x1c", "5"], [1.0, 0.0], reference="4")
        assert second == Preference("2+2?", ["4", "5"], [1.0, 0.0])


def test_export_round_trip_is_exact(tmp_path):
    preferences = [Preference("q\u2028\n\"é😀", ["a", "b", "c"], [0.1 + 0.2, -1e300, 3], "s", "", "i"), Preference(TALK, ["only"], [-5]),
                   Preference([{"role": "system", "content": ""}, TALK[0]], ["x", "y"], [5e-324, 0], reference="r")]
    file = tmp_path / "new" / "out.jsonl"
    for _ in range(2):  # the second time over an existing file
        export_preferences(preferences, file)
    assert load_preferences(file) == preferences
    assert file.read_bytes().count(b"\n") == 3 and "😀".encode() in file.read_bytes() and os.listdir(file.parent) == ["out.jsonl"]
    assert json.loads(file.read_text(encoding="utf-8").split("\n")[1]) == {"query": TALK, "responses": ["only"], "rewards": [-5.0]}


def test_skip_bad_counts_and_shows_the_first(tmp_path, capsys):
    file = write(tmp_path / "data.jsonl", OURS, {**OURS, "rewards": [1, 1]}, {}, OURS)
    assert len(load_preferences(file, skip_bad=True)) == 2
    assert capsys.readouterr().out == (f"skipped 2 of 4 records of {file}; the first: "
                                       f"{file}:2: a tie: more than one response has the best reward\n")
    assert len(load_preferences(file, skip_bad=True, limit=1)) == 1 and capsys.readouterr().out == ""
    with pytest.raises(DataError, match="no usable records"):
        load_preferences(write(tmp_path / "bad.jsonl", {}), skip_bad=True)


PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
LABELLED = {"question": "Q", "response_A": "a", "response_B": "b"}
MALFORMED = [
    ({"a": 1, "é": 2}, "unknown layout with the columns 'a, \\xe9'; the known ones are query + responses + rewards"),
    ({"query": "Q", "responses": ["a"]}, "unknown layout with the columns 'query, responses'"),
    ([OURS], "the record is not an object"), ("text", "the record is not an object"), (None, "the record is not an object"),
    ({**OURS, "query": 5}, "a conversation is neither"), ({**OURS, "query": ["a"]}, "a conversation is neither"),
    ({**OURS, "query": [{"role": "robot", "content": "a"}]}, "a conversation is neither"),
    ({**OURS, "query": [{"role": "user", "content": ["a"]}]}, "a conversation is neither"),
    ({**OURS, "query": []}, "a conversation has no turns"), ({**OURS, "query": " \n"}, "the query is empty"),
    ({**OURS, "query": TALK[:2]}, "does not end with the user's turn"), ({**OURS, "query": None}, "unknown layout"),
    ({**OURS, "responses": "45"}, "responses are not"), ({**OURS, "responses": ["4", 5]}, "responses are not"),
    ({**OURS, "responses": ["4", None]}, "responses are not"), ({**OURS, "responses": [["4"], "5"]}, "responses are not"),
    ({**OURS, "responses": ["4", " \t"]}, "none of them"),
    ({**OURS, "responses": [], "rewards": []}, "at least one"),
    ({**OURS, "rewards": [1]}, "2 responses but 1 rewards"), ({**OURS, "rewards": {"4": 1}}, "not a list of finite numbers"),
    ({**OURS, "rewards": [True, False]}, "finite numbers"), ({**OURS, "rewards": ["1", "0"]}, "finite numbers"),
    ({**OURS, "rewards": [float("nan"), 0]}, "finite numbers"), ({**OURS, "rewards": [float("inf"), 0]}, "finite numbers"),
    ({**OURS, "rewards": [10 ** 400, 0]}, "finite numbers"), ({**OURS, "rewards": [0, float("-inf")]}, "finite numbers"),
    ({**OURS, "rewards": [0, -10 ** 400]}, "finite numbers"), ({**OURS, "rewards": [[1], 0]}, "finite numbers"),
    ({**OURS, "rewards": [2, 2]}, "a tie"), ({**OURS, "rewards": [2 ** 53, 2 ** 53 + 1]}, "a tie"),
    ({**OURS, "subset": 5}, "subset, id or reference is not text"), ({**OURS, "reference": ["4"]}, "is not text"),
    ({**OURS, "query": "\ud800"}, "a lone surrogate"), ({**OURS, "id": "\udfff"}, "a lone surrogate"),
    ({**PAIR, "chosen": " "}, "none of them"), ({**PAIR, "chosen": 5}, "a conversation is neither"),
    ({**PAIR, "prompt": ""}, "the query is empty"),
    ({**PAIR, "chosen": ["good"] * 2, "rejected": ["bad"] * 2}, "not three responses each"),
    ({**PAIR, "chosen": ["good"] * 3, "rejected": ["bad", 5, "bad"]}, "a conversation is neither"),
    ({**PAIR, "chosen": [], "rejected": []}, "a conversation has no turns"),
    ({**PAIR, "chosen": TALK, "rejected": TALK}, "the last is not the assistant's"),
    ({"chosen": TALK + [answer("good")], "rejected": TALK[2:] + [answer("bad")]}, "do not share all turns but the last"),
    ({"chosen": [answer("good")], "rejected": [answer("bad")]}, "the query is neither text"),
    ({"chosen": "good", "rejected": "bad"}, "is not a transcript that starts with Human:"),
    ({"chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: b",
      "rejected": "\n\nHuman: Q\n\nAssistant: c"}, "do not share all turns"),
    ({"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant:"}, "none of them"),
    ({"chosen": "\n\nHuman: Q", "rejected": "\n\nHuman: Q"}, "the last is not the assistant's"),
    ({**LABELLED, "label": "A=B"}, "a tie"), ({**LABELLED, "label": "A"}, "the label or preference is neither"),
    ({**LABELLED, "label": ["A>B"]}, "the label or preference is neither"), (LABELLED, "unknown layout"),
    ({"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": 0}, "a tie"),
    ({"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": True}, "the label or preference is neither"),
    ({"response_1": "a", "response_2": "b", "preference_strength": 1}, "unknown layout"),
    ({"conversation_input": "Q", "bon_best": {"answer": "a"}, "loser_list": []}, "not of the form"),
    ({"conversation_input": "Q", "bon_best": {"answer": "a"}, "loser_list": [{"text": "b"}]}, "responses are not"),
    ({"conversation_input": "Q", "chosen": "a", "reject": "b"}, "not of the form"),
]


@pytest.mark.parametrize("record, reason", MALFORMED)
def test_malformed_record_names_file_line_and_reason(tmp_path, record, reason):
    file = write(tmp_path / "data.jsonl", OURS, record)
    with pytest.raises(DataError) as caught:
        load_preferences(file)
    assert str(caught.value).startswith(f"{file}:2: ") and reason in str(caught.value) and "\n" not in str(caught.value)
    file.write_text(json.dumps([OURS, record]))
    with pytest.raises(DataError) as caught:
        load_preferences(file)
    assert str(caught.value).startswith(f"{file}, record 2: ") and reason in str(caught.value)


@pytest.mark.parametrize("data, reason", [
    (b'{"query": ', ":2: invalid JSON: Expecting value"), (b'{"query": "\xff"}', ":2: invalid JSON: 'utf-8' codec"),
    (b"9" * 5000, ":2: invalid JSON"),
    (b"[" * 100_000, ":2: invalid JSON: maximum recursion"), (b'{"query": "a\tb"}', ":2: invalid JSON: Invalid control character")])
def test_malformed_line(tmp_path, data, reason):
    file = tmp_path / "data.jsonl"
    file.write_bytes(json.dumps(OURS).encode() + b"\n" + data)
    with pytest.raises(DataError) as caught:
        load_preferences(file)
    assert str(caught.value).startswith(f"{file}{reason}")


def test_unusable_files(tmp_path, monkeypatch):
    cases = {"missing.jsonl": (None, "No such file"), "empty.jsonl": (b"", "no usable records"),
             "blank.json": (b" \n\n", "no usable records"),
             "list.json": (b"[]", "no usable records"), "cut.json": (b'[\n{"query": "a"},\n', "line 3 column 1"),
             "cut.gz": (gzip.compress(json.dumps(OURS).encode() * 50)[:-9], "ended before"),
             "tail.gz": (gzip.compress(b"{}") + b"x", "gzip"),
             "flip.gz": (b"\x1f\x8b\x08" + b"\xff" * 40, ": "), "null\0byte": (None, "null byte")}
    for name, (data, reason) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as caught:
            load_preferences(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and reason in str(caught.value)
    with pytest.raises(DataError, match="Is a directory"):
        load_preferences(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(DataError, match="data.jsonl: Permission denied"):
        load_preferences("data.jsonl")


def test_hub_data_sets(monkeypatch, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)  # so that no file is called owner/name
    pair = {"prompt": "Bye", "chosen": TALK + [answer("good")], "rejected": TALK + [answer("bad")], "response_1": None}
    train = datasets.Dataset.from_list([pair])
    test = datasets.Dataset.from_list([LABELLED | {"label": "B>A"}, LABELLED | {"label": "A=B"}])
    hub = {"owner/both": datasets.DatasetDict({"test": test, "train": train}),
           "owner/gpt-4o": datasets.DatasetDict({"gpt": test}), "owner/no": {}}

    def load_dataset(name, split=None):
        if name not in hub:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nand a long trace")
        return hub[name][split] if split else hub[name]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [preference] = load_preferences("owner/both")
    assert preference.query == TALK and ranking(preference) == ["good", "bad"]
    for source in ("owner/both:test", "owner/gpt-4o"):
        assert load_preferences(source, skip_bad=True) == [Preference("Q", ["a", "b"], [0, 1])]
        assert "skipped 1 of 2 records" in capsys.readouterr().out
        with pytest.raises(DataError, match=f"^{source}, record 2: a tie"):
            load_preferences(source)
    with pytest.raises(DataError, match="^owner/none: there is no such file.*loaded: Couldn't reach 'owner/none' on the Hub$"):
        load_preferences("owner/none")
    for source in ("owner/both:dev", "owner/no"):
        with pytest.raises(DataError, match=f"^{source}: there is no such file"):
            load_preferences(source)
    with pytest.raises(DataError, match="^data/missing.jsonl: No such file"):
        load_preferences("data/missing.jsonl")
    (tmp_path / "owner").mkdir()
    write(tmp_path / "owner" / "both", OURS)  # a file of that name wins
    assert load_preferences("owner/both")[0].query == "2+2?"


def mutate(data, records, rng):
    """One of the ways in which a file gets broken: in its bytes, in its JSON text or in a record's values."""
    kind = rng.randrange(8)
    if kind == 0:
        return data[:rng.randrange(len(data))]
    if kind == 1:
        return bytes(rng.choice([byte, rng.randrange(256)]) if rng.random() < 0.02 else byte for byte in data)
    if kind == 2:
        packed = bytearray(gzip.compress(data))
        for _ in range(rng.randrange(3)):
            packed[rng.randrange(len(packed))] = rng.randrange(256)
        return bytes(packed[:rng.randrange(1, len(packed) + 1)])
    if kind == 3:
        return rng.randbytes(rng.randrange(200))
    if kind == 4:
        odd = rng.choice([b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b'",', b"\n", "\u2028".encode()])
        return data.replace(b"Q", odd, rng.randrange(1, 4))
    if kind == 5:
        depth = rng.choice([3, 500, 100_000])
        return data.replace(b'"Q"', b"[" * depth + b'"Q"' + b"]" * depth, 1)
    if kind == 6:
        odd = rng.choice([b"1e999", b"9" * 400, b"9" * 5000, b"NaN", b"-Infinity", b"true", b"1.5"])
        return data.replace(b"1", odd, rng.randrange(1, 4))

    def swap(value):
        if rng.random() < 0.1:
            return rng.choice([None, True, -3, 1e308, float("nan"), "", "text", [], {}, [None], [["a"]],
                               {"answer": 5}, {"role": "user"}, TALK])
        if isinstance(value, dict):
            return {key: swap(item) for key, item in value.items() if rng.random() > 0.05}
        return [swap(item) for item in value] if isinstance(value, list) else value

    return "\n".join(json.dumps(swap(record)) for record in records).encode()


def test_five_hundred_broken_files(tmp_path):
    rng, outcomes = random.Random(0), [0, 0]
    known = [record for record, *_ in LAYOUTS_TO_TRY] + [{**PAIR, "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}]
    for i in range(500):
        records = rng.sample(known, rng.randrange(1, 5))
        data = json.dumps(records).encode() if rng.random() < 0.3 else "\n".join(map(json.dumps, records)).encode()
        file = tmp_path / f"{i}.jsonl"
        file.write_bytes(mutate(data, records, rng))
        for load in (load_preferences, lambda path: load_preferences(path, skip_bad=True)):
            try:
                preferences = load(file)
            except DataError as error:
                outcomes[0] += 1
                assert str(error).startswith(str(file)) and "\n" not in str(error) and str(error).encode()
                continue
            outcomes[1] += 1
            for p in preferences:
                assert p.query and p.responses and len(p.responses) == len(p.rewards) and all(type(r) is float for r in p.rewards)
                assert len(p.rewards) == 1 or sorted(p.rewards)[-1] > sorted(p.rewards)[-2]
            export_preferences(preferences, tmp_path / "out.jsonl")
            assert load_preferences(tmp_path / "out.jsonl") == preferences
    assert min(outcomes) > 200  # both outcomes are met


def test_shared_data_loads():
    files = sorted((Path(__file__).resolve().parent.parent.parent / "shared" / "data").glob("*.jsonl"))
    if not files:
        pytest.skip("no shared data here")
    for file in files:
        preferences = load_preferences(file)
        assert len(preferences) == file.read_bytes().count(b"\n")
        assert all(p.id and p.subset and sorted(p.rewards)[-2:] == [0.0, 1.0] for p in preferences)
