"""`polyroute push`: a run's inventory on the hub."""

from polyroute.host.output import Result
from polyroute.program.commands.runs import inventory_of
from polyroute.program.options.finished import PushOptions
from polyroute.saved.card import write_card
from polyroute.saved.hub import Repository, push

__all__ = ["push_run"]


def push_run(options: PushOptions) -> Result:
    """Send the inventory of a run to the hub, with a model card.

    Raises:
        InputError: the run is not finished or is damaged, or the hub refuses.
    """
    run, repository = options.run, options.repository
    _ = inventory_of(run).tasks  # which reads every file of the routing table
    card = write_card(run, name=repository, license=options.license)
    url = push(
        run, Repository(repository, options.revision), card, private=options.private or None,
        message=options.message,
    )  # fmt: skip
    return Result({"repository": repository, "url": url}, (f"the inventory is on the hub: {url}",))
