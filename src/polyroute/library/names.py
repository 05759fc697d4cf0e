"""Names of the ways to merge LoRAs; the options of the command line load nothing else."""

__all__ = ["METHODS"]

METHODS = {
    "mean": (),
    "arithmetic": (),
    "ties": ("keep", "drop", "seed"),
    "dare": ("drop", "seed"),
    "knots": ("keep", "drop", "seed"),
    "wudi": ("ridge",),
}
"""Ways to merge LoRAs, and the options of each; `polyroute.library.merging` says what they do."""
