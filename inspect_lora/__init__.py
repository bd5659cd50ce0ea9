"""Tells what any LoRA adapter is worth: `python -m inspect_lora`."""
