"""Parts of a decoder layer, and how tensors reach the device."""
