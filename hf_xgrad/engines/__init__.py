"""Weights as engines have them: each one class behind the interface of `hf_xgrad.core.weights.Weights`."""
