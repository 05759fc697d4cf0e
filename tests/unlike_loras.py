"""Three LoRAs that differ in ranks, scales and layers."""

from pathlib import Path

from test_lora_import import PATTERNS, written

SETTINGS = {
    "plain": {"r": 2},
    "rs": {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": PATTERNS,
}


def write_unlike(folder: Path) -> Path:
    """Write each to a sub-folder of its name."""
    for name, settings in SETTINGS.items():
        written(folder / name, **settings)
    return folder
