"""The same text, the same dense model and the same evaluation for every contestant.

Texts are cut into windows once and kept in the work directory: the built-in text follows the Python version, and a
comparison that is spread over machines must not. Whatever a contestant hands back is laid over the dense model and
measured in float32 against that model: perplexity, KL with its standard error, top-1 agreement.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fewbits.calibration.data import TextSpec, TokenSet, ids_sha256, pack, read_texts
from fewbits.checkpoints.safetensors_file import write_stream
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import FewbitsError
from fewbits.core.record import write_json
from fewbits.evaluation.evaluate import evaluate, score
from fewbits.evaluation.forward import Forward
from fewbits.evaluation.reference import Reference
from fewbits.metrics import block_estimate, perplexity
from fewbits.metrics.result import divergence
from fewbits.runtime.load import load

LENGTH = 512


def windows(path: Path, text: TextSpec, split: str, samples: int, tokenizer: Any) -> TokenSet:
    """`samples` windows of `text`, kept in `path`; read from there when they are."""
    about = path.with_suffix(".json")
    if path.is_file() and about.is_file():
        ids, description = load_file(path)["ids"], json.loads(about.read_text(encoding="utf-8"))
        if len(ids) == samples and description["sha256"] == ids_sha256(ids):
            return TokenSet(ids=ids, sha256=description["sha256"], description=description)
    texts, described = read_texts(text, split=split)
    found = pack(texts, tokenizer, sequence_length=LENGTH, samples=samples, description=described)
    save_file({"ids": found.ids}, path)
    write_json(about, found.description)
    return found


def write_dense(model: str, directory: Path) -> Path:
    """`model` as a float32 safetensors directory that transformers and every peer loads."""
    if (directory / "model.safetensors").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    source = open_source(model)
    items = [
        (name, torch.float32, source.info(name).shape, lambda name=name: source.tensor(name).float())
        for name in source.names()
    ]
    write_json(directory / "config.json", {**source.config(), "dtype": "float32"})
    if generation := source.generation_config():
        write_json(directory / "generation_config.json", generation)
    source.load_tokenizer().save_pretrained(directory)
    write_stream(directory / "model.safetensors", items, {"format": "pt"})
    return directory


class Replayed(Forward):
    """The forward pass of a model that ran elsewhere over the windows `ids` [samples, length].

    hidden: [samples, length, width], what its head would have read. head: [vocabulary, width]. Raises `FewbitsError`
    for states of other windows, and as `Forward` for NaN.
    """

    def __init__(self, ids: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor, device: torch.device) -> None:
        # Not the constructor of Forward: it tries a model out, and there is none.
        if hidden.shape != (*ids.shape, head.shape[1]):
            raise FewbitsError(f"hidden states {tuple(hidden.shape)} for windows of {tuple(ids.shape)} tokens")
        self.name, self.device, self.separable, self.vocabulary = "what was handed back", device, True, head.shape[0]
        self._states = {ids_sha256(window): states for window, states in zip(ids, hidden.to(device), strict=True)}
        weight = head.to(device)
        self.head = lambda states: nn.functional.linear(states, weight)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return self._states[ids_sha256(ids)]


class Judge:
    """The original's predictions on every text, and the model that contestants' weights are laid over."""

    def __init__(self, model: Path, texts: dict[str, TokenSet], device: str, scratch: Path) -> None:
        self.model, self.tokenizer = load(str(model), device=device, dtype=torch.float32)
        self.parameters = dict(self.model.named_parameters())
        with torch.inference_mode():
            forward = Forward(self.model, "original")
            self.references = {
                name: Reference(forward, self.tokenizer, tokens, directory=str(scratch))
                for name, tokens in texts.items()
            }

    def linears(self) -> set[str]:
        """The weights every contestant must have quantized: those of the linears of the blocks."""
        modules = self.model.named_modules()
        found = {name for name, module in modules if isinstance(module, nn.Linear)}
        return {f"{name}.weight" for name in found if ".layers." in name}

    def measure(self, decoded: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        """Name of the text -> perplexity, KL and top-1 of the model with `decoded` in place."""
        self._check(decoded)
        kept = {name: self.parameters[name].detach().clone() for name in decoded}
        try:
            self._put(decoded)
            return {name: self._against(reference) for name, reference in self.references.items()}
        finally:
            self._put(kept)

    def measure_states(self, text: str, handed: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Perplexity, KL and top-1 of what running.py hands back for the windows of `text`."""
        reference = self.references[text]
        head = handed.get("head", self.model.get_output_embeddings().weight)
        forward = Replayed(reference.tokens.ids, handed["hidden"], head, reference.device)
        with torch.inference_mode():
            scores = score(forward, reference.tokens.ids, reference)
        return {
            "perplexity": perplexity(block_estimate(scores.nll)).to_dict(),
            "reference_perplexity": perplexity(block_estimate(reference.nll)).to_dict(),
            "kl": divergence(scores.kl).to_dict(),
            "top1": block_estimate(scores.top1).to_dict(),
            "lost": block_estimate(scores.nll - reference.nll).to_dict(),
        }

    def _check(self, decoded: dict[str, torch.Tensor]) -> None:
        missing = self.linears() - decoded.keys()
        if missing:
            raise FewbitsError(f"{len(missing)} linears were not quantized, {min(missing)} among them")
        for name, tensor in decoded.items():
            if name not in self.parameters or self.parameters[name].shape != tensor.shape:
                raise FewbitsError(f"{name} {tuple(tensor.shape)} is no tensor of the model")
            if not bool(torch.isfinite(tensor).all()):
                raise FewbitsError(f"{name} holds NaN or infinity")

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.parameters[name].copy_(tensor)

    def _against(self, reference: Reference) -> dict[str, Any]:
        found = evaluate((self.model, self.tokenizer), against=reference).to_dict()
        return {name: found[name] for name in ("perplexity", "reference_perplexity", "kl", "top1")}
