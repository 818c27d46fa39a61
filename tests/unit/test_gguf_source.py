"""GGUF files as sources: names, row orders, configuration and tokenizer of files that gguf wrote."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fewbits.checkpoints.gguf import GGUFFile
from fewbits.checkpoints.gguf_source import undo_rotary_order
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.skeleton import load_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
FAMILIES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, LlamaConfig(**SIZES, rms_norm_eps=1e-5)),
    "llama-tied": (gguf.MODEL_ARCH.LLAMA, LlamaConfig(**SIZES, tie_word_embeddings=True, rope_theta=5e5)),
    "llama-bias": (gguf.MODEL_ARCH.LLAMA, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, Qwen2Config(**SIZES)),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, Qwen3Config(**SIZES, head_dim=32)),
    "qwen3_moe": (gguf.MODEL_ARCH.QWEN3MOE, Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, head_dim=16)),
    "mixtral": (gguf.MODEL_ARCH.LLAMA, MixtralConfig(**SIZES, num_experts_per_tok=2, num_local_experts=4)),
}
TOKEN_TYPE_CONTROL = 3


def llama_cpp_order(value: np.ndarray, heads: int) -> np.ndarray:
    """The reordering llama.cpp's converter applies to q and k: halves of a head interleaved."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def build(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family][1]).eval()
    for parameter in model.parameters():  # norms of one and biases of zero would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def write(path: Path, family: str, model: torch.nn.Module, quantized: str = "F32") -> Path:
    """Writes `model` as llama.cpp's converter would, matrices as type `quantized`."""
    arch, config = FAMILIES[family]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    describe(writer, config)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        for target, value in tensors(arch, config, names, name, parameter.numpy()):
            kind = gguf.GGMLQuantizationType[quantized if value.ndim > 1 else "F32"]
            writer.add_tensor(target, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def describe(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_rope_dimension_count(width)
    experts = getattr(config, "num_experts", getattr(config, "num_local_experts", None))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))


def tensors(
    arch: gguf.MODEL_ARCH, config: LlamaConfig, names: gguf.TensorNameMap, name: str, value: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    block = name.split(".")[2] if ".layers." in name else ""
    if name.endswith("experts.gate_up_proj"):
        gate, up = np.split(value, 2, axis=1)
        return [(f"blk.{block}.ffn_gate_exps.weight", gate), (f"blk.{block}.ffn_up_exps.weight", up)]
    if name.endswith("experts.down_proj"):
        return [(f"blk.{block}.ffn_down_exps.weight", value)]
    if name.endswith("mlp.gate.weight"):
        return [(f"blk.{block}.ffn_gate_inp.weight", value)]
    if arch is gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
        value = llama_cpp_order(value, config.num_attention_heads)
    if arch is gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
        value = llama_cpp_order(value, config.num_key_value_heads)
    target = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert target is not None, name
    return [(target, value)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_read_back_computes_the_same(family: str, tmp_path: Path) -> None:
    model = build(family)
    source = open_source(write(tmp_path / "model.gguf", family, model))
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(load_model(source)(ids).logits, model(ids).logits)
    assert source.config()["model_type"] == FAMILIES[family][1].model_type
    assert source.dtype is torch.float32


@pytest.mark.parametrize("quantized", ["F16", "BF16", "Q4_0", "Q8_0"])
def test_names_shapes_and_types(quantized: str, tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    dense = open_source(tmp_path / "dense")
    source = open_source(write(tmp_path / "model.gguf", "llama", model, quantized))
    assert source.names() == dense.names()
    for name in source.names():
        info, value = source.info(name), source.tensor(name)
        assert (info.shape, info.dtype) == (tuple(value.shape), value.dtype)
        assert info.shape == dense.info(name).shape
        bound = 0 if value.dim() == 1 else {"F16": 1e-3, "BF16": 1e-2, "Q4_0": 0.2, "Q8_0": 0.02}[quantized]
        assert (value.float() - dense.tensor(name)).abs().max() <= bound * dense.tensor(name).abs().max()
    assert sum(source.info(name).nbytes for name in source.names()) < source.nbytes


def test_undoing_the_rotary_order_is_exact() -> None:
    rows = np.arange(48, dtype=np.float32).reshape(16, 3)
    assert np.array_equal(undo_rotary_order(torch.from_numpy(llama_cpp_order(rows, 2)), 2).numpy(), rows)


def test_identity_is_stable_and_sees_one_changed_weight(tmp_path: Path) -> None:
    model = build("llama")
    one = open_source(write(tmp_path / "a.gguf", "llama", model))
    moved = open_source(write(tmp_path / "b.gguf", "llama", model))
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] += 1
    other = open_source(write(tmp_path / "c.gguf", "llama", model))
    assert one.identity == moved.identity != other.identity


def add_tensors(writer: gguf.GGUFWriter, **values: np.ndarray) -> None:
    for name, value in values.items():
        writer.add_tensor(name.replace("__", "."), value)


def write_minimal(path: Path, change: object = None, architecture: str = "llama", **extra: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer, FAMILIES["llama"][1])
    if callable(change):
        change(writer)
    norms = {f"blk__{block}__attn_norm__weight": np.ones(64, dtype=np.float32) for block in range(2)}
    add_tensors(writer, token_embd__weight=np.zeros((300, 64), dtype=np.float32), **norms, **extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama3_rotary_scaling_is_recovered_from_its_tensor(tmp_path: Path) -> None:
    wanted = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**SIZES, rope_parameters=wanted), "cpu")
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    path = write_minimal(tmp_path / "m.gguf", rope_freqs__weight=(plain / scaled).numpy())
    source = open_source(path)
    assert source.config()["rope_parameters"] == wanted
    assert source.dropped == {"rope_freqs.weight": "rotary frequencies, expressed in config.json"}
    odd = np.linspace(1, 3, 8, dtype=np.float32)
    with pytest.raises(Unsupported, match="rope_freqs"):
        open_source(write_minimal(tmp_path / "odd.gguf", rope_freqs__weight=odd))


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    rope = open_source(write_minimal(tmp_path / "l.gguf", linear)).config()["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    rope = open_source(write_minimal(tmp_path / "y.gguf", yarn)).config()["rope_parameters"]
    assert (rope["rope_type"], rope["original_max_position_embeddings"]) == ("yarn", 64)


def test_what_cannot_be_read_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"architecture 'bloom'.*llama.*safetensors"):
        open_source(write_minimal(tmp_path / "a.gguf", architecture="bloom"))
    strange = np.zeros((4, 4), dtype=np.float32)
    with pytest.raises(Unsupported, match=r"blk\.0\.ssm_a\.weight.*no place"):
        open_source(write_minimal(tmp_path / "b.gguf", blk__0__ssm_a__weight=strange))
    with pytest.raises(BadInput, match=r"attn_q\.weight has 4 rows"):
        open_source(write_minimal(tmp_path / "c.gguf", blk__0__attn_q__weight=strange))
    writer = gguf.GGUFWriter(tmp_path / "d.gguf", "llama")
    describe(writer, FAMILIES["llama"][1])
    kind = gguf.GGMLQuantizationType.NVFP4
    writer.add_tensor("token_embd.weight", np.zeros((300, 36), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Unsupported, match=r"NVFP4.*Q4_K"):
        open_source(tmp_path / "d.gguf")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_embedding_length(64)
    add_tensors(writer, token_embd__weight=np.zeros((300, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInput, match=r"llama\.attention\.head_count is None"):
        open_source(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def original_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits digits, trained on a line of text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog sat there too"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    import json

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TOKEN_TYPE_CONTROL if index < 3 else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")


def test_tokenizer_is_rebuilt_and_saves(tmp_path: Path, original_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_minimal(tmp_path / "m.gguf", lambda writer: add_tokenizer(writer, original_tokenizer))
    source = open_source(path)
    tokenizer = source.load_tokenizer()
    text = "the cat 1234 sat<|im_end|>\n  the dög"
    assert tokenizer(text).input_ids == original_tokenizer(text).input_ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert source.generation_config() == {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert source.companion_files() == []
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text).input_ids == original_tokenizer(text).input_ids
    chat = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(chat, tokenize=False) == "<|im_start|>hi<|im_end|>"


def test_damaged_tokenizers_are_refused(tmp_path: Path, original_tokenizer: PreTrainedTokenizerFast) -> None:
    def too_high(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "ab"])
        writer.add_bos_token_id(7)

    def bad_merge(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b"])
        writer.add_token_merges(["ab"])

    def too_many(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "ab", *(f"t{index}" for index in range(301))])
        writer.add_token_merges(["a b"])

    for index, (change, message) in enumerate(
        [
            (None, "no tokenizer"),
            (too_high, "there are 2 tokens"),
            (bad_merge, "merges"),
            (too_many, "only 300 rows"),
        ]
    ):
        source = open_source(write_minimal(tmp_path / f"{index}.gguf", change))
        with pytest.raises(BadInput, match=message):
            source.load_tokenizer()


def test_slices_of_a_tensor(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 32)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("experts", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    whole = file.tensor("experts")
    assert all(torch.equal(file.tensor("experts", index), whole[index]) for index in range(3))
    with pytest.raises(BadInput, match="no slice 3"):
        file.tensor("experts", 3)
    with pytest.raises(BadInput, match="nearest: experts"):
        file.tensor("expert")


def test_counts_that_the_tensors_do_not_bear_out_are_refused(tmp_path: Path) -> None:
    def deep(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["llama.block_count"].value = 2**31 - 1

    with pytest.raises(BadInput, match="claims 2147483647 blocks and has tensors for 2"):
        open_source(write_minimal(tmp_path / "a.gguf", deep))

    def experts(writer: gguf.GGUFWriter) -> None:
        writer.add_expert_count(2)
        writer.add_expert_used_count(1)

    many = np.zeros((20_000, 1, 1), dtype=np.float32)
    with pytest.raises(BadInput, match="is for 20000 experts"):
        open_source(write_minimal(tmp_path / "b.gguf", experts, blk__0__ffn_up_exps__weight=many))
