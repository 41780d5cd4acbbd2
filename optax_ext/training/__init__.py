"""Training loops: `make_train_step`, for plain trees, linen and nnx."""

from optax_ext.training.train_step import StepMetrics, make_train_step

__all__ = ["StepMetrics", "make_train_step"]
