"""From checkpoints to one ONNX file that other tools run, with what catalogues need to know of it."""
