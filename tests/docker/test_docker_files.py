"""What can be said of docker/ without an engine."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_file import FOLDER, interpolate, is_pinned, parse, problems, read_env, volume_source
from docker_file import copied, environment, instructions, last_stage
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightning_moe.sweep.configuration import check_space
from lightning_moe.sweep.spec import read_sweep

ROOT = FOLDER.parent
DOCKERFILE = FOLDER / "Dockerfile"
COMPOSE = (FOLDER / "compose.yaml").read_text()
EXAMPLE = read_env((FOLDER / ".env.example").read_text())


def test_hadolint() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_is_pinned_small_and_not_roots() -> None:
    found = instructions(DOCKERFILE)
    assert all(is_pinned(rest.split()[0]) for name, rest in found if name == "FROM")
    assert not [rest for name, rest in found if name == "ADD"]
    installs = [rest for name, rest in found if name == "RUN" and "apt-get install" in rest]
    assert installs
    assert all(rest.endswith("&& rm -rf /var/lib/apt/lists/*") for rest in installs)
    first_pip = next(index for index, (name, rest) in enumerate(found) if name == "RUN" and "pip install" in rest)
    assert any("PIP_NO_CACHE_DIR=1" in rest for name, rest in found[:first_pip] if name == "ENV")
    assert not [rest for name, rest in last_stage(DOCKERFILE) if "pip install" in rest]
    users = [rest for name, rest in last_stage(DOCKERFILE) if name == "USER"]
    assert users
    assert re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1])
    assert {"title", "licenses", "revision"} <= set(re.findall(r"org\.opencontainers\.image\.(\w+)=", str(found)))


def test_what_is_copied_exists_and_nothing_else_reaches_the_build() -> None:
    patterns = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    ignore, *rest = [line for line in patterns if line and not line.startswith("#")]
    let_in = [line.removeprefix("!") for line in rest if line.startswith("!")]
    assert ignore == "*"
    assert sorted(copied(DOCKERFILE)) == sorted(let_in)
    assert all((ROOT / source).exists() for source in let_in)
    tracked = subprocess.run(["git", "ls-files", *let_in], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.partition("/")[0] for line in tracked.stdout.splitlines()} == {s.partition("/")[0] for s in let_in}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for folder in (project["tool"]["setuptools"]["package-dir"].values(), project["tool"]["setuptools"]["packages"]):
        assert {name.partition(".")[0] for name in folder} <= set(let_in)


def test_the_images_packages_are_those_of_the_project_and_pinned() -> None:
    command = [sys.executable, FOLDER / "requirements.py", "postgres"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lines == [*project["dependencies"], *project["optional-dependencies"]["postgres"]]
    constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, constraints)}
    assert all(str(requirement.specifier).startswith("==") for requirement in pinned.values())
    assert {canonicalize_name(Requirement(line).name) for line in lines} <= pinned.keys()
    run = next(rest for name, rest in instructions(DOCKERFILE) if name == "RUN" and "requirements.py" in rest)
    assert (
        run
        == "python requirements.py postgres > requirements.txt && pip install -c constraints.txt -r requirements.txt"
    )


def test_the_compose_file_has_no_problems() -> None:
    assert problems(parse(COMPOSE), EXAMPLE) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('ports: ["127.0.0.1:${POSTGRES_PORT:-5432}:5432"]', 'ports: ["5432:5432"]', "not bound to 127.0.0.1"),
        ('["127.0.0.1:${MLFLOW_PORT:-5000}:5000"]', '["0.0.0.0:${MLFLOW_PORT:-5000}:5000"]', "not bound to 127.0.0.1"),
        ("POSTGRES_PASSWORD: ${POSTGRES_PASSWORD:?set it in docker/.env}", "POSTGRES_PASSWORD: abc", "secret"),
        ("POSTGRES_PASSWORD: ${POSTGRES_PASSWORD:?set it in docker/.env}", "POSTGRES_PASSWORD: ${P:-abc}", "secret"),
        ("lightning_moe:${POSTGRES_PASSWORD:?set it in docker/.env}@postgres:5432/sweeps", "a:b@c/d", "secret"),
        ("SWEEP_FILE", "SWEEP", "not in .env.example"),
        ("${REVISION:-unknown}", "unknown", "nothing uses it"),
        ("postgres:17.6-bookworm", "postgres:latest", "not pinned"),
        ("postgres:17.6-bookworm", "postgres:17", "not pinned"),
        ("mlflow: {condition: service_healthy}", "mlflow: {condition: service_started}", None),
        ("condition: service_healthy", "condition: service_started", "neither a health check"),
        ("./databases.sql", "./database.sql", "no such file"),
        ("  artifacts:\n", "", "not declared"),
        ("stop_grace_period", "stop_grace", "unknown key"),
        ('MLFLOW_DISABLE_TELEMETRY: "true"', "MLFLOW_DISABLE_TELEMETRY: true", "not text"),
        ("retries: 20", "retry: 20", "healthcheck: has"),
    ],
)
def test_the_checks_see_what_is_wrong(old: str, new: str, problem: str | None) -> None:
    assert old in COMPOSE
    found = problems(parse(COMPOSE.replace(old, new)), EXAMPLE)
    assert any(problem in line for line in found) if problem else not found, found


def test_a_key_that_comes_twice_and_a_password_in_the_example_are_seen() -> None:
    with pytest.raises(yaml.YAMLError, match="twice: restart"):
        parse(COMPOSE.replace("    shm_size", "    restart: always\n    shm_size"))
    assert problems(parse(COMPOSE), EXAMPLE | {"POSTGRES_PASSWORD": "abc"})


def test_without_a_password_nothing_starts() -> None:
    assert EXAMPLE["POSTGRES_PASSWORD"] == ""
    with pytest.raises(ValueError, match=r"POSTGRES_PASSWORD: set it in docker/\.env"):
        interpolate(parse(COMPOSE), EXAMPLE)
    assert subprocess.run(["git", "check-ignore", "-q", "docker/.env"], cwd=ROOT).returncode == 0


def test_compose_and_dockerfile_agree() -> None:
    content = interpolate(parse(COMPOSE), EXAMPLE | {"POSTGRES_PASSWORD": "x"})
    arguments = {rest.partition("=")[0] for name, rest in instructions(DOCKERFILE) if name == "ARG"}
    owned = next(rest for name, rest in last_stage(DOCKERFILE) if name == "RUN" and "install -d -o trainer" in rest)
    ours = [service for service in content["services"].values() if "build" in service]
    assert len(ours) == 2
    for service in ours:
        assert service["build"].keys() == {"context", "dockerfile", "args"}
        assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DOCKERFILE
        assert service["build"]["args"].keys() == arguments
        for volume in service["volumes"]:
            if not volume.startswith("."):
                assert volume.partition(":")[2] in owned.split()
    folder = next(rest for name, rest in last_stage(DOCKERFILE) if name == "WORKDIR")
    assert environment(DOCKERFILE)["LIGHTNING_MOE_CACHE"].startswith(f"{folder}/")
    sweep = content["services"]["worker"]["volumes"][1]
    assert sweep.split(":")[1] == f"{folder}/{content['services']['worker']['command'][-1]}"


def test_the_file_for_gpus_changes_the_worker_only() -> None:
    over = parse((FOLDER / "compose.cuda.yaml").read_text())
    worker = parse(COMPOSE)["services"]["worker"]
    assert over["services"].keys() == {"worker"}
    assert over["services"]["worker"].keys() == {"command", "deploy"}
    assert over["services"]["worker"]["command"] == [*worker["command"], "--config", "trainer/gpu"]
    (device,) = over["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_the_shipped_sweep_is_read_and_fits_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    worker: dict[str, Any] = interpolate(parse(COMPOSE), {"POSTGRES_PASSWORD": "x"})["services"]["worker"]
    url = worker["environment"]["SWEEP_STORAGE"]
    monkeypatch.setenv("SWEEP_STORAGE", url)
    monkeypatch.delenv("LIGHTNING_MOE_RUN", raising=False)
    sweep = read_sweep(FOLDER / volume_source(worker["volumes"][1]))
    assert sweep.storage == url
    check_space(sweep)
