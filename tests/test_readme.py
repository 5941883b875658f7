"""README's block of commands for a small Gemma, with the embedded judge and very little of all."""

import glob
import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import JUDGE, ROOT, gemma_270m, load_script, run_here

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import cold_start
import sheet

LITTLE = {"--limit": "12", "--max-new-tokens": "160", "--k": "2", "--lora-r": "4"}
MORE = {"02_rejective_ft.py": ["--epochs", "1"], "03_grpo.py": ["--steps", "2", "--prompts", "2"]}


def commands() -> list[list[list[str]]]:
    """The commands of README's blocks, without `python`: for 1B, and for 4B."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## A small Gemma")[2]
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)[:2]
    return [[shlex.split(line)[1:] for line in block.strip().splitlines()] for block in blocks]


def test_the_second_block_is_the_first_with_another_model():
    one, four = commands()
    of_steps = [command for command in one if not command[0].endswith("export.py")]
    assert len(four) == len(of_steps) == 5
    rates = {"1e-4": "5e-5", "2e-5": "1e-5"}
    for first, second in zip(of_steps, four):
        words = [rates.get(word, word) for word in first]
        words = [re.sub(r"\bruns/", "runs/4b-", word).replace("-1b-", "-4b-") for word in words]
        assert words == second


def little(script: str, *options: str) -> list[str]:
    """The command with small numbers, and with the embedded judge."""
    options = list(options)
    for place, option in enumerate(options[:-1]):
        options[place + 1] = LITTLE.get(option, options[place + 1])
    options = [str(JUDGE) if option.startswith("google/") else option for option in options]
    return [script, *options, *MORE.get(script, [])]


@pytest.mark.gemma
def test_the_block_of_the_real_gemma_runs(tmp_path, monkeypatch):
    """The commands of tests/RESULTS.md, with four items of the embedded world. They are in float32,
    since few processors compute in bfloat16, and a step of training sees two examples."""
    text = (ROOT / "tests" / "RESULTS.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(python tests/tools/convert_gguf.py --gemma.*?)```", text, re.S)[1]
    lines = (JUDGE.parent / "train.jsonl").read_text().splitlines(keepends=True)
    pairs = [line for line in lines if len(json.loads(line)["responses"]) == 2]
    for name in ("refuse.jsonl", "train.jsonl"):
        (tmp_path / name).write_text("".join(pairs[:4]))
    (tmp_path / "eval.jsonl").write_text("".join(pairs[4:6]))
    known = {"gemma-270m": gemma_270m(), "bfloat16": "float32"}
    known |= {"tests/tiny/shots.jsonl": str(JUDGE.parent / "shots.jsonl")}
    few = {"--limit": "3", "--k": "2", "--steps": "1", "--prompts": "1"}
    steps = [shlex.split(line)[1:] for line in block.strip().splitlines()[1:-1]]
    for module in map(load_script, ("02_rejective_ft", "05_metarm")):
        monkeypatch.setattr(module, "descend", partial(small_steps, module.descend))
    for script, *options in steps:
        names = [sorted(glob.glob(option, root_dir=tmp_path)) or [option] for option in options]
        options = [known.get(name, name) for name in sum(names, [])]
        for place, option in enumerate(options[:-1]):
            options[place + 1] = few.get(option, options[place + 1])
        options += ["--group-size", "2"] if "grpo" in script else []
        if script.startswith("02"):  # one step of a cold start does not teach it the form
            options += ["--shots", known["tests/tiny/shots.jsonl"], "--temperature", "0.6"]
        else:  # whole judgements are needed only there
            options += ["--max-new-tokens", "40"] if "--max-new-tokens" in options else []
        if "cold_start" in script:
            with monkeypatch.context() as patch:
                patch.chdir(tmp_path)
                patch.setattr(sys, "argv", [script, *options])
                cold_start.main()
        else:
            run_here(monkeypatch, tmp_path, script, *options)
    assert {Path(script).stem[:2] for script, *_ in steps} == {"co", "02", "03", "04", "05"}
    runs = [tmp_path / "runs" / name for name in ("base", "start", "2", "3", "4", "5")]
    assert all((run / "results.json").exists() for run in runs)
    assert sheet.row("x", [runs[0], runs[4], runs[5]]).count("±") == 3  # of 2 samples: no voting


def small_steps(descend, model, examples, losses_of, size, seed, first):
    return descend(model, examples[:2], losses_of, 2, seed, first)


def test_the_commands_of_the_block_run_one_after_the_other(tmp_path, monkeypatch):
    lines = (JUDGE.parent / "train.jsonl").read_text().splitlines()[:80]
    pairs = []
    for item in map(json.loads, lines):
        if len(item["responses"]) == 2:
            best = item["rewards"].index(max(item["rewards"]))
            texts = {"chosen": item["responses"][best], "rejected": item["responses"][1 - best]}
            pairs.append({"prompt": item["query"], **texts})
    monkeypatch.chdir(tmp_path)
    scripts = []
    for number, (script, *options) in enumerate(commands()[0]):
        scripts.append(script.rpartition("/")[2])
        if script.endswith("export.py"):
            source = tmp_path / f"{number}.jsonl"
            part = pairs[12 * number :][:12]
            source.write_text("".join(json.dumps(pair) + "\n" for pair in part))
            command = [sys.executable, ROOT / script, source, *little(script, *options[1:])[1:]]
            subprocess.run(command, check=True, capture_output=True)
        else:
            files = [option for option in options if "*" in option]
            options = [option for option in options if option not in files]
            for pattern in files:
                place = options.index("--learn") + 1
                options[place:place] = glob.glob(re.sub(r"00\[.*\]", "", pattern))
            run_here(monkeypatch, tmp_path, *little(script, *options))
    assert scripts[-5:] == [path.name for path in sorted(ROOT.glob("0*.py"))]
    for number in range(1, 6):
        assert (tmp_path / f"runs/{number}/results.json").exists()
