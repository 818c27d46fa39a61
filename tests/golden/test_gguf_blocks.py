"""Our decoders against the reference decoders of the gguf package, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from fewbits.checkpoints.gguf_blocks import CHUNK_BLOCKS, TYPES, decode
from fewbits.checkpoints.gguf_pack import from_blocks, to_blocks
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import parse_format

NUMBERS = {kind.name: number for number, kind in TYPES.items()}
QUANTIZABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
I_QUANTS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ4_XS", "IQ4_NL")
ALL = (*QUANTIZABLE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", *I_QUANTS, "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4")
SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}
SCALES_AT |= {"TQ1_0": (52,), "TQ2_0": (64,)} | {name: (0,) for name in I_QUANTS} | {"IQ1_M": (), "MXFP4": ()}


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    return bool(torch.equal(ours.float().view(torch.int32), torch.from_numpy(theirs).view(torch.int32)))


def test_every_type_number_and_size_is_ggmls() -> None:
    for number, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert theirs.name == kind.name
        assert gguf.GGML_QUANT_SIZES[theirs] == (kind.values, kind.nbytes)


@pytest.mark.parametrize("name", QUANTIZABLE)
def test_decodes_what_gguf_quantizes(name: str) -> None:
    data = np.random.default_rng(0).standard_normal((6, 256), dtype=np.float32)
    kind = gguf.GGMLQuantizationType[name]
    packed = np.ascontiguousarray(gguf.quants.quantize(data, kind))
    ours = decode(torch.from_numpy(packed.view(np.uint8).reshape(-1).copy()), TYPES[NUMBERS[name]], (6, 256))
    assert same_bits(ours, gguf.quants.dequantize(packed, kind))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("F32", "F16", "BF16")])
def test_decodes_random_blocks(name: str) -> None:
    kind = TYPES[NUMBERS[name]]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (40, kind.nbytes), dtype=np.uint8)
    for offset in SCALES_AT.get(name, (0, 2)):
        scales = rng.standard_normal(40).astype(np.float16)  # any bits would include infinities and NaN
        raw[:, offset : offset + 2] = scales.view(np.uint8).reshape(40, 2)
    if name == "MXFP4":
        raw[:, 0] = rng.integers(0, 253, 40)  # 255 is NaN, and products beside it overflow
    if name == "TQ2_0":
        raw[:, :64] &= 0xAA  # digits 0 and 2: the pair 3 stands for none
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert same_bits(decode(torch.from_numpy(raw.reshape(-1).copy()), kind, theirs.shape), theirs)


def test_decoding_in_pieces_gives_the_same() -> None:
    kind = TYPES[NUMBERS["Q4_1"]]
    raw = torch.randint(0, 64, (CHUNK_BLOCKS + 3, kind.nbytes), dtype=torch.uint8)
    whole = decode(raw.reshape(-1), kind, (len(raw), 32))
    tail = decode(raw[CHUNK_BLOCKS - 1 :].reshape(-1), kind, (4, 32))
    assert torch.equal(whole[CHUNK_BLOCKS - 1 :], tail)


@pytest.mark.parametrize("name", ["IQ4_NL", "TQ1_0", "TQ2_0", "MXFP4"])
def test_packing_is_the_inverse(name: str) -> None:
    w = torch.randn(6, 512, generator=torch.Generator().manual_seed(3))
    weight = parse_format(name.lower()).quantize(w)
    raw = to_blocks(weight)
    assert same_bits(weight.dequantize(), gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(from_blocks(weight.format, raw).codes, weight.codes)
    error = (weight.dequantize() - w).square().mean() / w.square().mean()
    assert error < {"IQ4_NL": 0.009, "MXFP4": 0.02}.get(name, 0.2)


def test_damaged_blocks_are_refused() -> None:
    with pytest.raises(BadInput, match="code 3"):
        decode(torch.full((66,), 255, dtype=torch.uint8), TYPES[NUMBERS["TQ2_0"]], (256,))
    with pytest.raises(BadInput, match="exponent 255"):
        decode(torch.full((17,), 255, dtype=torch.uint8), TYPES[NUMBERS["MXFP4"]], (32,))


def test_a_type_without_decoder_is_named() -> None:
    kind = TYPES[NUMBERS["NVFP4"]]
    with pytest.raises(Unsupported, match=r"NVFP4.*Q4_K"):
        decode(torch.zeros(kind.nbytes, dtype=torch.uint8), kind, (256,))
