"""How a library is judged; the options of the command line load nothing else."""

from dataclasses import dataclass

from polyroute.settings import check_settings, flag, number, setting, whole

__all__ = ["JudgeSettings"]


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How a library is judged.

    The steps and the rate of a fresh LoRA are those that did best with 32 examples of SmolLM2's
    development tasks; learned weights get as many steps.
    """

    shots: int = setting(32, whole(), help="Examples that everything may learn from.")
    steps: int = setting(16, whole(), help="Steps of a fresh LoRA and of learned weights.")
    batch_size: int = setting(8, whole(), help="Examples in a step.")
    lr: float = setting(3e-3, number(above=0), help="Learning rate of a fresh LoRA.")
    weight_lr: float = setting(0.1, number(above=0), help="Learning rate of weights.")
    randoms: int = setting(3, whole(), help="Random libraries to compare with.")
    oracle: bool = setting(
        False, flag(), help="Also score every LoRA on the test examples, which takes long."
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_settings(self)
