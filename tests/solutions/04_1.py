"""Sums run from 8 to 80, and means are those sums over 8. A sample gives a response of a pair 0,
1/2 or 1 vote: 0 to 8 in steps of a half. In DIFFER two samples prefer the second response by a
little and one prefers the first by much: the majority forgets how much."""
SPACE = (73, 73, 17)
DIFFER = [[9, 1], [4, 5], [4, 5]]
