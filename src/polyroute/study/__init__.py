"""Looking at a trained inventory: scores, routes and gradients."""
