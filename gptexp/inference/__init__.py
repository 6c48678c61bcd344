"""Text from a trained model: the KV cache, and sampling."""
