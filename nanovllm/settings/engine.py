"""Settings of the model, the engine and the sampling defaults."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field

from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.base import Bytes, Seconds, SettingsModel, StrList

DEFAULT_MODEL = "tiny-receipts"


class EngineSettings(SettingsModel):
    """The model and the limits of the engine."""

    model: str | None = Field(
        None,
        description="Checkpoint directory, alias or cached hub name; unset: the shipped tiny model. With `openai`: the "
        "name that the servers list; unset: the only one that they list.",
    )
    backend: Literal["auto", "native", "generic", "openai", "vllm", "echo"] = Field(
        "auto",
        description="`native`: the families that this engine has code for; `generic`: transformers' own layers over "
        "its attention, after a trial at load; `auto`: native where the family is one of them, else generic; `openai` "
        "asks servers of OpenAI's protocol (section `remote`); `vllm` runs vLLM's engine in this process (section "
        "`vllm`); `echo` answers with the prompt: for tests of the pipeline.",
    )
    model_aliases: dict[str, str] = Field(
        default_factory=dict, description="Short names for checkpoint directories (JSON object)."
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="Most jobs in one step of the engine; unset: 64, on a GPU of this worker's 8 to 256, by its memory "
        "and the model.",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens in one step of the engine; unset: 512 on a CPU, on a GPU 1024 to 8192, by its memory "
        "and the model; what vLLM chooses with `vllm`.",
    )
    max_model_len: int | None = Field(None, ge=1, description="Longest sequence in tokens; unset: the checkpoint's.")
    block_size: int | None = Field(
        None, ge=1, description="Tokens in a block of the KV cache; unset: the attention backend's. Deprecated."
    )
    kv_cache_bytes: Bytes | None = Field(
        None, description="Size of the KV cache; unset: by gpu_memory_utilization or cpu_memory_utilization."
    )
    kv_cache_dtype: Literal["auto", "bfloat16"] = Field(
        "auto", description="`auto`: the model's own type; `bfloat16` halves the cache of a float32 model, on a CPU."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of the GPU's memory that the engine takes."
    )
    cpu_memory_utilization: float = Field(
        0.4,
        gt=0,
        le=1,
        description="Share of the machine's memory, or of the control group's limit, that the engine takes on a CPU; "
        "the KV cache has 1 GiB at least.",
    )
    cpu_memory_shares: int = Field(
        1,
        ge=1,
        description="Workers of one machine or control group that divide what cpu_memory_utilization leaves beside "
        "the weights that they share; `replicas` sets it.",
    )
    packed_weights_bytes: int = Field(
        32 * 2**30,
        ge=0,
        description="Most bytes of files with packed weights in the user's cache, on a CPU: the next start maps them, "
        "and workers of one machine share them; 0: none.",
    )
    enforce_eager: bool = Field(False, description="Record no CUDA graphs: a quicker start, slower small steps.")
    embedding_cache_bytes: int = Field(256 * 2**20, ge=0, description="Size of the cache of image embeddings.")
    embedding_cache_host_bytes: int = Field(
        0, ge=0, description="Size of its second tier, in the host's memory, for what leaves a GPU's."
    )
    min_pixels: int | None = Field(
        None, ge=1, description="Least area of an image, for models that take images at their own size; unset: theirs."
    )
    max_pixels: int | None = Field(None, ge=1, description="Largest area of an image, for such models; unset: theirs.")
    max_image_tokens: int | None = Field(
        None, ge=1, description="Most tokens of one image, for such models: lowers max_pixels."
    )
    max_images_per_request: int = Field(16, ge=0, description="Most images of one job.")
    enable_prefix_caching: bool = Field(True, description="Reuse the KV of equal beginnings.")
    num_speculative_tokens: int = Field(
        8, ge=0, description="Most tokens that a job guesses ahead from earlier text, verified in one step; 0: none."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="Type of the weights at work.")
    device: str | None = Field(None, description="`cpu`, `cuda`, `cuda:1`; unset: a GPU where there is one.")
    quantization: Literal["int8"] | None = Field(
        None, description="`int8`: weights and products of the text model's linear layers in 8 bits, on a CPU."
    )
    deterministic: bool = Field(
        False, description="The same bits of a text whatever is computed beside it; on a CPU with a C++ compiler."
    )
    generation_config: Literal["auto", "vllm"] = Field(
        "vllm",
        description="`auto`: sampling parameters that the checkpoint's generation_config.json sets count where neither "
        "a job nor `NANOVLLM_SAMPLING__*` sets them; `vllm`: they do not.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description='Variables of the chat template (JSON object), such as `{"enable_thinking": false}` for Qwen3.',
    )
    profile: str | None = Field(
        None,
        description="Profile of the model: prompts, sampling, pages and template variables below those that are set; "
        "`none`: none; unset: by the checkpoint's name, files or family.",
    )
    job_chat_template_kwargs: StrList = Field(
        (), description="Names of those variables that a job may set in its own `chat_template_kwargs`."
    )
    step_timeout_s: Seconds = Field(300.0, description="A step that takes longer ends the worker: it hangs.")

    @property
    def seats_elsewhere(self) -> int:
        """Most jobs at once in an engine that is not this project's, and does not choose by itself."""
        return self.max_num_seqs or 64

    @property
    def loads_model(self) -> bool:
        """Whether this process computes with a checkpoint's weights by this project's own engine."""
        return self.backend in ("auto", "native", "generic")

    def set_beside(self, names: Collection[str]) -> list[str]:
        """Settings that are not in ``names`` and have another value than their default."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if name not in names and getattr(self, name) != field.get_default(call_default_factory=True)
        ]


class SamplingSettings(SamplingParams):
    """What a job gets where its own `sampling` says nothing; the names are those of `sampling`."""

    temperature: float = Field(0.0, ge=0.0, le=100.0, description="0 means greedy: the most probable token.")
    max_tokens: int = Field(256, ge=1, le=1_000_000, description="Most tokens to generate.")
