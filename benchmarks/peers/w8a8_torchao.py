"""torchao: Int8DynamicActivationInt8WeightConfig, one scale a row and one a token found as the model runs.

`activations` "symmetric" is the default of the library; "asymmetric" gives each token a zero point as well.
"""

from __future__ import annotations

from contract import job, linears, load
from running import finish_running, row_parts
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.quant_primitives import MappingType


def main() -> None:
    with job() as work:
        model = load(work)
        modules = linears(model)
        parts, kind = row_parts(list(modules.values())), str(work.options["activations"])
        config = Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType[kind.upper()])
        quantize_(model, config, filter_fn=lambda module, name: name in modules)
    settings = f"Int8DynamicActivationInt8WeightConfig, PerRow, {kind} inputs"
    finish_running(work, model, parts, ["torchao", "transformers"], settings)


if __name__ == "__main__":
    main()
