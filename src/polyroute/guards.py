"""Guards against misuse of a base model that carries an inventory, and of state dicts.

A base model stays usable on its own while an inventory is attached. Two of its methods would then
do the wrong thing in silence, so they are replaced on the base model itself.
"""

from typing import Any

import torch
from torch import nn

from polyroute.errors import InputError
from polyroute.routes.tasks import named_inputs

__all__ = ["add_digest", "check_digest", "is_compiled", "routed_generate", "routed_resize"]


def is_compiled(base_model: nn.Module) -> bool:
    """Whether a base model runs as compiled code, which skips hooks."""
    return (
        torch.compiler.is_compiling()
        or hasattr(base_model, "_orig_mod")
        or getattr(base_model, "_compiled_call_impl", None) is not None
    )


def routed_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Generate with the base model, for as many prompts as there are tasks.

    Args:
        model: the `RoutedModel`.
        *args: passed on to the base model.
        **kwargs: passed on to the base model.

    Raises:
        InputError: the number of tasks is not that of the prompts, or the model would repeat the
            prompts in an order that loses their tasks.
    """
    base, routes = model.base_model, model.open_routes
    generate = type(base).generate.__get__(base)
    inputs = named_inputs(generate, args, kwargs)
    route = model.check_tasks(inputs)
    if route is not None and route.per_example and len(set(route.rows or ())) > 1:
        _check_guidance(base, kwargs)
    outer, routes.generating = routes.generating, inputs
    routes.forget()  # the mixture of an earlier call must not be used
    try:
        return generate(*args, **kwargs)
    finally:
        routes.generating = outer


def _check_guidance(base: Any, kwargs: dict[str, Any]) -> None:
    # An encoder-decoder with guidance appends all prompts again, without their text, to the batch.
    settings = kwargs.get("generation_config") or getattr(base, "generation_config", None)
    scale = kwargs.get("guidance_scale") or getattr(settings, "guidance_scale", None)
    is_doubled = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if scale is not None and scale > 1 and is_doubled:
        raise InputError(
            f"guidance_scale={scale:g} repeats the batch in an order that loses the tasks of its "
            "prompts: generate for one task at a time, or set guidance_scale=1"
        )


def routed_resize(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Resize the vocabulary of the base model; see `RoutedModel.resize_token_embeddings`.

    Args:
        model: the `RoutedModel`.
        *args: passed on to the base model.
        **kwargs: passed on to the base model.

    Raises:
        InputError: the model is merged.
    """
    model.check_unmerged()
    model.mixer.forget()
    with model.wrapping.bare_output():
        return type(model.base_model).resize_token_embeddings(model.base_model, *args, **kwargs)


TASKS = "routes.tasks"
"""The key of a state dict that identifies the tasks of its rows, and their order."""


def add_digest(model: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state-dict hook of a `RoutedModel`: say which tasks the rows are of."""
    model.check_unmerged()
    state[prefix + TASKS] = model.routes.digest()


def check_digest(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before a `RoutedModel` loads a state dict: refuse one of other tasks.

    Raises:
        InputError: the state dict has other tasks or another order, or the model is merged.
    """
    model.check_unmerged()
    tasks = state.pop(prefix + TASKS, None)
    if tasks is not None and not torch.equal(tasks.cpu(), model.routes.digest()):
        raise InputError(
            "this state dict holds other tasks than this model, or the same in another order: load "
            "it into a model that was attached with the same list of tasks"
        )
