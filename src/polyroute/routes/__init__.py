"""Skills, the routing table, and how they become what the layers apply."""
