# A worker for CPUs:  docker build -t nanovllm .
# In front of servers (engine.backend: openai), without torch:  docker build --build-arg EXTRAS=remote -t nanovllm-remote .
# For GPUs: Dockerfile.cuda. Without a Docker engine: tools/build_image.py, onto a base that debootstrap makes.

ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH
ARG EXTRAS=worker,documents,remote
ARG TORCH=torch>=2.8,<3
# Empty: pip's own index, which would bring the CUDA build.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# By itself, before the sources: this layer outlives changes of ours.
RUN case ",$EXTRAS," in *,worker,*) pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" ;; esac
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY nanovllm ./nanovllm
COPY docs/schemas ./docs/schemas
RUN pip install ".[$EXTRAS]"
# The image runs without a compiler, so the kernels come compiled, for every kind of CPU that a node may have.
RUN case ",$EXTRAS," in *,worker,*) \
        apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* && \
        XDG_CACHE_HOME=/opt/nanovllm/cache python -m nanovllm.engine.kernels && \
        strip --strip-unneeded /opt/nanovllm/cache/nanovllm/*.so ;; \
    esac
# What only installers, compilers and tests need.
RUN python -m pip uninstall -y pip && \
    rm -rf /opt/nanovllm/lib/python3*/site-packages/torch/include /opt/nanovllm/lib/python3*/site-packages/torch/share && \
    find /opt/nanovllm/lib -type d -name tests -prune -exec rm -rf {} +

FROM ${BASE}
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
# The chart's probes ask /startupz, /healthz and /readyz.
HEALTHCHECK NONE
ENTRYPOINT ["nanovllm"]
CMD ["worker"]
