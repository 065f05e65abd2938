"""The backend `vllm` in a process of an environment with vLLM: requests and outputs as lines of JSON over a socket.

``python tests/vllm_program.py DIRECTORY PORT MAX_MODEL_LEN MAX_IMAGES [EXTRA_ARGS]``
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm.engine.backends.base import Generation, Request
from nanovllm.engine.backends.vllm.loading import load_vllm
from nanovllm.engine.backends.vllm.options import VllmOptions
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.images.preprocess import prepare_image


async def serve(options: VllmOptions, port: int) -> None:
    """Serve connections until it is told to end."""
    from nanovllm.engine.backends.vllm.backend import VllmEngine

    engine = VllmEngine(await asyncio.to_thread(load_vllm, options), options)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: set[asyncio.Task[None]] = set()

        def say(**fields: Any) -> None:
            writer.write(json.dumps(fields).encode() + b"\n")

        async def answer(generation: Generation) -> None:
            try:
                async for chunk in generation:
                    say(id=generation.request_id, chunk=asdict(chunk))
                say(id=generation.request_id, output=await generation)
            except Exception as error:
                say(id=generation.request_id, error=[type(error).__name__, str(error)])

        say(model=asdict(engine.model_info), context=engine.capabilities.context, images=engine.capabilities.images)
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                asked = json.loads(line)
                if "request" in asked:
                    task = asyncio.create_task(answer(engine.submit(request_of(asked["request"]))))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                elif "abort" in asked:
                    engine.abort(asked["abort"])
                elif "stats" in asked:
                    say(stats=asdict(engine.stats()))
        writer.close()

    def request_of(fields: dict[str, Any]) -> Request:
        assert engine.image_transform is not None
        images = [prepare_image(base64.b64decode(data), engine.image_transform) for data in fields.pop("images")]
        sampling = SamplingParams.model_validate(fields.pop("sampling"))
        salt = bytes.fromhex(fields.pop("cache_salt"))
        return Request(**fields, images=tuple(images), sampling=sampling, cache_salt=salt)

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # type: ignore[union-attr]
    async with engine, await asyncio.start_server(connected, "127.0.0.1", port, limit=1 << 26):
        await asyncio.Event().wait()


def main() -> None:
    directory, port, context, max_images, extra = sys.argv[1:]
    asyncio.run(
        serve(
            VllmOptions(
                model="tiny",
                directory=Path(directory),
                dtype="float32",
                max_num_seqs=8,
                max_model_len=int(context),
                max_images=int(max_images),
                enforce_eager=True,
                extra_args=json.loads(extra),
            ),
            int(port),
        )
    )


if __name__ == "__main__":
    main()
