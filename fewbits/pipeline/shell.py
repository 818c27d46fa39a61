"""A model of which one block is in memory at a time.

The model is built on the meta device: all shapes, no data. Its own forward code is used, not a copy of it:
to learn what each block is called with (position embeddings, masks), every block is replaced by a recorder
that passes hidden states through; to turn hidden states into logits, the last recorder hands in the hidden
states and the model's own final norm and head do the rest. So anything transformers can run can be
streamed, whatever its family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoints.base import Source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import hadamard
from fewbits.models.skeleton import load_block, release_block, skeleton
from fewbits.models.topology import find_topology
from fewbits.models.walk import LinearRef, blocks, linears


class _Recorder(nn.Module):
    """Stands in for a block: notes its arguments, returns `replacement` or its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # In a list, so that the block is not registered as a child.
        self._block = [block]
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.replacement: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.arguments = args, kwargs
        return hidden if self.replacement is None else self.replacement


class ModelShell:
    """The model of `source`, run block by block on `device` in `dtype`."""

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        config = source.config()
        self.topology = find_topology(config)
        self.model: Any = skeleton(config)  # with sdpa where the family has it; gpt-oss, with its sinks, has not
        self.blocks = blocks(self.model, self.topology)
        self._arguments: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def layers(self) -> set[str]:
        """The names of all modules with a weight, and of the matrices of fused experts."""
        found = {f"{prefix}.{ref.name}" for prefix, block in self.blocks for ref in linears(block, self.topology)}
        return found | {name for name, module in self.model.named_modules() if hasattr(module, "weight")}

    @contextlib.contextmanager
    def resident(self, name: str, module: nn.Module) -> Iterator[nn.Module]:
        """`module` with its tensors read from the source, released again on leaving."""
        load_block(module, name, self.source, dtype=self.dtype, device=self.device, topology=self.topology)
        try:
            yield module
        finally:
            release_block(module)

    def transform_inputs(self, orders: Mapping[str, tuple[int, ...]]) -> None:
        """From now on the linears named (as on disk) receive their input Hadamard-transformed, and say so."""

        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (hadamard.transform(args[0], module.input_hadamard), *args[1:])

        for prefix, block in self.blocks:
            for ref in linears(block, self.topology):
                name = f"{prefix}.{ref.disk_name}"
                if name in orders and isinstance(ref, LinearRef):
                    ref.module.input_hadamard = orders[name]
                    ref.module.register_forward_pre_hook(hook)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[list[_Recorder]]:
        recorders = [_Recorder(module) for _, module in self.blocks]
        parent = self.blocks[0][0].rpartition(".")[0]
        listing = self.model.get_submodule(parent)
        for index, recorder in enumerate(recorders):
            listing[index] = recorder
        try:
            yield recorders
        finally:
            for index, (_, block) in enumerate(self.blocks):
                listing[index] = block

    def _outside(self) -> list[tuple[str, nn.Module]]:
        """The modules that own parameters and lie in no block: embeddings, final norm, head."""
        inside = {module for _, block in self.blocks for module in block.modules()}
        return [
            (name, module)
            for name, module in self.model.named_modules()
            if module not in inside and next(module.parameters(recurse=False), None) is not None
        ]

    @contextlib.contextmanager
    def resident_outside(self, *, head: bool, round_to: torch.dtype | None = None) -> Iterator[None]:
        """Embeddings and final norm (and head) in memory, rounded through `round_to` if given."""
        output = self.model.get_output_embeddings()
        with contextlib.ExitStack() as stack:
            for name, module in self._outside():
                if head or module is not output:
                    stack.enter_context(self.resident(name, module))
                    if round_to is not None:
                        round_parameters(module.parameters(recurse=False), round_to)
            yield

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states entering the first block for each batch of ids [B, T]; notes the blocks' arguments."""
        hidden = []
        with self._recording() as recorders:
            for ids in batches:
                arguments = self._run_base(ids, recorders)
                known = self._arguments.setdefault((ids.shape[0], ids.shape[1]), arguments)
                if known is not arguments:
                    _same_arguments(known, arguments)
                hidden.append(self._first)
        return hidden

    def _run_base(self, ids: Tensor, recorders: list[_Recorder]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        handle = recorders[0].register_forward_pre_hook(self._keep_first)
        try:
            self.model.base_model(ids.to(self.device), use_cache=False)
        finally:
            handle.remove()
        arguments = [recorder.arguments for recorder in recorders]
        if any(found is None for found in arguments):
            raise Unsupported("a block was not run by the model's forward; its layout is not understood")
        return [found for found in arguments if found is not None]

    def _keep_first(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._first = args[0].detach()

    def forward(self, index: int, hidden: Tensor, *, grad: bool = False) -> Tensor:
        """Block `index` on hidden states [B, T, H] of a shape that `embed` has seen; `grad`: recorded for autograd."""
        args, kwargs = self._arguments[hidden.shape[0], hidden.shape[1]][index]
        with torch.set_grad_enabled(grad):
            out = self.blocks[index][1](hidden.to(self.device), *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def backward(
        self, index: int, hidden: Tensor, gradient: Tensor, parameters: Sequence[nn.Parameter] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradients of what enters block `index` and of `parameters`, given that of what leaves it.

        `hidden` [B, T, H] is what entered; the block runs again, so that nothing of the first pass need be kept. Hooks
        on its modules see both ways.
        """
        args, kwargs = self._arguments[hidden.shape[0], hidden.shape[1]][index]
        x = hidden.to(self.device).detach().requires_grad_()
        with torch.enable_grad():
            out = self.blocks[index][1](x, *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        found, *others = torch.autograd.grad(out, [x, *parameters], gradient.to(self.device))
        return found, tuple(others)

    def sampled_gradient(self, ids: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """d/d hidden of -log p(label) summed over positions, labels drawn from the predictions p themselves.

        `hidden` [B, T, H] leaves the last block; its outer products are the Fisher information of the model there.
        """
        x = hidden.to(self.device).detach().requires_grad_()
        with torch.enable_grad(), self._recording() as recorders:
            recorders[-1].replacement = x
            logits = self.model(ids.to(self.device), use_cache=False).logits.flatten(0, 1).float()
            labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        (found,) = torch.autograd.grad(loss, x)
        return found

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] from the hidden states leaving the last block, by the model's own norm and head."""
        with self._recording() as recorders:
            recorders[-1].replacement = hidden.to(self.device)
            logits: Tensor = self.model(ids.to(self.device), use_cache=False).logits
            return logits

    def logit_pairs(
        self,
        batches: Sequence[Tensor],
        original: Sequence[Tensor],
        quantized: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(original, quantized) logits [T, V] of one window after the other; the second's head rounded to `dtype`.

        One window at a time: a batch of logits over a large vocabulary would be the largest thing in memory.
        """
        with self.resident_outside(head=True):
            parameters = [p for _, module in self._outside() for p in module.parameters(recurse=False)]
            rounded = [p.data if p.dtype == dtype else p.data.to(dtype).to(p.dtype) for p in parameters]
            for ids, before, after in zip(batches, original, quantized, strict=True):
                for row in range(len(ids)):
                    window = slice(row, row + 1)
                    reference = self.logits(ids[window], before[window])[0]
                    exact = _swap(parameters, rounded)
                    logits = self.logits(ids[window], after[window])[0]
                    _swap(parameters, exact)
                    yield reference, logits


def _swap(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> list[Tensor]:
    """Puts `values` in the parameters and returns what was there."""
    before = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    return before


def round_parameters(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Rounds values to what `dtype` can hold, in place, keeping the parameter's own dtype."""
    for parameter in parameters:
        if parameter.dtype != dtype:
            parameter.data.copy_(parameter.data.to(dtype))


def _same_arguments(known: list[Any], found: list[Any]) -> None:
    """Batches of one shape must be called alike, or the arguments depend on the text and cannot be reused."""
    for (_, left), (_, right) in zip(known, found, strict=True):
        for key, value in left.items():
            other = right.get(key)
            if isinstance(value, Tensor) and not (isinstance(other, Tensor) and torch.equal(value, other)):
                raise Unsupported(f"the blocks of this model depend on the text through {key!r}; it cannot be streamed")


def check_vocabulary(ids: Tensor, config: Any) -> None:
    """BadInput if the tokenizer produced an id the model's embedding does not have."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and int(ids.max()) >= size:
        raise BadInput(
            f"the tokenizer produced id {int(ids.max())}, but the model's vocabulary has {size} entries: "
            "tokenizer and model do not belong together"
        )
