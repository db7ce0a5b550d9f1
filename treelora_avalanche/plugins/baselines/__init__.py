"""The plugins of the methods that TreeLoRA is compared with."""
