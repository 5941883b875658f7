"""Copies into each script, below its ruled line, what it uses of earlier scripts, to the letter.

    python tests/tools/carry.py            rewrites the carried parts, says where it did
    python tests/tools/carry.py --check    only says where it would; exit status 1 if anywhere

Above the line stands what is new. What that uses and does not define comes from the earliest script
that has it, in its order, with the comment lines directly above it. Imports are left to you.
"""

import argparse
import ast
import builtins
import symtable
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RULE = "# " + "-" * 98


@dataclass(eq=False)
class Definition:
    """A top-level function, class or constant, with the statements behind it that complete it."""

    names: list[str]  # two for A, B = 1, 2
    text: str
    follows: "Definition | None"  # the one before it, if there is no empty line between them


@dataclass
class Script:
    name: str
    head: str  # up to the ruled line, which ends it
    tail: str  # from `if __name__` on
    new: list[Definition]
    carried: list[Definition]
    imported: set[str]


def names_used(text: str) -> set[str]:
    """The global names that a piece of code looks up, those in annotations included."""
    found, tables = set(), [symtable.symtable(text, "piece", "exec")]
    for table in tables:  # the list grows
        tables += table.get_children()
        used = [symbol for symbol in table.get_symbols() if symbol.is_referenced()]
        found |= {symbol.get_name() for symbol in used if symbol.is_global()}
    return found


def bound_names(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines; none for `NAME += ...` and `NAME.x = ...`."""
    if hasattr(node, "name"):
        return [node.name]
    targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
    parts = [part for target in targets for part in getattr(target, "elts", [target])]
    return [part.id for part in parts if isinstance(part, ast.Name)]


def take_apart(path: Path) -> Script:
    """Read a script. Without a ruled line, all of it is new."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    rule = lines.index(RULE) + 1 if RULE in lines else len(lines)
    script = Script(path.name, "\n".join(lines[:rule]), "", [], [], set())
    known, end = set(), 0
    for node in ast.parse(text).body:
        first = min(one.lineno for one in [node, *getattr(node, "decorator_list", [])])
        while lines[first - 2].startswith("#") and lines[first - 2] != RULE:
            first -= 1
        part = script.new if first <= rule else script.carried
        names = bound_names(node)
        if isinstance(node, ast.Import | ast.ImportFrom) and first <= rule:
            script.imported |= {(one.asname or one.name).split(".")[0] for one in node.names}
        elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            script.tail = "\n".join(lines[first - 1 :]) + "\n"
        elif hasattr(node, "name") or (names and not known & set(names)):
            piece = "\n".join(lines[first - 1 : node.end_lineno])
            part.append(Definition(names, piece, part[-1] if part and lines[first - 2] else None))
        elif part:
            part[-1].text += "\n" + "\n".join(lines[end : node.end_lineno])
        known |= set(names)
        end = node.end_lineno
    return script


def scripts() -> list[Script]:
    """Step 1, and each later step that has the ruled line."""
    found = [take_apart(path) for path in sorted(ROOT.glob("0[1-5]_*.py"))]
    return [one for one in found if one.name < "02" or one.head.endswith(RULE)]


def needed(script: Script, earlier: list[Script]) -> list[Definition]:
    """What a script has to carry, in its origins' order. Ends the program at an unknown name."""
    own = {"main"}.union(*(one.names for one in script.new))
    origins = {}
    for one in [one for origin in earlier for one in origin.new]:
        origins |= {name: one for name in one.names if name not in own | origins.keys()}
    for one in script.carried:
        if not origins.keys() & set(one.names):
            sys.exit(f"error: {script.name}: no earlier script has {one.names[0]}: move it up")
    known = own | script.imported | {*dir(builtins), "__file__", "__name__", "__doc__"}
    todo = [("its new part", script.tail), *((one.names[0], one.text) for one in script.new)]
    chosen = []
    for user, text in todo:  # the list grows
        for name in sorted(names_used(text) - known):
            if name not in origins:
                sys.exit(f"error: {script.name}: nobody defines or imports {name} ({user} uses it)")
            if origins[name] not in chosen:
                chosen.append(origins[name])
                todo.append((name, origins[name].text))
    return [one for one in dict.fromkeys(origins.values()) if one in chosen]


def rewritten(script: Script, chosen: list[Definition]) -> str:
    """The script with these definitions below its ruled line."""
    text, before = script.head, script
    for one in chosen:
        text += ("\n" if one.follows is before else "\n\n\n") + one.text
        before = one
    return text + "\n\n\n" + script.tail


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    everything, changed = scripts(), False
    for number, script in enumerate(everything[1:], 1):
        chosen = needed(script, everything[:number])
        text = rewritten(script, chosen)
        if text != (ROOT / script.name).read_text(encoding="utf-8"):
            print(f"{script.name}: {'out of date' if args.check else 'rewritten'}")
            changed = True
            if not args.check:
                (ROOT / script.name).write_text(text, encoding="utf-8")
    sys.exit(int(changed and args.check))


if __name__ == "__main__":
    main()
