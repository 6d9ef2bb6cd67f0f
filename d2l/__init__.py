"""Doc-to-LoRA: a hypernetwork that turns a document into a LoRA adapter."""
