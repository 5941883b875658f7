"""Step 4: votes, subsets, the scaling curve and its plot, on numbers worked out by hand."""

import importlib
import json
import math

import pytest
import torch
from conftest import load_script

voting = load_script("04_voting")
NAN, LOW = math.nan, -math.inf
VOTES = [voting.vote_sum, voting.vote_mean, voting.vote_majority]


def same(found: torch.Tensor, expected) -> None:
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, equal_nan=True)


def test_votes_by_hand():
    """Four samples of two items. The second has two responses; one sample cannot be read."""
    first = [[5, 6, 1], [5, 6, 1], [9, 1, 2], [4, 4, 4]]
    second = [[3, 7, LOW], [NAN, NAN, LOW], [8, 2, LOW], [8, 5, LOW]]
    scores = torch.tensor([first, second], dtype=torch.float64)
    same(voting.vote_sum(scores), [[23, 17, 8], [19, 14, LOW]])
    same(voting.vote_mean(scores), [[23 / 4, 17 / 4, 2], [19 / 3, 14 / 3, LOW]])
    same(voting.vote_majority(scores), [[1 + 1 / 3, 2 + 1 / 3, 1 / 3], [2, 1, LOW]])
    unreadable = torch.tensor([[NAN, NAN, LOW]] * 2, dtype=torch.float64)
    for vote in VOTES:
        same(vote(unreadable), [0, 0, LOW])
        same(vote(scores[:, None, :2]), vote(scores[:, :2])[:, None].tolist())
    # both have two and a third of the votes: rounding must not decide
    rows = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]]
    votes = voting.vote_majority(torch.tensor(rows, dtype=torch.float64))
    assert votes[0] == votes[1]


@pytest.mark.parametrize("total, k", [(8, 1), (8, 2), (8, 3), (8, 8), (1, 1)])
def test_subsets_of_a_round_share_no_sample(total, k):
    numbers = torch.arange(total).expand(5, total)
    rounds = list(voting.subsets(numbers, k))
    assert len(rounds) == (1 if k in (1, total) else 100)
    for index in rounds:
        assert index.shape == (5, total // k, k)
        for of_item in index.flatten(1).tolist():
            assert len(set(of_item)) == total // k * k and set(of_item) <= set(range(total))
    if len(rounds) > 1:
        assert len({str(index.tolist()) for index in rounds}) > 90
        counts = torch.stack(rounds).flatten().bincount()
        assert (counts / counts.sum() - 1 / total).abs().max() < 0.03
    scores = torch.arange(5 * total * 2).view(5, total, 2)
    taken = next(voting.subsets(scores, k))  # alike, whatever the values are
    assert taken.shape == (5, total // k, k, 2)
    assert torch.equal(taken[2, -1, 0], scores[2, rounds[0][2, -1, 0]])


def test_right_and_tied_by_hand():
    votes = [[[9, 4, 3], [4, 9, 9], [1, 1, 1], [2, 5, 2]], [[3, 8, LOW]] * 4]
    found = voting.right_and_tied(torch.tensor(votes), torch.tensor([1, 1]))
    same(found, [[(1 / 2 + 1 / 3 + 1) / 4, 1], [1 / 4, 1], [2 / 4, 0]])


def judged(number, rewards, order, scores) -> tuple:
    item = voting.Judgement(f"q{number}", [f"r{i}" for i in range(len(rewards))], rewards)
    one = voting.show(item, number, order)
    one.scores = scores
    return item, one


def test_scores_are_put_back_into_the_items_order():
    rows = [(0, [0, 2, 1], [2, 0, 1], [7, 3, 5]), (0, [0, 2, 1], [0, 1, 2], None)]
    rows += [(1, [1, 0], [1, 0], [4, 9]), (1, [1, 0], [0, 1], [9, 4])]
    found = voting.score_tensor([judged(*row)[1] for row in rows], 2)
    torch.testing.assert_close(found[1], found[1][[1, 0]])
    same(found[:, 0], [[3, 5, 7], [9, 4, LOW]])
    assert found[0, 1, :2].isnan().all()


def test_scaling_on_numbers_worked_out_by_hand(capsys):
    """q0 is right in three of four samples, but its sum is wrong; one of q1 cannot be read."""
    rows = [(0, [0, 1], [0, 1], [5, 6])] * 2 + [(0, [0, 1], [1, 0], [1, 9])]
    rows += [(0, [0, 1], [1, 0], [6, 5])] + [(1, [1, 0], [0, 1], [8, 2])] * 3
    rows += [(1, [1, 0], [0, 1], None)]
    rows[4:4] = [(2, [1], [0], [9])] * 4  # a single response has no part in it
    items, samples = zip(*[judged(*row) for row in rows])
    values = voting.scaling([one for one in samples if len(one.rewards) > 1], 4)
    many = [item for item in items[::4] if len(item.responses) > 1]
    curve = voting.print_table("judge", values, many)
    assert "81.2 +-  6.2" in capsys.readouterr().out
    expected = {  # of q0 and q1; of two pairs of q0's samples, one holds the [9, 1]
        1: {"sum": [0.75, 0.875], "majority": [0.75, 0.875], "strict": [0.75, 0.75]},
        2: {"sum": [0.5, 1], "majority": [0.75, 1], "strict": [0.5, 1]},
        4: {"sum": [0, 1], "majority": [1, 1], "strict": [0, 1]},
    }
    for k, row in expected.items():
        assert values[k]["sum"].tolist() == pytest.approx(row["sum"])
        for name, (first, second) in row.items():
            assert curve[k][name]["mean"] == pytest.approx((first + second) / 2), (k, name)
            assert curve[k][name]["se"] == pytest.approx(abs(first - second) / 2)
        assert curve[k]["mean"]["mean"] == curve[k]["sum"]["mean"]
        assert curve[k]["gain over k = 1"]["mean"] == pytest.approx(sum(row["sum"]) / 2 - 0.8125)
        assert curve[k]["sum"]["n"] == 2
    assert [curve[k]["ties"]["mean"] for k in (1, 2, 4)] == [0.125, 0, 0]


def test_powers_and_a_plot_of_names_that_look_like_formulas(tmp_path):
    assert [voting.powers(k) for k in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    plot, path = importlib.import_module("plot"), tmp_path / "results.json"  # of tests/tools
    curve = {k: {"sum": {"mean": 0.5 + k / 100, "se": 0.02}} for k in (1, 2, 4)}
    path.write_text(json.dumps({"figures": {"$^$_a/model": curve, "b_{c": curve, "b minus a": {}}}))
    plot.plot(plot.curves_of(tmp_path), tmp_path / "voting.png")
    row = {name: {"mean": 0.5, "se": 0.1} for name in ("guided", "oracle")}
    guided = {"settings": {"k_meta": 0.5}, "rows": {"4 of 8": row, "8 of 8": row}}
    names = []
    for name in ("first", "second"):  # the curves of two runs of step 5 stay apart
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(guided))
        names += plot.curves_of(tmp_path / name)
    assert names == ["guided, first", "oracle, first", "guided, second", "oracle, second"]
    assert (tmp_path / "voting.png").read_bytes().startswith(b"\x89PNG")
