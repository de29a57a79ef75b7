"""An enumerable world in which every estimator has an exact value."""
