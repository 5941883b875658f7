"""The exercises: each check fails on the script as it is, passes with the solution, and fails on plausible mistakes."""
import ast
import fnmatch
import inspect
import os
import re
import subprocess
import sys

import exercises
import pytest
from conftest import ROOT

SOLUTIONS = {path.stem: path for path in sorted((ROOT / "tests" / "solutions").glob("*.py"))}
CHECKS = {match.group(1): check for name, check in vars(exercises).items() if (match := re.match(r"test_(0[0-9]_[0-9])_", name))}

# Changes of the solutions, by exact text, that a student might make.
MISTAKES = {
    "01_1": [("0.425", "0.0"), ("0.0, 1.0", "0.425, 1.0")],
    "01_2": [("[response]", "item.responses"), ("1, 0.0))", "1, 1.0))"),
             ("None if None in of_item else [score for [score] in of_item]", "[score and score[0] for score in of_item]")],
    "01_3": [("read_judgement(start + ", "read_judgement("), (' + tokenizer(start, add_special_tokens=False)["input_ids"]', "")],
    "02_1": [("0.288", "0.512"), ("0.375", "0.5")],
    "02_2": [("any(other.correct", "all(other.correct"), ("needed_only and t.hinted", "needed_only"), ("args.needed_only)", "True)")],
    "02_3": [("(0, None, 1)", "(0, None, 0)"), ("args.temperature", "0.0"), ("best response", "worst response")],
    "03_1": [("0.661", "0.4375"), ("if divide else", "if not divide else")],
    "03_2": [('"k1"', '"k3"'), ("** 2 / 2", "** 2"), ("log_probs - reference\n", "reference - log_probs\n")],
    "03_3": [("0.016", "0.05"), ("- penalty * tokens", "+ penalty * tokens"), ("len(output.ids)", "len(output.text)")],
    "04_1": [("17", "9"), ("[9, 1]", "[5, 4]")],
    "04_2": [("order[turn:] + order[:turn]", "order"), (" {number}", ""), (" {block}", "")],
    "04_3": [("> 9 *", ">= 9 *"), ("> 9 *", "> 10 *"), ("9 * (len(scores) - used)", "0")],
    "05_1": [("15 / 16", "1.0"), ("13 / 16", "11 / 16")],
    "05_2": [("rewards.sigmoid()", "rewards.softmax(-1)"), ("torch.where(chosen.isfinite(), chosen * weights, 0.0)", "(chosen * weights)")],
    "05_3": [(" & (item[:, None] == item)", ""), ("rewards - rewards[:, None]", "rewards[:, None] - rewards"), (" / max(1, len(losses))", "")],
}


def spans(text: str) -> dict[str, tuple[int, int]]:
    """The top-level functions and constants of a text: name -> (first line, line after the last), counted from 0."""
    found = {}
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, ast.FunctionDef) else [t.id for t in node.targets] if isinstance(node, ast.Assign) else []
        found |= {name: (node.lineno - 1, node.end_lineno) for name in names}
    return found


def solve(script: str, solution: str) -> str:
    """The script with a solution: its functions take the place of those of the same name, new ones and constants stand above main(), and of each
    pair in its REPLACE, the first text, which must occur once, becomes the second."""
    for name, (first, end) in spans(solution).items():
        piece, lines, places = solution.splitlines()[first:end], script.splitlines(), spans(script)
        if name == "REPLACE":
            for old, new in ast.literal_eval("\n".join(piece).partition("=")[2].strip()):
                assert script.count(old) == 1, f"{script.count(old)} times in the script, which has changed since the solution was written: {old}"
                script = script.replace(old, new)
        else:
            start, stop = places.get(name, (places["main"][0],) * 2)
            script = "\n".join(lines[:start] + piece + ["", ""] * (name not in places) + lines[stop:]) + "\n"
    return script


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(exercise, solution's text or None) runs an exercise's check on a copy of its script; returns what it told the student."""
    def run(exercise, solution=None):
        folder, told = tmp_path / f"copy {len(list(tmp_path.iterdir()))}", []
        (folder / "tests").mkdir(parents=True)
        (folder / "tests" / "tiny").symlink_to(ROOT / "tests" / "tiny")
        [script] = ROOT.glob(f"{exercise[:2]}_*.py")
        text = script.read_text(encoding="utf-8")
        (folder / script.name).write_text(text if solution is None else solve(text, solution), encoding="utf-8")
        (folder / "written").mkdir()
        monkeypatch.setenv("SPCT_SCRIPTS", str(folder))
        offered = {"monkeypatch": monkeypatch, "tmp_path": folder / "written", "tell": told.append}
        CHECKS[exercise](**{name: offered[name] for name in inspect.signature(CHECKS[exercise]).parameters})
        return told
    return run


def test_three_exercises_a_script_each_with_a_solution():
    assert sorted(CHECKS) == sorted(SOLUTIONS) == sorted(MISTAKES) == [f"0{script}_{number}" for script in range(1, 6) for number in range(1, 4)]


@pytest.mark.parametrize("exercise", CHECKS)
def test_the_check_fails_on_the_script_as_it_is(check, exercise):
    with pytest.raises(pytest.fail.Exception) as failure:
        check(exercise)
    assert re.search("yet|should take|unrecognized arguments", str(failure.value)), failure.value


@pytest.mark.parametrize("exercise", CHECKS)
def test_the_check_passes_with_the_solution(check, exercise):
    check(exercise, SOLUTIONS[exercise].read_text(encoding="utf-8"))


@pytest.mark.parametrize("exercise, mistake", [(exercise, mistake) for exercise, mistakes in MISTAKES.items() for mistake in mistakes])
def test_the_check_sees_a_mistake(check, exercise, mistake):
    solution = SOLUTIONS[exercise].read_text(encoding="utf-8")
    code = solution.index('"""', 3) + 3  # behind the docstring
    assert solution.count(mistake[0], code) == 1
    with pytest.raises(pytest.fail.Exception):
        check(exercise, solution[:code] + solution[code:].replace(*mistake))


def test_the_command_of_the_docstrings(tmp_path):
    [script] = ROOT.glob("02_*.py")
    for solution, code, told in (("", 1, "has no constant KEPT yet"), (SOLUTIONS["02_1"].read_text(encoding="utf-8"), 0, "1 passed")):
        (tmp_path / script.name).write_text(solve(script.read_text(encoding="utf-8"), solution), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/exercises.py", "-k", "02_1"], cwd=ROOT, text=True,
                              capture_output=True, env=os.environ | {"SPCT_SCRIPTS": str(tmp_path)}, timeout=600)
        assert done.returncode == code and told in done.stdout and "14 deselected" in done.stdout, done.stdout


def test_a_plain_run_collects_neither_exercises_nor_solutions(request):
    for path in [ROOT / "tests" / "exercises.py", *SOLUTIONS.values()]:
        assert not any(fnmatch.fnmatch(path.name, pattern) for pattern in request.config.getini("python_files"))
