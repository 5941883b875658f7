"""The size budgets. They are part of the design: who needs more lines finds a smaller idea.

GOALS holds lines and bytes of a script, and lines of what is new in it.
"""

import ast
import subprocess

import pytest
from conftest import ROOT

KB = 1024
# Lines of a script, its bytes, lines above the ruled line.
GOALS = {
    "01": (700, 38 * KB, 700),
    "02": (720, 40 * KB, 340),
    "03": (720, 40 * KB, 340),
    "04": (620, 34 * KB, 280),
    "05": (720, 40 * KB, 340),
}
TOGETHER = 3300  # lines of the five
RULE = "# " + "-" * 98
PATHS = {path.name[:2]: path for path in sorted(ROOT.glob("0[1-5]_*.py"))}
TEXTS = {number: path.read_text(encoding="utf-8") for number, path in PATHS.items()}
TREES = {number: ast.parse(text) for number, text in TEXTS.items()}
script = pytest.mark.parametrize("number", GOALS)


def within(what: str, count: int, budget: int) -> None:
    assert count <= budget, f"{what}: {count:,}, {count - budget:,} over the budget of {budget:,}"


def length(node: ast.AST) -> int:
    """The lines of a statement, from its first decorator to its end."""
    first = min(one.lineno for one in [node, *getattr(node, "decorator_list", [])])
    return node.end_lineno - first + 1


def main_of(number: str) -> ast.FunctionDef:
    return next(node for node in TREES[number].body if getattr(node, "name", "") == "main")


@script
def test_lines_of_a_script(number):
    within(f"lines of {PATHS[number].name}", len(TEXTS[number].splitlines()), GOALS[number][0])


@script
def test_bytes_of_a_script(number):
    within(f"bytes of {PATHS[number].name}", PATHS[number].stat().st_size, GOALS[number][1])


@script
def test_columns(number):
    lines = enumerate(TEXTS[number].splitlines(), 1)
    wide = [f"line {place} has {len(line)}" for place, line in lines if len(line) > 100]
    assert not wide, f"{PATHS[number].name}, columns over the budget of 100: {', '.join(wide)}"


def test_lines_of_the_five_together():
    assert len(PATHS) == 5
    within(
        "lines of the five",
        sum(len(text.splitlines()) for text in TEXTS.values()),
        TOGETHER,
    )


@pytest.mark.parametrize("number", ["02", "03", "04", "05"])
def test_lines_of_what_is_new(number):
    lines = TEXTS[number].splitlines()
    assert lines.count(RULE) == 1, (
        f"{PATHS[number].name} has {lines.count(RULE)} ruled lines, not 1"
    )
    within(f"lines above the rule of {PATHS[number].name}", lines.index(RULE), GOALS[number][2])


@script
def test_lines_of_the_docstring(number):
    docstring = TREES[number].body[0]
    assert ast.get_docstring(TREES[number])
    within(f"lines of the docstring of {PATHS[number].name}", length(docstring), 30)


@script
def test_lines_of_a_function(number):
    long = []
    for node in ast.walk(TREES[number]):
        budget = 50 if node is main_of(number) else 40
        if isinstance(node, ast.FunctionDef) and length(node) > budget:
            long.append(f"{node.name}() has {length(node)} of {budget}")
    assert not long, f"{PATHS[number].name}, lines over budget: {', '.join(long)}"


@script
def test_options(number):
    name = PATHS[number].name
    calls = [node for node in ast.walk(main_of(number)) if isinstance(node, ast.Call)]
    ends = ("option", "add_argument")
    options = [call for call in calls if ast.unparse(call.func).split(".")[-1] in ends]
    within(f"options of {name}", len(options), 18)
    spread = [ast.unparse(call.args[0]) for call in options if length(call) > 1]
    assert options and not spread, f"{name}, options of more than a line: {', '.join(spread)}"


def test_readme():
    text = (ROOT / "README.md").read_bytes()
    within("bytes of README.md", len(text), 12 * KB)
    within("lines of README.md", len(text.splitlines()), 150)


def test_the_top_level_of_the_tree():
    try:
        git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs git")
    if git.returncode or not git.stdout:
        pytest.skip("needs a git checkout")
    found = {line.split("/")[0] for line in git.stdout.splitlines()}
    allowed = {path.name for path in PATHS.values()} | {"README.md", "requirements.txt", "tests"}
    assert {name for name in found if not name.startswith(".")} == allowed


@script
def test_no_script_imports_another(number):
    names = set()
    for node in ast.walk(TREES[number]):
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or ".")
        elif isinstance(node, ast.Name):
            names.add(node.id)
    others = {name.split(".")[0] for name in names}
    others &= {"", "tests", "importlib", "runpy", "__import__", "exec"}
    assert not others, f"{PATHS[number].name} uses {', '.join(sorted(others))}"
