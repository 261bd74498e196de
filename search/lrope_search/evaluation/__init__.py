"""Scores of layer factors from a model in llama.cpp: tokens in, log-probabilities of the right answers out."""
