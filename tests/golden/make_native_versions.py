"""Makes tests/golden/native/v*.safetensors: a few linears in every version of the native format.

    python tests/golden/make_native_versions.py

The writer states the lowest version that can say what is in a file, so one run makes them all; those up to 6 were
made by the code of version 6. A file that is there is never made again: readers of old versions are kept, and
test_native_versions.py reads these. A new version adds a file here and changes none. Tensors are those of a
checkpoint, beside `M.expected`, the float32 weight that M stands for; the metadata holds its `quantization_config`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fewbits.checkpoints.codecs import Stored, StoredMix
from fewbits.checkpoints.native import CODEC, module_entry, quantization_config
from fewbits.checkpoints.safetensors_file import write_stream
from fewbits.formats import parse_format
from fewbits.formats.low_rank import LowRank
from fewbits.formats.mix import parse_mix
from fewbits.formats.outliers import Outliers

FOLDER = Path(__file__).parent / "native"
SHAPE = (8, 64)


def weight(seed: int, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def stored(name: str, seed: int, shape: tuple[int, int] = SHAPE, **more: object) -> Stored:
    found = parse_format(name).with_scale_dtype(torch.bfloat16).quantize(weight(seed, shape))
    return Stored(format=found.format, shape=shape, state=found.to_state(), **more)  # type: ignore[arg-type]


def stored_mix(name: str, seed: int) -> StoredMix:
    found = parse_mix(name).with_scale_dtype(torch.bfloat16).quantize(weight(seed))
    return StoredMix(mix=found.format, shape=SHAPE, state=found.to_state())


def versions() -> dict[int, dict[str, Stored | StoredMix]]:
    names = ("nf4-g32", "int4-asym-g32", "int3-g24", "int4-min-g32", "mxfp4", "nvfp4", "nf4-g32-dq", "lloyd4_fit-g32")
    first = {name.replace("-", "_"): stored(name, seed) for seed, name in enumerate(names)}
    first["q4_k"] = stored("q4_k", 20, (4, 256))
    first["int8_token"] = stored("int8-channel", 21, activations=parse_format("int8-token"))
    factors = LowRank(out=weight(31, (8, 2)).bfloat16(), into=weight(32, (2, 64)).bfloat16())
    columns = torch.tensor([3, 17], dtype=torch.int32)
    outliers = Outliers(threshold=6.0, columns=columns, weight=weight(34)[:, columns.long()].half())
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    static = parse_format("int8-tensor-static")
    return {
        1: first,
        2: {"hadamard": stored("int4-g32", 30, input_hadamard=(4, 16))},
        3: {"residual": stored("int4-g32", 33, residual=factors)},
        4: {"outliers": stored("int8-channel", 34, outliers=outliers)},
        5: {"order": stored("int4-g32", 35, order=order)},
        6: {"static": stored("int8-channel", 36, activations=static, inputs={"input_scale": torch.full((1, 1), 0.02)})},
        7: {"mix": stored_mix("int4-asym-g16@25+nf4-g16@25+int3-g24", 37)},
    }


def encoded(found: Stored | StoredMix) -> dict[str, torch.Tensor]:
    return found.state if isinstance(found, StoredMix) else CODEC.encode(found)


def entry(found: Stored | StoredMix) -> dict[str, object]:
    if isinstance(found, StoredMix):
        return module_entry(found.mix, None, found.shape)
    modules = CODEC.quantization({"m": found.layer}, [])["quantization_config"]["modules"]
    return dict(modules["m"])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for version, modules in versions().items():
        path = FOLDER / f"v{version}.safetensors"
        if path.exists():
            continue
        tensors = {f"{m}.{part}": value for m, found in modules.items() for part, value in encoded(found).items()}
        tensors |= {f"{module}.expected": found.dense() for module, found in modules.items()}
        config = quantization_config({module: entry(found) for module, found in modules.items()})
        assert config["version"] == version, (version, config["version"])
        items = [(name, value.dtype, tuple(value.shape), lambda v=value: v) for name, value in tensors.items()]
        write_stream(path, items, {"quantization_config": json.dumps(config)})


if __name__ == "__main__":
    main()
