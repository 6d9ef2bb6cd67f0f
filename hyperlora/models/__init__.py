"""The base models: decoder, weights, tokenizers."""
