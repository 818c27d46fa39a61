"""EXL3 against a second reading of its kernels (exl3_oracle.py): code books, tiles, channels filled up, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exl3_oracle import codeword, random_linear
from safetensors.torch import save_file
from torch import Tensor

from fewbits.checkpoints.codecs import quantized_modules
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.pipeline.convert import convert

CONFIG: dict[str, Any] = {"quantization_config": {"quant_method": "exl3", "bits": 4}}


class Memory:
    path = "memory"

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any] = CONFIG) -> None:
        self.tensors, self._config = tensors, config

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise BadInput(f"no tensor {name}")
        return self.tensors[name].clone()

    def config(self) -> dict[str, Any]:
        return self._config


@pytest.mark.parametrize(
    ("bits", "book", "old"),
    [(1, "mul1", False), (2, "3inst", True), (3, "mcg", False), (4, "3inst", False), (5, "mul1", False),
     (6, "3inst", False), (7, "mcg", True), (8, "mul1", True)],
)  # fmt: skip
def test_values_are_those_of_the_definition(bits: int, book: str, old: bool) -> None:
    tensors, expected = random_linear(bits, book, old=old)
    modules = quantized_modules(Memory(tensors))  # type: ignore[arg-type]
    assert modules.name == "exl3" and set(modules.entries["m"].parts) == set(tensors)
    found = modules.dense("m")
    assert found.shape == (256, 128) and found.dtype == torch.float32
    # Two transforms of 128 in float32: 14 additions deep.
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=20 * 2**-24 * np.abs(expected).max())


@pytest.mark.parametrize("book", ["3inst", "mcg", "mul1"])
def test_the_code_books_number_by_number(book: str) -> None:
    from fewbits.checkpoints.exl3 import _values

    values = _values(book)
    assert values.shape == (65536,) and abs(float(values.mean())) < 0.01
    # exllamav3 calls 1.24371088 its code books' scale; the sum of bytes is divided by its standard deviation.
    assert float(values.std()) == pytest.approx(1.0 if book == "mul1" else 1.24371088, rel=0.002)
    assert all(float(values[state]) == codeword(state, book) for state in range(0, 65536, 7))


def test_channels_that_were_filled_up_are_cut(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": 200,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, **CONFIG,
    }  # fmt: skip
    tensors, expected = random_linear(2, "3inst")
    named = {f"model.layers.0.mlp.up_proj.{name.removeprefix('m.')}": value for name, value in tensors.items()}
    modules = quantized_modules(Memory(named, config))  # type: ignore[arg-type]
    found = modules.dense("model.layers.0.mlp.up_proj")
    np.testing.assert_allclose(found.numpy(), expected[:200, :96], atol=1e-5)
    config["intermediate_size"] = 300
    with pytest.raises(BadInput, match=r"asks for \(300, 96\)"):
        quantized_modules(Memory(named, config)).read("model.layers.0.mlp.up_proj")  # type: ignore[arg-type]


def test_it_converts_to_dense(tmp_path: Path) -> None:
    tensors, expected = random_linear(3, "mcg")
    folder = tmp_path / "exl3"
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "none", "dtype": "float16", **CONFIG}))
    (folder / "tokenizer.json").write_text("{}")
    done = convert(folder, "dense", tmp_path / "out", dtype=torch.float16)
    assert any("EXL3" in note for note in done.notes)
    found = open_source(tmp_path / "out").tensor("m.weight")
    assert found.dtype == torch.float16
    np.testing.assert_allclose(found.float().numpy(), expected, rtol=2**-11, atol=1e-5)
    with pytest.raises(Unsupported, match="decoded"):
        convert(folder, "gptq", tmp_path / "no")
    assert convert(folder, "gptq", tmp_path / "yes", requantize=True).layers[0].action == "requantized"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m.trellis": torch.zeros((8, 16, 0), dtype=torch.int16)}, "tiles of 0 words"),
        ({"m.trellis": torch.zeros((8, 16, 40), dtype=torch.int16)}, "tiles of 40 words"),
        ({"m.trellis": torch.zeros((8, 16, 9 * 16), dtype=torch.int16)}, "tiles of 144 words"),
        ({"m.trellis": torch.zeros((7, 16, 64), dtype=torch.int16)}, "no whole blocks"),
        ({"m.trellis": torch.zeros((0, 16, 64), dtype=torch.int16)}, "no whole blocks"),
        ({"m.trellis": torch.zeros((8, 16, 64), dtype=torch.int32)}, "int16"),
        ({"m.suh": torch.ones(64, dtype=torch.float16)}, "64 scales of su for 128"),
        ({"m.suh": torch.full((128,), float("nan"), dtype=torch.float16)}, "NaN"),
        ({"m.mul1": torch.tensor(1, dtype=torch.int32)}, "two code books"),
        ({"m.mcg": torch.tensor(1, dtype=torch.int32)}, "factor 0x1"),
        ({"m.mcg": torch.zeros(2, dtype=torch.int32)}, "one 32-bit number"),
        ({"m.svh": None}, "sv"),
    ],
)
def test_what_is_damaged_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    tensors, _ = random_linear(4, "mcg")
    changed: Any = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises((BadInput, Unsupported), match=message):
        quantized_modules(Memory(changed)).read("m")  # type: ignore[arg-type]
