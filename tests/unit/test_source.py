"""Model directories as sources: files, dtypes, tied weights, companions, identity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewbits.checkpoints import hub
from fewbits.checkpoints.base import Source, sample_windows
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def save(
    path: Path, dtype: torch.dtype = torch.bfloat16, *, tied: bool = False, shard: str = "5GB"
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype)
    model.save_pretrained(path, max_shard_size=shard)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard", ["5GB", "30kB"])
def test_every_tensor_comes_back(dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    state = save(tmp_path, dtype, shard=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "30kB")
    source = open_source(tmp_path)
    assert isinstance(source, Source)
    assert source.names() == sorted(state)
    assert source.dtype is dtype
    for name, value in state.items():
        assert torch.equal(source.tensor(name), value)
        info = source.info(name)
        assert (info.shape, info.dtype, info.nbytes) == (tuple(value.shape), dtype, value.nbytes)
    assert source.nbytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    with pytest.raises(BadInput, match=r"nearest: model\.norm\.weight"):
        source.tensor("model.nrom.weight")


def test_tied_head(tmp_path: Path) -> None:
    state = save(tmp_path, tied=True)
    source = open_source(tmp_path)
    assert "lm_head.weight" not in source.names()
    assert source.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert torch.equal(source.tensor("lm_head.weight"), state["model.embed_tokens.weight"])
    assert source.info("lm_head.weight") == source.info("model.embed_tokens.weight")


def test_an_untied_head_is_not_made_up(tmp_path: Path) -> None:
    save(tmp_path)
    assert open_source(tmp_path).tied() == {}


def test_dtype_follows_the_weights_when_the_configuration_is_silent(tmp_path: Path) -> None:
    save(tmp_path, torch.float16)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_source(tmp_path).dtype is torch.float16


def test_identity(tmp_path: Path) -> None:
    save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = open_source(tmp_path / "a").identity
    assert first == open_source(tmp_path / "a").identity == open_source(tmp_path / "b").identity
    state = load_file(tmp_path / "b" / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][5, 6] += 1
    save_file(state, tmp_path / "b" / "model.safetensors")
    assert open_source(tmp_path / "b").identity != first
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    assert open_source(tmp_path / "c").identity != first


@pytest.mark.parametrize("size", [0, 1, 1 << 16, (1 << 16) + 1, 10**9])
def test_samples_reach_both_ends(size: int) -> None:
    windows = sample_windows(size)
    assert windows[0][0] == 0
    assert sum(windows[-1]) == size
    assert sum(length for _, length in windows) <= 1 << 16


def test_config_is_a_copy(tmp_path: Path) -> None:
    save(tmp_path)
    source = open_source(tmp_path)
    source.config()["rope_parameters"]["rope_theta"] = 1
    assert source.config()["rope_parameters"]["rope_theta"] == 10000.0


def tokenizer(count: int = 64) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(count)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", chat_template="{{ messages }}")


def test_companions_and_tokenizer(tmp_path: Path) -> None:
    save(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "LICENSE").write_text("as it is")
    (tmp_path / "modeling_custom.py").write_text("raise SystemExit")
    (tmp_path / "training_args.bin").write_bytes(b"")
    source = open_source(tmp_path)
    names = [path.name for path in source.companion_files()]
    assert names == sorted(
        [
            "LICENSE",
            "chat_template.jinja",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    assert source.load_tokenizer()("w3 w5").input_ids == [3, 5]
    assert source.generation_config() is not None


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    tokenizer(70).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="token id 69, the embeddings only 64 rows"):
        open_source(tmp_path).load_tokenizer()


def test_a_directory_without_tokenizer_says_so(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(BadInput, match="tokenizer cannot be loaded"):
        open_source(tmp_path).load_tokenizer()


def test_vocabulary_mismatch(tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 65}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"vocab_size 65, tensor .* has 64 rows"):
        open_source(tmp_path)


def test_quantized_checkpoints_need_permission(tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=r"quant_method gptq.*original model"):
        open_source(tmp_path)
    assert open_source(tmp_path, allow_quantized=True).config()["quantization_config"]["bits"] == 4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_of_other_types_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    state = save(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(state | {name: state[name].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(Unsupported, match=r"up_proj\.weight' is stored as .8.*BF16"):
        open_source(tmp_path)
    assert open_source(tmp_path, allow_quantized=True).tensor(name).dtype is dtype


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("a/b", True),
        ("gpt2", False),
        ("./a/b", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("a/..", False),
        ("~/model", False),
        ("a/b\n", False),
    ],
)
def test_what_looks_like_a_hub_id(name: str, wanted: bool) -> None:
    assert hub.is_hub_id(name) is wanted


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **options: object) -> str:
        raise LocalEntryNotFoundError("cannot find the snapshot\nand there is no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(BadInput, match=r"'owner/name' is neither.*cannot find the snapshot\)"):
        open_source("owner/name")


def test_a_hub_id_opens_as_its_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(tmp_path)
    asked: list[object] = []

    def cached(name: str, *, revision: str | None, allow_patterns: list[str], **options: object) -> str:
        asked.extend((name, revision))
        assert not any("bin" in pattern or ".py" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    source = open_source("owner/name", revision="abc")
    assert asked == ["owner/name", "abc"]
    assert source.path == "owner/name"
    assert source.identity == open_source(tmp_path).identity


@pytest.mark.parametrize("layers", [3, 10**9, 0, -1, "2", 2.0])
def test_more_blocks_than_tensors(layers: object, tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"num_hidden_layers .*, the tensors make 2 blocks"):
        open_source(tmp_path)
