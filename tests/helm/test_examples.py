"""Each file of values under examples/, installed by real Helm; its pod runs as a process and answers a job.

Brokers, group, topics and port are the test's own. A backend that needs a GPU, servers or weights that are not here
gives way to echo, and a login to none, in the process alone; ``test_install.py`` runs servers, TLS and weights.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_release import Values, consumed_topics, merged, provide, rendered, values_of
from control_plane import leftovers, ready_workers, wait_for
from helm_python import Config
from kubelet import Kubelet
from kubernetes import client
from local_pod import Variables
from parts import REPOSITORY, S3Part, create_topic
from world import World

from nanovllm.checkpoints.resolve import resolve_checkpoint
from nanovllm.kafka.admin import connected_admin
from nanovllm.messages.job import Job

pytestmark = [pytest.mark.k8s, pytest.mark.kafka, pytest.mark.timeout(280)]

EXAMPLES = sorted((REPOSITORY / "helm" / "nanovllm" / "examples").glob("*.yaml"))
WITH_WEIGHTS = {"native-cpu", "model-from-s3", "documents"}
"""Files whose worker runs its backend with the small checkpoint: echo has no schemas for routes."""
NOT_HERE = ("ENGINE__", "REMOTE__", "VLLM__", "KAFKA__SASL", "KAFKA__SSL", "KAFKA__SECURITY")
TINY: Values = {
    "settings": {
        "engine": {"dtype": "auto", "quantization": None, "kv_cache_bytes": 64 * 2**20, "max_model_len": 512},
    },
    "resources": {"requests": {"cpu": "2"}},
}
"""Values for the small checkpoint in place of the one that a file names, and for the cores of this machine."""


class Claims(dict[str, Path]):
    """A folder for each claim, in which every checkpoint of ``names`` is the small one."""

    def __init__(self, folder: Path, *names: str) -> None:
        super().__init__()
        self._folder = folder
        self._names = names

    def __missing__(self, claim: str) -> Path:
        folder = self[claim] = self._folder / claim
        folder.mkdir(parents=True)
        for name in self._names:
            (folder / name).symlink_to(resolve_checkpoint("tiny-receipts"))
        return folder


def with_echo(variables: Variables) -> Variables:
    """``variables`` of a worker with the backend echo and brokers without a login."""
    kept = {name: text for name, text in variables.items() if not name.removeprefix("NANOVLLM_").startswith(NOT_HERE)}
    return kept | {"NANOVLLM_ENGINE__BACKEND": "echo"}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_installs_and_its_worker_answers_a_job(
    file: Path,
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    s3: S3Part,
    tmp_path: Path,
) -> None:
    world = World(kafka_broker, s3, tmp_path, {})
    values: Values = merged(yaml.safe_load(file.read_text(encoding="utf-8")), values_of(world))
    is_tiny = file.stem in WITH_WEIGHTS
    if is_tiny:
        values = merged(values, TINY)
    if "s3" in values.get("model", {}):
        values = merged(values, stored_model(s3))
    objects = rendered(chart_path, values, namespace)
    provide(api, namespace, objects)
    asyncio.run(make_topics(world, objects))
    asyncio.run(send_job(world))
    model = Path(values["settings"].get("engine", {}).get("model", "/none"))
    pods: dict[str, Any] = {"claims": Claims(tmp_path / "claims", model.name), "adapt": dict if is_tiny else with_echo}
    provided = set(leftovers(api, namespace))
    with (
        Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm,
        Kubelet(api, namespace, tmp_path / "pods", **pods) as kubelet,
    ):
        assert helm.install(chart_path, "nanovllm", values, namespace=namespace)["status"] == "deployed"
        try:
            count = 1 if values.get("keda", {}).get("enabled", True) else values.get("replicaCount", 1)
            wait_for(lambda: len(ready_workers(api, namespace)) == count, "no worker became ready", within_s=120)
            asyncio.run(read_result(world))
        except BaseException:
            print(kubelet.logs())
            raise
        helm.uninstall("nanovllm")
        wait_for(lambda: set(leftovers(api, namespace)) <= provided, "an uninstalled release leaves objects behind")
        assert {one.exit_code for one in kubelet.exits} == {0}, kubelet.logs()


def stored_model(s3: S3Part) -> Values:
    """Values for the small checkpoint in a bucket, under any login."""
    bucket = s3.make_bucket()
    for path in resolve_checkpoint("tiny-receipts").iterdir():
        s3.put(bucket, f"models/tiny-receipts/{path.name}", path.read_bytes())
    store = {"endpoint_url": s3.endpoint_url, "addressing_style": "path", "region": s3.region}
    return {
        "settings": {"s3": store},
        "model": {"s3": {"uri": f"s3://{bucket}/models/tiny-receipts"}},
        "aws": {"existingSecret": "aws"},
    }


async def make_topics(world: World, objects: list[dict[str, Any]]) -> None:
    await world.create_topics()
    others = consumed_topics(objects) - {world.topics.jobs} | {world.topics.events, world.topics.in_flight}
    async with connected_admin(world.kafka) as admin:
        there = set(await admin.list_topics())  # lanes keep the names that their file gives them
    await create_topic(world.bootstrap_servers, *sorted(others - there))


async def send_job(world: World) -> None:
    async with world.producer() as producer:
        await producer.send_job(Job(job_id="one", prompt="What is this?"))


async def read_result(world: World) -> None:
    async with asyncio.timeout(60), world.reader() as reader:
        while not world.results:
            assert not world.dead_letters, world.dead_letters
            await world.read(reader)
