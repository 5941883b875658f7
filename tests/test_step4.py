"""04_voting.py: votes and intervals against numbers worked by hand, that samples are kept, and that nothing in the page can run."""
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from conftest import JUDGE, load_script, refusal
from PIL import Image

vote = load_script("04_voting")
EVAL = JUDGE.parent / "eval.jsonl"
OPTIONS = SimpleNamespace(k=3, temperature=0.5, max_new_tokens=160, batch_size=64, seed=0, quantize="none")
NAN, ABSENT = math.nan, -math.inf
TINY = ("--limit", 8, "--k", 4, "--max-new-tokens", 160, "--batch-size", 64)


def options(**changed):
    return SimpleNamespace(**vars(OPTIONS) | changed)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def judged(item, order, scores, number=0, output=""):
    """A trajectory of an item shown in `order`, with the scores in that order."""
    return vote.Trajectory(number, item.query, [item.responses[i] for i in order], [item.rewards[i] for i in order], list(order), False, False,
                           output=output, scores=scores)


def run(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["04_voting.py", *map(str, arguments)])
    vote.main()


# samples of one item with three responses, in its own order; the third cannot be read
SAMPLES = tensor([[9, 2, 5], [4, 4, 1], [NAN] * 3, [1, 6, 6]])


def test_votes_by_hand():
    assert vote.vote_sum(SAMPLES).tolist() == [14, 12, 12]
    assert vote.vote_mean(SAMPLES).tolist() == pytest.approx([14 / 3, 4, 4])
    assert vote.vote_majority(SAMPLES).tolist() == [1.5, 1, 0.5]  # 1 + 1/2, 1/2 + 1/2, 1/2
    thirds = vote.vote_majority(tensor([[5, 5, 5]] * 3 + [[7, 1, 1]]))
    assert thirds.tolist() == [2, 1, 1]  # three thirds are one, so that ties are found


def test_unreadable_samples_add_nothing_and_absent_responses_never_win():
    nothing = tensor([[NAN, NAN, ABSENT], [NAN, NAN, ABSENT]])
    assert vote.vote_sum(nothing).tolist() == [0, 0, ABSENT] and vote.vote_majority(nothing).tolist() == [0, 0, ABSENT]
    for voting in vote.VOTES.values():
        figures = vote.right_and_tied(voting(nothing)[None, None], torch.tensor([1]))
        assert {key: value.tolist() for key, value in figures.items()} == {"accuracy": [0.5], "strict": [0], "ties": [1]}
        one = vote.right_and_tied(voting(tensor([[NAN, NAN, ABSENT], [3, 8, ABSENT]]))[None, None], torch.tensor([1]))
        assert one["strict"].tolist() == [1]


def test_scores_go_back_into_the_items_order():
    items = [vote.Preference("q", ["a", "b", "c"], [0, 2, 1]), vote.Preference("q", ["a"], [1])]
    trajectories = [judged(items[0], [2, 0, 1], [3, 1, 2]), judged(items[0], [0, 1, 2], None), judged(items[1], [0], [7], 1),
                    judged(items[1], [0], [8], 1)]
    scores = vote.score_tensor(trajectories, 2)
    assert scores.shape == (2, 2, 3)
    assert scores[0, 0].tolist() == [1, 2, 3] and scores[0, 1].isnan().all()
    assert scores[1].tolist() == [[7, ABSENT, ABSENT], [8, ABSENT, ABSENT]]


def random_scores(items, total, responses, seed=0):
    rng = random.Random(seed)
    return tensor([[[NAN] * responses if rng.random() < 0.1 else [rng.randint(1, 4) for _ in range(responses)] for _ in range(total)]
                   for _ in range(items)])


def test_figures_of_votes_equal_those_of_step_one():
    scores, rng = random_scores(60, 3, 3), random.Random(1)
    best = torch.tensor([rng.randrange(3) for _ in scores])
    figures = vote.right_and_tied(vote.vote_sum(scores)[:, None], best)
    for i, of_item in enumerate(scores.tolist()):
        votes = [sum(column) for column in zip(*(row for row in of_item if row[0] == row[0]))] or None
        rewards = [float(j == best[i]) for j in range(3)]
        assert figures["accuracy"][i].item() == pytest.approx(vote.chance_of_best(votes, rewards))
        assert figures["strict"][i].item() == vote.is_correct(votes, rewards)


def test_the_mean_chooses_as_the_sum_does():
    scores, best = random_scores(50, 8, 3), torch.zeros(50, dtype=torch.long)
    for k in (1, 2, 8):
        by_sum, by_mean = (vote.over_subsets(lambda index: voting(vote.take(scores, index)), best, 8, k)
                           for voting in (vote.vote_sum, vote.vote_mean))
        assert all(torch.equal(by_sum[key], by_mean[key]) for key in by_sum)


def test_a_round_of_subsets_shares_no_sample():
    rounds = list(vote.subsets(5, 7, 3, rounds=40))
    assert len(rounds) == 40 and rounds[0].shape == (5, 2, 3)
    for index in rounds:
        assert all(len(set(of_item)) == 6 for of_item in index.flatten(1).tolist())
    assert len({tuple(index[0, 0].tolist()) for index in rounds}) > 20
    [ones], [whole] = vote.subsets(2, 7, 1), vote.subsets(2, 7, 7)
    assert ones.shape == (2, 7, 1) and sorted(ones[0, :, 0].tolist()) == sorted(whole[0, 0].tolist()) == list(range(7))


def test_the_curve_is_the_mean_over_all_subsets():
    scores, best = random_scores(3, 5, 2), torch.tensor([0, 1, 0])

    def mean_over(k):
        figures = [vote.right_and_tied(vote.vote_sum(scores[:, list(chosen)])[:, None], best)["accuracy"]
                   for chosen in itertools.combinations(range(5), k)]
        return torch.stack(figures).mean(0)

    def drawn(k):
        return vote.over_subsets(lambda index: vote.vote_sum(vote.take(scores, index)), best, 5, k)["accuracy"]

    for k in (1, 5):
        torch.testing.assert_close(drawn(k), mean_over(k))  # exact
    torch.testing.assert_close(drawn(2), mean_over(2), atol=0.1, rtol=0)


def test_bootstrap_by_hand():
    assert vote.bootstrap(tensor([0.25] * 10), range(10)) == [0.25] * 3
    assert all(math.isnan(value) for value in vote.bootstrap(tensor([]), []))
    values = tensor([0.0, 1.0] * 200)
    mean, low, high = vote.bootstrap(values, range(400))
    assert mean == 0.5 and [low, high] == pytest.approx([0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025], abs=0.006)
    _, low, high = vote.bootstrap(values, [i // 2 for i in range(400)])  # every query has a right and a wrong item: nothing can vary
    assert low == high == 0.5
    _, low, high = vote.bootstrap(values, [i % 2 for i in range(400)])  # two queries, each all right or all wrong
    assert [low, high] == [0, 1]


def test_auc_is_the_mean_over_subsets_and_queries_are_drawn_whole():
    scores = tensor([[[9.0], [1.0]], [[5.0], [3.0]], [[5.0], [4.0]], [[2.0], [2.0]], [[NAN], [9.0]]])
    right = [True, False, True, False, True]

    def auc(k, queries=range(5)):
        return vote.auc_over_subsets(lambda index: vote.vote_mean(vote.take(scores, index)), right, queries, 2, k)

    # means 5, 4, 4.5, 2, 9: all right ones above all wrong ones; so one of the wrong ones cannot change it
    assert auc(2) == [1.0, 1.0, 1.0]
    mean, low, high = auc(1)
    assert 0 <= low < mean < high <= 1 and 0.4 < mean < 1
    assert auc(1, ["x"] * 5) == [pytest.approx(mean)] * 3  # one query alone varies with nothing
    of_one_kind = vote.auc_over_subsets(lambda index: vote.vote_mean(vote.take(scores[:2], index)), [True] * 2, "ab", 2, 1)
    assert all(math.isnan(value) for value in of_one_kind)
    once = tensor([[[9.0]], [[5.0]], [[5.0]], [[2.0]], [[NAN]]])
    mean, *_ = vote.auc_over_subsets(lambda index: vote.vote_mean(vote.take(once, index)), right, range(5), 1, 1)
    assert mean == pytest.approx((2 + 1.5 + 1) / 6)


def two_items():
    """Items and 4 samples of each: of the first, 3 of 4 samples are wrong by one point and one is right by nine; the second always ties."""
    items = [vote.Preference("p", ["aa", "b"], [1, 0], "x"), vote.Preference("q", ["a", "bb"], [0, 1], "y"), vote.Preference("r", ["a"], [1], "z"),
             vote.Preference("s", ["a"], [0], "z")]
    samples = [judged(items[0], [0, 1], [4, 5])] * 3 + [judged(items[0], [1, 0], [1, 10])] + [judged(items[1], [1, 0], [6, 6], 1)] * 4
    samples += [judged(items[2], [0], [8], 2)] * 4 + [judged(items[3], [0], [3], 3)] * 4
    greedy = [judged(items[0], [0, 1], [4, 5]), judged(items[1], [0, 1], None, 1), judged(items[2], [0], [8], 2), judged(items[3], [0], [9], 3)]
    return items, greedy, samples


def test_scaling_by_hand():
    items, greedy, samples = two_items()
    result = vote.scaling(items, greedy, samples, 4)
    assert [row["k"] for row in result["curve"]] == [1, 2, 4] and (result["many"], result["single"], result["unreadable"]) == (2, 2, 0)
    one, two, four = result["curve"]
    # item 1 alone: right in one sample of 4; two samples: right if the right one is among them (3 of 6 pairs); all four: right. Item 2 ties.
    assert [row["sum"]["accuracy"][0] for row in (one, two, four)] == pytest.approx([(0.25 + 0.5) / 2, (0.5 + 0.5) / 2, (1 + 0.5) / 2], abs=1e-9)
    assert [row["gain"][0] for row in (one, two, four)] == pytest.approx([0, 0.125, 0.375]) and one["gain"][1:] == [0, 0]
    # the majority: wrong in all fours; of a pair with the right one, it ties
    assert [row["majority"]["accuracy"][0] for row in (one, two, four)] == pytest.approx([0.375, (0.25 + 0.5) / 2, 0.25], abs=1e-9)
    assert four["sum"]["strict"][0] == 0.5 and four["sum"]["ties"][0] == 0.5
    assert result["longest"][0] == 1 and result["greedy"]["accuracy"][0] == 0.25  # wrong, and unreadable: a tie
    assert [row["auc"][0] for row in (one, two, four)] == [1, 1, 1] and result["greedy"]["auc"][0] == 0
    assert [row["space"] for row in (one, two, four)] == [10, 19, 37]
    assert four["seen"] == 5  # 22 and 16, 24 and 24, 32, 12
    assert result["by_subset"]["x"] == {"n": 1, "one": [0.25] * 3, "all": [1] * 3} and set(result["by_subset"]) == {"x", "y"}
    table = vote.table_of_votes("judge", result | {"tokens": 50.0, "parameters": 1000})
    text = " ".join(table.split())
    assert ("k = 4 75.0 [50.0, 100.0] +37.5 [+0.0, +75.0] 25.0 75.0 50.0 50.0 5 37 200 100.0 [100.0, 100.0]" in text
            and "x, 1 items: k = 1 25.0" in text)
    assert all(len(line) <= 150 for line in table.splitlines())


def test_no_more_values_are_seen_than_are_possible():
    items = [vote.Preference(f"q{i}", ["a", "b"], [0, 1]) for i in range(30)]
    samples = [judged(item, [0, 1], [i % 10 + 1, 10 - i % 10] if (i + j) % 3 else None, i) for i, item in enumerate(items) for j in range(2)]
    one, two = vote.scaling(items, samples[::2], samples, 2)["curve"]
    assert one["seen"] == one["space"] == 10  # what cannot be read has no sum: its 0 is no eleventh value
    # 1 to 10 where one of two can be read, and twice that where both can: 2, 4, ..., 20; of 1 to 20
    assert two["seen"] == 15 and two["space"] == 20
    readable = [judged(item, [0, 1], [1, 10], i) for i, item in enumerate(items) for _ in range(2)]
    assert [(row["seen"], row["space"]) for row in vote.scaling(items, readable[::2], readable, 2)["curve"]] == [(2, 10), (2, 19)]


def test_a_total_that_is_no_power_of_two():
    items, greedy, samples = two_items()
    samples = [t for i in range(4) for t in samples[4 * i:4 * i + 3]]
    assert [row["k"] for row in vote.scaling(items, greedy, samples, 3)["curve"]] == [1, 2, 3]


@pytest.mark.parametrize("kinds", [("single",), ("many",)])
def test_data_with_single_responses_alone_or_none(tmp_path, kinds):
    items, greedy, samples = two_items()
    chosen = [0, 1] if kinds == ("many",) else [2, 3]
    result = vote.scaling([items[i] for i in chosen], [greedy[i] for i in chosen], [t for i in chosen for t in samples[4 * i:4 * i + 4]], 4)
    result |= {"tokens": 50.0, "parameters": 1000}
    assert "nan" not in vote.table_of_votes("judge", result)
    vote.plot_votes({"judge": result}, tmp_path / "plot.png")
    assert not blank(tmp_path / "plot.png")


def blank(path):
    """Whether a picture has next to nothing drawn on it."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        shades = picture.convert("L").histogram()
    return sum(shades[:128]) < 500


@pytest.mark.parametrize("count", [1, 3])
def test_lines_stay_apart_in_grey(tmp_path, count):
    items, greedy, samples = two_items()
    result = vote.scaling(items, greedy, samples, 4) | {"tokens": 50.0, "parameters": 10**6}
    vote.plot_votes({f"judge {i}": result | {"parameters": 10**(6 + i)} for i in range(count)}, tmp_path / "plot.png")
    assert not blank(tmp_path / "plot.png")
    figure = vote.Figure()
    axes = figure.subplots()
    vote.draw_curves(axes, {f"judge {i}": ([1, 2], [[0.1, 0, 0.2], [0.3, 0.2, 0.4]]) for i in range(3)}, "k", "accuracy")
    lines = axes.get_lines()
    grey = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue, _ in (line.get_color() for line in lines)]
    assert min(b - a for a, b in zip(grey, grey[1:])) > 0.1
    assert len({line.get_marker() for line in lines}) == len({line.get_linestyle() for line in lines}) == 3
    assert len(axes.collections) == 3  # the bands


class Tags(HTMLParser):
    """The tags of a page, and whether each is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.open += [tag] * (tag != "meta")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">" onclick="alert(3)\'</td></table><style>'


def evil_page():
    talk = [{"role": "user", "content": EVIL + " query"}, {"role": "assistant", "content": EVIL}, {"role": "user", "content": EVIL}]
    item = vote.Preference(talk, [EVIL + " one", EVIL + " two"], [0, 1], EVIL, EVIL, EVIL)
    outputs = [f"Specific Criteria: {EVIL} p\nAnalysis: {EVIL} c\nScores: \\boxed{{9, 1}}", EVIL + " no box"]
    samples = [judged(item, [0, 1], [9, 1], output=outputs[0]), judged(item, [1, 0], None, output=outputs[1]),
               judged(item, [1, 0], [10, 1], output=outputs[0]), judged(item, [1, 0], [8, 2], output=outputs[0])]
    samples[1].reason = "unreadable: no \\boxed{...}" + EVIL
    return vote.page(EVIL, [item], samples, 4)


def test_nothing_in_the_page_can_run():
    page = evil_page()
    tags = Tags(page)
    harmless = "html head meta title style body h1 h2 p b section table tr th td details summary"
    assert not tags.open and {tag for tag, _ in tags.seen} <= set(harmless.split())
    assert {name for _, attributes in tags.seen for name in attributes} <= {"lang", "charset", "http-equiv", "content"}
    assert "default-src 'none'" in page and page.count("<style>") == 1 and "http://" not in page and "https://" not in page
    for what in (" query", " one", " two", " p", " c", " no box"):
        assert EVIL + what in tags.text  # shown, as text


def test_the_page_shows_how_the_sum_decided():
    text = " ".join(Tags(evil_page()).text.split())
    assert "The vote saved a wrong first sample" in text
    assert "unreadable: no \\boxed{...}" in text and "Response 1 is y2, Response 2 is y1" in text
    rows = [re.sub("<[^>]*>", " ", row.replace("<b>", "*")).split() for row in evil_page().split("<tr>")]
    # true reward, sum, choices: the sum and two of three choices are right
    assert [row[-3:] for row in rows[2:4]] == [["0", "12", "1"], ["*1", "*19", "*2"]]
    # scores, and sums so far: 9 and 1; the same again; 1 + 9 and 10 + 1; 2 + 10 and 8 + 11
    assert [row[1:5] for row in (rows[5], rows[7], rows[8])] == [["*9", "1", "*9", "1"], ["1", "*10", "10", "*11"], ["2", "*8", "12", "*19"]]


def test_the_page_rounds_no_sum_and_no_reward():
    item = vote.Preference("q", ["a", "b"], [0.9996, 1])
    samples = [judged(item, [0, 1], [9, 8])] + [judged(item, [0, 1], [8, 9])] * 127
    text = Tags(vote.page("judge", [item], samples, 128)).text
    assert all(number in text for number in ("0.9996", "1025", "1151", "127"))


def test_a_page_without_a_story():
    item = vote.Preference("q", ["a", "b"], [0, 1])
    assert "No vote saved" in Tags(vote.page("judge", [item], [judged(item, [0, 1], [1, 2])] * 2, 2)).text


def no_load():
    raise AssertionError("the model is not needed")


def test_samples_are_kept_and_a_cut_off_file_goes_on_to_the_same(tmp_path):
    items, load = vote.load_lines(EVAL)[:7], vote.functools.cache(lambda: vote.load_model(JUDGE))
    (tmp_path / "a").mkdir()

    def judge(load, out, at_once=1024):
        return vote.judge_items("samples", str(JUDGE), load, vote.ballots(items, 3, "0 vote"), 0.5, OPTIONS, out, at_once)

    whole, facts = judge(load, tmp_path / "a", at_once=6)  # 4 chunks
    [path] = (tmp_path / "a").glob("samples-*.jsonl")
    assert path.stem.removeprefix("samples-").isalnum() and len(path.stem) == len("samples-") + 8
    assert len(whole) == 21 and [t.item for t in whole] == [i for i in range(7) for _ in range(3)]
    assert facts["parameters"] == sum(p.numel() for p in load()[0].parameters()) and 20 < facts["tokens"] <= 161
    for t in whole:
        item = items[t.item]
        assert [item.responses[i] for i in t.order] == t.responses and not t.hinted and not t.binary and t.query == item.query
    assert any(t.order != sorted(t.order) for t in whole)
    assert judge(no_load, tmp_path / "a") == (whole, facts)  # taken over, without a model
    text, known = path.read_bytes(), path.stat()
    judge(no_load, tmp_path / "a")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (known.st_ino, known.st_mtime_ns)  # what is whole is not written again
    for name in (path.name, path.with_suffix(".json").name):
        (tmp_path / "b" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "b" / path.name).write_bytes(text[:len(text) * 3 // 5])  # in the middle of a line
    assert judge(load, tmp_path / "b", at_once=6) == (whole, facts)
    assert (tmp_path / "b" / path.name).read_bytes() == text
    greedy, _ = vote.judge_items("greedy", str(JUDGE), load, [vote.show(item, i, None) for i, item in enumerate(items)], 0.0, OPTIONS, tmp_path / "a")
    assert [t.order for t in greedy] == [list(range(len(item.responses))) for item in items]
    assert len(list((tmp_path / "a").glob("*.jsonl"))) == 2


def test_whatever_decides_the_samples_names_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr(vote, "judge", lambda *_: None)
    items = vote.load_lines(EVAL)[:3]
    model = SimpleNamespace(num_parameters=lambda: 1)
    tokenizer = vote.load_model(JUDGE)[1]
    names = set()

    def files(name=str(JUDGE), items=items, kind="samples", k=3, temperature=0.5, seed=0, **changed):
        vote.judge_items(kind, name, lambda: (model, tokenizer), vote.ballots(items, k, f"{seed} vote"), temperature, options(seed=seed, **changed),
                         tmp_path)
        new = {path.name for path in tmp_path.glob("*.jsonl")} - names
        names.update(new)
        return len(new)

    shutil.copytree(JUDGE, tmp_path / "judge")
    assert files() == 1 and files() == 0 and files(batch_size=3) == 0  # how many rows go together changes no distribution
    for changed in ({"k": 4}, {"temperature": 0.6}, {"seed": 1}, {"max_new_tokens": 100}, {"quantize": "nf4"}, {"items": items[:2]},
                    {"items": items[::-1]}, {"kind": "greedy"}, {"name": "owner/model"}):
        assert files(**changed) == 1, changed
        assert files(**changed) == 0
    assert files(name=str(tmp_path / "judge")) == 0  # the same files elsewhere
    os.utime(tmp_path / "judge" / "model.safetensors", (1, 1))  # trained anew, into the same folder
    assert files(name=str(tmp_path / "judge")) == 1
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "judge")}))
    before = vote.fingerprint(str(tmp_path / "lora"))
    os.utime(tmp_path / "judge" / "model.safetensors", (2, 2))  # an adapter is another judge on another base
    assert vote.fingerprint(str(tmp_path / "lora")) != before


def test_a_fingerprint_of_what_cannot_be_loaded(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "README.md").symlink_to(tmp_path / "nowhere")
    assert [name for name, *_ in vote.fingerprint(str(tmp_path))] == ["adapter_config.json"]
    for base in (str(tmp_path), None, 5, ["x"]):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert [name for name, *_ in vote.fingerprint(str(tmp_path))] == ["adapter_config.json"]
    (tmp_path / "other").mkdir()
    for folder, base in ((tmp_path, tmp_path / "other"), (tmp_path / "other", tmp_path)):  # each names the other
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert [name for name, *_ in vote.fingerprint(str(tmp_path))] == ["adapter_config.json"] * 2
    assert vote.fingerprint("x" * 300) == ["x" * 300] and vote.fingerprint("owner/model") == ["owner/model"]


def test_end_to_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    run(monkeypatch, tmp_path, *TINY, "--html")
    told = capsys.readouterr().out
    assert "tiny/judge: 4 samples of each of the first 8 items" in told and "k = 4 " in told and "gain over k = 1" in told
    out = tmp_path / "runs" / "04_voting"
    results = json.loads((out / "results.json").read_text())
    [result] = results["models"].values()
    assert [row["k"] for row in result["curve"]] == [1, 2, 4] and result["parameters"] > 10**6 and results["settings"]["k"] == 4
    assert not blank(out / "voting.png") and results["versions"].keys() == {"torch", "transformers"}
    assert "How the votes were decided" in Tags((out / "votes.html").read_text()).text
    [path] = out.glob("samples-*.jsonl")
    assert len(vote.read_trajectories(path)) == 32
    # again, beside a copy that passes for step 3's model, which is taken by default: the samples of the first are taken over
    shutil.copytree(JUDGE, tmp_path / "runs" / "03_grpo" / "model")
    monkeypatch.setattr(vote, "load_model", lambda name, _, load=vote.load_model: no_load() if "tests" in str(name) else load(name))
    os.utime(tmp_path / "runs" / "03_grpo" / "model" / "model.safetensors")
    run(monkeypatch, tmp_path, *TINY)
    assert "runs/03_grpo/model: 4 samples of each" in capsys.readouterr().out
    run(monkeypatch, tmp_path, *TINY, "--model", JUDGE, "--model", "runs/03_grpo/model")
    told = capsys.readouterr().out
    assert told.count("32 of 32 judgements are taken over from") == 2 and "sum, percent [95% interval]" in told
    both = json.loads((out / "results.json").read_text())["models"]
    assert list(both) == [str(JUDGE), "runs/03_grpo/model"] and both[str(JUDGE)] == result
    assert both[str(JUDGE)]["curve"] == both["runs/03_grpo/model"]["curve"]  # the same weights, the same seed


def test_interrupted_says_how_to_go_on(tmp_path, monkeypatch):
    calls = []

    def judge(*arguments, judge=vote.judge):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        judge(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted; go on with: python 04_voting.py --limit 8 --k 4"):
        patch.setattr(vote, "judge", judge)
        run(patch, tmp_path, *TINY)
    assert [path.name[:6] for path in (tmp_path / "runs" / "04_voting").glob("*.jsonl")] == ["greedy"]
    run(monkeypatch, tmp_path, *TINY)
    assert (tmp_path / "runs" / "04_voting" / "results.json").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--data", "missing.jsonl"], "error: missing.jsonl: No such file"),
    (["--data", "columns.jsonl"], "error: columns.jsonl:1: expected query, responses, rewards; convert it with: python 01_pointwise_grm.py"),
    (["--data", "tie.jsonl"], "error: tie.jsonl:2: a tie"),
    (["--out", "tie.jsonl"], "error: cannot write tie.jsonl: File exists; make room and go on"),
    (["--model", "nobody/nothing", "--limit", "2"], "error: cannot load the model nobody/nothing"),
    (["--k", "0"], "--k must be from 1 to"),
    (["--batch-size", "0"], "--batch-size must be from 1 to"),
    (["--temperature", "nan"], "--temperature must be from 0 to 100"),
    (["--quantize", "int3"], "argument --quantize: invalid choice")])
def test_bad_input_gets_one_clear_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    good = '{"query": "x", "responses": ["a", "b"], "rewards": [0, 1]}\n'
    (tmp_path / "columns.jsonl").write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "tie.jsonl").write_text(good + good.replace("0, 1", "1, 1"))
    assert message in refusal(monkeypatch, capsys, tmp_path, "04_voting.py", *arguments)


@pytest.mark.parametrize("line", ["{", "[1]", '{"item": 1}', '{"surprise": 1}'])
def test_a_spoilt_file_of_samples_is_named(tmp_path, line):
    item = vote.Preference("q", ["a", "b"], [0, 1])
    (tmp_path / "samples.jsonl").write_text(judged(item, [0, 1], [1, 2]).line() + line + "\n")
    with pytest.raises(vote.DataError, match="samples.jsonl:2: not a sampled judgement; delete the file"):
        vote.read_trajectories(tmp_path / "samples.jsonl")
