"""Names of what training may do; the options of the command line load nothing else."""

__all__ = ["ON_NAN"]

ON_NAN = ("stop", "skip")
"""What a step does that is not finite; see `polyroute.training.divergence`."""
