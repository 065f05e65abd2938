"""What the chart renders, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import lzma
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python import parse_set_file
from helm_python.chart import Chart, lint
from helm_python.errors import HelmError, HelmRenderError

from nanovllm.engine.config import EngineConfig
from nanovllm.pipeline.build import engine_options
from nanovllm.pipeline.build_remote import check_remote
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.settings.engine import EngineSettings
from nanovllm.settings.loading import load_settings, unknown_variables
from nanovllm.settings.worker import ENV_PREFIX, Settings

REPOSITORY = Path(__file__).resolve().parents[2]
KEDA_CRDS = REPOSITORY.parent / "shared" / "k8s" / "keda-crds.json.xz"
EXAMPLES = REPOSITORY / "examples"
ROUTES = {
    "file": (EXAMPLES / "routes.yaml").read_text(encoding="utf-8"),
    "files": {"receipt.schema.json": (EXAMPLES / "receipt.schema.json").read_text(encoding="utf-8")},
}
# Each of the chart's alternatives is taken in one of these.
VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "example": yaml.safe_load((EXAMPLES / "values.yaml").read_text(encoding="utf-8")),
    "scram_tls": {
        "settings": {
            "kafka": {
                "bootstrap_servers": "a.kafka.svc:9093,b.kafka.svc:9093",
                "security_protocol": "SASL_SSL",
                "sasl_mechanism": "SCRAM-SHA-512",
            }
        },
        "kafka": {
            "sasl": {"existingSecret": "kafka-user"},
            "tls": {
                "existingSecret": "kafka-tls",
                "certKey": "tls.crt",
                "keyKey": "tls.key",
                "keyPasswordKey": "tls.password",
            },
        },
        "aws": {"existingSecret": "aws", "sessionTokenKey": "AWS_SESSION_TOKEN"},
    },
    "tls_only": {
        "settings": {"kafka": {"security_protocol": "SSL"}},
        "kafka": {"tls": {"existingSecret": "kafka-tls"}},
    },
    "gpu": {
        "image": {"repository": "registry.example/nanovllm", "digest": "sha256:" + "0" * 64, "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "gpu": {"count": 1},
        "nodeSelector": {"accelerator": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "topology.kubernetes.io/zone",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "nanovllm"}},
            }
        ],
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "priorityClassName": "batch",
        "runtimeClassName": "nvidia",
        "model": {"existingClaim": "checkpoints", "subPath": "v1"},
        "settings": {
            "engine": {"model": "/models/receipts", "kv_cache_bytes": 8 * 2**30, "max_num_seqs": 128},
            "s3": {"allow": ["s3://jobs/in/", "s3://more"], "addressing_style": "path"},
            "sampling": {"temperature": 0.5, "stop": ["\n\n", 'a "quoted", stop']},
        },
    },
    "routes": {
        "routes": ROUTES,
        "settings": {"retries": {"delays_s": [60]}, "s3": {"allow": ["s3://inbox"]}},
        "keda": {"eventsLagThreshold": 5},
    },
    "routes_elsewhere": {"routes": {"existingConfigMap": "receipts.routes"}},
    "routes_in_a_volume": {
        "settings": {"documents": {"routes": "/srv/routes/routes.yaml"}},
        "extraVolumes": [{"name": "routes", "persistentVolumeClaim": {"claimName": "routes"}}],
        "extraVolumeMounts": [{"name": "routes", "mountPath": "/srv/routes", "readOnly": True}],
    },
    "no_keda": {
        "keda": {"enabled": False},
        "replicaCount": 3,
        "serviceAccount": {"create": False, "name": "worker"},
        "resources": {"requests": None, "limits": None},
        "existingSecret": "nanovllm-secrets",
        "extraEnv": [{"name": "NANOVLLM_LOG_LEVEL", "value": "debug"}],
        "extraEnvFrom": [{"configMapRef": {"name": "proxy"}}],
    },
    "everything_optional": {
        "fullnameOverride": "nanovllm",
        "commonLabels": {"team": "documents"},
        "podLabels": {"tier": "batch"},
        "podAnnotations": {"example.com/a": "b"},
        "annotations": {"example.com/c": "d"},
        "model": {"volume": {"hostPath": {"path": "/srv/models"}}},
        "extraVolumes": [{"name": "scratch", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/worker"}},
        "terminationGracePeriodSeconds": 120,
        "metrics": {"service": {"enabled": True}, "podMonitor": {"enabled": True, "labels": {"release": "prom"}}},
        "podDisruptionBudget": {"enabled": True, "maxUnavailable": "25%"},
        "networkPolicy": {
            "enabled": True,
            "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
            "egress": [{"ports": [{"port": 53, "protocol": "UDP"}, {"port": 9092}, {"port": 443}]}],
        },
        "keda": {
            "limitToPartitionsWithLag": True,
            "bootstrapServers": "kafka.streaming.svc.cluster.local:9092",
            "fallback": {"failureThreshold": 3, "replicas": 1},
            "advanced": {
                "horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 600}}}
            },
            "extraTriggers": [
                {
                    "type": "cron",
                    "metadata": {"timezone": "UTC", "start": "0 6 * * *", "end": "0 7 * * *", "desiredReplicas": "1"},
                }
            ],
            "annotations": {"autoscaling.keda.sh/paused": "true"},
        },
    },
}
CHART = REPOSITORY / "helm" / "nanovllm"
VALUE_FILES: dict[str, dict[str, Any]] = {
    file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((CHART / "examples").glob("*.yaml"))
}
# The others say how a worker of any backend runs, and come after a file of one.
OF_BACKENDS = {
    name: values for name, values in VALUE_FILES.items() if "backend" in values.get("settings", {}).get("engine", {})
}
BACKENDS = set(get_args(EngineSettings.model_fields["backend"].annotation))


CORE_KINDS = {
    "Deployment",
    "ConfigMap",
    "RoutesConfigMap",
    "ServiceAccount",
    "Service",
    "PodDisruptionBudget",
    "NetworkPolicy",
    "Pod",
    "DashboardConfigMap",
    "HorizontalPodAutoscaler",
    "Role",
    "RoleBinding",
}
# Of Kubernetes 1.30 and newer.
NEWER_KINDS = {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
OPERATORS_KINDS = {"PodMonitor", "PrometheusRule", "ScalingPrometheusRule"}
KEDA_KINDS = {"ScaledObject", "TriggerAuthentication"}

every_value_set = pytest.mark.parametrize(
    "values", [*VALUES.values(), *VALUE_FILES.values()], ids=[*VALUES, *VALUE_FILES]
)
every_backend = pytest.mark.parametrize("values", OF_BACKENDS.values(), ids=OF_BACKENDS.keys())
Render = Callable[..., dict[str, dict[str, Any]]]


def container_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def pod_of(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


def remote(url: str | None, *, ca_file: str | None = None, **values: Any) -> dict[str, Any]:
    """Values of workers in front of the server at ``url``, with those of the chart itself in ``values``."""
    fields: dict[str, Any] = {"endpoints": [url]} if url else {}
    fields |= {"ca_file": ca_file} if ca_file else {}
    return {"settings": {"engine": {"backend": "openai"}, "remote": fields}, **values}


def remote_engine(name: str, value: Any) -> dict[str, Any]:
    values = remote("http://a/v1")
    values["settings"]["engine"][name] = value
    return values


@every_value_set
def test_helm_lint_finds_nothing(chart_path: Path, values: dict[str, Any]) -> None:
    report = lint(chart_path, values, strict=True)
    found = [message for message in report["messages"] if message["severity"] > 1]
    assert not found
    assert not report["errors"]


@every_value_set
def test_core_objects_are_valid_kubernetes(render: Render, values: dict[str, Any]) -> None:
    objects = render(values)
    for kind in CORE_KINDS & objects.keys():
        for version in ("1.27", "1.35"):
            kubernetes_validate.validate(objects[kind], version, strict=True)
    for kind in NEWER_KINDS & objects.keys():
        kubernetes_validate.validate(objects[kind], "1.35", strict=True)
    others = objects.keys() - CORE_KINDS - NEWER_KINDS - KEDA_KINDS - OPERATORS_KINDS
    assert all(name.startswith("KafkaTopic ") for name in others)


@every_value_set
def test_keda_objects_fit_kedas_own_schema(render: Render, values: dict[str, Any]) -> None:
    if not KEDA_CRDS.exists():
        pytest.skip("KEDA's CRDs: no ../shared/k8s/keda-crds.json.xz")
    schemas = {
        crd["spec"]["names"]["kind"]: crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for crd in json.loads(lzma.decompress(KEDA_CRDS.read_bytes()))
    }
    for kind, rendered in render(values).items():
        if kind in KEDA_KINDS:
            jsonschema.validate(rendered, _closed(schemas[kind]))


def _closed(schema: Any) -> Any:
    """The same schema with unknown fields refused, where the API server would silently prune them."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


@every_value_set
def test_the_worker_understands_every_setting(
    render: Render, chart_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = render(values)
    variables = dict(objects["ConfigMap"]["data"])
    for entry in container_of(objects)["env"]:
        # What comes from a Secret stands here as some text; a setting is checked by its name.
        variables[entry["name"]] = entry.get("value", "1")
    assert not list(unknown_variables(variables))
    for name in os.environ:
        if name.startswith("NANOVLLM_"):
            monkeypatch.delenv(name)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    settings = load_settings()
    for section, fields in Chart.load(chart_path).merge_values(values)["settings"].items():
        if not isinstance(fields, dict):
            assert getattr(settings, section) == fields
            continue
        for field, value in fields.items():
            effective = getattr(getattr(settings, section), field)
            effective = str(effective) if isinstance(effective, Path) else effective
            assert (list(effective) if isinstance(effective, tuple) else effective) == value


def schema_tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("chart_schema", REPOSITORY / "tools" / "chart_schema.py")
    assert specification is not None
    assert specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    return tool


def test_the_schema_knows_the_workers_settings(chart_path: Path) -> None:
    written = json.loads((chart_path / "values.schema.json").read_text())["properties"]["settings"]
    assert written == schema_tool().settings_schema(), "run PYTHONPATH=. python tools/chart_schema.py"
    assert written["properties"].keys() == Settings.model_fields.keys()


def test_the_template_knows_which_settings_a_backend_refuses() -> None:
    tool = schema_tool()
    assert tool.REFUSED_SETTINGS.read_text() == tool.refused_settings(), "run PYTHONPATH=. python tools/chart_schema.py"


def test_the_chart_passes_over_engine_settings_at_their_defaults(render: Render) -> None:
    values = remote("http://a/v1")
    values["settings"]["engine"] = EngineSettings().model_dump(mode="json") | {"backend": "openai"}
    render(values)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_model_len", 4096), ("dtype", "bfloat16"), ("kv_cache_bytes", 1 << 33), ("enable_prefix_caching", False)],
)
def test_the_chart_refuses_an_engine_setting_of_another_backend(name: str, value: Any, render: Render) -> None:
    with pytest.raises(HelmRenderError, match=f"settings.engine.{name} is set, which the backend openai has not"):
        render(remote_engine(name, value))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replicas": 3}, "replicas"),
        ({"image": {"tags": "1"}}, "tags"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"image": {"tag": "a b"}}, "tag"),
        ({"settings": {"kafka": {"sasl_password": "hunter2"}}}, "sasl_password"),
        ({"settings": {"kafka": {"ssl_key_password": "hunter2"}}}, "ssl_key_password"),
        ({"settings": {"kafka": {"bootstrap_server": "a:1"}}}, "bootstrap_server"),
        ({"settings": {"kafka": {"bootstrap_servers": "kafka"}}}, "bootstrap_servers"),
        ({"settings": {"kafka": {"auto_offset_reset": "oldest"}}}, "auto_offset_reset"),
        ({"settings": {"kafak": {}}}, "kafak"),
        ({"settings": {"engine": {"max_num_seqs": 0}}}, "max_num_seqs"),
        ({"settings": {"engine": {"max_num_seqs": "many"}}}, "max_num_seqs"),
        ({"settings": {"http": {"port": 80}}}, "port"),
        ({"settings": {"topics": {"jobs": "not a topic"}}}, "jobs"),
        ({"keda": {"allowIdleConsumers": True, "limitToPartitionsWithLag": True}}, "keda"),
        ({"keda": {"lagThreshold": 0}}, "lagThreshold"),
        ({"keda": {"maxReplicaCount": "8"}}, "maxReplicaCount"),
        ({"gpu": {"count": -1}}, "count"),
        ({"gpu": {"resourceName": "gpu"}}, "resourceName"),
        ({"extraEnv": [{"value": "x"}]}, "extraEnv"),
        ({"probes": {"startup": {"httpGet": {"path": "/"}}}}, "httpGet"),
        ({"kafka": {"sasl": {"password": "hunter2"}}}, "password"),
        ({"aws": {"secretAccessKey": "hunter2"}}, "secretAccessKey"),
        ({"settings": {"remote": {"api_keys": ["hunter2"]}}}, "api_keys"),
        ({"existingSecret": "Not A Name"}, "existingSecret"),
        ({"podAnnotations": {"a": 1}}, "podAnnotations"),
        ({"routes": {"file": {"routes": []}}}, "file"),
        ({"routes": {"files": {"schemas/a.json": ""}}}, "schemas/a.json"),
        ({"routes": {"files": {"routes.yaml": ""}}}, "routes.yaml"),
        ({"routes": {"existingConfigMap": "Not A Name"}}, "existingConfigMap"),
        ({"keda": {"eventsLagThreshold": 0}}, "eventsLagThreshold"),
        ({"remote": {"apiKeys": ["hunter2"]}}, "apiKeys"),
        ({"remote": {"apiKeys": {"value": "hunter2"}}}, "value"),
        ({"remote": {"ca": {"existingConfigMap": "Not A Name"}}}, "existingConfigMap"),
        ({"settings": {"engine": {"backend": "opanai"}}}, "backend"),
        ({"sharedMemorySizeLimit": "much"}, "sharedMemorySizeLimit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_values_are_refused_by_name(render: Render, values: dict[str, Any], named: str) -> None:
    with pytest.raises(HelmError) as refusal:
        render(values)
    assert named in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"terminationGracePeriodSeconds": 25}, "drain_timeout_s"),
        ({"settings": {"kafka": {"group_instance_id": "w"}}}, "of which there may be 8"),
        (
            {"settings": {"kafka": {"group_instance_id": "w"}}, "keda": {"enabled": False}, "replicaCount": 2},
            "of which there may be 2",
        ),
        ({"kafka": {"sasl": {"existingSecret": "kafka-user"}}}, "the password would never be used"),
        ({"kafka": {"tls": {"existingSecret": "kafka-tls"}}}, "would not be encrypted"),
        (VALUES["tls_only"] | {"kafka": {"tls": {"existingSecret": "t", "certKey": "tls.crt"}}}, "go together"),
        (
            {"settings": {"kafka": {"security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN"}}},
            "keda.authenticationRef",
        ),
        ({"model": {"existingClaim": "a", "volume": {"emptyDir": {}}}}, "exclude each other"),
        ({"keda": {"minReplicaCount": 9}}, "minReplicaCount"),
        ({"routes": ROUTES | {"existingConfigMap": "a"}}, "exclude each other"),
        ({"routes": {"files": ROUTES["files"]}}, "routes.file, which is empty"),
        ({"routes": ROUTES, "settings": {"documents": {"routes": "/routes.yaml"}}}, "leave it out"),
        (remote(None), "remote.endpoints is empty: name the servers"),
        (remote("http://a/v1", gpu={"count": 1}), "gpu.count is 1, but settings.engine.backend is openai"),
        (
            remote("http://a/v1", resources={"limits": {"nvidia.com/gpu": 1}}),
            "resources name nvidia.com/gpu, but settings.engine.backend is openai",
        ),
        (
            remote("http://a/v1", resources={"requests": {"amd.com/gpu": 1}}),
            "resources name amd.com/gpu, but settings.engine.backend is openai",
        ),
        (remote("http://a/v1", model={"existingClaim": "c"}), "reads no weights: leave it out"),
        (remote("http://user:hunter2@a/v1"), "number 1 holds a user or a password"),
        (
            {"settings": {"remote": {"proxy": "http://user:hunter2@proxy:3128"}}},
            r"settings\.remote\.proxy holds a user or a password",
        ),
        (remote("http://a/v1", remote={"ca": {"existingSecret": "ca"}}), "no endpoint .* begins with https"),
        (
            remote("https://a/v1", remote={"ca": {"existingSecret": "ca", "existingConfigMap": "ca"}}),
            "exclude each other",
        ),
        (
            {
                **remote("https://a/v1", ca_file="/ca.crt"),
                "remote": {"ca": {"existingSecret": "ca"}},
            },
            "ca_file is set by remote.ca: leave it out",
        ),
        ({"settings": {"engine": {"backend": "echo"}}, "gpu": {"count": 1}}, "settings.engine.backend is echo"),
        ({"settings": {"remote": {"endpoints": ["http://a/v1"]}}}, "settings.engine.backend is auto: nothing would be"),
        (
            {"settings": {"engine": {"backend": "native"}}, "remote": {"apiKeys": {"existingSecret": "key"}}},
            "settings.engine.backend is native: nothing would be asked",
        ),
        ({"gpu": {"count": 2}}, "computes on one"),
        (
            {"settings": {"engine": {"backend": "vllm"}, "vllm": {"tensor_parallel_size": 2}}, "gpu": {"count": 1}},
            "gpu.count is 1, but settings.vllm divides the model among 2 GPUs",
        ),
        (
            {"settings": {"vllm": {"tensor_parallel_size": 2}}, "gpu": {"count": 1}},
            "among 2 GPUs, but settings.engine.backend is auto",
        ),
        (
            remote("http://a/v1", extraEnv=[{"name": "NANOVLLM_REMOTE__API_KEYS", "value": "hunter2"}]),
            "NANOVLLM_REMOTE__API_KEYS is a secret",
        ),
        ({"extraEnv": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "hunter2"}]}, "take valueFrom.secretKeyRef"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_contradict_one_another_are_refused_with_the_reason(
    render: Render, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(HelmRenderError, match=reason) as refusal:
        render(values)
    assert "hunter2" not in str(refusal.value)


def test_vllm_gets_all_of_its_gpus_in_one_pod_or_by_ray(render: Render) -> None:
    vllm: dict[str, Any] = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}
    for count, more in ((8, {}), (4, {"distributed_executor_backend": "ray"}), (0, {})):
        settings = {"engine": {"backend": "vllm"}, "vllm": vllm | more}
        values = {"settings": settings, "gpu": {"count": count}, "keda": {"cooldownPeriod": 900}}
        limits = container_of(render(values))["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == (str(count) if count else None)


def test_a_secret_variable_from_a_secret_is_taken(render: Render) -> None:
    reference = {"secretKeyRef": {"name": "keys", "key": "one"}}
    extra = [{"name": "NANOVLLM_REMOTE__API_KEYS", "valueFrom": reference}]
    assert extra[0] in container_of(render(remote("http://a/v1", extraEnv=extra)))["env"]


def test_one_pod_may_have_a_group_instance_id(render: Render) -> None:
    instance = {"settings": {"kafka": {"group_instance_id": "w"}}, "keda": {"enabled": False}}
    assert "Deployment" in render(instance)


def test_every_backend_has_a_file_of_values_that_the_docs_name() -> None:
    backends = {values["settings"]["engine"]["backend"] for values in OF_BACKENDS.values()}
    assert backends == BACKENDS - {"auto"}
    page = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert all(
        f"| `{name}.yaml` | `{values['settings']['engine']['backend']}` |" in page
        for name, values in OF_BACKENDS.items()
    )


@every_backend
def test_a_backends_values_are_what_its_worker_takes(
    render: Render, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in render(values)["ConfigMap"]["data"].items():
        monkeypatch.setenv(name, text)
    settings = load_settings()
    if settings.engine.backend == "openai":
        (tmp_path / "ca.crt").touch()
        check_remote(
            settings.model_copy(update={"remote": settings.remote.model_copy(update={"ca_file": tmp_path / "ca.crt"})})
        )
    elif settings.engine.backend in ("native", "generic"):
        here = settings.engine.model_copy(update={"model": None})  # the checkpoint of the values is on a volume
        EngineConfig.from_options("any", engine_options(here))


@every_backend
def test_only_backends_that_load_weights_get_accelerators_volumes_of_weights_and_much_memory(
    render: Render, values: dict[str, Any]
) -> None:
    objects = render(values)
    container, names = container_of(objects), {volume["name"] for volume in pod_of(objects)["volumes"]}
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    loads = values["settings"]["engine"]["backend"] not in ("openai", "echo")
    assert ("model" in names) == loads
    assert loads or limits.keys() == {"memory"}
    assert loads or (limits["memory"] in ("512Mi", "1Gi") and requests["cpu"].endswith("m"))
    assert ("nvidia.com/gpu" in limits) == bool(values.get("gpu"))
    assert ("shared-memory" in names) == bool(values.get("sharedMemorySizeLimit"))
    # A GPU's old worker goes first, and whoever loads little starts quickly and is asked often.
    strategy = objects["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert (strategy["maxSurge"] == 0) == bool(values.get("gpu"))
    startup_s = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert startup_s >= 900 if loads else startup_s == 60


def test_the_gpu_example_runs_the_cuda_image_on_a_node_that_has_a_gpu(render: Render) -> None:
    objects = render(OF_BACKENDS["native-gpu"])
    pod, container = pod_of(objects), container_of(objects)
    assert container["image"].startswith("nanovllm-cuda:")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert any(one["key"] == "nvidia.com/gpu" for one in pod["tolerations"])
    # Dockerfile.cuda keeps Triton's cache there.
    assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_workers_in_front_of_servers_get_keys_and_ca_from_objects_and_reach_nothing_else(render: Render) -> None:
    for name, kind in (("openai-vllm", None), ("openai-hosted", "configMap"), ("openai-hosted", "secret")):
        values = json.loads(json.dumps(OF_BACKENDS[name]))
        if kind == "secret":
            values["remote"]["ca"] = {"existingSecret": "ca-bundle", "key": "bundle.pem"}
        objects = render(values)
        variables = {entry["name"]: entry for entry in container_of(objects)["env"]}
        secret = values["remote"]["apiKeys"]["existingSecret"]
        assert variables["NANOVLLM_REMOTE__API_KEYS"] == {
            "name": "NANOVLLM_REMOTE__API_KEYS",
            "valueFrom": {"secretKeyRef": {"name": secret, "key": "api-keys"}},
        }
        data = objects["ConfigMap"]["data"]
        assert json.loads(data["NANOVLLM_REMOTE__ENDPOINTS"]) == values["settings"]["remote"]["endpoints"]
        volumes = {volume["name"]: volume for volume in pod_of(objects)["volumes"]}
        assert ("NANOVLLM_REMOTE__CA_FILE" in variables) == ("remote-ca" in volumes) == (kind is not None)
        if kind is not None:
            (item,) = volumes["remote-ca"][kind]["items"]
            (mount,) = (one for one in container_of(objects)["volumeMounts"] if one["name"] == "remote-ca")
            assert variables["NANOVLLM_REMOTE__CA_FILE"]["value"] == f"{mount['mountPath']}/{item['path']}"
            assert item["key"] == values["remote"]["ca"].get("key", "ca.crt")
            assert mount["readOnly"] is True
        assert "Egress" in objects["NetworkPolicy"]["spec"]["policyTypes"]


def test_the_egress_of_the_vllm_example_reaches_its_servers() -> None:
    values = OF_BACKENDS["openai-vllm"]
    urls = [urlsplit(url) for url in values["settings"]["remote"]["endpoints"]]
    ports = {port["port"] for rule in values["networkPolicy"]["egress"] for port in rule["ports"] if "to" in rule}
    spaces = {
        one["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for rule in values["networkPolicy"]["egress"]
        for one in rule.get("to", ())
    }
    assert {url.port for url in urls} == ports
    assert {(url.hostname or "").split(".")[2] for url in urls} == spaces


def test_plain_secrets_are_refused_and_no_other_setting_is_taken_for_one() -> None:
    chart = (CHART / "templates" / "_helpers.tpl").read_text()
    (pattern,) = re.findall(r'regexMatch "([^"]*)" \(upper \.name\)', chart)
    secret = re.compile(pattern)
    taken, secrets = set(), {"AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
    for section, info in Settings.model_fields.items():
        for field, inner in getattr(info.annotation, "model_fields", {}).items():
            name = f"{ENV_PREFIX}{section}__{field}".upper()
            taken |= {name} if secret.search(name) else set()
            secrets |= {name} if "SecretStr" in str(inner.annotation) else set()
    assert taken | {"AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"} == secrets


@every_value_set
def test_secret_values_stand_nowhere(render: Render, values: dict[str, Any]) -> None:
    objects = render(values)
    assert "Secret" not in objects
    secret_fields = {"NANOVLLM_KAFKA__SASL_PASSWORD", "NANOVLLM_KAFKA__SSL_KEY_PASSWORD"}
    secret_fields |= {"NANOVLLM_REMOTE__API_KEYS", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
    assert not secret_fields & objects["ConfigMap"]["data"].keys()
    for entry in container_of(objects)["env"]:
        if entry["name"] in secret_fields:
            assert "secretKeyRef" in entry["valueFrom"]


@every_value_set
def test_the_pod_is_confined(render: Render, values: dict[str, Any]) -> None:
    objects = render(values)
    pod, container = pod_of(objects), container_of(objects)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert "readOnly" not in mounts["/tmp"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_probes_and_metrics_meet_at_the_workers_port(render: Render) -> None:
    objects = render({"settings": {"http": {"port": 9999}}, "metrics": {"service": {"enabled": True}}})
    container = container_of(objects)
    assert container["ports"] == [{"name": "http", "containerPort": 9999, "protocol": "TCP"}]
    assert objects["ConfigMap"]["data"]["NANOVLLM_HTTP__PORT"] == "9999"
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    asked = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {
        "startupProbe": {"path": "/startupz", "port": "http"},
        "livenessProbe": {"path": "/healthz", "port": "http"},
        "readinessProbe": {"path": "/readyz", "port": "http"},
    }


def test_a_pod_may_drain_before_it_is_killed(render: Render) -> None:
    values = {"settings": {"admission": {"drain_timeout_s": 40.5}}}
    assert pod_of(render(values))["terminationGracePeriodSeconds"] == 71


def test_a_changed_setting_brings_new_pods_and_an_equal_one_does_not(render: Render) -> None:
    def checksum(values: dict[str, Any]) -> str:
        return render(values)["Deployment"]["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    assert checksum({}) == checksum({"keda": {"maxReplicaCount": 2}})
    assert checksum({}) != checksum({"settings": {"engine": {"max_num_seqs": 8}}})


def test_the_worker_finds_the_routes_and_the_files_that_they_name(render: Render, tmp_path: Path) -> None:
    objects = render(VALUES["routes"])
    (mount,) = (one for one in container_of(objects)["volumeMounts"] if one["name"] == "routes")
    (volume,) = (one for one in pod_of(objects)["volumes"] if one["name"] == "routes")
    assert mount["readOnly"] is True
    assert volume["configMap"]["name"] == objects["RoutesConfigMap"]["metadata"]["name"]
    environment = {one["name"]: one.get("value") for one in container_of(objects)["env"]}
    file = Path(environment["NANOVLLM_DOCUMENTS__ROUTES"])
    assert str(file.parent) == mount["mountPath"]
    for name, text in objects["RoutesConfigMap"]["data"].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    mounted, ours = load_routes(tmp_path / file.name), load_routes(EXAMPLES / "routes.yaml")
    assert [(one.line, one.route.digest) for one in mounted.entries] == [
        (one.line, one.route.digest) for one in ours.entries
    ]


def test_routes_are_given_as_files_on_the_command_line() -> None:
    schema = rf"routes.files.receipt\.schema\.json={EXAMPLES / 'receipt.schema.json'}"
    assert parse_set_file(f"routes.file={EXAMPLES / 'routes.yaml'},{schema}") == {"routes": ROUTES}


def test_routes_made_elsewhere_are_mounted_as_they_are(render: Render) -> None:
    objects = render(VALUES["routes_elsewhere"])
    assert "RoutesConfigMap" not in objects
    assert {"name": "routes", "configMap": {"name": "receipts.routes"}} in pod_of(objects)["volumes"]


def test_changed_routes_bring_new_pods_and_other_values_do_not(render: Render) -> None:
    def checksum(**changes: Any) -> str:
        values = {"routes": ROUTES, **changes}
        return render(values)["Deployment"]["spec"]["template"]["metadata"]["annotations"]["checksum/routes"]

    assert checksum() == checksum(keda={"maxReplicaCount": 2})
    assert checksum() != checksum(routes=ROUTES | {"file": f"{ROUTES['file']}# more"})
    assert checksum() != checksum(routes=ROUTES | {"files": {"receipt.schema.json": "{}"}})
    assert "checksum/routes" not in render({})["Deployment"]["spec"]["template"]["metadata"]["annotations"]


def test_keda_alone_decides_how_many_workers_there_are(render: Render) -> None:
    assert "replicas" not in render({})["Deployment"]["spec"]
    without = render(VALUES["no_keda"])
    assert without["Deployment"]["spec"]["replicas"] == 3
    assert not KEDA_KINDS & without.keys()


def test_keda_watches_what_the_workers_consume(render: Render) -> None:
    values = {
        "settings": {
            "kafka": {"bootstrap_servers": "k.example:9092", "group_id": "readers", "auto_offset_reset": "latest"},
            "topics": {"jobs": "scans"},
        },
        "keda": {"lagThreshold": 5_000_000},
    }
    (trigger,) = render(values)["ScaledObject"]["spec"]["triggers"]
    watched = {"bootstrapServers": "k.example:9092", "consumerGroup": "readers", "topic": "scans"}
    watched |= {"offsetResetPolicy": "latest", "lagThreshold": "5000000", "tls": "disable"}
    assert watched.items() <= trigger["metadata"].items()
    assert "authenticationRef" not in trigger


def test_keda_watches_every_lane_and_every_retry_topic(render: Render) -> None:
    values = {"settings": {"topics": {"jobs": "scans", "lanes": {"urgent": -10}}, "retries": {"delays_s": [60, 600]}}}
    triggers = render(values)["ScaledObject"]["spec"]["triggers"]
    watched = {trigger["metadata"]["topic"] for trigger in triggers}
    assert watched == set(RetryTopics.of(Settings.model_validate(values["settings"])).lanes)
    assert len({trigger["name"] for trigger in triggers}) == len(triggers) == 6


@pytest.mark.parametrize("name", ["routes", "routes_elsewhere", "routes_in_a_volume"])
def test_keda_watches_events_where_the_workers_read_them(render: Render, name: str) -> None:
    objects = render(VALUES[name])
    settings = Settings.model_validate({"documents": {"routes": "routes.yaml"}, **VALUES[name].get("settings", {})})
    triggers = objects["ScaledObject"]["spec"]["triggers"]
    thresholds = {one["metadata"]["topic"]: int(one["metadata"]["lagThreshold"]) for one in triggers}
    assert thresholds.keys() == RetryTopics.of(settings).lanes.keys()
    of_events = 5 if name == "routes" else 100
    assert {topic: of_events if topic.startswith("nanovllm.events") else 100 for topic in thresholds} == thresholds
    assert not any("events" in one["metadata"]["topic"] for one in render({})["ScaledObject"]["spec"]["triggers"])


def test_keda_logs_in_with_the_workers_own_secret(render: Render) -> None:
    objects = render(VALUES["scram_tls"])
    (trigger,) = objects["ScaledObject"]["spec"]["triggers"]
    assert trigger["metadata"]["sasl"] == "scram_sha512"
    assert trigger["metadata"]["tls"] == "enable"
    assert trigger["authenticationRef"] == {"name": "demo-nanovllm"}
    taken = {
        one["parameter"]: (one["name"], one["key"])
        for one in objects["TriggerAuthentication"]["spec"]["secretTargetRef"]
    }
    assert taken == {
        "username": ("kafka-user", "username"),
        "password": ("kafka-user", "password"),
        "ca": ("kafka-tls", "ca.crt"),
        "cert": ("kafka-tls", "tls.crt"),
        "key": ("kafka-tls", "tls.key"),
        "keyPassword": ("kafka-tls", "tls.password"),
    }


def test_an_authentication_made_elsewhere_is_used_as_it_is(render: Render) -> None:
    reference = {"name": "msk", "kind": "ClusterTriggerAuthentication"}
    objects = render(VALUES["scram_tls"] | {"keda": {"authenticationRef": reference}})
    (trigger,) = objects["ScaledObject"]["spec"]["triggers"]
    assert trigger["authenticationRef"] == reference
    assert "TriggerAuthentication" not in objects


def test_the_examples_bridge_has_settings_and_logins_of_the_examples_workers(chart_path: Path, render: Render) -> None:
    account, bridge = yaml.safe_load_all((EXAMPLES / "bridge.yaml").read_text(encoding="utf-8"))
    for one in (account, bridge):
        for version in ("1.27", "1.35"):
            kubernetes_validate.validate(one, version, strict=True)
    texts = Chart.load(chart_path).render(VALUES["example"], name="nanovllm", namespace="vision")
    settings = yaml.safe_load(texts["nanovllm/templates/configmap.yaml"])["metadata"]["name"]
    container, worker = container_of({"Deployment": bridge}), container_of(render(VALUES["example"]))
    assert container["envFrom"] == [{"configMapRef": {"name": settings}}]
    kafka = [one for one in worker["env"] if one["name"].startswith("NANOVLLM_KAFKA__")]
    assert container["env"] == kafka
    assert container["securityContext"] == worker["securityContext"]
    assert container["image"] == worker["image"]
    assert [one["secret"]["secretName"] for one in pod_of({"Deployment": bridge})["volumes"] if "secret" in one] == [
        VALUES["example"]["kafka"]["tls"]["existingSecret"]
    ]


def test_limits_carry_memory_and_accelerators(render: Render) -> None:
    assert container_of(render(VALUES["gpu"]))["resources"]["limits"] == {"memory": "4Gi", "nvidia.com/gpu": "1"}
    assert "nvidia.com/gpu" not in container_of(render({}))["resources"]["limits"]


def test_the_engine_takes_no_more_threads_than_the_pod_has_cores(render: Render) -> None:
    def names(values: dict[str, Any]) -> set[str]:
        return {entry["name"] for entry in container_of(render(values))["env"]}

    assert "OMP_NUM_THREADS" in names({})
    assert "OMP_NUM_THREADS" not in names({"resources": {"requests": {"cpu": None}}})


def test_the_notes_name_what_is_still_to_do(chart_path: Path) -> None:
    def notes(values: dict[str, Any]) -> str:
        return Chart.load(chart_path).render(values, name="demo", namespace="ns")["nanovllm/templates/NOTES.txt"]

    assert "settings.s3.allow" in notes({})
    assert "settings.s3.allow" not in notes(VALUES["gpu"])
    assert "keda.enabled is false" in notes(VALUES["no_keda"])
    assert "Events" not in notes({})
    assert "Servers  http://vllm-0.vllm.serving.svc.cluster.local:8000/v1, " in notes(OF_BACKENDS["openai-vllm"])
    assert "settings.engine.model" in notes({})
    assert "settings.engine.model" not in notes(remote("http://a/v1"))
    assert "answer with the prompt" in notes(OF_BACKENDS["echo"])
    assert "nanovllm.events, by the routes of demo-nanovllm-routes" in notes(VALUES["routes"])


def test_the_chart_is_the_packages_version(chart_path: Path) -> None:
    chart = yaml.safe_load((chart_path / "Chart.yaml").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]


def test_every_value_has_a_place_in_the_schema(chart_path: Path) -> None:
    values = yaml.safe_load((chart_path / "values.yaml").read_text())
    schema = json.loads((chart_path / "values.schema.json").read_text())
    assert values.keys() == schema["properties"].keys() - {"global"}
