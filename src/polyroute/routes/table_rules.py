"""The rules of the paper and its baselines: the routing table, one shared skill, private skills."""

from collections.abc import Sequence

import torch

from polyroute.config import MHRConfig
from polyroute.errors import InputError
from polyroute.routes.index import index_on
from polyroute.routes.mixer import Mixer
from polyroute.routes.rule import Choice, RouteRule
from polyroute.routes.table import MU_ROW
from polyroute.routes.weights import uniform_weights

__all__ = ["PrivateRule", "SharedRule", "TableRule", "rule_of"]


class TableRule(RouteRule, name="table"):
    """Poly and MHR: each task has a row of logits, which become its weights."""

    has_table = True
    is_fixed = True

    def same_for_all(self, mixer: Mixer) -> bool:
        """Whether the logits were dropped: all tasks then use the uniform mixture."""
        return mixer.table.logits is None and mixer.inventory.num_sets == 1

    def choose(self, rows: Sequence[int], mixer: Mixer, *, training: bool) -> Choice:
        """The weights that the rows give, annealed by `mixer.anneal_progress`.

        Raises:
            InputError: the average is asked for while slots are open.
        """
        inventory, device = mixer.inventory, mixer.device
        if inventory.num_sets > 1 and MU_ROW in rows:
            raise InputError("slots have no common average: do not route 'mu' while they are open")
        sets = None if inventory.num_sets == 1 else index_on(device, tuple(rows))
        if mixer.table.logits is None or all(row == MU_ROW for row in rows):
            return Choice(mixer.uniform(len(rows)), sets)
        logits = mixer.table.gather(rows).view(len(rows), *mixer.shape)
        weights = mixer.weights_from(logits, training=training)
        if MU_ROW in rows:
            is_mu = index_on(device, tuple(row == MU_ROW for row in rows)).bool()
            weights = torch.where(is_mu.view(-1, 1, 1, 1), uniform_weights(weights), weights)
        return Choice(weights, sets)


class SharedRule(RouteRule, name="shared"):
    """One skill for all tasks, taken whole; a batch need not name its tasks."""

    needs_tasks = False
    is_fixed = True

    def same_for_all(self, mixer: Mixer) -> bool:
        """Always."""
        return True

    def choose(self, rows: Sequence[int], mixer: Mixer, *, training: bool) -> Choice:
        """The only skill."""
        return Choice(None, torch.zeros(len(rows), dtype=torch.long, device=mixer.device))


class PrivateRule(RouteRule, name="private"):
    """Each task has one skill of its own, taken whole; `mu` is the mean of all."""

    is_fixed = True
    owns_skills = True

    def choose(self, rows: Sequence[int], mixer: Mixer, *, training: bool) -> Choice:
        """The skill of each task.

        Raises:
            InputError: the average is asked for and no skill is left.
        """
        device, num_skills = mixer.device, mixer.inventory.num_skills
        if MU_ROW not in rows:
            return Choice(None, index_on(device, tuple(rows)))
        if num_skills == 0:
            raise InputError("no private adapter is left to average: add a task first")
        mean = torch.full((num_skills,), 1.0 / num_skills)
        own = torch.eye(num_skills)
        by_row = torch.stack([mean if row == MU_ROW else own[row] for row in rows]).to(device)
        return Choice(by_row[:, None, None].expand(-1, len(mixer.routers), 1, -1))


def rule_of(config: MHRConfig) -> RouteRule:
    """The rule of a method."""
    rules = {"shared": SharedRule, "private": PrivateRule}
    return rules.get(config.method, TableRule)()
