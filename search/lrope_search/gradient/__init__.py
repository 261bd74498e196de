"""Derivatives of log-probabilities by RoPE factors and query scales, through llama.cpp's own graph; needs torch."""
