"""Topology tables, the walk, and blocks that are loaded and released, on tiny models of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.skeleton import load_block, load_model, release_block, skeleton
from fewbits.models.topology import TOPOLOGIES, Topology, find_topology, gguf_topology
from fewbits.models.walk import ExpertRef, LinearRef, blocks, input_groups, linears

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "olmo2": Olmo2Config(**SIZES),
    "phi3": Phi3Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **MOE, head_dim=8),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=16),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
UNKNOWN = {
    "opt": OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        word_embed_proj_dim=32,
    ),
    "gpt_oss": GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"] * 2
    ),
}
EVERY = CONFIGS | UNKNOWN


def build(config: PreTrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


def family(name: str) -> Topology:
    found = find_topology({"model_type": name})
    assert found is not None
    return found


def test_tables_agree_with_their_names() -> None:
    for name, topology in TOPOLOGIES.items():
        assert topology.name == name
        assert all(find_topology({"model_type": model_type}) is topology for model_type in topology.model_types)
    assert find_topology({"model_type": "opt"}) is None
    assert find_topology({}) is None


def test_gguf_architectures() -> None:
    assert gguf_topology("llama") is TOPOLOGIES.get("llama")
    assert gguf_topology("llama", experts=True) is TOPOLOGIES.get("mixtral")
    assert gguf_topology("qwen3moe", experts=True) is TOPOLOGIES.get("qwen3_moe")
    assert gguf_topology("bloom") is None


@pytest.mark.parametrize("name", CONFIGS)
def test_every_name_in_a_table_exists_in_the_model(name: str) -> None:
    topology, model = family(name), build(CONFIGS[name])
    modules = dict(model.named_modules())
    assert {topology.blocks, topology.embeddings, topology.final_norm, topology.head} <= modules.keys()
    for _, block in blocks(model, topology):
        inside = dict(block.named_modules())
        refs = {ref.name for ref in linears(block, topology)}
        kinds = {ref.kind for ref in linears(block, topology)}
        for norm, fed in topology.norms:
            assert norm in inside
            assert {linear for linear in fed if "*" not in linear} <= inside.keys() | refs
        assert kinds <= {kind for group in topology.shared_inputs for kind in group}
        assert set(topology.routers) <= inside.keys()
        assert not refs & set(topology.routers)


@pytest.mark.parametrize("name", EVERY)
def test_blocks_are_found_without_a_table(name: str) -> None:
    model = build(EVERY[name])
    found = blocks(model)
    assert [block for _, block in found] == [block for _, block in blocks(model, find_topology({"model_type": name}))]
    modules = dict(model.named_modules())
    assert len(found) == 2
    assert all(modules[path] is block for path, block in found)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(Unsupported, match="Linear has no list of blocks"):
        blocks(nn.Linear(2, 2))


def test_linears_of_a_llama_block() -> None:
    topology = family("llama")
    _, block = blocks(build(CONFIGS["llama"]), topology)[0]
    refs = linears(block, topology)
    assert [ref.name for ref in refs] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert all(isinstance(ref, LinearRef) and ref.disk_name == ref.name for ref in refs)
    assert [[ref.kind for ref in group] for group in input_groups(refs, topology)] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]
    ]  # fmt: skip
    assert len(input_groups(refs)) == 7
    refs[0].write(torch.ones(32, 32))
    assert torch.equal(block.self_attn.q_proj.weight, torch.ones(32, 32))
    assert refs[0].shape == (32, 32)
    assert refs[0].bias is None


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "qwen2_moe", "olmoe"])
def test_experts_are_seen_as_the_checkpoint_names_them(name: str, tmp_path: Path) -> None:
    model, topology = build(CONFIGS[name]), family(name)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    seen = set()
    for prefix, block in blocks(model, topology):
        refs = linears(block, topology)
        assert sum(isinstance(ref, ExpertRef) for ref in refs) == 12
        for ref in refs:
            stored = f"{prefix}.{ref.disk_name}.weight"
            assert torch.equal(ref.weight, source.tensor(stored)), stored
            assert ref.shape == source.info(stored).shape
            seen.add(stored)
    rest = set(source.names()) - seen
    routers = tuple(f"{topology.disk_name(f'.{router}.').strip('.')}.weight" for router in topology.routers)
    left = {stored for stored in rest if len(source.info(stored).shape) > 1 and not stored.endswith(routers)}
    assert left == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("name", EVERY)
def test_loaded_from_its_checkpoint_a_model_computes_the_same(name: str, tmp_path: Path) -> None:
    model = build(EVERY[name])
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(load_model(open_source(tmp_path))(ids).logits, expected)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral", "opt"])
def test_blocks_come_and_go(name: str, tmp_path: Path) -> None:
    model = build(EVERY[name])
    model.save_pretrained(tmp_path)
    source, topology = open_source(tmp_path), find_topology({"model_type": name})
    empty = skeleton(source.config())
    assert all(parameter.is_meta for parameter in empty.parameters())
    for (prefix, block), (_, whole) in zip(blocks(empty, topology), blocks(model, topology), strict=True):
        load_block(block, prefix, source, dtype=torch.float32, topology=topology)
        for path, value in whole.state_dict().items():
            assert torch.equal(block.state_dict()[path], value)
        release_block(block)
        assert all(parameter.is_meta for parameter in block.parameters())
        load_block(block, prefix, source, dtype=torch.bfloat16, topology=topology)
        assert all(parameter.dtype is torch.bfloat16 for parameter in block.parameters())
        release_block(block)


def test_computed_buffers_of_a_skeleton_are_real() -> None:
    config = CONFIGS["llama"].to_dict()
    empty, model = skeleton(config), build(CONFIGS["llama"])
    assert torch.equal(empty.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not empty.training


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    build(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path)
    loaded = load_model(open_source(tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    release_block(loaded.lm_head)
    assert not loaded.model.embed_tokens.weight.is_meta


def test_what_cannot_be_built_or_loaded_is_named(tmp_path: Path) -> None:
    config = CONFIGS["llama"].to_dict()
    with pytest.raises(Unsupported, match="model_type 'lama' is not one transformers knows"):
        skeleton(config | {"model_type": "lama"})
    with pytest.raises(BadInput, match=r"config\.json has no model_type"):
        skeleton({})
    with pytest.raises(BadInput, match="describes no llama model"):
        skeleton(config | {"hidden_size": -3})
    model = build(CONFIGS["llama"])
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    deeper = skeleton(config | {"num_hidden_layers": 3})
    with pytest.raises(BadInput, match=r"needs tensor 'model\.layers\.2\..*nearest"):
        load_block(deeper, "", source)
    wider = skeleton(config | {"intermediate_size": 50})
    with pytest.raises(
        BadInput, match=r"mlp\.gate_proj\.weight' has shape \[48, 32\]; config\.json asks for \[50, 32\]"
    ):
        load_block(wider, "", source)


class Experts(nn.Module):
    """Fused experts in every layout transformers has."""

    def __init__(self, *, transposed: bool, concatenated: bool = True, gated: bool = True) -> None:
        super().__init__()
        first = (4, 48, 32) if gated else (4, 24, 32)
        shapes = {"gate_up_proj" if gated else "up_proj": first, "down_proj": (4, 32, 24)}
        for name, (count, rows, columns) in shapes.items():
            shape = (count, columns, rows) if transposed else (count, rows, columns)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.is_concatenated = concatenated
        self.act_fn = torch.nn.functional.silu


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
def test_expert_views(transposed: bool, concatenated: bool) -> None:
    experts = Experts(transposed=transposed, concatenated=concatenated)
    refs = [ref for ref in linears(nn.ModuleDict({"experts": experts})) if isinstance(ref, ExpertRef)]
    assert [ref.name for ref in refs[:3]] == [
        "experts.0.gate_proj",
        "experts.0.up_proj",
        "experts.0.down_proj",
    ]
    assert [ref.shape for ref in refs[:3]] == [(24, 32), (24, 32), (32, 24)]
    for number, ref in enumerate(refs):
        ref.write(torch.full(ref.shape, float(number)))
    assert all(torch.equal(ref.weight, torch.full(ref.shape, float(number))) for number, ref in enumerate(refs))
    fused = experts.gate_up_proj[1].T if transposed else experts.gate_up_proj[1]
    halves = (fused[:24], fused[24:]) if concatenated else (fused[0::2], fused[1::2])
    assert bool((halves[0] == 3).all()) and bool((halves[1] == 4).all())


def test_experts_without_gate() -> None:
    refs = linears(nn.ModuleDict({"experts": Experts(transposed=False, gated=False)}))
    assert [(ref.kind, ref.shape) for ref in refs[:2]] == [("up_proj", (24, 32)), ("down_proj", (32, 24))]


def test_inputs_of_an_expert_are_what_it_multiplies() -> None:
    model, topology = build(CONFIGS["qwen3_moe"]), family("qwen3_moe")
    _, block = blocks(model, topology)[0]
    refs = [ref for ref in linears(block, topology) if isinstance(ref, ExpertRef)]
    torch.manual_seed(1)
    hidden = torch.randn(10, 32)
    with torch.no_grad():
        _, weights, chosen = block.mlp.gate(hidden)
        expected = block.mlp.experts(hidden, chosen, weights)
        total = torch.zeros_like(hidden)
        for ref in refs:
            if ref.part == "down_proj":
                rows = (chosen == ref.index).any(dim=-1)
                share = (weights * (chosen == ref.index)).sum(dim=-1)[rows, None]
                total[rows] += share * (ref.inputs(hidden, chosen, weights) @ ref.weight.T)
            else:
                assert torch.equal(ref.inputs(hidden[None], chosen), hidden[(chosen == ref.index).any(dim=-1)])
    assert torch.allclose(total, expected, atol=1e-5)
