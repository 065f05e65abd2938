"""``nanovllm fetch-model``: a checkpoint from S3 into a directory, as the chart's init container does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanovllm.cli.jobs import ConfigOption, client_settings
from nanovllm.errors import counted
from nanovllm.objects.checkpoint_copy import copy_checkpoint
from nanovllm.objects.s3_client import check_settings
from nanovllm.terminal import long_work, plain

MAX_NAMED = 5


def fetch_model(
    source: Annotated[str, typer.Argument(help="s3://bucket/prefix, below which config.json and safetensors lie.")],
    directory: Annotated[Path, typer.Argument(help="The directory to make, for engine.model.")],
    config: ConfigOption = None,
) -> None:
    """Copy a checkpoint from S3 into a directory: whole or not at all, and only what has changed.

    Pickles and code stay where they are. What s3.allow names does not count: it is about jobs.
    """
    s3 = client_settings(config, None).s3
    check_settings(s3)
    with long_work(f"copying {plain(source).plain}") as show:
        copy = copy_checkpoint(s3, source, directory.absolute(), show)
    read = f"{copy.read_bytes:,} bytes read" if copy.read_bytes else "all of them were there"
    print(f"{counted(copy.files, 'file')} in {copy.directory}, {read}")
    if copy.passed_over:
        named = ", ".join(plain(name).plain for name in copy.passed_over[:MAX_NAMED])
        more = ", …" if len(copy.passed_over) > MAX_NAMED else ""
        print(f"not copied: {named}{more}")
