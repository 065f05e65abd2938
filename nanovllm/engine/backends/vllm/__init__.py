"""The backend `vllm`: vLLM's own engine in this process."""
