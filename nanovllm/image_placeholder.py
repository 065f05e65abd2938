"""The placeholder that marks an image in a prompt, in jobs and in the Python API alike."""

IMAGE_PLACEHOLDER = "<|image|>"
