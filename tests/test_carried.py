"""What a later script carries is the same, to the letter, as where it was introduced, and nothing that it does not use."""
import ast
import functools

import carry
import pytest

SCRIPTS = carry.scripts()
LATER = [(script, SCRIPTS[:number]) for number, script in enumerate(SCRIPTS) if number]


@functools.cache
def sources(path):
    """The texts of a script's top-level definitions by name: their decorators, and the comment lines directly above, included; independent of
    carry.py. Of two of a name, the first."""
    text, found = path.read_text(encoding="utf-8"), {}
    lines = text.splitlines()
    for node in ast.parse(text).body:
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) - 1
        while lines[first - 1].startswith("#") and "-" * 100 not in lines[first - 1]:
            first -= 1
        for name in [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]:
            found.setdefault(name, lines[first:node.end_lineno])
    return found


@pytest.mark.parametrize("script, earlier", LATER, ids=lambda value: value.path.stem if isinstance(value, carry.Script) else "")
def test_carried_definitions_equal_their_origins(script, earlier):
    assert script.carried, f"{script.path.name} has no ruled line or nothing below it"
    for definition in script.carried:
        origin = next(sources(other.path)[definition.name] for other in earlier if definition.name in sources(other.path))
        assert sources(script.path)[definition.name] == origin, f"{definition.name}: run python tests/carry.py"


@pytest.mark.parametrize("script, earlier", LATER, ids=lambda value: value.path.stem if isinstance(value, carry.Script) else "")
def test_carry_has_nothing_to_do(script, earlier):
    assert carry.rewritten(script, earlier)[1] == []


def test_new_code_stands_above_one_line_and_the_scripts_import_none_of_each_other():
    for script, _ in LATER:
        text = script.path.read_text(encoding="utf-8")
        assert text.rstrip().splitlines()[-1].startswith("        sys.exit(") and 'if __name__ == "__main__":' in text
        assert not {name for name in script.imported if name[:1].isdigit()} and "importlib" not in script.imported
        assert not {d.name for d in script.new} & {d.name for d in script.carried}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.path.stem)
def test_the_method_of_a_step_is_read_in_220_lines(script):
    """What a student reads: all that stands between the imports and main(), comments, docstrings and empty lines included; main() is seen whole."""
    body = ast.parse(script.path.read_text(encoding="utf-8")).body
    imports = max(node.end_lineno for node in body if isinstance(node, (ast.Import, ast.ImportFrom)))
    [main] = [node for node in body if getattr(node, "name", "") == "main"]
    assert 100 < main.lineno - imports <= 220 and main.end_lineno - main.lineno < 110
    ruled = script.path.read_text(encoding="utf-8").split(carry.RULE)[0]
    assert ruled.count("\ndef main(") == 1  # nothing carried or to be looked up stands above it


def test_carry_renews_brings_in_and_takes_out(tmp_path):
    (tmp_path / "01_a.py").write_text(
        "import math\n\n# why A\nA = 1\nB = A + 1\n\n\n@property\ndef used(x: Kind) -> float:\n    return helper(x) + B\n\n\n"
        "def helper(x):\n    x = math.pi\n    return x\n\n\nclass Kind:\n    pass\n\n\ndef unused():\n    pass\n\n\ndef main():\n    used()\n")
    head = f'import math\n\n\ndef main():\n    used()\n\n\n{carry.RULE}\n# Below.\n{carry.RULE}\n'
    tail = '\n\n\nif __name__ == "__main__":\n    main()\n'
    (tmp_path / "02_b.py").write_text(head + "\ndef helper(x):\n    return 3\n\n\ndef unused():\n    pass" + tail)
    first, second = (carry.take_apart(tmp_path / name) for name in ("01_a.py", "02_b.py"))
    text, changes = carry.rewritten(second, [first])
    assert changes == ["took out unused", "brought in A", "brought in B", "brought in used", "brought in Kind", "renewed helper"]
    assert text == (head + "\n# why A\nA = 1\nB = A + 1\n\n\n@property\ndef used(x: Kind) -> float:\n    return helper(x) + B\n\n\n"
                    "def helper(x):\n    x = math.pi\n    return x\n\n\nclass Kind:\n    pass" + tail)
    (tmp_path / "02_b.py").write_text(text)
    assert carry.rewritten(carry.take_apart(tmp_path / "02_b.py"), [first]) == (text, [])
    (tmp_path / "02_b.py").write_text(text.replace("import math\n", ""))
    with pytest.raises(carry.CarryError, match=r"nobody defines or imports math \(used by helper\)"):
        carry.rewritten(carry.take_apart(tmp_path / "02_b.py"), [first])
    (tmp_path / "02_b.py").write_text(text.replace("class Kind", "def own():\n    pass\n\n\nclass Kind"))
    with pytest.raises(carry.CarryError, match="own below the ruled line"):
        carry.rewritten(carry.take_apart(tmp_path / "02_b.py"), [first])
