"""Text-to-LoRA: a hypernetwork that turns a task description into a LoRA adapter."""
