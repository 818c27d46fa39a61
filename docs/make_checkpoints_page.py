"""Writes docs/checkpoints.md: which checkpoint formats there are, and every conversion between them, by running it.

    python docs/make_checkpoints_page.py

Sources are linears that other libraries wrote (tests/golden/checkpoints), so each row starts from a real file.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from fewbits.checkpoints.codecs import CODECS
from fewbits.checkpoints.gguf_codec import NAME as GGUF
from fewbits.checkpoints.safetensors_file import SafetensorsFile, write_stream
from fewbits.core.errors import BadInput, Unsupported
from fewbits.pipeline.convert import Conversion, convert, targets

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "tests" / "golden" / "checkpoints"
MODULE = "model.layers.0.mlp.experts.0.down_proj"  # of gpt-oss, so that its own layout has a column, too
# (fixture, case) -> what a reader calls it
ROWS = {
    ("gptq", "gptq-4-32-sym"): "GPTQ, symmetric",
    ("gptq", "gptq_v2-4-32-asym"): "GPTQ v2, zero points",
    ("gptq", "gptq-4-32-sym-order"): "GPTQ, act-order",
    ("gptq", "gptq-3-32-sym"): "GPTQ, 3 bits",
    ("awq", "gemm-32-asym"): "AWQ",
    ("bitsandbytes", "nf4-64-256"): "bitsandbytes NF4",
    ("bitsandbytes", "nf4-nested-64-256"): "bitsandbytes NF4, nested",
    ("bitsandbytes", "int8"): "bitsandbytes int8",
    ("compressed_tensors", "W4A16"): "compressed-tensors W4A16",
    ("compressed_tensors", "W8A8"): "compressed-tensors W8A8",
    ("compressed_tensors", "FP8_DYNAMIC"): "compressed-tensors FP8_DYNAMIC",
    ("compressed_tensors", "FP8_BLOCK"): "compressed-tensors FP8_BLOCK",
    ("compressed_tensors", "NVFP4A16"): "compressed-tensors NVFP4A16",
    ("compressed_tensors", "MXFP4A16"): "compressed-tensors MXFP4A16",
    ("modelopt", "nvfp4"): "ModelOpt NVFP4",
    ("mlx", "affine-4-64-half"): "MLX, 4 bits",
    ("mlx", "mxfp4-4-32"): "MLX MXFP4",
    ("mxfp4", "down_proj"): "gpt-oss MXFP4",
    ("hqq", "4-axis1"): "HQQ, 4 bits",
}
HEAD = """# Checkpoint formats

`fewbits.load` and the commands that take a model read all of these; how each lays out its tensors is told at the head
of its file in `fewbits/checkpoints`. Written by `python docs/make_checkpoints_page.py`.

"""
MATRIX = """
Readers are checked on linears that the libraries themselves wrote (`tests/golden`): values are theirs bit for bit,
those of bitsandbytes' int8 to two units in the last place. ModelOpt's FP8 and MXFP8 are checked by their definition.
exllamav2 and exllamav3 compute on GPUs alone, and there was none to make a file with: these two readers are checked
against a second, number by number reading of the kernels' source, and not against the kernels.

## Conversions

`fewbits convert SRC --to FORMAT -o OUT` goes from one to the other without building the model. Each cell was run, on a
linear that the library named wrote (`tests/golden/checkpoints`):

- **lossless**: the new file decodes to the same float32 values, bit for bit.
- **rescaled**, **requantized**: refused, unless `--requantize`; then with the signal-to-noise ratio given, against the
  source's values. Rescaled layers keep their codes and only round scales.
- **weights only**: refused, unless `--requantize`; the weights are lossless, but activations are no longer rounded.

What goes to GGUF, which holds whole models, is in [gguf.md](gguf.md). `mxfp4` is gpt-oss's own layout, and no other
model is written in it; its column is of linears in the place of an expert.

A killed conversion, repeated with the same arguments, continues after its last whole shard and ends in the very bytes
of an undisturbed one (to GGUF, which is one file, it begins anew). With other arguments or a changed source it is
refused, and `--restart` discards what was done.

"""
NOTES = """
Minus zero, which E2M1 and E4M3 have and our grids do not, becomes zero. `dense` decodes in float32 here. A layer whose
scales are bfloat16 goes to GPTQ or AWQ without loss where float16 has the same numbers, which is the usual case.

MLX stacks the experts of a block, as mlx-lm has them; gpt-oss's lie in one tensor a block in `mxfp4`, which mlx-lm
reads too, and in `dense`. In all other formats experts are linears of their own (`experts.3.gate_proj`), for gpt-oss
as llm-compressor writes them: fewbits reads that; whether a runtime does for this family is up to it. A dense gpt-oss
becomes such a checkpoint by `fewbits quantize MODEL --scheme mxfp4 --checkpoint-format mxfp4`.

## Why not lossless

"""


def source(folder: Path, fixture: str, case: str, model_type: str = "none") -> Path:
    """The linear of a fixture as a directory of its own."""
    file = SafetensorsFile(GOLDEN / f"{fixture}.safetensors")
    about: dict[str, Any] = json.loads(file.metadata["cases"])[case]
    config = {"model_type": model_type, "dtype": "float16"}
    config |= about if "quantization" in about else {"quantization_config": about}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    names = [name for name in file.names() if name.startswith(f"{case}/m.")]
    infos = {name: file.info(name) for name in names}
    items = [
        (_placed(name, case), infos[name].dtype, infos[name].shape, lambda name=name: file.tensor(name))
        for name in names
    ]
    write_stream(folder / "model.safetensors", items)
    return folder


def _placed(name: str, case: str) -> str:
    """The fixture's module "m" as an expert of gpt-oss; experts in one tensor are already."""
    name = name.removeprefix(f"{case}/m.")
    return f"model.layers.0.mlp.{name}" if name.startswith("experts.") else f"{MODULE}.{name}"


def run(first: Path, to: str, out: Path) -> tuple[str, str]:
    """(cell, reason)."""
    import torch

    def attempt(requantize: bool) -> Conversion:
        return convert(first, to, out, requantize=requantize, dtype=torch.float32)

    try:
        return _cell(attempt(False)), ""
    except Unsupported as error:
        why = str(error).split("as it is: ")[-1].split(". --requantize")[0]
    try:
        return _cell(attempt(True)), why
    except BadInput as error:
        return "refused", f"{why}; {str(error).split(': ')[-1]}"


def _general(why: str) -> str:
    """A reason without the name of the format at hand."""
    return re.sub(r"has no \S+$", "has no such numbers", re.split("; this is|; these are", why)[0])


def _cell(done: Conversion) -> str:
    (action,) = done.actions
    worst = min((layer.sqnr_db for layer in done.layers if layer.sqnr_db is not None), default=None)
    if action == "decoded":
        return "lossless" if worst is None else f"{worst:.0f} dB"
    return action if worst is None else f"{action}, {worst:.0f} dB"


def speed() -> str:
    """The newest "convert" record in a paragraph; nothing where there is none."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    from recorded import ROOT, latest

    found = latest("convert")
    if found is None:
        return ""
    path, record = found
    source = path.relative_to(ROOT).as_posix()
    return (
        f"\n## Speed and memory\n\n`python benchmarks/bench_convert.py` converts a random GPTQ checkpoint of "
        f"{record['blocks']} blocks of Llama-7B's shapes\n({record['source_bytes'] / 1e9:.1f} GB) "
        f"to compressed-tensors in {record['convert_seconds']:.0f} s; copying its files takes "
        f"{record['copy_seconds']:.0f} s, a ratio of {record['ratio']:.1f}. Peak\nmemory of the process, "
        f"torch included: {record['peak_bytes'] / 2**30:.2f} GiB. Load of the machine meanwhile: "
        f"{record['load_average']} on {record['environment']['cores']} cores. From\n[`{source}`](../{source}).\n"
    )


def main() -> None:
    wanted, reasons = [name for name in targets() if name != GGUF], {}
    lines = ["| from \\ to | " + " | ".join(wanted) + " |", "|---" * (len(wanted) + 1) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for number, ((fixture, case), title) in enumerate(ROWS.items()):
            first, cells = source(Path(folder) / f"{number}", fixture, case), []
            expert = source(Path(folder) / f"{number}-expert", fixture, case, "gpt_oss")
            for to in wanted:
                cell, why = run(expert if to == "mxfp4" else first, to, Path(folder) / f"{number}-{to}")
                cells.append(cell)
                if why:
                    reasons.setdefault((to, _general(why)), []).append(title)
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    held = ["| format | reads | writes | holds |", "|---|---|---|---|"]
    held += [f"| `{name}` | yes | {'yes' if codec.writes else '-'} | {codec.holds} |" for name, codec in CODECS.items()]
    order = sorted(reasons, key=lambda item: wanted.index(item[0]))
    why = ["| to | why | from |", "|---|---|---|"]
    why += [f"| {to} | {text} | {'; '.join(reasons[to, text])} |" for to, text in order]
    text = HEAD + "\n".join(held) + "\n" + MATRIX + "\n".join(lines) + "\n" + NOTES + "\n".join(why) + "\n" + speed()
    (HERE / "checkpoints.md").write_text(text, encoding="utf-8")
    print("checkpoints.md")


if __name__ == "__main__":
    main()
