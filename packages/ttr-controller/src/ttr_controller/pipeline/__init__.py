"""The quickstart's phases on the embedded teacher, and the folder that keeps them."""
