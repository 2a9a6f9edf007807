"""All that a model is, as plain values that two moments can be compared by. Knows nothing of forge."""

import gc
from typing import Any

import torch

CONTAINERS = (dict, list, set, tuple)
OWN = ("_modules", "_parameters", "_buffers")


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Return classes, flags, hooks, methods, children, configs, and the tensors with their identity and bytes."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        values = vars(module)
        state[f"{name} class"] = type(module)
        state[f"{name} children"] = [(child, id(found)) for child, found in module._modules.items()]
        for key, value in values.items():
            if key not in OWN:
                state[f"{name} .{key}"] = contents(value)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            state[f"{name} tensor {key}"] = None if tensor is None else tensor_state(tensor)
    for kind in ("config", "generation_config"):
        found = getattr(model, kind, None)
        for key, value in (
            {} if found is None else {**found.to_dict(), "id": id(found), "vars": list(vars(found))}
        ).items():
            state[f"{kind} {key}"] = value
    return state


def contents(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tensor_state(value)
    if isinstance(value, dict):
        return [(key, contents(each)) for key, each in value.items()]
    if isinstance(value, CONTAINERS):
        return [contents(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def tensor_state(tensor: Any) -> Any:
    quantised = getattr(tensor, "quant_state", None)
    constants = () if quantised is None else (bytes_of(quantised.absmax), bytes_of(quantised.code))
    eight = tuple(bytes_of(getattr(tensor, key)) for key in ("CB", "SCB") if getattr(tensor, key, None) is not None)
    flags = (tensor.requires_grad, tensor.grad is None, not tensor._backward_hooks)
    return id(tensor), type(tensor), tensor.dtype, tuple(tensor.shape), flags, bytes_of(tensor), constants, eight


def bytes_of(tensor: Any) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what is not the same, shortly."""
    missing = object()
    return [
        f"{key}: {str(before.get(key, '-'))[:80]} -> {str(after.get(key, '-'))[:80]}"
        for key in {**before, **after}
        if before.get(key, missing) != after.get(key, missing)
    ]


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    found = differences(before, after)
    assert not found, "\n".join(found)


def live() -> dict[str, int]:
    """Count what is alive: modules, tensors with their bytes, and hooks."""
    gc.collect()
    found = {"modules": 0, "tensors": 0, "bytes": 0, "hooks": 0}
    for each in gc.get_objects():
        if issubclass(type(each), torch.nn.Module):
            found["modules"] += 1
            found["hooks"] += len(each._forward_hooks) + len(each._forward_pre_hooks) + len(each._backward_hooks)
        elif issubclass(type(each), torch.Tensor):
            found["tensors"] += 1
            found["bytes"] += each.untyped_storage().nbytes()
    return found
