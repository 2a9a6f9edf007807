"""docker-compose.yml and docker/Dockerfile, as far as they can be held to account without Docker."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from forge.tuning.config.settings import VARIABLES

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVER, WORKER = COMPOSE["services"]["mlflow"], COMPOSE["services"]["worker"]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def targets(service):
    """Mount points by source."""
    return {source: target for source, target, *_ in (volume.split(":") for volume in service["volumes"])}


def flags(command):
    return dict(part.split("=", 1) for part in command if part.startswith("--"))


def test_the_server_takes_all_flags():
    pytest.importorskip("mlflow.server")
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "server", "--help"], capture_output=True, check=False, text=True
    )
    known = set(re.findall(r"--[a-z][a-z\-]+", done.stdout))
    assert SERVER["command"][:2] == ["mlflow", "server"]
    assert flags(SERVER["command"]).keys() <= known


def test_the_server_is_the_one_that_the_tests_run():
    pytest.importorskip("mlflow.server")
    assert SERVER["image"] == f"ghcr.io/mlflow/mlflow:v{version('mlflow')}"


def test_what_the_server_keeps_is_on_its_volume_and_its_port_on_loopback():
    given, (mounted,) = flags(SERVER["command"]), targets(SERVER).values()
    assert given["--backend-store-uri"].removeprefix("sqlite:///").startswith(f"{mounted}/")
    assert given["--artifacts-destination"].startswith(f"{mounted}/")
    (port,) = SERVER["ports"]
    assert port.startswith("${MLFLOW_BIND:-127.0.0.1}:")
    assert port.endswith(f":{given['--port']}")
    assert f"127.0.0.1:{given['--port']}/health" in SERVER["healthcheck"]["test"][-1]


def test_the_worker_finds_the_server_and_the_server_lets_it_in():
    security = pytest.importorskip("mlflow.server.security_utils")
    given = flags(SERVER["command"])
    default = WORKER["environment"]["MLFLOW_TRACKING_URI"]
    assert default == f"${{MLFLOW_TRACKING_URI:-http://mlflow:{given['--port']}}}"
    allowed = given["--allowed-hosts"].split(",")
    for host in ("mlflow:5000", "localhost:5000", "127.0.0.1:5001"):
        assert security.is_allowed_host_header(allowed, host)
    assert not security.is_allowed_host_header(allowed, "elsewhere.example.org")


def test_the_worker_has_every_variable_that_the_config_reads():
    assert {name for name in WORKER["environment"] if name.startswith(("LORA_", "MLFLOW_"))} == set(VARIABLES)


def test_no_secret_has_a_value_in_the_file():
    from forge.tuning.tracking.private import is_secret

    secrets = {name for name in WORKER["environment"] if is_secret(name)}
    assert secrets >= {"HF_TOKEN", "OPENAI_API_KEY", "GIGACHAT_CREDENTIALS"}
    assert all(WORKER["environment"][name] is None for name in secrets)


def test_every_named_volume_is_declared_and_every_path_of_the_command_mounted():
    named = {source for service in (SERVER, WORKER) for source in targets(service) if not source.startswith(".")}
    assert named == set(COMPOSE["volumes"])
    mounted = tuple(f"{target}/" for target in targets(WORKER).values())
    assert all(path.startswith(mounted) for path in flags(WORKER["command"]).values())
    assert re.search(r"HF_HOME=(\S+)", DOCKERFILE)[1] in targets(WORKER).values()


def test_the_command_is_one_that_the_example_takes():
    program, *_ = [part for part in WORKER["command"] if part.endswith(".py")]
    done = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert all(flag in done.stdout for flag in flags(WORKER["command"]))


def test_the_image_is_built_from_what_is_there():
    assert (ROOT / WORKER["build"]["dockerfile"]).is_file()
    copied = [path for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()]
    assert all((ROOT / path).exists() for path in copied)
    assert '".[mlflow' in DOCKERFILE
    assert WORKER["image"].endswith(f":{version('transformers-forge')}")


def test_the_worker_has_a_gpu():
    (device,) = WORKER["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
