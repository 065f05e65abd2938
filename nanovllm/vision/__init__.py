"""Images to embeddings: decoding and its limits, digests, the tower and projector, and the embedding cache.

Nothing is imported here: the decoder processes and the producers of jobs must come up without torch.
"""
