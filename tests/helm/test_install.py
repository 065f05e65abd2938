"""Real Helm installs the chart into a real API server with KEDA, against Apache Kafka."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from bench import png
from certificates import write_certificate
from control_plane import condition, leftovers, ready_workers, replicas, scaled_object, secret, wait_for
from helm_python import Config
from kubelet import Kubelet
from kubernetes import client
from openai_server import OpenAIServer
from parts import REPOSITORY, KafkaNode, create_topic, kafka_node_program

from nanovllm.checkpoints.resolve import resolve_checkpoint
from nanovllm.demo.child_process import free_port

pytestmark = [pytest.mark.k8s, pytest.mark.kafka, pytest.mark.timeout(280)]

Values = dict[str, Any]


@pytest.fixture
def secured_broker(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(``host:port``, CA as PEM) of a broker that wants TLS and SCRAM; it has a topic ``jobs``."""
    if kafka_node_program() is None:
        pytest.skip("Apache Kafka with TLS and SCRAM: no KAFKA_NODE and no ../shared/kafka/kafka-node")
    key, certificate, port = tmp_path / "key.pem", tmp_path / "certificate.pem", free_port()
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=broker"]
    openssl += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(openssl, check=True, capture_output=True)
    keystore = tmp_path / "keystore.pem"
    keystore.write_text(key.read_text() + certificate.read_text())
    secured = f"SASL_SSL://127.0.0.1:{port}"
    settings = {
        "listeners": "PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}," + secured,
        "advertised.listeners": "PLAINTEXT://127.0.0.1:{port}," + secured,
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(keystore),
    }
    node = KafkaNode(tmp_path / "kafka", settings=settings, scram={"worker": "right"})
    asyncio.run(node.start())
    try:
        asyncio.run(create_topic(node.bootstrap_servers, "jobs"))
        yield f"127.0.0.1:{port}", certificate.read_text()
    finally:
        node.stop()


async def produce(bootstrap_servers: str, topic: str, count: int) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap_servers) as producer:
        for number in range(count):
            await producer.send_and_wait(topic, b"{}", partition=number % 4)


async def commit_all(bootstrap_servers: str, topic: str, group: str) -> None:
    """What a worker that has done every job leaves behind."""
    async with AIOKafkaConsumer(
        bootstrap_servers=bootstrap_servers, group_id=group, enable_auto_commit=False
    ) as consumer:
        partitions = [TopicPartition(topic, number) for number in range(4)]
        consumer.assign(partitions)
        await consumer.commit(await consumer.end_offsets(partitions))


def test_install_scale_upgrade_and_uninstall(
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    unique: Callable[[str], str],
) -> None:
    topic, events = unique("jobs"), unique("events")
    for name in (topic, events):
        asyncio.run(create_topic(kafka_broker, name))
    values: Values = {
        "settings": {
            "kafka": {"bootstrap_servers": kafka_broker, "group_id": topic},
            "topics": {"jobs": topic, "events": events},
            "s3": {"allow": ["s3://inbox"]},
        },
        "routes": {
            "file": (REPOSITORY / "examples" / "routes.yaml").read_text(),
            "files": {"receipt.schema.json": (REPOSITORY / "examples" / "receipt.schema.json").read_text()},
        },
        "keda": {"lagThreshold": 10, "pollingInterval": 1, "cooldownPeriod": 4},
        "metrics": {"service": {"enabled": True}},
        "podDisruptionBudget": {"enabled": True},
        "networkPolicy": {"enabled": True},
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/worker"}},
    }
    with Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm:
        release = helm.install(chart_path, "nanovllm", values, namespace=namespace)
        assert release["status"] == "deployed"
        wait_for(lambda: condition(scaled_object(api, namespace), "Ready") == "True", "ScaledObject is not ready")
        wait_for(lambda: replicas(api, namespace) == 0, "no job waits, and still a worker runs")

        asyncio.run(produce(kafka_broker, topic, 40))
        wait_for(lambda: replicas(api, namespace) == 4, "40 jobs at a threshold of 10 did not bring four workers")
        wait_for(lambda: len(client.CoreV1Api(api).list_namespaced_pod(namespace).items) == 4, "the pods do not exist")

        before = client.AppsV1Api(api).read_namespaced_deployment("nanovllm", namespace)
        values["settings"]["engine"] = {"max_num_seqs": 8}
        assert helm.upgrade(chart_path, "nanovllm", values, namespace=namespace)["revision"] == 2
        after = client.AppsV1Api(api).read_namespaced_deployment("nanovllm", namespace)
        assert after.spec.replicas == 4, "an upgrade took the number of workers out of KEDA's hands"
        assert after.spec.template.metadata.annotations != before.spec.template.metadata.annotations
        stored = client.CoreV1Api(api).read_namespaced_config_map("nanovllm", namespace)
        assert stored.data["NANOVLLM_ENGINE__MAX_NUM_SEQS"] == "8"

        asyncio.run(commit_all(kafka_broker, topic, topic))
        wait_for(lambda: replicas(api, namespace) == 0, "every job is done, and still a worker runs")
        asyncio.run(produce(kafka_broker, events, 20))
        wait_for(lambda: replicas(api, namespace) == 2, "20 events at a threshold of 10 did not bring two workers")

        helm.uninstall("nanovllm")
        assert not helm.list()
    wait_for(lambda: not leftovers(api, namespace), "an uninstalled release leaves objects behind")


def test_keda_logs_in_with_tls_and_scram(
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    secured_broker: tuple[str, str],
    unique: Any,
) -> None:
    bootstrap_servers, ca = secured_broker
    secrets = client.CoreV1Api(api)
    secrets.create_namespaced_secret(namespace, secret("kafka-user", username="worker", password="wrong"))
    secrets.create_namespaced_secret(namespace, secret("kafka-tls", **{"ca.crt": ca}))
    kafka = {"bootstrap_servers": bootstrap_servers, "security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512"}
    values: Values = {
        "settings": {"kafka": kafka, "topics": {"jobs": "jobs"}},
        "kafka": {"sasl": {"existingSecret": "kafka-user"}, "tls": {"existingSecret": "kafka-tls"}},
        "keda": {"pollingInterval": 1},
    }
    with Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm:
        helm.install(chart_path, "nanovllm", values, namespace=namespace)
        wait_for(lambda: condition(scaled_object(api, namespace), "Ready") == "False", "a wrong password is no trouble")
        secrets.replace_namespaced_secret(
            "kafka-user", namespace, secret("kafka-user", username="worker", password="right")
        )
        wait_for(
            lambda: condition(scaled_object(api, namespace), "Ready") == "True", "the right password does not help"
        )
        helm.uninstall("nanovllm")
    wait_for(lambda: not leftovers(api, namespace), "an uninstalled release leaves objects behind")


@contextlib.contextmanager
def served(server: OpenAIServer) -> Iterator[None]:
    """``server`` in an event loop of a thread, while the test waits."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(60)
        yield
        asyncio.run_coroutine_threadsafe(server.__aexit__(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def send_job(bootstrap_servers: str, topic: str, job: dict[str, Any]) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap_servers) as producer:
        await producer.send_and_wait(topic, json.dumps(job).encode())


async def read_result(bootstrap_servers: str, topic: str) -> dict[str, Any]:
    async with (
        asyncio.timeout(60),
        AIOKafkaConsumer(topic, bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest") as consumer,
    ):
        result: dict[str, Any] = json.loads((await consumer.getone()).value)
        return result


def answer_of_a_pod(
    chart_path: Path, kubeconfig: Path, api: client.ApiClient, namespace: str, values: Values, broker: str, folder: Path
) -> tuple[dict[str, Any], client.V1Pod]:
    """The result of a job whose lag brings a pod, which runs here as a process until KEDA takes it away again."""
    name, core = namespace.replace("_", "-"), client.CoreV1Api(api)
    topics = {use: f"{name}-{use}" for use in ("jobs", "results", "metrics", "dead_letters")}
    asyncio.run(create_topic(broker, *topics.values()))
    values["settings"] |= {
        "kafka": {"bootstrap_servers": broker, "group_id": name},
        "topics": topics,
        "http": {"port": free_port()},
    }
    values["keda"] |= {"pollingInterval": 1, "cooldownPeriod": 3}
    values["probes"] = {"startup": {"seconds": 3}}
    with Config(kubeconfig_path=kubeconfig, namespace=namespace) as helm:
        helm.install(chart_path, "nanovllm", values, namespace=namespace)
        wait_for(lambda: condition(scaled_object(api, namespace), "Ready") == "True", "ScaledObject is not ready")
        image = base64.b64encode(png()).decode()
        job = {"job_id": "one", "prompt": "what is <|image|>", "images": [{"data": image}]}
        asyncio.run(send_job(broker, topics["jobs"], job))
        with Kubelet(api, namespace, folder) as kubelet:
            (pod,) = wait_for(lambda: ready_workers(api, namespace), "a job brought no worker", within_s=180)
            result = asyncio.run(read_result(broker, topics["results"]))
            wait_for(lambda: replicas(api, namespace) == 0, "the job is done, and still a worker runs")
            wait_for(lambda: not core.list_namespaced_pod(namespace).items, "a pod does not end")
            assert [one.exit_code for one in kubelet.exits] == [0], kubelet.logs()
        helm.uninstall("nanovllm")
    assert (result["job_id"], result["status"]) == ("one", "ok")
    return result, pod


@pytest.mark.parametrize("example", ["openai-vllm", "openai-hosted"])
def test_a_job_brings_a_worker_in_front_of_servers_that_answers_it_and_goes(
    example: str,
    chart_path: Path,
    kubeconfig: Path,
    api: client.ApiClient,
    namespace: str,
    kafka_broker: str,
    unique: Callable[[str], str],
    tmp_path: Path,
) -> None:
    values = yaml.safe_load((chart_path / "examples" / f"{example}.yaml").read_text(encoding="utf-8"))
    settings, key, core = values["settings"], unique("sk-hunter2"), client.CoreV1Api(api)
    certificate: Path | None = None
    keys = secret(values["remote"]["apiKeys"]["existingSecret"], **{"api-keys": key})
    core.create_namespaced_secret(namespace, keys)
    if "ca" in values["remote"]:
        authority = write_certificate(tmp_path / "ca.crt", address="127.0.0.1")
        certificate = authority.with_suffix(".pem")
        bundle = {"metadata": {"name": "ca-bundle"}, "data": {"ca.crt": authority.read_text()}}
        core.create_namespaced_config_map(namespace, bundle)
    server = OpenAIServer(
        model=settings["engine"]["model"],
        key=key,
        tells_token_ids=settings["remote"]["dialect"] == "vllm",
        certificate=certificate,
    )
    with served(server):
        settings["remote"]["endpoints"] = [server.url]
        result, pod = answer_of_a_pod(chart_path, kubeconfig, api, namespace, values, kafka_broker, tmp_path)
    assert result["model"]["id"] == server.model
    assert result["text"].startswith("what is")
    (asked,) = server.asked
    assert len(asked.image_urls) == 1
    assert asked.headers["authorization"] == f"Bearer {key}"
    assert key not in str(pod), "the API key stands in the pod"
    assert key not in "".join(log.read_text() for log in tmp_path.rglob("*.log"))
    wait_for(lambda: set(leftovers(api, namespace)) <= {"ca-bundle"}, "an uninstalled release leaves objects behind")


def test_a_job_brings_a_worker_that_reads_weights_from_its_volume_and_tries_them(
    chart_path: Path, kubeconfig: Path, api: client.ApiClient, namespace: str, kafka_broker: str, tmp_path: Path
) -> None:
    values = yaml.safe_load((chart_path / "examples" / "generic.yaml").read_text(encoding="utf-8"))
    values["model"] = {"volume": {"hostPath": {"path": str(resolve_checkpoint("tiny-receipts"))}}}
    values["settings"]["engine"] |= {"model": "/models", "max_model_len": 512}
    values["resources"]["requests"]["cpu"] = "1500m"
    result, _ = answer_of_a_pod(chart_path, kubeconfig, api, namespace, values, kafka_broker, tmp_path)
    assert result["usage"]["image_tokens"] == 49
    (log,) = tmp_path.rglob("*.log")
    assert "transformers' layers, measured over" in log.read_text()
