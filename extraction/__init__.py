"""From a scene, its label and a grid to a dataset of patches."""
