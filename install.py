"""Run by the WebUI at every launch, in a process of its own.

Nothing is installed: torch, numpy, safetensors, Pillow and gradio are the host's own, and all that DynFuse imports inside
a WebUI. Installing anything here could move versions that the host pins.
"""
