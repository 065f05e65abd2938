"""Servers of OpenAI's protocol as an engine: vLLM, SGLang, llama.cpp's, hosted ones. No torch."""
