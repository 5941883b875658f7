"""What a later script carries is the same, to the letter, as where it was introduced, and used."""

import ast
import sys
from collections import Counter

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import carry

SCRIPTS = carry.scripts()  # a script without the ruled line is not among them
LATER = [pytest.param(i, id=SCRIPTS[i].name[:2]) for i in range(1, len(SCRIPTS))]


def text_of(script) -> str:
    return (ROOT / script.name).read_text(encoding="utf-8")


def statements(text: str, below: int = 0) -> set[str]:
    """The top-level statements of a text below a line, decorators included."""
    found = set()
    for node in ast.parse(text).body:
        first = min(one.lineno for one in [node, *getattr(node, "decorator_list", [])])
        if first > below:
            found.add("\n".join(text.splitlines()[first - 1 : node.end_lineno]))
    return found


@pytest.mark.parametrize("number", LATER)
def test_carried_text_equals_its_origin(number):
    """Independent of the tool: each statement below the line is one of an earlier script."""
    text = text_of(SCRIPTS[number])
    carried = statements(text, text.splitlines().index(carry.RULE) + 1)
    origins = set().union(*(statements(text_of(origin)) for origin in SCRIPTS[:number]))
    changed = [one.partition("\n")[0] for one in carried - origins]
    assert carried and not changed, f"run python tests/tools/carry.py: {changed}"


@pytest.mark.parametrize("number", LATER)
def test_nothing_is_carried_that_is_not_used(number):
    script = SCRIPTS[number]
    chosen = carry.needed(script, SCRIPTS[:number])
    names = [{name for one in part for name in one.names} for part in (script.carried, chosen)]
    assert names[0] == names[1], "run python tests/tools/carry.py"
    assert carry.rewritten(script, chosen) == text_of(script), "run python tests/tools/carry.py"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name[:2])
def test_nothing_is_defined_twice_and_there_is_one_ruled_line(script):
    text = text_of(script)
    names = Counter(name for one in script.new + script.carried for name in one.names)
    assert not [name for name, count in names.items() if count > 1]
    assert text.splitlines().count(carry.RULE) == (script.name > "02")
    assert text.count('\nif __name__ == "__main__":') == 1


ORIGIN = """import math

# why A
A = 1
B, C = A + 1, 2
SHOT = dict(a=1)
SHOT["b"] = 2

# more of it
SHOT |= {"c": C}
UNUSED = 3


@property
def used(x: Kind) -> float:
    A = helper(x)
    return A + B + len(SHOT)


def helper(x):
    x = math.pi
    return x


class Kind:
    pass


def main():
    used()


if __name__ == "__main__":
    main()
"""


def test_the_tool_renews_brings_in_and_takes_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(carry, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["carry.py", "--check"])
    head = f"import math\n\n\ndef main():\n    used()\n\n\n{carry.RULE}\n\n\n"
    tail = '\n\n\nif __name__ == "__main__":\n    main()\n'
    (tmp_path / "01_a.py").write_text(ORIGIN)
    (tmp_path / "02_b.py").write_text(
        head + "def helper(x):\n    return 3\n\n\nUNUSED = 3\nB, C = 4, 5" + tail
    )
    (tmp_path / "03_c.py").write_text("# of the first edition\n")
    with pytest.raises(SystemExit, match="1"):
        carry.main()
    monkeypatch.setattr(sys, "argv", ["carry.py"])
    with pytest.raises(SystemExit, match="0"):
        carry.main()
    assert capsys.readouterr().out == "02_b.py: out of date\n02_b.py: rewritten\n"
    kept = ORIGIN.partition("import math\n\n")[2].partition("\n\n\ndef main")[0]
    right = head + kept.replace("UNUSED = 3\n", "") + tail
    assert (tmp_path / "02_b.py").read_text() == right
    with pytest.raises(SystemExit, match="0"):
        carry.main()
    assert capsys.readouterr().out == ""

    for wrong, told in (
        (right.replace("import math\n", ""), r"nobody defines or imports math \(helper uses it\)"),
        (right.replace("class Kind", "def own():\n    pass\n\n\nclass Kind"), "no earlier .* own"),
    ):
        (tmp_path / "02_b.py").write_text(wrong)
        with pytest.raises(SystemExit, match=told):
            carry.main()
        assert (tmp_path / "02_b.py").read_text() == wrong
