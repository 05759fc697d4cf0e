"""Training with a plain loop: `python examples/plain_loop.py MODEL SUITE OUT [STEPS]`.

MODEL is a base model (a folder, a hub id, or `demo`), SUITE a folder of tasks (docs/data.md).
"""

import sys
from itertools import islice

import torch
from torch.utils.data import DataLoader

import polyroute as pr
from polyroute.data.sampling import TaskSampler
from polyroute.data.suite import training_tasks
from polyroute.loading import load_base, load_suite
from polyroute.study.examples import encoded_mixture, task_sizes


def main(name: str, data: str, out: str, steps: int = 100) -> float:
    """Train on all training tasks of a suite, and return the loss of the last step."""
    base, tokenizer = load_base(name)
    kind, suite = pr.kind_of(base, tokenizer), load_suite(data)
    tasks = training_tasks(suite)
    rows = encoded_mixture(suite, tasks, "train", kind)
    model = pr.attach(base, pr.MHRConfig(num_skills=4, num_heads=4, rank=2), tasks).train()
    optimizer = torch.optim.AdamW(model.param_groups("full", lr=1e-3, route_lr=0.1))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    sampler = TaskSampler(task_sizes(rows), num_samples=16 * steps)
    batches = DataLoader(rows, batch_size=16, sampler=sampler, collate_fn=kind.collate)
    for batch in islice(batches, steps):
        loss = kind.loss(model, batch)  # each example is routed by its task, from batch["tasks"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return loss.item()


if __name__ == "__main__":
    print(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
