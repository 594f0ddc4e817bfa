"""From a trained model and a scene of any size to a map."""
