"""What the step-time benchmark measures: models, batches and settings, in named groups."""

from dataclasses import dataclass, replace

SHAPES: dict[str, dict[str, int]] = {
    "t5": {"hidden": 512, "feed_forward": 1024, "layers": 6},
    "llama": {"hidden": 512, "feed_forward": 1376, "layers": 8},
    "llama-1b": {"hidden": 2048, "feed_forward": 5504, "layers": 22},
    "t5-xl": {"hidden": 2048, "feed_forward": 5120, "layers": 24},
}
DEFAULT_GROUPS = {
    "cpu": ["main", "overhead", "generate", "growth", "length", "rank", "checkpointing"],
    "cuda": ["gpu", "overhead"],
}
SWEEP = ((4, 8), (8, 8), (32, 8), (128, 8), (8, 1), (8, 32), (32, 32), (128, 32))


@dataclass(frozen=True)
class Case:
    """One model, batch and way to train or generate; all its contenders are timed together."""

    name: str
    group: str
    family: str
    """`t5` or `llama`."""
    batch: int
    tasks: int
    """How many different tasks the batch holds."""
    hidden: int
    feed_forward: int
    layers: int
    """For T5, of the encoder and of the decoder each."""
    length: int = 64
    new_tokens: int = 0
    """0: a training step; otherwise greedy generation with a cache, after a prompt of `length`."""
    rank: int = 4
    settings: tuple[tuple[int, int], ...] = ((8, 8),)
    """Pairs of skills and heads: PEFT Poly and polyroute take part once with each."""
    checkpointing: bool = False
    optimizer: bool = False
    """Whether a step includes that of AdamW over what the contender trains."""
    compiled: bool = False
    """Whether LoRA and polyroute also take part compiled."""
    graph: bool = False
    """Whether polyroute also takes part as a CUDA graph."""
    dtype: str = "float32"
    device: str = "cpu"
    calls: int = 1
    """How many steps are timed as one, where a single one is too short."""

    @property
    def attention_heads(self) -> int:
        """64 channels each in the larger models."""
        return max(8, self.hidden // 64)


def make(name: str, group: str, shape: str, batch: int, tasks: int, **more: object) -> Case:
    """A case with one of the `SHAPES`, or parts of it replaced."""
    values: dict[str, object] = {**SHAPES[shape], **more}
    return Case(name, group, shape.partition("-")[0], batch, tasks, **values)  # type: ignore[arg-type]


def main_cases() -> list[Case]:
    batches = [(16, 1), (16, 4), (16, 16), (8, 1), (8, 4)]
    return [make(f"{m}-b{b}-u{u}", "main", m, b, u) for m in ("t5", "llama") for b, u in batches]


def overhead_cases() -> list[Case]:
    """Steps in which hardly anything is computed: what is left is the cost of calling."""
    tiny = {"length": 8, "hidden": 64, "feed_forward": 176, "calls": 10}
    return [make(f"{m}-d64-b4-u4", "overhead", m, 4, 4, **tiny) for m in ("t5", "llama")]


def generate_cases() -> list[Case]:
    return [
        make(f"{m}-generate-b8-u{u}", "generate", m, 8, u, length=32, new_tokens=32)
        for m in ("t5", "llama")
        for u in (1, 4)
    ]


def growth_cases() -> list[Case]:
    """Many inventories side by side in one case, so that their times compare directly.

    The short batches count the optimizer's step, which grows with the inventory like nothing else.
    """
    sizes = [(16, 64, 1, False), (16, 64, 16, False), (8, 32, 1, True), (8, 32, 8, True)]
    return [
        make(
            f"growth-b{b}-l{length}-u{u}{'-adamw' if optimizer else ''}",
            *("growth", "t5", b, u),
            length=length,
            layers=3,
            settings=SWEEP,
            optimizer=optimizer,
        )
        for b, length, u, optimizer in sizes
    ]


def length_cases() -> list[Case]:
    """The same number of tokens, in ever fewer and longer sequences."""
    return [
        make(f"llama-b{1024 // n}-u2-l{n}", "length", "llama", 1024 // n, 2, length=n)
        for n in (64, 128, 256, 512)
    ]


def rank_cases() -> list[Case]:
    """Other ranks than 4, which is that of the group `main`."""
    return [
        make(f"t5-b16-u{u}-r{r}", "rank", "t5", 16, u, rank=r) for r in (1, 16) for u in (1, 16)
    ]


def checkpointing_cases() -> list[Case]:
    """With; the same cases without it are in the group `main`."""
    return [
        make(f"{m}-b16-u4-ckpt", "checkpointing", m, 16, 4, checkpointing=True)
        for m in ("t5", "llama")
    ]


def gpu_cases() -> list[Case]:
    """Models of 1 and 3 billion parameters in bf16; short batches are bound by kernel launches."""
    common: dict[str, object] = {"dtype": "bfloat16", "device": "cuda", "calls": 3}
    batches = [(4, 32, 1), (4, 32, 4), (8, 128, 1), (8, 128, 8)]
    steps = [
        make(f"{m}-b{b}-l{n}-u{u}", "gpu", m, b, u, length=n, graph=True, **common)
        for m in ("llama-1b", "t5-xl")
        for b, n, u in batches
    ]
    # Compiling takes minutes, more of them in the deeper model.
    compiled = {"llama-1b-b4-l32-u1", "llama-1b-b8-l128-u8", "t5-xl-b4-l32-u4"}
    steps = [replace(case, compiled=case.name in compiled) for case in steps]
    sweep = ((4, 8), (8, 1), (8, 32), (32, 8), (128, 8))
    growth = [
        make(
            f"llama-1b-growth-b4-l32-u{u}{'-adamw' if optimizer else ''}",
            *("gpu", "llama-1b", 4, u),
            length=32,
            settings=sweep,
            optimizer=optimizer,
            **common,
        )
        for u, optimizer in [(1, False), (4, False), (1, True)]
    ]
    checkpointed = make(
        "llama-1b-b8-l128-u8-ckpt",
        "gpu",
        "llama-1b",
        8,
        8,
        length=128,
        checkpointing=True,
        **common,
    )
    answers = {"length": 32, "new_tokens": 32, **common, "calls": 1}
    generate = make("llama-1b-generate-b8-u4", "gpu", "llama-1b", 8, 4, **answers)
    return [*steps, *growth, checkpointed, generate]


GROUPS = {
    "main": main_cases,
    "overhead": overhead_cases,
    "generate": generate_cases,
    "growth": growth_cases,
    "length": length_cases,
    "rank": rank_cases,
    "checkpointing": checkpointing_cases,
    "gpu": gpu_cases,
}


def all_cases(device: str) -> list[Case]:
    """Every case that can run on a device, in the order of the groups."""
    cases = [case for cases in GROUPS.values() for case in cases()]
    return [
        replace(case, device=device) for case in cases if device == "cuda" or case.device == "cpu"
    ]


def shrink(case: Case) -> Case:
    """The same kind of case with a model and a batch that take no time, on the CPU."""
    tokens = {"length": 8, "new_tokens": min(case.new_tokens, 3)}
    batch = min(case.batch, 4)
    settings = tuple({(min(k, 4), min(h, 8)): None for k, h in case.settings})
    return replace(
        case, batch=batch, tasks=min(case.tasks, batch), hidden=64, feed_forward=64, layers=1,
        settings=settings, device="cpu", calls=1, **tokens,
    )  # fmt: skip


def quick_cases() -> list[Case]:
    """One small case of each kind, as a smoke test."""
    chosen = ["llama-b8-u4", "t5-generate-b8-u1", "growth-b8-l32-u8-adamw", "t5-b16-u4-ckpt"]
    by_name = {case.name: case for case in all_cases("cpu")}
    return [shrink(by_name[name]) for name in chosen]
