"""The mean of the gradient of logp over the policy's own draws is zero, and the gradient of k1 is
just that. So k1, an exact estimate of the KL's value, holds nothing if it is put into the loss like
this. The mean gradient of k2 is that of KL(policy || reference), that of k3 of KL(reference ||
policy)."""
# ruff: noqa: F821  (the script has these names)


def kl_k1(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per token, log (policy / reference): exact on average, but single values may be negative."""
    return log_probs - reference


def kl_k2(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per token, half of the squared log ratio: never negative, biased if the two are far apart."""
    return (log_probs - reference) ** 2 / 2


NO_PULL = "k1"
