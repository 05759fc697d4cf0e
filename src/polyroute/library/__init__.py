"""LoRAs that were trained apart: their exact arithmetic."""
