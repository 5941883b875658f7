"""The decision on an item sees all of its trajectories; whether a hint was needed is one more look at those without."""
REPLACE = [
    ("def reject(trajectories: list[Trajectory], keep_all: bool = False) -> None:",
     "def reject(trajectories: list[Trajectory], keep_all: bool = False, needed_only: bool = False) -> None:"),
    ("        t.kept = t.reason in (",
     "        if needed_only and t.hinted and t.reason == 'correct' and any(other.correct for other in trajectories if not other.hinted):\n"
     "            t.reason = 'not needed'\n"
     "        t.kept = t.reason in ("),
    ("len(kinds)], args.keep_all)", "len(kinds)], args.keep_all, args.needed_only)"),
    ("    args = parser.parse_args()\n",
     '    option("--needed-only", action="store_true", help="keep hinted samples only of items that have no correct one without a hint")\n'
     "    args = parser.parse_args()\n"),
]
