"""A random order, turned by one place from sample to sample: after n samples every response has
been everywhere once. A preference for a place cancels in the sum."""
# ruff: noqa: F821  (the script has these names)


def balanced_order(n: int, seed: str, i: int) -> list[int]:
    """The order in which sample i shows n responses."""
    part, turn = divmod(i, n)
    order = random.Random(f"{seed} {part}").sample(range(n), n)
    return order[turn:] + order[:turn]
