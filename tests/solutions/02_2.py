"""The decision on an item sees all of its trajectories. Whether a hint was needed takes one more
look at those without a hint."""
# ruff: noqa: F821  (the script has these names)


def reject_needless(group: list[Judgement]) -> None:
    """Decide as `reject` does, but keep a hinted trajectory only where none was correct without."""
    reject(group)
    solved = any(one.correct for one in group if not one.hint)
    for one in group:
        if one.hint and solved and one.reason == "kept":
            one.reason = "not needed"
