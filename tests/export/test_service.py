"""The folders that serve an engine: what is in them, and that they run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from imgtool import cli, engines, header
from imgtool.errors import ImgtoolError
from imgtool.export import service
from imgtool.serve import Service, wsgi

ROOT = Path(__file__).parents[2]
UNNEEDED = "typer,rich,jinja2,matplotlib,torchvision,onnx,onnxruntime,skimage,imageio,tomli_w,scipy"

ASK = """
import asyncio, inspect, json, sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in WALLED:
            raise ModuleNotFoundError(name)

WALLED = sys.argv[1].split(",")
sys.meta_path.insert(0, Wall())
sys.path.insert(0, ".")
import azure.functions as func
import function_app

functions = {each.get_function_name(): each for each in function_app.app.get_functions()}

def ask(name, method, body=b"", params=None, headers=None):
    request = func.HttpRequest(method=method, url=f"https://x.net/api/{name}?a=1", body=body,
                               params=params or {}, headers=headers or {}, route_params={})
    reply = functions[name].get_user_function()(request)
    reply = asyncio.run(reply) if inspect.iscoroutine(reply) else reply
    return reply.status_code, reply.get_body(), reply.mimetype, dict(reply.headers)

engine = sys.argv[2]
triggers = {name: json.loads(each.get_function_json())["bindings"][0] for name, each in functions.items()}
photo = open(sys.argv[3], "rb").read()
good = ask(engine, "POST", photo, headers={"Accept": sys.argv[4], "Content-Type": "image/any"})
open(sys.argv[5], "wb").write(good[1])
told = {
    "triggers": triggers,
    "health": [ask("health", "GET")[0], json.loads(ask("health", "GET")[1])],
    "good": [good[0], good[2], good[3]],
    "get": ask(engine, "GET")[0],
    "hostile": ask(engine, "POST", photo, {"weights": "/etc/passwd"})[0],
    "keyed": ask(engine, "POST", photo, {"code": "key"})[0],
    "large": ask(engine, "POST", bytes(200_001))[0],
    "none": ask(engine, "POST", b"no photo")[0],
    "apart": inspect.iscoroutinefunction(functions["health"].get_user_function()),
    "from": sys.modules["imgtool"].__file__,
    "torch": "torch" in sys.modules,
}
print(json.dumps(told))
"""


def write(folder: Path, engine: str, to: str, **values: Any) -> dict[str, Any]:
    record = engines.load(engine)
    settings = engines.settings(engine).Export(to=to, **values)
    folder.mkdir()
    return service.write(record, settings, folder, header.find(record.weights))


def ask(folder: Path, engine: str, photo: Path, accept: str = "") -> tuple[dict[str, Any], bytes]:
    """Import a function app in a fresh process that lacks what it should not need, and ask it."""
    result = folder.parent / "result"
    words = [sys.executable, "-c", ASK, UNNEEDED, engine, str(photo), accept, str(result)]
    # Not the package that is installed here: the folder's own.
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), result.read_bytes()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("azure") / "app"
    write(folder, "awb", "azure-function", max_mb=0.2, auth="function")
    return folder


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docker") / "app"
    write(folder, "isp", "docker", max_megapixels=12, threads=3)
    return folder


def test_a_function_app_answers_as_infer_does(azure: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = ROOT / "examples" / "chart.kdc"
    assert cli.run(["infer", "awb", str(chart), "--json", "-q"]) == 0
    expected = json.loads(capsys.readouterr().out)["facts"]
    told, body = ask(azure, "awb", chart)
    assert told["good"][:2] == [200, "application/json"]
    assert json.loads(body)["facts"] == expected
    statuses = [told[name] for name in ("get", "hostile", "keyed", "large", "none")]
    assert statuses == [405, 400, 200, 413, 415]
    assert told["health"][0] == 200
    assert told["health"][1]["weights"] == "awb-hist"
    assert Path(told["from"]).resolve() == (azure / "imgtool" / "__init__.py").resolve()
    assert not told["torch"]
    assert told["apart"], "health waits for none of the threads that may all be taken"
    work, health = told["triggers"]["awb"], told["triggers"]["health"]
    assert (work["type"], work["authLevel"], work["route"]) == ("httpTrigger", "FUNCTION", "awb")
    assert (health["authLevel"], health["methods"]) == ("ANONYMOUS", ["GET"])


@pytest.mark.slow
def test_a_function_app_sharpens_as_infer_does_without_what_it_need_not_have(tmp_path: Path) -> None:
    folder, target, photo = tmp_path / "app", tmp_path / "out.jpg", ROOT / "examples" / "blurred.jpg"
    write(folder, "deblur", "azure-function", max_mb=0.2, auth="anonymous")
    assert cli.run(["infer", "deblur", str(photo), "-o", str(target), "--threads", "1", "-q"]) == 0
    told, body = ask(folder, "deblur", photo)
    assert told["good"][:2] == [200, "image/jpeg"]
    assert body == target.read_bytes()
    assert told["triggers"]["deblur"]["authLevel"] == "ANONYMOUS"


def test_a_function_app_holds_what_the_host_reads(azure: Path) -> None:
    host = json.loads((azure / "host.json").read_text())
    assert host["version"] == "2.0"
    assert re.fullmatch(r"\[\d\.\*, \d\.0\.0\)", host["extensionBundle"]["version"])
    assert host["functionTimeout"] == "00:05:00"
    local = json.loads((azure / "local.settings.json").read_text())
    calls = host["extensions"]["http"]
    assert calls["maxOutstandingRequests"] > calls["maxConcurrentRequests"] > Service.of(azure).places
    assert local["Values"]["PYTHON_THREADPOOL_THREAD_COUNT"] == str(calls["maxConcurrentRequests"])
    assert Service.of(azure).limits.seconds < 230, "the load balancer gives up before"
    assert local["Values"]["FUNCTIONS_WORKER_RUNTIME"] == "python"
    assert "local.settings.json" in (azure / ".funcignore").read_text().splitlines()


def requirements(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("--"))


def test_requirements_are_the_versions_that_are_installed(azure: Path, docker: Path) -> None:
    own, cpu, gpu = (
        requirements(path)
        for path in (azure / "requirements.txt", docker / "requirements.txt", docker / "requirements-gpu.txt")
    )
    for found in (own, cpu, gpu):
        for name, version in found.items():
            assert metadata.version(name).partition("+")[0] == version.partition("+")[0]
    assert "azure-functions" in own
    assert "torch" not in own
    assert "waitress" in cpu
    assert cpu["torch"].endswith("+cpu")
    assert "+" not in gpu["torch"]
    assert set(cpu) == set(gpu)
    assert not {"torchvision", "typer", "rich", "matplotlib"} & {name.lower() for name in cpu}
    assert not {"torch", "jinja2"} & set(own)
    assert (
        "--extra-index-url https://download.pytorch.org/whl/cpu" in (docker / "requirements.txt").read_text()
    )
    assert "--extra-index-url" not in (azure / "requirements.txt").read_text()


def test_requirements_hold_all_that_they_need(azure: Path, docker: Path) -> None:
    for path in (azure / "requirements.txt", docker / "requirements.txt"):
        found = requirements(path)
        for name in found:
            for line in metadata.requires(name) or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                    pinned = found[canonicalize_name(needed.name)].partition("+")[0]
                    assert needed.specifier.contains(pinned, prereleases=True)


def test_what_is_needed_is_decided_by_where_services_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {
        "tifffile": ["pillow ; sys_platform == 'win32'", "colour ; sys_platform == 'linux'", "numpy"],
        "colour": ["tomli[fast]", "absent", "other ; extra == 'more'"],
        "tomli": ["quick ; extra == 'fast'", "slow ; extra == 'other'"],
        "quick": ["colour"],
    }
    versions = {"colour": "1", "quick": "2", "other": "3", "slow": "4"}
    version = metadata.version

    def installed(name: str) -> str:
        if name == "absent":
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or version(name)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(metadata, "version", installed)
    monkeypatch.setattr(metadata, "requires", needed.get)
    found = write(tmp_path / "a", "awb", "docker")["versions"]
    assert {name: found.get(name) for name in [*versions, "absent"]} == {
        "colour": "==1", "quick": "==2", "other": None, "slow": None, "absent": None,
    }  # fmt: skip


def test_a_folder_holds_the_package_and_only_the_weights_that_serve(azure: Path, docker: Path) -> None:
    for folder in (azure, docker):
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        assert "imgtool/engines/awb/engine.py" in names
        assert not [name for name in names if re.search(r"__pycache__|\.pyc$|test|\.j2$|specimens", name)]
        assert str(ROOT) not in "".join(path.read_text() for path in folder.glob("*") if path.is_file()), (
            "a path of this machine"
        )
    weights = {path.relative_to(docker).as_posix() for path in docker.rglob("*.safetensors")}
    # White balance by the awb engine is a setting of isp.
    assert weights == {"weights/isp-lrfu-s.safetensors", "imgtool/weights/awb-hist.safetensors"}
    assert [path.name for path in azure.rglob("*.safetensors")] == ["awb-hist.safetensors"]


def test_the_record_says_what_was_written(tmp_path: Path) -> None:
    record = write(tmp_path / "app", "awb", "docker")
    assert json.loads(json.dumps(record)) == record
    assert set(record["files"]) == {
        path.relative_to(tmp_path / "app").as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert record["routes"] == ["POST /api/awb", "GET /api/health"]
    assert record["limits"] == {"max_mb": 25.0, "max_megapixels": 36.0}
    assert record["auth"] == "none"
    assert "Dockerfile.gpu" not in record["files"], "a network that needs no torch has no use for a GPU"


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without(*lacking: str) -> None:
        def ask(name: str) -> str:
            if name in lacking:
                raise metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(metadata, "version", ask)

    without("waitress")
    assert write(tmp_path / "a", "awb", "docker")["versions"]["waitress"] == ">=3,<4"
    without("rawpy")
    with pytest.raises(ImgtoolError, match="rawpy is not installed"):
        write(tmp_path / "b", "awb", "docker")


def test_weights_of_another_engine_are_refused(tmp_path: Path) -> None:
    engine = engines.load("awb")
    settings = engines.settings("awb").Export(to="docker")
    with pytest.raises(ImgtoolError, match="weights of the lens engine"):
        service.write(engine, settings, tmp_path, header.find("lens-lines"))
    assert not list(tmp_path.iterdir())


def test_weights_that_changed_are_not_served(tmp_path: Path) -> None:
    write(tmp_path / "app", "awb", "docker")
    wsgi.application(tmp_path / "app")
    path = tmp_path / "app" / "weights" / "awb-hist.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImgtoolError, match=r"awb-hist\.safetensors has changed"):
        Service.of(tmp_path / "app")
    words = [sys.executable, "-m", "imgtool.serve"]
    done = subprocess.run(words, cwd=tmp_path / "app", capture_output=True, text=True, env=_environment())
    assert done.returncode == 1
    what = "error: weights/awb-hist.safetensors has changed since this service was made of it"
    assert what in done.stderr.splitlines()
    assert "IMGTOOL_TOKEN is not set" in done.stderr


def test_the_environment_sets_limits(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Service.of(docker).limits.max_megapixels == 12
    monkeypatch.setenv("IMGTOOL_MAX_MEGAPIXELS", "3.5")
    monkeypatch.setenv("IMGTOOL_MAX_MB", "2")
    limits = Service.of(docker).limits
    assert (limits.max_megapixels, limits.bytes, limits.seconds) == (3.5, 2_000_000, 300)
    monkeypatch.setenv("IMGTOOL_SECONDS", "7.5")
    assert Service.of(docker).limits.seconds == 7.5
    monkeypatch.setenv("IMGTOOL_MAX_MB", "-1")
    with pytest.raises(ImgtoolError, match="max_mb"):
        Service.of(docker)


INSTRUCTIONS = {
    "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "CMD",
}  # fmt: skip


def instructions(path: Path) -> list[tuple[str, str]]:
    """Split a Dockerfile as its reference says: continued lines joined, comments and blank lines left out."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_a_dockerfile_is_sound(name: str, docker: Path) -> None:
    found = instructions(docker / name)
    words = [word for word, _ in found]
    assert set(words) == INSTRUCTIONS
    assert found[0] == ("FROM", f"python:{sys.version_info.major}.{sys.version_info.minor}-slim")
    for _, copied in (each for each in found if each[0] == "COPY"):
        *sources, _ = copied.split()
        assert all((docker / source).exists() for source in sources)
        assert all(_kept(docker, source) for source in sources)
    last: Mapping[str, str] = dict(found)
    assert json.loads(last["CMD"]) == ["python", "-m", "imgtool.serve"]
    assert last["EXPOSE"] == "8080"
    check = json.loads(last["HEALTHCHECK"].partition("CMD")[2])
    compile(check[2], "HEALTHCHECK", "exec")
    assert words.index("USER") < words.index("CMD")
    assert last["USER"] not in ("root", "0")
    variables = [value for word, value in found if word == "ENV"]
    assert all("=" in pair for value in variables for pair in shlex.split(value))
    assert ("IMGTOOL_DEVICE=cuda" in " ".join(variables)) == name.endswith("gpu")
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", (docker / name).read_text())


def _kept(folder: Path, source: str) -> bool:
    """Tell whether .dockerignore, which leaves out all but what it names, lets a source in."""
    lines = (folder / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    patterns = [line[1:] for line in lines if line.startswith("!")]
    return any(Path(source.removeprefix("./")).match(pattern) for pattern in patterns)


def test_the_readme_names_the_route_and_the_limits(azure: Path, docker: Path) -> None:
    for folder, engine, more in ((azure, "awb", "x-functions-key"), (docker, "isp", "IMGTOOL_TOKEN")):
        text = (folder / "README.md").read_text()
        assert f"POST /api/{engine}" in text
        assert more in text
        assert "{{" not in text
        assert "{%" not in text
    text = (docker / "README.md").read_text()
    assert "12 megapixels" in text
    assert "no reply within 300 s" in text
    assert '-e IMGTOOL_TOKEN="${IMGTOOL_TOKEN:?}"' in text
