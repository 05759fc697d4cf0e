"""LoRAs that were trained apart: their arithmetic, routes among them, and what stands for them."""
