"""Skills, the routing table and the rules that mix skills into the factors of the layers."""
