"""From a dataset of patches to a trained model."""
