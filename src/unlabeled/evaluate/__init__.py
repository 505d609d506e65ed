"""How good are the features: the papers' protocols, and figures that need no labels."""
