"""Training with Lightning: `python examples/lightning_recipe.py MODEL SUITE OUT [STEPS]`.

MODEL is a base model (a folder, a hub id, or `demo`), SUITE a folder of tasks (docs/data.md).
"""

import sys
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

import polyroute as pr
from polyroute.data.sampling import TaskSampler
from polyroute.data.suite import training_tasks
from polyroute.loading import load_base, load_suite
from polyroute.study.examples import encoded_mixture, task_sizes


class RoutedModule(lightning.LightningModule):
    """A routed model; its checkpoints hold the inventory without the base model."""

    def __init__(self, model: pr.RoutedModel, kind: Any) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        self.strict_loading = False

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        """The loss of a batch; each example is routed by its task."""
        loss = self.kind.loss(self.model, batch)
        self.log("loss", loss, batch_size=len(batch["tasks"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with separate learning rates for skills and routing logits."""
        return torch.optim.AdamW(self.model.param_groups("full", lr=1e-3, route_lr=0.1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the base model out of the checkpoint."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if "base_model" not in k}


def main(name: str, data: str, out: str, steps: int = 100) -> lightning.Trainer:
    """Train on all training tasks of a suite."""
    base, tokenizer = load_base(name)
    kind, suite = pr.kind_of(base, tokenizer), load_suite(data)
    tasks = training_tasks(suite)
    rows = encoded_mixture(suite, tasks, "train", kind)
    model = pr.attach(base, pr.MHRConfig(num_skills=4, num_heads=4, rank=2), tasks).train()
    sampler = TaskSampler(task_sizes(rows), num_samples=16 * steps)
    batches = DataLoader(rows, batch_size=16, sampler=sampler, collate_fn=kind.collate)
    trainer = lightning.Trainer(max_steps=steps, gradient_clip_val=1.0, default_root_dir=out)
    trainer.fit(RoutedModule(model, kind), batches)
    model.save_pretrained(out)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
