"""A rule of your own: a gate on the layer's input chooses the skills of every token.

Each adapted layer has a small linear gate. For each token and head it keeps the `top_k` largest
scores and turns them into weights by a softmax, as in sparse mixtures of experts. A batch names no
tasks. `balance_loss` keeps the gate from using a few skills only (Fedus et al., 2021,
arXiv:2101.03961, equation 4).

    python examples/token_gate.py
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import polyroute as pr
from polyroute.layer.factors import Factors
from polyroute.routes.mixer import Mixer
from polyroute.routes.rule import Batch, Gates, RouteRule


class TokenGate(RouteRule, name="token-gate"):
    """For each token, a gate that chooses the top k skills of each head.

    Args:
        top_k: the number of skills that a token uses in each head.
    """

    needs_tasks = False

    def __init__(self, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.scorers = nn.ModuleList()

    def settings(self) -> dict[str, Any]:
        """The arguments of `__init__`."""
        return {"top_k": self.top_k}

    def start(self, mixer: Mixer) -> None:
        """Make a linear scorer for each site, from its input to H x K scores."""
        _, self.heads, self.skills = mixer.shape
        for site in mixer.sites:
            self.scorers.append(nn.Linear(site.d_in, self.heads * self.skills, bias=False))

    def factors(self, batch: Batch, mixer: Mixer) -> Sequence[Factors]:
        """The skills of each site, mixed by its gate while the layer runs."""
        top_k = self.top_k if self.top_k < self.skills else None
        return [
            mixer.gated(site, partial(self._weights, site, batch), batch, top_k=top_k)
            for site in range(len(mixer.sites))
        ]

    def _weights(self, site: int, batch: Batch, x: Tensor) -> Tensor:
        """The weights `[..., H, K]` of the tokens of a layer's input `[..., d_in]`."""
        scorer = self.scorers[site]
        assert isinstance(scorer, nn.Linear)
        scores = nn.functional.linear(x.to(scorer.weight.dtype), scorer.weight)
        scores = scores.unflatten(-1, (self.heads, self.skills))
        kept, places = scores.topk(min(self.top_k, self.skills), dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, places, torch.softmax(kept, dim=-1))
        self.show(batch, site, torch.softmax(scores, dim=-1))
        return weights.to(x.dtype)


def balance_loss(gates: Sequence[Gates]) -> Tensor:
    """How unevenly the skills are used; 1 if all are used equally.

    For each site and head this is K times the sum, over the skills, of the share of tokens that
    prefer the skill times its mean gate. Sites and heads are averaged. Padding is left out.
    """
    losses = []
    for gate in gates:
        weights = gate.weights.reshape(-1, *gate.weights.shape[-2:])
        if gate.mask is not None and gate.mask.numel() == len(weights):
            weights = weights[gate.mask.reshape(-1).bool()]
        skills = weights.shape[-1]
        first = nn.functional.one_hot(weights.argmax(-1), skills).to(weights.dtype).mean(0)
        losses.append(skills * (first * weights.mean(0)).sum(-1).mean())
    return torch.stack(losses).mean()


def main() -> None:
    """Train a gate on the demo model for a few steps, and generate with it."""
    from polyroute.loading import load_base

    base, tokenizer = load_base("demo")
    config = pr.MHRConfig(num_skills=4, num_heads=1, rank=2, combine="output")
    model = pr.attach(base, config, tasks=[], rule=TokenGate(top_k=2))
    texts = ["abc dcba", "xyz zyx", "hello world"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].flip(1)
    optimizer = torch.optim.AdamW(model.param_groups("full", lr=3e-3))
    for step in range(20):
        with model.record_gates() as gates:
            loss = model(**batch, labels=labels).loss
            total = loss + 0.01 * balance_loss(gates)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}, balance {balance_loss(gates).item():.3f}")
    answers = model.eval().generate(**batch, max_new_tokens=8, num_beams=2)
    print(tokenizer.batch_decode(answers, skip_special_tokens=True))


if __name__ == "__main__":
    main()
