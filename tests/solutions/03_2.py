"""The mean of the gradient of logp over the policy's own draws is zero, and k1's gradient is nothing else: an exact estimate of the KL's value that,
put into the loss like this, holds nothing. k2's mean gradient is that of KL(policy || reference), k3's that of KL(reference || policy)."""
# ruff: noqa: F821  (the script has these names)


def kl_k1(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per token, log (policy / reference): its mean over the policy's samples is exact, and single ones may be negative."""
    return log_probs - reference


def kl_k2(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per token, half of the squared log ratio: never negative, biased where the two are far apart."""
    return (log_probs - reference) ** 2 / 2


NO_PULL = "k1"
