"""Model files: everything that is known about bytes on disk stays here.

Readers (safetensors directories, GGUF files, the embedded model, hub ids) offer one `Source`: names,
shapes and dense tensors one at a time. Writers turn quantized tensors into checkpoints others load. Every
parser is bounded and checks a file before it believes it; nothing here unpickles, evaluates or imports
anything a file names.
"""
