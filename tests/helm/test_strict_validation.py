"""Every object of every file of values, before a real API server that refuses unknown fields (a dry run)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from control_plane import wait_for
from kubernetes import client
from kubernetes.client import ApiException
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import ResourceNotFoundError

from tests.helm.test_chart import VALUE_FILES, VALUES

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(280)]

CRDS = Path(__file__).with_name("operator_crds.yaml")
NAMESPACE = "strict-validation"
STRICTLY = {"dryRun": "All", "fieldValidation": "Strict"}
Create = Callable[[dict[str, Any]], Any]


def define(crds: client.ApiextensionsV1Api, document: dict[str, Any]) -> None:
    """Create a definition, or put it in the place of one that another test has made."""
    try:
        crds.create_custom_resource_definition(document)
    except ApiException as error:
        if error.status != 409:
            raise
        found = crds.read_custom_resource_definition(document["metadata"]["name"])
        metadata = document["metadata"] | {"resourceVersion": found.metadata.resource_version}
        crds.replace_custom_resource_definition(document["metadata"]["name"], document | {"metadata": metadata})


@pytest.fixture(scope="module")
def create(api: client.ApiClient) -> Create:
    """Have the API server look at an object as if it were created; raises ApiException where it refuses."""
    definitions = list(yaml.safe_load_all(CRDS.read_text(encoding="utf-8")))
    for document in definitions:
        define(client.ApiextensionsV1Api(api), document)
    client.CoreV1Api(api).create_namespace({"metadata": {"name": NAMESPACE}})
    dynamic = DynamicClient(api)

    def dry_run(document: dict[str, Any]) -> Any:
        kind = dynamic.resources.get(api_version=document["apiVersion"], kind=document["kind"])
        # Where no other test has put one of the same name.
        place = {"namespace": NAMESPACE} if kind.namespaced else {}
        body = document | {"metadata": document["metadata"] | place}
        return kind.create(body=body, query_params=list(STRICTLY.items()), **place)

    def is_strict(definition: dict[str, Any]) -> bool:
        spec = definition["spec"]
        version = f"{spec['group']}/{spec['versions'][0]['name']}"
        wrong = {"apiVersion": version, "kind": spec["names"]["kind"], "metadata": {"name": "a"}}
        try:
            dry_run(wrong | {"spec": {"unknown": 1}})
        except (ApiException, ResourceNotFoundError) as error:
            return "unknown field" in str(error)
        return False

    for document in definitions:
        wait_for(lambda document=document: is_strict(document), f"{document['metadata']['name']} is not in force")
    return dry_run


@pytest.mark.parametrize("name", [*VALUES, *VALUE_FILES])
def test_the_api_server_takes_every_object_as_it_is(create: Create, render: Any, name: str) -> None:
    for what, document in render((VALUES | VALUE_FILES)[name]).items():
        if document["kind"] == "Pod":
            # A pod is taken where its account exists, which a dry run makes none of.
            document["spec"]["serviceAccountName"] = "default"
        try:
            created = create(document).to_dict()
        except ApiException as error:
            pytest.fail(f"{what}: {json.loads(error.body)['message']}")
        assert is_within(document.get("spec", {}), created.get("spec", {})), f"{what} lost something"


def test_kinds_of_all_operators_are_among_them(render: Any) -> None:
    kinds = {one["kind"] for values in (VALUES | VALUE_FILES).values() for one in render(values).values()}
    assert {"ScaledObject", "TriggerAuthentication", "KafkaTopic", "PodMonitor", "PrometheusRule"} <= kinds
    assert {"Deployment", "Pod", "ConfigMap", "ServiceAccount", "Service", "NetworkPolicy"} <= kinds
    assert "PodDisruptionBudget" in kinds
    assert "Secret" not in kinds


@pytest.mark.parametrize(
    ("kind", "path", "says"),
    [
        ("Deployment", ("spec", "template", "spec", "enableServiceLink"), 'unknown field "spec.template.spec.enableS'),
        ("ScaledObject", ("spec", "coolDownPeriod"), 'unknown field "spec.coolDownPeriod"'),
        ("PodMonitor", ("spec", "podMetricEndpoints"), 'unknown field "spec.podMetricEndpoints"'),
        ("KafkaTopic nanovllm.jobs", ("spec", "partition"), 'unknown field "spec.partition"'),
    ],
)
def test_a_field_that_does_not_exist_would_be_refused(
    create: Create, render: Any, kind: str, path: tuple[str, ...], says: str
) -> None:
    values = VALUE_FILES["strimzi"] | VALUE_FILES["monitoring"]
    document = json.loads(json.dumps(render(values)[kind]))
    place = document
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = 1
    with pytest.raises(ApiException) as refusal:
        create(document)
    assert says in json.loads(refusal.value.body)["message"]


def is_within(asked: Any, created: Any) -> bool:
    """Whether ``created`` has all of ``asked``; the server may add defaults, and write numbers in its own form."""
    if isinstance(asked, dict):
        # Empty maps and lists are left out.
        return all(is_within(value, created.get(name)) for name, value in asked.items() if value not in ({}, [], None))
    if isinstance(asked, list):
        return len(asked) == len(created) and all(map(is_within, asked, created))
    return asked == created or str(asked) == str(created)
