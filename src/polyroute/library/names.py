"""Names of what a library does; the options of the command line load nothing else."""

__all__ = ["METHODS", "TOKEN_ROUTES"]

METHODS = {
    "mean": (),
    "arithmetic": (),
    "ties": ("keep", "drop", "seed"),
    "dare": ("drop", "seed"),
    "knots": ("keep", "drop", "seed"),
    "wudi": ("ridge",),
}
"""Ways to merge LoRAs, and the options of each; `polyroute.library.merging` says what they do."""
TOKEN_ROUTES = ("arrow", "spectr", "lag")
"""Routes without training or texts, see `polyroute.library.token_routes`."""
