# A worker for CPUs:  docker build -t nanovllm .
# In front of servers (engine.backend: openai), without torch:  docker build --build-arg EXTRAS=remote -t nanovllm-remote .
# For GPUs: Dockerfile.cuda. No image has been built yet.

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH
ARG EXTRAS=worker,documents,remote
# By itself, before the sources: pip's own index would bring the CUDA build, and this layer outlives changes of ours.
RUN case ",$EXTRAS," in *,worker,*) \
        pip install --index-url https://download.pytorch.org/whl/cpu "torch>=2.8,<3" ;; \
    esac
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY nanovllm ./nanovllm
COPY docs/schemas ./docs/schemas
RUN pip install ".[$EXTRAS]"
# The image runs without a compiler, so the kernels come compiled, for every kind of CPU that a node may have.
RUN case ",$EXTRAS," in *,worker,*) \
        apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* && \
        XDG_CACHE_HOME=/opt/nanovllm/cache python -m nanovllm.engine.kernels ;; \
    esac

FROM python:3.12-slim
COPY --from=build /opt/nanovllm /opt/nanovllm
# HF_HUB_OFFLINE: checkpoints come from volumes, never from the network. GOMP_SPINCOUNT: OpenMP's threads that spin
# while they wait make a pod that shares its cores many times slower.
ENV PATH=/opt/nanovllm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    GOMP_SPINCOUNT=0 \
    XDG_CACHE_HOME=/opt/nanovllm/cache \
    HOME=/tmp
# By number: Kubernetes cannot tell from a name that a user is not root. The chart runs it under the same one.
USER 65532:65532
WORKDIR /tmp
EXPOSE 8080
# The chart's probes ask /healthz and /readyz.
HEALTHCHECK NONE
ENTRYPOINT ["nanovllm"]
CMD ["worker"]
