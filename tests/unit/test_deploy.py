"""The files of the cluster launcher and of KubeRay: valid, and safe.

``cluster.yaml`` is held against the schema that Ray itself uses. KubeRay's own definitions are a megabyte and not at
hand: what is written down here of them are the fields that the manifests use, with their types, as read in
``raycluster_types.go`` and ``rayjob_types.go`` of KubeRay 1.7 and in the reference of Kubernetes' core/v1.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hncse_ray.config import load_settings

ROOT = Path(__file__).parents[2]
MANIFESTS = ("raycluster.yaml", "rayjob.yaml")


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield str(key)
            yield from leaves(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from leaves(value)
    else:
        yield str(tree)


# -- the cluster launcher --


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    """What `ray up` makes of the file before it asks the cloud for anything."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(read("cluster.yaml"))


def test_ray_accepts_the_cluster_file(launcher: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(launcher)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(launcher | {"max_worker": 3})


def test_the_head_does_no_work_and_stays(launcher: dict[str, Any]) -> None:
    head = launcher["available_node_types"][launcher["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


@pytest.mark.parametrize("role", ["trainer", "pool"])
def test_spot_comes_first_and_falls_back_to_the_same_on_demand(launcher: dict[str, Any], role: str) -> None:
    spot, on_demand = (launcher["available_node_types"][f"{role}_{market}"] for market in ("spot", "on_demand"))
    assert spot["labels"]["hncse-role"] == on_demand["labels"]["hncse-role"] == role
    assert spot["resources"] == on_demand["resources"] and spot["resources"]["GPU"] == 1
    assert spot["priority"] > on_demand["priority"]
    config = dict(spot["node_config"])
    assert config.pop("InstanceMarketOptions") == {"MarketType": "spot"} and config == on_demand["node_config"]
    assert spot["min_workers"] == on_demand["min_workers"] == 0  # an idle cluster is a head
    assert launcher["idle_timeout_minutes"] <= 15 and 0 < launcher["max_workers"] <= 16


def test_every_ray_start_has_a_token_and_the_dashboard_is_on_the_loopback(launcher: dict[str, Any]) -> None:
    starts = [
        command
        for commands in (launcher["head_start_ray_commands"], launcher["worker_start_ray_commands"])
        for command in commands
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        words = shlex.split(command)
        assert words.index("RAY_AUTH_MODE=token") < words.index("start")
        path = next(w for w in words if w.startswith("RAY_AUTH_TOKEN_PATH=")).partition("=")[2]
        assert str(Path(path).parent) in launcher["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in shlex.split(starts[0])
    assert "0.0.0.0" not in " ".join(leaves(read("cluster.yaml")))
    assert launcher["provider"]["security_group"]["GroupName"]  # the launcher's own opens port 22 to the world


def test_the_launcher_installs_what_the_package_needs_in_the_tested_versions(launcher: dict[str, Any]) -> None:
    installs = [
        shlex.split(command)
        for kind in ("head_setup_commands", "worker_setup_commands")
        for command in launcher[kind]
        if "pip install" in command
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[\[<>=~]", name)[0] for name in project["dependencies"]} - {"ray", "torch"}
    named = {re.split("==", word)[0] for words in installs for word in words}
    assert needed <= named, needed - named
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for words in installs:
        pinned = [word for word in words if "==" in word]
        assert pinned or "-c" in words, words
        for name, version in (word.split("==") for word in pinned):
            assert constraints.get(name, version) == version
    ray = constraints["ray"]
    assert launcher["docker"]["head_image"] == f"rayproject/ray:{ray}-py311-cpu"
    assert launcher["docker"]["worker_image"] == f"rayproject/ray:{ray}-py311-gpu"


# -- KubeRay --

STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": STRING}


def fields(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def several(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}}
RESOURCES = fields(requests=QUANTITIES, limits=QUANTITIES)
SECURITY = fields(
    allowPrivilegeEscalation=BOOLEAN,
    capabilities=fields(drop=several(STRING)),
    seccompProfile=fields("type", type={"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}),
)
CONTAINER = fields(
    "name image",
    name=STRING,
    image=STRING,
    securityContext=SECURITY,
    env=several(fields("name", name=STRING, value=STRING)),
    ports=several(fields("containerPort", containerPort=INTEGER, name={"type": "string", "maxLength": 15})),
    resources=RESOURCES,
    volumeMounts=several(fields("name mountPath", name=STRING, mountPath=STRING)),
)
POD = fields(
    "containers",
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    automountServiceAccountToken=BOOLEAN,
    terminationGracePeriodSeconds=INTEGER,
    nodeSelector=STRINGS,
    tolerations=several(
        fields(key=STRING, operator={"enum": ["Exists", "Equal"]}, effect={"enum": ["NoSchedule", "NoExecute"]})
    ),
    securityContext=fields(runAsNonRoot=BOOLEAN, runAsUser=INTEGER, fsGroup=INTEGER),
    containers=several(CONTAINER),
    volumes=several(fields("name", name=STRING, persistentVolumeClaim=fields("claimName", claimName=STRING))),
)
GROUP = {"resources": STRINGS, "labels": STRINGS, "rayStartParams": STRINGS, "template": fields("spec", spec=POD)}
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=STRING,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=STRING),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=INTEGER,
        resources=RESOURCES,
        securityContext=SECURITY,
    ),
    headGroupSpec=fields("template", serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, **GROUP),
    workerGroupSpecs=several(
        fields(
            "groupName minReplicas maxReplicas template",
            groupName=STRING,
            replicas=INTEGER,
            minReplicas=INTEGER,
            maxReplicas=INTEGER,
            priority=INTEGER,
            **GROUP,
        )
    ),
)
JOB = fields(
    "entrypoint rayClusterSpec",
    entrypoint=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    backoffLimit=INTEGER,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=INTEGER,
    rayClusterSpec=CLUSTER,
)


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    name = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
    return fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=fields("name", name=name),
        spec=spec,
    )


def cluster_of(name: str) -> dict[str, Any]:
    spec = read(f"deploy/kuberay/{name}")["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> dict[str, dict[str, Any]]:
    cluster = cluster_of(name)
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]} | {"head": cluster["headGroupSpec"]}
    return {group: spec["template"]["spec"] for group, spec in groups.items()}


@pytest.mark.parametrize(
    ("name", "schema"), [("raycluster.yaml", resource("RayCluster", CLUSTER)), ("rayjob.yaml", resource("RayJob", JOB))]
)
def test_manifests_use_fields_that_there_are(name: str, schema: dict[str, Any]) -> None:
    manifest = read(f"deploy/kuberay/{name}")
    jsonschema.validate(manifest, schema)
    manifest["spec"]["entrypiont"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="entrypiont"):
        jsonschema.validate(manifest, schema)


def test_the_cluster_of_a_job_is_that_which_stays() -> None:
    assert cluster_of("rayjob.yaml") == cluster_of("raycluster.yaml")


def test_the_shape_is_that_of_the_launcher() -> None:
    cluster = cluster_of("raycluster.yaml")
    head, (trainer, pool) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["resources"] == {"CPU": "0"} and head["rayStartParams"] == {"num-cpus": "0"}
    for group, role in ((trainer, "trainer"), (pool, "pool")):
        assert group["labels"] == {"hncse-role": role} == group["template"]["spec"]["nodeSelector"]
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == "1"
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    constraints = (ROOT / "constraints.txt").read_text().split()
    assert f"ray=={cluster['rayVersion']}" in constraints
    assert f"rayproject/ray:{cluster['rayVersion']}-py311-gpu" in (ROOT / "deploy" / "Dockerfile").read_text()


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_authenticated_and_have_no_more_rights_than_they_need(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "hncse-token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group, pod in pods(name).items():
        assert pod["securityContext"]["runAsNonRoot"], group
        assert pod["restartPolicy"] == "Never"  # Ray's autoscaler replaces pods; a restarted one is another node
        assert pod.get("automountServiceAccountToken") is False or group == "head"  # the autoscaler is in the head's
        (container,) = pod["containers"]
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False and security["capabilities"] == {"drop": ["ALL"]}
        assert not container["image"].endswith(":latest") and ":" in container["image"]
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_only_ray_and_its_operator_reach_the_pods() -> None:
    claim, policy = yaml.safe_load_all((ROOT / "deploy/kuberay/common.yaml").read_text(encoding="utf-8"))
    claimed = pods("rayjob.yaml")["trainer"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim["metadata"]["name"] == claimed and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    ours = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert policy["spec"]["podSelector"] == ours and policy["spec"]["policyTypes"] == ["Ingress"]
    everything = [rule for rule in policy["spec"]["ingress"] if "ports" not in rule]
    assert everything == [{"from": [{"podSelector": ours}]}]
    assert [rule["ports"] for rule in policy["spec"]["ingress"] if "ports" in rule] == [
        [{"protocol": "TCP", "port": 8265}]
    ]


def test_the_command_of_the_job_is_one_that_there_is() -> None:
    words = shlex.split(read("deploy/kuberay/rayjob.yaml")["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "hncse_ray.cli", "train"]
    settings = load_settings(words[4], words[5:])
    assert settings.cluster.trainer_labels == {"hncse-role": "trainer"}
    assert settings.cluster.pool_labels == {"hncse-role": "pool"}
    assert settings.run.storage_path.startswith("/storage/")


# -- all of them --


@pytest.mark.parametrize("path", ["cluster.yaml", "deploy/Dockerfile", *(f"deploy/kuberay/{n}" for n in MANIFESTS)])
def test_no_file_has_a_secret(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert not re.search(r"RAY_AUTH_TOKEN\b|AKIA|BEGIN [A-Z ]*PRIVATE KEY|[0-9a-f]{32}|password", text, re.IGNORECASE)
