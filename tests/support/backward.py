"""A probe around one training step: which decoder layers backward visited, what each saved for it, how often each ran.

    with BackwardProbe(model) as probe:
        model(**batch).loss.backward()
    assert probe.visited == (2, 3)              # backward stopped above layer 1
    assert probe.saved_bytes[0] == 0            # and layer 0 kept nothing for it
    assert probe.forwards == {0: 1, 1: 1, 2: 2, 3: 2}   # layers 2 and 3 were recomputed

Choices: a layer counts as visited when a gradient arrives at the output that it computed. Bytes are those of the
storages that autograd kept in the forward pass, each storage once, at the layer that saved it first; parameters and
buffers are not counted, nor what a recomputation inside backward keeps for a moment, nor what a custom function hides
on its context (bitsandbytes does that with the weight). Storages are held until exit, so use it for one step or two.
"""

from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

OUTSIDE = -1


class BackwardProbe:
    """Context manager; see the module. `layers` overrides the search for the decoder's layers."""

    def __init__(self, model: nn.Module, *, layers: nn.ModuleList | None = None) -> None:
        self.layers = decoder_layers(model) if layers is None else layers
        self._known = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._visited: set[int] = set()
        self._forwards: Counter[int] = Counter()
        self._first_child: dict[int, nn.Module] = {}
        self._running: list[int] = []
        self._input_of: dict[int, tuple[int, torch.UntypedStorage]] = {}  # held: an address must not come twice
        self._saved: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._handles: list[Any] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def visited(self) -> tuple[int, ...]:
        """Return the indices of the layers that backward visited."""
        return tuple(sorted(self._visited))

    @property
    def forwards(self) -> dict[int, int]:
        """Return how often each layer's own computation ran, recomputation included."""
        return {index: self._forwards[index] for index in range(len(self.layers))}

    @property
    def saved_bytes(self) -> dict[int, int]:
        """Return the bytes that each layer kept for backward; `OUTSIDE` is what embeddings, head and loss kept."""
        result = dict.fromkeys((*range(len(self.layers)), OUTSIDE), 0)
        for key, (owner, storage) in self._saved.items():
            # A checkpoint around the layer saves the layer's input before or after the layer's own hooks run.
            layer = self._input_of[key][0] if owner == OUTSIDE and key in self._input_of else owner
            result[layer] += storage.nbytes()
        return result

    def __enter__(self) -> "BackwardProbe":
        for index, layer in enumerate(self.layers):
            self._handles += [
                layer.register_forward_pre_hook(self._before(index), with_kwargs=True),
                layer.register_forward_hook(self._after(index), with_kwargs=True, always_call=True),
                *(child.register_forward_pre_hook(self._child(index)) for child in layer.children()),
            ]
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not in_backward():
                self._running.append(index)
                given = (*_tensors(args), *_tensors(kwargs))
                self._input_of |= {_key(tensor): (index, tensor.untyped_storage()) for tensor in given}

        return hook

    def _after(self, index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not in_backward():
                self._running.pop()
            given = {tensor.grad_fn for tensor in (*_tensors(args), *_tensors(kwargs))}
            for tensor in _tensors(output):
                if tensor.grad_fn is not None and tensor.grad_fn not in given:
                    tensor.register_hook(lambda _: self._visited.add(index))

        return hook

    def _child(self, index: int) -> Any:
        # Counted on the first child, since a checkpoint may sit around the layer's hooks or inside them.
        def hook(child: nn.Module, _: Any) -> None:
            if self._first_child.setdefault(index, child) is child:
                self._forwards[index] += 1

        return hook

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key and key not in self._known and not in_backward():
            owner = self._running[-1] if self._running else OUTSIDE
            self._saved.setdefault(key, (owner, tensor.untyped_storage()))
        return tensor.detach()  # autograd asks for another object, else the graph holds itself alive


def in_backward() -> bool:
    """Say whether the autograd engine is running this code, as it does in a checkpoint's recomputation."""
    return torch._C._current_graph_task_id() != -1


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the longest outermost ModuleList that is not of an encoder of images or sound."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        foreign = any(word in name for word in ("vision", "visual", "audio"))
        if isinstance(module, nn.ModuleList) and not nested and not foreign:
            found[name] = module
    if not found:
        raise ValueError("no ModuleList was found in the model; hand in layers=")
    return max(found.values(), key=len)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
