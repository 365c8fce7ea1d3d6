"""How good a model is: accuracy, trials, error rates."""
