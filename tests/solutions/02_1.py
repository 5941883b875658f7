"""A trajectory is kept if it is correct and the two others are not both correct: p (1 - p^2), where
p is 0.5, or 0.8 with ties. So the rule that lets more pass keeps less: most items look too easy.
And 3 in 8 of what it keeps are ties, which teach the judge to tie."""
KEPT = (0.375, 0.288)
