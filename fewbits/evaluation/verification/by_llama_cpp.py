"""What llama.cpp computes on a GGUF file: logits, likelihoods, tokens, a few generated words. JSON in, JSON out.

A program of its own: it may crash without taking `verify` along, and runs in any environment with llama.cpp's prebuilt
library (`pip install xllamacpp numpy`; no fewbits is needed). It calls the C API through ctypes: loading, tokenizing
and decoding are all there is. Structures passed by value are kept opaque: on the 64-bit Unix ABIs a structure of more
than 16 bytes lies in memory, so a copy that is larger than the true one is the same.

    echo '{"path": "m.gguf", "text": "Hello", "ids": [[1, 2]], "logits": true, "generate": 20}' | python by_llama_cpp.py
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np

C = ctypes


class Opaque(C.Structure):
    _fields_ = (("words", C.c_uint64 * 64),)


class Batch(C.Structure):
    _fields_ = (
        ("count", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embedding", C.c_void_p),
        ("position", C.POINTER(C.c_int32)),
        ("sequences", C.POINTER(C.c_int32)),
        ("sequence", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    )


def library() -> C.CDLL:
    folder = Path(str(importlib.util.find_spec("xllamacpp").submodule_search_locations[0]))
    lib = C.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    pointers = "llama_model_load_from_file llama_init_from_model llama_model_get_vocab llama_get_memory"
    for name in pointers.split():
        getattr(lib, name).restype = C.c_void_p
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = Opaque
    lib.llama_model_load_from_file.argtypes = [C.c_char_p, Opaque]
    lib.llama_init_from_model.argtypes = [C.c_void_p, Opaque]
    lib.llama_batch_init.restype, lib.llama_batch_init.argtypes = Batch, [C.c_int32] * 3
    lib.llama_decode.argtypes = [C.c_void_p, Batch]
    lib.llama_get_logits_ith.restype, lib.llama_get_logits_ith.argtypes = C.POINTER(C.c_float), [C.c_void_p, C.c_int32]
    lib.llama_tokenize.argtypes = [
        C.c_void_p, C.c_char_p, C.c_int32, C.POINTER(C.c_int32), C.c_int32, C.c_bool, C.c_bool,
    ]  # fmt: skip
    lib.llama_token_to_piece.argtypes = [C.c_void_p, C.c_int32, C.c_char_p, C.c_int32, C.c_int32, C.c_bool]
    lib.llama_set_n_threads.restype, lib.llama_set_n_threads.argtypes = None, [C.c_void_p, C.c_int32, C.c_int32]
    for name in ("llama_model_get_vocab", "llama_vocab_n_tokens", "llama_get_memory", "llama_n_ctx"):
        getattr(lib, name).argtypes = [C.c_void_p]
    lib.llama_memory_clear.argtypes = [C.c_void_p, C.c_bool]
    lib.llama_model_chat_template.restype = C.c_char_p
    lib.llama_model_chat_template.argtypes = [C.c_void_p, C.c_char_p]
    return lib


class Model:
    def __init__(self, path: str, threads: int) -> None:
        self.lib = library()
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(path.encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.context = self.lib.llama_init_from_model(self.model, self.lib.llama_context_default_params())
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context for {path}")
        self.lib.llama_set_n_threads(self.context, threads, threads)
        self.width = self.lib.llama_vocab_n_tokens(self.vocab)
        self.limit = self.lib.llama_n_ctx(self.context)

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        room = (C.c_int32 * (len(raw) + 16))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), room, len(room), True, True)
        return list(room[:count])

    def text(self, ids: list[int]) -> str:
        room, parts = C.create_string_buffer(512), []
        for token in ids:
            count = self.lib.llama_token_to_piece(self.vocab, token, room, len(room), 0, True)
            parts.append(room.raw[: max(count, 0)])
        return b"".join(parts).decode(errors="replace")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of every position [len(ids), vocabulary], from an empty memory."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self._decode(ids, 0, every=True)

    def generate(self, ids: list[int], count: int) -> list[int]:
        """Greedy continuation."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        last, made, position = self._decode(ids, 0)[-1], [], len(ids)
        for _ in range(count):
            made.append(int(last.argmax()))
            last = self._decode([made[-1]], position)[-1]
            position += 1
        return made

    def _decode(self, ids: list[int], start: int, *, every: bool = False) -> np.ndarray:
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.count = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.position[place] = token, start + place
            batch.sequences[place], batch.sequence[place][0] = 1, 0
            batch.logits[place] = int(every or place == len(ids) - 1)
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        wanted = range(len(ids)) if every else [len(ids) - 1]
        rows = (self.lib.llama_get_logits_ith(self.context, place) for place in wanted)
        return np.stack([np.ctypeslib.as_array(row, (self.width,)).copy() for row in rows])


def nats(model: Model, ids: list[int]) -> float:
    """Mean negative log-likelihood of a window's tokens but the first."""
    logits = model.logits(ids)[:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(logits)), ids[1:]]
    return float((np.log(np.exp(logits).sum(axis=1)) - chosen).mean())


def main() -> None:
    asked = json.load(sys.stdin)
    out, quiet = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if not asked.get("verbose"):
        os.dup2(quiet, 2)
    model = Model(asked["path"], asked.get("threads", 1))
    answer: dict[str, object] = {"vocabulary": model.width}
    template = model.lib.llama_model_chat_template(model.model, None)
    answer["chat_template"] = template.decode() if template else None
    for key in ("text", "texts"):
        if key in asked:
            texts = [asked[key]] if key == "text" else asked[key]
            answer["tokens"] = [model.tokenize(text) for text in texts]
    if asked.get("ids") and asked.get("logits"):
        answer["logits"] = [model.logits(ids).tolist() for ids in asked["ids"]]
    if asked.get("ids") and asked.get("nats"):
        answer["nats"] = [nats(model, ids) for ids in asked["ids"]]
    if asked.get("generate"):
        prompt = asked["prompt_ids"] if "prompt_ids" in asked else answer["tokens"][0]
        answer["generated"] = model.text(model.generate(prompt, asked["generate"]))
    os.write(out, json.dumps(answer).encode())


if __name__ == "__main__":
    main()
