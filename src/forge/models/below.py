"""What lies below the boundary: what comes before the first decoder layer, found by running that much of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layers import decoder_layers_path, named_base_modules, unwrap
from .truncation import Reached, Truncation, parameters_behind


def trained_embeddings(model: nn.Module, truncation: Truncation) -> dict[str, nn.Parameter]:
    """The parameters that train and that the input of the first layer comes from, by name: embeddings and their norms.

    The decoder is called with one row of two tokens and stopped at its first layer, so that token and position
    embeddings, whatever an architecture calls them, are all found. A decoder that cannot be called so (on the meta
    device, say) is taken to have its input embeddings there.
    """
    base: Any = unwrap(model)
    embeddings = base.get_input_embeddings()
    parameters = list(embeddings.parameters())
    decoder = base.get_submodule(decoder_layers_path(base).rpartition(".")[0])
    truncation.probe = []
    device = parameters[0].device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            ids = torch.zeros((1, 2), dtype=torch.long, device=device)
            decoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Reached:
        parameters = parameters_behind(iter(truncation.probe))
    except Exception:  # noqa: BLE001  # whatever it is that this decoder wants, the first training step checks again
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
    finally:
        truncation.probe = None
    return {name: p for name, p in model.named_parameters() if any(p is found for found in parameters)}


def modules_beside(model: nn.Module) -> dict[str, nn.Module]:
    """What stands beside the language decoder and feeds it: towers and projectors, by name; not the output head.

    Everything that hangs on the way from the model down to the decoder is one, as in `decoder_layers_path`: towers
    stand beside the decoder and not inside it.
    """
    base: Any = unwrap(model)
    modules = named_base_modules(base)
    decoder_path = decoder_layers_path(base).rpartition(".")[0].split(".")
    head = base.get_output_embeddings()
    beside = {}
    for depth in range(len(decoder_path)):
        parent = ".".join(decoder_path[:depth])
        for name, child in modules[parent].named_children():
            path = f"{parent}.{name}" if parent else name
            is_head = child is head or (depth == 0 and type(child) is nn.Linear)  # of a classifier, it is not named
            if name != decoder_path[depth] and not is_head and any(True for _ in child.parameters()):
                beside[path] = child
    return beside
