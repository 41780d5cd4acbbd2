"""Training loops: `make_train_step`, for plain trees, linen and nnx."""

from optax_ext.training.layers import flax_layers, layer_statistics
from optax_ext.training.train_step import StepMetrics, make_train_step

__all__ = ["StepMetrics", "flax_layers", "layer_statistics", "make_train_step"]
