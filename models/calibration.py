"""The re-ranker's calibration: its logit → P(the candidate is among what the person comes to later).

    P = sigmoid(rising(logit) + a x + b x²),   x = log(1 + items of the history that were read)

`rising` is piecewise linear with positive slopes, so the order within a request is the logit's own; the history's
length is the same for all its candidates and only shifts their level. Fitted by log loss on candidates of an
interval that the re-ranker hasn't seen. It is a part of the exported graph.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)  # of the logits: where the slope may change
LEAST_SLOPE = 0.01  # keeps the order, and different logits different
STEPS = 60  # of L-BFGS; it stops by itself after about 30


class Calibration(nn.Module):
    """Logits [n] and the history's mask [1, L] → probabilities [n]."""

    knots: Tensor

    def __init__(self, knots: Tensor) -> None:
        """knots [K]: strictly rising."""
        super().__init__()
        self.register_buffer("knots", knots)
        self.raw_slopes = nn.Parameter(torch.zeros(len(knots) + 1))
        self.level = nn.Parameter(torch.tensor([-3.0, 0.0, 0.0]))

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        # sigmoid, written so that small probabilities keep their digits: onnxruntime's own errs by 6e-8.
        return torch.exp(-F.softplus(-self.log_odds(logits, mask.sum())))

    def log_odds(self, logits: Tensor, count: Tensor) -> Tensor:
        """Log odds [n]; count: items of the history, [] or [n]."""
        x = torch.log1p(count)
        return self.rising(logits) + self.level[0] + self.level[1] * x + self.level[2] * x * x

    def rising(self, logits: Tensor) -> Tensor:
        """The piecewise-linear part, 0 at the first knot."""
        slopes = LEAST_SLOPE + F.softplus(self.raw_slopes)
        past = torch.relu(logits[:, None] - self.knots)  # [n, K]: how far beyond each knot
        steps = torch.cat([past[:, :-1] - past[:, 1:], past[:, -1:]], dim=1)  # the part within each piece
        below = torch.clamp(logits - self.knots[0], max=0.0)
        return slopes[0] * below + torch.matmul(steps, slopes[1:])


def fit_calibration(logits: Tensor, counts: Tensor, happened: Tensor) -> Calibration:
    """The map of least log loss for candidates with these logits, history counts and outcomes (0 or 1), each [n]."""
    knots = torch.unique(torch.quantile(logits[:: max(1, len(logits) // 100_000)], torch.tensor(QUANTILES)))
    model = Calibration(knots)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(model.log_odds(logits, counts), happened)
        value.backward()
        return value

    optimiser.step(loss)
    return model.eval()
