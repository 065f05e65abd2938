"""The server of OpenAI's protocol in a process of its own, over this project's engine with the shipped checkpoint.

python openai_server_program.py PORT
"""

from __future__ import annotations

import asyncio
import sys

from openai_server import OpenAIServer

from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.llm_engine import LLMEngine

MODEL = "tiny-receipts"


async def serve(port: int) -> None:
    engine = LLMEngine(MODEL, dtype="float32")
    async with OpenAIServer(AsyncEngine(engine), model=MODEL, tells_token_ids=True, port=port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
