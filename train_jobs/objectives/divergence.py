"""How far a student's distribution is from its teacher's, in nats.

The generalised Jensen-Shannon divergence of arXiv:2306.13649, as TRL's GKD computes it.

Shapes: C places, V entries of the vocabulary, k entries that the teacher names.
"""

from __future__ import annotations

import math

import torch


def divergence(student_CV: torch.Tensor, teacher_CV: torch.Tensor, beta: float) -> torch.Tensor:
    """Return ``[C]`` in nats from log-probabilities.

    ``beta`` 0: KL(teacher, student), which covers all that the teacher says; 1: KL(student,
    teacher), which avoids what it does not; between: ``beta KL(teacher, mean) + (1 - beta)
    KL(student, mean)`` with ``mean = beta teacher + (1 - beta) student``.
    """
    if beta == 0:
        return kl(teacher_CV, student_CV)
    if beta == 1:
        return kl(student_CV, teacher_CV)
    weighed = [teacher_CV + math.log(beta), student_CV + math.log1p(-beta)]
    mean_CV = torch.logsumexp(torch.stack(weighed), dim=0)
    return beta * kl(teacher_CV, mean_CV) + (1 - beta) * kl(student_CV, mean_CV)


def kl(p_CV: torch.Tensor, q_CV: torch.Tensor) -> torch.Tensor:
    """Return KL(p, q) of log-probabilities; what has no probability in ``p`` adds nothing."""
    p = p_CV.exp()
    return torch.where(p > 0, p * (p_CV - q_CV), torch.zeros_like(p)).sum(1)


def named(logps_CV: torch.Tensor, ids_Ck: torch.Tensor) -> torch.Tensor:
    """Return ``[C, k + 1]``: the log-probabilities of some entries, and of all others together."""
    return with_rest(logps_CV.gather(1, ids_Ck))


def with_rest(logps_Ck: torch.Tensor) -> torch.Tensor:
    """Append the log-probability of everything that is not named."""
    # at least a rounding error, so that its logarithm and its gradient stay finite
    least = torch.finfo(logps_Ck.dtype).eps
    rest_C1 = (1 - logps_Ck.exp().sum(1, keepdim=True)).clamp(min=least)
    return torch.cat([logps_Ck, rest_C1.log()], dim=1)
