"""AutoRound: rounding and clipping learned by signed gradient descent, block by block, 200 iterations.

Its defaults otherwise (learning rate 1 / iterations, batch of 8, scales in float16). The tuned weights it leaves in
the model are the decoded ones.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from contract import finish, group_parts, job, linears, load
from transformers import AutoTokenizer


def main() -> None:
    with job() as work:
        model = load(work)
        names = list(linears(model))
        before = {name: module.weight.detach().clone() for name, module in linears(model).items()}
        symmetric = bool(work.options.get("sym", True))
        iterations = int(work.options.get("iters", 200))
        windows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in work.ids]
        tuner = AutoRound(
            model,
            AutoTokenizer.from_pretrained(work.model),
            bits=work.bits,
            group_size=work.group_size,
            sym=symmetric,
            iters=iterations,
            dataset=windows,
            nsamples=len(windows),
            seqlen=work.ids.shape[1],
            batch_size=8,
            low_gpu_mem_usage=False,
            device_map=work.accelerator(),
        )
        tuned, _ = tuner.quantize()
        decoded = {f"{name}.weight": tuned.get_submodule(name).weight.detach() for name in names}
    same = [name for name in names if torch.equal(decoded[f"{name}.weight"].float().cpu(), before[name])]
    assert not same, f"left as they were: {same[:3]}"
    shapes = [tuple(tensor.shape) for tensor in decoded.values()]
    parts = group_parts(shapes, work.bits, work.group_size, 16, 0 if symmetric else work.bits)
    kind = "symmetric" if symmetric else "asymmetric"
    settings = f"W{work.bits} g{work.group_size} {kind}, {iterations} iterations, batch 8, float16 scales"
    finish(work, decoded, parts, ["auto-round", "transformers"], settings)


if __name__ == "__main__":
    main()
