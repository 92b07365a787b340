"""What describes a cluster is what Ray, KubeRay and this project's own files say it must be."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deploy.serve import APPLICATION, Settings, build_app

ROOT = Path(__file__).parents[2]
CRDS = ROOT.parent / "shared" / "crds"
KINDS = {"cluster": "rayclusters", "job": "rayjobs", "service": "rayservices"}
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
VERSION = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
IMAGE = f"YOUR_REGISTRY/ray-unlearn:{VERSION}"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "kuberay" / f"{name}.yaml").read_text())


def cluster_spec(name: str) -> dict[str, Any]:
    """The part of a manifest that describes the Ray cluster."""
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown keys, where Kubernetes would silently drop them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if (
        isinstance(schema.get("properties"), dict)
        and "x-kubernetes-preserve-unknown-fields" not in schema
    ):
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_aws_cluster_keeps_rays_schema(aws: dict[str, Any]) -> None:
    filled = prepare_config(aws)  # with Ray's defaults for AWS, as `ray up` does
    validate_config(filled)
    with pytest.raises(jsonschema.ValidationError, match="max_wrokers"):
        validate_config({**filled, "max_wrokers": 1})


def test_the_aws_cluster_has_a_cpu_head_and_gpu_workers_on_spot_from_none(
    aws: dict[str, Any],
) -> None:
    head, gpu = (aws["available_node_types"][name] for name in ("head", "gpu"))
    assert aws["head_node_type"] == "head"
    assert head["node_config"]["InstanceType"].startswith("m")
    assert gpu["node_config"]["InstanceType"].startswith(("p", "g"))
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (gpu["min_workers"], gpu["max_workers"], aws["max_workers"]) == (0, 4, 4)
    assert aws["docker"]["image"] == IMAGE


def test_the_aws_cluster_is_behind_a_token_and_open_to_one_address(aws: dict[str, Any]) -> None:
    (token,) = aws["file_mounts"]
    starts = [
        command
        for key in ("head", "worker")
        for command in aws[f"{key}_start_ray_commands"]
        if " start" in command
    ]
    assert len(starts) == 2
    for start in starts:
        assert start.startswith(f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token} ray start ")
    assert "--dashboard-host=127.0.0.1" in starts[0]
    (rule,) = aws["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(entry["CidrIp"].endswith("/32") for entry in rule["IpRanges"])


@pytest.mark.parametrize("name", KINDS)
def test_a_manifest_keeps_kuberays_schema(name: str) -> None:
    path = CRDS / f"ray.io_{KINDS[name]}.yaml"
    if not path.exists():
        pytest.skip(
            f"KubeRay's CRDs are not at {CRDS.relative_to(ROOT.parent)}, beside the project"
        )
    crd = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = (
        one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"] if one["name"] == "v1"
    )
    validator = jsonschema.Draft7Validator(strict(schema))
    content = manifest(name)
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", crd["spec"]["names"]["kind"])
    content["metadata"] = {}  # the schema leaves it to Kubernetes
    assert [error.message for error in validator.iter_errors(content)] == []
    content["spec"]["headGroupSpek"] = {}
    assert len(list(validator.iter_errors(content))) == 1


@pytest.mark.parametrize("name", KINDS)
def test_a_kuberay_cluster_has_pins_token_gpus_and_no_rights_it_does_not_need(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    (workers,) = spec["workerGroupSpecs"]
    assert workers["minReplicas"] == (1 if name == "service" else 0)
    pods = [spec["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not [entry for entry in container.get("env", ()) if "value" in entry], (
            "secrets come from a Secret"
        )
    gpus = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0) for pod in pods]
    assert gpus == [0, 1 if name == "service" else 8]


def test_the_ray_job_runs_our_command_and_cleans_up() -> None:
    spec = manifest("job")["spec"]
    assert spec["entrypoint"].startswith("ray-unlearn run /mnt/shared/")
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["shutdownAfterJobFinishes"] is True


def test_the_ray_service_serves_our_application() -> None:
    config = ServeDeploySchema.model_validate(
        yaml.safe_load(manifest("service")["spec"]["serveConfigV2"])
    )
    (application,) = config.applications
    assert application.name == APPLICATION
    assert application.import_path == f"{build_app.__module__}:{build_app.__name__}"
    assert Settings(**application.args).gpus == 1


def test_only_nodes_the_operator_and_labelled_clients_reach_a_kuberay_cluster() -> None:
    spec = manifest("network-policy")["spec"]
    nodes = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert (spec["podSelector"], spec["policyTypes"]) == (nodes, ["Ingress"])
    within, outside = spec["ingress"]
    assert within["from"] == [{"podSelector": nodes}]
    assert all("podSelector" in peer for peer in outside["from"])
    assert {port["port"] for port in outside["ports"]} == {8265, 8000}


def test_the_image_is_of_the_pinned_ray_and_installs_from_the_constraints() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    assert f"FROM rayproject/ray:{PINS['ray']}-py311-gpu" in lines
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[2:-1]), line
    (install,) = [line for line in lines if line.startswith("RUN")]
    assert all("--constraint constraints.txt" in part for part in install.split("&&"))
