"""Odds-ratio preference optimisation, arXiv:2403.07691; the names are TRL's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from train_jobs.objectives.preference import FIGURES, Judgement, PairObjective, Seen
from train_jobs.objectives.settings import ORPO


class OddsRatio(PairObjective):
    """Learns the chosen answer, and that its odds are higher; both by the mean of its tokens.

    The likelihood is that of the answer, as in the paper; TRL counts the prompt's tokens, too.
    """

    figures: tuple[str, ...] = (*FIGURES, "nll_loss", "log_odds_ratio", "log_odds_chosen")

    def __init__(self, settings: ORPO) -> None:
        self.settings = settings

    def judge(self, seen: Seen) -> Judgement:
        """Weigh likelihood and odds ratio."""
        means_P2, beta = seen.means_P2, self.settings.beta
        log_odds_P = log_odds(means_P2[:, 0]) - log_odds(means_P2[:, 1])
        ratio_P = F.logsigmoid(log_odds_P)
        nll_P = -means_P2[:, 0]
        return Judgement(
            nll_P - beta * ratio_P,
            beta * means_P2.detach(),
            {"nll_loss": nll_P, "log_odds_ratio": ratio_P, "log_odds_chosen": log_odds_P},
        )


def log_odds(logps: torch.Tensor) -> torch.Tensor:
    """Return ``log(p / (1 - p))`` of log-probabilities, exact for those near 0, too."""
    # a mean of exactly 0, a certain answer, has infinite odds: stay a rounding error below
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))
