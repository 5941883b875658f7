"""The exercises: a check fails on the script as it is, passes with the solution, sees mistakes."""

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

SOLUTIONS = {path.stem: path.read_text() for path in (ROOT / "tests" / "solutions").glob("*.py")}
CHECKS = {name[5:9]: check for name, check in vars(exercises).items() if name.startswith("test_")}

# Changes of the solutions that a student might make: a text becomes another one.
MISTAKES = {
    "01_1": [("0.425", "0.0"), ("0.0, 1.0", "0.425, 1.0")],
    "01_2": [("[response], [1]", "item.responses, item.rewards"), ("0.0, args", "1.0, args")],
    "01_3": [("[start + ", "["), ("starts[-1])", '"")')],
    "01_4": [("one.responses = []", "pass"), ('.rstrip(".")', ""), ("0.0, args", "1.0, args")],
    "02_1": [("0.288", "0.512"), ("0.375", "0.5")],
    "02_2": [("any(one.correct", "all(one.correct"), ("one.hint and solved", "solved")],
    "02_3": [("(0, None, 1)", "(0, None, 0)"), ("best response", "worst response")],
    "03_1": [("0.661", "0.4375"), ("if divide else", "if not divide else")],
    "03_2": [('"k1"', '"k3"'), ("** 2 / 2", "** 2")],
    "03_3": [("0.016", "0.05"), ("of_one.tokens)", "7)")],
    "04_1": [("17", "9"), ("[9, 1]", "[5, 4]")],
    "04_2": [("order[turn:] + order[:turn]", "order"), (" {part}", ""), ("{seed} ", "")],
    "04_3": [("> 9 *", ">= 9 *"), ("> 9 *", "> 10 *")],
    "05_1": [("15 / 16", "1.0"), ("13 / 16", "11 / 16")],
    "05_2": [("rewards.sigmoid()", "rewards.softmax(-1)"), ("isfinite()", "isnan()")],
    "05_3": [(" & (item[:, None] == item)", ""), (" / max(1, len(losses))", "")],
}


def spans(text: str) -> dict[str, tuple[int, int]]:
    """The top-level functions and constants: name -> (first line, line after the last)."""
    found = {}
    for node in ast.parse(text).body:
        names = [target.id for target in getattr(node, "targets", []) if hasattr(target, "id")]
        names += [node.name] if isinstance(node, ast.FunctionDef) else []
        found |= {name: (node.lineno - 1, node.end_lineno) for name in names}
    return found


def solve(script: str, solution: str) -> str:
    """The script with a solution: its functions take the place of those of the same name, new ones
    and constants stand above main(), and the pairs in REPLACE are replaced."""
    for name, (first, end) in spans(solution).items():
        piece, lines, places = solution.splitlines()[first:end], script.splitlines(), spans(script)
        if name == "REPLACE":
            for old, new in ast.literal_eval("\n".join(piece).partition("=")[2].strip()):
                assert script.count(old) == 1, f"the script has changed since the solution: {old}"
                script = script.replace(old, new)
        else:
            start, stop = places.get(name, (places["main"][0],) * 2)
            piece += [] if name in places else ["", ""]
            script = "\n".join(lines[:start] + piece + lines[stop:]) + "\n"
    return script


def write_script(folder, exercise: str, solution: str = "") -> None:
    """A copy of the exercise's script, solved."""
    [script] = ROOT.glob(f"{exercise[:2]}_*.py")
    (folder / script.name).write_text(solve(script.read_text(encoding="utf-8"), solution))


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(exercise, solution) runs a check on a copy of its script."""

    def run(exercise, solution=""):
        write_script(tmp_path, exercise, solution)
        monkeypatch.setenv("SPCT_SCRIPTS", str(tmp_path))
        offered = {"monkeypatch": monkeypatch, "tell": lambda text: None}
        wanted = inspect.signature(CHECKS[exercise]).parameters
        CHECKS[exercise](**{name: offered[name] for name in wanted})

    return run


def test_three_exercises_a_script_each_with_text_and_solution():
    names = [f"0{script}_{number}" for script in range(1, 6) for number in range(1, 4)]
    names.insert(3, "01_4")
    assert sorted(CHECKS) == sorted(SOLUTIONS) == sorted(MISTAKES) == names
    text = (ROOT / "tests" / "exercises.md").read_text(encoding="utf-8")
    assert re.findall(r"Check: `pytest tests/exercises.py -k (.*)`\n", text) == names


@pytest.mark.parametrize("exercise", CHECKS)
def test_the_check_fails_on_the_script_as_it_is(check, exercise):
    with pytest.raises(pytest.fail.Exception, match="yet"):
        check(exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_the_check_passes_with_the_solution(check, exercise):
    check(exercise, SOLUTIONS[exercise])


PAIRS = [(exercise, *mistake) for exercise, of in MISTAKES.items() for mistake in of]


@pytest.mark.parametrize("exercise, right, wrong", PAIRS)
def test_the_check_sees_a_mistake(check, exercise, right, wrong):
    docstring, code = SOLUTIONS[exercise].split('"""', 2)[1:]
    assert code.count(right) == 1
    with pytest.raises(pytest.fail.Exception):
        check(exercise, f'"""{docstring}"""' + code.replace(right, wrong))


def test_the_command_of_an_exercise(tmp_path):
    write_script(tmp_path, "02_1")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/exercises.py"]
    environment = os.environ | {"SPCT_SCRIPTS": str(tmp_path)}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, "-k", "02_1"], **how)
    assert done.returncode == 1 and "has no KEPT yet" in done.stdout
    assert "15 deselected" in done.stdout


def test_a_plain_run_collects_neither_exercises_nor_solutions(request):
    for name in ["exercises.py", *(f"{name}.py" for name in SOLUTIONS)]:
        patterns = request.config.getini("python_files")
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
