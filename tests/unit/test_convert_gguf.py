"""`convert` to GGUF and from it: the same values wherever a type has them, else refused or accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runtime_models import quantized_weights, saved, tiny_llama, write_quantized

from fewbits.checkpoints.codecs import quantized_modules
from fewbits.checkpoints.gguf_export import write_gguf
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import Unsupported
from fewbits.formats import parse_format
from fewbits.pipeline.convert import RECORD, convert

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "layers": 1}


def checkpoint(directory: Path, name: str, kind: str = "native") -> Path:
    model = tiny_llama(**WIDE)
    weights = quantized_weights(model, parse_format(name).with_scale_dtype(torch.bfloat16))
    return write_quantized(directory, model, weights, kind=kind)


def values(path: Path) -> dict[str, torch.Tensor]:
    """The blocks' matrices as a checkpoint decodes them."""
    source = open_source(path, allow_quantized=True)
    packed = quantized_modules(source)
    names = [name for name in source.names() if name.endswith("_proj.weight")]
    found: dict[str, Any] = {name: source.tensor(name).float() for name in names}
    return found | {f"{module}.weight": packed.dense(module) for module in packed.entries}


def same(a: Path, b: Path) -> bool:
    left, right = values(a), values(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("int4-g32", "compressed-tensors"), ("int8-channel", "compressed-tensors"), ("int4-asym-g64", "native"),
        ("mxfp4", "native"), ("q4_k", "native"), ("iq4_nl", "native"), ("ternary-g256", "native"),
    ],
)  # fmt: skip
def test_there_and_back_nothing_is_rounded(name: str, kind: str, tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "a", name, kind)
    there = convert(first, "gguf", tmp_path / "b")
    assert set(there.actions) == {"lossless"} and len(there.layers) == 7
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [RECORD, "model.gguf"]
    assert same(first, tmp_path / "b")
    back = convert(tmp_path / "b", "native", tmp_path / "c")
    assert (back.format, set(back.actions)) == ("gguf", {"lossless"})
    assert same(first, tmp_path / "c")
    convert(tmp_path / "c", "gguf", tmp_path / "d")
    assert same(first, tmp_path / "d")


def test_legacy_types_go_to_what_others_read(tmp_path: Path) -> None:
    saved(tiny_llama(**WIDE), tmp_path / "m")
    for name, targets in {
        "q4_0": ("compressed-tensors", "gptq_v2", "mlx"),
        "q8_0": ("gptq",),
        "q4_1": ("mlx",),
    }.items():
        path = tmp_path / f"{name}.gguf"
        write_gguf(open_source(tmp_path / "m"), path, weights=name, dense="F32")
        for to in targets:
            out = tmp_path / f"{name}-{to}"
            done = convert(path, to, out)
            assert set(done.actions) == {"lossless"}, done.layers
            assert same(path, out)


def test_what_no_type_holds_is_refused_or_rounded_again(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "a", "nf4-g64")
    with pytest.raises(Unsupported, match=r"nf4-g64.*--requantize"):
        convert(first, "gguf", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    done = convert(first, "gguf", tmp_path / "b", requantize=True)
    assert {layer.after for layer in done.layers} == {"iq4_nl"}
    assert all(layer.action == "requantized" and 15 < (layer.sqnr_db or 0) < 40 for layer in done.layers)


def test_the_embedded_model_is_not_taken_for_its_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing in it is quantized"):
        convert("demo", "native", tmp_path / "b")
