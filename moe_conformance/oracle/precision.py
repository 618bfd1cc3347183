"""The constants of rounding: u of a dtype, what sums are computed in, and how many spreads a bound has.

Notation of Higham, Accuracy and Stability of Numerical Algorithms (2002): u is the unit roundoff, n the number of
roundings on the longest path. A sum of n products computed in one precision differs from the exact one by at
most gamma_n = n u / (1 - n u) times the sum of magnitudes; with the probabilistic bound of Higham and Mary (2019)
by lambda * sqrt(n) * u times it, with failure probability 2 exp(-lambda^2 / 2) for one sum.
"""

from __future__ import annotations

import torch

from moe_conformance.model.specs import Precision

# lambda = 5 makes one false alarm in about 130,000 sums under the model's assumptions (2 exp(-12.5) = 7.5e-6 each),
# and roundings that are not adversarial stay far below: measured at most 0.6 of the bound.
LAMBDA = 5.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of products are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def in_precision(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """The dtype that a Precision means for an input of this dtype."""
    return wide(dtype) if precision == "float32" else dtype
