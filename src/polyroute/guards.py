"""Methods of a base model that go through its routed model, whoever calls them.

A base model stays usable on its own while an inventory is attached. Two of its methods would then
do the wrong thing in silence, so they are replaced on the base model itself.
"""

from typing import Any

from polyroute.errors import InputError
from polyroute.routes.tasks import named_inputs

__all__ = ["routed_generate", "routed_resize"]


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
    if model.merged_task is not None:
        raise InputError(f"the model is merged with {model.merged_task!r}; call unmerge() first")
    model.mixer.forget()
    with model.wrapping.bare_output():
        return type(model.base_model).resize_token_embeddings(model.base_model, *args, **kwargs)
