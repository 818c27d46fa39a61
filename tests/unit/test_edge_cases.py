"""Where quantizers have gone wrong in the field: zero points, ties, biases, shared tensors, transposes, odd widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_awq import first_block
from test_pipeline import run, tensors
from tiny_runtime_models import saved, tiny_llama
from torch import Tensor, nn

from fewbits.algorithms.awq import AWQ, scales
from fewbits.algorithms.base import Block, Stage
from fewbits.algorithms.channels import Scalable, scalables
from fewbits.calibration.collect import collect_inputs, input_stages
from fewbits.calibration.stats import InputSum
from fewbits.checkpoints import compressed_tensors
from fewbits.checkpoints.codecs import Entry
from fewbits.checkpoints.exl2 import CODEC
from fewbits.checkpoints.safetensors_file import SafetensorsFile
from fewbits.core.errors import BadInput, FewbitsError, Unsupported
from fewbits.formats import Quantized, parse_format
from fewbits.models.topology import Topology
from fewbits.models.walk import linears

WANTED = frozenset({"hessian", "mean_abs"})


# --- zero points ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_zero_points_at_both_ends_are_stored_as_they_are(width: int) -> None:
    """Files that store zero - 1 wrap at zero 0, and a reader of the other kind moves every weight by one step."""
    format, top = parse_format(f"int{width}-asym-g32"), 2**width - 1
    weight = torch.rand(6, 64) + 1
    weight[3:] *= -1
    found = format.quantize(weight)
    assert found.zero is not None and found.zero[:3].unique().tolist() == [0]
    assert found.zero[3:].unique().tolist() == [top]
    again = Quantized.from_state(format, found.shape, found.to_state())
    assert again.zero is not None and torch.equal(again.zero, found.zero)
    assert torch.equal(again.dequantize(), found.dequantize())
    if width == 4:
        packed = compressed_tensors.encode(found, None)["weight_zero_point"]
        nibbles = torch.stack([(packed.flatten() >> shift) & 15 for shift in range(0, 32, 4)], dim=1)
        assert set(nibbles.flatten().tolist()) <= {0, top}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["int4-asym-g32", "int2-asym-g32", "int8-asym-channel"])
def test_groups_on_one_side_of_zero_do_not_saturate(name: str, sign: int) -> None:
    """Zero is brought into the range; a zero point clamped for a range without it would cut the weights off."""
    format = parse_format(name)
    weight = sign * (5 + torch.rand(4, 64, generator=torch.Generator().manual_seed(0)))
    found = format.quantize(weight)
    step = format.expand(found.scale, found.zero, found.shape)[0].float()
    assert bool(((weight - found.dequantize()).abs() <= 0.501 * step).all())


# --- ties -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "top"), [(2, 1), (3, 3), (4, 7), (8, 127)])
def test_the_largest_weight_of_a_symmetric_group_is_a_tie_with_a_rule(width: int, top: int) -> None:
    """Its scale is 2 max / (2^b - 1), so the largest lies half a level out: +max goes to the last, -max beyond it."""
    largest = top + 0.5
    weight = torch.tensor([[largest, *[0.0] * 31], [-largest, *[0.0] * 31]])
    found = parse_format(f"int{width}-g32").quantize(weight)
    assert found.scale.flatten().tolist() == [1, 1]
    assert found.dequantize()[:, 0].tolist() == [top, -top - 1]


def test_ties_between_codes_go_to_the_even_one() -> None:
    weight = torch.tensor([[7.5, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5]])
    assert parse_format("int4-channel").quantize(weight).dequantize()[0, 1:].tolist() == [0, 2, 2, 4, 0, -2, -2]


# --- widths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq,refine", "hqq"])
def test_an_odd_number_of_codes_and_a_short_last_group(tmp_path: Path, method: str) -> None:
    """An MLP of 150 in groups of 64: 64, 64 and 22; one of 75: rows end in half a byte."""
    for name, size in (("short", 150), ("odd", 75)):
        saved(tiny_llama(layers=1, intermediate_size=size), tmp_path / name)
        out = run(tmp_path / name, tmp_path / f"{name}-q", "int4-asym-g64", method=method, checkpoint_format="native")
        codes = tensors(out)["model.layers.0.mlp.down_proj.codes"]
        assert codes.shape == (64, (size + 1) // 2)


# --- activations that overflow --------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("statistic", ["hessian", "mean_abs", "rows"])
def test_inputs_that_overflowed_are_refused_by_name(statistic: str, value: float) -> None:
    x = torch.ones(8, 16)
    x[3, 5] = value
    total = InputSum(16, frozenset({statistic}))
    total.add(x)
    with pytest.raises(FewbitsError, match=r"mlp\.down_proj: .*NaN or infinite; run calibration in float32"):
        total.inputs("mlp.down_proj")


def test_scales_that_no_float16_can_store_are_no_candidates_for_awq() -> None:
    """A weight near the end of float16, scaled up, has no scale left; the search goes on with the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator)
    x[:, 3] *= 100
    layer = nn.Linear(32, 16, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(16, 32, generator=generator).clamp(-3, 3) * 4e4)
    seen = InputSum(32, WANTED)
    seen.add(x)
    stage = Stage(refs=linears(nn.ModuleDict({"up": layer})), inputs=seen.inputs("up"))
    place = Scalable(producer="norm", stages=[stage], fold=lambda s: frozenset())
    for dtype in (torch.bfloat16, torch.float16):
        format = parse_format("int4-g16").with_scale_dtype(dtype)
        s = AWQ().best(place, format, "up")
        assert s is not None and float(s[3]) > 1.5 * float(s.median())
        format.quantize(layer.weight * s)
    with pytest.raises(BadInput, match="overflows"):
        format.quantize(layer.weight * scales(seen.inputs("up").mean_abs, 0.95))


def test_a_channel_that_was_always_zero_keeps_its_scale_in_awq() -> None:
    active = torch.tensor([0.0, 1.0, 2.0, 3.0])
    s = scales(active, 0.9)
    assert float(s.min()) < float(s[0]) < float(s.max())


# --- biases ---------------------------------------------------------------------------------------


def test_the_bias_of_a_norm_is_scaled_with_its_gain() -> None:
    """What the norm adds reaches the linear as much as what it multiplies."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"norm": nn.LayerNorm(16), "up": nn.Linear(16, 24)}).double()
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=float("norm.weight" in name))

    def forward(x: Tensor) -> Tensor:
        found: Tensor = module["up"](module["norm"](x))
        return found.detach()

    x = torch.randn(40, 16, dtype=torch.float64)
    before, refs = forward(x), linears(module)
    sums = collect_inputs(input_stages(refs, lambda: forward(x)), forward, [x], WANTED)
    family = Topology(name="one", model_types=(), norms=(("norm", ("up",)),), products=(), value_output=None)
    stage = Stage(refs=refs, inputs=sums["up"].inputs("up"))
    block = Block(name="b", module=module, topology=family, stages=[stage], format=parse_format("int3-g16"))
    (place,) = scalables(block)
    assert place.scale(torch.rand(16, dtype=torch.float64) + 0.5) == {"norm.weight", "norm.bias"}
    torch.testing.assert_close(forward(x), before)


def test_a_bias_does_not_enter_the_statistics_and_goes_out_as_it_came(tmp_path: Path) -> None:
    """Codes are of W on x: whatever is added afterwards changes neither of the two, in the first block."""
    outs = []
    for name, shift in (("a", 0.0), ("b", 5.0)):
        model = tiny_llama(layers=1, model_type="qwen2")
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.bias += shift
        saved(model, tmp_path / name)
        outs.append(tensors(run(tmp_path / name, tmp_path / f"{name}-q", eval_samples=0)))
    biases = [out["model.layers.0.self_attn.v_proj.bias"] for out in outs]
    torch.testing.assert_close(biases[1] - biases[0], torch.full_like(biases[0], 5.0))
    for name in (n for n in outs[0] if ".v_proj.weight" in n):
        assert torch.equal(outs[0][name], outs[1][name])


# --- tensors that two modules share ---------------------------------------------------------------


def test_the_embeddings_of_a_tied_head_are_untouched(tmp_path: Path) -> None:
    """Rounding the head in place would round the embeddings with it."""
    saved(tiny_llama(layers=1, tied=True), tmp_path / "m")
    with pytest.raises(Unsupported, match="lm_head shares its tensor with the embeddings"):
        run(tmp_path / "m", tmp_path / "q", ignore=())
    out = tensors(run(tmp_path / "m", tmp_path / "q", "int2-g32", method="rtn", eval_samples=0))
    source = tensors(tmp_path / "m")
    assert torch.equal(out["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    assert "lm_head.weight" not in out


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "size", "bits"), [([4] * 32, 128, 4.039154052734375), ([3] * 4 + [2] * 60, 64, 2.1329956054687500)]
)
def test_exl2_takes_the_bits_it_says(tmp_path: Path, widths: list[int], size: int, bits: float) -> None:
    """Codes, 4-bit scales, 16 bits and 32 a group, and the order of the inputs, of a 4096 x 4096 linear."""
    groups, side = len(widths), 4096
    words = [size * width // 32 for width in widths]
    starts = [sum(words[:index]) for index in range(groups)]
    parts = {
        "q_weight": torch.zeros(sum(words), side, dtype=torch.int32),
        "q_groups": torch.tensor([widths, starts]).t().flatten().to(torch.int16),
        "q_scale": torch.zeros(groups, side // 8, dtype=torch.int32),
        "q_scale_max": torch.ones(groups, dtype=torch.float16),
        "q_invperm": torch.arange(side, dtype=torch.int32),
    }
    assert 8 * sum(part.numel() * part.itemsize for part in parts.values()) == bits * side**2
    save_file({f"m.{name}": part for name, part in parts.items()}, tmp_path / "exl2.safetensors")
    entry = Entry(tensor="m.weight", parts=tuple(f"m.{name}" for name in parts))
    found = CODEC.read(SafetensorsFile(tmp_path / "exl2.safetensors"), "m", entry)  # type: ignore[arg-type]
    assert found.value.shape == (side, side)
    assert found.value[0, ::size].tolist() == [-(2 ** (width - 1)) / 256 for width in widths]


# --- layouts --------------------------------------------------------------------------------------


def test_heads_that_share_keys_and_values_share_their_scales() -> None:
    _, _, block = first_block("llama")
    place: Scalable = next(each for each in scalables(block) if each.producer == "self_attn.v_proj")
    (ref,) = place.stages[0].refs
    rows = next(r.shape[0] for stage in block.stages for r in stage.refs if r.kind == "v_proj")
    assert place.repeat is not None and rows * place.repeat[0] == ref.shape[1]
    tied = place.tie(torch.arange(ref.shape[1]).float())
    assert len(tied.unique()) == rows


def test_weights_stored_transposed_are_refused_and_not_rounded_across(tmp_path: Path) -> None:
    """GPT-2's Conv1D holds [in, out]: groups along its last axis would share scales across outputs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 264, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 256}
    saved(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=257)), tmp_path / "m")
    with pytest.raises(Unsupported, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D.*\[in, out\]"):
        run(tmp_path / "m", tmp_path / "q")


def test_experts_without_a_hook_are_seen(tmp_path: Path) -> None:
    """Fused experts have no linear to hook; calibration that missed them would find no tokens at all."""
    options: dict[str, Any] = {
        "layers": 1, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "tied": False,
        "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    model = tiny_llama(**options)
    refs = linears(model.model.layers[0])
    ids = torch.arange(200)[None]

    def forward(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return model(batch).logits

    sums = collect_inputs(input_stages(refs, lambda: forward(ids)), forward, [ids], WANTED)
    ups = [sums[ref.name] for ref in refs if ref.kind == "up_proj"]
    assert sum(each.tokens for each in ups) == 2 * ids.numel(), "each token goes to two experts, and to no more"
    assert all(bool(torch.isfinite(each.inputs("x").hessian).all()) for each in sums.values())
