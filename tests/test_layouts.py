"""Layouts of public data: a record made by hand for each; what is refused rather than guessed."""

import json

import export
import pytest

grm = export.grm  # step 1

GOOD, BAD = "Ripe ones sink.", "All of them."
USER = {"role": "user", "content": "Which?"}
TALK = [USER | {"content": "Do plums float?"}, {"role": "assistant", "content": "Some."}, USER]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def read(tmp_path, *records, skip_bad=False):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return export.import_preferences(str(path), skip_bad)


def said(text):
    return {"role": "assistant", "content": text}


def ranking(item):
    return [text for _, text in sorted(zip(item.rewards, item.responses), reverse=True)]


def hh(*texts):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))


ASKED = {"prompt": "Which?"}
TALKS = {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]}
GPT = {"chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}}
RATED, OTHER = {"response": BAD, "overall_score": 3.0}, {"response": GOOD, "overall_score": 8.5}
HELPSTEER3 = {"context": [USER], "overall_preference": 3}
RMB = {"conversation_input": [USER], "category_path": "x/y"}
PAIR = ASKED | {"chosen": GOOD, "rejected": BAD}
HALVES = ASKED | {"response_1": GOOD, "response_2": BAD}
LETTERS = {"question": "Which?", "response_A": GOOD, "response_B": BAD}
SUMMARIES = [{"text": BAD}, {"text": GOOD}]
WEBGPT = {"answer_0": GOOD, "answer_1": BAD, "score_0": 0.5, "score_1": -0.5}
LMSYS = {"response_b": f'["{GOOD}"]', "winner_model_b": 1, "winner_tie": 0}
ARENA = {"winner": "model_b", "model_a": "x", "model_b": "y"}
NECTAR = [{"answer": BAD, "rank": 2.0}, {"answer": GOOD, "rank": 1.0}]
PARTS = [{"type": "text", "text": "Whi"}, {"type": "text", "text": "ch?"}]  # as of a vision model
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "weigh"}]}
LAYOUTS = {
    "RewardBench": PAIR | {"chosen_model": "x", "subset": "fruit", "id": 3},
    "TRL": {"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "Skywork": TALKS | {"source": "y"},
    "UltraFeedback binarized": TALKS | {"prompt": "Which? ", "score_chosen": 8.0},
    "capitals": {"Prompt": "Which?", "Chosen": GOOD, "Rejected": BAD},
    "ShareGPT": GPT | {"conversations": [{"from": "human", "value": "Which?"}]},
    "HH": {"chosen": hh("Which?", GOOD), "rejected": hh("Which?", BAD)},
    "HH with a prompt": {"prompt": hh("Which?", ""), "chosen": GOOD, "rejected": BAD},
    "JudgeBench": LETTERS | {"label": "A>B", "pair_id": "7"},
    "HelpSteer2": HALVES | {"preference_strength": -1},
    "HelpSteer3": HELPSTEER3 | {"response1": BAD, "response2": GOOD, "language": "C"},
    "LLMBar": {"input": "Which?", "output_1": BAD, "output_2": GOOD, "label": 2},
    "PPE preference": HALVES | {"winner": "model_a", "model_a": "x", "model_b": "y"},
    "PPE correctness": HALVES | {"scores": [True, False], "question": "Which"},  # in the prompt
    "RMB": RMB | {"chosen": {"answer": GOOD, "llm_name": "x"}, "reject": {"answer": BAD}},
    "UltraFeedback": {"instruction": "Which?", "completions": [RATED, RATED | OTHER]},
    "AlpacaFarm": {"instruction": "Which?", "output_1": BAD, "output_2": GOOD, "preference": 2.0},
    "Auto-J": ASKED | {"response 1": GOOD, "response 2": BAD, "label": 0, "scenario": "x"},
    "PKU-SafeRLHF": ASKED | {"response_0": BAD, "response_1": GOOD, "better_response_id": 1},
    "TL;DR": {"info": {"post": "Which?"}, "summaries": SUMMARIES, "choice": 1},
    "WebGPT": WEBGPT | {"question": {"full_text": "Which?", "id": "7"}},
    "LMSYS": {"prompt": '["Which?"]', "response_a": f'["{BAD}"]', "winner_model_a": 0} | LMSYS,
    "Arena": {"conversation_a": [USER, said(BAD)], "conversation_b": [USER, said(GOOD)]} | ARENA,
    "SHP": {"history": "Which?", "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
    "Nectar": {"prompt": hh("Which?", ""), "answers": NECTAR},
    "capital turns": {"chosen": hh("Which?", GOOD).upper(), "rejected": hh("Which?", BAD).upper()},
    "parts": PAIR | {"prompt": [USER | {"content": PARTS}]},
    "scores": ASKED | {"responses": [BAD, GOOD], "scores": [-0.5, 2]},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pair(tmp_path, name):
    [item] = read(tmp_path, LAYOUTS[name])
    texts = [item.query, *ranking(item)]
    upper = name == "capital turns"
    assert texts == [text.upper() if upper else text for text in ("Which?", GOOD, BAD)]
    assert read(tmp_path, LAYOUTS[name]) == [item]  # its order follows from the content


def test_our_own_lines_stay_as_they_are(tmp_path):
    own = {"query": TALK, "responses": [BAD, " b", "c"], "rewards": [0, 2, 1], "reference": "r"}
    assert read(tmp_path, own) == [grm.Judgement(**own)]


def test_one_best_response_of_several(tmp_path):
    bench2 = ASKED | {"chosen": [GOOD], "rejected": ["b", "c", "d"], "subset": "Focus"}
    losers = [{"answer": text} for text in "bcd"]
    rmb = RMB | {"bon_best": {"answer": GOOD}, "loser_list": losers}
    for item in read(tmp_path, bench2) + read(tmp_path, rmb):
        assert ranking(item)[0] == GOOD and sorted(item.responses) == [GOOD, "b", "c", "d"]


def test_several_pairs_in_a_record(tmp_path):
    rm_bench = ASKED | {"chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"], "domain": "chat"}
    items = [(item.subset, *ranking(item)) for item in read(tmp_path, rm_bench)]
    assert items == [("chat", "a", "x"), ("chat", "b", "y"), ("chat", "c", "z")]
    ppe = {f"response_{i + 1}": text for i, text in enumerate("abcd")} | ASKED
    ppe |= {"scores": [True, False, True, False], "sampled_conflict_pairs": [[0, 1], [3, 2]]}
    assert [ranking(item) for item in read(tmp_path, ppe)] == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("label, right", [("no_error", 1), ("error", 0)])
def test_single_response(tmp_path, label, right):
    [item] = read(tmp_path, {"input": "Which?", "llm_response": GOOD, "label": label})
    assert (item.query, item.responses, item.rewards) == ("Which?", [GOOD], [right])


def test_ratings_of_one_response_each(tmp_path):
    rows = [ASKED | {"response": text, "helpfulness": n} for text, n in ((BAD, 1), (GOOD, 4))]
    rows += [
        row | {"prompt": "Who?\n<extra_id_1>Assistant\nI.\n<extra_id_1>User\nWhy?"} for row in rows
    ]
    first, second = read(tmp_path, *rows)
    assert first.query == "Which?" and ranking(first) == ranking(second) == [GOOD, BAD]
    assert [turn["role"] for turn in second.query] == ["user", "assistant", "user"]
    assert [turn["content"] for turn in second.query] == ["Who?", "I.", "Why?"]


def test_single_completions(tmp_path):
    kto = {"prompt": [USER], "completion": [said(GOOD)], "label": True}
    items = read(tmp_path, kto, kto | {"completion": [said(BAD)], "label": False})
    assert [(item.responses, item.rewards) for item in items] == [([GOOD], [1]), ([BAD], [0])]


QUERIES = [
    ({"chosen": [*TALK, said(GOOD)], "rejected": [*TALK, said(BAD)], "prompt": "Which?"}, TALK),
    ({"chosen": hh("a", "b", "c", GOOD), "rejected": hh("a", "b", "c", BAD)}, list("abc")),
    (PAIR | {"system": "Be brief."}, ["Be brief.", "Which?"]),
    (PAIR | {"prompt": [USER | {"role": "developer"}, USER]}, [USER | {"role": "system"}, USER]),
    (PAIR | {"prompt": [USER, CALL, USER | {"role": "tool"}]}, ["Which?", "weigh", "Which?"]),
    ({"context": "Plums.", "question": "Which?", **PAIR, "prompt": ""}, "Plums.\n\nWhich?"),
    ({"instruction": "Sort.", "input": "b a", **PAIR, "prompt": None}, "Sort.\n\nb a"),
    ({"instruction": "Is 2 even?", "input": "2", **PAIR, "prompt": None}, "Is 2 even?\n\n2"),
    (PAIR | {"system_prompt": "Be brief."}, ["Be brief.", "Which?"]),
    ({"passage": "Plums.", "question": "Which?", **PAIR, "prompt": None}, "Plums.\n\nWhich?"),
    ({"system": "Be brief.", "messages": [USER], **PAIR, "prompt": ""}, ["Be brief.", "Which?"]),
    (PAIR | {"history": TALK[:2]}, ["plums", "Some.", "Which?"]),
    (
        {"query": "Which?", "responses": [GOOD, BAD], "rewards": [1, 0], "system": "Be brief."},
        ["Be brief.", "Which?"],
    ),
]


@pytest.mark.parametrize("columns, query", QUERIES)
def test_every_part_of_the_query_is_kept(tmp_path, columns, query):
    [item] = read(tmp_path, columns)
    assert ranking(item) == [GOOD, BAD] and len(item.query) == len(query)
    for found, wanted in zip(item.query, query):
        assert found == wanted or wanted in found["content"]


def test_place_of_the_best_tells_nothing(tmp_path):
    items = read(tmp_path, *(PAIR | {"prompt": f"Plum {i}?"} for i in range(400)))
    assert 160 < sum(item.rewards[0] for item in items) < 240


REFUSED = [
    ({"fruit": "plum", "answer": GOOD}, "fruit.*answer"),  # the columns that there are
    (HALVES | {"winner": "tie"}, "tie"),
    (HALVES | {"label": 1}, "label"),  # from 0 or from 1? Which is better?
    ({"input": "Which?", "llm_response": GOOD, "label": "unsure"}, "label"),
    (ASKED | {"chosen": list("abc"), "rejected": list("xyz"), "subset": "Ties"}, "tie"),
    (ASKED | {"chosen": list("abcd"), "rejected": ["x"]}, "best"),
    (PAIR | {"rejected": GOOD}, "responses"),
    ({"chosen": GOOD, "rejected": BAD}, "query"),
    (TALKS | {"rejected": [*TALK, said(BAD)]}, "query"),
    ({"chosen": hh("a", GOOD, "b"), "rejected": hh("a", BAD, "b")}, "query"),
    (ASKED | {"responses": ["a", "b"], "scores": [1, 0, 0]}, "responses"),
    (PAIR | {"score_chosen": 7.0, "score_rejected": 7.0}, "equal scores"),
    (PAIR | {"tools": [{"name": "scale"}]}, "tools"),
    (
        PAIR | {"prompt": [said([PARTS[0] | {"text": "x" * 300}, {"type": "image"}])]},
        "not only text.*image",
    ),
    (PAIR | {"prompt": [said([*PARTS, {"image_url": "plum.png"}])]}, "not only text.*image_url"),
]


@pytest.mark.parametrize("record, word", REFUSED)
def test_refused(tmp_path, record, word, capsys):
    with pytest.raises(grm.UserError, match=rf"data\.jsonl:2: .*{word}"):
        read(tmp_path, PAIR, record)
    assert len(read(tmp_path, PAIR, record, record, skip_bad=True)) == 1
    assert "2" in capsys.readouterr().out.partition("data.jsonl:2:")[0]


@pytest.mark.parametrize(
    "names, label",
    [(("output_1", "output_2"), 0), (("response 1", "response 2"), 2), (("", ""), None)],
)
def test_labels_of_another_count_refuse_the_file(tmp_path, names, label):
    """Else one half would be left out and the other half be read the wrong way round."""
    record = ASKED | dict(zip(names, (GOOD, BAD)))
    if label is None:
        record |= {"human_ref_A": GOOD, "human_ref_B": BAD, "labels": 2}
    else:
        record |= {"label": label}
    with pytest.raises(grm.UserError, match=rf"data\.jsonl:2: label.* {record.get('label', 2)}"):
        read(tmp_path, PAIR, record, PAIR, skip_bad=True)


def test_files_and_splits(tmp_path, capsys):
    from datasets import Dataset

    folder = tmp_path / "owner" / "name"  # as on the Hub
    folder.mkdir(parents=True)
    data = Dataset.from_list([PAIR])
    data.to_csv("a.csv")
    data.to_csv("a.tsv", sep="\t")
    data.to_parquet(folder / "train.parquet")
    data.to_parquet(folder / "test.parquet")
    (tmp_path / "a.json").write_text(json.dumps([PAIR], indent=1))
    for source in ("a.csv", "a.tsv", "a.json", "owner/name/train.parquet", "owner/name:test"):
        assert export.import_preferences(source, False) == read(tmp_path, PAIR)
    assert "test" in capsys.readouterr().out
    (tmp_path / "page.jsonl").write_text("<html>")
    (tmp_path / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid x")
    (tmp_path / "wide.jsonl").write_text(json.dumps(PAIR), encoding="utf-16")
    for source, word in (("pointer.jsonl", "git lfs pull"), ("wide.jsonl", "UTF-8")):
        with pytest.raises(grm.UserError, match=f"{source}: .*{word}"):
            export.import_preferences(source, False)
    for source in ("page.jsonl", "no/such", "nothing.csv", "owner/name:dev"):
        with pytest.raises(grm.UserError, match=source):
            export.import_preferences(source, False)
