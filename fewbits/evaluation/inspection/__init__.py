"""`fewbits inspect`: what a model is made of, what each scheme would cost it, and which to take.

sizes.py       what the file holds, part by part, and which of it can be quantized
schemes.py     the schemes that are tried, and what each asks of machine and readers
losses.py      one pass over a short text: every scheme through every block, side by side
outliers.py    what in the activations makes some schemes fail
recommend.py   from figures to commands
"""

from fewbits.evaluation.inspection.inspect import inspect

__all__ = ["inspect"]
