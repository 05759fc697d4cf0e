"""A rule of your own: the weights come from a condition that the caller passes.

The condition of an example is a vector of numbers, such as the features of a user or the noise
level of a diffusion step. A small network turns it into the weights of the skills. Similar
conditions get similar adapters, and a condition that was never seen gets one too. Heads and `alpha`
work as for tasks.

    python examples/condition_rule.py
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import polyroute as pr
from polyroute.layer.factors import Factors
from polyroute.routes.mixer import Mixer
from polyroute.routes.rule import Batch, RouteRule


class ConditionRule(RouteRule, name="condition"):
    """Weights of skills as a function of a condition: `model(..., condition=c)`, c `[B, width]`.

    Args:
        width: the number of entries of a condition.
        hidden: the number of units of the network's only hidden layer.
    """

    needs_tasks = False

    def __init__(self, width: int, hidden: int = 16) -> None:
        super().__init__()
        self.width, self.hidden = width, hidden
        self.network = nn.Sequential()

    def settings(self) -> dict[str, Any]:
        """The arguments of `__init__`."""
        return {"width": self.width, "hidden": self.hidden}

    def start(self, mixer: Mixer) -> None:
        """Make the network, from a condition to N x H x K scores."""
        routers, heads, skills = mixer.shape
        self.network = nn.Sequential(
            nn.Linear(self.width, self.hidden),
            nn.Tanh(),
            nn.Linear(self.hidden, routers * heads * skills),
            nn.Unflatten(-1, (routers, heads, skills)),
        )

    def factors(self, batch: Batch, mixer: Mixer) -> Sequence[Factors]:
        """The factors of each site, mixed once for each example before the layers run."""
        condition = None if batch.route is None else batch.route.condition
        if not isinstance(condition, Tensor) or condition.shape[1:] != (self.width,):
            raise pr.InputError(
                f"the rule 'condition' needs condition=c with c of shape [batch, {self.width}]"
            )
        first = next(self.network.parameters())
        scores = self.network(condition.to(first))
        return mixer.mix(torch.softmax(scores, dim=-1), batch)


def main() -> None:
    """Train skills whose weights follow an angle, to rotate points of the plane by it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 2))
    config = pr.MHRConfig(num_skills=3, num_heads=1, rank=2, target_modules=["0", "1"])
    model = pr.attach(base, config, tasks=[], rule=ConditionRule(width=2))
    optimizer = torch.optim.AdamW(model.param_groups("full", lr=1e-2))
    for step in range(300):
        x, angle = torch.randn(64, 2), torch.rand(64) * 3
        turned = torch.stack(
            [x[:, 0] * angle.cos() - x[:, 1] * angle.sin(),
             x[:, 0] * angle.sin() + x[:, 1] * angle.cos()], dim=1,
        )  # fmt: skip
        condition = torch.stack([angle.cos(), angle.sin()], dim=1)
        loss = (model(x, condition=condition) - turned).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: mean square error {loss.item():.4f}")


if __name__ == "__main__":
    main()
