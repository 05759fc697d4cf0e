import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

settings.register_profile("polyroute", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("polyroute")
# Tiny models gain nothing from more threads, and lose much on a busy machine.
torch.set_num_threads(1)
