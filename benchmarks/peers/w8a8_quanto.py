"""optimum-quanto: qint8 weights, one scale a row, and qint8 inputs, one scale a linear, fixed by calibration.

The same is done to what a linear gives where another quantized operation reads it.
"""

from __future__ import annotations

import torch
from contract import job, linears, load
from optimum.quanto import Calibration, freeze, qint8, quantize
from running import finish_running, row_parts


def main() -> None:
    with job() as work:
        model = load(work)
        modules = linears(model)
        parts = row_parts(list(modules.values()))
        parts["scales of inputs and outputs"] = 2.0 * 32 * len(modules)
        quantize(model, weights=qint8, activations=qint8, include=list(modules))
        with torch.inference_mode(), Calibration():
            for window in work.ids:
                model(input_ids=window[None], use_cache=False)
        freeze(model)
    settings = "qint8 weights, qint8 activations, Calibration() with its defaults"
    finish_running(work, model, parts, ["optimum-quanto", "transformers"], settings)


if __name__ == "__main__":
    main()
