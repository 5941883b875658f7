"""README's block of commands for a small Gemma, with the embedded judge and very little of all."""

import glob
import json
import re
import shlex
import subprocess
import sys

from conftest import JUDGE, ROOT, run_here

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
