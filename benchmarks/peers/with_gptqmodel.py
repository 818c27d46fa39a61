"""GPTQModel: GPTQ with its defaults (activation-aware groups), in float32.

Its thread pools ask for more cores than small machines have and then fail; it is told of four at least.

What `quantize` leaves in memory has zero points less one, as GPTQ's first file format stores them, while its layers
decode those of the second: every weight would be one level off. Its loader converts, so the model is saved and loaded.
It computes in 16 bits there; scales are decoded in float32, as for every peer.
"""

from __future__ import annotations

import os
import tempfile

_CORES = os.cpu_count() or 1
os.cpu_count = lambda: max(4, _CORES)

import torch  # noqa: E402
from contract import finish, job  # noqa: E402
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # noqa: E402


def main() -> None:
    with job() as work:
        symmetric = bool(work.options.get("sym", True))
        config = QuantizeConfig(bits=work.bits, group_size=work.group_size, sym=symmetric, offload_to_disk=False)
        work.accelerator()  # it picks the GPU by itself
        model = GPTQModel.load(str(work.model), config, dtype=torch.float32)
        dtype = next(model.model.parameters()).dtype
        rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in work.ids]
        work.start()
        model.quantize(rows, batch_size=4, backend=BACKEND.TORCH)
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
        decoded, parts = {}, {"codes": 0.0, "scales": 0.0, "zero points": 0.0, "group index": 0.0}
        buffers = {"qweight": "codes", "scales": "scales", "qzeros": "zero points", "g_idx": "group index"}
        for name, module in model.model.named_modules():
            if not hasattr(module, "qweight"):
                continue
            for buffer, part in buffers.items():
                tensor = getattr(module, buffer)
                parts[part] += 8 * tensor.numel() * tensor.element_size()
            module.scales = module.scales.float()
            with torch.inference_mode():
                decoded[f"{name}.weight"] = module.dequantize_weight().T.float()
    if dtype != torch.float32:
        work.notes.append(f"loaded the float32 model as {dtype}")
    kind = "symmetric" if symmetric else "asymmetric"
    settings = f"GPTQ W{work.bits} g{work.group_size} {kind}, library defaults"
    finish(work, decoded, parts, ["gptqmodel", "transformers"], settings)


if __name__ == "__main__":
    main()
