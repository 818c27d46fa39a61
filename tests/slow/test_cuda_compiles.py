"""The CUDA kernels compile for the architectures they are for. This takes NVIDIA's compiler and no GPU."""

from __future__ import annotations

import pytest
import torch

from fewbits.kernels import cuda_attention, cuda_tokens, fragments, nvrtc
from fewbits.kernels.fragment_choices import Few, Many
from fewbits.kernels.fragment_layout import Layout

LAYOUTS = {
    "int4-g128": Layout(bits=4, table=False, group=128, zero=False, offset=8, half=False),
    "int4-asym-g96": Layout(bits=4, table=False, group=96, zero=True, offset=0, half=True),
    "lloyd3-g64": Layout(bits=3, table=True, group=64, zero=False, offset=0, half=False),
    "int2-asym-g16": Layout(bits=2, table=False, group=16, zero=True, offset=0, half=False),
    "int8-channel": Layout(bits=8, table=False, group=0, zero=False, offset=128, half=False),
}


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch) -> None:
    if (reason := nvrtc.available()) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))  # compiles, whatever was compiled before


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120a"])
def test_kernels_compile(name: str, architecture: str) -> None:
    layout = LAYOUTS[name]
    choices = [None, Few(), Few(rt=2, warps=8, mt=2, ring=3), Few(staged=True)]
    if architecture == "sm_90a":
        many = [Many(nt=16, wg=1, per_sm=2), Many(nt=64, wg=4, share=1), Many(nt=256, stages=3, share=0), Many(split=2)]
        if layout.group and layout.group % 64 == 0:
            many.append(Many(nt=32, apart=True))
        many.append(Many(nt=32, warpwise=True, apart=layout.group > 0))
        choices += [Few(split=4), *many]
    for config in choices:
        source = fragments.source(layout, config)
        assert nvrtc.compiled(source, (f"--gpu-architecture={architecture}", "--std=c++17")).startswith(b"\x7fELF")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("width", "groups", "ratio", "dtype"),
    [(128, 1, 4, torch.bfloat16), (128, 4, 8, torch.float16), (64, 2, 3, torch.float32), (256, 4, 12, torch.bfloat16)],
)
def test_attention_compiles(bits: int, width: int, groups: int, ratio: int, dtype: torch.dtype) -> None:
    config = cuda_attention.Config(bits=bits, width=width, groups=groups, ratio=ratio, dtype=dtype)
    assert config.stages >= config.crew and config.stages % config.crew == 0
    source = cuda_attention.source(config)
    for architecture in ("sm_90a", "sm_100a"):
        options = f"--gpu-architecture={architecture}", "--std=c++17"
        assert nvrtc.compiled(source, options).startswith(b"\x7fELF")


@pytest.mark.parametrize(("group", "zero"), [(128, False), (96, True), (0, False)])
def test_kernels_with_e4m3_tokens_compile(group: int, zero: bool) -> None:
    layout = Layout(bits=4, table=False, group=group, zero=zero, offset=0 if zero else 8, half=zero, e4m3=True)
    options = "--gpu-architecture=sm_90a", "--std=c++17"
    choices = (
        None, Many(nt=16, wg=1, apart=True), Many(nt=128, apart=True), Many(nt=64, wg=3, split=4, apart=True),
        Many(nt=256, stages=3), Many(nt=64, wg=4, stages=3, split=2),
    )  # fmt: skip
    for config in choices:
        source = fragments.source(layout, config)
        assert nvrtc.compiled(source, options).startswith(b"\x7fELF")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for columns in (100, 14336):
            source = cuda_tokens.source(dtype, columns, torch.float8_e4m3fn, part=layout.part)
            assert nvrtc.compiled(source, options).startswith(b"\x7fELF")


@pytest.mark.parametrize("before", ["none", "rms_norm", "silu"])
@pytest.mark.parametrize("output", [torch.int8, torch.float8_e4m3fn])
def test_rounding_of_tokens_compiles(output: torch.dtype, before: str) -> None:
    for architecture in ("sm_80", "sm_90a", "sm_120a") if output == torch.int8 else ("sm_89", "sm_90a", "sm_120a"):
        options = f"--gpu-architecture={architecture}", "--std=c++17"
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for columns in (100, 14336):
                source = cuda_tokens.source(dtype, columns, output, before)
                assert nvrtc.compiled(source, options).startswith(b"\x7fELF")
