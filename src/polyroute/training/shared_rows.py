"""Training a routing table by rows in several processes: each takes the same step.

Shape letters: U rows, W numbers of a row.
"""

from torch import Tensor, distributed

from polyroute.errors import InputError
from polyroute.model import RoutedModel
from polyroute.routes.table import RoutingTable

__all__ = ["leave_rows_to_us", "share_rows"]

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""The attribute of a module in which torch's DDP looks for the names that it leaves alone."""


def check_rows_can_be_shared(model: RoutedModel) -> None:
    """Make sure that something besides rows trains, which torch's DDP needs.

    Raises:
        InputError: rows alone train.
    """
    rows = (model.routes.logits, model.routes.touched)
    if all(any(p is own for own in rows) for p in model.parameters() if p.requires_grad):
        raise InputError(
            "rowwise_routes in several processes needs something besides rows that trains: choose "
            "phase 'full', or start one process"
        )


def leave_rows_to_us(model: RoutedModel) -> None:
    """Keep DDP from averaging the touched rows, whose number changes from step to step."""
    names = [name for name, p in model.named_parameters() if p is model.routes.touched]
    setattr(model, IGNORED, names)


def share_rows(table: RoutingTable) -> None:
    """Make the gradients of touched rows the mean over processes, each of which must call this.

    A row that any process has touched is then touched in all of them, so that all tables, moments
    and step counts stay equal.
    """

    def merge(rows: list[int], gradient_UW: Tensor | None) -> tuple[list[int], Tensor | None]:
        of_all: list[list[int]] = [[] for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(of_all, rows)
        union = sorted({row for each in of_all for row in each})
        if not union:
            return [], None
        total_UW = table.read(union).zero_()
        if gradient_UW is not None:
            places = {row: place for place, row in enumerate(union)}
            total_UW[[places[row] for row in rows]] = gradient_UW
        distributed.all_reduce(total_UW)
        return union, total_UW / len(of_all)

    table.merge_collected(merge)
