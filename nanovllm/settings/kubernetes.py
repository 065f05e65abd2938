"""Settings of a worker that runs as a pod of Kubernetes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from nanovllm.settings.base import Seconds, SettingsModel


class KubernetesSettings(SettingsModel):
    """What a pod tells Kubernetes of itself."""

    pod_deletion_cost: bool = Field(
        False,
        description="Keep the pod's annotation `controller.kubernetes.io/pod-deletion-cost`: 0 while no job is at "
        "work, and one more each time that their number doubles. When workers are taken away, the idle one goes first. "
        "Needs a token that may patch `pods/status`; without one the worker logs it and works on.",
    )
    pod_deletion_cost_every_s: Seconds = Field(10.0, description="Least seconds between two changes of the annotation.")
    pod_name: str | None = Field(None, min_length=1, description="Name of the pod; unset: the host's name.")
    service_account_folder: Path = Field(
        Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        description="Folder with `token`, `ca.crt` and `namespace` of the pod's ServiceAccount. The address of the API "
        "server is in `KUBERNETES_SERVICE_HOST` and `KUBERNETES_SERVICE_PORT`, which Kubernetes sets.",
    )
