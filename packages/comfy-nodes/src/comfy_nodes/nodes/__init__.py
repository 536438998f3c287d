"""Node classes by subject. Each module needs a running ComfyUI."""
