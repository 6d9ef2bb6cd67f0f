"""Hypernetworks that turn a text into a LoRA adapter for a frozen language model."""
