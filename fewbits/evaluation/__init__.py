"""What a model lost: perplexity, KL divergence to the original, top-1 agreement, completions."""

from fewbits.evaluation.evaluate import evaluate, remember
from fewbits.evaluation.reference import Reference
from fewbits.evaluation.samples import complete
from fewbits.metrics.result import Divergence, Evaluation

__all__ = ["Divergence", "Evaluation", "Reference", "complete", "evaluate", "remember"]
