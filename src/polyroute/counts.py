"""The parts of a routed model, counted and described."""

from collections.abc import Sequence

from torch import nn

from polyroute.config import MHRConfig
from polyroute.layer.sites import Site
from polyroute.routes.inventory import Inventory
from polyroute.routes.table import RoutingTable

__all__ = ["count_parameters", "describe"]


def count_parameters(
    base_model: nn.Module, inventory: Inventory, routes: RoutingTable
) -> dict[str, int]:
    """Count parameters by purpose.

    Let P be the sum of `d_in + d_out` over sites (for (IA)^3, of `d_out`, at rank 1), r the rank, K
    the number of skills, H of heads, N of routers and T of tasks. The counts are

    - `base`: the frozen base model;
    - `inventory`: all skills, K r P, or of each LoRA of a library its own;
    - `routing_table`: all routes, T N H K;
    - `one_adapter`: an exported LoRA, which is also what phase `mu` trains, r P; of a library the
      largest;
    - `new_task_z`: what phase `z` trains, N H K;
    - `new_task_full`: what phase `full` trains, K r P + N H K.
    """
    one = inventory.size_of_one
    skills = sum(p.numel() for p in inventory.parameters())
    row = routes.shape[0] * routes.shape[1] * routes.shape[2] if routes.shape else 0
    return {
        "base": sum(p.numel() for p in base_model.parameters()),
        "inventory": skills,
        "routing_table": len(routes) * row,
        "one_adapter": one,
        "new_task_z": row,
        "new_task_full": skills + row,
    }


def describe(
    config: MHRConfig,
    base_model: nn.Module,
    sites: Sequence[Site],
    inventory: Inventory,
    routes: RoutingTable,
) -> str:
    """Describe sites, routers and parameter counts as text."""
    shapes: dict[tuple[str, int, int], int] = {}
    for site in sites:
        key = (site.name.rsplit(".", 1)[-1], site.d_in, site.d_out)
        shapes[key] = shapes.get(key, 0) + 1
    counts = count_parameters(base_model, inventory, routes)
    lines = [
        f"{config.method} {config.adapter} on {type(base_model).__name__}: "
        f"{inventory.num_skills} skills, {inventory.heads} heads, rank {inventory.rank}, "
        f"scale {config.scale:g}, {len(routes)} tasks",
        f"{len(sites)} sites:",
        *(f"  {n:4d} x {name} [{i} -> {o}]" for (name, i, o), n in shapes.items()),
        f"{routes.shape[0] if routes.shape else 0} routers",
        "parameters:",
        *(f"  {name:14s} {number:>15,}" for name, number in counts.items()),
    ]
    return "\n".join(lines)
