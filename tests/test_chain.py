"""Steps 2 to 5 from end to end with the embedded judge, on very little: files, resuming, ranks."""

import json
import math
import shutil
import signal
from dataclasses import asdict

import pytest
import torch
from conftest import JUDGE, load_script, refusal, run_here, start, wait_for_lines
from safetensors.torch import load_file
from test_step2 import RIGHT, WRONG, Cut, judged, train_tiny

SHORT = ["--max-new-tokens", 160, "--limit"]
STEP2 = ["02_rejective_ft.py", "--epochs", 1, *SHORT, 10]
STEP3 = ["03_grpo.py", "--prompts", 2, "--group-size", 4, "--steps", 2, *SHORT, 6]
STEP4 = ["04_voting.py", "--k", 4, *SHORT, 12]
STEP5 = ["05_metarm.py", "--epochs", 2]
FILES = {
    "runs/02_rejective_ft": "trajectories hard log model/model.safetensors",
    "runs/03_grpo": "rollouts/0001 rollouts/0002 log model/adapter_model.safetensors",
    "runs/04_voting": "samples_1",
    "runs/05_metarm": "rewards log model/adapter_model.safetensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the four steps ran, one after the other, by their default names."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        for command in (STEP2, STEP3, STEP4, STEP5):
            run_here(patch, folder, *command)
    return folder


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def figures(results) -> list[dict]:
    """The figures, {"mean", "se", "n"}, that stand anywhere in results and are of some items."""
    if not isinstance(results, (dict, list)):
        return []
    if isinstance(results, dict) and "n" in results:
        return [results] * (results["n"] > 0)
    inner = results.values() if isinstance(results, dict) else results
    return sum(map(figures, inner), [])


def same_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (other[name] - weight).norm() <= 1e-4 * weight.norm() + 1e-6, name


def same_runs(whole, cut, names) -> None:
    """Whether two runs saved the same adapters, and files of the same steps or items."""
    same_weights(*[load_file(run / "model/adapter_model.safetensors") for run in (whole, cut)])
    for name in names:
        one, other = lines_of(whole / name), lines_of(cut / name)
        for key in ("step", "item"):
            assert [line.get(key) for line in one] == [line.get(key) for line in other], name


@pytest.mark.parametrize("step", FILES)
def test_a_step_leaves_its_files_and_finite_figures(step, folder):
    for name in FILES[step].split():
        assert (folder / step / (name if "." in name else f"{name}.jsonl")).stat().st_size, name
    results = json.loads((folder / step / "results.json").read_text())
    found = figures(results)
    assert len(found) > 5 or step < "runs/04"
    assert all(math.isfinite(row["mean"]) and math.isfinite(row["se"]) for row in found)
    assert results["settings"] == json.loads((folder / step / "settings.json").read_text())
    if "log" in FILES[step]:
        steps = [line["step"] for line in lines_of(folder / step / "log.jsonl")]
        assert steps and steps == list(range(1, len(steps) + 1))
    assert not list((folder / step).rglob("*.part"))


def test_a_step_finds_what_the_earlier_ones_left(folder):
    settings = [json.loads((folder / step / "settings.json").read_text()) for step in FILES]
    assert settings[1]["model"] == "runs/02_rejective_ft/model"
    assert settings[1]["data"] == "runs/02_rejective_ft/hard.jsonl"
    assert settings[2]["model"] == ["runs/03_grpo/model"]
    assert settings[3]["samples"] == "runs/04_voting/samples_1.jsonl"
    lines = lines_of(folder / "runs/02_rejective_ft/trajectories.jsonl")
    assert {"kept", "wrong"} <= {line["reason"] for line in lines}
    easy = {line["item"] for line in lines if line["reason"] == "too easy"}
    assert len(lines_of(folder / "runs/02_rejective_ft/hard.jsonl")) == 10 - len(easy)
    rollouts = sorted((folder / "runs/03_grpo/rollouts").iterdir())
    assert [len(lines_of(path)) for path in rollouts] == [2 * 4] * 2
    learnt = ["runs/02_rejective_ft/trajectories.jsonl", "runs/03_grpo/rollouts/0002.jsonl"]
    assert settings[3]["learn"] == learnt
    before = load_file(JUDGE / "model.safetensors")
    after = load_file(folder / "runs/02_rejective_ft/model/model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_step_4_leaves_out_what_a_model_learnt_from(folder, monkeypatch, capsys, tmp_path):
    """The model learnt from 10 of 40 items."""
    lines = (JUDGE.parent / "train.jsonl").read_text().splitlines()[:40]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    settings = json.loads((folder / "runs/02_rejective_ft/settings.json").read_text())
    settings |= {"data": "all.jsonl", "limit": 10, "model": str(JUDGE)}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    (tmp_path / "run" / "model").symlink_to(folder / "runs/02_rejective_ft/model")
    command = "04_voting.py --model run/model --data all.jsonl --k 1 --max-new-tokens 40".split()
    run_here(monkeypatch, tmp_path, *command)
    items = [json.loads(line) for line in lines]
    learnt = {item["query"] for item in items[:10]}
    others = [item["query"] for item in items if item["query"] not in learnt]
    many = [item["query"] for item in items if len(item["responses"]) > 1]
    judged = [one["query"] for one in lines_of(tmp_path / "runs/04_voting/samples_1.jsonl")]
    assert judged == [query for query in others if query in many] and 10 < len(judged) < len(many)
    told = refusal(monkeypatch, capsys, tmp_path, *command, "--limit", 10)
    assert "nothing to judge" in told


def test_a_report_shows_each_step_that_was_run_and_escapes_what_was_written(folder, tmp_path):
    import report  # of tests/tools

    runs = tmp_path / "runs"
    shutil.copytree(folder / "runs", runs)
    lines = lines_of(runs / "04_voting/samples_1.jsonl")
    for line in lines:
        line["output"] = "<script>alert(1)</script>" + line["output"]
    (runs / "04_voting/samples_1.jsonl").write_text("".join(json.dumps(o) + "\n" for o in lines))
    settings = json.loads((runs / "05_metarm/settings.json").read_text())
    settings["samples"] = str(runs / "04_voting/samples_1.jsonl")
    (runs / "05_metarm/settings.json").write_text(json.dumps(settings))
    page = "".join(report.sections(runs))
    for step in (2, 3, 4, 5):
        assert f"<h2>Step {step}:" in page
    assert "<h2>Step 1" not in page and "<script>" not in page and "&lt;script&gt;" in page


def test_a_report_compares_one_judgement_with_one(tmp_path):
    """The second item's first sample is right; a later sample of the first item is not looked at."""
    import report  # of tests/tools

    def write(name, judged):
        lines = []
        for query, scores in judged:
            one = {"query": query, "responses": ["a", "b"], "rewards": [1, 0], "scores": scores}
            lines.append(json.dumps(one | {"correct": scores == [9, 1], "output": str(scores)}))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines))

    write(report.JUDGED, [("one", [2, 8]), ("two", [3, 7])])
    write(report.SAMPLES, [("one", [4, 4]), ("one", [9, 1]), ("two", [4, 4])])
    assert report.before_and_after(tmp_path) == ""
    write(report.SAMPLES, [("one", [4, 4]), ("one", [9, 1]), ("two", [9, 1])])
    page = report.before_and_after(tmp_path)
    assert "[3, 7]: wrong" in page and "[9, 1]: right" in page and "[2, 8]" not in page


def test_a_report_says_that_the_judge_is_lost(tmp_path):
    import report  # of tests/tools

    path = tmp_path / "log.jsonl"

    def told(**changes):
        line = {"signal": 0.5, "unreadable": 0.1, "kl": 0.01}
        lines = [{"step": step, **line} for step in range(1, 13)]
        for number, change in changes.items():
            lines[int(number[1:])] |= change
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return report.collapse(path)

    assert told() == []
    quiet = told(**{f"_{i}": {"signal": 0.0} for i in range(2, 12)})
    assert len(quiet) == 1 and "From step 3 on" in quiet[0]
    assert told(**{f"_{i}": {"signal": 0.0} for i in range(2, 11)}) == []
    lost = told(_4={"unreadable": 0.6}, _7={"kl": 1.5}, _8={"kl": 2.0})
    assert ["At step 5, unreadable" in lost[0], "At step 8, kl" in lost[1]] == [True, True]


def test_killed_in_training_and_resumed(folder, monkeypatch, capsys):
    command = [*STEP5, "--out", "cut"]
    process = start(folder, *command)
    wait_for_lines(process, folder / "cut" / "log.jsonl", 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    told = refusal(monkeypatch, capsys, folder, *command, "--resume", "--lr", 0.5)
    assert "lr" in told
    run_here(monkeypatch, folder, *command, "--resume")
    same_runs(folder / "runs/05_metarm", folder / "cut", ["log.jsonl", "rewards.jsonl"])


def test_step_3_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """With made-up rollouts, for speed: 54 steps, cut off in the 54th, after the checkpoint."""
    grpo, last, command = load_script("03_grpo"), [53], [*STEP3, "--steps", 54]

    def roll_out(model, tokenizer, items, args, step):
        if step == last[0]:
            raise Cut
        torch.manual_seed(step)
        outputs = torch.randint(3, 700, (2, 4)).tolist()
        known = {"prompt": [5, 6], "completion": sum(outputs, []), "outputs": outputs}
        known |= {"advantages": [1, -1], "rewards": [1, -1]}
        known["judgements"] = [judged(RIGHT, number=step)] * (args.prompts * args.group_size)
        return [grpo.Group(**known)]

    monkeypatch.setattr(grpo, "roll_out", roll_out)
    with pytest.raises(Cut):
        run_here(monkeypatch, tmp_path, *command, "--out", "cut")
    last[0] = None
    run_here(monkeypatch, tmp_path, *command, "--out", "cut", "--resume")
    run_here(monkeypatch, tmp_path, *command, "--out", "whole")
    files = ["log.jsonl", *(f"rollouts/{number:04}.jsonl" for number in range(1, 55))]
    same_runs(tmp_path / "whole", tmp_path / "cut", files)


DRIVER = """
import sys, torch
sys.path.insert(0, {tests!r})
from conftest import load_script
from pathlib import Path
from test_step2 import train_tiny
torch.distributed.init_process_group()  # once: to begin anew is slow
torch.distributed.init_process_group = print
for script, *options in {commands!r}:
    sys.argv = [script, *options]
    module = load_script(Path(script).stem)
    module.start(module.main)
weights = [train_tiny(Path(str(size)), size=size)[0] for size in (3, 1)]
torch.save(weights, f"weights_{{module.RANK}}.pt")
"""


def test_two_ranks_do_what_one_does(tmp_path):
    """In one start: steps 2 and 3, and two trainings, of which one leaves the second rank idle."""
    data = ["--model", JUDGE, "--data", JUDGE.parent / "train.jsonl"]  # the same for both ranks
    commands = [STEP2, [*STEP3, *data]]
    commands = [list(map(str, command)) for command in commands]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(tests=str(JUDGE.parents[1]), commands=commands))
    process = start(tmp_path, driver, ranks=2)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told[-3000:]
    for step in list(FILES)[:2]:
        assert (tmp_path / step / "results.json").exists()
        for name in FILES[step].split():
            assert (tmp_path / step / (name if "." in name else f"{name}.jsonl")).exists(), name
    alone = [train_tiny(tmp_path / f"alone{size}", size=size)[0] for size in (3, 1)]
    for size in (3, 1):
        logs = [tmp_path / name / "run/log.jsonl" for name in (f"alone{size}", str(size))]
        losses = [[line["loss"] for line in lines_of(log)] for log in logs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for rank in (0, 1):
        for one, other in zip(alone, torch.load(tmp_path / f"weights_{rank}.pt"), strict=True):
            same_weights(one, other)


@pytest.mark.parametrize(
    "command, told",
    [
        ("02_rejective_ft.py --data missing.jsonl", "missing.jsonl"),
        ("02_rejective_ft.py --data broken.jsonl", "broken.jsonl:2"),
        ("02_rejective_ft.py --data empty.jsonl", "empty.jsonl"),
        ("02_rejective_ft.py --model folder", "folder"),
        ("02_rejective_ft.py --resume --out none", "none/settings.json"),
        ("02_rejective_ft.py --lr fast", "--lr"),
        ("01_pointwise_grm.py --limit 0", "no items"),
        ("02_rejective_ft.py --limit 0", "rejected"),
        ("03_grpo.py --group-size 1", "--group-size"),
        ("03_grpo.py --prompts 0", "--prompts"),
        ("04_voting.py --k 0", "--k"),
        ("04_voting.py --data folder", "folder"),
        ("05_metarm.py --samples missing.jsonl", "missing.jsonl"),
        ("05_metarm.py --samples samples_1.jsonl", "--learn"),
        ("05_metarm.py --samples samples_1.jsonl --learn learn.jsonl", "settings.json"),
        ("05_metarm.py --samples uneven.jsonl --learn learn.jsonl", "samples of an item"),
    ],
)
def test_a_bad_input_is_one_line(command, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder").mkdir()
    lines = [json.dumps(asdict(judged(*row))) for row in ((RIGHT, (0, 1)), (WRONG, (0, 1), 1, "b"))]
    texts = {"good": lines[0], "broken": lines[0] + "\n{", "empty": "", "samples_1": lines[0]}
    texts["uneven"] = "\n".join([lines[0], *lines])
    for name, text in (texts | {"learn": lines[1] + "\n" + lines[1].replace('"b"', '"c"')}).items():
        (tmp_path / f"{name}.jsonl").write_text(
            text.replace('"correct": false', '"correct": true', 1)
        )
    assert told in refusal(monkeypatch, capsys, tmp_path, *command.split())
