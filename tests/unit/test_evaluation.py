"""Evaluation against direct computation on tiny models, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fewbits.core.errors import BadInput, FewbitsError
from fewbits.evaluation import Evaluation, complete, evaluate, forward, remember
from fewbits.evaluation import reference as reference_module
from fewbits.evaluation.forward import Forward, slab_rows
from fewbits.metrics import kl
from fewbits.metrics.result import by_position, divergence

VOCABULARY = 300


class ByteTokenizer:
    """Ids are bytes; 256 ends a document."""

    bos_token_id, eos_token_id, pad_token_id, chat_template = None, 256, None, None

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": list(text.encode())}

    def get_vocab(self) -> dict[str, int]:
        return {chr(index): index + self.shift for index in range(256)}

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool = True) -> str:
        return bytes(int(index) % 128 for index in ids if int(index) < 256).decode()


def llama(seed: int = 0, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def gemma2() -> Gemma2ForCausalLM:
    """A family that caps its logits after the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
    )
    return Gemma2ForCausalLM(config).eval()


def perturbed(model: nn.Module, scale: float = 0.02) -> nn.Module:
    """A copy of `model` with noise on its linears: a stand-in for a quantized one."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in copy.model.modules():
            if isinstance(module, nn.Linear):
                module.weight += scale * torch.randn(module.weight.shape, generator=generator)
    return copy


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Evaluations put their files here, and must leave nothing behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these products are too small to share
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    torch.set_num_threads(threads)
    assert list(folder.iterdir()) == []


OPTIONS: dict[str, Any] = {"samples": 6, "sequence_length": 48}


# ---- the numbers


@pytest.mark.parametrize("original", [llama(), gemma2()], ids=["separable", "capped"])
def test_equals_direct_computation(original: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_SLAB_BYTES", 4 * VOCABULARY * 47)  # slabs of 47 rows and of one
    quantized, tokenizer = perturbed(original), ByteTokenizer()
    with remember((original, tokenizer), **OPTIONS) as reference:
        ids = reference.tokens.ids
        result = evaluate((quantized, tokenizer), against=reference, what="noisy")
    with torch.no_grad():
        p, q = original(ids).logits, quantized(ids).logits
    values = kl(p.flatten(0, 1), q.flatten(0, 1)).view(6, 48)
    assert result.kl is not None and result.top1 is not None and result.reference_perplexity is not None
    assert 0.003 < result.kl.mean < 10
    # float16 log-probabilities are allowed 1e-5, stored hidden states only the rounding of float32
    tolerance = 1e-6 if isinstance(original, LlamaForCausalLM) else 1e-5
    assert result.kl.mean == pytest.approx(values.mean().item(), abs=tolerance)
    assert result.kl.stderr == pytest.approx(values.mean(1).std().item() / math.sqrt(6), rel=1e-3)
    assert result.kl.median == pytest.approx(values.quantile(0.5).item(), rel=1e-3)
    assert result.kl.p99 == pytest.approx(values.quantile(0.99).item(), rel=1e-3)
    assert result.top1.mean == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert result.lost is not None
    assert result.lost.mean == pytest.approx(math.log(result.perplexity.mean / result.reference_perplexity.mean))
    for logits, measured in ((p, result.reference_perplexity), (q, result.perplexity)):
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert measured.mean == pytest.approx(loss.exp().item(), rel=1e-5)
        assert measured.n == 6 * 47 and measured.stderr > 0
    assert result.what == "noisy" and result.text["sha256"] == reference.tokens.sha256


@pytest.mark.parametrize(("original", "store"), [(llama(), "hidden states"), (gemma2(), "log-probabilities")])
def test_a_model_against_itself_loses_nothing(original: nn.Module, store: str) -> None:
    tokenizer = ByteTokenizer()
    result = evaluate((original, tokenizer), against=(original, tokenizer), **OPTIONS)
    assert result.kl is not None and result.top1 is not None
    assert result.kl.mean < (1e-9 if store == "hidden states" else 1e-5)
    assert result.top1.mean == 1
    assert result.perplexity == result.reference_perplexity
    assert store in result.method and "no overlap" in result.method


def test_float16_storage_costs_less_than_it_may() -> None:
    """The bound stated in reference.py, with a vocabulary and a sharpness like a real model's."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(64, 49152) + 12 * torch.rand(64, 1) * nn.functional.one_hot(
        torch.randint(49152, (64,)), 49152
    )
    for scale in (0.01, 0.1, 0.5):
        other = logits + scale * torch.randn(logits.shape)
        stored = torch.log_softmax(logits, dim=-1).to(torch.float16).float()
        difference = kl(stored, other) - kl(logits, other)
        assert difference.mean().abs() < 1e-5
        assert difference.abs().max() < 1e-3


def test_perplexity_alone() -> None:
    result = evaluate((llama(), ByteTokenizer()), **OPTIONS)
    assert result.kl is None and result.top1 is None and result.against is None
    assert result.kl_by_position == () and result.perplexity.mean > 1


def test_the_default_text_is_held_out_and_the_choice_is_seeded() -> None:
    pair = (llama(), ByteTokenizer())
    results = [evaluate(pair, sequence_length=32, samples=2, seed=seed) for seed in (0, 0, 1)]
    hashes = [result.text["sha256"] for result in results]
    assert hashes[0] == hashes[1] != hashes[2]
    assert results[0].perplexity == results[1].perplexity
    assert "built-in evaluation" in results[0].text["description"]


def test_result_is_plain_json() -> None:
    tokenizer = ByteTokenizer()
    one = evaluate((llama(1), tokenizer), against=(llama(), tokenizer), samples=1, sequence_length=16)
    decoded = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert decoded["kl"]["stderr"] is None  # one window has no error bar
    assert set(decoded["kl"]) == {"mean", "stderr", "median", "p99", "n"}
    assert set(decoded["perplexity"]) == {"mean", "stderr", "n"}
    assert {"date", "command", "cpu", "versions"} <= set(decoded["record"])
    assert decoded["text"]["tokens"] == 16 and decoded["text"]["sequence_length"] == 16
    assert decoded["kl_by_position"][0]["start"] == 0 and decoded["kl_by_position"][-1]["end"] == 16
    assert isinstance(one, Evaluation)


@pytest.mark.parametrize("length", [1, 2, 5, 64, 500])
def test_position_bins_cover_every_position_once(length: int) -> None:
    values = torch.rand(3, length)
    bins = by_position(values)
    assert [part.start for part in bins] == [0, *[part.end for part in bins[:-1]]]
    assert bins[-1].end == length and len(bins) < 45
    total = sum(part.kl.mean * part.kl.n for part in bins) / (3 * length)
    assert total == pytest.approx(values.mean().item(), rel=1e-6)
    assert divergence(values).n == 3 * length


def test_slabs_cover_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_SLAB_BYTES", 4 * 10 * 3)
    assert [(rows.start, rows.stop) for rows in slab_rows(7, 10)] == [(0, 3), (3, 6), (6, 7)]
    assert [(rows.start, rows.stop) for rows in slab_rows(2, 1000)] == [(0, 1), (1, 2)]


# ---- life of the models and of the files


def test_one_reference_serves_several_models(temporary: Path) -> None:
    original, tokenizer = llama(), ByteTokenizer()
    with remember((original, tokenizer), **OPTIONS) as reference:
        assert reference.store == "hidden states"
        assert reference.nbytes == 4 * 32 * (6 * 48 + VOCABULARY)
        means = [
            evaluate(perturbed(original, scale), against=reference).kl.mean  # type: ignore[union-attr]
            for scale in (0.01, 0.05)
        ]
        assert means[0] < means[1]
        with pytest.raises(BadInput, match="samples: settled by the reference"):
            evaluate(original, against=reference, samples=3)
    assert list(temporary.iterdir()) == []


def test_paths_are_loaded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[nn.Module]] = []

    def load(path: str, device: Any = None, dtype: Any = None) -> tuple[nn.Module, ByteTokenizer]:
        gc.collect()
        assert all(reference() is None for reference in alive), "the first model is still in memory"
        assert dtype is torch.float32
        model = llama(len(path))
        alive.append(weakref.ref(model))
        return model, ByteTokenizer()

    monkeypatch.setitem(__import__("sys").modules, "fewbits.runtime.load", SimpleNamespace(load=load))
    result = evaluate("quantized", against="original", device="cpu", **OPTIONS)
    assert len(alive) == 2 and result.model == "quantized" and result.against == "original"


def test_a_model_keeps_its_mode_and_progress_counts() -> None:
    model, seen = llama().train(), []
    evaluate(
        model,
        against=(llama(1), ByteTokenizer()),
        progress=lambda *step: seen.append(step),
        samples=2,
        sequence_length=8,
    )
    assert model.training
    assert seen == [("reference", 1, 2), ("reference", 2, 2), ("evaluate", 1, 2), ("evaluate", 2, 2)]


def test_out_of_space_is_said_before_and_during(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    pair = (llama(), ByteTokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(FewbitsError, match=r"take 75.3 kB and .* has 1.0 kB free; set TMPDIR") as caught:
            evaluate(pair, against=pair, **OPTIONS)
    assert caught.value.exit_code == 1
    assert list(temporary.iterdir()) == []

    def full(file: Any, values: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reference_module, "_append", full)
    with pytest.raises(FewbitsError, match="no space left in"):
        evaluate(pair, against=pair, **OPTIONS)


def test_a_failed_second_pass_leaves_no_files() -> None:
    broken = llama(1)
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(FewbitsError, match="NaN or infinite logits at position 0"):
        evaluate(broken, against=(llama(), ByteTokenizer()), **OPTIONS)


# ---- what is refused


def test_mismatched_vocabularies() -> None:
    with pytest.raises(BadInput, match=r"vocabulary mismatch.*310 tokens and .* 300"):
        evaluate((llama(0, 310), ByteTokenizer()), against=(llama(), ByteTokenizer()), **OPTIONS)
    with pytest.raises(BadInput, match="name the same ids differently"):
        evaluate((llama(), ByteTokenizer(shift=1)), against=(llama(), ByteTokenizer()), **OPTIONS)
    with pytest.raises(BadInput, match=r"token 195, but .* vocabulary of 120"):
        evaluate((llama(0, 120), ByteTokenizer()), text=["caf\u00e9 " * 40], samples=1, sequence_length=64)


def test_bad_requests(tmp_path: Path) -> None:
    pair = (llama(), ByteTokenizer())
    with pytest.raises(BadInput, match="more than the 128 positions"):
        evaluate(pair, sequence_length=129)
    with pytest.raises(BadInput, match="without its tokenizer"):
        evaluate(llama())
    with pytest.raises(BadInput, match="cannot evaluate a dict"):
        evaluate({"model": 1})
    with pytest.raises(BadInput, match="no text file"):
        evaluate(pair, text=tmp_path / "absent.txt")
    with pytest.raises(BadInput, match="too little text: 6 tokens"):
        evaluate(pair, text=["short"], sequence_length=64)


# ---- completions


def test_completions_are_greedy_and_leave_the_prompt_out() -> None:
    model, tokenizer = llama(), ByteTokenizer()
    first = complete(model, tokenizer, ["ab", "xyz"], max_new_tokens=5)
    assert first == complete(model, tokenizer, ["ab", "xyz"], max_new_tokens=5)
    ids = torch.tensor([list(b"ab")])
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == model.config.eos_token_id:
            break
    assert first[0] == tokenizer.decode(ids[0, 2:]).strip()


def test_completions_use_the_chat_template() -> None:
    class Chat(ByteTokenizer):
        chat_template = "…"
        asked: list[str]

        def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
            assert options == {"tokenize": False, "add_generation_prompt": True}
            return f"<user>{messages[0]['content']}</user>"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
            assert text.startswith("<user>") and not add_special_tokens
            return super().__call__(text)

    assert len(complete(llama(), Chat(), ["hello"], max_new_tokens=2)) == 1


def test_forward_knows_who_changes_logits_after_the_head() -> None:
    with torch.inference_mode():
        assert Forward(llama()).separable and Forward(llama()).vocabulary == VOCABULARY
        assert not Forward(gemma2()).separable
