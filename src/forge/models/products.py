"""The matrix products of a decoder, where each stands in the order of the forward pass, and which of them train.

Positions are pairs: the layer (-1 for the embeddings, L for what follows the last layer, L+1 for the head) and the step
inside it. Names do not tell the steps, shapes nearly do: of the matrices side by side in a block, the last one with
`hidden_size` outputs writes the block's result; the others read what enters the block, if they have `hidden_size`
inputs, or stand between (the second halves of latent attention's pairs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from .experts import find_experts, is_linear
from .layers import decoder_layers_path, named_base_modules, text_attribute, unwrap, without_adapters

if TYPE_CHECKING:
    from torch import nn

Position = tuple[int, int]
_NORM, _READS, _BETWEEN, _SCORES, _WRITES = -1, 0, 1, 2, 3
_STEPS = 4  # of a block
_TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "top_k_experts")
_HEAD_DIMS = ("qk_head_dim", "head_dim", "head_size", "attention_head_size")


@dataclass(frozen=True)
class Product:
    """A matrix product that every token needs.

    Args:
        position: of the matrix.
        weights: how many of its weights a token meets.
        trains: whether the weight does.
        behind_trained: gradients reach its input even if nothing before `position` trains: LoRA's B, behind A.
    """

    position: Position
    weights: float
    trains: bool
    behind_trained: bool = False


@dataclass(frozen=True)
class Scores:
    """The attention scores of a layer: a token and another one multiply `features` numbers in both products."""

    position: Position
    features: float
    window: int | None


@dataclass(frozen=True)
class _Matrix:
    """The weight of a linear layer or a router, or a fused stack of experts.

    Args:
        name: of the linear layer, or of the parameter where its module has more than one.
        owner: name of the module that has it, as the parameter `key`.
        inputs: features; a stack's sides have no order to rely on, `hidden_size` is among them, and stands for both.
        outputs: features.
        weights: how many.
        share: how many of them a token meets; less than 1 for experts.
    """

    name: str
    owner: str
    key: str
    inputs: int
    outputs: int
    weights: int
    share: float = 1.0


class DecoderProducts:
    """One reading of a transformers model, plain or wrapped by PEFT.

    Raises:
        UnsupportedError: see `training_flops`.
    """

    def __init__(self, model: nn.Module) -> None:
        base: Any = unwrap(model)
        in_base = set(base.parameters())
        self._prompt_trains = any(p.requires_grad for p in model.parameters() if p not in in_base)
        self._config = base.config
        self._path = decoder_layers_path(base)
        self._modules = named_base_modules(base)
        self._order = {name: index for index, name in enumerate(self._modules)}
        self._depth = len(list(self._modules[self._path].children()))
        self._experts = find_experts(self._modules, self._path)
        self._hidden = text_attribute(base.config, "hidden_size") or base.get_input_embeddings().embedding_dim
        head = base.get_output_embeddings()
        self._head = None if head is None else without_adapters(head)
        self._wrappers: dict[nn.Module, list[Any]] = {}  # several around experts, one per parameter
        for module in base.modules():
            if (inner := without_adapters(module)) is not module:
                self._wrappers.setdefault(inner, []).append(module)
        self._copies = dict(self._trained_copies())

        scope = self._path.rpartition(".")[0]
        inside = {n for n, m in self._modules.items() if m is self._head or not scope or n.startswith(f"{scope}.")}
        self.linears_beside = sum(is_linear(m) for name, m in self._modules.items() if name not in inside)
        self._matrices = [matrix for name in self._modules if name in inside for matrix in self._matrices_of(name)]
        self._steps = self._steps_in_layers()

    def products(self) -> Iterator[Product]:
        """The products of all matrices and of the LoRA adapters that are active on them."""
        for matrix in self._matrices:
            position = self._position(matrix.owner, matrix.key)
            module = self._modules[matrix.owner]
            weight = getattr(self._copies.get(module, module), matrix.key)
            yield Product(position, matrix.weights * matrix.share, weight.requires_grad)
            for wrapper in self._wrappers.get(module, ()):
                runs = not (getattr(wrapper, "disable_adapters", False) or getattr(wrapper, "merged", False))
                if not runs or getattr(wrapper, "parameter_name", matrix.key) != matrix.key:
                    continue
                for adapter in wrapper.active_adapters:
                    if adapter in getattr(wrapper, "lora_A", ()):
                        both = (wrapper.lora_A[adapter], wrapper.lora_B[adapter])
                        a, b = (getattr(layer, "weight", layer) for layer in both)  # AdaLoRA's are parameters
                        yield Product(position, a.numel() * matrix.share, a.requires_grad)
                        yield Product(position, b.numel() * matrix.share, b.requires_grad, a.requires_grad)

    def trained_positions(self) -> Iterator[Position]:
        """Where anything trains: matrices, adapters, norms, embeddings, a tower or a learnt prompt before those."""
        if self._prompt_trains:
            yield (-1, 0)
        for name, module in self._modules.items():
            running = self._copies.get(module, module)
            for key, parameter in running.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield self._position(name, key)
            for wrapper in self._wrappers.get(module, ()):
                added = [
                    child for key, child in wrapper.named_children() if key not in ("base_layer", "original_module")
                ]
                is_copy = hasattr(wrapper, "modules_to_save")
                if not is_copy and any(p.requires_grad for child in added for p in child.parameters()):
                    yield self._position(name, getattr(wrapper, "parameter_name", "weight"))

    def scores(self) -> Iterator[Scores]:
        """The attention of every layer that has one; linear attention and state spaces keep no scores."""
        kinds = text_attribute(self._config, "layer_types") or ()
        for matrix in self._matrices:
            layer, step = self._position(matrix.owner, matrix.key)
            if not 0 <= layer < self._depth or step % _STEPS != _WRITES:
                continue
            module: Any = self._modules[_parent(matrix.name)]
            head_dim = next((dim for key in _HEAD_DIMS if isinstance(dim := getattr(module, key, None), int)), None)
            kind = kinds[layer] if layer < len(kinds) else ""
            if head_dim is None or hasattr(module, "A_log") or "linear" in kind:
                continue
            # What writes the result reads the values that attention weighed: heads * v_head_dim features.
            keys_per_value = head_dim / (getattr(module, "v_head_dim", None) or head_dim)
            position = (layer, step - _WRITES + _SCORES)
            yield Scores(position, matrix.inputs * (1 + keys_per_value), self._window(module, kind))

    def _window(self, module: nn.Module, kind: str) -> int | None:
        window: Any
        if "chunked" in kind:
            window = text_attribute(self._config, "attention_chunk_size")
        elif hasattr(module, "sliding_window"):
            window = module.sliding_window
        else:  # without kinds of layers a window in the config is for all of them (Mistral, Phi-3)
            window = text_attribute(self._config, "sliding_window") if not kind or "sliding" in kind else None
        return None if window is None else int(window)

    def _trained_copies(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The modules that PEFT's `modules_to_save` replaces, each with the copy that runs and trains in its place."""
        for original, wrappers in self._wrappers.items():
            for wrapper in wrappers:
                saved = getattr(wrapper, "modules_to_save", {})
                for adapter in wrapper.active_adapters[:1] if saved else ():
                    if adapter in saved and not wrapper.disable_adapters:
                        yield from zip(original.modules(), saved[adapter].modules(), strict=True)

    def _matrices_of(self, name: str) -> Iterator[_Matrix]:
        module: Any = self._modules[name]
        if is_linear(module):  # a quantised weight has lost its shape, the layer has not; Conv1D says nx and nf
            inputs = getattr(module, "in_features", None) or module.nx
            outputs = getattr(module, "out_features", None) or module.nf
            yield _Matrix(name, name, "weight", inputs, outputs, inputs * outputs, self._share_in_list(name))
            return
        stacks = [
            key for key, _ in module.named_parameters(recurse=False) if f"{name}.{key}" in self._experts.parameters
        ]
        for key in stacks:
            stack = getattr(module, key)
            full_name = f"{name}.{key}" if len(stacks) > 1 else name
            share = self._share(name, len(stack))
            yield _Matrix(full_name, name, key, self._hidden, self._hidden, stack.numel(), share)
        if any(f"{name}.".startswith(f"{router}.") for router in self._experts.routers):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 2 and min(parameter.shape) > 1:
                    outputs, inputs = parameter.shape
                    yield _Matrix(name, name, key, inputs, outputs, inputs * outputs)

    def _share_in_list(self, name: str) -> float:
        """Which share of the tokens meets a linear layer: all, but for one of an expert in a list of experts."""
        blocks = {_parent(router) for router in self._experts.routers}
        for around in _ancestors(name, down_to=self._path):
            children = list(self._modules[around].children())
            numbered = all(key.isdigit() for key, _ in self._modules[around].named_children())
            if _parent(around) in blocks and numbered and len(children) > 1:
                return self._share(around, len(children))
        return 1.0

    def _share(self, name: str, experts: int) -> float:
        """Which share of `experts` a token meets; of a stack of shared ones, which are few, all."""
        around = [name, *_ancestors(name, down_to=self._path)]
        routers = [router for router in self._experts.routers if router.startswith(f"{around[-1]}.")]
        holders = [self._modules[found] for found in (*routers, *around)]
        for holder in (*holders, self._config.get_text_config(decoder=True)):
            for key in _TOP_K:
                if isinstance(top_k := getattr(holder, key, None), int):
                    return min(1.0, top_k / experts)
        raise UnsupportedError(
            f"{name!r} of {self._config.model_type!r} holds {experts} experts, and neither their router nor the config "
            f"says how many of them a token passes ({', '.join(_TOP_K)}). Set config.num_experts_per_tok."
        )

    def _steps_in_layers(self) -> dict[tuple[str, str], Position]:
        """The position of every matrix in a decoder layer, by owner and key."""
        steps: dict[tuple[str, str], Position] = {}
        last_writer = {_parent(m.name): m.name for m in self._matrices if m.outputs == self._hidden}
        blocks: dict[str, list[str]] = {}
        for matrix in self._matrices:
            if not matrix.name.startswith(f"{self._path}."):
                continue
            layer, _, inside = matrix.name[len(self._path) + 1 :].partition(".")
            seen = blocks.setdefault(layer, [])
            if (block := inside.partition(".")[0]) not in seen:
                seen.append(block)
            if last_writer.get(_parent(matrix.name)) == matrix.name:
                step = _WRITES
            else:
                step = _READS if matrix.inputs == self._hidden else _BETWEEN
            steps[matrix.owner, matrix.key] = (int(layer), seen.index(block) * _STEPS + step)
        return steps

    def _position(self, name: str, key: str) -> Position:
        """The position of a parameter: a matrix's own, a bias's matrix's, or for others before all in their layer."""
        from torch import nn

        if name.startswith(f"{self._path}."):
            layer = int(name[len(self._path) + 1 :].partition(".")[0])
            return self._steps.get((name, key)) or self._steps.get((name, "weight"), (layer, _NORM))
        if self._modules[name] is self._head:
            return (self._depth + 1, 0)
        early = isinstance(self._modules[name], nn.Embedding) or self._order[name] < self._order[self._path]
        return (-1, 0) if early else (self._depth, 0)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _ancestors(name: str, *, down_to: str) -> Iterator[str]:
    """The modules around `name` inside the list `down_to`: `a.0.b` and `a.0` for `a.0.b.c`, none for another's."""
    while (name := _parent(name)).startswith(f"{down_to}."):
        yield name
