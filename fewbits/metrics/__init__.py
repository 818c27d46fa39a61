"""Pure functions on tensors: how far two weights, two outputs or two distributions are apart."""

from fewbits.metrics.divergence import kl, top1_agreement
from fewbits.metrics.error import relative_error, sqnr_db
from fewbits.metrics.estimate import Estimate, block_estimate
from fewbits.metrics.perplexity import nll, perplexity

__all__ = [
    "Estimate",
    "block_estimate",
    "kl",
    "nll",
    "perplexity",
    "relative_error",
    "sqnr_db",
    "top1_agreement",
]
