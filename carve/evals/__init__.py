"""Measuring a trained model. Nothing here reaches for the network."""

from carve.evals.perplexity import Perplexity, perplexity
from carve.text import read_documents, read_text

__all__ = ["Perplexity", "perplexity", "read_documents", "read_text"]
