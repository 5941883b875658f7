"""Rewrites what later scripts carry: below its last ruled line, a script holds what it uses of the earlier ones, to the letter.

    python tests/carry.py            rewrites the carried parts and prints what changed
    python tests/carry.py --check    only says what would change; exit status 1 if anything would

Above that line stands what is new in the step, written by hand. Everything that it uses (directly or through something carried) and does not
define comes from the earliest script that has it, with its decorators and the comment lines directly above it, in the origin's order; what is
used no longer goes. Imports stay with whoever writes the script: the tool says which are missing.
"""
from __future__ import annotations

import argparse
import ast
import builtins
import symtable
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RULE = "# " + "-" * 138


class CarryError(ValueError):
    """A script that cannot be rewritten; the message says why."""


@dataclass
class Definition:
    """A top-level function, class or constant: its name, its text, whether a blank line precedes it, and the global names that it uses."""
    name: str
    text: str
    apart: bool
    uses: set[str]


@dataclass
class Script:
    """A script in its parts: `head` up to and with the ruled line, `carried` below it, `tail` from `if __name__` on."""
    path: Path
    head: str
    tail: str
    new: list[Definition]
    carried: list[Definition]
    imported: set[str]
    loose: set[str]  # names used outside of any definition, as in the tail


def names_used(text: str) -> set[str]:
    """The global names that a piece of code looks up, those in annotations included."""
    found, tables = set(), [symtable.symtable(text, "definition", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced()
                  and (s.is_global() if table.get_type() != "module" else not s.is_assigned())}
    return found


def bound_names(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def take_apart(path: Path) -> Script:
    """Read a script. Step 1 has no carried part: all of it is new, whatever lines it draws. Raises CarryError."""
    text = path.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    rules = [number for number, line in enumerate(lines, 1) if line == RULE]
    rule = rules[-1] if rules and not path.name.startswith("01") else len(lines)
    script, tail = Script(path, "", "", [], [], set(), set()), len(lines) + 1
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            script.imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            continue
        first = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])
        while first > 1 and lines[first - 2].startswith("#") and lines[first - 2] != RULE:
            first -= 1
        piece = "\n".join(lines[first - 1:node.end_lineno])
        if names := bound_names(node):
            apart = first < 2 or not lines[first - 2].strip() or lines[first - 2] == RULE
            (script.new if node.lineno <= rule else script.carried).append(Definition(names[0], piece, apart, names_used(piece)))
        else:
            script.loose |= names_used(piece)
            if isinstance(node, ast.If) and tail > len(lines):
                tail = first
            elif node.lineno > rule:
                raise CarryError(f"{path.name}:{node.lineno}: below the ruled line stands something that is no definition")
    script.head, script.tail = "\n".join(lines[:rule]), "\n".join(lines[tail - 1:])
    return script


def scripts() -> list[Script]:
    return [take_apart(path) for path in sorted(ROOT.glob("0[0-9]_*.py"))]


def origins_of(script: Script, earlier: list[Script]) -> dict[str, Definition]:
    """What a script may carry: name -> definition, from the earliest script that brought it, in the origin's order. Never `main`."""
    found = {}
    for origin in earlier:
        for definition in origin.new:
            found.setdefault(definition.name, definition)
    for name in {"main"} | {definition.name for definition in script.new}:
        found.pop(name, None)
    return found


def needed(script: Script, origins: dict[str, Definition]) -> list[Definition]:
    """The definitions that a script uses of earlier ones, in their origins' order. Raises CarryError for names that nobody defines."""
    known = script.imported | {definition.name for definition in script.new} | set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    wanted = script.loose.union(*(definition.uses for definition in script.new))
    chosen, missing = set(), {}
    todo = [(name, "the new part") for name in sorted(wanted)]
    while todo:
        name, user = todo.pop()
        if name in origins and name not in chosen:
            chosen.add(name)
            todo += [(used, name) for used in sorted(origins[name].uses)]
        elif name not in known and name not in origins:
            missing.setdefault(name, user)
    if missing:
        raise CarryError(f"{script.path.name}: nobody defines or imports "
                         + ", ".join(f"{name} (used by {user})" for name, user in sorted(missing.items())))
    return [definition for name, definition in origins.items() if name in chosen]


def rewritten(script: Script, earlier: list[Script]) -> tuple[str, list[str]]:
    """The script's text as it should be, and what changes, in words. Raises CarryError."""
    origins = origins_of(script, earlier)
    strangers = [definition.name for definition in script.carried if definition.name not in origins]
    if strangers:
        raise CarryError(f"{script.path.name}: {', '.join(strangers)} below the ruled line, which no earlier script brought (or which is new above "
                         "it as well): move it above the line, or take it out")
    chosen = needed(script, origins)
    had = {definition.name: definition.text for definition in script.carried}
    changes = [f"took out {name}" for name in had if name not in {d.name for d in chosen}]
    changes += [f"brought in {d.name}" for d in chosen if d.name not in had]
    changes += [f"renewed {d.name}" for d in chosen if had.get(d.name, d.text) != d.text]
    text, previous, order = script.head, None, list(origins)
    for definition in chosen:
        # consecutive constants of an origin stay together, all else is two empty lines apart
        together = previous and not definition.apart and order.index(definition.name) == order.index(previous.name) + 1
        text += ("\n" if together else "\n\n" if previous is None else "\n\n\n") + definition.text
        previous = definition
    text += ("\n\n\n" + script.tail if script.tail else "") + "\n"
    if not changes and text != script.path.read_text(encoding="utf-8"):
        changes = ["set order and empty lines right"]
    return text, changes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    everything, failed = scripts(), False
    for number, script in enumerate(everything[1:], 1):
        try:
            text, changes = rewritten(script, everything[:number])
        except CarryError as error:
            print(f"error: {error}")
            failed = True
            continue
        if changes and not args.check:
            script.path.write_text(text, encoding="utf-8")
        print(f"{script.path.name}: {', '.join(changes) or 'nothing to change'}")
        failed |= bool(changes) and args.check
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
