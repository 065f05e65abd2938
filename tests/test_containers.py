"""The containers of the real parts as Docker would be asked for them; without a daemon none is started."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from pathlib import Path
from typing import Any

import docker
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from chaos.toxiproxy import ToxiproxyLine
from containers import IMAGES, ContainerProcess, broker_properties, docker_answers, kafka_process, versity_process
from docker.models.containers import _create_container_args
from k3s import adapter_process, external_metrics_objects, k3s_process, operator_process, write_keys
from parts import KafkaNode, MinioNode, create_topic, unique_name

from nanovllm.demo.child_process import free_port

USER = f"{os.getuid()}:{os.getgid()}"


def asked_for(process: object) -> dict[str, Any]:
    """What docker-py sends to the daemon for the container of ``process``."""
    assert isinstance(process, ContainerProcess)
    container = process.configured(version="1.47")  # named, so that no daemon is asked for its own
    return _create_container_args(
        {
            "version": "1.47",
            "image": container.image,
            "command": container._command,
            "environment": container.env,
            "ports": container.ports,
            "volumes": container.volumes,
            "tmpfs": container.tmpfs,
            **container._kwargs,
        }
    )


@pytest.fixture(autouse=True)
def without_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Docker is and no local part."""
    for name in ("MINIO", "TOXIPROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("parts.require_docker", lambda *_: None)
    monkeypatch.setattr("chaos.toxiproxy.require_docker", lambda *_: None)


def processes(folder: Path) -> dict[str, object]:
    kubeconfig, keys = folder / "kubeconfig", folder / "keys"
    properties = broker_properties(folder / "kafka" / "data", 20_001, 20_002)
    return {
        "kafka": kafka_process(folder / "kafka", properties, {}),
        "versity": versity_process(folder / "s3", 20_003, ("test", "testsecret"), ("127.0.0.1:20001", "events")),
        "minio": MinioNode(folder)._made(),
        "toxiproxy": ToxiproxyLine(20_005, 20_001, folder).made(),
        "k3s": k3s_process(folder, 20_006, 20_008),
        "keda": operator_process(kubeconfig, keys, 20_009),
        "keda-adapter": adapter_process(kubeconfig, keys, 20_009, 20_010),
    }


@pytest.mark.parametrize("part", IMAGES)
def test_a_container_has_a_pinned_image_the_hosts_network_and_the_tests_user(part: str, tmp_path: Path) -> None:
    asked = asked_for(processes(tmp_path)[part])
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}", asked["image"])
    assert (asked["user"], asked["host_config"]["NetworkMode"]) == (USER, "host")
    assert "Privileged" not in asked["host_config"]
    assert "PortBindings" not in asked["host_config"]
    # Whatever a part writes lies in the folder of its test.
    binds = asked["host_config"].get("Binds", [])
    assert all(bind.startswith(f"{tmp_path}") and bind.split(":")[0] == bind.split(":")[1] for bind in binds)
    assert not [word for word in asked["command"] if "0.0.0.0" in word]


def test_the_parts_get_their_ports_folders_and_keys(tmp_path: Path) -> None:
    asked = {part: asked_for(process) for part, process in processes(tmp_path).items()}
    versity, minio = asked["versity"], asked["minio"]
    assert versity["environment"] == {"ROOT_ACCESS_KEY": "test", "ROOT_SECRET_KEY": "testsecret"}
    assert versity["command"][:2] == ["--port", "127.0.0.1:20003"]
    assert versity["command"][7:11] == ["--event-kafka-url", "127.0.0.1:20001", "--event-kafka-topic", "events"]
    assert versity["host_config"]["Binds"] == [f"{tmp_path}/s3:{tmp_path}/s3:rw"]
    assert minio["environment"] == {"MINIO_ROOT_USER": "test", "MINIO_ROOT_PASSWORD": "testsecret"}
    assert minio["command"][:2] == ["server", f"{tmp_path}/node"]
    assert "Binds" not in asked["toxiproxy"]["host_config"]
    assert f"--write-kubeconfig={tmp_path}/kubeconfig" in asked["k3s"]["command"]
    for part, program in (("keda", "/keda"), ("keda-adapter", "/keda-adapter")):
        assert asked[part]["entrypoint"] == [program]
        assert asked[part]["host_config"]["Binds"] == [
            f"{tmp_path}/{name}:{tmp_path}/{name}:ro" for name in ("kubeconfig", "keys")
        ]


def test_a_broker_with_tls_and_sasl_gets_its_users_and_its_keystore(tmp_path: Path) -> None:
    keystore = tmp_path / "broker.pem"
    keystore.write_text("key and certificate")
    properties = broker_properties(tmp_path / "data", 20_001, 20_002) | {"ssl.keystore.location": str(keystore)}
    asked = asked_for(kafka_process(tmp_path / "node", properties, {"worker": "hunter 2"}))
    assert asked["entrypoint"] == ["sh"]
    assert asked["host_config"]["Binds"] == [
        f"{keystore}:{keystore}:ro",
        f"{tmp_path}/node:{tmp_path}/node:rw",
    ]
    _, script = asked["command"]
    format_storage, run = script.splitlines()
    assert "--add-scram 'SCRAM-SHA-512=[name=worker,password=hunter 2]'" in format_storage
    assert run.startswith("exec java -cp '/opt/kafka/libs/*' ")
    assert f"ssl.keystore.location={keystore}\n" in (tmp_path / "node" / "server.properties").read_text()


def test_the_nodes_of_a_cluster_copy_to_one_another(tmp_path: Path) -> None:
    voters = "1@127.0.0.1:1,2@127.0.0.1:2,3@127.0.0.1:3"
    properties = broker_properties(tmp_path, 20_001, 2, node_id=2, voters=voters)
    assert (properties["default.replication.factor"], properties["min.insync.replicas"]) == ("3", "2")
    assert (properties["node.id"], properties["controller.quorum.voters"]) == ("2", voters)


@pytest.mark.kafka
async def test_apache_kafka_starts_with_the_properties_of_its_container(tmp_path: Path) -> None:
    port, controller_port = free_port(), free_port()
    node = KafkaNode(tmp_path, settings=broker_properties(tmp_path / "node" / "data", port, controller_port))
    node.port, node.controller_port = port, controller_port
    async with node:
        admin = AIOKafkaAdminClient(bootstrap_servers=node.bootstrap_servers)
        await admin.start()
        try:
            assert isinstance(await admin.list_topics(), list)
        finally:
            await admin.close()


def test_keda_gets_a_key_that_its_own_authority_vouches_for(tmp_path: Path) -> None:
    write_keys(tmp_path / "keys")
    context = ssl.create_default_context(cafile=str(tmp_path / "keys" / "ca.crt"))
    context.load_cert_chain(tmp_path / "keys" / "tls.crt", tmp_path / "keys" / "tls.key")
    kinds = [one["kind"] for one in external_metrics_objects(20_010, "Y2E=")]
    assert kinds == ["Service", "APIService", "ClusterRole", "ClusterRoleBinding"]


@pytest.mark.skipif(not docker_answers(), reason="no Docker daemon answers")
def test_each_pinned_image_can_be_pulled() -> None:
    client = docker.from_env()
    assert all(client.images.pull(image).id for image in IMAGES.values())


@pytest.mark.kafka
@pytest.mark.skipif(not docker_answers(), reason="no Docker daemon answers")
def test_apache_kafka_answers_from_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parts.kafka_node_program", lambda: None)

    async def run() -> None:
        async with KafkaNode(tmp_path) as node:
            await create_topic(node.bootstrap_servers, unique_name())
            node.kill()
            await node.start()

    asyncio.run(run())
