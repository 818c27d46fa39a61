"""optimum-quanto: qint4 and qint2 with a float shift a group, no calibration text.

The library cuts groups of 128, or the next smaller multiple of 32 that divides the layer; `group_size` sets another.
Scale and shift take the dtype of the weight: float16 here, as for a model loaded in half precision.
"""

from __future__ import annotations

import torch
from contract import finish, job, linears, load
from optimum.quanto import HqqOptimizer, freeze, qint2, qint4, quantize


def main() -> None:
    with job() as work:
        model = load(work, torch.float16)
        names = list(linears(model))
        optimizer = HqqOptimizer() if work.options.get("optimizer") == "hqq" else None
        quantize(model, weights={4: qint4, 2: qint2}[work.bits], optimizer=optimizer, include=names)
        modules = {name: model.get_submodule(name) for name in names}
        for module in modules.values():
            columns, wanted = module.in_features, work.group_size
            while columns % wanted and wanted > 32:
                wanted -= 32
            module.weight_group_size = wanted
        freeze(model)
        decoded, parts = {}, {"codes": 0.0, "scales": 0.0, "shifts": 0.0}
        for name, module in modules.items():
            weight = module.weight
            decoded[f"{name}.weight"] = weight.dequantize()
            parts["codes"] += work.bits * weight.numel()
            parts["scales"] += 16 * weight._scale.numel()
            parts["shifts"] += 8 * weight._shift.numel() * weight._shift.element_size()
    groups = sorted({module.weight_group_size for module in modules.values()})
    how = "HqqOptimizer" if optimizer else "MaxOptimizer (default)"
    settings = f"qint{work.bits}, groups of {' and '.join(map(str, groups))}, {how}, float16 scales and shifts"
    finish(work, decoded, parts, ["optimum-quanto", "transformers"], settings)


if __name__ == "__main__":
    main()
